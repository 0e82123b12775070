"""The report of a run whose metrics are made up, so that every number is known."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from status_run import write_checkpoint, write_ends
from tsmoe.__main__ import main
from tsmoe.errors import DataError
from tsmoe.report.history import Thinned, read_run
from tsmoe.report.pictures import thin
from tsmoe.report.summary import summarise
from tsmoe.report.write import WrittenReport, write_report

STEPS = 40
NEW = {"speed/mfu", "speed/flops_per_second", "speed/tokens_per_second", "speed/step_seconds",
       "speed/of_step_before", "speed/start", "data/tokens"}  # fmt: skip


def step_line(step: int) -> dict[str, Any]:
    """Two layers of four experts on two ranks; rank 1 is slower in every third step."""
    slowest = int(step % 3 == 0)
    before = {
        "communication_share": 0.25,
        "all_to_all_share": 0.1,
        "all_ranks_data_wait_share": 0.1,
        "straggler_spread_seconds": 0.2 if slowest else 0.1,
        "slowest_rank": slowest,
        "peak_memory_bytes": 1000 + step,
        "bytes_out": 4096,
        "rows_moved": [10, 20],
        "forward_seconds": [0.01, 0.02],
        "backward_seconds": [0.03, 0.04],
        "compute_seconds": [1.0, 1.2 if slowest else 0.9],
        "data_wait_seconds": [0.1, 0.3],
        "memory_bytes": [900, 1000 + step],
    }
    line: dict[str, Any] = {
        "step": step,
        "loss/train": 10.0 / (step + 1),
        "optimizer/grad_norm": 1.5,
        "optimizer/lr": 1e-3,
        "speed/step_seconds": 100.0 if step == 0 else 2.0,
        "speed/points_per_second": 1.0 if step == 0 else 500.0,
        "speed/tokens_per_second": 50.0,
        "speed/flops_per_second": 1e9,
        "speed/mfu": 0.5,
        "speed/data_wait_share": 0.05,
        "data/points": 1000,
        "data/tokens": 100,
        "experts": {
            "load_entropy": [1.0, 0.5],
            "live_experts": [1.0, 0.75],
            "margin": [0.25, None],
            "load": [[4, 4, 4, 4], [8, 6, 2, 0]],
            "load_bias": [[0.0] * 4, [0.1] * 4],
            "dead": {"after_steps": 100, "ids": [[], [3]]},
        },
    }
    if step:
        line["speed/of_step_before"] = before
    else:
        line["speed/start"] = {"ranks": 2, "peak_flops": 2e9, "peak_is": "by hand"}
    return line


def write_run(run: Path, lines: list[dict[str, Any]], *, name: str = "tide") -> Path:
    run.mkdir(exist_ok=True)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    (run / "config.yaml").write_text(yaml.safe_dump({"run": name, "training": {"steps": 50}}))
    return run


def whole_run(run: Path) -> Path:
    lines = [step_line(step) for step in range(STEPS)]
    lines.insert(20, {"step": 19, "loss/validation": 0.75})
    lines.insert(20, {"step": 19, "sources": {"sea": 0.75, "<b>$x^2$": 0.25}})
    return write_run(run, [*lines, {"step": 39, "loss/validation": 0.9}])


def older(line: dict[str, Any]) -> dict[str, Any]:
    """Take out of a line what older versions did not record."""
    kept = {key: value for key, value in line.items() if key not in NEW}
    experts = {k: v for k, v in line["experts"].items() if k not in ("margin", "dead")}
    return kept | {"experts": experts}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> WrittenReport:
    """The report of a run that lacks nothing; drawing takes longest."""
    return write_report(whole_run(tmp_path_factory.mktemp("whole") / "<i>run"))


def summary_of(run: Path) -> dict[str, Any]:
    return summarise(read_run(run))


def test_numbers_are_those_of_the_metrics(whole) -> None:
    summary = whole.summary
    assert summary["steps"] == {"done": STEPS, "planned": 50}
    assert summary["state"] == "unfinished"
    assert summary["loss"] == {
        "first": 10.0,
        "mean_of_last": {"steps": 2, "loss": pytest.approx((10 / 39 + 10 / 40) / 2)},
        "best_validation": {"step": 20, "loss": 0.75},
        "last_validation": 0.9,
    }
    speed = summary["speed"]
    # The first step after a start is no measure of speed.
    assert speed["median_points_per_second"] == 500
    assert speed["median_step_seconds"] == 2.0
    assert speed["median_mfu"] == 0.5
    assert speed["median_communication_share"] == 0.25
    assert speed["peak_memory_bytes"] == 1000 + STEPS - 1
    assert summary["starts"] == [{"step": 0, "ranks": 2, "peak_flops": 2e9, "peak_is": "by hand"}]
    assert summary["missing"] == []


def test_experts_and_stragglers_are_told_by_layer_and_by_rank(whole) -> None:
    summary = whole.summary
    even, skewed = summary["experts"]["layers"]
    assert (even["busiest_times_mean"], even["idlest_times_mean"]) == (1.0, 1.0)
    assert (skewed["busiest_times_mean"], skewed["idlest_times_mean"]) == (2.0, 0.0)
    assert (even["dead_experts"], skewed["dead_experts"]) == ([], [3])
    assert summary["experts"]["dead_after_steps"] == 100
    assert (even["margin"], skewed["margin"]) == (0.25, None)
    assert (even["rows_moved"], skewed["rows_moved"]) == (10, 20)
    assert skewed["backward_seconds"] == pytest.approx(0.04)
    stragglers = summary["stragglers"]
    assert stragglers["median_spread_seconds"] == 0.1
    assert stragglers["spread_seconds_of_95_percent"] == pytest.approx(0.2)
    first, second = stragglers["ranks"]
    assert first["mean_compute_seconds"] == 1.0
    assert second["slowest_share_of_steps"] == pytest.approx(13 / 39)
    assert second["peak_memory_bytes"] == 1000 + STEPS - 1


def test_page_needs_nothing_beside_it_and_escapes_names(whole) -> None:
    written = whole
    text = written.page.read_text()
    names = {path.stem for path in written.page.parent.glob("*.png")}
    assert names == {
        "loss", "schedule", "throughput", "shares", "load_over_time", "layers_over_time",
        "exchange", "stragglers", "sources",
    }  # fmt: skip
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<i>" not in text
    assert "<b>$" not in text
    assert "&lt;b&gt;$x^2$" in text
    for path in written.page.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads((written.page.parent / "report.json").read_text()) == written.summary


def test_run_that_is_going_on_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(STEPS))[:90])
    summary = summary_of(run)
    assert summary["steps"]["done"] == STEPS
    assert summary["missing"] == ["1 line(s) of metrics.jsonl: cannot be read, left out"]


@pytest.mark.parametrize(
    "changes",
    [{"loss/train": "low"}, {"experts": 3}, {"experts": {"load": [1, 2]}}, {"step": None}],
)
def test_lines_of_another_kind_are_left_out_and_counted(tmp_path: Path, changes) -> None:
    run = whole_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(STEPS) | changes) + "\n")
    summary = summary_of(run)
    assert summary["steps"]["done"] == STEPS
    assert summary["missing"] == ["1 line(s) of metrics.jsonl: cannot be read, left out"]


def test_run_whose_losses_are_not_finite_has_a_report(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [
        line | {key: float("nan") for key in ("loss/train", "loss/validation") if key in line}
        for line in lines
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = write_report(run, None)
    assert (written.page.parent / "loss.png").exists()


@pytest.mark.parametrize(("marker", "state"), [("DONE", "done"), ("REQUEUE", "stopped")])
def test_marker_tells_how_a_run_ended(tmp_path: Path, marker: str, state: str) -> None:
    run = whole_run(tmp_path / "run")
    (run / marker).write_text("40\n")
    assert summary_of(run)["state"] == state


def test_run_of_an_older_version_says_what_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [older(step_line(step)) for step in range(STEPS)])
    written = write_report(run)
    missing = written.summary["missing"]
    for text in (
        "mfu: not recorded", "slowest_rank: not recorded", "margin of each layer: not recorded",
        "compute_seconds of each rank: not recorded", "validation loss: there is none yet",
    ):  # fmt: skip
        assert text in missing
        assert text in written.page.read_text()
    assert written.summary["stragglers"] is None
    assert written.summary["speed"]["median_mfu"] is None
    assert written.summary["experts"]["layers"][1]["dead_experts"] is None
    names = {path.stem for path in written.page.parent.glob("*.png")}
    assert names == {"loss", "schedule", "throughput", "shares", "load_over_time",
                     "layers_over_time"}  # fmt: skip


def test_older_run_that_goes_on_with_this_version_says_from_which_step(tmp_path: Path) -> None:
    lines = [older(step_line(step)) for step in range(10)]
    again = step_line(10) | {"speed/start": {"ranks": 1, "peak_flops": None, "peak_is": "none"}}
    lines += [again, *(step_line(step) for step in range(11, 20))]
    summary = write_report(write_run(tmp_path / "run", lines)).summary
    assert "mfu: recorded from step 10" in summary["missing"]
    assert [start["step"] for start in summary["starts"]] == [10]
    assert summary["speed"]["median_mfu"] == 0.5


def test_dense_run_of_one_step_has_a_report(tmp_path: Path) -> None:
    line = step_line(0)
    line["experts"] = {"load_entropy": [], "live_experts": [], "margin": [], "load": [],
                       "load_bias": [], "dead": {"after_steps": 100, "ids": None}}  # fmt: skip
    summary = write_report(write_run(tmp_path / "run", [line])).summary
    assert summary["experts"] is None
    assert "experts: no loads were recorded (a dense model has none)" in summary["missing"]


def test_other_folder_is_told_in_one_line(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "is no folder of a run (it has no metrics.jsonl)" in message
    assert not list(tmp_path.iterdir())
    assert main(["report", str(tmp_path / "none")]) == 3


def test_run_without_a_step_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    with pytest.raises(DataError, match="no step was recorded yet"):
        read_run(run)


def test_command_prints_the_state_and_json_is_the_summary(tmp_path: Path, capsys) -> None:
    run, out = whole_run(tmp_path / "run"), tmp_path / "out"
    assert main(["report", str(run), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "unfinished: step 40 of 50" in told
    assert f"report: {out / 'report.html'}" in told
    assert not (run / "report").exists()
    assert main(["report", str(run), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary_of(run)


def test_file_in_place_of_a_folder_exits_with_2(tmp_path: Path, capsys) -> None:
    run, out = whole_run(tmp_path / "run"), tmp_path / "out"
    out.write_text("")
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert "is a file; choose a folder" in capsys.readouterr().err


def test_many_tables_are_thinned_evenly() -> None:
    kept = Thinned()
    for step in range(3000):
        kept.add(step, np.array([step, np.nan]))
    assert 256 <= len(kept.steps) <= 512
    assert set(np.diff(kept.steps)) == {8}
    assert (kept.tables[:, 0] == kept.steps).all()


def test_long_curves_keep_their_mean_and_skip_what_is_unknown() -> None:
    values = np.arange(2000.0)
    values[::2] = np.nan
    steps, means = thin(np.arange(2000), values)
    assert len(means) == 1000
    steps, means = thin(np.arange(8000), np.arange(8000.0))
    assert len(means) == 1000
    np.testing.assert_allclose(means, steps)


def test_starts_and_checkpoints_are_tables_of_the_page(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    write_checkpoint(run, 10, age=900)
    write_checkpoint(run, 20, age=300, cut=True)
    write_ends(run, {"reason": "node <n1> was lost", "decision": "restart"},
               {"restart": 1, "outcome": "done", "decision": "none", "exit_code": 0, "step": 40,
                "reason": ""})  # fmt: skip
    written = write_report(run)
    first, second = written.summary["ends"]
    assert (first["outcome"], first["decision"], first["nodes"]) == ("crashed", "restart", ["n1"])
    assert (second["restart"], second["step"]) == (1, 40)
    kept = [(kept["step"], kept["damage"]) for kept in written.summary["checkpoints"]]
    assert kept == [(10, None), (20, "dense.safetensors has 50 bytes instead of 100")]
    assert written.summary["checkpoints"][0]["saved"] == "2027-01-15T07:45:00+00:00"
    text = written.page.read_text()
    for words in ("Restarted 1 time(s)", "node &lt;n1&gt; was lost", "crashed (1)",
                  "50 bytes instead of 100", "2027-01-15 07:45:00"):  # fmt: skip
        assert words in text
    without_pictures = re.sub(r'"data:image/png;base64,[^"]*"', "", text)
    assert not re.search(r"//|@import|url\(|<script|<link", without_pictures)


def test_run_without_starts_or_checkpoints_has_no_such_tables(whole) -> None:
    assert whole.summary["ends"] == whole.summary["checkpoints"] == []
    text = whole.page.read_text()
    assert "<h2>Starts" not in text
    assert "<h2>Checkpoints" not in text
