"""The graph of variates: distances, probabilities, samples, and what each measure sees."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tsmoe.nn.variate_graph import Graph, VariateGraph, VariateGraphConfig, variate_distances

MEASURES = ("amplitude", "coherence")


@pytest.fixture(name="values_BCL")
def walks() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 96, generator=generator).cumsum(-1)


def graph_of(values_BCL: Tensor, **settings: object) -> Graph:
    return VariateGraph(VariateGraphConfig(**settings)).eval()(values_BCL, ~values_BCL.isnan())


def test_amplitude_distance_is_that_of_numpy(values_BCL) -> None:
    found_BCC = variate_distances(values_BCL, ~values_BCL.isnan(), "amplitude")
    series_CL = values_BCL[1].double().numpy()
    scaled_CL = (series_CL - series_CL.mean(1, keepdims=True)) / series_CL.std(1, keepdims=True)
    amplitude_CF = np.abs(np.fft.rfft(scaled_CL, norm="ortho"))[:, 1:]
    expected_CC = np.abs(amplitude_CF[:, None] - amplitude_CF).sum(-1)
    np.testing.assert_allclose(found_BCC[1].numpy(), expected_CC, rtol=1e-4, atol=1e-4)


def test_coherence_distance_is_that_of_scipy_s_definition(values_BCL) -> None:
    found_BCC = variate_distances(values_BCL, ~values_BCL.isnan(), "coherence")
    series_CL = values_BCL[2].double().numpy()
    scaled_CL = (series_CL - series_CL.mean(1, keepdims=True)) / series_CL.std(1, keepdims=True)
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1, 25) / 25)
    parts_CSL = np.stack([scaled_CL[:, at : at + 24] for at in range(0, 73, 12)], axis=1)
    parts_CSL = (parts_CSL - parts_CSL.mean(-1, keepdims=True)) * taper
    spectra_CSF = np.fft.rfft(parts_CSL)[..., 1:]
    cross_CCF = np.einsum("isf,jsf->ijf", spectra_CSF, spectra_CSF.conj())
    power_CF = np.einsum("iif->if", cross_CCF).real
    share_CC = (np.abs(cross_CCF) ** 2).sum(-1) / (power_CF[:, None] * power_CF).sum(-1)
    np.testing.assert_allclose(found_BCC[2].numpy(), 1 - share_CC, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("measure", MEASURES)
def test_nearest_neighbour_gets_alpha_and_others_less_by_distance(values_BCL, measure) -> None:
    distance_BCC = variate_distances(values_BCL, ~values_BCL.isnan(), measure)
    probability_BCC = graph_of(values_BCL, measure=measure, alpha=0.8).edge_probability_BCC
    for window, row in np.ndindex(3, 5):
        others = [column for column in range(5) if column != row]
        nearest = distance_BCC[window, row, others].min()
        expected = 0.8 * nearest / distance_BCC[window, row, others]
        torch.testing.assert_close(
            probability_BCC[window, row, others], expected, rtol=1e-4, atol=1e-5
        )
        assert probability_BCC[window, row, row] == 1
        assert probability_BCC[window, row, others].max() == pytest.approx(0.8, rel=1e-4)


@pytest.mark.parametrize("measure", MEASURES)
def test_units_do_not_matter(values_BCL, measure) -> None:
    scale = torch.tensor([1.0, 100.0, 0.01, 3.0, 7.0])[:, None]
    expected = graph_of(values_BCL, measure=measure).edge_probability_BCC
    found = graph_of(values_BCL * scale + 50 * scale, measure=measure).edge_probability_BCC
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_evaluation_takes_likely_edges_and_draws_nothing(values_BCL) -> None:
    state = torch.get_rng_state()
    graph = graph_of(values_BCL)
    assert torch.equal(graph.adjacency_BCC, graph.edge_probability_BCC > 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert graph.adjacency_BCC.dtype == torch.bool


@pytest.mark.parametrize("is_alpha_learned", [False, True])
def test_samples_are_as_frequent_as_their_probability(values_BCL, is_alpha_learned) -> None:
    torch.manual_seed(0)
    module = VariateGraph(VariateGraphConfig(is_alpha_learned=is_alpha_learned, temperature=0.3))
    module.train()
    many_BCL = values_BCL[:1].expand(4000, -1, -1)
    graph = module(many_BCL, ~many_BCL.isnan())
    share_CC = graph.adjacency_BCC.float().mean(0)
    # Three standard deviations of a share of 4000 draws are 0.024.
    torch.testing.assert_close(share_CC, graph.edge_probability_BCC[0], atol=0.03, rtol=0)
    assert set(graph.adjacency_BCC.detach().unique().tolist()) == {0, 1}
    assert graph.adjacency_BCC.requires_grad == is_alpha_learned


def test_nobody_looks_at_a_variate_without_observations(values_BCL) -> None:
    values_BCL[0, 2] = torch.nan
    values_BCL[1, 3, 10:40] = torch.nan
    graph = graph_of(values_BCL)
    assert graph.edge_probability_BCC.isfinite().all()
    assert graph.edge_probability_BCC[0, :, 2].tolist() == [0, 0, 1, 0, 0]
    assert graph.edge_probability_BCC[1, :, 3].min() > 0


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [1, 2, 7, 96])
def test_constant_single_and_short_variates_have_a_graph(values_BCL, measure, length) -> None:
    values_BCL[:, 1] = 3.0
    alone = graph_of(values_BCL[:, :1, :length], measure=measure)
    assert alone.adjacency_BCC.all()
    graph = graph_of(values_BCL[..., :length], measure=measure)
    assert graph.edge_probability_BCC.isfinite().all()
    assert torch.diagonal(graph.adjacency_BCC, dim1=1, dim2=2).all()


def test_targets_look_at_covariates_and_covariates_at_nobody(values_BCL) -> None:
    is_covariate_BC = torch.tensor([0, 0, 0, 1, 1]).bool().expand(3, -1)
    module = VariateGraph(VariateGraphConfig()).eval()
    with_them = module(values_BCL, ~values_BCL.isnan(), is_covariate_BC)
    assert with_them.adjacency_BCC[:, :3, 3:].all()
    assert torch.equal(with_them.adjacency_BCC[0, 3:].int(), torch.eye(5)[3:].int())
    without = module(values_BCL[:, :3], ~values_BCL[:, :3].isnan())
    torch.testing.assert_close(
        with_them.edge_probability_BCC[:, :3, :3], without.edge_probability_BCC
    )


def lagged_group() -> Tensor:
    """A noise of one period, its copy 11 steps later, and two others with the same spectrum."""
    generator = np.random.default_rng(0)
    frequency = np.fft.rfftfreq(960)
    gain = np.exp(-(((frequency - 1 / 24) * 150) ** 2))
    series = [
        np.fft.irfft(np.fft.rfft(generator.normal(size=960)) * gain)[100 : 100 + 700]
        for _ in range(3)
    ]
    first, second, third = series
    return torch.tensor(np.stack([first[11:683], first[:672], second[:672], third[:672]]))[None]


def test_coherence_finds_what_follows_another_with_a_lag() -> None:
    distance_CC = variate_distances(
        lagged_group(), torch.ones(1, 4, 672, dtype=torch.bool), "coherence"
    )[0]
    assert distance_CC[0, 1] < 0.25
    assert distance_CC[0, 2:].min() > 2 * distance_CC[0, 1]


def test_amplitude_cannot_tell_a_lag() -> None:
    place = torch.arange(672) * (2 * torch.pi / 24)
    values_BCL = torch.stack([place.sin(), (place - 2).sin(), (place * 2).sin()])[None]
    distance_CC = variate_distances(
        values_BCL, torch.ones(1, 3, 672, dtype=torch.bool), "amplitude"
    )[0]
    assert distance_CC[0, 1] < 1e-2 < distance_CC[0, 2]


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"alpha": 1.0}, {"temperature": 0.0}, {"alpha": -1.0}]
)
def test_wrong_settings_are_named(settings) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        VariateGraphConfig(**settings)
