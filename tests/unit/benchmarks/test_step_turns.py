"""What the benchmarks of training steps rest on: twins that do the same work, and fair ratios."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("step_turns", "step_variants"):
        sys.modules.pop(name, None)


def test_loop_is_the_weighted_sum_of_the_chosen_experts() -> None:
    from step_variants import LoopLayer
    from tsmoe.moe.layer import MoEConfig

    torch.manual_seed(0)
    layer = LoopLayer(MoEConfig(num_experts=4, d_ff_expert=8), d_model=6)
    tokens_BND = torch.randn(2, 5, 6)
    scores_BNE = layer.gate(tokens_BND).softmax(-1)
    chosen_BNK = scores_BNE.topk(2).indices
    weights_BNE = torch.zeros_like(scores_BNE).scatter(-1, chosen_BNK, 1.0) * scores_BNE
    answers_BNED = torch.stack([network(tokens_BND) for network in layer.networks], dim=2)
    expected_BND = (weights_BNE[..., None] * answers_BNED).sum(2)
    torch.testing.assert_close(layer(tokens_BND), expected_BND)


def test_speed_is_compared_within_rounds() -> None:
    from step_turns import Turns

    # The machine slows down by ten in the second round, for both.
    turns = Turns(cpu={"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 2.0]})
    assert turns.speed_over("ours", "theirs") == 2.0
    assert turns.speed_over("ours", "theirs", work=3.0) == 6.0


def test_share_of_the_matrix_rate_is_operations_over_what_the_time_had_room_for() -> None:
    from step_turns import GEMM, Turns

    turns = Turns(cpu={"ours": [2.0], GEMM: [1e-9]})
    assert turns.gemm_share("ours", flops=1e9) == 0.5


def test_turns_leave_out_warm_up_and_time_every_variant_once_a_round() -> None:
    from step_turns import GEMM, take_turns

    done: list[str] = []
    steps = {name: (lambda name=name: done.append(name)) for name in ("a", "b")}
    turns = take_turns(steps, rounds=3, warm_up=1)
    assert sorted(done) == ["a"] * 4 + ["b"] * 4
    assert {name: len(seconds) for name, seconds in turns.cpu.items()} == {"a": 3, "b": 3}
    # Each round begins with another variant: none always follows the same one.
    assert done[:2] != done[2:4]
    assert GEMM not in turns.cpu
