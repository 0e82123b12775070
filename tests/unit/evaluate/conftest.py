"""Tables and forecasters with known answers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from data_pipeline.table import Table


@dataclass(frozen=True, kw_only=True)
class FakeForecast:
    mean_BCQ: np.ndarray
    quantiles_BCQK: np.ndarray | None = None


@dataclass
class FakeForecaster:
    """Answers with `rule(context_BCL, prediction_length)` and keeps the contexts it saw."""

    rule: Callable[[np.ndarray, int], np.ndarray]
    quantile_levels: tuple[float, ...] = ()
    context_length: int = 48
    seen: list[np.ndarray] = field(default_factory=list)
    card: dict = field(default_factory=dict)
    mixes_variates: bool = False

    def forecast_batch(
        self,
        context_BCL: np.ndarray,
        prediction_length: int,
        *,
        batch_size: int = 256,
        num_covariates: int = 0,
        future_BFQ: np.ndarray | None = None,
    ) -> FakeForecast:
        self.seen.append(context_BCL.copy())
        context_BCL = context_BCL[:, : context_BCL.shape[1] - num_covariates]
        mean_BCQ = self.rule(context_BCL, prediction_length).astype(np.float32)
        if not self.quantile_levels:
            return FakeForecast(mean_BCQ=mean_BCQ)
        spread_K = np.asarray(self.quantile_levels, dtype=np.float32) - 0.5
        return FakeForecast(mean_BCQ=mean_BCQ, quantiles_BCQK=mean_BCQ[..., None] + spread_K)

    def forecast(self, context_CL: np.ndarray, prediction_length: int) -> FakeForecast:
        return self.forecast_batch(context_CL[None], prediction_length)


def repeat_last(context_BCL: np.ndarray, prediction_length: int) -> np.ndarray:
    return np.repeat(context_BCL[..., -1:], prediction_length, axis=-1)


@pytest.fixture
def make_forecaster() -> Callable[..., FakeForecaster]:
    def make(rule: Callable = repeat_last, **settings: object) -> FakeForecaster:
        return FakeForecaster(rule, **settings)

    return make


@pytest.fixture
def make_table() -> Callable[..., Table]:
    def make(
        values_LC: np.ndarray,
        *,
        path: str = "mine.csv",
        freq: str | None = "h",
        start: str | None = "2020-01-01",
    ) -> Table:
        num_rows, num_variates = values_LC.shape
        timestamps = None
        if start is not None:
            hours = np.arange(num_rows) * np.timedelta64(1, "h")
            timestamps = (np.datetime64(start, "us") + hours).astype("datetime64[us]")
        return Table(
            path=path,
            timestamps=timestamps,
            freq=freq,
            variates=tuple(f"v{place}" for place in range(num_variates)),
            values_LC=values_LC.astype(np.float32),
        )

    return make


@pytest.fixture
def daily_cycle() -> np.ndarray:
    """Two noisy hourly variates with a daily cycle: 600 rows."""
    generator = np.random.default_rng(3)
    hours_L1 = np.arange(600)[:, None]
    cycle_LC = np.sin(2 * np.pi * (hours_L1 + np.array([0, 6])) / 24) * np.array([1.0, 5.0])
    return cycle_LC + 0.1 * generator.standard_normal((600, 2))
