"""Measures of the M4 competition, by hand and against its official results of Naive2."""

import json
from pathlib import Path

import numpy as np
import pytest

from tsmoe.evaluate.m4 import m4_scores, mase, naive2, owa, smape

BENCHMARKS = Path(__file__).parents[4] / "shared" / "data" / "benchmarks"


def seasonal_series(length: int, index: list[float]) -> np.ndarray:
    """Multiply a rising line with a repeated season."""
    return (100.0 + np.arange(length)) * np.resize(index, length)


def read_m4(name: str, part: str) -> dict[str, np.ndarray]:
    """Read the targets of one part by the number of the series, such as H12."""
    path = BENCHMARKS / f"m4_{name}_{part}.parquet"
    if not path.exists():
        pytest.skip(f"needs the M4 data in {path}")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path, columns=["item_id", "target"])
    return {
        item.as_py().rsplit("_", 1)[1]: target.values.to_numpy()
        for item, target in zip(table["item_id"], table["target"], strict=True)
    }


@pytest.mark.parametrize(
    ("name", "season", "official_smape", "official_mase"),
    [("hourly", 24, 18.383, 2.395), ("weekly", 1, 9.161, 2.777)],
)
def test_naive2_has_the_official_errors_of_the_competition(
    name: str, season: int, official_smape: float, official_mase: float
) -> None:
    train, test = read_m4(name, "train"), read_m4(name, "test")
    assert train.keys() == test.keys()
    trains, targets = [train[key] for key in train], [test[key] for key in train]
    forecasts = [
        np.full(len(target_Q), train_L[-1])
        for train_L, target_Q in zip(trains, targets, strict=True)
    ]
    scores = m4_scores(trains, targets, forecasts, season=season)
    # The official figures have three decimals.
    assert scores.naive2_smape == pytest.approx(official_smape, abs=6e-4)
    assert scores.naive2_mase == pytest.approx(official_mase, abs=6e-4)
    if season == 1:  # Naive2 is the naive forecast
        assert scores.owa == pytest.approx(1)
    else:
        assert scores.owa > 2


def test_smape_and_mase_of_a_small_case_are_those_by_hand() -> None:
    target_Q, forecast_Q = np.array([2.0, 4.0]), np.array([3.0, 4.0])
    assert smape(target_Q, forecast_Q) == pytest.approx(200 / 2 * 1 / 5)
    train_L = np.array([1.0, 2.0, 4.0, 3.0])  # seasonal differences of 2 steps: 3 and 1
    assert mase(target_Q, forecast_Q, train_L=train_L, season=2) == pytest.approx(0.5 / 2)
    assert mase(target_Q, forecast_Q, train_L=train_L, season=1) == pytest.approx(0.5 / (4 / 3))


def test_smape_is_200_at_most_and_0_where_both_are_0() -> None:
    assert smape(np.array([5.0]), np.array([0.0])) == 200.0
    assert smape(np.zeros(3), np.zeros(3)) == 0.0


@pytest.mark.parametrize("index", [[0.5, 1.0, 1.5], [0.4, 1.2, 1.4, 1.0]])  # odd and even seasons
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_naive2_repeats_the_season_at_the_last_level(index: list[float], extra: int) -> None:
    season = len(index)
    length = 20 * season + extra
    train_L = 100 * np.resize(index, length)
    forecast_Q = naive2(train_L, 2 * season + 1, season)
    expected_Q = 100 * np.resize(index, length + 2 * season + 1)[length:]
    np.testing.assert_allclose(forecast_Q, expected_Q)


def test_naive2_keeps_the_level_of_the_last_step_under_a_trend() -> None:
    train_L = seasonal_series(80, [0.4, 1.2, 1.4, 1.0])
    forecast_Q = naive2(train_L, 4, 4)
    # The line ends at 179; the indices are those of the season but for the slope within it.
    np.testing.assert_allclose(forecast_Q, 179 * np.array([0.4, 1.2, 1.4, 1.0]), rtol=0.01)


def test_naive2_repeats_the_last_value_where_nothing_is_seasonal() -> None:
    noise_L = 10 + np.random.default_rng(0).normal(size=200)
    np.testing.assert_array_equal(naive2(noise_L, 3, 24), np.full(3, noise_L[-1]))
    short_L = np.resize([5.0] + [1.0] * 23, 71)  # clearly seasonal, but under three seasons
    np.testing.assert_array_equal(naive2(short_L, 2, 24), np.full(2, short_L[-1]))
    np.testing.assert_array_equal(naive2(np.full(50, 7.0), 2, 4), [7.0, 7.0])
    np.testing.assert_array_equal(naive2(seasonal_series(40, [1.0, 2.0]), 2, 1), [278.0, 278.0])


def test_owa_averages_ratios_of_means() -> None:
    assert owa(5.0, 3.0, naive2_smape=10.0, naive2_mase=2.0) == pytest.approx((0.5 + 1.5) / 2)


def test_scores_of_a_set_weigh_every_series_alike() -> None:
    trains = [np.array([1.0, 2.0]), np.array([10.0, 14.0, 10.0])]
    targets = [np.array([4.0]), np.array([10.0, 30.0, 30.0])]
    forecasts = [np.array([4.0]), np.array([10.0, 30.0, 10.0])]
    scores = m4_scores(trains, targets, forecasts, season=1)
    # Naive errors: 200 * 2 / 6 and 200 * (0 + 1/2 + 1/2) / 3; in the unit 1 and 4: 2 and 10 / 3.
    assert scores.naive2_smape == pytest.approx(200 / 3)
    assert scores.naive2_mase == pytest.approx((2 + 10 / 3) / 2)
    assert scores.smape == pytest.approx(200 * 0.5 / 3 / 2)
    assert scores.mase == pytest.approx(20 / 3 / 4 / 2)
    expected = (scores.smape / scores.naive2_smape + scores.mase / scores.naive2_mase) / 2
    assert scores.owa == pytest.approx(expected)
    assert json.loads(json.dumps(scores.to_json_dict()))["owa"] == scores.owa


def test_naive2_as_the_forecast_has_an_owa_of_one() -> None:
    trains = [seasonal_series(80, [0.4, 1.2, 1.4, 1.0]), seasonal_series(60, [2.0, 1.0, 1.0, 1.0])]
    targets = [np.full(4, 90.0), np.full(4, 200.0)]
    forecasts = [naive2(train_L, 4, 4) for train_L in trains]
    assert m4_scores(trains, targets, forecasts, season=4).owa == pytest.approx(1)


def test_a_broken_value_is_counted_and_located_with_its_series() -> None:
    good, broken = np.array([1.0, 2.0, 4.0]), np.array([1.0, np.nan, np.inf])
    with pytest.raises(ValueError, match=r"series 1 of 2: forecast_Q: 2 of 3 .* at step 1"):
        m4_scores([good, good], [good, good], [good, broken], season=1)
    with pytest.raises(ValueError, match="train_L: 2 of 3 values are not finite"):
        naive2(broken, 3, 1)


def test_what_has_no_measure_is_refused() -> None:
    pair = np.array([1.0, 2.0])
    with pytest.raises(ValueError, match=r"target_Q \(2 steps\) and forecast_Q \(1 steps\)"):
        smape(pair, pair[:1])
    with pytest.raises(ValueError, match="target_Q must have one axis and at least one step"):
        smape(pair[:0], pair[:0])
    with pytest.raises(ValueError, match="season of 2 without any change"):
        mase(pair, pair, train_L=np.tile(pair, 3), season=2)
    with pytest.raises(ValueError, match=r"\(2 steps\) must be longer than one season \(24"):
        mase(pair, pair, train_L=pair, season=24)
    with pytest.raises(ValueError, match="season must be at least 1 step, got 0"):
        mase(pair, pair, train_L=pair, season=0)
    with pytest.raises(ValueError, match="at least one, got 0, 0 and 0"):
        m4_scores([], [], [], season=1)
    with pytest.raises(ValueError, match="got 2, 1 and 1"):
        m4_scores([pair, pair], [pair], [pair], season=1)
    with pytest.raises(ValueError, match="prediction_length must be at least 1, got 0"):
        naive2(pair, 0, 1)
    with pytest.raises(ValueError, match=r"positive for a multiplicative season.*-1\.0"):
        naive2(np.resize([3.0, -1.0], 40), 2, 2)
    with pytest.raises(ValueError, match=r"positive errors of Naive2, got sMAPE 0\.0"):
        owa(1.0, 1.0, naive2_smape=0.0, naive2_mase=1.0)
