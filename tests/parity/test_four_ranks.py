"""Ranks that share experts and ranks that hold copies of them, both at once: four against one.

With two ranks one of the two is always alone: here gradients of experts are summed over the ranks
with the same ones, and divided as those of everything else are.
"""

import pytest
import torch

from rank_pool import run_on_ranks
from small_run import StepsRun, build_small_corpus, merge_snapshots, run_steps, small_config
from tsmoe.train.run_config import RunConfig

STEPS = {"training": {"steps": 4, "micro_batch_size": 4}}
FOUR_RANKS = {
    "two sets of experts over two ranks each": {"expert_parallel_size": 2, "zero_stage": 1},
    "two sets of experts, stage 2": {"expert_parallel_size": 2, "zero_stage": 2},
    "two sets of experts, stage 3": {"expert_parallel_size": 2, "zero_stage": 3},
    "one set of experts over four ranks": {"expert_parallel_size": 4, "zero_stage": 1},
}


def run_each(configs: list[RunConfig]) -> list[StepsRun]:
    return [run_steps(config) for config in configs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[StepsRun, ...]]:
    """What each rank saw of each run; `plain` is one process without DeepSpeed."""
    corpus = build_small_corpus(tmp_path_factory.mktemp("small"))
    plain = small_config(corpus, STEPS)
    configs = [
        small_config(corpus, STEPS, {"engine": {"type": "deepspeed"} | settings})
        for settings in FOUR_RANKS.values()
    ]
    found = {"plain": (run_on_ranks(run_steps, plain, num_ranks=1)[0],)}
    of_ranks = run_on_ranks(run_each, configs, num_ranks=4, time_limit=180)
    return found | dict(zip(FOUR_RANKS, zip(*of_ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_train_as_one_process_does(runs, name) -> None:
    (plain,) = runs["plain"]
    for run in runs[name]:
        # float32 sums in another order, as in test_engines.py.
        assert run.losses == pytest.approx(plain.losses, rel=0, abs=1e-5)
        assert run.grad_norms == pytest.approx(plain.grad_norms, rel=1e-5)
        assert torch.equal(run.bias_ME, plain.bias_ME)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_write_the_state_of_one_process(runs, name) -> None:
    (plain,) = runs["plain"]
    expected = merge_snapshots([plain])
    found = merge_snapshots(runs[name])
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # Moments show the scale of a gradient, which Adam hides from losses. As in test_engines.py.
        largest = float(tensor.abs().max())
        atol = 2e-5 if key.startswith("value/") else 1e-5 * largest
        torch.testing.assert_close(
            found[key], tensor, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_each_set_of_experts_is_written_once(runs) -> None:
    of_ranks = runs["two sets of experts over two ranks each"]
    assert [sorted(run.snapshot) for run in of_ranks] == [
        ["dense.safetensors", "experts-00000.safetensors"],
        ["experts-00001.safetensors"],
        [],
        [],
    ]
