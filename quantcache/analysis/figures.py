"""The figures of one target, from its moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantcache.analysis import spectrum as sp
from quantcache.analysis.gathering import InputMoments
from quantcache.analysis.report import RATES, DepthLaw, Target
from quantcache.analysis.targets import InputTarget
from quantcache.coding.spectral import Moments

OUTLIER_ENERGY = 36.0
"""A channel whose energy is above that many times the median channel's is an outlier: 6 times in amplitude."""

POINTS = 24
"""Eigenvalues of a spectrum that a report keeps evenly spread over their number, and again over its logarithm."""

RELIABLE = 4
"""Samples for every dimension from which the small eigenvalues can be trusted."""


def input_figures(target: InputTarget, moments: InputMoments) -> Target:
    """Figures of an input of weights.

    Args:
        target: The input.
        moments: Its moments; without a second moment if it is too wide.

    Returns:
        The figures, those of the spectrum None where there is none.
    """
    covariance = None if moments.full is None else moments.full.covariance[0].cpu().numpy()
    return _figures(
        (target.layer, target.kind, None, target.projections),
        moments.count,
        (moments.sum / max(moments.count, 1)).cpu().numpy(),
        (moments.energy / max(moments.count, 1)).cpu().numpy(),
        covariance,
    )


def cache_figures(layer: int, name: str, moments: Moments) -> list[Target]:
    """Figures of the keys or values of every head of a layer.

    Args:
        layer: Layer index.
        name: ``key``, ``rotated key`` or ``value``.
        moments: Their moments.

    Returns:
        One target for each head.
    """
    energies = moments.second_moment.diagonal(dim1=-2, dim2=-1).cpu().numpy()
    means, covariances = moments.mean.cpu().numpy(), moments.covariance.cpu().numpy()
    return [
        _figures((layer, name, head, ()), moments.count, means[head], energies[head], covariances[head])
        for head in range(len(means))
    ]


def _figures(
    what: tuple[int, str, int | None, tuple[str, ...]],
    samples: int,
    mean: sp.Floats,
    energy: sp.Floats,
    covariance: sp.Floats | None,
) -> Target:
    total = float(energy.sum())
    outliers = np.nonzero(energy > OUTLIER_ENERGY * np.median(energy))[0]
    common: dict[str, Any] = {
        "dim": mean.size,
        "samples": samples,
        "outliers": tuple(int(channel) for channel in outliers),
        "mean_share": float(mean @ mean) / total if total > 0 else 0.0,
    }
    layer, name, head, projections = what
    if covariance is None or samples < 2:
        variance = (total - float(mean @ mean)) / mean.size
        return Target(
            layer, name, head, projections, **common, variance=variance, points=(), spectrum=(), gamma=None, beta=None,
            fit_error=None, knee=None, k95=None, participation=None, coding_gain=None, floors=(), budgets=(),
            reliable=False,
        )  # fmt: skip
    # Of fewer samples than dimensions, no more directions can be known.
    values = sp.eigenvalues(covariance)[: max(1, min(mean.size, samples - 1))]
    known, variance = float(values.mean()), float(covariance.trace()) / mean.size
    fit = sp.fit_decay(values)
    spread = (np.geomspace(1, values.size, POINTS), np.linspace(1, values.size, POINTS))
    points = np.unique(np.concatenate(spread).round().astype(int))
    scale = known if known > 0 else 1.0
    return Target(
        layer,
        name,
        head,
        projections,
        **common,
        variance=variance,
        points=tuple(int(point) for point in points),
        spectrum=tuple(float(value) / scale for value in values[points - 1]),
        gamma=fit.gamma,
        beta=fit.beta,
        fit_error=fit.error,
        knee=sp.knee(values),
        k95=sp.components_for(values),
        participation=sp.participation_ratio(values),
        coding_gain=sp.coding_gain_bits(values),
        floors=tuple(sp.shannon_floor(values, bits) / scale for bits in RATES),
        budgets=sp.budgets(values),
        reliable=samples >= RELIABLE * mean.size,
    )


def depth_laws(targets: Sequence[Target]) -> list[DepthLaw]:
    """Lines through γ over depth, of every name of targets that has at least three layers.

    Args:
        targets: All targets.

    Returns:
        The laws, in the order in which the names first occur.
    """
    laws = []
    for name in dict.fromkeys(target.name for target in targets):
        gammas: dict[int, list[float]] = {}
        for target in targets:
            if target.name == name and target.gamma is not None:
                gammas.setdefault(target.layer, []).append(target.gamma)
        line = sp.fit_line(
            np.array(list(gammas), dtype=np.float64), np.array([np.mean(found) for found in gammas.values()])
        )
        if line is not None and len(gammas) > 2:
            laws.append(DepthLaw(name, len(gammas), line.slope, line.intercept, line.r_squared))
    return laws
