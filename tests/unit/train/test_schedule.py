from itertools import pairwise

import pytest

from tsmoe.train.schedule import BalanceConfig, ScheduleConfig, balance_rate, learning_rate


def rates(steps: int, *, peak: float = 2.0, **settings: float) -> list[float]:
    config = ScheduleConfig(**settings)
    return [learning_rate(step, steps=steps, peak=peak, config=config) for step in range(steps)]


def test_learning_rate_rises_evenly_to_the_peak() -> None:
    curve = rates(100, warmup_share=0.1)
    assert curve[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert curve[10] == pytest.approx(2.0)
    assert max(curve) == pytest.approx(2.0)


def test_learning_rate_falls_to_its_final_share_at_the_last_step() -> None:
    curve = rates(100, warmup_share=0.1, final_lr_share=0.05)
    assert curve[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(curve[10:]))
    # Half way down the cosine is half way between peak and final.
    assert (curve[54] + curve[55]) / 2 == pytest.approx((2.0 + 0.1) / 2, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_have_positive_rates(steps: int) -> None:
    curve = rates(steps)
    assert len(curve) == steps
    assert all(0 < rate <= 2.0 for rate in curve)


def test_no_warmup_starts_at_the_peak() -> None:
    assert rates(10, warmup_share=0.0)[0] == pytest.approx(2.0)


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_balance_rests_in_the_last_tenth(steps: int) -> None:
    found = [
        balance_rate(step, steps=steps, config=BalanceConfig(rate=0.5)) for step in range(steps)
    ]
    assert found == [0.5] * (steps * 9 // 10) + [0.0] * (steps // 10)


@pytest.mark.parametrize(
    "settings", [{"warmup_share": 1.0}, {"warmup_share": -0.1}, {"final_lr_share": 1.1}]
)
def test_impossible_shares_are_refused_by_name(settings: dict) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{name} \({value}\)"):
        ScheduleConfig(**settings)
