"""Quantiles, averages, shares, and comparisons of what is paired."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from quantcache.evaluation import summaries


def test_quantiles_are_numpys() -> None:
    samples = list(np.random.default_rng(0).exponential(size=37))
    found = summaries.quantiles(samples)
    for name, share in (("p20", 0.2), ("median", 0.5), ("p80", 0.8)):
        assert found[name] == pytest.approx(np.quantile(samples, share))
    assert (found["n"], found["mean"]) == (37, pytest.approx(np.mean(samples)))


def test_mean_has_its_standard_error() -> None:
    samples = [1.0, 4.0, 4.0, 7.0]
    found = summaries.mean(samples)
    assert found == {"mean": 4.0, "stderr": pytest.approx(float(stats.sem(samples))), "n": 4}
    assert summaries.mean([3.0]) == {"mean": 3.0, "stderr": None, "n": 1}


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 7), (3, 3), (5, 18), (17, 18)])
def test_share_has_scipys_wilson_interval(successes: int, trials: int) -> None:
    found = summaries.share(successes, trials)
    wanted = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert found["low"] == pytest.approx(wanted.low, abs=1e-12)
    assert found["high"] == pytest.approx(wanted.high, abs=1e-12)
    assert found["low"] <= found["share"] <= found["high"]


def test_what_cannot_be_summarized_is_refused() -> None:
    for function in (summaries.quantiles, summaries.mean):
        with pytest.raises(ValueError, match="no samples"):
            function([])
    for successes, trials in ((0, 0), (2, 1), (-1, 3)):
        with pytest.raises(ValueError, match="trials must be at least 1"):
            summaries.share(successes, trials)
    assert math.isfinite(float(summaries.share(1, 1)["low"] or 0))


# ---------------------------------------------------------------------- pairs

windows = st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 10)), min_size=1, max_size=30)


@given(windows, st.floats(0.1, 10))
@settings(deadline=None)
def test_a_ratio_of_sums(pairs: list[tuple[float, float]], factor: float) -> None:
    above, below = ([pair[side] for pair in pairs] for side in (0, 1))
    found = summaries.ratio(above, below)
    assert found["ratio"] == pytest.approx(np.mean(above) / np.mean(below), rel=1e-9, abs=1e-12)
    assert found["n"] == len(pairs)
    assert (found["stderr"] is None) == (len(pairs) == 1)
    # What is proportional window by window has no error, however far the windows lie apart.
    exact = summaries.ratio([factor * b for b in below], below)
    assert exact["ratio"] == pytest.approx(factor, rel=1e-9)
    assert (exact["stderr"] or 0) < 1e-9 * factor
    # Neither does the scale of both matter.
    scaled = summaries.ratio([factor * a for a in above], [factor * b for b in below])
    assert scaled["ratio"] == pytest.approx(found["ratio"], rel=1e-9, abs=1e-12)
    if len(pairs) > 1:
        assert scaled["stderr"] == pytest.approx(found["stderr"], rel=1e-6, abs=1e-9)


def test_a_ratios_error_is_the_bootstraps() -> None:
    random = np.random.default_rng(1)
    hard = random.gamma(4, size=300)
    above, below = hard * random.gamma(20, 0.1, size=300), hard * random.gamma(20, 0.05, size=300)
    found = summaries.ratio(list(above), list(below))
    again = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        rng=np.random.default_rng(2),
    )
    # The bootstrap divides by n, and 4,000 samples give its error to 1/√8000.
    assert found["stderr"] == pytest.approx(again.standard_error, rel=0.05)
    # Sums that are not paired would be told apart far worse.
    alone = float(found["ratio"] or 0) * np.hypot(stats.sem(above) / above.mean(), stats.sem(below) / below.mean())
    assert float(found["stderr"] or 0) < alone / 2


@pytest.mark.parametrize(("texts", "alike"), [(4, 0.3), (6, 0.1), (12, 0.3)])
def test_intervals_of_questions_about_few_texts_hold_what_they_say(texts: int, alike: float) -> None:
    """Questions about one text are right or wrong together: intervals for independent ones miss far too often."""
    random, share, each, runs = np.random.default_rng(texts), 0.7, 8, 1500
    rates = random.beta(share * (1 - alike) / alike, (1 - share) * (1 - alike) / alike, size=(runs, texts, 1))
    hits = random.random((runs, texts, each)) < rates
    found = [summaries.clustered_share(run.tolist()) for run in hits]
    holds = np.mean([float(f["low"] or 0) <= share <= float(f["high"] or 0) for f in found])
    plain = [summaries.share(int(run.sum()), run.size) for run in hits]
    assert np.mean([float(f["low"] or 0) <= share <= float(f["high"] or 0) for f in plain]) < 0.88
    assert 0.925 < holds < 0.985
    assert [(f["successes"], f["n"], f["share"]) for f in found] == [
        (p["successes"], p["n"], p["share"]) for p in plain
    ]


@given(st.lists(st.lists(st.booleans(), max_size=8), min_size=1, max_size=8).filter(any))
def test_clusters_never_say_more_than_trials_by_themselves(clusters: list[list[bool]]) -> None:
    trials = [hit for cluster in clusters for hit in cluster]
    found, plain = summaries.clustered_share(clusters), summaries.share(sum(trials), len(trials))
    assert 0 <= float(found["low"] or 0) <= float(plain["low"] or 0) + 1e-12
    assert 1 >= float(found["high"] or 0) >= float(plain["high"] or 0) - 1e-12
    assert summaries.clustered_share([trials]) == summaries.clustered_share([[hit] for hit in trials]) == plain
    scores = [[float(hit) for hit in cluster] for cluster in clusters]
    assert summaries.clustered_mean(scores)["mean"] == pytest.approx(found["share"])


def test_errors_of_clustered_means_are_over_clusters() -> None:
    clusters = [[0.2] * 5, [0.4] * 5, [0.9] * 5]
    found, own = summaries.clustered_mean(clusters), summaries.mean([0.2, 0.4, 0.9])
    assert (found["mean"], found["stderr"], found["n"]) == (pytest.approx(0.5), pytest.approx(own["stderr"]), 15)
    singles = [[0.2], [], [0.4], [0.9]]
    assert summaries.clustered_mean(singles)["stderr"] == pytest.approx(own["stderr"])
    assert summaries.clustered_mean([[0.2, 0.4, 0.9]]) == own
    for describe in (summaries.clustered_mean, summaries.clustered_share):
        with pytest.raises(ValueError, match=r"samples|trials"):
            describe([[]])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
@settings(deadline=None)
def test_mcnemar_is_scipys_binomial_test(pairs: list[tuple[bool, bool]]) -> None:
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    found = summaries.mcnemar(first, second)
    ours, theirs = pairs.count((True, False)), pairs.count((False, True))
    assert (found["only_first"], found["only_second"], found["n"]) == (ours, theirs, len(pairs))
    wanted = stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
    assert found["p"] == pytest.approx(wanted, rel=1e-9)
    assert summaries.mcnemar(second, first)["p"] == found["p"]


@given(st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5), min_size=2, max_size=9))
@settings(deadline=None)
def test_questions_about_one_text_share_their_coin(clusters: list[list[tuple[bool, bool]]]) -> None:
    """scipy's permutation test of paired samples, one for each text."""
    first, second = ([pair[side] for pairs in clusters for pair in pairs] for side in (0, 1))
    texts = [text for text, pairs in enumerate(clusters) for _ in pairs]
    found = summaries.mcnemar(first, second, texts)
    ahead = [sum(one - other for one, other in pairs) for pairs in clusters]
    wanted = stats.permutation_test(
        (ahead,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert found["p"] == pytest.approx(min(1.0, wanted.pvalue), rel=1e-9)
    assert (found["n"], found["texts"]) == (len(first), len(clusters))
    order = random.Random(0).sample(range(len(first)), len(first))
    assert summaries.mcnemar(*([each[i] for i in order] for each in (first, second, texts))) == found
    assert summaries.mcnemar(second, first, texts)["p"] == found["p"]


def test_four_texts_prove_nothing() -> None:
    """Thirty-two questions of their own do."""
    right, wrong, texts = [True] * 32, [False] * 32, [number // 8 for number in range(32)]
    assert summaries.mcnemar(right, wrong, texts)["p"] == 2 * 0.5**4
    assert summaries.mcnemar(right, wrong)["p"] == 2 * 0.5**32


def test_mcnemar_of_many_questions_is_exact() -> None:
    found = summaries.mcnemar([True] * 700 + [False] * 1300, [False] * 700 + [True] * 1300)
    assert found["p"] == pytest.approx(stats.binomtest(700, 2000).pvalue, rel=1e-9)
    assert 0 < float(found["p"] or 0) < 1e-30


def test_what_is_not_paired_is_refused() -> None:
    for above, below in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match=f"as many parts above as below, got {len(above)} and {len(below)}"):
            summaries.ratio(above, below)
    for below in ([0.0, 0.0], [1.0, -1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="a denominator above 0, got"):
            summaries.ratio([1.0, 1.0], below)
    for first, second in (([], []), ([True], [])):
        with pytest.raises(ValueError, match=f"as many of each, got {len(first)} and {len(second)}"):
            summaries.mcnemar(first, second)
