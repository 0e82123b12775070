"""What two ranks that share experts are told of a step's cost."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from rank_pool import run_on_ranks
from small_run import build_small_corpus, one_step, small_config
from tsmoe import ranks as ranks_module
from tsmoe.engine.build import build_engine
from tsmoe.moe.layer import MoELayer
from tsmoe.ranks import CommunicationMeter
from tsmoe.train.run_config import RunConfig
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.telemetry import StepCost, StepTelemetry

SLOW_RANK, SLEEP = 1, 0.2
STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rank saw of its steps."""

    losses: list[float]
    costs: list[StepCost | None]
    """Of the steps before."""
    moved_SM: list[list[int]]
    """Pairs of a token and an expert of the other rank, counted from this rank's own routings."""


def steps_with(config: RunConfig, *, measures: bool, slow_from: int) -> Measured:
    """Do some steps; from one on, the slow rank sleeps once in each forward pass."""
    ranks = ranks_module.start(timeout_seconds=60, device="cpu")
    if measures:
        ranks = replace(ranks, meter=CommunicationMeter())
    engine = build_engine(config, ranks, prepare=prepare_pretraining)
    telemetry = StepTelemetry(engine) if measures else None
    moved: list[list[int]] = []

    def count_moves(layer: MoELayer, _: object, outputs: tuple) -> None:
        expert_ids = outputs[1].expert_ids_BCNK
        moved[-1].append(int((expert_ids // layer.experts.num_local_experts != ranks.rank).sum()))

    def sleep(*_: object) -> None:
        if ranks.rank == SLOW_RANK and len(moved) > slow_from:
            time.sleep(SLEEP)

    engine.model.blocks[0].register_forward_pre_hook(sleep)
    for module in engine.model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_hook(count_moves)
    reports = []
    for step in range(STEPS):
        moved.append([])
        begun = time.monotonic()
        if telemetry is not None:
            telemetry.step_begins()
        reports.append(one_step(config, engine, step, telemetry=telemetry))
        if telemetry is not None:
            telemetry.step_ended(seconds=time.monotonic() - begun, seconds_waited=0.0)
    return Measured(
        losses=[report.loss for report in reports],
        costs=[report.cost_before for report in reports],
        moved_SM=moved,
    )


DATA_PARALLEL = {
    "plain": {"type": "plain"},
    "zero_1": {"type": "deepspeed", "expert_parallel_size": 1, "zero_stage": 1},
    "zero_2": {"type": "deepspeed", "expert_parallel_size": 1, "zero_stage": 2},
}


def measure(
    shared: RunConfig, data_parallel: dict[str, RunConfig]
) -> tuple[Measured, Measured, dict[str, Measured]]:
    """Measure steps of ranks that share experts, the same without telemetry, and of copies."""
    never = STEPS + 1
    return (
        steps_with(shared, measures=True, slow_from=1),
        steps_with(shared, measures=False, slow_from=never),
        {
            name: steps_with(config, measures=True, slow_from=1)
            for name, config in data_parallel.items()
        },
    )


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> list[tuple[Measured, Measured, dict[str, Measured]]]:
    corpus = Path(build_small_corpus(tmp_path_factory.mktemp("small")))
    shared = small_config(corpus, {"engine": {"type": "deepspeed", "expert_parallel_size": 2}})
    data_parallel = {
        name: small_config(corpus, {"engine": engine}) for name, engine in DATA_PARALLEL.items()
    }
    return run_on_ranks(measure, shared, data_parallel)


@pytest.fixture
def on_two_ranks(of_ranks) -> list[tuple[Measured, Measured]]:
    """Ranks that share experts: with telemetry and without."""
    return [(measured, plain) for measured, plain, _ in of_ranks]


def slowed(measured: Measured) -> StepCost:
    """Return the slowed step that others on this machine disturbed least."""
    costs = [cost for cost in measured.costs[2:] if cost is not None]
    return min(costs, key=lambda cost: sum(cost.compute_seconds_R))


@pytest.mark.parametrize("engine", DATA_PARALLEL)
def test_wait_for_a_slow_ranks_gradients_is_communication(of_ranks, engine: str) -> None:
    cost = slowed(of_ranks[0][2][engine])
    assert cost.slowest_rank == SLOW_RANK
    assert SLEEP * 0.6 < cost.straggler_spread_seconds < SLEEP * 3
    # The mean of two ranks, of which one waits as long as the other slept.
    assert cost.reduce_seconds > SLEEP * 0.3
    assert cost.rows_moved_M == [0, 0]
    assert cost.all_to_all_seconds == 0


def test_losses_are_those_without_telemetry(on_two_ranks) -> None:
    for measured, plain in on_two_ranks:
        assert measured.losses == plain.losses
        assert plain.costs == [None] * STEPS


def test_ranks_are_told_the_same(on_two_ranks) -> None:
    first, second = (measured for measured, _ in on_two_ranks)
    assert first.costs == second.costs
    assert [cost is None for cost in first.costs] == [True] + [False] * (STEPS - 1)


def test_slow_rank_is_named_and_its_delay_measured(on_two_ranks) -> None:
    cost = slowed(on_two_ranks[0][0])
    assert cost.slowest_rank == SLOW_RANK
    # The wait of the other rank is none of its compute time.
    assert SLEEP * 0.6 < cost.straggler_spread_seconds < SLEEP * 3
    assert cost.communication_share > 0


def test_tokens_moved_are_those_whose_expert_is_on_another_rank(on_two_ranks) -> None:
    for step in range(1, STEPS):
        cost = on_two_ranks[0][0].costs[step]
        assert cost is not None
        by_hand = torch.tensor([measured.moved_SM[step - 1] for measured, _ in on_two_ranks]).sum(0)
        assert cost.rows_moved_M == by_hand.tolist()
        assert min(cost.rows_moved_M) > 0


def test_time_in_all_to_all_is_measured_by_layer_and_direction(on_two_ranks) -> None:
    cost = slowed(on_two_ranks[0][0])
    assert min(cost.forward_all_to_all_seconds_M) > 0
    assert min(cost.backward_all_to_all_seconds_M) > 0
    by_layer = sum(cost.forward_all_to_all_seconds_M) + sum(cost.backward_all_to_all_seconds_M)
    assert by_layer == pytest.approx(cost.all_to_all_seconds)
    # The first layer's exchange waits for the rank that slept before it.
    assert cost.forward_all_to_all_seconds_M[0] > SLEEP / 4
