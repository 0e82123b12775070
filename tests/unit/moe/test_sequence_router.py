import pytest
import torch
from torch import Tensor

from tsmoe.moe.routers.sequence import SequenceRouter, SequenceRouterConfig
from tsmoe.moe.routing import Routing
from tsmoe.nn.spans import SeriesSpans

D, E = 16, 8


def route(mode: str, tokens_BCND: Tensor) -> Routing:
    torch.manual_seed(0)
    router = SequenceRouter(SequenceRouterConfig(mode=mode), D, E)
    return router(tokens_BCND, None)[0]


@pytest.fixture(name="tokens_BCND")
def random_tokens() -> Tensor:
    return torch.randn(4, 3, 6, D, generator=torch.Generator().manual_seed(1))


def test_first_prefix_is_the_token_itself(tokens_BCND) -> None:
    prefix, token = route("prefix", tokens_BCND), route("token", tokens_BCND)
    assert torch.equal(prefix.expert_ids_BCNK[:, :, 0], token.expert_ids_BCNK[:, :, 0])
    assert torch.equal(prefix.weights_BCNK[:, :, 0], token.weights_BCNK[:, :, 0])
    assert not torch.equal(prefix.expert_ids_BCNK[:, :, 1:], token.expert_ids_BCNK[:, :, 1:])


def test_last_prefix_is_the_whole_sequence(tokens_BCND) -> None:
    prefix, sequence = route("prefix", tokens_BCND), route("sequence", tokens_BCND)
    assert torch.equal(prefix.expert_ids_BCNK[:, :, -1], sequence.expert_ids_BCNK[:, :, -1])
    torch.testing.assert_close(prefix.weights_BCNK[:, :, -1], sequence.weights_BCNK[:, :, -1])


def test_sequence_score_is_the_mean_affinity(tokens_BCND) -> None:
    torch.manual_seed(0)
    router = SequenceRouter(SequenceRouterConfig(mode="sequence"), D, E)
    affinity_BCNE = torch.einsum("bcnd,ed->bcne", tokens_BCND, router.clusters_ED).sigmoid()
    expected_BCE = affinity_BCNE.mean(2)
    scores_BCNE = router(tokens_BCND, None)[0].scores_BCNE
    torch.testing.assert_close(scores_BCNE[:, :, 0], expected_BCE)


@pytest.mark.parametrize(("mode", "is_causal"), [("prefix", 1), ("token", 1), ("sequence", 0)])
def test_only_sequence_mode_looks_at_later_tokens(tokens_BCND, mode: str, is_causal: int) -> None:
    before = route(mode, tokens_BCND).weights_BCNK[:, :, :-1]
    tokens_BCND[:, :, -1] *= -3
    after = route(mode, tokens_BCND).weights_BCNK[:, :, :-1]
    assert torch.equal(before, after) == bool(is_causal)


def test_logits_of_normalised_tokens_have_unit_variance(tokens_BCND) -> None:
    tokens_BCND = tokens_BCND / tokens_BCND.square().mean(-1, keepdim=True).sqrt()
    logits = route("token", tokens_BCND).scores_BCNE.logit()
    assert 0.7 < logits.std() < 1.4


def test_top_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k \(0\)"):
        SequenceRouterConfig(top_k=0)


def test_margin_is_the_distance_from_the_last_chosen_to_the_best_missed() -> None:
    router = SequenceRouter(SequenceRouterConfig(mode="token", top_k=2), 4, 4)
    with torch.no_grad():
        router.clusters_ED.copy_(torch.eye(4))
        router.balance.bias_E.copy_(torch.tensor([0.0, 0.0, 0.1, 0.0]))
    logits_BCNE = torch.tensor([[[[3.0, 2.0, -1.0, -3.0], [-4.0, 1.0, 4.0, 0.5]]]])
    routing, _ = router(logits_BCNE, None)
    biased_BCNE = logits_BCNE.sigmoid() + router.balance.bias_E
    # First token: experts 0 and 1, missed 2. Second: 2 and 1, missed 3.
    expected = ((biased_BCNE[0, 0, 0, 1] - biased_BCNE[0, 0, 0, 2])
                + (biased_BCNE[0, 0, 1, 1] - biased_BCNE[0, 0, 1, 3])) / 2  # fmt: skip
    torch.testing.assert_close(routing.margin, expected)
    assert not routing.margin.requires_grad


def test_margin_counts_tokens_of_series_only_and_is_nan_where_nothing_is_missed() -> None:
    tokens_BCND = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    router = SequenceRouter(SequenceRouterConfig(mode="token", top_k=2), 4, 4)
    spans = SeriesSpans.of(torch.tensor([[[0, 0, -1]]]))
    packed, _ = router(tokens_BCND, None, spans=spans)
    alone, _ = router(tokens_BCND[:, :, :2], None)
    torch.testing.assert_close(packed.margin, alone.margin)
    everyone = SequenceRouter(SequenceRouterConfig(mode="token", top_k=4), 4, 4)
    assert everyone(tokens_BCND, None)[0].margin.isnan()
