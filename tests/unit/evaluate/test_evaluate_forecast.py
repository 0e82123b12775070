import json

import numpy as np
import pytest

from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.forecast import evaluate_forecast
from tsmoe.evaluate.protocol import fit_scaler, ltsf_borders

LENGTHS = {"context_length": 48, "prediction_length": 12}


def test_result_file_has_the_fixed_names(daily_cycle, make_table, make_forecaster) -> None:
    table = make_table(daily_cycle)
    document = evaluate_forecast(make_forecaster(), table, **LENGTHS).to_json_dict()
    results = document.pop("results")
    assert [result["model"] for result in results] == ["tsmoe", "naive", "seasonal_naive", "linear"]
    assert all(set(result) == {"model", "mse", "mae", "mase"} for result in results)
    assert set(document.pop("variates")) == {"v0", "v1"}
    assert document == {
        "task": "forecast",
        "data": "mine.csv",
        "context": 48,
        "horizon": 12,
        "windows": 109,
        "protocol": "ltsf",
        "observed_fraction": 1.0,
    }
    json.dumps(results)


def test_models_are_ranked_as_the_data_demands(daily_cycle, make_table, make_forecaster) -> None:
    scores = evaluate_forecast(make_forecaster(), make_table(daily_cycle), **LENGTHS).scores
    assert scores["tsmoe"] == scores["naive"], "the fake forecaster repeats the last value"
    assert scores["linear"].mse < scores["seasonal_naive"].mse < 0.1 * scores["naive"].mse


def test_every_window_is_forecast_once_however_they_are_batched(
    daily_cycle, make_table, make_forecaster
) -> None:
    table = make_table(daily_cycle)
    whole, cut = make_forecaster(), make_forecaster()
    progress = []
    one = evaluate_forecast(whole, table, **LENGTHS, batch_size=1000)
    many = evaluate_forecast(
        cut, table, **LENGTHS, batch_size=10, progress=lambda *state: progress.append(state)
    )
    assert len(whole.seen) == 1
    assert len(cut.seen) == 11
    np.testing.assert_array_equal(np.concatenate(cut.seen), whole.seen[0])
    assert progress[-1] == (109, 109)
    assert many.scores["tsmoe"].mse == pytest.approx(one.scores["tsmoe"].mse, rel=1e-12)
    np.testing.assert_array_equal(many.example.mean_CQ, one.example.mean_CQ)


def test_perfect_forecaster_has_no_error(make_table, make_forecaster) -> None:
    table = make_table(np.arange(600.0)[:, None])  # a straight line goes on by its slope

    def go_on(context_BCL: np.ndarray, prediction_length: int) -> np.ndarray:
        slope = (context_BCL[..., -1:] - context_BCL[..., :1]) / (context_BCL.shape[-1] - 1)
        return context_BCL[..., -1:] + slope * np.arange(1, prediction_length + 1)

    scores = evaluate_forecast(make_forecaster(go_on), table, **LENGTHS).scores
    assert scores["tsmoe"].mse < 1e-10
    assert scores["naive"].mse > 1e-4


def test_test_values_do_not_change_the_scale(daily_cycle, make_table, make_forecaster) -> None:
    changed = daily_cycle.copy()
    changed[ltsf_borders("mine.csv", 600).validation_end :] *= 100
    before, after = make_forecaster(), make_forecaster()
    evaluate_forecast(before, make_table(daily_cycle), **LENGTHS)
    evaluate_forecast(after, make_table(changed), **LENGTHS)
    np.testing.assert_array_equal(before.seen[0][0], after.seen[0][0])
    assert np.abs(after.seen[0][-1]).max() > 50


def test_forecaster_gets_the_gaps_and_missing_targets_do_not_count(
    daily_cycle, make_table, make_forecaster
) -> None:
    daily_cycle[500:540, 0] = np.nan
    forecaster = make_forecaster(
        lambda context_BCL, steps: np.zeros((*context_BCL.shape[:2], steps))
    )
    evaluation = evaluate_forecast(forecaster, make_table(daily_cycle), **LENGTHS)
    assert np.isnan(forecaster.seen[0]).any()
    scaled_LC = fit_scaler(daily_cycle[:420], ("v0", "v1"), path="").scale(daily_cycle)
    targets = np.stack([scaled_LC[start : start + 12] for start in range(480, 589)])
    own = evaluation.scores["tsmoe"]
    assert own.mse == pytest.approx(np.nanmean(targets.astype(np.float64) ** 2), rel=1e-5)
    assert own.observed_fraction == pytest.approx(np.isfinite(targets).mean())
    assert all(np.isfinite(scores.mse) for scores in evaluation.scores.values())


def test_quantile_head_gets_a_crps_and_a_band(daily_cycle, make_table, make_forecaster) -> None:
    forecaster = make_forecaster(quantile_levels=(0.1, 0.5, 0.9))
    evaluation = evaluate_forecast(forecaster, make_table(daily_cycle), **LENGTHS)
    own, naive, *_ = evaluation.to_json_dict()["results"]
    assert own["crps"] > 0
    assert "crps" not in naive
    assert evaluation.example.quantiles_CQK.shape == (2, 12, 3)


def test_example_is_in_the_unit_of_the_table(daily_cycle, make_table, make_forecaster) -> None:
    table = make_table(50 + 7 * daily_cycle)
    example = evaluate_forecast(make_forecaster(), table, **LENGTHS).example
    middle = 480 + 109 // 2
    np.testing.assert_allclose(
        example.truth_CQ, table.values_LC[middle : middle + 12].T, rtol=1e-5, atol=1e-4
    )
    np.testing.assert_array_equal(example.times, table.timestamps[middle - 48 : middle + 12])


def test_forecast_that_is_not_finite_names_window_and_variate(
    daily_cycle, make_table, make_forecaster
) -> None:
    def break_one(context_BCL: np.ndarray, steps: int) -> np.ndarray:
        mean_BCQ = np.zeros((*context_BCL.shape[:2], steps))
        mean_BCQ[3, 1, 5] = np.inf
        return mean_BCQ

    with pytest.raises(DataError, match=r"window 3 \(from row 483\), variate v1"):
        evaluate_forecast(make_forecaster(break_one), make_table(daily_cycle), **LENGTHS)


def test_too_short_table_is_refused_before_any_forecast(make_table, make_forecaster) -> None:
    forecaster = make_forecaster()
    with pytest.raises(DataError, match=r"mine\.csv: too few rows.*96 needed, 60 there"):
        evaluate_forecast(forecaster, make_table(np.random.rand(300, 1)), context_length=100)
    assert not forecaster.seen


def test_test_part_without_observations_is_refused(
    daily_cycle, make_table, make_forecaster
) -> None:
    daily_cycle[480:] = np.nan
    with pytest.raises(DataError, match=r"rows 480 to 600"):
        evaluate_forecast(make_forecaster(), make_table(daily_cycle), **LENGTHS)


def test_unknown_season_must_be_given(daily_cycle, make_table, make_forecaster) -> None:
    table = make_table(daily_cycle, freq=None, start=None)
    with pytest.raises(ConfigError, match="--season"):
        evaluate_forecast(make_forecaster(), table, **LENGTHS)
    given = evaluate_forecast(make_forecaster(), table, **LENGTHS, season=24).scores
    known = evaluate_forecast(make_forecaster(), make_table(daily_cycle), **LENGTHS).scores
    assert given == known


def test_season_longer_than_the_context_is_refused(
    daily_cycle, make_table, make_forecaster
) -> None:
    with pytest.raises(ConfigError, match=r"168 steps.*48 steps"):
        evaluate_forecast(make_forecaster(), make_table(daily_cycle), **LENGTHS, season=168)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"baselines": ("arima",)}, "arima.*seasonal_naive"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"season": 0}, "season.*0"),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    setting: dict, named: str, daily_cycle, make_table, make_forecaster
) -> None:
    with pytest.raises(ConfigError, match=named):
        evaluate_forecast(make_forecaster(), make_table(daily_cycle), **(LENGTHS | setting))
