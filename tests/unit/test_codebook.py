"""Lloyd-Max codebooks against published distortions and against numerical integration."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtr

from quantcache.coding.codebook import POLYNOMIALS, Codebook, _with_distortion, gaussian_codebook, lloyd_max
from quantcache.coding.packing import MAX_WIDTH

PUBLISHED = {1: "0.3634", 2: "0.1175", 3: "0.03455", 4: "0.0095"}
"""As the literature prints them: half a unit of the last digit is the tolerance."""

WIDTHS = range(1, MAX_WIDTH + 1)
FAR = 13.0
"""Stands for infinity: what a unit Gaussian has beyond it is below 1e-37."""


def cell_integrals(width: int) -> NDArray[np.float64]:
    """Mass, first moment and squared error of every cell, ``[3, cells]``, by Gauss-Legendre quadrature."""
    book = lloyd_max(width)
    edges = np.array([-FAR, *book.boundaries, FAR])
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = np.diff(edges)[:, None] / 2
    x = (edges[1:, None] + edges[:-1, None]) / 2 + half * nodes
    measure = half * weights * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    error = (x - np.array(book.levels)[:, None]) ** 2
    return np.stack([(f * measure).sum(1) for f in (np.ones_like(x), x, error)])


@pytest.mark.parametrize("width", PUBLISHED)
def test_published_distortions(width: int) -> None:
    decimals = len(PUBLISHED[width].split(".")[1])
    assert lloyd_max(width).distortion == pytest.approx(float(PUBLISHED[width]), abs=0.5 * 10.0**-decimals)


def test_closed_forms() -> None:
    one_bit = lloyd_max(1)
    assert one_bit.levels[1] == pytest.approx(math.sqrt(2 / math.pi), rel=1e-14)
    assert one_bit.distortion == pytest.approx(1 - 2 / math.pi, rel=1e-14)
    assert lloyd_max(0).levels == (0.0,)
    assert lloyd_max(0).boundaries == ()
    assert lloyd_max(0).distortion == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_sizes_order_and_symmetry(width: int) -> None:
    book = lloyd_max(width)
    levels, boundaries = np.array(book.levels), np.array(book.boundaries)
    assert len(levels) == 2**width
    assert len(boundaries) == 2**width - 1
    assert (np.diff(levels) > 0).all()
    np.testing.assert_array_equal(levels, -levels[::-1])
    np.testing.assert_array_equal(boundaries, -boundaries[::-1])


@pytest.mark.parametrize("width", WIDTHS)
def test_boundaries_are_midpoints(width: int) -> None:
    book = lloyd_max(width)
    np.testing.assert_array_equal(book.boundaries, (np.array(book.levels[1:]) + np.array(book.levels[:-1])) / 2)


@pytest.mark.parametrize("width", WIDTHS)
def test_levels_are_centroids_of_their_cells(width: int) -> None:
    # With the midpoints above this pins the codebook: a log-concave density has one quantizer that satisfies both
    # (Fleischer, 1964). Quadrature and the differences of tail probabilities keep about ten digits of a cell's mean.
    mass, first, _ = cell_integrals(width)
    np.testing.assert_allclose(first / mass, lloyd_max(width).levels, rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_distortion_by_quadrature(width: int) -> None:
    # The closed form subtracts second moments that sum to one: its absolute error is some units of 1e-16.
    assert lloyd_max(width).distortion == pytest.approx(cell_integrals(width)[2].sum(), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("codebook", [lloyd_max, gaussian_codebook])
def test_distortion_falls_convexly(codebook: Callable[[int], Codebook]) -> None:
    """What makes greedy allocation optimal: every further bit is worth less than the one before."""
    gains = -np.diff([codebook(width).distortion for width in range(MAX_WIDTH + 1)])
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all()


@pytest.mark.parametrize("codebook", [lloyd_max, gaussian_codebook])
@pytest.mark.parametrize("width", [-1, MAX_WIDTH + 1])
def test_width_out_of_range(width: int, codebook: Callable[[int], Codebook]) -> None:
    with pytest.raises(ValueError, match=f"0 to {MAX_WIDTH}, got {width}"):
        codebook(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_polynomials_are_optimal(width: int) -> None:
    # Up to the 0.03 % that were given away for ratios which half precision evaluates well.
    count = 1 << width
    x = (np.arange(count) + 0.5) / count - 0.5
    terms = x[:, None] ** np.array([1, 3, 5])[: max(1, min(3, count // 2))]

    def distortion(coefficients: NDArray[np.float64]) -> float:
        return _with_distortion(terms @ coefficients).distortion

    start = np.linalg.lstsq(terms, np.array(lloyd_max(width).levels), rcond=None)[0]
    best = minimize(distortion, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-16, "maxfev": 10_000})
    assert gaussian_codebook(width).distortion <= best.fun * (1 + 3e-4)


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_polynomial_levels_are_ordered_and_ratios_exact_in_half_precision(width: int) -> None:
    levels = np.array(gaussian_codebook(width).levels)
    assert (np.diff(levels) > 0).all()
    np.testing.assert_array_equal(levels, -levels[::-1])
    ratios = np.array(POLYNOMIALS[width][1:])
    np.testing.assert_array_equal(ratios, ratios.astype(np.float16))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_polynomials_can_be_evaluated_in_half_precision(width: int, fused: bool) -> None:
    # As a GPU does it, with or without fused multiplication and addition: weighted with a Gaussian's energy, the error
    # is below half a unit of half precision.
    _, cubic, quintic = POLYNOMIALS[width]
    x = (np.arange(1 << width) + 0.5) / (1 << width) - 0.5

    def half(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values.astype(np.float16).astype(np.float64)

    square = half(x * x)
    inner = half(cubic + (square * quintic if fused else half(square * quintic)))
    value = half(x * half(1 + (square * inner if fused else half(square * inner))))
    exact = x * (1 + cubic * x**2 + quintic * x**4)
    energy = np.diff(ndtr(np.array([-np.inf, *gaussian_codebook(width).boundaries, np.inf]))) * exact**2
    assert math.sqrt((energy * (value / exact - 1) ** 2).sum() / energy.sum()) < 2.0**-12


@pytest.mark.parametrize(("width", "most"), [(2, 2e-5), (3, 4e-5), (4, 2e-3), (5, 0.012), (6, 0.033), (8, 0.092)])
def test_what_polynomials_cost_is_what_the_docstring_says(width: int, most: float) -> None:
    assert gaussian_codebook(width).distortion / lloyd_max(width).distortion - 1 <= most
