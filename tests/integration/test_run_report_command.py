"""`tsmoe report` of a run that was trained: what one writes the other finds."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from small_run import SMALL, build_small_corpus
from tsmoe.__main__ import main
from tsmoe.config import merge_layers


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of six steps that went on to twelve."""
    folder = tmp_path_factory.mktemp("reported")
    corpus = build_small_corpus(folder / "small")
    training = {"validate_every_steps": 3, "log_every_steps": 2}
    settings = merge_layers(SMALL, {"corpus": str(corpus), "training": training})
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    for steps in (6, 12):
        arguments = [str(folder / "small.yaml"), f"run={folder / 'run'}", f"training.steps={steps}"]
        assert main(["pretrain", *arguments]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def lines(run) -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if "loss/train" in line]


def test_report_misses_nothing_that_a_run_records(run, lines, capsys) -> None:
    assert main(["report", str(run), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["missing"] == []
    assert summary["state"] == "done"
    assert summary["steps"] == {"done": 12, "planned": 12}
    assert [(start["step"], start["ranks"]) for start in summary["starts"]] == [(0, 1), (6, 1)]
    assert set(summary["sources"]) == {"waves", "walks"}
    assert summary["loss"]["mean_of_last"]["loss"] == lines[-1]["loss/train"]
    assert len(summary["experts"]["layers"]) == 2
    assert all(layer["margin"] > 0 for layer in summary["experts"]["layers"])
    assert summary["speed"]["median_communication_share"] < 0.5
    assert summary["stragglers"]["median_spread_seconds"] == 0
    page = (run / "report" / "report.html").read_text()
    assert page.count("<img ") == len(list((run / "report").glob("*.png"))) == 7


def test_mfu_is_operations_over_time_and_peak(lines) -> None:
    peak = lines[0]["speed/start"]["peak_flops"]
    assert peak > 1e8
    # By hand: 4 patches of 16 points, width 32, 2 layers, 2 of 4 experts and one shared of 32.
    token = 2 * (4 * 32**2 + 2.5 * 2 * 32 + 3 * 32 * 64 + 3 * 32 * 32 + 32 * 4)
    step = 2 * (3 * token + 2 * 2 * 16 * 32 + 3 * 32 * 16) * 4 * 16
    for line in lines[:6]:
        per_second = step / line["speed/step_seconds"]
        assert line["speed/flops_per_second"] == pytest.approx(per_second)
        assert line["speed/mfu"] == pytest.approx(per_second / peak)
        assert line["data/tokens"] == 4 * 16


def test_cost_of_a_step_fits_in_its_time(lines) -> None:
    for before, line in pairwise(lines[:6]):
        cost = line["speed/of_step_before"]
        assert 0 <= cost["communication_share"] < 1
        if "compute_seconds" in cost:
            assert 0 < cost["compute_seconds"][0] < before["speed/step_seconds"]
    # The first step of a start knows nothing of the one before.
    assert [line["step"] for line in lines if "speed/of_step_before" not in line] == [0, 6]


def test_pictures_of_the_loads_are_in_tensorboard(run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["images"]) == {
        "experts/load_by_layer",
        "forecasts/held_out",
        "experts/load_over_time/layer_00",
        "experts/load_over_time/layer_01",
    }
    # Those of the second start begin where the first one ended.
    assert [event.step for event in board.Images("experts/load_by_layer")] == [2, 5, 8, 11]
    widths = [event.width for event in board.Images("experts/load_over_time/layer_00")]
    assert widths == [3 * 8, 6 * 8, 9 * 8, 12 * 8]
