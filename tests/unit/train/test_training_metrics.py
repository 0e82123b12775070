import json
from pathlib import Path

import pytest
import torch

from tsmoe.errors import CheckpointError
from tsmoe.train.metrics import MetricsWriter, expert_metrics
from tsmoe.train.step import StepReport

LOAD_ME = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [10, 5, 1, 0]])


def report(loss: float) -> StepReport:
    return StepReport(loss=loss, num_points=10, grad_norm=1.0, lr=0.1, load_ME=LOAD_ME, flags=())


def write(run: Path, steps: range, *, loss: float) -> None:
    writer = MetricsWriter(run, first_step=steps.start, log_every_steps=2)
    for step in steps:
        writer.write_step(
            step, report(loss), bias_ME=torch.zeros(3, 4), points_per_second=5.0,
            data_wait_share=0.1,
        )  # fmt: skip
    writer.close()


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_entropy_is_one_when_even_and_zero_when_collapsed() -> None:
    entropy = expert_metrics(LOAD_ME)["load_entropy"]
    assert entropy[:2] == pytest.approx([1.0, 0.0], abs=1e-9)
    assert 0.1 < entropy[2] < 0.9


def test_expert_below_a_quarter_of_the_mean_load_is_not_live() -> None:
    # Of a mean of 4: 1 is a quarter and just live, 0 is not.
    assert expert_metrics(LOAD_ME)["live_experts"] == [1.0, 0.25, 0.75]


@pytest.mark.parametrize("load", [[[0, 0, 0]], [[7]]])
def test_layers_without_load_or_choice_have_finite_metrics(load: list) -> None:
    for values in expert_metrics(torch.tensor(load)).values():
        assert all(0 <= value <= 1 for value in values)


def test_every_step_is_a_line(tmp_path: Path) -> None:
    write(tmp_path, range(5), loss=2.0)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(5))
    assert found[3]["loss/train"] == 2.0
    assert found[3]["experts"]["load"] == LOAD_ME.tolist()
    assert any((tmp_path / "tensorboard").iterdir())


def test_shares_of_the_sources_are_a_line_and_the_largest_are_shown(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shares = {f"s{number}": (number + 1) / 3321 for number in range(81)}
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=10)
    writer.write_sources(20, shares)
    writer.close()
    assert lines(tmp_path) == [{"step": 20, "sources": shares}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert len(tags) == 64
    assert "sources/s80" in tags
    assert "sources/s0" not in tags


def test_resume_drops_what_comes_again_and_a_line_that_was_cut(tmp_path: Path) -> None:
    write(tmp_path, range(6), loss=2.0)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) - 40])  # killed while writing step 5
    write(tmp_path, range(4, 8), loss=3.0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(8))
    assert [line["loss/train"] for line in lines(tmp_path)] == [2.0] * 4 + [3.0] * 4


def test_cut_line_before_the_resumed_step_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(3), loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss/tr')
    write(tmp_path, range(4, 5), loss=3.0)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 4]


def test_validation_loss_is_a_line_of_its_own(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=1)
    writer.write_validation(7, 1.5)
    writer.close()
    assert lines(tmp_path) == [{"step": 7, "loss/validation": 1.5}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_is_told_with_the_files_name(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=1)
    writer._lines.close()
    writer._lines = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(CheckpointError, match=r"/dev/full: cannot be written .*No space left"):
        writer.write_validation(0, 1.0)
    writer.close()
