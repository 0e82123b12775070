import tracemalloc

import numpy as np
import pytest
from reference_series import noise, reference_series

from data_pipeline.steps.dickey_fuller import dickey_fuller

# `arch.unitroot.ADF(values).stat` of arch 8.0.0, with 0 for NaN.
STATISTICS_OF_ARCH = [
    ("noise", 1000, -23.67126275754386),
    ("walk", 8, 0.22885498016435316),
    ("walk", 40, -2.3081704482644496),
    ("walk", 1000, -2.5348805465192887),
    ("walk", 70000, -1.238980131453181),
    ("daily", 8, -3.487383267841874),
    ("daily", 40, -3.7581178999841813),
    ("daily", 1000, -7.524678903586024),
    ("daily", 70000, -36.08342110789987),
    ("trend", 1000, -0.38132310932839036),
    ("gaps", 8, 1.340879606353544),
    ("gaps", 40, -7.529927399183487),
    ("gaps", 1000, -2.726896293577727),
    ("gaps", 70000, -1.1750147484003501),
    ("offset", 1000, -14.607902601982003),
]


@pytest.mark.parametrize(("kind", "length", "statistic"), STATISTICS_OF_ARCH)
def test_statistic_is_that_of_arch(kind, length, statistic) -> None:
    # Of 201 real series the worst differed by 3e-11; both are float64 throughout.
    assert dickey_fuller(reference_series(kind, length)) == pytest.approx(statistic, rel=1e-8)


@pytest.mark.parametrize("length", [4, 5, 9, 33, 150, 3000, 66000])
def test_statistic_is_that_of_the_installed_arch(length) -> None:
    unitroot = pytest.importorskip("arch.unitroot", reason="arch is not installed")
    values = reference_series("walk", length) + reference_series("daily", length)
    expected = unitroot.ADF(values.astype(np.float64)).stat
    assert dickey_fuller(values) == pytest.approx(expected, rel=1e-6)


def test_shift_and_scale_do_not_matter() -> None:
    values = reference_series("walk", 500).astype(np.float64)
    expected = dickey_fuller(values)
    for scale, shift in ((-3.0, 0.0), (1e30, 0.0), (1e-30, 0.0), (1.0, 1e6)):
        assert dickey_fuller(values * scale + shift) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0, 2.0, 3.0],
        [5.0] * 100,
        list(range(100)),  # every difference is the constant
        [0.0, 1.0, 2.0, 3.0] * 50,
        np.sin(np.arange(3000) / 50) + 0.3 * np.sin(np.arange(3000) / 7.3),  # rounding decides
        [*noise(100), np.inf],
        [*noise(100), -np.inf, np.nan],
    ],
    ids=["empty", "short", "constant", "line", "saw", "smooth", "infinite", "infinite and missing"],
)
def test_series_without_a_statistic_is_nan(values) -> None:
    assert np.isnan(dickey_fuller(np.array(values, np.float32)))


def test_memory_does_not_grow_with_length() -> None:
    peaks = []
    for length in (500_000, 1_000_000):
        values = reference_series("walk", length)
        tracemalloc.start()
        dickey_fuller(values)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Only the number of lags grows, by a fifth; the matrix of the regression would have 800 MB.
    assert peaks[1] < 1.3 * peaks[0] < 20e6, peaks
