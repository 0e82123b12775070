import pytest

from tsmoe.train import not_finite
from tsmoe.train.not_finite import NotFiniteError, NotFinitePolicy


def bad(step: int) -> NotFiniteError:
    return NotFiniteError("bad", step=step, what="loss", series=["a"], flags=(0, 1))


def test_stop_raises_at_once() -> None:
    with pytest.raises(NotFiniteError):
        NotFinitePolicy("stop").decide(bad(3))


@pytest.mark.parametrize(
    ("action", "limit"),
    [
        ("skip", not_finite.MAX_SKIPS_IN_A_ROW),
        ("roll_back", not_finite.MAX_ROLL_BACKS_IN_A_ROW),
    ],
)
def test_too_many_in_a_row_stop(action, limit) -> None:
    policy = NotFinitePolicy(action)
    for step in range(limit):
        policy.decide(bad(step))
    with pytest.raises(NotFiniteError):
        policy.decide(bad(limit))


def test_steps_done_again_do_not_count_as_progress() -> None:
    policy = NotFinitePolicy("roll_back")
    for _ in range(not_finite.MAX_ROLL_BACKS_IN_A_ROW):
        policy.decide(bad(9))
        policy.passed(8)
    with pytest.raises(NotFiniteError):
        policy.decide(bad(9))


def test_a_step_beyond_the_bad_one_begins_the_count_anew() -> None:
    policy = NotFinitePolicy("skip")
    for step in range(0, 6 * not_finite.MAX_SKIPS_IN_A_ROW, 2):
        policy.decide(bad(step))
        policy.passed(step + 1)


def test_what_is_remembered_names_step_series_and_windows() -> None:
    policy = NotFinitePolicy("roll_back", met_before=[{"step": 1}])
    policy.remember(bad(7), range(64, 128), to=4)
    assert policy.met[1] == {
        "step": 7,
        "what": "loss",
        "series": ["a"],
        "action": "roll_back",
        "windows": [64, 128],
        "to": 4,
    }
