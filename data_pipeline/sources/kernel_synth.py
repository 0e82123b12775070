"""KernelSynth of Chronos (arXiv 2403.07815, section 4.2 and algorithm 2).

Up to five kernels are drawn from a bank, joined one after another by + or x, and one series is
drawn from the Gaussian process with that covariance and mean zero. The bank is the one of the
authors' script, whose kernels have the definitions of scikit-learn.

Departure: the authors decompose the covariance of all pairs of times, at a cost that grows with
the cube of the length. Here every kernel is written as a sum over powers p of

    cov(t, t') = (t t')^p (constant_p + stationary_p(|t - t'|))

which + and x keep, and the series as the sum of t^p times independent stationary series. Their
covariances are Toeplitz and are factored by Schur's algorithm, in memory that grows with the length
and time that grows with its square. No matrix library is involved, so that the number of threads
cannot change a bit of the result.
"""

from dataclasses import dataclass

import numpy as np

_MAX_KERNELS = 5
_PERIODS = (
    *(24, 48, 96, 24 * 7, 48 * 7, 96 * 7),  # hours, their halves and quarters: day and week
    *(7, 14, 30, 60, 365, 730),  # days, and half days: week, month, year
    *(4, 26, 52),  # weeks: month, half a year, year
    *(4, 6, 12),  # months
    *(4, 40),  # quarters
    *(10,),  # years
)
_JITTERS = (1e-9, 1e-7, 1e-5, 1e-3)
"""Noise that makes a smooth process regular enough to factor, as a share of its variance."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """Covariance of a process at the times 0 to 1 of L evenly spaced points."""

    constant_P: np.ndarray
    """Per power of t t'; never negative."""
    stationary_PL: np.ndarray
    """Per power, by distance in steps."""

    def __add__(self, other: "Kernel") -> "Kernel":
        powers = max(len(self.constant_P), len(other.constant_P))
        mine, theirs = self._padded(powers), other._padded(powers)
        return Kernel(
            mine.constant_P + theirs.constant_P, mine.stationary_PL + theirs.stationary_PL
        )

    def __mul__(self, other: "Kernel") -> "Kernel":
        powers = len(self.constant_P) + len(other.constant_P) - 1
        constant_P = np.zeros(powers)
        stationary_PL = np.zeros((powers, self.stationary_PL.shape[1]))
        for p, (mine, mine_L) in enumerate(zip(self.constant_P, self.stationary_PL, strict=True)):
            for q, (theirs, theirs_L) in enumerate(
                zip(other.constant_P, other.stationary_PL, strict=True), start=p
            ):
                constant_P[q] += mine * theirs
                stationary_PL[q] += mine * theirs_L + mine_L * theirs + mine_L * theirs_L
        return Kernel(constant_P, stationary_PL)

    def _padded(self, powers: int) -> "Kernel":
        missing = powers - len(self.constant_P)
        return Kernel(
            np.pad(self.constant_P, (0, missing)),
            np.pad(self.stationary_PL, ((0, missing), (0, 0))),
        )


def sample_kernel_series(generator: np.random.Generator, length: int) -> np.ndarray:
    """Draw one series.

    Args:
        generator: decides everything.
        length: points; time runs from 0 to 1 over them, and the periods of the bank, which the
            authors tie to 1,024 points, are the same numbers of steps at every length.

    Returns:
        float64 of that length. A smooth part carries white noise of 3e-5 times its standard
        deviation, which stands in for what the authors' decomposition rounds away.
    """
    kernel = draw_kernel(generator, length)
    powers = len(kernel.constant_P)
    constant_P = np.sqrt(kernel.constant_P) * generator.standard_normal(powers)
    noise_PL = generator.standard_normal((powers, length))
    series_PL = constant_P[:, None] + stationary_series(kernel.stationary_PL, noise_PL)
    times_L = np.linspace(0.0, 1.0, length)
    values_L = np.zeros(length)
    for power in reversed(range(powers)):
        values_L = values_L * times_L + series_PL[power]
    return values_L


def draw_kernel(generator: np.random.Generator, length: int) -> Kernel:
    """Draw kernels from the bank and join them."""
    bank = kernel_bank(length)
    indices = generator.integers(len(bank), size=generator.integers(1, _MAX_KERNELS + 1))
    kernel = bank[indices[0]]
    for index in indices[1:]:
        kernel = kernel + bank[index] if generator.random() < 0.5 else kernel * bank[index]
    return kernel


def kernel_bank(length: int) -> list[Kernel]:
    """List the kernels that series are made of, in the order of the authors' script."""
    lags_L = np.arange(length)
    distances_L = lags_L / (length - 1)
    return [
        *(
            _stationary(np.exp(-2.0 * np.sin(np.pi * distances_L * length / period) ** 2))
            for period in _PERIODS
        ),
        *(Kernel(np.array([sigma**2, 1.0]), np.zeros((2, length))) for sigma in (0.0, 1.0, 10.0)),
        *(_stationary(np.exp(-0.5 * (distances_L / scale) ** 2)) for scale in (0.1, 1.0, 10.0)),
        *(
            _stationary((1.0 + distances_L**2 / (2.0 * alpha)) ** -alpha)
            for alpha in (0.1, 1.0, 10.0)
        ),
        *(_stationary(level * (lags_L == 0)) for level in (0.1, 1.0)),
        Kernel(np.ones(1), np.zeros((1, length))),
    ]


def stationary_series(covariance_PL: np.ndarray, noise_PL: np.ndarray) -> np.ndarray:
    """Give white noise the covariance of stationary processes, one per row.

    Args:
        covariance_PL: by distance in steps; a row of zeros gives zeros.
        noise_PL: standard normal.
    """
    series_PL = np.zeros_like(noise_PL)
    is_there_P = covariance_PL[:, 0] > 0.0
    scales_P1 = np.sqrt(covariance_PL[is_there_P, :1])
    correlation_PL = covariance_PL[is_there_P] / covariance_PL[is_there_P, :1]
    for jitter in _JITTERS:
        noisy_PL = correlation_PL.copy()
        noisy_PL[:, 0] += jitter
        unit_PL = _schur(noisy_PL, noise_PL[is_there_P])
        if unit_PL is not None:
            series_PL[is_there_P] = scales_P1 * unit_PL
            return series_PL
    raise AssertionError("kernels and their sums and products are positive within 1e-3")


def _schur(covariance_PL: np.ndarray, noise_PL: np.ndarray) -> np.ndarray | None:
    """Multiply noise by the Cholesky factors of Toeplitz matrices, column by column.

    Returns None where a matrix is not positive definite to working precision.

    Source: the generalised Schur algorithm, with the hyperbolic rotations in the mixed form that
    Bojanczyk, Brent, de Hoog and Sweet (1995) prove stable.
    """
    length = covariance_PL.shape[1]
    column_PL = covariance_PL / np.sqrt(covariance_PL[:, :1])
    other_PL = column_PL.copy()
    series_PL = column_PL * noise_PL[:, :1]
    for step in range(1, length):
        column_PL, other_PL = column_PL[:, :-1], other_PL[:, 1:]
        reflection_P1 = other_PL[:, :1] / column_PL[:, :1]
        rest_P1 = (1.0 - reflection_P1) * (1.0 + reflection_P1)
        if not (rest_P1 > 0.0).all():
            return None
        root_P1 = np.sqrt(rest_P1)
        column_PL = (column_PL - reflection_P1 * other_PL) / root_P1
        other_PL = root_P1 * other_PL - reflection_P1 * column_PL
        series_PL[:, step:] += column_PL * noise_PL[:, step : step + 1]
    return series_PL


def _stationary(covariance_L: np.ndarray) -> Kernel:
    return Kernel(np.zeros(1), covariance_L[None, :].astype(np.float64))
