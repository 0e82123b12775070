"""GIFT-Eval's way of measuring: which windows, and MASE and CRPS by hand."""

import numpy as np
import pytest

from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.gift import LEVELS, evaluate_gift, gift_scores

SEASON = 24


@pytest.mark.parametrize(
    ("rows", "horizon", "windows"),
    [(600, 12, 5), (600, 61, 1), (600, 60, 1), (600, 59, 2), (600, 2, 20), (601, 20, 4)],
)
def test_last_tenth_is_forecast_in_windows_that_do_not_overlap(
    make_table, make_forecaster, rows, horizon, windows
) -> None:
    values_LC = np.arange(rows, dtype=float)[:, None] % 31
    forecaster = make_forecaster()
    found = evaluate_gift(forecaster, make_table(values_LC), prediction_length=horizon)
    assert found.windows == windows
    context_BCL = forecaster.seen[0]
    assert context_BCL.shape == (windows, 1, 48)
    for window in range(windows):
        start = rows - (windows - window) * horizon
        np.testing.assert_array_equal(context_BCL[window, 0], values_LC[start - 48 : start, 0])


def test_errors_are_those_of_the_definitions(daily_cycle, make_table, make_forecaster) -> None:
    daily_cycle[553:558, 1] = np.nan
    table = make_table(daily_cycle)
    forecaster = make_forecaster(quantile_levels=LEVELS)
    found = evaluate_gift(forecaster, table, prediction_length=12)
    values_LC = table.values_LC.astype(float)
    scaled, absolute, magnitude, losses = [], [], 0.0, np.zeros(len(LEVELS))
    for start in range(540, 600, 12):
        for variate in range(2):
            history = values_LC[:start, variate]
            scale = np.nanmean(np.abs(history[SEASON:] - history[:-SEASON]))
            # The forecaster repeats the last value; its quantiles lie level - 0.5 beside it.
            point = history[-1]
            for step in range(12):
                target = values_LC[start + step, variate]
                if np.isnan(target):
                    continue
                absolute.append(abs(target - point))
                scaled.append(abs(target - point) / scale)
                magnitude += abs(target)
                for k, level in enumerate(LEVELS):
                    short = target - (point + level - 0.5)
                    losses[k] += max(level * short, (level - 1) * short)
    scores = found.scores["tsmoe"]
    assert scores.mae == pytest.approx(np.mean(absolute), rel=1e-5)
    assert scores.mase == pytest.approx(np.mean(scaled), rel=1e-5)
    assert scores.crps == pytest.approx(2 * losses.mean() / magnitude, rel=1e-5)
    assert scores.observed_fraction == pytest.approx(1 - 5 / 120)


def test_all_is_told_over_the_seasonal_naive_forecast(
    daily_cycle, make_table, make_forecaster
) -> None:
    found = evaluate_gift(make_forecaster(), make_table(daily_cycle), prediction_length=12)
    document = found.to_json_dict()
    rows = {row["model"]: row for row in document["results"]}
    assert list(rows) == ["tsmoe", "seasonal_naive", "naive"]
    assert rows["seasonal_naive"]["relative_mase"] == rows["seasonal_naive"]["relative_crps"] == 1
    naive, base = rows["naive"], rows["seasonal_naive"]
    assert naive["relative_mase"] == pytest.approx(naive["mase"] / base["mase"])
    assert naive["relative_crps"] == pytest.approx(naive["crps"] / base["crps"])
    assert naive["mase"] == pytest.approx(rows["tsmoe"]["mase"]), "it repeats the last value too"
    assert (document["protocol"], document["season"], document["windows"]) == ("gift", 24, 5)


def test_unit_does_not_matter_to_what_is_relative(daily_cycle, make_table, make_forecaster) -> None:
    once, twice = (
        evaluate_gift(make_forecaster(), make_table(scale * daily_cycle), prediction_length=12)
        for scale in (1, 1000)
    )
    for name in once.scores:
        assert twice.scores[name].mase == pytest.approx(once.scores[name].mase, rel=1e-4)
        assert twice.scores[name].crps == pytest.approx(once.scores[name].crps, rel=1e-4)
        assert twice.scores[name].mae == pytest.approx(1000 * once.scores[name].mae, rel=1e-4)


def test_point_forecast_counts_as_all_levels() -> None:
    generator = np.random.default_rng(0)
    mean_BCQ, target_BCQ = generator.normal(size=(2, 3, 4, 5))
    scores = gift_scores(mean_BCQ, None, target_BCQ, np.ones((3, 4)))
    assert scores.crps == pytest.approx(
        np.abs(mean_BCQ - target_BCQ).sum() / np.abs(target_BCQ).sum()
    )


def test_constant_history_has_no_mase() -> None:
    mean_BCQ, target_BCQ = np.zeros((1, 2, 3)), np.ones((1, 2, 3))
    scores = gift_scores(mean_BCQ, None, target_BCQ, np.array([[0.0, 2.0]]))
    assert scores.mase == 0.5
    assert gift_scores(mean_BCQ, None, target_BCQ, np.zeros((1, 2))).mase is None


def test_levels_between_those_of_the_head_are_interpolated(
    daily_cycle, make_table, make_forecaster
) -> None:
    """The forecaster's quantiles are linear in the level, so that few say what many do."""
    many, few = (
        evaluate_gift(
            make_forecaster(quantile_levels=levels), make_table(daily_cycle), prediction_length=12
        ).scores["tsmoe"]
        for levels in (LEVELS, (0.1, 0.5, 0.9))
    )
    assert few.crps == pytest.approx(many.crps, rel=1e-6)


@pytest.mark.parametrize(("freq", "season"), [("D", 1), ("W-SUN", 1), ("h", 24), ("MS", 12)])
def test_usual_seasons_are_those_of_gluonts(make_table, make_forecaster, freq, season) -> None:
    values_LC = np.random.default_rng(0).normal(size=(300, 1))
    found = evaluate_gift(make_forecaster(), make_table(values_LC, freq=freq), prediction_length=7)
    assert found.season == season


@pytest.mark.parametrize(
    ("rows", "settings", "error", "named"),
    [
        (40, {"prediction_length": 20}, DataError, r"too few rows \(40\).*season of 24"),
        (600, {"prediction_length": 0}, ConfigError, "prediction_length"),
        (600, {"season": 0}, ConfigError, "season"),
        (600, {"context_length": 0}, ConfigError, "context_length"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    daily_cycle, make_table, make_forecaster, rows, settings, error, named
) -> None:
    with pytest.raises(error, match=named):
        evaluate_gift(make_forecaster(), make_table(daily_cycle[:rows]), **settings)


def test_unobserved_targets_are_refused(daily_cycle, make_table, make_forecaster) -> None:
    daily_cycle[540:] = np.nan
    forecaster = make_forecaster(
        lambda context_BCL, length: np.zeros((*context_BCL.shape[:2], length))
    )
    with pytest.raises(DataError, match="no observed target"):
        evaluate_gift(forecaster, make_table(daily_cycle), prediction_length=12)
