"""Experts spread over two ranks give what one process gives on the tokens of both.

Shapes: B windows, C variates, N patches, D model width, E routed experts, K experts per token.
"""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rank_pool import run_on_ranks
from tsmoe import ranks as ranks_module
from tsmoe.moe.dispatch import run_experts
from tsmoe.moe.experts import ExpertCompute, Experts
from tsmoe.moe.layer import MoEConfig, MoELayer
from tsmoe.moe.plan import plan_dispatch
from tsmoe.moe.routers.sequence import SequenceRouter, SequenceRouterConfig
from tsmoe.ranks import Ranks

NUM_EXPERTS, D_MODEL, D_FF, PATCHES = 4, 16, 24, 5
MODES = ("sequence", "prefix", "token")
# Added to the scores that choose, which lie between 0 and 1.
BIASES = {
    "balanced": (0.0, 0.0, 0.0, 0.0),
    "all on rank 0": (9.0, 9.0, 0.0, 0.0),
    "all on rank 1": (0.0, 0.0, 9.0, 9.0),
    "an idle one on each rank": (9.0, -9.0, 9.0, -9.0),
}
WINDOWS = {"even": (4, 4), "uneven": (8, 3), "a rank without any": (5, 0)}


@dataclass(frozen=True, kw_only=True)
class Case:
    mode: str
    bias_E: tuple[float, ...]
    windows: tuple[int, int]
    compute: ExpertCompute = "auto"


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Outcome of a forward and a backward pass over some tokens."""

    output_BCND: Tensor
    tokens_gradient_BCND: Tensor
    weights_gradient_BCNK: Tensor
    clusters_gradient_ED: Tensor
    gate_up_gradient: Tensor
    down_gradient: Tensor
    load_E: Tensor


CASES = [
    *(
        Case(mode=mode, bias_E=bias, windows=windows)
        for mode in MODES
        for bias in BIASES.values()
        for windows in WINDOWS.values()
    ),
    *(
        Case(mode="prefix", bias_E=BIASES["balanced"], windows=(8, 3), compute=compute)
        for compute in ("loop", "grouped")
    ),
]


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Draw the tokens of both ranks and what the gradient of the output shall be."""
    generator = torch.Generator().manual_seed(1)
    shape = (sum(case.windows), 2, PATCHES, D_MODEL)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def pass_tokens(case: Case, tokens_BCND: Tensor, gradient_BCND: Tensor, ranks: Ranks) -> Passed:
    torch.manual_seed(0)
    config = SequenceRouterConfig(mode=case.mode)  # type: ignore[arg-type]
    router = SequenceRouter(config, D_MODEL, NUM_EXPERTS)
    router.balance.bias_E.copy_(torch.tensor(case.bias_E))
    experts = Experts(
        d_model=D_MODEL, d_ff=D_FF, num_experts=NUM_EXPERTS, layer_index=0, num_layers=1, seed=0,
        compute=case.compute, ranks=ranks,
    )  # fmt: skip
    tokens_BCND = tokens_BCND.clone().requires_grad_()
    routing, _ = router(tokens_BCND, None)
    # Detached for the experts, so that the gradient of tokens is theirs alone.
    weights_BCNK = routing.weights_BCNK.detach().clone().requires_grad_()
    apart = dataclasses.replace(routing, weights_BCNK=weights_BCNK)
    plan = plan_dispatch(apart, ranks, layer_index=0)
    output_BCND = run_experts(tokens_BCND, apart, experts, plan)
    output_BCND.backward(gradient_BCND)
    routing.weights_BCNK.backward(weights_BCNK.grad)
    return Passed(
        output_BCND=output_BCND.detach(),
        tokens_gradient_BCND=tokens_BCND.grad,
        weights_gradient_BCNK=weights_BCNK.grad,
        clusters_gradient_ED=router.clusters_ED.grad,
        gate_up_gradient=experts.gate_up_weight.grad,
        down_gradient=experts.down_weight.grad,
        load_E=routing.load_E,
    )


def pass_own_tokens() -> list[Passed]:
    """On a rank: pass this rank's windows of every case."""
    ranks = ranks_module.start()
    passed = []
    for case in CASES:
        split = case.windows[0]
        own = slice(None, split) if ranks.is_first else slice(split, None)
        tokens_BCND, gradient_BCND = inputs(case)
        passed.append(pass_tokens(case, tokens_BCND[own], gradient_BCND[own], ranks))
    return passed


@pytest.fixture(scope="module")
def both_ranks() -> dict[Case, tuple[Passed, Passed]]:
    first, second = run_on_ranks(pass_own_tokens)
    return dict(zip(CASES, zip(first, second, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_give_the_result_of_one_process_on_all_tokens(both_ranks, case: Case) -> None:
    first, second = both_ranks[case]
    alone = pass_tokens(case, *inputs(case), Ranks())
    per_token = ("output_BCND", "tokens_gradient_BCND", "weights_gradient_BCNK")
    per_expert = ("gate_up_gradient", "down_gradient")
    for name in (*per_token, *per_expert):
        joined = torch.cat((getattr(first, name), getattr(second, name)))
        # Sums of some tens of float32 products, in another order.
        torch.testing.assert_close(joined, getattr(alone, name), rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(
        first.clusters_gradient_ED + second.clusters_gradient_ED,
        alone.clusters_gradient_ED,
        rtol=1e-5,
        atol=1e-5,
    )
    assert torch.equal(first.load_E + second.load_E, alone.load_E)


@pytest.mark.parametrize("mode", MODES)
def test_idle_expert_still_gets_a_zero_gradient(both_ranks, mode: str) -> None:
    bias_E = BIASES["all on rank 0"]
    _, second = both_ranks[Case(mode=mode, bias_E=bias_E, windows=(8, 3))]
    assert torch.equal(second.gate_up_gradient, torch.zeros(2, D_MODEL, 2 * D_FF))
    assert torch.equal(second.down_gradient, torch.zeros(2, D_FF, D_MODEL))


def layer_gradients(ranks: Ranks, *, recomputes: bool) -> tuple[list[Tensor], Tensor]:
    """Return a layer's gradients and its load, with uneven tokens on the ranks."""
    torch.manual_seed(0)
    layer = MoELayer(
        MoEConfig(num_experts=NUM_EXPERTS, d_ff_expert=D_FF, d_ff_shared=D_FF),
        d_model=D_MODEL, layer_index=0, num_layers=1, seed=0,
        make_experts=lambda **settings: Experts(**settings, ranks=ranks),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(ranks.rank)
    windows = (8, 3)[ranks.rank]
    tokens_BCND = torch.randn(windows, 1, PATCHES, D_MODEL, generator=generator).requires_grad_()
    if recomputes:
        hidden_BCND, routing, _ = checkpoint(layer, tokens_BCND, None, use_reentrant=False)
    else:
        hidden_BCND, routing, _ = layer(tokens_BCND, None)
    hidden_BCND.square().sum().backward()
    return [tokens_BCND.grad, *(p.grad for p in layer.parameters())], routing.load_E


def compare_recomputation() -> tuple[bool, int, int]:
    """On a rank: whether gradients are bitwise equal, and the decisions counted either way."""
    ranks = ranks_module.start()
    stored, load_E = layer_gradients(ranks, recomputes=False)
    again, load_again_E = layer_gradients(ranks, recomputes=True)
    is_equal = all(torch.equal(a, b) for a, b in zip(stored, again, strict=True))
    return is_equal, int(load_E.sum()), int(load_again_E.sum())


def test_recomputed_activations_change_neither_gradients_nor_loads() -> None:
    for rank, (is_equal, decisions, decisions_again) in enumerate(
        run_on_ranks(compare_recomputation)
    ):
        assert is_equal
        assert decisions == decisions_again == (8, 3)[rank] * PATCHES * 2
