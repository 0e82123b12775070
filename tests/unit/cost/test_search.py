from dataclasses import replace

import pytest

from tsmoe.cost.layout import Layout
from tsmoe.cost.machine import Assumption, gpu_machine
from tsmoe.cost.search import Job, largest_micro_batch, suggest
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig

MODEL = TimeTrackerConfig(d_model=128, num_layers=2, num_heads=4, feed_forward=MoEConfig())
LAYOUT = Layout(world_size=4, zero_stage=1, precision="bf16", micro_batch_size=8)


def job(memory_mib: float) -> Job:
    machine = gpu_machine("h100", precision="bf16", ranks_per_node=8)
    memory = Assumption(value=memory_mib * 2**20, source="test")
    return Job(model=MODEL, machine=replace(machine, memory=memory), global_batch_size=64)


@pytest.mark.parametrize("memory_mib", [30, 200])
def test_one_window_more_than_the_largest_micro_batch_does_not_fit(memory_mib) -> None:
    found = job(memory_mib)
    most = largest_micro_batch(found, LAYOUT)
    assert most > 1
    assert found.fits(replace(LAYOUT, micro_batch_size=most))
    assert not found.fits(replace(LAYOUT, micro_batch_size=most + 1))


def test_nothing_fits_where_the_states_do_not() -> None:
    assert largest_micro_batch(job(1), LAYOUT) == 0
    assert suggest(job(1), LAYOUT) == []


def test_suggestions_fit_and_keep_ranks_and_global_batch() -> None:
    for memory_mib in (15, 200):
        found = job(memory_mib)
        suggestions = suggest(found, LAYOUT)
        assert suggestions
        for candidate in suggestions:
            layout = candidate.layout
            assert candidate.memory.total <= memory_mib * 2**20
            assert layout.micro_batch_size * layout.accumulation_steps * 4 == 64
            assert layout.world_size == 4


def test_with_plenty_of_memory_the_simplest_layout_comes_first() -> None:
    best = suggest(job(10_000), LAYOUT)[0].layout
    assert (best.recomputes, best.offloads_optimizer, best.zero_stage) == (False, False, 1)
    assert best.micro_batch_size == 16


def test_with_little_memory_something_is_given_up() -> None:
    roomy, tight = (suggest(job(mib), LAYOUT)[0] for mib in (10_000, 12))
    assert tight.memory.total < roomy.memory.total
    assert tight.step.total >= roomy.step.total
