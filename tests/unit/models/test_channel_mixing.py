"""Layers that mix variates: nothing changes without edges, and who sees whom with them."""

import pytest
import torch
from torch import Tensor

from tsmoe.models.output import ModelOutput
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.nn.variate_graph import VariateGraphConfig

VARIATES = 4


@pytest.fixture(name="values_BCL")
def related_walks() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, VARIATES, 64, generator=generator).cumsum(-1)


def run(
    model: TimeTracker, values_BCL: Tensor, *arguments: Tensor, **others: Tensor
) -> ModelOutput:
    with torch.no_grad():
        return model(values_BCL, ~values_BCL.isnan(), *arguments, **others)


def everyone(windows: int, variates: int = VARIATES) -> Tensor:
    return torch.ones(windows, variates, variates, dtype=torch.bool)


@pytest.mark.parametrize("mode", ["sequence", "prefix", "token"])
def test_without_edges_the_model_is_the_pretrained_one(make_model, values_BCL, mode) -> None:
    pretrained = make_model()
    model = make_model(num_channel_mixed_layers=2)
    model.load_state_dict(pretrained.state_dict(), strict=True)
    itself_BCC = torch.eye(VARIATES, dtype=torch.bool).expand(2, -1, -1)
    found, expected = run(model, values_BCL, itself_BCC), run(pretrained, values_BCL)
    # The same numbers by another kernel: float32 rounding.
    torch.testing.assert_close(
        found.prediction_BCNPK, expected.prediction_BCNPK, rtol=1e-4, atol=1e-5
    )


def test_alpha_below_a_half_leaves_no_edges_in_evaluation(make_model, values_BCL) -> None:
    pretrained = make_model()
    model = make_model(num_channel_mixed_layers=2, graph=VariateGraphConfig(alpha=0.5))
    model.load_state_dict(pretrained.state_dict())
    found, expected = run(model, values_BCL), run(pretrained, values_BCL)
    torch.testing.assert_close(
        found.prediction_BCNPK, expected.prediction_BCNPK, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("count", [1, 2])
def test_variates_are_seen_along_edges_alone(make_model, values_BCL, count) -> None:
    model = make_model(num_channel_mixed_layers=count)
    adjacency_BCC = torch.eye(VARIATES, dtype=torch.bool).repeat(2, 1, 1)
    adjacency_BCC[:, 0, 1] = True
    before = run(model, values_BCL, adjacency_BCC).prediction_BCNPK
    other_BCL = values_BCL.clone()
    other_BCL[:, 1] = other_BCL[:, 1].flip(-1)
    change_BC = run(model, other_BCL, adjacency_BCC).prediction_BCNPK.sub(before).abs()
    change_BC = change_BC.amax((2, 3, 4))
    assert (change_BC[:, :2] > 1e-3).all()
    torch.testing.assert_close(change_BC[:, 2:], torch.zeros(2, 2), atol=1e-5, rtol=0)


def test_pasts_are_seen_and_never_futures(make_model, values_BCL) -> None:
    model = make_model(num_channel_mixed_layers=2)
    before = run(model, values_BCL, everyone(2)).prediction_BCNPK
    other_BCL = values_BCL.clone()
    other_BCL[:, 1, 32:] += 5
    after = run(model, other_BCL, everyone(2)).prediction_BCNPK
    torch.testing.assert_close(after[:, :, :4], before[:, :, :4], atol=1e-5, rtol=1e-4)
    assert (after[:, 0, 4:] - before[:, 0, 4:]).abs().max() > 1e-3


def test_order_of_variates_does_not_matter(make_model, values_BCL) -> None:
    model = make_model(num_channel_mixed_layers=2)
    order = torch.tensor([2, 0, 3, 1])
    found, expected = run(model, values_BCL[:, order]), run(model, values_BCL)
    torch.testing.assert_close(
        found.prediction_BCNPK, expected.prediction_BCNPK[:, order], rtol=1e-4, atol=1e-5
    )
    assert found.graph is not None
    assert expected.graph is not None
    assert torch.equal(
        found.graph.adjacency_BCC, expected.graph.adjacency_BCC[:, order][:, :, order]
    )
    assert expected.graph.adjacency_BCC.sum() > 2 * VARIATES, "or nothing is shown"


def test_recomputed_activations_learn_along_the_same_sample(make_model, values_BCL) -> None:
    gradients = []
    for recomputes in (False, True):
        model = make_model(num_channel_mixed_layers=2).train()
        model.recomputes_activations = recomputes
        torch.manual_seed(5)
        output = model(values_BCL, ~values_BCL.isnan())
        output.prediction_BCNPK.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("is_learned", [False, True])
def test_alpha_learns_where_it_is_to(make_model, values_BCL, is_learned) -> None:
    graph = VariateGraphConfig(is_alpha_learned=is_learned)
    model = make_model(num_channel_mixed_layers=2, graph=graph).train()
    assert dict(model.named_parameters()).keys() - dict(make_model().named_parameters()).keys() == (
        {"variate_graph.alpha_logit"} if is_learned else set()
    )
    torch.manual_seed(0)
    model(values_BCL, ~values_BCL.isnan()).prediction_BCNPK.square().sum().backward()
    if is_learned:
        assert model.variate_graph.alpha_logit.grad.abs() > 1e-6


def test_edges_as_numbers_are_attended_like_a_mask(make_model, values_BCL) -> None:
    model = make_model(num_channel_mixed_layers=2)
    adjacency_BCC = torch.eye(VARIATES, dtype=torch.bool).repeat(2, 1, 1)
    adjacency_BCC[0, 0, 1] = adjacency_BCC[1, 2] = True
    found = run(model, values_BCL, adjacency_BCC.float()).prediction_BCNPK
    expected = run(model, values_BCL, adjacency_BCC).prediction_BCNPK
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_an_edge_tells_what_it_would_change(make_model, values_BCL) -> None:
    model = make_model(num_channel_mixed_layers=1)
    adjacency_BCC = everyone(2).float()
    adjacency_BCC[0, 0, 2] = 0
    adjacency_BCC.requires_grad_()
    observed_BCL = ~values_BCL.isnan()

    def total(adjacency_BCC: Tensor) -> Tensor:
        return model(values_BCL, observed_BCL, adjacency_BCC).prediction_BCNPK.square().sum()

    total(adjacency_BCC).backward()
    for column in (1, 2):  # an edge that is there, and one that is not
        step = torch.zeros_like(adjacency_BCC)
        step[0, 0, column] = 0.02
        with torch.no_grad():
            # Below 0 edges have no meaning: one-sided, by the formula of second order.
            rises = [total(adjacency_BCC + k * step) - total(adjacency_BCC) for k in (1, 2)]
        slope = ((4 * rises[0] - rises[1]) / 0.04).item()
        assert adjacency_BCC.grad[0, 0, column].item() == pytest.approx(slope, rel=0.05)
        assert abs(slope) > 0.01


def test_covariates_are_seen_and_see_nobody(make_model, values_BCL) -> None:
    model = make_model(num_channel_mixed_layers=2, graph=VariateGraphConfig(alpha=0.1))
    is_covariate_BC = (torch.arange(VARIATES) == VARIATES - 1).expand(2, -1)
    before = run(model, values_BCL, is_covariate_BC=is_covariate_BC).prediction_BCNPK
    of_target, of_covariate = values_BCL.clone(), values_BCL.clone()
    of_target[:, 0] = of_target[:, 0].flip(-1)
    of_covariate[:, -1] = of_covariate[:, -1].flip(-1)
    after = run(model, of_target, is_covariate_BC=is_covariate_BC).prediction_BCNPK
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=1e-4, atol=1e-5)
    after = run(model, of_covariate, is_covariate_BC=is_covariate_BC).prediction_BCNPK
    assert ((after - before).abs().amax((2, 3, 4)) > 1e-3).all()


def test_adjacency_without_layers_to_use_it_is_refused(make_model, values_BCL) -> None:
    with pytest.raises(ValueError, match="num_channel_mixed_layers is 0"):
        run(make_model(), values_BCL, everyone(2))
