"""Early stop, which step is kept, and when the start is."""

import json
import math

import pytest

from tsmoe.finetune.guard import Guard, StoppingConfig


def guard_of(start: float | None, *errors: float, patience: int = 2) -> Guard:
    guard = Guard(patience=patience, start_error=start)
    for place, error in enumerate(errors):
        guard.add(10 * place, error)
    return guard


def test_lowest_error_is_kept_and_of_equal_ones_the_first() -> None:
    assert guard_of(1.0, 0.9, 0.7, 0.7, 0.8).best_step == 10
    assert guard_of(1.0).best_step is None
    assert guard_of(1.0, math.nan, math.inf).best_step is None


def test_patience_counts_validations_since_the_best() -> None:
    assert not guard_of(1.0, 0.9, 0.8, 0.85).is_exhausted
    assert guard_of(1.0, 0.9, 0.8, 0.85, 0.81).is_exhausted
    assert not guard_of(1.0, 0.9, 0.8, 0.85, 0.79).is_exhausted
    assert guard_of(1.0, math.nan, math.nan, math.nan).is_exhausted


def test_from_scratch_what_stands_before_the_first_step_is_nothing_to_keep() -> None:
    assert guard_of(None, 0.5).best_step is None
    assert guard_of(None, 0.5, 0.9).best_step == 10
    assert guard_of(None, 0.5, math.nan, math.inf).best_step is None
    assert guard_of(1.0, 0.5, 0.9).best_step == 0


def test_start_that_forecasts_no_numbers_is_remembered_as_infinite() -> None:
    guard = guard_of(None, 0.9)
    guard.set_start(math.nan)
    assert guard.start_error == math.inf
    again = Guard.of_json(json.loads(json.dumps(guard.as_json(), allow_nan=False)), patience=2)
    assert again == guard


def test_a_guard_goes_on_from_what_a_checkpoint_remembers() -> None:
    guard = guard_of(1.0, 0.9, math.nan, 0.95)
    again = Guard.of_json(guard.as_json(), patience=2)
    assert again == guard
    assert again.is_exhausted
    assert not Guard.of_json(guard.as_json(), patience=3).is_exhausted


@pytest.mark.parametrize("name", ["patience", "max_windows"])
def test_wrong_settings_are_named(name) -> None:
    with pytest.raises(ValueError, match=name):
        StoppingConfig(**{name: 0})
