import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tsmoe.moe import dispatch
from tsmoe.moe.experts import Experts
from tsmoe.moe.plan import plan_dispatch
from tsmoe.moe.routing import Routing

E, D = 5, 16
MODES = ("token", "sequence")


def make_experts(compute: str = "loop", *, d_model: int = D, d_ff: int = 8) -> Experts:
    return Experts(
        d_model=d_model, d_ff=d_ff, num_experts=E, layer_index=0, num_layers=1, seed=0,
        compute=compute,
    )  # fmt: skip


def random_tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def random_routing(tokens_BCND: Tensor, weights_BCNK: Tensor, *, mode: str) -> Routing:
    """Send each unit to random experts, never to the last one."""
    B, C, N, K = weights_BCNK.shape
    generator = torch.Generator().manual_seed(1)
    decisions = 1 if mode == "sequence" else N
    ids_BCNK = torch.rand(B, C, decisions, E - 1, generator=generator).argsort(-1)[..., :K]
    if mode == "sequence":
        weights_BCNK = weights_BCNK[:, :, :1].expand(-1, -1, N, -1)
    return Routing(
        expert_ids_BCNK=ids_BCNK.expand(-1, -1, N, -1),
        weights_BCNK=weights_BCNK,
        scores_BCNE=torch.zeros(B, C, decisions, E),
        load_E=ids_BCNK.flatten().bincount(minlength=E),
        margin=torch.tensor(0.0),
        is_per_sequence=mode == "sequence",
    )


def run_experts(tokens_BCND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    plan = plan_dispatch(routing, experts.ranks, layer_index=0)
    return dispatch.run_experts(tokens_BCND, routing, experts, plan)


def run_naively(tokens_BCND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Let every expert see every token, and add up those that were chosen."""
    gate, up = torch.einsum(
        "bcnd,edf->bcnef", tokens_BCND, experts.gate_up_weight.to(tokens_BCND.dtype)
    ).chunk(2, dim=-1)
    answers_BCNED = torch.einsum(
        "bcnef,efd->bcned", F.silu(gate) * up, experts.down_weight.to(tokens_BCND.dtype)
    )
    chosen_BCNKE = F.one_hot(routing.expert_ids_BCNK, E).to(tokens_BCND.dtype)
    weights_BCNK = routing.weights_BCNK.to(tokens_BCND.dtype)
    return torch.einsum("bcnke,bcnk,bcned->bcnd", chosen_BCNKE, weights_BCNK, answers_BCNED)


# float32: sums of 16 products in another order. bf16: 8 bits of mantissa, rounded three times.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("compute", ["loop", "grouped"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_dispatch_equals_the_dense_loop(mode, top_k, compute, dtype, tolerance) -> None:
    found = []
    for run in (run_naively, run_experts):
        experts = make_experts(compute)
        tokens_BCND = random_tokens(3, 2, 4, D).to(dtype).requires_grad_()
        weights_BCNK = (random_tokens(3, 2, 4, top_k).abs() + 0.1).requires_grad_()
        routing = random_routing(tokens_BCND, weights_BCNK, mode=mode)
        hidden_BCND = run(tokens_BCND, routing, experts)
        assert hidden_BCND.dtype == dtype
        (hidden_BCND.float() * random_tokens(3, 2, 4, D).flip(0)).sum().backward()
        gradients = (tokens_BCND.grad, weights_BCNK.grad, *(p.grad for p in experts.parameters()))
        found.append((hidden_BCND, *gradients))
    for naive, dispatched in zip(*found, strict=True):
        size = naive.float().abs().max().item()
        torch.testing.assert_close(dispatched, naive, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_finite_differences(mode: str) -> None:
    experts = make_experts(d_model=4, d_ff=3).double()
    tokens_BCND = random_tokens(2, 1, 3, 4).double().requires_grad_()
    weights_BCNK = (random_tokens(2, 1, 3, 2).double().abs() + 0.1).requires_grad_()

    def run(tokens: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = random_routing(tokens, weights, mode=mode)
        weights_of = {"gate_up_weight": gate_up, "down_weight": down}

        def call(*arguments: object) -> Tensor:
            return torch.func.functional_call(experts, weights_of, arguments)

        call.ranks = experts.ranks
        return run_experts(tokens, routing, call)

    inputs = (
        tokens_BCND,
        weights_BCNK,
        *(p.detach().requires_grad_() for p in experts.parameters()),
    )
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("compute", ["loop", "grouped"])
@pytest.mark.parametrize("mode", MODES)
def test_expert_that_nobody_chose_gets_a_zero_gradient(mode: str, compute: str) -> None:
    experts = make_experts(compute)
    tokens_BCND, weights_BCNK = random_tokens(3, 2, 4, D), torch.full((3, 2, 4, 2), 0.5)
    routing = random_routing(tokens_BCND, weights_BCNK, mode=mode)
    run_experts(tokens_BCND, routing, experts).square().sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad[-1].abs().max() == 0
        assert (parameter.grad[:-1].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("compute", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4)])
def test_no_tokens_give_no_output_and_zero_gradients(mode: str, compute: str, shape) -> None:
    experts = make_experts(compute)
    tokens_BCND = torch.zeros(*shape, D, requires_grad=True)
    routing = random_routing(tokens_BCND, torch.zeros(*shape, 2), mode=mode)
    hidden_BCND = run_experts(tokens_BCND, routing, experts)
    assert hidden_BCND.shape == (*shape, D)
    hidden_BCND.sum().backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in experts.parameters())


def test_sequence_routing_gives_the_same_as_token_routing_of_the_same_decision() -> None:
    experts = make_experts()
    tokens_BCND, weights_BCNK = random_tokens(3, 2, 4, D), torch.full((3, 2, 4, 2), 0.5)
    whole = random_routing(tokens_BCND, weights_BCNK, mode="sequence")
    by_token = Routing(
        expert_ids_BCNK=whole.expert_ids_BCNK,
        weights_BCNK=whole.weights_BCNK,
        scores_BCNE=whole.scores_BCNE,
        load_E=whole.load_E * 4,
        margin=whole.margin,
        is_per_sequence=False,
    )
    torch.testing.assert_close(
        run_experts(tokens_BCND, whole, experts), run_experts(tokens_BCND, by_token, experts)
    )
