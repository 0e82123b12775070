"""Dead experts and pictures, from loads step after step."""

import numpy as np
import pytest

from tsmoe.train.load_history import DEAD_AFTER_STEPS, LoadHistory, heat_map

# Two layers of three experts: the last of the second layer is chosen in step 3 and never again.
USED = np.array([[1, 1, 1], [2, 1, 0]])
ALL_USED = np.array([[1, 1, 1], [1, 1, 1]])


def history(steps: range, *, used_at: int = 3) -> LoadHistory:
    found = LoadHistory()
    for step in steps:
        found.add(step, ALL_USED if step == used_at else USED)
    return found


@pytest.mark.parametrize(
    ("last_step", "dead"),
    [
        (DEAD_AFTER_STEPS - 2, None),  # too few steps to tell
        (DEAD_AFTER_STEPS - 1, [[], []]),
        (DEAD_AFTER_STEPS + 2, [[], []]),  # chosen in the first of the last steps
        (DEAD_AFTER_STEPS + 3, [[], [2]]),
    ],
)
def test_expert_without_a_decision_for_so_many_steps_is_dead(last_step: int, dead) -> None:
    assert history(range(last_step + 1)).dead_experts() == dead


def test_expert_that_was_never_chosen_is_dead_as_soon_as_enough_steps_are_known() -> None:
    assert history(range(DEAD_AFTER_STEPS), used_at=-1).dead_experts() == [[], [2]]


def test_chosen_again_it_lives() -> None:
    found = history(range(DEAD_AFTER_STEPS + 10))
    found.add(DEAD_AFTER_STEPS + 10, ALL_USED)
    assert found.dead_experts() == [[], []]


def test_lines_of_an_earlier_start_give_the_same_history() -> None:
    steps = range(DEAD_AFTER_STEPS + 4)
    lines = [
        {"step": step, "experts": {"load": (ALL_USED if step == 3 else USED).tolist()}}
        for step in steps
    ]
    again = LoadHistory()
    for line in [*lines, {"step": 5, "loss/validation": 1.0}]:
        again.add_line(line)
    whole = history(steps)
    assert again.dead_experts() == whole.dead_experts() == [[], [2]]
    for name, picture in whole.pictures().items():
        np.testing.assert_array_equal(again.pictures()[name], picture)


def test_long_history_is_thinned_and_keeps_its_ends() -> None:
    found = history(range(2000))
    width = found.pictures()["load_over_time/layer_00"].shape[1] // 8
    assert 128 <= width <= 256


def test_heat_map_is_black_at_zero_and_brightest_from_twice_the_mean() -> None:
    colours = heat_map(np.array([[0.0, 1.0, 2.0, 5.0]]))[0, ::8].astype(int).sum(-1)
    assert colours[0] < 20 < colours[1] < colours[2] == colours[3]


def test_model_without_experts_has_no_pictures() -> None:
    found = LoadHistory()
    found.add(0, np.zeros((0, 0), dtype=np.int64))
    assert found.pictures() == {}
    assert found.dead_experts() is None
