import numpy as np
import pytest

from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.baselines import Naive, SeasonalNaive, fill_gaps, season_length
from tsmoe.evaluate.least_squares import MAX_FIT_ROWS, fitted_windows
from tsmoe.evaluate.linear import Linear, fit_linear
from tsmoe.evaluate.protocol import ltsf_borders

NAN = np.nan


def windows(*contexts: list[float]) -> np.ndarray:
    return np.array(contexts, dtype=np.float32)[:, None]


def waves(num_rows: int, phase: float = 0.0) -> np.ndarray:
    """Two waves that follow x[t] = 2 cos(0.7) x[t-1] - x[t-2]: linear in the context, exactly."""
    angle_LC = 0.7 * np.arange(num_rows)[:, None] + phase + np.array([0.0, 1.0])
    return (np.sin(angle_LC) * np.array([1.0, 3.0])).astype(np.float32)


def random_walks(num_rows: int) -> np.ndarray:
    steps_LC = np.random.default_rng(0).standard_normal((num_rows, 2))
    return steps_LC.cumsum(axis=0).astype(np.float32)


def fit(values_LC: np.ndarray, *, context_length: int = 12, prediction_length: int = 4) -> Linear:
    return fit_linear(
        values_LC,
        ltsf_borders("mine.csv", len(values_LC)),
        context_length=context_length,
        prediction_length=prediction_length,
        path="mine.csv",
    )


def test_naive_repeats_the_last_observed_value() -> None:
    forecast_BCQ = Naive().forecast(windows([1, 2, 3], [1, 5, NAN], [NAN, NAN, NAN]), 2)
    assert forecast_BCQ.tolist() == [[[3, 3]], [[5, 5]], [[0, 0]]]


def test_seasonal_naive_repeats_the_last_season_in_phase() -> None:
    forecast_BCQ = SeasonalNaive(3).forecast(windows([9, 1, 2, 3, 4, 5, 6]), 5)
    assert forecast_BCQ[0, 0].tolist() == [4, 5, 6, 4, 5]


def test_seasonal_naive_takes_a_gap_from_the_last_season_that_has_it() -> None:
    context_BCL = windows([1, 2, NAN, 3, NAN, NAN, 4, NAN, NAN])
    # Second step: two seasons back. Third step: never observed, so the last observed value.
    assert SeasonalNaive(3).forecast(context_BCL, 4)[0, 0].tolist() == [4, 2, 4, 4]
    assert SeasonalNaive(2).forecast(windows([1, 2, 5, 6, 7, NAN]), 2)[0, 0].tolist() == [7, 6]
    assert SeasonalNaive(1).forecast(windows([NAN, NAN]), 2)[0, 0].tolist() == [0, 0]


def test_context_shorter_than_a_season_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"24 steps.*10 steps"):
        SeasonalNaive(24).forecast(np.zeros((1, 1, 10), np.float32), 4)


@pytest.mark.parametrize(
    ("freq", "season"),
    [
        ("min", 1440), ("10min", 144), ("15min", 96), ("30min", 48), ("h", 24), ("2h", 12),
        ("D", 7), ("B", 5), ("W-SUN", 52), ("MS", 12), ("ME", 12), ("BME", 12), ("QS-OCT", 4),
        ("YE-DEC", 1), ("7min", None), ("10D", None), ("s", None), (None, None),
    ],
)  # fmt: skip
def test_season_follows_the_sampling_interval(freq: str | None, season: int | None) -> None:
    assert season_length(freq) == season


def test_gaps_are_interpolated_inside_and_repeated_at_the_edges() -> None:
    context_BCL = windows([NAN, 1, NAN, NAN, 4, NAN], [1, 2, 3, 4, 5, 6], [NAN] * 6)
    filled_BCL = fill_gaps(context_BCL)
    np.testing.assert_allclose(filled_BCL[0, 0], [1, 1, 2, 3, 4, 4])
    np.testing.assert_array_equal(filled_BCL[1], context_BCL[1])
    np.testing.assert_array_equal(filled_BCL[2], 0)
    assert np.isnan(context_BCL[0, 0, 0]), "the input must stay as it is"


def test_gaps_are_filled_as_numpy_interp_does() -> None:
    generator = np.random.default_rng(0)
    context_BCL = generator.standard_normal((20, 3, 15))
    context_BCL[generator.random(context_BCL.shape) < 0.5] = NAN
    steps_L = np.arange(15)
    for filled_L, context_L in zip(
        fill_gaps(context_BCL).reshape(-1, 15), context_BCL.reshape(-1, 15), strict=True
    ):
        seen_L = np.isfinite(context_L)
        np.testing.assert_allclose(filled_L, np.interp(steps_L, steps_L[seen_L], context_L[seen_L]))


def test_linear_recovers_a_linear_recurrence_and_beats_naive() -> None:
    linear = fit(waves(400))
    other_CL = 20 * waves(16, phase=2.0).T + 5  # another phase, height and level
    context_BCL, target_BCQ = other_CL[None, :, :12], other_CL[None, :, 12:]
    error = np.abs(linear.forecast(context_BCL, 4) - target_BCQ).max()
    naive_error = np.abs(Naive().forecast(context_BCL, 4) - target_BCQ).max()
    assert error < 1e-3 * naive_error  # what the smallest ridge leaves


def test_linear_is_the_ridge_solution_on_the_train_windows() -> None:
    values_LC = random_walks(300)[:, :1]
    linear = fit(values_LC)
    rows = [values_LC[start : start + 16, 0].astype(np.float64) for start in range(210 - 15)]
    inputs_RG = np.array([np.append(row[:12] - row[11], 1) for row in rows])
    target_RQ = np.array([row[12:] - row[11] for row in rows])
    gram_GG = inputs_RG.T @ inputs_RG
    penalty_G = np.full(13, linear.ridge * np.diag(gram_GG)[:-1].mean())
    penalty_G[-1] = 0
    expected_GQ = np.linalg.solve(gram_GG + np.diag(penalty_G), inputs_RG.T @ target_RQ)
    np.testing.assert_allclose(linear.weight_GQ, expected_GQ, rtol=1e-5, atol=1e-8)


def test_linear_does_not_see_the_test_part() -> None:
    values_LC = random_walks(400)
    changed_LC = values_LC.copy()
    changed_LC[320:] = 1e6
    np.testing.assert_array_equal(fit(values_LC).weight_GQ, fit(changed_LC).weight_GQ)


def test_linear_shifts_with_the_level_of_the_context() -> None:
    linear = fit(random_walks(400))
    context_BCL = np.random.default_rng(1).standard_normal((3, 2, 12)).astype(np.float32)
    raised_BCQ = linear.forecast(context_BCL + 10, 4)
    np.testing.assert_allclose(raised_BCQ, linear.forecast(context_BCL, 4) + 10, atol=1e-4)


def test_rows_with_missing_targets_are_left_out_of_the_fit() -> None:
    values_LC = waves(400)
    values_LC[100:120] = NAN
    values_LC[300] = NAN
    other_CL = waves(16, phase=2.0).T
    forecast_BCQ = fit(values_LC).forecast(other_CL[None, :, :12], 4)
    # Interpolated contexts disturb the fit a little; targets taken as 0 would ruin it.
    np.testing.assert_allclose(forecast_BCQ[0], other_CL[:, 12:], atol=0.1)


def test_fit_without_any_full_target_names_the_part() -> None:
    values_LC = random_walks(400)
    values_LC[280:320:2] = NAN
    with pytest.raises(DataError, match=r"mine\.csv: no validation window"):
        fit(values_LC)


def test_constant_table_is_forecast_as_constant() -> None:
    context_BCL = np.full((1, 1, 12), 3.0, np.float32)
    forecast_BCQ = fit(np.full((200, 1), 3.0, np.float32)).forecast(context_BCL, 4)
    np.testing.assert_allclose(forecast_BCQ, 3.0)


def test_large_tables_are_fitted_on_a_bounded_number_of_rows() -> None:
    assert fitted_windows(7873, 7).tolist() == list(range(7873))
    drawn_B = fitted_windows(34_000, 21)
    assert len(drawn_B) == MAX_FIT_ROWS // 21
    assert len(np.unique(drawn_B)) == len(drawn_B)
    hours = np.bincount(drawn_B % 24, minlength=24)
    assert hours.min() > 0.6 * hours.mean(), "every hour of the day must be among the starts"
