"""How repeated measurements of one thing are described: quantiles, mean with standard error, share with interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

Summary = dict[str, float | int | None]


def quantiles(samples: Sequence[float]) -> Summary:
    """Describe a skewed quantity, such as a time.

    Args:
        samples: The measurements, one or more.

    Returns:
        ``median``, ``p20``, ``p80``, ``mean`` and ``n``; quantiles are interpolated between neighbours.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("no samples to summarize")
    ordered = sorted(samples)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {
        "median": quantile(0.5),
        "p20": quantile(0.2),
        "p80": quantile(0.8),
        "mean": sum(ordered) / len(ordered),
        "n": len(ordered),
    }


def mean(samples: Sequence[float]) -> Summary:
    """Describe an average.

    Args:
        samples: The measurements, one or more.

    Returns:
        ``mean``, ``stderr`` (sample standard deviation over √n; None for a single sample) and ``n``.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("no samples to summarize")
    count = len(samples)
    center = math.fsum(samples) / count
    stderr = None
    if count > 1:
        stderr = math.sqrt(math.fsum((x - center) ** 2 for x in samples) / (count - 1) / count)
    return {"mean": center, "stderr": stderr, "n": count}


def share(successes: int, trials: int, z: float = 1.959963984540054) -> Summary:
    """Describe a number of successes.

    Source of the interval: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).

    Args:
        successes: How often it went well.
        trials: How often it was tried, one or more.
        z: Quantile of the normal distribution; 1.96 gives a 95 % interval.

    Returns:
        ``share``, ``low`` and ``high`` (Wilson score interval), ``successes`` and ``n``.

    Raises:
        ValueError: ``trials`` is below 1, or ``successes`` not between 0 and ``trials``.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"trials must be at least 1 and successes from 0 to trials, got {successes} of {trials}")
    p, square = successes / trials, z * z
    center = (p + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(p * (1 - p) / trials + square / (4 * trials * trials))
    return {
        "share": p,
        "low": 0.0 if successes == 0 else center - half,
        "high": 1.0 if successes == trials else center + half,
        "successes": successes,
        "n": trials,
    }
