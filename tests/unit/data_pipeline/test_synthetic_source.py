import numpy as np
import pytest

from data_pipeline.config import decode_corpus_config
from data_pipeline.errors import ConfigError
from data_pipeline.sources import kernel_synth, synthetic
from data_pipeline.sources.kernel_synth import Kernel, kernel_bank, stationary_series
from data_pipeline.sources.synthetic import SyntheticSource
from data_pipeline.sources.trend_seasonal import sample_trend_seasonal_series

KINDS = ["kernel", "trend_seasonal"]
LENGTH = 48


def dense(kernel: Kernel) -> np.ndarray:
    """Covariance of all pairs of times."""
    times = np.linspace(0.0, 1.0, kernel.stationary_PL.shape[1])
    steps = np.arange(len(times))
    lags = np.abs(steps[:, None] - steps[None, :])
    parts = zip(kernel.constant_P, kernel.stationary_PL, strict=True)
    return sum(
        np.outer(times, times) ** power * (constant + stationary_L[lags])
        for power, (constant, stationary_L) in enumerate(parts)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_series_is_a_function_of_seed_and_number_alone(monkeypatch, kind) -> None:
    def series(num_series: int, seed: int = 5) -> dict[str, bytes]:
        source = SyntheticSource(
            kind=kind, num_series=num_series, seed=seed, min_length=20, max_length=90
        )
        return {record.item_id: record.values.tobytes() for record in source.records()}

    few, many = series(4), series(9)
    assert few.items() <= many.items()
    assert len(set(many.values())) == 9
    assert not set(series(4, seed=6).values()) & set(few.values())
    monkeypatch.setattr(synthetic, "_SERIES_PER_UNIT", 2)
    assert series(9) == many


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 3, 70, 300])
def test_series_are_finite_and_of_the_length_asked_for(kind, length) -> None:
    source = SyntheticSource(kind=kind, num_series=60, min_length=length, max_length=length + 1)
    records = list(source.records())
    assert {len(record.values) for record in records} == {length, length + 1}
    assert all(np.isfinite(record.values).all() for record in records)
    assert {record.domain for record in records} == {"Synthetic"}
    assert {record.source for record in records} == {f"synthetic_{kind}"}


def test_units_are_ranges_of_series(monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "_SERIES_PER_UNIT", 3)
    source = SyntheticSource(kind="trend_seasonal", num_series=8, min_length=10, max_length=20)
    units = source.units()
    assert [unit.part for unit in units] == [0, 1, 2]
    assert [unit.size_bytes for unit in units] == [180, 180, 120]
    assert [len(list(source.read(unit))) for unit in units] == [3, 3, 2]


def test_long_series_make_units_of_bounded_size() -> None:
    source = SyntheticSource(
        kind="trend_seasonal", num_series=10, min_length=2**22, max_length=2**22
    )
    assert [unit.size_bytes for unit in source.units()] == [2**26, 2**26, 2**25]


def test_bank_has_the_kernels_of_chronos() -> None:
    """Against the definitions of scikit-learn, which the authors' script calls."""
    times = np.linspace(0.0, 1.0, LENGTH)
    distances = np.abs(times[:, None] - times[None, :])
    bank = kernel_bank(LENGTH)
    assert len(bank) == 33
    daily = np.exp(-2.0 * np.sin(np.pi * distances / (24 / LENGTH)) ** 2)
    expected = {
        0: daily,
        22: 1.0 + np.outer(times, times),
        24: np.exp(-(distances**2) / (2 * 0.1**2)),
        28: (1.0 + distances**2 / 2.0) ** -1.0,
        30: 0.1 * np.eye(LENGTH),
        32: np.ones((LENGTH, LENGTH)),
    }
    for index, covariance in expected.items():
        np.testing.assert_allclose(dense(bank[index]), covariance, atol=1e-12)


def test_sums_and_products_of_kernels_are_those_of_their_covariances() -> None:
    bank = kernel_bank(LENGTH)
    periodic, linear, smooth, white, constant = (bank[index] for index in (0, 22, 24, 30, 32))
    kernel = (periodic + linear) * smooth * linear + constant * white + linear
    covariance = (dense(periodic) + dense(linear)) * dense(smooth) * dense(linear)
    covariance += dense(constant) * dense(white) + dense(linear)
    np.testing.assert_allclose(dense(kernel), covariance, rtol=1e-12)


# Indices of the bank: periodic, squared exponential (0.1 and 10), rational quadratic, white.
@pytest.mark.parametrize("index", [0, 24, 26, 28, 31])
def test_noise_gets_the_covariance_asked_for(index) -> None:
    covariance_L = kernel_bank(LENGTH)[index].stationary_PL[0]
    # Unit vectors as noise give the columns of the factor.
    factor = stationary_series(np.tile(covariance_L, (LENGTH, 1)), np.eye(LENGTH)).T
    assert np.allclose(factor, np.tril(factor))
    steps = np.arange(LENGTH)
    expected = covariance_L[np.abs(steps[:, None] - steps[None, :])]
    # The jitter is 1e-9 of the variance.
    np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-8)


def test_samples_have_the_covariance_of_their_kernel(monkeypatch) -> None:
    bank = kernel_bank(LENGTH)
    kernel = (bank[0] + bank[22]) * bank[25]
    monkeypatch.setattr(kernel_synth, "draw_kernel", lambda *_: kernel)
    generator = np.random.default_rng(0)
    samples = np.stack([kernel_synth.sample_kernel_series(generator, LENGTH) for _ in range(800)])
    sampled, expected = samples.T @ samples / len(samples), dense(kernel)
    # A covariance of n samples is off by about sqrt(2 / n) = 5 %; four times that.
    assert np.abs(sampled - expected).max() < 0.2 * expected.max()


def test_constant_kernel_gives_a_constant_and_a_linear_one_a_line(monkeypatch) -> None:
    bank = kernel_bank(LENGTH)
    for index, order in ((32, 1), (22, 2)):
        monkeypatch.setattr(kernel_synth, "draw_kernel", lambda *_, index=index: bank[index])
        values = kernel_synth.sample_kernel_series(np.random.default_rng(1), LENGTH)
        assert np.abs(np.diff(values, order)).max() < 1e-14
        assert np.abs(values).max() > 0.1


def test_constant_part_has_the_variance_of_its_kernel(monkeypatch) -> None:
    """The linear kernel of sigma 10 starts at a level with a standard deviation of 10."""
    monkeypatch.setattr(kernel_synth, "draw_kernel", lambda *_: kernel_bank(4)[23])
    generator = np.random.default_rng(0)
    starts = [kernel_synth.sample_kernel_series(generator, 4)[0] for _ in range(400)]
    # A standard deviation of 400 samples is off by about 1 / sqrt(800) = 3.5 %; four times that.
    assert abs(np.std(starts) - 10.0) < 1.4


def test_seasons_repeat(monkeypatch) -> None:
    """Without the other parts, a season of 24 steps comes back after 24 steps."""
    quiet = "data_pipeline.sources.trend_seasonal"
    for part in ("_trend", "_noise", "_level_shifts", "_spikes"):
        monkeypatch.setattr(f"{quiet}.{part}", lambda _, length: np.zeros(length))
    monkeypatch.setattr(f"{quiet}._PERIODS", (24,))
    changes = []
    for seed in range(20):
        values = sample_trend_seasonal_series(np.random.default_rng(seed), 240)
        np.testing.assert_allclose(values[24:], values[:-24], atol=1e-8 * np.abs(values).max())
        changes.append(np.ptp(values))
    assert sum(change > 0 for change in changes) > 10


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "sources.0.num_series: the key is required"),
        ({"num_series": 0}, "num_series must be at least 1, got 0"),
        ({"num_series": 1, "seed": -1}, "seed must not be negative, got -1"),
        ({"num_series": 1, "min_length": 5, "max_length": 4}, r"min_length \(5\)"),
        ({"num_series": 1, "min_length": 1, "max_length": 4}, r"min_length \(1\)"),
        ({"num_series": 1, "max_length": 20_000}, "at most 16384"),
        ({"num_series": 1, "path": "a.csv"}, "path: unknown key"),
        ({"num_series": 1, "kind": "noise"}, "kind"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says) -> None:
    with pytest.raises(ConfigError, match=says):
        decode_corpus_config({"sources": [{"type": "synthetic", **settings}]}, where="a.yaml")
