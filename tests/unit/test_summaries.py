"""Quantiles, averages and shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
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
