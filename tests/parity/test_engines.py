"""The same global batch and seed give the same run on every engine and number of ranks.

The reference is one process without DeepSpeed. Shapes: E routed experts, M expert layers.
"""

from pathlib import Path

import pytest
import torch

from rank_pool import run_on_ranks
from small_run import (
    StepsRun,
    build_small_corpus,
    merge_snapshots,
    run_steps,
    small_config,
    step_batches,
)
from tsmoe.config import merge_layers
from tsmoe.ranks import Ranks
from tsmoe.train.run_config import RunConfig

# Engines add the same float32 numbers in another order. Losses lie between 1 and 3, where float32
# resolves 2e-7; the largest difference seen in 8 steps is 1e-7, and of gradient norms 2e-7 of them.
# The rest is left for other processors' matrix products.
LOSS_TOLERANCE = 1e-5
STEPS = 8


def deepspeed(expert_parallel_size: int, zero_stage: int) -> dict:
    return {
        "engine": {
            "type": "deepspeed",
            "expert_parallel_size": expert_parallel_size,
            "zero_stage": zero_stage,
        }
    }


def passes(micro_batch_size: int, *, recomputes: bool = False) -> dict:
    return {
        "training": {
            "micro_batch_size": micro_batch_size,
            "recomputes_activations": recomputes,
        }
    }


ONE_PROCESS = {
    "plain": passes(16),
    "plain, accumulation": passes(4),
    "plain, recomputation": passes(16, recomputes=True),
    "deepspeed": merge_layers(deepspeed(1, 1), passes(16)),
    "deepspeed, accumulation": merge_layers(deepspeed(1, 2), passes(8)),
}
TWO_RANKS = {
    "plain": passes(8),
    "plain, accumulation": passes(4),
    "plain, recomputation": passes(8, recomputes=True),
    "whole experts, stage 1": merge_layers(deepspeed(1, 1), passes(8)),
    "whole experts, stage 2, accumulation": merge_layers(deepspeed(1, 2), passes(4)),
    "spread experts, stage 1": merge_layers(deepspeed(2, 1), passes(8)),
    "spread experts, stage 2": merge_layers(deepspeed(2, 2), passes(8)),
    "spread experts, stage 1, accumulation": merge_layers(deepspeed(2, 1), passes(4)),
    "spread experts, stage 2, accumulation, recomputation": merge_layers(
        deepspeed(2, 2), passes(4, recomputes=True)
    ),
}
# Norms of 1 to 3 are far below it: gradients pass as they are.
UNCLIPPED = {"optimizer": {"clip_grad_norm": 1000.0}}
ONE_PROCESS["plain, unclipped"] = merge_layers(passes(16), UNCLIPPED)
TWO_RANKS["spread experts, unclipped"] = merge_layers(deepspeed(2, 1), passes(8), UNCLIPPED)
# Windows so long that every series is shorter, and several share one.
PACKED = {"data": {"packs_short_series": True}, "model": {"context_length": 640}}
ONE_PROCESS["plain, packed"] = merge_layers(passes(16), PACKED)
ONE_PROCESS["plain, packed, accumulation, recomputation"] = merge_layers(
    passes(4, recomputes=True), PACKED
)
TWO_RANKS["plain, packed"] = merge_layers(passes(8), PACKED)
TWO_RANKS["spread experts, packed, recomputation"] = merge_layers(
    deepspeed(2, 2), passes(4, recomputes=True), PACKED
)
ALL = [(1, name) for name in ONE_PROCESS] + [(2, name) for name in TWO_RANKS]


def run_all(configs: list[RunConfig]) -> list[StepsRun]:
    """On a rank: one run after the other, as a start costs more than the steps."""
    return [run_steps(config) for config in configs]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def runs(corpus) -> dict[tuple[int, str], tuple[StepsRun, ...]]:
    """What each rank saw of each run."""
    found = {}
    for num_ranks, variants in ((1, ONE_PROCESS), (2, TWO_RANKS)):
        configs = [small_config(corpus, variant) for variant in variants.values()]
        of_ranks = run_on_ranks(run_all, configs, num_ranks=num_ranks, time_limit=200)
        for name, of_run in zip(variants, zip(*of_ranks, strict=True), strict=True):
            found[num_ranks, name] = of_run
    return found


def twin_of(runs, name: str) -> StepsRun:
    twins = [twin for twin in ("plain, unclipped", "plain, packed") if twin[7:] in name]
    return runs[1, twins[0] if twins else "plain"][0]


@pytest.mark.parametrize(("num_ranks", "name"), ALL)
def test_losses_and_gradient_norms_are_those_of_one_plain_process(runs, num_ranks, name) -> None:
    twin = twin_of(runs, name)
    for run in runs[num_ranks, name]:
        assert run.losses == pytest.approx(twin.losses, rel=0, abs=LOSS_TOLERANCE)
        # The norm is a float32 sum over 40,000 squares.
        assert run.grad_norms == pytest.approx(twin.grad_norms, rel=1e-5)
        points = [report.num_points for report in run.reports]
        assert points == [report.num_points for report in twin.reports]


@pytest.mark.parametrize(("num_ranks", "name"), ALL)
def test_loads_and_load_biases_are_equal_on_every_rank(runs, num_ranks, name) -> None:
    twin = twin_of(runs, name)
    for run in runs[num_ranks, name]:
        for report, expected in zip(run.reports, twin.reports, strict=True):
            assert torch.equal(report.load_ME, expected.load_ME)
        assert torch.equal(run.bias_ME, twin.bias_ME)
    assert twin.bias_ME.abs().max() > 0


@pytest.mark.parametrize(("num_ranks", "name"), ALL)
def test_snapshots_hold_the_same_masters_and_moments(runs, num_ranks, name) -> None:
    """Adam hides the scale of a gradient from the losses; its moments show it."""
    found = merge_snapshots(runs[num_ranks, name])
    expected = merge_snapshots([twin_of(runs, name)])
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32
        if key.startswith("value/"):
            # lr is 2e-3: where a gradient is nearly zero Adam makes a step of its rounding.
            tolerances = {"rtol": 0, "atol": 2e-5}
        else:
            tolerances = {"rtol": 0, "atol": 1e-5 * float(expected[key].abs().max())}
        torch.testing.assert_close(
            tensor, expected[key], **tolerances, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize(("num_ranks", "name"), ALL)
def test_snapshots_hold_the_moments_of_every_expert(runs, num_ranks, name) -> None:
    """DeepSpeed links the moments of the first parameter group only, unless it is told to."""
    moments = [
        (key, tensor)
        for key, tensor in merge_snapshots(runs[num_ranks, name]).items()
        if key.startswith("exp_avg") and ".experts." in key
    ]
    assert len(moments) == 2 * 2 * 2 * 4  # moments, layers, weights, experts
    for key, tensor in moments:
        assert tensor.abs().max() > 0, key


def test_windows_were_packed(corpus) -> None:
    batch = step_batches(small_config(corpus, ONE_PROCESS["plain, packed"]), Ranks(), 0)[0]
    assert (batch.series_BCN[:, 0].amax(-1, keepdim=True) > batch.series_ids_B[:, None]).any()


def test_clipping_was_at_work(runs) -> None:
    config = small_config(Path("none"))
    clipped, unclipped = runs[1, "plain"][0], runs[1, "plain, unclipped"][0]
    assert min(clipped.grad_norms) > config.optimizer.clip_grad_norm
    assert clipped.grad_norms[0] == unclipped.grad_norms[0]
    key = next(k for k in merge_snapshots([clipped]) if k.startswith("exp_avg/head."))
    moments = [merge_snapshots([run])[key].norm() for run in (clipped, unclipped)]
    assert moments[1] > 10 * moments[0]


def test_experts_are_written_by_the_rank_that_holds_them(runs) -> None:
    first, second = runs[2, "spread experts, stage 1"]
    assert first.snapshot.keys() == {"dense.safetensors", "experts-00000.safetensors"}
    assert second.snapshot.keys() == {"experts-00001.safetensors"}
    ids = {key.rsplit("/", 1)[1] for key in second.snapshot["experts-00001.safetensors"]}
    assert ids == {"2", "3"}
    assert runs[2, "whole experts, stage 1"][1].snapshot == {}
