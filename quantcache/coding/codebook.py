"""Scalar codebooks of the unit Gaussian: Lloyd and Max's, and the polynomials that the codec uses in their place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded
from scipy.special import ndtr, ndtri

from quantcache.coding.packing import MAX_WIDTH

Floats = NDArray[np.float64]

POLYNOMIALS: tuple[tuple[float, float, float], ...] = (
    (0.0, 0.0, 0.0),
    (3.191538, 0.0, 0.0),
    (3.585687, 0.875, 0.0),
    (3.909727, 0.64892578125, 3.677734375),
    (4.189609, 0.1346435546875, 7.45703125),
    (4.432341, -0.4111328125, 10.796875),
    (4.572929, -0.826171875, 13.9296875),
    (4.736527, -1.2333984375, 16.625),
    (4.942023, -1.6416015625, 18.875),
)
"""Scale c and ratios a, b of the levels ``c x (1 + a x² + b x⁴)`` of every width, x the code centred and scaled to
(-1/2, 1/2). Of the ratios that half precision holds exactly and whose distortion on a unit Gaussian is within 0.03 % of
the least, those for which the polynomial, evaluated in half precision, comes nearest to its exact value."""


@dataclass(frozen=True)
class Codebook:
    """One scalar quantizer.

    Attributes:
        levels: Reconstruction levels, ascending, ``2**width`` of them (unit variance).
        boundaries: The midpoints between neighbouring levels: a value equal to a boundary takes the lower level.
        distortion: Mean squared error on a unit Gaussian.
    """

    levels: tuple[float, ...]
    boundaries: tuple[float, ...]
    distortion: float


def _density(x: Floats) -> Floats:
    density: Floats = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    return density


def _cell_moments(edges: Floats) -> tuple[Floats, Floats, Floats]:
    """Probability, first and second moment of a unit Gaussian in every cell between neighbouring edges."""
    density = _density(edges)
    weighted = np.where(np.isfinite(edges), edges, 0.0) * density
    mass = np.diff(ndtr(edges))
    return mass, -np.diff(density), mass - np.diff(weighted)


def _lloyd_step(levels: Floats) -> Floats:
    """The step that moves every level to the mean of its cell."""
    mass, first, _ = _cell_moments(np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf])))
    step: Floats = first / mass - levels
    return step


def _newton_step(levels: Floats) -> Floats:
    """The Newton step towards "every level is the mean of its cell", whose Jacobian is tridiagonal."""
    inner = (levels[1:] + levels[:-1]) / 2
    mass, first, _ = _cell_moments(np.concatenate(([-np.inf], inner, [np.inf])))
    coupling = (levels[1:] - levels[:-1]) * _density(inner) / 4
    diagonal = -mass
    diagonal[:-1] += coupling
    diagonal[1:] += coupling
    bands = np.zeros((3, levels.size))
    bands[0, 1:], bands[1], bands[2, :-1] = coupling, diagonal, coupling
    step: Floats = -solve_banded((1, 1), bands, first - levels * mass)
    return step


@cache
def lloyd_max(width: int) -> Codebook:
    """The minimum-distortion scalar quantizer of a unit Gaussian.

    Source: S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982); J. Max, "Quantizing for
    minimum distortion", IRE Trans. Inf. Theory 6 (1960).

    Args:
        width: Code width in bits, 0 to 8; width 0 has the single level 0.

    Returns:
        The codebook; its levels are symmetric about zero.

    Raises:
        ValueError: ``width`` is outside 0 to 8.
    """
    _check_width(width)
    count = 1 << width
    # Panter-Dite: the optimal point density goes with the cube root of the density, a Gaussian of variance 3.
    levels = np.sqrt(3.0) * ndtri((np.arange(count) + 0.5) / count)
    for iteration in range(200 if width else 0):
        # Lloyd's own slow, safe steps first; Newton's once the levels are near enough for it to converge.
        step = _lloyd_step(levels) if iteration < 30 else _newton_step(levels)
        levels = levels + (step - step[::-1]) / 2
        if np.abs(step).max() < 1e-14:
            break
    return _with_distortion(levels)


@cache
def gaussian_codebook(width: int) -> Codebook:
    """The codec's quantizer of a unit Gaussian: levels that are an odd polynomial of the code.

    A processor that would have to gather levels from memory computes them instead, in half precision. The distortion is
    above that of :func:`lloyd_max` by 0.004 % at 3 bits, 0.2 % at 4, 1.2 % at 5, 3 % at 6 and 9 % at 8.

    Args:
        width: Code width in bits, 0 to 8; width 0 has the single level 0.

    Returns:
        The codebook; its levels are symmetric about zero.

    Raises:
        ValueError: ``width`` is outside 0 to 8.
    """
    _check_width(width)
    scale, cubic, quintic = POLYNOMIALS[width]
    count = 1 << width
    x = (np.arange(count) + 0.5) / count - 0.5
    return _with_distortion(scale * x * (1 + cubic * x**2 + quintic * x**4))


def _check_width(width: int) -> None:
    if not 0 <= width <= MAX_WIDTH:
        raise ValueError(f"code width must be 0 to {MAX_WIDTH}, got {width}")


def _with_distortion(levels: Floats) -> Codebook:
    """The codebook of some levels."""
    boundaries = (levels[1:] + levels[:-1]) / 2
    mass, first, second = _cell_moments(np.concatenate(([-np.inf], boundaries, [np.inf])))
    distortion = float((second - 2 * levels * first + levels**2 * mass).sum())
    return Codebook(tuple(levels.tolist()), tuple(boundaries.tolist()), distortion)
