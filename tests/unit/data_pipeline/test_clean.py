import numpy as np
import pytest

from data_pipeline.steps.clean import CleanConfig, Cleaner

NAN = np.nan


@pytest.fixture
def cleaner() -> Cleaner:
    return Cleaner(CleanConfig(min_length=4, max_missing_fraction=0.5), train_fraction=0.8)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, 2, 3], "too_short"),
        ([], "too_short"),
        ([1, 2, np.inf, 4, 5], "infinite"),
        ([1, 2, -np.inf, 4, 5], "infinite"),
        ([NAN] * 5, "no_observation"),
        ([NAN, NAN, NAN, NAN, 5], "no_observation"),  # nothing to train on
        ([1, 2, NAN, NAN, NAN], "too_many_missing"),
        ([3, 3, NAN, 3, 3], "constant"),
        ([3, 3, 3, 3, 9], "constant"),  # changes only after the training part
        ([1, 2, NAN, 4, NAN], None),
        ([1, 2, 3, 4, 5], None),
    ],
)
def test_each_fault_has_its_reason(cleaner, make_record, values, reason) -> None:
    assert cleaner.reason_to_drop(make_record(values)) == reason


def test_only_the_second_of_two_equal_series_is_a_duplicate(cleaner, make_record) -> None:
    first, second = make_record([1, 2, NAN, 4, 5]), make_record([1, 2, NAN, 4, 5], item_id="b")
    assert cleaner.reason_to_drop(first) is None
    assert cleaner.reason_to_drop(second) == "duplicate"
    assert cleaner.reason_to_drop(make_record([1, 2, NAN, 4, 6])) is None


def test_constant_and_duplicate_series_can_be_kept(make_record) -> None:
    config = CleanConfig(min_length=1, drops_constant=False, drops_duplicates=False)
    cleaner = Cleaner(config, train_fraction=0.9)
    assert [cleaner.reason_to_drop(make_record([2, 2, 2])) for _ in range(2)] == [None, None]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_length": 0}, ["min_length", "0"]),
        ({"max_missing_fraction": 1.5}, ["max_missing_fraction", "1.5"]),
    ],
)
def test_impossible_thresholds_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        CleanConfig(**settings)
