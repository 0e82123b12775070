"""A memory over layers, shared or not, with noise while training only."""

import copy

import pytest
import torch
from torch import Tensor

from tsmoe.heads.task import ReconstructionHeadConfig
from tsmoe.models.patch_moe import PatchMoE, PatchMoEConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import RecurrentRouterConfig, build_router
from tsmoe.moe.routers.recurrent import RecurrentRouter
from tsmoe.moe.routing import RouterState

B, C, N, D, E, R = 2, 3, 5, 16, 4, 8


def router_of(**settings) -> RecurrentRouter:
    torch.manual_seed(0)
    router = build_router(RecurrentRouterConfig(d_router=R, **settings), D, E)
    assert isinstance(router, RecurrentRouter)
    return router


def tokens(seed: int) -> Tensor:
    return torch.randn(B, C, N, D, generator=torch.Generator().manual_seed(seed))


def test_second_layer_remembers_what_a_token_was_to_the_first() -> None:
    router = router_of().eval()
    scores = []
    for first in (1, 2):
        _, state = router(tokens(first), None)
        scores.append(router(tokens(3), state)[0].scores_BCNE)
    assert not torch.allclose(*scores)
    with_none, without = (router(tokens(3), state)[0] for state in (None, RouterState()))
    assert torch.equal(with_none.scores_BCNE, without.scores_BCNE)


def test_each_token_has_a_memory_of_its_own() -> None:
    router = router_of().eval()
    changed = tokens(1)
    changed[0, 0, 0] += 1
    scores = []
    for first in (tokens(1), changed):
        _, state = router(first, None)
        scores.append(router(tokens(2), state)[0].scores_BCNE)
    is_moved_BCN = (scores[0] != scores[1]).any(-1)
    assert is_moved_BCN[0, 0, 0]
    assert is_moved_BCN.sum() == 1


def test_state_follows_the_gated_recurrent_unit() -> None:
    router = router_of().eval()
    _, state = router(tokens(1), None)
    _, state = router(tokens(2), state)
    cell = torch.nn.GRUCell(R, R)
    cell.load_state_dict(router.memory.state_dict())
    hidden = None
    for seed in (1, 2):
        hidden = cell(router.project(tokens(seed)).flatten(0, 2), hidden)
    torch.testing.assert_close(state.hidden_XR, hidden)


def test_noise_is_learned_and_is_there_while_training_only() -> None:
    router = router_of(noise=1.0)
    torch.manual_seed(5)
    noisy = [router.train()(tokens(1), None)[0].scores_BCNE for _ in range(2)]
    assert not torch.allclose(*noisy)
    quiet = [router.eval()(tokens(1), None)[0].scores_BCNE for _ in range(2)]
    assert torch.equal(*quiet)
    noisy[0].square().sum().backward()
    assert router.spread.weight.grad.abs().sum() > 0


def test_without_noise_training_scores_as_evaluation_does() -> None:
    router = router_of(noise=0.0)
    assert router.spread is None
    trained, evaluated = (r(tokens(1), None)[0] for r in (router.train(), router.eval()))
    torch.testing.assert_close(trained.scores_BCNE, evaluated.scores_BCNE)


def test_noise_grows_with_its_weight() -> None:
    spreads = []
    for noise in (0.5, 2.0):
        router = router_of(noise=noise).train()
        torch.manual_seed(1)
        draws = [router(tokens(1), None)[0].scores_BCNE.log() for _ in range(50)]
        spreads.append(torch.stack(draws).std(0).mean())
    assert spreads[1] > 2 * spreads[0]


def test_scores_for_the_balance_loss_are_the_scores_and_reach_the_router_alone() -> None:
    router = router_of(noise=1.0).train()
    first, second = tokens(1).requires_grad_(), tokens(2).requires_grad_()
    _, state = router(first, None)
    routing, _ = router(second, state)
    torch.testing.assert_close(routing.router_scores_BCNE, routing.scores_BCNE)
    routing.router_scores_BCNE.square().sum().backward()
    assert first.grad.abs().sum() == second.grad.abs().sum() == 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


def test_task_input_moves_the_scores_in_every_layer() -> None:
    router = router_of().eval()
    given = torch.randn(1, 1, 1, R, generator=torch.Generator().manual_seed(9))
    told, plain = RouterState(task_B11R=given), RouterState()
    for _ in range(2):
        of_told, told = router(tokens(1), told)
        of_plain, plain = router(tokens(1), plain)
        assert not torch.allclose(of_told.scores_BCNE, of_plain.scores_BCNE)
        assert told.task_B11R is given


def model_of(*, shares_memory: bool) -> PatchMoE:
    router = RecurrentRouterConfig(d_router=R, shares_memory=shares_memory)
    config = PatchMoEConfig(
        patch_length=4,
        context_length=16,
        d_model=D,
        num_heads=2,
        num_layers=3,
        feed_forward=MoEConfig(num_experts=E, d_ff_expert=8, d_ff_shared=8, router=router),
        heads={"fill": ReconstructionHeadConfig()},
    )
    return PatchMoE(config)


@pytest.mark.parametrize(("shares_memory", "expected"), [(True, 1), (False, 3)])
def test_memory_is_one_for_all_layers_or_one_for_each(shares_memory, expected) -> None:
    model = model_of(shares_memory=shares_memory)
    owners = [name for name in model.state_dict() if name.endswith("memory.weight_hh")]
    assert len(owners) == expected
    memories = {id(r.memory if r.memory is not None else r._first[0].memory)
                for r in model.routers()}  # fmt: skip
    assert len(memories) == expected


def test_copy_of_a_model_shares_its_own_memory() -> None:
    model = model_of(shares_memory=True)
    twin = copy.deepcopy(model)
    first, second = twin.routers()[:2]
    assert second._first[0] is first
    assert first.memory is not model.routers()[0].memory
    with torch.no_grad():
        first.memory.weight_hh.zero_()
    assert model.routers()[0].memory.weight_hh.abs().sum() > 0
