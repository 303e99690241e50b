"""Figures of spectra, on spectra whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantcache.analysis import spectrum as sp
from quantcache.analysis.figures import cache_figures
from quantcache.coding.spectral import Moments


def stretched(gamma: float, beta: float, dim: int) -> np.ndarray:
    return np.exp(-beta * np.arange(1, dim + 1) ** gamma)


@pytest.mark.parametrize(("gamma", "beta"), [(0.3, 1.5), (0.5, 0.6), (1.0, 0.05)])
@pytest.mark.parametrize("dim", [64, 896])
def test_decay_is_recovered(gamma: float, beta: float, dim: int) -> None:
    if gamma == 1.0 and dim == 896:
        beta = 0.02  # no eigenvalue below the floor
    fit = sp.fit_decay(stretched(gamma, beta, dim))
    assert fit.gamma == pytest.approx(gamma, rel=0.05)
    assert fit.beta == pytest.approx(beta, rel=0.05)
    assert fit.error < 1e-3


@pytest.mark.parametrize("gamma", [0.3, 0.5, 1.0])
def test_decay_is_recovered_from_samples(gamma: float) -> None:
    """Through vectors, their covariance and its eigenvalues, not from the spectrum itself."""
    beta, dim = {0.3: 1.5, 0.5: 0.6, 1.0: 0.05}[gamma], 64
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.standard_normal((dim, dim)))[0]
    x = generator.standard_normal((40_000, dim)) * np.sqrt(stretched(gamma, beta, dim)) @ basis.T
    fit = sp.fit_decay(sp.eigenvalues(x.T @ x / len(x)))
    assert fit.gamma == pytest.approx(gamma, rel=0.05)


@pytest.mark.parametrize("samples", [33, 65, 1000])
def test_the_variance_of_few_samples_is_that_of_their_dimensions(samples: int) -> None:
    """It was the mean over the directions that so few samples can have: four times as much for a quarter of them."""
    rows = torch.randn(1, samples, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments(1, 128)
    moments.add(rows)
    (target,) = cache_figures(0, "value", moments)
    assert target.variance == pytest.approx(float(np.var(rows[0].numpy(), axis=0).mean()))
    assert target.reliable == (samples >= 4 * 128)


def test_components_and_effective_rank_are_exact() -> None:
    assert sp.components_for(np.ones(100)) == 95
    assert sp.components_for(np.ones(20)) == 19
    assert sp.components_for(np.array([95.0, 4.0, 1.0])) == 1
    assert sp.components_for(np.array([94.9, 4.1, 1.0])) == 2
    assert sp.components_for(np.zeros(4)) == 1
    assert sp.participation_ratio(np.ones(77)) == pytest.approx(77, rel=1e-12)
    assert sp.participation_ratio(np.array([3.0, 1.0])) == pytest.approx(16 / 10, rel=1e-12)
    assert sp.participation_ratio(np.zeros(3)) == 0.0


def test_rank_and_noise() -> None:
    spectrum = np.concatenate((np.full(8, 10.0), np.full(56, 1e-3)))
    assert sp.components_for(spectrum) == 8
    assert sp.knee(spectrum) == 9  # the first component of the noise floor
    total, squares = 80.056, 800.000056
    assert sp.participation_ratio(spectrum) == pytest.approx(total**2 / squares, rel=1e-12)


def test_identity() -> None:
    spectrum = np.ones(64)
    assert sp.coding_gain_bits(spectrum) == 0.0
    assert sp.fit_decay(spectrum).beta == 0.0
    assert sp.knee(spectrum) == 64
    assert sp.shannon_floor(spectrum, 2.0) == pytest.approx(1 / 16, rel=1e-12)
    assert sp.budgets(spectrum) == pytest.approx([-0.5 * math.log2(share) for share in (0.1, 0.03, 0.01)], rel=1e-12)


def test_shannon_numbers() -> None:
    """By hand: variances 16, 4, 1 and 1/4 have a geometric mean of 2 and an arithmetic one of 85/16."""
    spectrum = np.array([16.0, 4.0, 1.0, 0.25])
    assert sp.shannon_floor(spectrum, 3.0) == pytest.approx(2 / 64, rel=1e-6)
    gain = 0.5 * math.log2(85 / 32)
    assert sp.coding_gain_bits(spectrum) == pytest.approx(gain, rel=1e-6)
    assert sp.budgets(spectrum)[2] == pytest.approx(0.5 * math.log2(100) - gain, rel=1e-6)


def test_floor_is_below_every_code_of_the_spectrum() -> None:
    """No allocation of the codec's own codebooks gets below the bound."""
    from quantcache.coding.allocation import Group, allocate
    from quantcache.coding.codebook import gaussian_codebook

    spectrum = stretched(0.5, 0.6, 64)
    for bits in (2, 3, 4):
        widths = allocate([Group(float(value), 1) for value in spectrum], bits)
        error = sum(v * gaussian_codebook(w).distortion for v, w in zip(spectrum, widths, strict=True)) / 64
        assert sp.shannon_floor(spectrum, bits) < error


def test_rounding_errors_of_a_singular_covariance_are_floored() -> None:
    rows = np.random.default_rng(0).standard_normal((4, 32))
    spectrum = sp.eigenvalues(rows.T @ rows)
    assert (spectrum >= 0).all()
    assert sp.components_for(spectrum, 1.0) <= 5
    assert sp.coding_gain_bits(spectrum) < 0.5 * math.log2(1 / sp.FLOOR)
    assert math.isfinite(sp.fit_decay(spectrum).error)


def test_depth_law() -> None:
    x = np.arange(6.0)
    line = sp.fit_line(x, 0.5 + 0.1 * x)
    assert line is not None
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((0.1, 0.5, 1.0), abs=1e-12)
    assert sp.fit_line(x[:1], x[:1]) is None
    assert sp.fit_line(x, np.ones(6)).r_squared == 0.0


def test_water_filling_by_hand() -> None:
    """Above the water it is the Shannon floor; below, weak dimensions get nothing and keep their variance."""
    spectrum = np.array([16.0, 4.0, 1.0, 0.25])
    assert sp.water_filling(spectrum, 3.0) == pytest.approx(4 * sp.shannon_floor(spectrum, 3.0), rel=1e-12)
    assert sp.water_filling(spectrum, 0.0) == pytest.approx(spectrum.sum(), rel=1e-12)
    # Three bits in all: the first gets 2 and the second 1, which leaves both with the error 1; the others get none.
    assert sp.water_filling(spectrum, 0.75) == pytest.approx(1 + 1 + 1 + 0.25, rel=1e-12)
    assert sp.water_filling(np.array([5.0, 0.0]), 1.0) == pytest.approx(5 / 16, rel=1e-12)
