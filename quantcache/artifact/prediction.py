"""The divergence that a calibration is expected to cause, without running the model."""

from __future__ import annotations

import math
from bisect import bisect
from itertools import pairwise
from typing import Any

from quantcache.artifact.calibration import Calibration
from quantcache.coding.distortion import expected_cost

UNAVAILABLE = "not available: the calibration was made without a sound yardstick; calibrate again"
"""What to say where :func:`predict_kl` gives None."""


def predict_kl(calibration: Calibration) -> float | None:
    """Mean KL divergence between the dense cache and the compressed one, predicted at a calibration's present rate.

    The Fisher rate-distortion model gives the cost Σ ½ λ D(b) of the allocated widths. Short runs through the real
    cache at a few rates, made while calibrating, tie it to divergences: between two of them, and beyond the last, the
    divergence goes with a power of the cost. It holds for contexts as long as the calibration's sequences, with the
    default sinks and residual window, and for text like the calibration's: texts of one kind differ by up to a factor
    of two.

    Args:
        calibration: A calibration.

    Returns:
        Nats per token; None if the calibration was made without these runs (before they existed, without a text, or on
        sequences that are too short), or if one diverged no less at a lower cost.
    """
    points = _points(calibration.metadata.recipe.get("yardstick"))
    if points is None:
        return None
    cost = expected_cost(calibration.layers, calibration.metadata.codec.coding)
    if cost <= 0:
        return 0.0
    place = bisect([known for known, _ in points[1:-1]], cost)
    (low_cost, low_kl), (high_cost, high_kl) = points[place : place + 2]
    power = math.log(high_kl / low_kl) / math.log(high_cost / low_cost)
    try:
        return high_kl * math.exp(power * math.log(cost / high_cost))
    except OverflowError:
        return None  # no divergence grows like that: the points were not measured


def largest_measured(calibration: Calibration) -> float | None:
    """The largest divergence that predictions are tied to: beyond it they fall short, the further the more.

    Args:
        calibration: A calibration, at any rate.

    Returns:
        Nats per token; None where nothing was measured.
    """
    points = _points(calibration.metadata.recipe.get("yardstick"))
    return None if points is None else points[-1][1]


def measured_on_seen_text(calibration: Calibration) -> bool:
    """Whether predictions are tied to text that the calibration was made of, and are too low.

    Args:
        calibration: A calibration, at any rate.

    Returns:
        False also where nothing was measured.
    """
    yardstick: Any = calibration.metadata.recipe.get("yardstick")
    return _points(yardstick) is not None and not yardstick.get("held_out", False)


def predict_kl_at(calibration: Calibration, bits: float) -> float | None:
    """:func:`predict_kl` at another rate.

    Args:
        calibration: A calibration, at any rate.
        bits: Mean code width in bits, 0 to 8.

    Returns:
        Nats per token, or None.

    Raises:
        ValueError: ``bits`` is out of range.
    """
    return predict_kl(calibration.with_rate(calibration.metadata.rate.given(bits=bits)))


def _points(yardstick: Any) -> list[tuple[float, float]] | None:
    """What was measured, (cost, KL) by rising cost; None if a recipe does not hold two points or more, all sound.

    Of sound ones the dearer has the larger divergence: else fewer bits would be predicted to lose less.
    """
    entries = yardstick.get("points") if isinstance(yardstick, dict) else None
    if not isinstance(entries, list):
        return None
    found: list[tuple[float, float]] = []
    for entry in entries:
        cost, kl = (entry.get("cost"), entry.get("kl")) if isinstance(entry, dict) else (None, None)
        if not isinstance(cost, float) or not isinstance(kl, float) or not (0 < cost < math.inf and 0 < kl < math.inf):
            return None
        found.append((cost, kl))
    found.sort()
    rising = all(a < c and b < d for (a, b), (c, d) in pairwise(found))
    return found if rising and len(found) > 1 else None
