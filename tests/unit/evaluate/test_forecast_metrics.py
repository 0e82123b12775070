import numpy as np
import pytest

from tsmoe.errors import DataError
from tsmoe.evaluate.metrics import ForecastMetrics, seasonal_differences


def random_windows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    forecast_BCQ, target_BCQ = generator.standard_normal((2, 30, 3, 8)).astype(np.float32)
    return forecast_BCQ, target_BCQ


def test_scores_equal_numpy_however_the_windows_are_cut() -> None:
    forecast_BCQ, target_BCQ = random_windows()
    scale_C = np.array([0.5, 1.0, 2.0])
    metrics = ForecastMetrics(scale_C)
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        metrics.update(forecast_BCQ[part], target_BCQ[part])
    scores = metrics.scores()
    error_BCQ = (forecast_BCQ - target_BCQ).astype(np.float64)
    assert scores.mse == pytest.approx(np.mean(error_BCQ**2), rel=1e-6)
    assert scores.mae == pytest.approx(np.mean(np.abs(error_BCQ)), rel=1e-6)
    assert scores.mase == pytest.approx(np.mean(np.abs(error_BCQ) / scale_C[:, None]), rel=1e-6)
    assert scores.variate_mse == pytest.approx(np.mean(error_BCQ**2, axis=(0, 2)), rel=1e-6)
    assert scores.crps is None
    assert scores.observed_fraction == 1


def test_targets_that_are_not_observed_do_not_count() -> None:
    metrics = ForecastMetrics(np.ones(2))
    target_BCQ = np.array([[[1.0, np.nan], [np.nan, np.nan]]])
    metrics.update(np.array([[[3.0, 99.0], [99.0, 99.0]]]), target_BCQ)
    scores = metrics.scores()
    assert (scores.mse, scores.mae) == (4.0, 2.0)
    assert scores.observed_fraction == 0.25
    assert scores.variate_mse == (4.0, None)


def test_nothing_observed_is_an_error_and_not_zero() -> None:
    metrics = ForecastMetrics(np.ones(1))
    metrics.update(np.zeros((1, 1, 2)), np.full((1, 1, 2), np.nan))
    with pytest.raises(DataError, match="no observed target"):
        metrics.scores()


def test_crps_is_the_mean_weighted_quantile_loss() -> None:
    _, target_BCQ = random_windows(1)
    levels = (0.1, 0.5, 0.9)
    quantiles_BCQK = np.random.default_rng(2).standard_normal((*target_BCQ.shape, 3))
    target_BCQ[0, 0, :4] = np.nan
    metrics = ForecastMetrics(np.ones(3), quantile_levels=levels)
    metrics.update(quantiles_BCQK[..., 1], target_BCQ, quantiles_BCQK=quantiles_BCQK)
    losses = []
    for k, level in enumerate(levels):
        short = target_BCQ - quantiles_BCQK[..., k]
        losses.append(2 * np.nansum(np.where(short >= 0, level * short, (level - 1) * short)))
    expected = np.mean(losses) / np.nansum(np.abs(target_BCQ))
    assert metrics.scores().crps == pytest.approx(expected, rel=1e-6)


def test_variate_without_seasonal_error_is_left_out_of_mase() -> None:
    metrics = ForecastMetrics(np.array([0.0, np.nan, 2.0]))
    metrics.update(np.array([[[9.0], [9.0], [4.0]]]), np.zeros((1, 3, 1)))
    assert metrics.scores().mase == 2.0


def test_seasonal_differences_skip_gaps() -> None:
    values_LC = np.array([[0.0, 1.0], [10.0, np.nan], [2.0, 1.0], [14.0, np.nan], [np.nan, 2.0]])
    np.testing.assert_allclose(seasonal_differences(values_LC, 2), [3.0, 0.5])
    assert np.isnan(seasonal_differences(values_LC, 9)).all()


def test_scores_that_do_not_apply_are_left_out_of_json() -> None:
    metrics = ForecastMetrics(np.zeros(1))
    metrics.update(np.ones((1, 1, 1)), np.zeros((1, 1, 1)))
    assert metrics.scores().to_json_dict() == {"mse": 1.0, "mae": 1.0}
