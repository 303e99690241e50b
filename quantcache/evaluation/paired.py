"""Two methods on the same windows or questions, compared in pairs, so that what is hard for both cancels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from quantcache.evaluation import summaries
from quantcache.evaluation.methods import Method

ROUNDING = 1e-9
"""Bits by which two methods at the same rate may differ."""

MIN_DENSE_RATE = 0.2
"""Share of right answers that the dense cache must have: below it, a model cannot do the task with any cache."""


def is_evidence(dense: summaries.Summary | None) -> bool:
    """Whether rates of right answers say anything about a cache.

    Args:
        dense: How often the dense cache is right, as a share or a mean; None if it gave no answer.

    Returns:
        Whether it is right often enough, see :data:`MIN_DENSE_RATE`.
    """
    rate = None if dense is None else dense.get("share", dense.get("mean"))
    return rate is not None and rate >= MIN_DENSE_RATE


def kl_ratio(above: Mapping[str, Any], below: Mapping[str, Any]) -> summaries.Summary | None:
    """Mean KL of one method over another's.

    Args:
        above: Figures of the one, as :meth:`quantcache.evaluation.fidelity.FidelityResult.to_dict` gives them.
        below: Of the other, on the same windows.

    Returns:
        ``ratio`` with its standard error over windows; None where figures by window are missing, not of the same
        windows, or all zero below.
    """
    counts = above.get("window_tokens")
    if not counts or counts != below.get("window_tokens"):
        return None
    sums = [[kl * n for kl, n in zip(each["kl_windows"], counts, strict=True)] for each in (above, below)]
    return summaries.ratio(sums[0], sums[1]) if sum(sums[1]) > 0 else None


def relative_kl(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every rival's mean KL over ours at the same bits: of ours, that with most bits that are not more than its.

    Args:
        results: Figures of methods on the same windows, as JSON holds them.

    Returns:
        By rival ``to`` (the method of ours), ``ratio``, ``stderr`` and ``n``. A rival below all our rates, or with
        another exact tail, is left out.
    """
    good = {name: entry for name, entry in results.items() if entry["status"] == "ok"}
    ours = {name: entry for name, entry in good.items() if entry["family"] == "ours"}
    found = {}
    for name, entry in good.items():
        bits = entry["bits_per_element"]
        enough = [
            (other["bits_per_element"], of)
            for of, other in ours.items()
            if other["bits_per_element"] <= bits + ROUNDING and other.get("exact_tail") == entry.get("exact_tail")
        ]
        if entry["family"] != "rival" or not enough:
            continue
        to = max(enough)[1]
        ratio = kl_ratio(entry, ours[to])
        if ratio is not None:
            found[name] = {"to": to, **ratio}
    return found


def against(
    name: str,
    methods: Sequence[Method],
    right: Mapping[str, Mapping[str, bool]],
    text_of: Callable[[str], Hashable] = str,
) -> dict[str, Any]:
    """How a method did on the questions that it shares with the dense cache, and with ours.

    Args:
        name: The method.
        methods: All methods that were asked.
        right: Whether each was right, by method and question; questions without an answer are left out.
        text_of: What a question is about; by default each is about a text of its own.

    Returns:
        McNemar's test by the other method's name, see :func:`quantcache.evaluation.summaries.mcnemar`; ``only_first``
        is this method.
    """
    found = {}
    for other in methods:
        shared = [question for question in right[name] if question in right[other.name]]
        if other.name != name and other.family in ("dense", "ours") and shared:
            own, theirs = ([right[who][question] for question in shared] for who in (name, other.name))
            found[other.name] = summaries.mcnemar(own, theirs, [text_of(question) for question in shared])
    return found
