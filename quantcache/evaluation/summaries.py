"""How repeated measurements are described: quantiles, mean with error, share with interval; and two things in pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import stdtrit

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
    p20, median, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "mean": sum(samples) / len(samples), "n": len(samples)}


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
    low, high = _wilson(successes / trials, trials)
    return {"share": successes / trials, "low": low, "high": high, "successes": successes, "n": trials}


def _wilson(p: float, trials: float) -> tuple[float, float]:
    """The score interval of a share."""
    square = Z95 * Z95
    center = (p + square / (2 * trials)) / (1 + square / trials)
    half = Z95 / (1 + square / trials) * math.sqrt(p * (1 - p) / trials + square / (4 * trials * trials))
    return 0.0 if p == 0 else center - half, 1.0 if p == 1 else center + half


def clustered_share(clusters: Sequence[Sequence[bool]]) -> Summary:
    """Describe a number of successes of trials that come in clusters, such as questions about one text.

    Trials of a cluster are alike, so that they say less than as many by themselves. The interval is that of
    :func:`share` for so many independent trials as say as much: p (1 - p) over the variance between clusters, times the
    square of the normal quantile over Student's, and at most all. One cluster, or clusters of which all are right or
    none, tell nothing of how alike trials are; there every trial counts, as it does where each is a cluster of its own.

    Source: E. L. Korn and B. I. Graubard, "Confidence Intervals for Proportions with Small Expected Number of Positive
    Counts Estimated from Survey Data" (1998), with Wilson's interval in place of the exact one.

    Args:
        clusters: Whether each trial went well, cluster by cluster; empty ones say nothing.

    Returns:
        As :func:`share`.

    Raises:
        ValueError: There are no trials.
    """
    known = [list(cluster) for cluster in clusters if cluster]
    successes, trials = sum(map(sum, known)), sum(map(len, known))
    whole, p = share(successes, trials), successes / max(trials, 1)
    stderr = ratio([sum(cluster) for cluster in known], [len(cluster) for cluster in known])["stderr"]
    if not stderr or len(known) == trials:
        return whole
    worth = p * (1 - p) / stderr**2 * (Z95 / float(stdtrit(len(known) - 1, 0.975))) ** 2
    low, high = _wilson(p, min(trials, worth))
    return {**whole, "low": low, "high": high}


def clustered_mean(clusters: Sequence[Sequence[float]]) -> Summary:
    """Describe an average of what comes in clusters, such as scores of questions about one text.

    Args:
        clusters: The measurements, cluster by cluster; empty ones say nothing.

    Returns:
        As :func:`mean`; ``stderr`` is over clusters, or over measurements where there is only one of them.

    Raises:
        ValueError: There are no measurements.
    """
    known = [list(cluster) for cluster in clusters if cluster]
    whole = mean([value for cluster in known for value in cluster])
    if len(known) < 2:
        return whole
    sums = ratio([math.fsum(cluster) for cluster in known], [len(cluster) for cluster in known])
    return {**whole, "stderr": sums["stderr"]}


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


def mcnemar(first: Sequence[bool], second: Sequence[bool], texts: Sequence[Hashable] | None = None) -> Summary:
    """Compare two who were asked the same questions: McNemar's exact test, text by text.

    If both were equally good, who of them got which answers right about a text would be a toss of a coin: the
    two-sided p-value is how often coins would put the two as far apart as they are. Questions about one text share
    their coin, since what makes one of them right may make all of them right.

    Source: Q. McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages"
    (1947), with the exact distribution in place of its approximation; over texts it is R. A. Fisher's test of paired
    differences, "The Design of Experiments" (1935), section 21.

    Args:
        first: Whether one was right, by question.
        second: Whether the other was, in the same order.
        texts: What each question is about; each has a text of its own if None.

    Returns:
        ``only_first`` and ``only_second`` (questions that one alone got right), ``p``, ``n`` and ``texts``, how many
        there are of them.

    Raises:
        ValueError: There are no questions, or not as many of each.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"paired answers must be as many of each, got {len(first)} and {len(second)}")
    ahead: Counter[Hashable] = Counter()  # by text, how many more of its questions the first got right
    about = range(len(first)) if texts is None else texts
    for text, one, other in zip(about, first, second, strict=True):
        ahead[text] += one - other
    ways: Counter[int] = Counter({0: 1})  # by sum, how many throws of the coins give it
    for difference, coins in Counter(abs(each) for each in ahead.values() if each).items():
        thrown: Counter[int] = Counter()
        for heads in range(coins + 1):
            throws, gained = math.comb(coins, heads), difference * (2 * heads - coins)
            for total, count in ways.items():
                thrown[total + gained] += count * throws
        ways = thrown
    apart = abs(sum(ahead.values()))
    extreme = sum(count for total, count in ways.items() if abs(total) >= apart)
    pairs = Counter(zip(first, second, strict=True))
    return {
        "only_first": pairs[True, False],
        "only_second": pairs[False, True],
        "p": extreme / ways.total(),
        "n": len(first),
        "texts": len(ahead),
    }
