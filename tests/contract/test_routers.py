"""What every router must do. A new router adds its configurations below."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from tsmoe.moe.routers import (
    LinearRouterConfig,
    RecurrentRouterConfig,
    RouterConfig,
    SequenceRouterConfig,
    build_router,
)
from tsmoe.moe.routing import Routing
from tsmoe.nn.spans import SeriesSpans

B, C, N, D, E = 4, 3, 6, 16, 8

EXAMPLES: tuple[RouterConfig, ...] = (
    *(
        SequenceRouterConfig(mode=mode, top_k=top_k)
        for mode in ("sequence", "prefix", "token")
        for top_k in (1, 2, 3)
    ),
    *(LinearRouterConfig(top_k=k, noise=noise) for k, noise in ((1, 0.0), (2, 1.0), (3, 0.0))),
    *(
        RecurrentRouterConfig(top_k=k, noise=noise, d_router=12)
        for k, noise in ((1, 1.0), (2, 0.0), (3, 1.0))
    ),
)


@pytest.fixture(params=EXAMPLES, ids=lambda c: f"{c.type}-{getattr(c, 'mode', '')}-{c.top_k}")
def config(request) -> RouterConfig:
    return request.param


@pytest.fixture
def router(config: RouterConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_router(config, D, E).eval()


@pytest.fixture(name="tokens_BCND")
def random_tokens() -> Tensor:
    return torch.randn(B, C, N, D, generator=torch.Generator().manual_seed(1))


def route(router: nn.Module, tokens_BCND: Tensor) -> Routing:
    return router(tokens_BCND, None)[0]


def route_in_second_layer(router: nn.Module, tokens_BCND: Tensor) -> Routing:
    """Route where a memory is no longer empty, which uses all weights."""
    _, state = router(tokens_BCND, None)
    return router(tokens_BCND, state)[0]


def test_every_router_has_an_example() -> None:
    assert {type(config) for config in EXAMPLES} == set(get_args(RouterConfig) or (RouterConfig,))


def test_shapes_and_types(config, router, tokens_BCND) -> None:
    routing = route(router, tokens_BCND)
    assert routing.expert_ids_BCNK.shape == routing.weights_BCNK.shape == (B, C, N, config.top_k)
    assert routing.scores_BCNE.shape == (B, C, 1 if routing.is_per_sequence else N, E)
    assert (routing.expert_ids_BCNK.dtype, routing.load_E.dtype) == (torch.int64, torch.int64)
    assert (routing.weights_BCNK.dtype, routing.scores_BCNE.dtype) == (torch.float32,) * 2


def test_weights_are_positive_and_sum_to_one(config, router, tokens_BCND) -> None:
    weights_BCNK = route(router, tokens_BCND).weights_BCNK
    assert weights_BCNK.min() > 0
    if config.top_k > 1:  # a single one is the score itself
        torch.testing.assert_close(weights_BCNK.sum(-1), torch.ones(B, C, N))


def test_no_token_meets_an_expert_twice(router, tokens_BCND) -> None:
    ids_BCNK = route(router, tokens_BCND).expert_ids_BCNK.sort(-1).values
    assert (ids_BCNK.diff(dim=-1) > 0).all()
    assert 0 <= ids_BCNK.min() <= ids_BCNK.max() < E


def test_load_counts_decisions_in_the_routers_own_unit(config, router, tokens_BCND) -> None:
    routing = route(router, tokens_BCND)
    decided_BCNK = routing.expert_ids_BCNK
    if routing.is_per_sequence:
        decided_BCNK = decided_BCNK[:, :, :1]
    assert routing.load_E.tolist() == decided_BCNK.flatten().bincount(minlength=E).tolist()
    assert routing.load_E.sum() == B * C * config.top_k * (1 if routing.is_per_sequence else N)
    assert not routing.load_E.requires_grad


def test_per_sequence_decision_is_repeated_for_all_tokens(router, tokens_BCND) -> None:
    routing = route(router, tokens_BCND)
    ids_BCNK, weights_BCNK = routing.expert_ids_BCNK, routing.weights_BCNK
    is_repeated = (ids_BCNK == ids_BCNK[:, :, :1]).all() and (
        weights_BCNK == weights_BCNK[:, :, :1]
    ).all()
    assert bool(is_repeated) == routing.is_per_sequence


def test_each_window_is_routed_by_itself(router, tokens_BCND) -> None:
    ids_BCNK = route(router, tokens_BCND).expert_ids_BCNK
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(route(router, tokens_BCND[order]).expert_ids_BCNK, ids_BCNK[order])


def test_each_series_of_a_packed_window_is_routed_by_itself(config, router, tokens_BCND) -> None:
    tokens_BCND = tokens_BCND[:, :1]
    series_BCN = torch.tensor([7, 7, -1, 3, 3, 3]).expand(B, 1, N)
    packed, _ = router(tokens_BCND, None, spans=SeriesSpans.of(series_BCN))
    assert not packed.is_per_sequence
    assert torch.equal(packed.is_token_BCN, series_BCN >= 0)
    load_E = torch.zeros(E, dtype=torch.int64)
    for place in (slice(0, 2), slice(3, 6)):
        single = route(router, tokens_BCND[:, :, place])
        assert torch.equal(packed.expert_ids_BCNK[:, :, place], single.expert_ids_BCNK)
        torch.testing.assert_close(packed.weights_BCNK[:, :, place], single.weights_BCNK)
        load_E += single.load_E
    assert packed.load_E.tolist() == load_E.tolist()


def test_bias_draws_tokens_to_an_expert_and_away(config, router, tokens_BCND) -> None:
    decisions = int(route(router, tokens_BCND).load_E.sum()) // config.top_k
    router.balance.bias_E[3] = 10
    assert route(router, tokens_BCND).load_E[3] == decisions
    router.balance.bias_E[3] = -10
    assert route(router, tokens_BCND).load_E[3] == 0


def expected_weights(chosen_BCNK: Tensor, top_k: int) -> Tensor:
    # A single expert's weight is its score: renormalised it would be 1, and teach nothing.
    return chosen_BCNK if top_k == 1 else chosen_BCNK / chosen_BCNK.sum(-1, keepdim=True)


def test_bias_changes_no_weight_while_the_selection_stays(config, router, tokens_BCND) -> None:
    plain = route(router, tokens_BCND)
    router.balance.bias_E += 0.7
    shifted = route(router, tokens_BCND)
    assert torch.equal(shifted.expert_ids_BCNK, plain.expert_ids_BCNK)
    assert torch.equal(shifted.weights_BCNK, plain.weights_BCNK)
    # An unequal bias: weights are still those of the scores, whoever was selected.
    router.balance.bias_E += torch.linspace(-0.3, 0.3, E)
    biased = route(router, tokens_BCND)
    assert not torch.equal(biased.expert_ids_BCNK, plain.expert_ids_BCNK)
    chosen = biased.scores_BCNE.expand(-1, -1, N, -1).gather(-1, biased.expert_ids_BCNK)
    torch.testing.assert_close(biased.weights_BCNK, expected_weights(chosen, config.top_k))


def test_bias_is_saved_but_not_learned(router) -> None:
    assert "balance.bias_E" in router.state_dict()
    assert "balance.bias_E" not in dict(router.named_parameters())
    assert router.balance.bias_E.dtype == torch.float32


def test_gradients_reach_every_parameter_and_the_tokens(config, router, tokens_BCND) -> None:
    router.train()  # what learned noise is for
    tokens_BCND.requires_grad_()
    weights_BCNK = route_in_second_layer(router, tokens_BCND).weights_BCNK
    weights_BCNK.square().sum().backward()
    assert tokens_BCND.grad.abs().sum() > 0
    for name, parameter in router.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert router.balance.bias_E.grad is None


def test_scores_carry_gradients_to_experts_that_were_not_chosen(router, tokens_BCND) -> None:
    router.train()
    routing = route_in_second_layer(router, tokens_BCND)
    is_chosen_BCNE = torch.zeros(B, C, N, E).scatter(-1, routing.expert_ids_BCNK, 1).bool()
    missed_BCNE = routing.scores_BCNE.expand(-1, -1, N, -1).masked_fill(is_chosen_BCNE, 0)
    missed_BCNE.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


def test_routing_is_done_in_float32_under_autocast(router, tokens_BCND) -> None:
    plain = route(router, tokens_BCND)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = route(router, tokens_BCND)
    assert mixed.scores_BCNE.dtype == torch.float32
    assert torch.equal(mixed.scores_BCNE, plain.scores_BCNE)


def test_router_is_named_so_that_it_is_not_taken_for_an_expert(router) -> None:
    names = [*dict(router.named_parameters()), *dict(router.named_buffers())]
    assert not [name for name in names if "expert" in name]
