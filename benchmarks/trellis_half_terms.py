"""Fit the polynomials that kernels compute the trellis' levels with in half precision.

The ratios of the codec's own polynomials (``TERMS`` of ``quantcache/coding/trellis.py``) are not numbers of half
precision, and every step of evaluating them rounds. Of the ratios near them that half precision holds, a random search
takes those for which what comes out, rounded as a GPU rounds it with and without fused multiplications, is nearest to
the levels. Running this file prints the constants of ``kernels/quantcache_kernels/gpu_tables.py`` and the root mean
square error of the levels beside that of the levels rounded to half precision; it takes a minute.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantcache.coding.packing import MAX_WIDTH
from quantcache.coding.trellis import TERMS, union_levels

Floats = NDArray[np.float64]

ROUNDS, CANDIDATES = 400, 256


def half(values: Floats) -> Floats:
    """Values rounded to half precision."""
    return values.astype(np.float16).astype(np.float64)


def evaluated(ratios: Floats, x: Floats, fused: bool) -> Floats:
    """x + x p in half precision, as ``levels_of`` of ``kernels/quantcache_kernels/triton/codes.py`` computes it.

    Args:
        ratios: Candidates, ``[N, 4]``.
        x: Centred places of the levels, ``[L]``.
        fused: Whether a product is rounded only once it is added.

    Returns:
        ``[N, L]``.
    """

    def add_product(a: Floats, b: Floats, c: Floats) -> Floats:
        return half((a * b if fused else half(a * b)) + c)

    square = half(x * x)
    total = np.broadcast_to(ratios[:, 3:], (len(ratios), len(x)))
    for term in (2, 1, 0):
        total = add_product(square, total, ratios[:, term : term + 1])
    return add_product(x, half(square * total), x)


def errors(ratios: Floats, width: int) -> tuple[Floats, Floats]:
    """Relative root mean square error of candidates ``[N, 4]`` on a unit Gaussian, and their scales, ``[N]`` each."""
    levels = np.array(union_levels(width))
    weights = np.exp(-(levels**2) / 2) * np.gradient(levels)
    above = levels > 0
    levels, weights = levels[above], weights[above]
    x = ((np.arange(2 << width) + 0.5) / (2 << width) - 0.5)[above]
    found = [evaluated(ratios, x, fused) for fused in (False, True)]
    scales = sum(each @ (weights * levels) for each in found) / sum(each**2 @ weights for each in found)
    total = sum((scales[:, None] * each - levels) ** 2 @ weights for each in found) / 2
    return np.sqrt(total / (weights @ levels**2)), scales


def fit(width: int) -> tuple[tuple[float, ...], float]:
    """Scale and ratios of a width, and their error."""
    generator = np.random.default_rng(width)
    first, *more = TERMS[width][0]
    best = half(np.array([[term / first for term in (*more, *[0.0] * (4 - len(more)))]]))
    least = errors(best, width)[0][0]
    for _ in range(ROUNDS):
        spread = 10 ** generator.uniform(-4, -1, (CANDIDATES, 1)) * generator.integers(0, 2, (CANDIDATES, 4))
        candidates = half(best * (1 + spread * generator.standard_normal((CANDIDATES, 4))))
        found = errors(candidates, width)[0]
        if found.min() < least:
            least, best = found.min(), candidates[found.argmin()][None]
    return (float(errors(best, width)[1][0]), *best[0].tolist()), float(least)


def main() -> None:
    """Fit every width and print the constants."""
    for width in range(1, MAX_WIDTH + 1):
        terms, error = fit(width)
        levels = np.array(union_levels(width)) / terms[0]
        rounding = float(np.sqrt(((half(levels) - levels) ** 2).sum() / (levels**2).sum()))
        shown = ", ".join(f"{term:.10g}" for term in terms)
        print(f"    ({shown}),  # width {width}: {error:.2e}, rounded levels {rounding:.2e}", flush=True)


if __name__ == "__main__":
    main()
