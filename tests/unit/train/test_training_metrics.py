import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tsmoe.train.board import listed
from tsmoe.train.metrics import MetricsWriter, expert_metrics
from tsmoe.train.step import StepReport
from tsmoe.train.telemetry import StepCost
from tsmoe.train.throughput import Throughput

LOAD_ME = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [10, 5, 1, 0]])


SPEED = Throughput(
    step_seconds=2.0,
    points_per_second=5.0,
    tokens_per_second=2.0,
    flops_per_second=1e9,
    mfu=None,
    data_wait_share=0.1,
)
COST = StepCost(
    step_seconds=2.0,
    compute_seconds_R=[1.0, 1.5],
    data_wait_seconds_R=[0.1, 0.3],
    memory_bytes_R=[100, 300],
    all_to_all_seconds=0.1,
    reduce_seconds=0.3,
    bytes_out=640,
    rows_moved_M=[3, 4, 5],
    forward_all_to_all_seconds_M=[0.01, 0.02, 0.03],
    backward_all_to_all_seconds_M=[0.02, 0.01, 0.01],
)


def report(
    loss: float, *, load_ME: torch.Tensor = LOAD_ME, cost_before: StepCost | None = None
) -> StepReport:
    return StepReport(
        loss=loss,
        num_points=10,
        num_tokens=4,
        num_sequences=2,
        grad_norm=1.0,
        lr=0.1,
        load_ME=load_ME,
        margin_M=torch.tensor([0.5, 0.25, float("nan")], dtype=torch.float64),
        flags=(),
        cost_before=cost_before,
    )


def write(run: Path, steps: range, *, loss: float) -> None:
    writer = MetricsWriter(run, first_step=steps.start, log_every_steps=2)
    for step in steps:
        writer.write_step(step, report(loss), bias_ME=torch.zeros(3, 4), speed=SPEED)
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


def board_of(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return board


def test_cost_of_the_step_before_is_recorded_by_rank_and_by_layer(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=2)
    for step in range(3):
        cost = COST if step else None
        writer.write_step(
            step, report(1.0, cost_before=cost), bias_ME=torch.zeros(3, 4), speed=SPEED
        )
    writer.close()
    found = [line.get("speed/of_step_before") for line in lines(tmp_path)]
    assert found[0] is None
    assert found[2] == {
        "communication_share": pytest.approx(0.2),
        "all_to_all_share": pytest.approx(0.05),
        "all_ranks_data_wait_share": pytest.approx(0.1),
        "straggler_spread_seconds": 0.5,
        "slowest_rank": 1,
        "peak_memory_bytes": 300,
        "bytes_out": 640,
        "compute_seconds": [1.0, 1.5],
        "data_wait_seconds": [0.1, 0.3],
        "memory_bytes": [100, 300],
        "rows_moved": [3, 4, 5],
        "forward_seconds": [0.01, 0.02, 0.03],
        "backward_seconds": [0.02, 0.01, 0.01],
    }
    # Lists by rank are for the steps that are logged.
    lists = {"compute_seconds", "data_wait_seconds", "memory_bytes"}
    assert found[2].keys() - found[1].keys() == lists
    board = board_of(tmp_path)
    assert [event.step for event in board.Scalars("speed/slowest_rank")] == [2]
    assert [event.value for event in board.Scalars("exchange/rows_moved/layer_02")] == [5]


def test_margin_that_is_no_number_is_null_and_not_shown(tmp_path: Path) -> None:
    write(tmp_path, range(1), loss=1.0)
    assert lines(tmp_path)[0]["experts"]["margin"] == [0.5, 0.25, None]
    tags = board_of(tmp_path).Tags()["scalars"]
    assert "experts/margin/layer_01" in tags
    assert "experts/margin/layer_02" not in tags


def test_start_stands_in_the_first_line_only(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=2, start={"ranks": 2})
    for step in range(2):
        writer.write_step(step, report(1.0), bias_ME=torch.zeros(3, 4), speed=SPEED)
    writer.close()
    assert [line.get("speed/start") for line in lines(tmp_path)] == [{"ranks": 2}, None]


def test_pictures_of_loads_come_with_the_validation(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=2)
    for step in range(5):
        writer.write_step(step, report(1.0), bias_ME=torch.zeros(3, 4), speed=SPEED)
    writer.write_validation(4, 1.0, seconds=0.1)
    writer.close()
    board = board_of(tmp_path)
    by_layer = board.Images("experts/load_by_layer")[0]
    assert (by_layer.height, by_layer.width) == (3 * 8, 4 * 8)
    over_time = board.Images("experts/load_over_time/layer_01")[0]
    assert (over_time.height, over_time.width) == (4 * 8, 5 * 8)


def test_shares_of_the_sources_are_a_line_and_the_largest_are_shown(tmp_path: Path) -> None:
    shares = {f"s{number}": (number + 1) / 3321 for number in range(81)}
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=10)
    writer.write_sources(20, shares)
    writer.close()
    assert lines(tmp_path) == [{"step": 20, "sources": shares}]
    tags = board_of(tmp_path).Tags()["scalars"]
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
    writer.write_validation(7, 1.5, seconds=0.25)
    writer.close()
    assert lines(tmp_path) == [
        {"step": 7, "loss/validation": 1.5, "speed/validation_seconds": 0.25}
    ]


def test_tags_of_runs_that_few_have_are_in_the_list(tmp_path: Path) -> None:
    """Those of every run are held against the list in tests/integration/test_board_of_runs.py."""
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=110)
    for step in range(111):
        of_step = replace(report(1.0), regulariser=0.5)
        writer.write_step(step, of_step, bias_ME=torch.zeros(3, 4), speed=SPEED)
    writer.write_stream(110, {"epoch": 1, "used": 5, "drops": {"short": 2, "flat": 1}})
    writer.close()
    board = board_of(tmp_path)
    found = {listed(name, "scalars") for name in board.Tags()["scalars"]}
    assert None not in found
    names = {tag.name for tag in found}
    assert names >= {"loss/regulariser", "experts/dead/layer_{layer}", "stream/epoch",
                     "stream/series_used", "stream/dropped"}  # fmt: skip
    assert [event.value for event in board.Scalars("stream/dropped")] == [3]


def test_what_was_logged_is_in_the_file_before_the_run_ends(tmp_path: Path) -> None:
    """A run that is killed must not lose points that it will not make again."""
    writer = MetricsWriter(tmp_path, first_step=0, log_every_steps=2)
    for step in range(6):
        writer.write_step(step, report(1.0), bias_ME=torch.zeros(3, 4), speed=SPEED)
    assert [event.step for event in board_of(tmp_path).Scalars("loss/train")] == [0, 2, 4]
    writer.close()


def test_settings_of_each_start_are_a_text(tmp_path: Path) -> None:
    for first_step, text in ((0, "seed: 1\n"), (4, "seed: 2\n  - <b>\n")):
        (tmp_path / "config.yaml").write_text(text)
        MetricsWriter(tmp_path, first_step=first_step, log_every_steps=2).close()
    events = board_of(tmp_path).Tensors("run/settings/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in events]
    assert [event.step for event in events] == [0, 4]
    assert texts == ["    seed: 1", "    seed: 2\n      - <b>"]
