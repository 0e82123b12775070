import numpy as np
import pytest

from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.protocol import (
    Borders,
    check_rows,
    fit_scaler,
    iterate_windows,
    ltsf_borders,
)


def collect_windows(values_LC: np.ndarray, borders: Borders, **settings: int) -> list:
    return list(
        iterate_windows(
            values_LC, first_target=borders.validation_end, end=borders.test_end, **settings
        )
    )


def test_etth1_has_the_published_number_of_test_windows() -> None:
    borders = ltsf_borders("some/folder/ETTh1.csv", 17420)
    assert borders == Borders(train_end=8640, validation_end=11520, test_end=14400)
    assert borders.window_count(96) == 2785


def test_ettm_months_have_four_times_the_rows() -> None:
    borders = ltsf_borders("ETTm2.parquet", 69680)
    assert borders == Borders(train_end=34560, validation_end=46080, test_end=57600)


def test_other_tables_are_cut_70_10_20_with_the_remainder_in_validation() -> None:
    # The weather set: 52696 rows give 36887 / 5270 / 10539 in the published loaders.
    borders = ltsf_borders("weather.csv", 52696)
    assert borders == Borders(train_end=36887, validation_end=42157, test_end=52696)


def test_split_overrides_the_name() -> None:
    borders = ltsf_borders("ETTh1.csv", 100, split=(0.5, 0.25, 0.25))
    assert borders == Borders(train_end=50, validation_end=75, test_end=100)


@pytest.mark.parametrize("split", [(0.7, 0.1, 0.1), (0.9, 0.0, 0.1), (1.2, -0.4, 0.2)])
def test_split_that_is_no_split_is_refused(split: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="sum 1"):
        ltsf_borders("mine.csv", 100, split=split)


def test_cut_ett_file_is_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"14400.*9000"):
        ltsf_borders("ETTh1.csv", 9000)


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_every_test_window_comes_once_and_the_last_is_included(block_size: int) -> None:
    values_LC = np.arange(200, dtype=np.float32)[:, None] * np.array([1, 1000], np.float32)
    borders = ltsf_borders("mine.csv", 200)
    blocks = collect_windows(
        values_LC, borders, context_length=24, prediction_length=8, block_size=block_size
    )
    context_BCL = np.concatenate([block.context_BCL for block in blocks])
    target_BCQ = np.concatenate([block.target_BCQ for block in blocks])
    assert target_BCQ[:, 0, 0].tolist() == list(range(160, 193))
    assert target_BCQ[-1, 0, -1] == 199
    assert len(target_BCQ) == borders.window_count(8)
    # The context ends where the prediction begins, also where that is before the test part.
    np.testing.assert_array_equal(context_BCL[:, 0, -1], target_BCQ[:, 0, 0] - 1)
    np.testing.assert_array_equal(context_BCL[0, 1], 1000 * np.arange(136, 160))
    assert [block.first for block in blocks] == list(range(0, 33, block_size))


def test_many_variates_make_the_blocks_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsmoe.evaluate.protocol.MAX_BLOCK_VALUES", 5 * 40 * (24 + 8))
    values_LC = np.zeros((200, 40), np.float32)
    blocks = collect_windows(
        values_LC, ltsf_borders("mine.csv", 200), context_length=24, prediction_length=8
    )
    assert max(len(block.context_BCL) for block in blocks) == 5
    assert sum(len(block.context_BCL) for block in blocks) == 33


def test_too_short_table_is_refused_with_the_rows_of_each_part() -> None:
    borders = ltsf_borders("mine.csv", 200)
    with pytest.raises(DataError, match=r"test: 50 needed, 40 there") as error:
        check_rows(borders, path="mine.csv", context_length=24, prediction_length=50, fits=True)
    assert "validation: 50 needed, 20 there" in str(error.value)
    assert "train: 74 needed, 140 there" in str(error.value)


def test_short_validation_part_matters_only_if_something_is_fitted() -> None:
    borders = ltsf_borders("mine.csv", 200)
    lengths = {"path": "mine.csv", "context_length": 24, "prediction_length": 30}
    check_rows(borders, fits=False, **lengths)
    with pytest.raises(DataError, match="validation"):
        check_rows(borders, fits=True, **lengths)


def test_scaler_standardises_the_observed_points() -> None:
    values_LC = np.array([[1.0, 5.0], [np.nan, 7.0], [3.0, 9.0]])
    scaler = fit_scaler(values_LC, ("a", "b"), path="mine.csv")
    np.testing.assert_allclose(scaler.mean_C, [2.0, 7.0])
    np.testing.assert_allclose(scaler.std_C, [1.0, np.std([5, 7, 9])])
    scaled_LC = scaler.scale(values_LC)
    assert np.isnan(scaled_LC[1, 0])
    np.testing.assert_allclose(scaler.unscale(scaled_LC.T), values_LC.T, rtol=1e-6)


def test_constant_variate_is_scaled_by_one_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    values_LC = np.full((7, 2), 0.1, np.float32)  # the mean of 0.1 is not exactly 0.1
    values_LC[0, 1] = 3
    scaler = fit_scaler(values_LC, ("flat", "other"), path="mine.csv")
    assert scaler.std_C[0] == 1
    assert "flat" in caplog.text
    assert "other" not in caplog.text


def test_variate_without_a_train_value_is_refused_by_name() -> None:
    values_LC = np.array([[1.0, np.nan], [2.0, np.nan]])
    with pytest.raises(DataError, match=r"mine\.csv.*empty_one"):
        fit_scaler(values_LC, ("full", "empty_one"), path="mine.csv")
