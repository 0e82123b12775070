"""What a step is said to have cost, on one rank; with two see tests/distributed."""

import dataclasses
import time

import pytest
import torch

from small_run import build_small_corpus, one_step, small_config
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.ranks import CommunicationMeter, ExchangeLabel, Ranks
from tsmoe.train import telemetry as telemetry_module
from tsmoe.train.run_config import RunConfig
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.telemetry import StepTelemetry


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return small_config(build_small_corpus(tmp_path_factory.mktemp("small")))


def engine_of(config: RunConfig, meter: CommunicationMeter | None) -> Engine:
    return build_engine(config, Ranks(meter=meter), prepare=prepare_pretraining)


def measured_step(config: RunConfig, engine: Engine, telemetry: StepTelemetry, step: int):
    begun = time.monotonic()
    telemetry.step_begins()
    report = one_step(config, engine, step, telemetry=telemetry)
    telemetry.step_ended(seconds=time.monotonic() - begun, seconds_waited=0.001)
    return report


def test_telemetry_changes_no_number_of_a_step(config) -> None:
    plain = engine_of(config, None)
    without = [one_step(config, plain, step) for step in range(4)]
    engine = engine_of(config, CommunicationMeter())
    telemetry = StepTelemetry(engine)
    with_it = [measured_step(config, engine, telemetry, step) for step in range(4)]
    assert [r.loss for r in without] == [r.loss for r in with_it]
    assert [r.grad_norm for r in without] == [r.grad_norm for r in with_it]
    assert all(torch.equal(a.load_ME, b.load_ME) for a, b in zip(without, with_it, strict=True))
    assert {r.cost_before for r in without} == {None}


def test_cost_comes_with_the_next_step_and_nothing_waits_for_others_on_one_rank(config) -> None:
    engine = engine_of(config, CommunicationMeter())
    telemetry = StepTelemetry(engine)
    assert measured_step(config, engine, telemetry, 0).cost_before is None
    cost = measured_step(config, engine, telemetry, 1).cost_before
    assert cost is not None
    assert 0 < cost.compute_seconds_R[0] < cost.step_seconds
    assert cost.data_wait_seconds_R == [0.001]
    assert cost.all_to_all_seconds == cost.bytes_out == cost.straggler_spread_seconds == 0
    assert cost.rows_moved_M == [0, 0]
    assert cost.slowest_rank == 0
    assert cost.memory_bytes_R[0] > 50 * 2**20


def test_waits_are_sorted_by_kind_layer_and_direction_and_are_no_compute_time(
    config, monkeypatch
) -> None:
    meter = CommunicationMeter()
    engine = engine_of(config, meter)
    telemetry = StepTelemetry(engine)
    clock = iter([10.0, 13.0, 14.0, 20.0, 25.0, 25.5])  # begin, last gradient, end, twice
    monkeypatch.setattr(telemetry_module.time, "perf_counter", lambda: next(clock))
    meter.record("all_reduce", seconds=99.0)  # before the step, as of validation
    telemetry.step_begins()
    for _ in range(2):
        telemetry.forward_begins()
        telemetry._gradient_came(torch.zeros(()))
        telemetry.backward_ended()
    to, back = ExchangeLabel(1, "to_experts"), ExchangeLabel(1, "gradient_to_experts")
    away = ExchangeLabel(1, "from_experts")
    meter.record("all_to_all_counts", to, bytes_out=16, seconds=0.1)
    meter.record("all_to_all", to, bytes_out=400, rows_out=5, seconds=0.4)
    meter.record("all_to_all", away, bytes_out=300, rows_out=4, seconds=0.2)
    meter.record("all_to_all", back, bytes_out=400, rows_out=5, seconds=0.3)
    meter.record("all_reduce", bytes_out=8, seconds=0.25)
    telemetry.step_ended(seconds=20.0, seconds_waited=1.0)
    cost = telemetry.read(telemetry.of_step_before())
    assert cost is not None
    assert cost.rows_moved_M == [0, 5]
    assert cost.forward_all_to_all_seconds_M == pytest.approx([0, 0.7])
    assert cost.backward_all_to_all_seconds_M == pytest.approx([0, 0.3])
    assert cost.all_to_all_seconds == pytest.approx(1.0)
    assert cost.compute_seconds_R == pytest.approx([3.0 + 5.0 - 1.0])
    # After the last gradients 1 and 0.5 s, and the sum.
    assert cost.reduce_seconds == pytest.approx(1.75)
    assert cost.communication_share == pytest.approx((1.0 + 1.75) / 20)
    assert cost.data_wait_share == pytest.approx(0.05)
    assert cost.bytes_out == 16 + 400 + 300 + 400 + 8


def test_parts_of_the_ranks_add_up_to_lists_by_rank(config) -> None:
    engine = engine_of(config, None)
    parts = []
    for rank, compute in enumerate((1.0, 4.0, 2.0)):
        engine.ranks = dataclasses.replace(engine.ranks, rank=rank, size=3)
        telemetry = StepTelemetry(engine)
        assert telemetry.of_step_before() == [0.0] * telemetry.width
        telemetry._passes = [(0.0, compute, compute + 0.5)]
        telemetry.step_ended(seconds=5.0, seconds_waited=rank / 10)
        parts.append(telemetry.of_step_before())
        assert len(parts[-1]) == telemetry.width
    cost = telemetry.read([sum(values) for values in zip(*parts, strict=True)])
    assert cost is not None
    assert cost.compute_seconds_R == [1.0, 4.0, 2.0]
    assert cost.data_wait_seconds_R == [0.0, 0.1, 0.2]
    assert (cost.straggler_spread_seconds, cost.slowest_rank) == (3.0, 1)
    assert (cost.step_seconds, cost.reduce_seconds) == (5.0, 0.5)
