"""What a covariance spectrum says about coding: decay, effective dimensions, and the bounds of rate-distortion theory.

Shapes: D dimensions of an input, a key or a value; spectra are eigenvalues of a covariance, ``[D]`` float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

Floats = NDArray[np.float64]

COVERAGE = 0.95
"""Share of the variance that ``k95`` counts components for."""

BUDGET_SHARES = (0.10, 0.03, 0.01)
"""Distortion over mean variance that the three suggested budgets stay within."""

FLOOR = 1e-12
"""Eigenvalues below this share of the largest are rounding errors of their computation, and count as this."""

_EXPONENTS = np.linspace(0.05, 3.0, 60)
"""γ looked at. At the least one the spectrum is, for all practical purposes, a power law."""


@dataclass(frozen=True)
class DecayFit:
    """λ_i ≈ exp(c − β i^γ), i = 1 ... D.

    Attributes:
        gamma: γ; 1 is geometric decay, less is a heavier tail.
        beta: β, at least 0.
        error: Root mean square of the fit's error in log λ.
    """

    gamma: float
    beta: float
    error: float


def eigenvalues(covariance: Floats) -> Floats:
    """Eigenvalues of a covariance, descending, none negative.

    Args:
        covariance: Symmetric, ``[D, D]``.

    Returns:
        ``[D]``.
    """
    return np.linalg.eigvalsh(covariance)[::-1].clip(min=0.0)


def floored(spectrum: Floats) -> Floats:
    """A spectrum with its zeros and rounding errors raised to ``FLOOR`` of the largest eigenvalue.

    Args:
        spectrum: Eigenvalues, descending, ``[D]``.

    Returns:
        Positive eigenvalues; ones where all were zero.
    """
    largest = float(spectrum[0])
    return np.maximum(spectrum, FLOOR * largest) if largest > 0 else np.ones_like(spectrum)


def fit_decay(spectrum: Floats) -> DecayFit:
    """Fit a stretched exponential to a spectrum, least squares in log λ.

    Source: the form λ_i ∝ exp(−β i^γ) of covariance spectra, as in the eigenvalue decay of kernel operators (Williams
    and Seeger, "The effect of the input density distribution on kernel-based classifiers", 2000). For a given γ it is
    linear in β and c; γ is found on a grid, then by a bounded search around the best.

    Args:
        spectrum: Eigenvalues, descending, ``[D]``, D at least 1.

    Returns:
        The fit. A flat spectrum has β = 0, and γ = 1 by convention.
    """
    logs = np.log(floored(spectrum))
    if logs.size < 3 or np.ptp(logs) < 1e-9:
        return DecayFit(1.0, 0.0, float(logs.std()))
    index = np.arange(1, logs.size + 1, dtype=np.float64)

    def solve(gamma: float) -> tuple[float, float]:
        powers = index**gamma
        centred = powers - powers.mean()
        beta = max(0.0, -float(centred @ logs) / float(centred @ centred))
        return beta, float(np.sqrt(np.mean((logs - logs.mean() + beta * centred) ** 2)))

    best = min(_EXPONENTS, key=lambda gamma: solve(gamma)[1])
    step = _EXPONENTS[1] - _EXPONENTS[0]
    bounds = max(best - step, _EXPONENTS[0]), best + step
    found = minimize_scalar(lambda gamma: solve(gamma)[1], bounds=bounds, options={"xatol": 1e-10})
    gamma = float(found.x)
    beta, error = solve(gamma)
    return DecayFit(gamma, beta, error)


def knee(spectrum: Floats) -> int:
    """The component at which log λ lies farthest below the chord from its first to its last value.

    Source: V. Satopää et al., "Finding a 'kneedle' in a haystack" (2011), without its smoothing.

    Args:
        spectrum: Eigenvalues, descending, ``[D]``.

    Returns:
        A number of components, 1 to D; D where the spectrum lies nowhere below its chord.
    """
    logs = np.log(floored(spectrum))
    chord = np.linspace(logs[0], logs[-1], logs.size)
    below = chord - logs
    place = int(below.argmax())
    return place + 1 if below[place] > 1e-9 else int(logs.size)


def components_for(spectrum: Floats, share: float = COVERAGE) -> int:
    """How many components hold a share of the variance.

    Args:
        spectrum: Eigenvalues, descending, ``[D]``.
        share: The share, above 0 and at most 1.

    Returns:
        The smallest such number, at least 1.
    """
    total = float(spectrum.sum())
    if total <= 0:
        return 1
    held = np.cumsum(spectrum) / total
    return int(np.searchsorted(held, share * (1 - 1e-12))) + 1


def participation_ratio(spectrum: Floats) -> float:
    """Effective number of dimensions, (Σ λ)² / Σ λ².

    Source: the inverse participation ratio of D. Thouless, "Electrons in disordered systems" (1974).

    Args:
        spectrum: Eigenvalues, ``[D]``.

    Returns:
        Between 1 and D; 0 where there is no variance.
    """
    squares = float((spectrum**2).sum())
    return float(spectrum.sum()) ** 2 / squares if squares > 0 else 0.0


def geometric_mean(spectrum: Floats) -> float:
    """Geometric mean of a spectrum, its rounding errors floored (see :func:`floored`)."""
    return float(np.exp(np.log(floored(spectrum)).mean())) if spectrum[0] > 0 else 0.0


def shannon_floor(spectrum: Floats, bits: float) -> float:
    """Least mean squared error that any code of a Gaussian with this spectrum can have, in the high-rate form.

    D*(R) = geomean(λ) · 2^(−2R): exact while it is below every eigenvalue, and below the bound of reverse water-filling
    otherwise. Source: Cover and Thomas, "Elements of Information Theory", section 10.3.

    Args:
        spectrum: Eigenvalues, descending, ``[D]``.
        bits: Rate R in bits per dimension.

    Returns:
        The error per dimension, in units of the eigenvalues.
    """
    return geometric_mean(spectrum) * float(2.0 ** (-2.0 * bits))


def water_filling(spectrum: Floats, bits: float) -> float:
    """Least mean squared error of any code of independent Gaussians at a mean rate, exact at every rate.

    Source: Cover and Thomas, "Elements of Information Theory", theorem 10.3.3.

    Args:
        spectrum: Their variances in any order, ``[N]``.
        bits: Mean rate over all of them.

    Returns:
        The sum of their errors.
    """
    descending = np.sort(spectrum[spectrum > 0])[::-1]
    if not descending.size:
        return 0.0
    # With the k largest above the water, log2 θ = mean log2 λ − 2 R N / k; the right k is the largest that leaves the
    # k-th above it.
    counts = np.arange(1, descending.size + 1)
    levels = np.cumsum(np.log2(descending)) / counts - 2 * bits * spectrum.size / counts
    active = int(np.nonzero(np.log2(descending) >= levels)[0][-1]) + 1
    return active * float(2.0 ** levels[active - 1]) + float(descending[active:].sum())


def coding_gain_bits(spectrum: Floats) -> float:
    """Bits per dimension that the best transform saves over coding every dimension alike.

    ½ · log2 of arithmetic over geometric mean. Source: N. Jayant and P. Noll, "Digital Coding of Waveforms" (1984),
    section 12.2.

    Args:
        spectrum: Eigenvalues, descending, ``[D]``.

    Returns:
        Bits, at least 0.
    """
    geometric = geometric_mean(spectrum)
    return max(0.0, 0.5 * math.log2(float(floored(spectrum).mean()) / geometric)) if geometric > 0 else 0.0


def budgets(spectrum: Floats) -> tuple[float, ...]:
    """The smallest rates at which the Shannon floor is within each of ``BUDGET_SHARES`` of the mean variance.

    Args:
        spectrum: Eigenvalues, descending, ``[D]``.

    Returns:
        Bits per dimension, one for each share, at least 0.
    """
    gain = coding_gain_bits(spectrum)
    return tuple(max(0.0, -0.5 * math.log2(share) - gain) for share in BUDGET_SHARES)


@dataclass(frozen=True)
class Line:
    """A least-squares line.

    Attributes:
        slope: Change per step.
        intercept: Value at 0.
        r_squared: Share of the variance explained; 0 where there is none.
    """

    slope: float
    intercept: float
    r_squared: float


def fit_line(x: Floats, y: Floats) -> Line | None:
    """Fit a line.

    Args:
        x: ``[N]``.
        y: ``[N]``.

    Returns:
        The line; None where fewer than two different x leave it open.
    """
    if x.size < 2 or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    intercept = float(y.mean() - slope * x.mean())
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - slope * x - intercept) ** 2).sum())
    return Line(slope, intercept, 1 - left / spread if spread > 0 else 0.0)
