import numpy as np
import pandas as pd
import pytest

from data_pipeline.frequency import modern_alias, step_alias


@pytest.mark.parametrize(
    ("old", "new"),
    [("H", "h"), ("15T", "15min"), ("4S", "4s"), ("M", "ME"), ("Q-DEC", "QE-DEC"), ("A", "YE"),
     ("h", "h"), ("D", "D"), ("W-SUN", "W-SUN"), ("MS", "MS"), ("", None), (None, None)],
)  # fmt: skip
def test_old_aliases_get_their_present_spelling(old, new) -> None:
    assert modern_alias(old) == new


def test_unknown_alias_stays() -> None:
    assert modern_alias("every full moon") == "every full moon"


@pytest.mark.parametrize(
    ("step", "alias"),
    [("1h", "h"), ("90min", "90min"), ("1D", "D"), ("7D", "W-WED"), ("10D", "10D"), ("8ms", "8ms")],
)
def test_alias_names_the_step(step, alias) -> None:
    first = np.datetime64("2020-01-01", "us")  # a Wednesday
    microseconds = np.timedelta64(int(pd.Timedelta(step).total_seconds() * 1e6), "us")
    assert step_alias(microseconds, first) == alias
    following = pd.date_range(first, periods=2, freq=alias)[1]
    assert following - pd.Timestamp(first) == pd.Timedelta(step)
