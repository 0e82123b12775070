from dataclasses import replace

import pytest

from tsmoe.cost.layout import Layout
from tsmoe.cost.memory import plan_memory
from tsmoe.cost.parameters import parameter_sizes
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig

MODEL = TimeTrackerConfig(
    d_model=256, num_layers=4, num_heads=4, feed_forward=MoEConfig(d_ff_expert=256, d_ff_shared=512)
)
TRAINED = sum(p.numel for p in parameter_sizes(MODEL) if p.is_trained)
ROUTED = sum(p.numel for p in parameter_sizes(MODEL) if p.is_routed)
EVERYTHING = sum(p.numel for p in parameter_sizes(MODEL))
SMALL_BATCH = Layout(micro_batch_size=1, precision="bf16", zero_stage=1, world_size=8)


def parts(layout: Layout) -> dict[str, int]:
    return plan_memory(MODEL, layout).parts


def test_plain_engine_holds_weight_gradient_and_two_moments_in_float32() -> None:
    found = parts(replace(SMALL_BATCH, zero_stage=0, precision="fp32", world_size=1))
    assert found["weights"] == 4 * EVERYTHING
    assert found["moments"] == 8 * TRAINED
    assert found["gradients"] == pytest.approx(4 * TRAINED, rel=0.05)
    assert found["masters"] == found["reduction_buckets"] == 0


def test_zero_partitions_the_optimizer_over_all_ranks() -> None:
    found = parts(SMALL_BATCH)
    assert found["weights"] == 2 * EVERYTHING
    assert found["masters"] == pytest.approx(4 * TRAINED / 8, rel=1e-4)
    assert found["moments"] == 2 * found["masters"]


def test_experts_of_one_copy_keep_their_whole_optimizer_on_their_rank() -> None:
    """DeepSpeed issue 7156: what is on no other rank cannot be partitioned."""
    found = parts(replace(SMALL_BATCH, expert_parallel_size=8))
    assert found["weights"] == 2 * (EVERYTHING - ROUTED + ROUTED // 8)
    assert found["masters"] == pytest.approx(4 * (TRAINED - ROUTED) / 8 + 4 * ROUTED / 8, rel=1e-4)
    two_copies = replace(SMALL_BATCH, expert_parallel_size=4)
    # Twice the experts on a rank, each shared with one other.
    assert parts(two_copies)["masters"] == pytest.approx(found["masters"], rel=1e-4)


def test_stage_two_holds_less_where_gradients_weigh() -> None:
    few = replace(SMALL_BATCH, bucket_elements=100_000)
    one, two = (plan_memory(MODEL, replace(few, zero_stage=stage)).total for stage in (1, 2))
    assert two < one - 2 * TRAINED * 0.5


def test_stage_three_gathers_what_it_may_keep_between_both_passes() -> None:
    three = replace(SMALL_BATCH, zero_stage=3, micro_batch_size=512)
    assert parts(three)["weights"] == pytest.approx(2 * EVERYTHING * (1 + 1 / 8), rel=0.1)
    few = replace(three, gathered_elements=EVERYTHING // 10)
    assert parts(few)["weights"] == pytest.approx(2 * EVERYTHING * (1 / 10 + 1 / 8), rel=0.1)


def test_no_bucket_is_larger_than_the_model() -> None:
    with_default = parts(replace(SMALL_BATCH, micro_batch_size=64))["reduction_buckets"]
    assert with_default == 2 * EVERYTHING
    small = replace(SMALL_BATCH, micro_batch_size=64, bucket_elements=1000)
    assert parts(small)["reduction_buckets"] == 2000


def test_offload_moves_masters_and_moments_to_the_host() -> None:
    here, there = (
        plan_memory(MODEL, replace(SMALL_BATCH, offloads_optimizer=offloads))
        for offloads in (False, True)
    )
    assert here.host == 0
    assert there.parts["masters"] == there.parts["moments"] == 0
    assert there.host > here.parts["masters"] + here.parts["moments"]
    assert there.total < here.total


def test_activations_grow_with_windows_and_variates_alike() -> None:
    layout = replace(SMALL_BATCH, micro_batch_size=64)
    twice = plan_memory(MODEL, replace(layout, micro_batch_size=128)).parts
    mixed = plan_memory(MODEL, layout, variates=2).parts
    assert mixed == twice
    assert twice["activations"] == pytest.approx(2 * parts(layout)["activations"], rel=0.01)


def test_recomputation_keeps_one_block_and_the_residual_stream() -> None:
    layout = replace(SMALL_BATCH, micro_batch_size=256)
    kept = parts(layout)["activations"]
    recomputed = parts(replace(layout, recomputes=True))["activations"]
    stream = MODEL.num_layers * 256 * 30 * MODEL.d_model * 2
    assert stream < recomputed < kept / 2


def test_rows_that_come_from_other_ranks_are_held() -> None:
    layout = replace(SMALL_BATCH, micro_batch_size=64, expert_parallel_size=8, is_on_gpu=False)
    even = plan_memory(MODEL, layout).parts["dispatch_buffers"]
    uneven = plan_memory(MODEL, layout, imbalance=1.5).parts["dispatch_buffers"]
    assert uneven == pytest.approx(1.5 * even, rel=0.03)
    alone = plan_memory(MODEL, replace(layout, expert_parallel_size=1), imbalance=1.5)
    assert alone.parts["dispatch_buffers"] < even / 5


def test_later_passes_of_a_step_find_gradients_in_place() -> None:
    one = replace(SMALL_BATCH, micro_batch_size=64)
    four = replace(one, accumulation_steps=4)
    for stage in (1, 2):
        first, later = (
            plan_memory(MODEL, replace(layout, zero_stage=stage)) for layout in (one, four)
        )
        assert later.parts["gradients"] >= first.parts["gradients"] + 2 * TRAINED / 8 * 0.99
