"""The temporal & channel loss: its closed form, its extremes, and what its gradient reaches."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tsmoe.moe.balance_loss import BalanceLossConfig, temporal_channel_loss
from tsmoe.moe.routers import RecurrentRouterConfig, SequenceRouterConfig, build_router
from tsmoe.moe.routing import Routing
from tsmoe.ranks import Ranks

E, K = 4, 2
CHANNEL = BalanceLossConfig(alpha=1.0, beta=0.0)
TEMPORAL = BalanceLossConfig(alpha=0.0, beta=1.0)


def routing_of(ids_BCNK: Tensor, scores_BCNE: Tensor) -> Routing:
    return Routing(
        expert_ids_BCNK=ids_BCNK,
        weights_BCNK=torch.ones(ids_BCNK.shape),
        scores_BCNE=scores_BCNE,
        load_E=torch.zeros(E, dtype=torch.int64),
        is_per_sequence=False,
        margin=torch.zeros(()),
        router_scores_BCNE=scores_BCNE,
    )


def random_routing(windows: int, variates: int, patches: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores_BCNE = torch.randn(windows, variates, patches, E, generator=generator).softmax(-1)
    return routing_of(scores_BCNE.topk(K, -1).indices, scores_BCNE)


def loss(routing: Routing, config: BalanceLossConfig, ranks: Ranks | None = None) -> float:
    return float(temporal_channel_loss([routing], config, ranks=ranks or Ranks()))


def by_hand(routing: Routing, axis: int) -> float:
    """Sum the definition up, token by token, for each variate (axis 1) or patch (axis 2)."""
    ids, scores = routing.expert_ids_BCNK, routing.scores_BCNE
    total = 0.0
    for group in range(ids.shape[axis]):
        own_ids, own_scores = ids.select(axis, group), scores.select(axis, group)
        tokens = own_ids[..., 0].numel()
        for expert in range(E):
            frequency = E / (K * tokens) * (own_ids == expert).sum().item()
            total += frequency * own_scores[..., expert].mean().item()
    return total / ids.shape[axis]


def test_is_the_closed_form() -> None:
    routing = random_routing(3, 2, 5)
    assert loss(routing, CHANNEL) == pytest.approx(by_hand(routing, 1), rel=1e-5)
    assert loss(routing, TEMPORAL) == pytest.approx(by_hand(routing, 2), rel=1e-5)
    both = BalanceLossConfig(alpha=0.3, beta=0.2)
    expected = 0.3 * by_hand(routing, 1) + 0.2 * by_hand(routing, 2)
    assert loss(routing, both) == pytest.approx(expected, rel=1e-5)


def test_layers_add_up() -> None:
    first, second = random_routing(2, 3, 4), random_routing(2, 3, 4, seed=1)
    together = temporal_channel_loss([first, second], CHANNEL, ranks=Ranks())
    assert float(together) == pytest.approx(loss(first, CHANNEL) + loss(second, CHANNEL), rel=1e-5)


def even_routing() -> Routing:
    """Every variate and every patch has each pair of neighbouring experts equally often."""
    pairs = torch.tensor([[0, 1], [2, 3]])
    place = (torch.arange(2)[:, None] + torch.arange(4)) % 2
    ids_BCNK = pairs[place][None].expand(2, -1, -1, -1)
    return routing_of(ids_BCNK, torch.full((2, 2, 4, E), 1 / E))


def test_even_choices_cost_one_and_collapse_costs_most() -> None:
    assert loss(even_routing(), CHANNEL) == pytest.approx(1)
    assert loss(even_routing(), TEMPORAL) == pytest.approx(1)
    ids_BCNK = torch.tensor([0, 1]).expand(2, 2, 4, K)
    scores_BCNE = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(2, 2, 4, E)
    collapsed = routing_of(ids_BCNK, scores_BCNE)
    assert loss(collapsed, CHANNEL) == pytest.approx(E / K)
    assert loss(collapsed, TEMPORAL) == pytest.approx(E / K)


def test_parts_see_what_they_are_named_after() -> None:
    """A pair of experts for each variate is even over times and collapsed within variates."""
    ids_CK = torch.tensor([[0, 1], [2, 3]])
    ids_BCNK = ids_CK[None, :, None].expand(2, -1, 4, -1)
    scores_BCNE = torch.zeros(2, 2, 4, E).scatter(-1, ids_BCNK, 0.5)
    by_variate = routing_of(ids_BCNK, scores_BCNE)
    assert loss(by_variate, CHANNEL) == pytest.approx(E / K)
    assert loss(by_variate, TEMPORAL) == pytest.approx(1)
    by_time = routing_of(ids_BCNK.transpose(1, 2), scores_BCNE.transpose(1, 2))
    assert loss(by_time, CHANNEL) == pytest.approx(1)
    assert loss(by_time, TEMPORAL) == pytest.approx(E / K)


def test_one_variate_or_one_patch_is_balanced_over_all_tokens() -> None:
    univariate = random_routing(6, 1, 5)
    assert loss(univariate, CHANNEL) == pytest.approx(by_hand(univariate, 1), rel=1e-5)
    one_patch = random_routing(6, 5, 1)
    assert loss(one_patch, TEMPORAL) == pytest.approx(by_hand(one_patch, 2), rel=1e-5)


def test_single_tokens_cannot_be_spread_and_cost_nothing() -> None:
    assert loss(random_routing(1, 1, 5), TEMPORAL) == 0
    assert loss(random_routing(1, 1, 5), CHANNEL) > 0
    assert loss(random_routing(1, 5, 1), CHANNEL) == 0
    assert loss(random_routing(1, 5, 1), TEMPORAL) > 0


@dataclass(frozen=True)
class _Pair(Ranks):
    """A rank that knows what the other would have said."""

    other: Tensor | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        assert self.other is not None
        return tensor + self.other


def test_shares_of_ranks_add_up_to_the_loss_of_all(monkeypatch) -> None:
    whole = random_routing(6, 2, 3)
    parts = [
        routing_of(whole.expert_ids_BCNK[part], whole.scores_BCNE[part])
        for part in (slice(0, 2), slice(2, 6))
    ]
    said: list[Tensor] = []

    @dataclass(frozen=True)
    class Listening(Ranks):
        def sum(self, tensor: Tensor) -> Tensor:
            said.append(tensor)
            return tensor

    config = BalanceLossConfig(alpha=0.7, beta=0.4)
    for part in parts:
        temporal_channel_loss([part], config, ranks=Listening())
    shares = [
        loss(part, config, _Pair(other=other))
        for part, other in zip(parts, reversed(said), strict=True)
    ]
    assert sum(shares) == pytest.approx(loss(whole, config), rel=1e-5)
    alone = [loss(part, config) for part in parts]
    assert sum(alone) != pytest.approx(loss(whole, config), rel=1e-2)


def test_gradient_reaches_the_router_and_only_the_router() -> None:
    torch.manual_seed(0)
    router = build_router(RecurrentRouterConfig(d_router=8, noise=1.0), 16, E).train()
    tokens_BCND = torch.randn(4, 2, 3, 16, requires_grad=True)
    _, state = router(tokens_BCND, None)
    routing, _ = router(tokens_BCND, state)
    temporal_channel_loss([routing], BalanceLossConfig(), ranks=Ranks()).backward()
    assert tokens_BCND.grad.abs().sum() == 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


def test_a_step_against_the_gradient_evens_the_choices_out() -> None:
    torch.manual_seed(0)
    router = build_router(RecurrentRouterConfig(d_router=8, noise=0.0), 16, E).train()
    with torch.no_grad():
        router.gate.weight[0] += 2.0 * router.gate.weight[0].sign()
    tokens_BCND = torch.randn(8, 2, 4, 16).abs()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    found = []
    for _ in range(60):
        routing, _ = router(tokens_BCND, None)
        value = temporal_channel_loss([routing], CHANNEL, ranks=Ranks())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    assert found[-1] < found[0] - 0.05


def test_router_without_scores_of_its_own_is_refused() -> None:
    router = build_router(SequenceRouterConfig(mode="token"), 16, E).train()
    routing, _ = router(torch.randn(2, 2, 3, 16), None)
    with pytest.raises(ValueError, match=r"scores by softmax.*balance_loss.alpha"):
        temporal_channel_loss([routing], CHANNEL, ranks=Ranks())


def test_nothing_is_computed_where_both_weights_are_zero() -> None:
    off = BalanceLossConfig(alpha=0.0, beta=0.0)
    routing = replace(random_routing(2, 2, 2), router_scores_BCNE=None)
    assert loss(routing, off) == 0
    with pytest.raises(ValueError, match=r"alpha \(-1"):
        BalanceLossConfig(alpha=-1.0)
