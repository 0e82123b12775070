"""Forecasts of models that mix variates, beside covariates whose future is known or not."""

import numpy as np
import pytest
import torch

from tsmoe.errors import ConfigError
from tsmoe.inference import Forecaster

LENGTH, PATCH = 64, 8


@pytest.fixture
def forecaster(make_model) -> Forecaster:
    model = make_model(num_channel_mixed_layers=2, lookahead_patches=2)
    return Forecaster(model, {}, torch.device("cpu"))


def context(*shape: int, seed: int = 0) -> np.ndarray:
    steps = np.random.default_rng(seed).standard_normal(shape)
    return (20 + steps.cumsum(-1)).astype(np.float32)


def test_one_pass_sees_known_covariates_one_patch_ahead(forecaster) -> None:
    """The same as running the model by hand, with the last variate moved by a patch."""
    values_BCL, future_BFQ = context(3, 3, LENGTH), context(3, 1, 16, seed=1)
    found = forecaster.forecast_batch(values_BCL, 16, num_covariates=1, future_BFQ=future_BFQ)
    window_BCL = np.concatenate([values_BCL[..., PATCH:], np.full((3, 3, PATCH), np.nan)], axis=-1)
    # The window ends one patch after the context, what is known two patches after it.
    known_BL = np.concatenate([values_BCL[:, 2], future_BFQ[:, 0]], axis=-1)[:, -LENGTH:]
    window_BCL[:, 2] = known_BL
    window = torch.from_numpy(window_BCL.astype(np.float32))
    is_covariate_BC = torch.tensor([[False, False, True]] * 3)
    with torch.no_grad():
        output = forecaster.model(window, ~window.isnan(), is_covariate_BC=is_covariate_BC)
    statistics = output.statistics
    expected = output.prediction_BCNPK[..., 0] * statistics.scale_BCN1 + statistics.loc_BCN1
    np.testing.assert_allclose(
        found.mean_BCQ, expected[:, :2, -2:].flatten(2).numpy(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("place", [0, 7, 8, 15, 16, 30])
def test_no_forecast_uses_what_is_known_of_later_patches(forecaster, place: int) -> None:
    """Of a point, the steps before its patch know nothing; those of its patch and later do."""
    values_BCL, future_BFQ = context(1, 2, LENGTH), context(1, 1, 32, seed=1)
    before = forecaster.forecast_batch(values_BCL, 32, num_covariates=1, future_BFQ=future_BFQ)
    other = future_BFQ.copy()
    other[..., place] += 30
    after = forecaster.forecast_batch(values_BCL, 32, num_covariates=1, future_BFQ=other)
    change_Q = np.abs(after.mean_BCQ - before.mean_BCQ)[0, 0]
    first = place // PATCH * PATCH
    np.testing.assert_allclose(change_Q[:first], 0, atol=1e-3)
    assert change_Q[first : first + PATCH].max() > 1e-2


def test_future_that_is_not_known_is_nan(forecaster) -> None:
    values_BCL = context(2, 3, LENGTH)
    unknown = np.full((2, 1, 16), np.nan, np.float32)
    found = forecaster.forecast_batch(values_BCL, 16, num_covariates=1, future_BFQ=unknown)
    assert np.isfinite(found.mean_BCQ).all()
    assert found.mean_BCQ.shape == (2, 2, 16)


def test_later_patches_of_unknown_covariates_are_not_made_up(forecaster) -> None:
    """Rolling on, targets are continued by their forecast and covariates by nothing."""
    values_BCL = context(1, 2, LENGTH)
    found = forecaster.forecast_batch(values_BCL, 32, num_covariates=1).mean_BCQ
    first = forecaster.forecast_batch(values_BCL, 16, num_covariates=1).mean_BCQ
    np.testing.assert_allclose(found[..., :16], first, rtol=1e-5)
    rolled = np.full((1, 2, LENGTH + 16), np.nan, np.float32)
    rolled[..., :LENGTH], rolled[:, :1, LENGTH:] = values_BCL, first
    second = forecaster.forecast_batch(rolled, 16, num_covariates=1).mean_BCQ
    np.testing.assert_allclose(found[..., 16:], second, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_windows_of_a_pass_do_not_matter(forecaster, batch_size: int) -> None:
    values_BCL, future_BFQ = context(5, 3, LENGTH), context(5, 1, 20, seed=1)
    options = {"num_covariates": 2, "future_BFQ": future_BFQ}
    found = forecaster.forecast_batch(values_BCL, 20, batch_size=batch_size, **options)
    expected = forecaster.forecast_batch(values_BCL, 20, **options)
    np.testing.assert_allclose(found.mean_BCQ, expected.mean_BCQ, rtol=1e-5, atol=1e-4)


def test_model_that_mixes_nothing_leaves_covariates_out(make_model) -> None:
    forecaster = Forecaster(make_model(), {}, torch.device("cpu"))
    values_BCL = context(2, 3, LENGTH)
    found = forecaster.forecast_batch(values_BCL, 16, num_covariates=1).mean_BCQ
    expected = forecaster.forecast_batch(values_BCL[:, :2], 16).mean_BCQ
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ConfigError, match="forecasts each variate by itself"):
        forecaster.forecast_batch(
            values_BCL, 16, num_covariates=1, future_BFQ=np.zeros((2, 1, 16), np.float32)
        )
    with pytest.raises(ConfigError, match="has no graph"):
        forecaster.graph(values_BCL[0], 16)


@pytest.mark.parametrize("prediction_length", [8, 16, 40])
def test_graph_of_a_window_is_that_of_its_forecast(forecaster, prediction_length) -> None:
    values_BCL, future_BFQ = context(1, 4, 80), context(1, 1, prediction_length, seed=1)
    seen = []
    handle = forecaster.model.variate_graph.register_forward_hook(
        lambda _module, _inputs, graph: seen.append(graph)
    )
    options = {"num_covariates": 1}
    forecaster.forecast_batch(values_BCL, prediction_length, future_BFQ=future_BFQ, **options)
    handle.remove()
    graph = forecaster.graph(values_BCL[0], prediction_length, future_FQ=future_BFQ[0], **options)
    assert torch.equal(graph.edge_probability_BCC, seen[0].edge_probability_BCC)
    assert torch.equal(graph.adjacency_BCC, seen[0].adjacency_BCC)
    assert graph.adjacency_BCC[0, :3, 3].all()
    assert graph.adjacency_BCC[0, 3].tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_covariates": 3}, "at least one must be left"),
        ({"num_covariates": -1}, "num_covariates is -1"),
        ({"num_covariates": 1, "future_BFQ": np.zeros((2, 1, 9))}, "future_BFQ has shape"),
        ({"num_covariates": 1, "future_BFQ": np.zeros((1, 1, 16))}, "future_BFQ has shape"),
        ({"num_covariates": 1, "future_BFQ": np.zeros((2, 2, 16))}, "num_covariates is 1"),
        ({"num_covariates": 1, "future_BFQ": np.full((2, 1, 16), np.inf)}, "infinite"),
    ],
)
def test_covariates_that_do_not_fit_are_refused(forecaster, options, named) -> None:
    with pytest.raises(ConfigError, match=named):
        forecaster.forecast_batch(context(2, 3, LENGTH), 16, **options)
