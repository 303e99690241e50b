"""How repeated measurements are described: quantiles, mean with error, share with interval; and two things in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

Summary = dict[str, float | int | None]

Z95 = 1.959963984540054
"""Quantile of the normal distribution that gives a 95 % interval."""


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


def share(successes: int, trials: int) -> Summary:
    """Describe a number of successes.

    Source of the interval: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).

    Args:
        successes: How often it went well.
        trials: How often it was tried, one or more.

    Returns:
        ``share``, ``low`` and ``high`` (95 % Wilson score interval), ``successes`` and ``n``.

    Raises:
        ValueError: ``trials`` is below 1, or ``successes`` not between 0 and ``trials``.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"trials must be at least 1 and successes from 0 to trials, got {successes} of {trials}")
    p, square = successes / trials, Z95 * Z95
    center = (p + square / (2 * trials)) / (1 + square / trials)
    half = Z95 / (1 + square / trials) * math.sqrt(p * (1 - p) / trials + square / (4 * trials * trials))
    return {
        "share": p,
        "low": 0.0 if successes == 0 else center - half,
        "high": 1.0 if successes == trials else center + half,
        "successes": successes,
        "n": trials,
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> Summary:
    """Describe the ratio of two sums whose parts are paired, such as two methods' KL divergences by window.

    What makes a window hard moves both: the error is that of the differences from the ratio, not of each sum by itself.
    Source: W. G. Cochran, "Sampling Techniques" (1977), section 6.3.

    Args:
        above: Parts of the numerator.
        below: Parts of the denominator, in the same order.

    Returns:
        ``ratio``, ``stderr`` (None for a single pair) and ``n``.

    Raises:
        ValueError: There are no parts, not as many of each, or the denominator's do not sum to more than 0.
    """
    if not above or len(above) != len(below):
        raise ValueError(f"a ratio needs as many parts above as below, got {len(above)} and {len(below)}")
    total = math.fsum(below)
    if not total > 0:
        raise ValueError(f"a ratio needs a denominator above 0, got {total}")
    value, count = math.fsum(above) / total, len(above)
    stderr = None
    if count > 1:
        squares = math.fsum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
        stderr = math.sqrt(squares * count / (count - 1)) / total
    return {"ratio": value, "stderr": stderr, "n": count}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Summary:
    """Compare two who were asked the same questions: McNemar's exact test.

    Only questions that one of them got right and the other wrong say anything. If both were equally good each of these
    would be a toss of a coin; the two-sided p-value is how often coins fall at least as unevenly.

    Source: Q. McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages"
    (1947), with the binomial distribution in place of its approximation.

    Args:
        first: Whether one was right, by question.
        second: Whether the other was, in the same order.

    Returns:
        ``only_first`` and ``only_second`` (questions that one alone got right), ``p`` and ``n``.

    Raises:
        ValueError: There are no questions, or not as many of each.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"paired answers must be as many of each, got {len(first)} and {len(second)}")
    pairs = list(zip(first, second, strict=True))
    ours = sum(one and not other for one, other in pairs)
    theirs = sum(other and not one for one, other in pairs)
    count = ours + theirs
    tail = sum(math.comb(count, k) for k in range(min(ours, theirs) + 1))
    return {"only_first": ours, "only_second": theirs, "p": min(1.0, 2 * tail / 2**count), "n": len(pairs)}
