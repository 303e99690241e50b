"""Words for a rate: what they choose from a calibration's prediction, and what cannot be chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.prediction import largest_measured, predict_kl, predict_kl_at
from quantcache.artifact.quality import ROUNDING, STEPS, at_quality, check_quality, quality_of, quality_rates
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.distortion import expected_cost
from quantcache.common.defaults import QUALITIES
from quantcache.common.errors import QuantCacheError
from quantcache.common.units import show_bits
from tests.builders import llama_config
from tests.families import FAMILIES, shared_model

words = pytest.mark.support("quality= in place of bits")
refused = pytest.mark.support("quality= beside bits, or without a prediction", refused=True)


def measured(kl: tuple[float, ...], head_dim: int = 64, coding: str = "scalar") -> Calibration:
    """A calibration with a yardstick at 2 and 4 bits, or at 1 bit too."""
    made = Calibration.synthetic(llama_config(head_dim)).with_coding(coding)  # type: ignore[arg-type]
    points = [
        {"bits": bits, "cost": expected_cost(made.with_bits(bits).layers, made.metadata.codec.coding), "kl": value}
        for bits, value in zip((1.0, 2.0, 4.0)[-len(kl) :], kl, strict=True)
    ]
    recipe = {**made.metadata.recipe, "yardstick": {"tokens": 4096, "points": points}}
    return Calibration(made.layers, replace(made.metadata, recipe=recipe))


@words
@pytest.mark.parametrize(
    "calibration",
    [
        measured((0.03, 0.002)),
        measured((0.1, 0.005), head_dim=96),
        measured((0.03, 0.002), coding="trellis").with_bits(5),
        measured((0.1, 0.03, 0.002)),
        Calibration.for_model("wiki11m"),
    ],
    ids=["scalar", "hard", "trellis", "three rates", "bundled"],
)
def test_the_fewest_bits_that_keep_the_limit(calibration: Calibration) -> None:
    """Each word gets the least quarter of a bit within its limit, but none below the rates that were measured."""
    rates = quality_rates(calibration)
    assert [rate.quality for rate in rates] == list(QUALITIES)
    bits = [rate.bits for rate in rates]
    assert None not in bits
    assert bits == sorted(bits, reverse=True)
    top = largest_measured(calibration)
    assert top is not None
    for rate in rates:
        assert rate.bits * STEPS == int(rate.bits * STEPS)
        assert rate.predicted_kl == predict_kl_at(calibration, rate.bits) <= rate.max_kl
        assert predict_kl_at(calibration, rate.bits - 1 / STEPS) > min(rate.max_kl, top * (1 + ROUNDING))
    chosen, rate = at_quality(calibration, "balanced"), rates[1]
    assert (chosen.metadata.rate.bits, predict_kl(chosen)) == (rate.bits, rate.predicted_kl)
    assert chosen.bits_per_element == rate.bits_per_element


@words
def test_no_word_trusts_a_prediction_below_the_measured_rates() -> None:
    """A model that loses little at 2 bits is not taken to 1 bit, where no run has tied the prediction to anything."""
    calibration = measured((0.0005, 0.00002))
    assert predict_kl_at(calibration, 1.0) < QUALITIES["small"]
    assert [rate.bits for rate in quality_rates(calibration)] == [2.0, 2.0, 2.0]
    assert at_quality(calibration, "small", min_bits=3).metadata.rate.bits == 3.0
    lower = measured((0.01, 0.0005, 0.00002))
    assert [rate.bits for rate in quality_rates(lower)][::2] == [2.0, 1.0]
    assert 1.0 < at_quality(lower, "balanced").metadata.rate.bits < 2.0


@words
def test_one_side_with_bits_of_its_own() -> None:
    """The word decides the other side's: fewer bits are left to save where keys cost nothing, more where they cost."""
    calibration = measured((0.03, 0.002))
    both, alone, beside = (at_quality(calibration, "near-lossless", key_bits=keys) for keys in ("joint", "dense", 5.0))
    for chosen in (both, alone, beside):
        assert predict_kl(chosen) <= QUALITIES["near-lossless"]
    assert alone.layers[0].key.widths is None
    assert beside.layers[0].key.widths.double().mean() == pytest.approx(5, abs=0.1)
    step = calibration.with_bits(alone.metadata.rate.bits - 1 / STEPS, key_bits="dense")
    assert predict_kl(step) > QUALITIES["near-lossless"]
    with pytest.raises(ValueError, match=r"quality='small' leaves nothing .* key_bits=3.0 and value_bits='dense'"):
        at_quality(calibration, "small", key_bits=3.0, value_bits="dense")
    kept = calibration.with_bits(key_bits="dense")
    assert at_quality(kept, "near-lossless").metadata.rate == alone.metadata.rate
    assert quality_rates(kept)[0].bits == alone.metadata.rate.bits
    both = kept.with_bits(value_bits=3.0)
    assert [rate.bits for rate in quality_rates(both)] == [None] * len(QUALITIES)
    with pytest.raises(ValueError, match=r"quality='small' leaves nothing .* key_bits='dense' and value_bits=3.0"):
        SpectralCache(both, quality="small")


@refused
def test_what_cannot_be_chosen() -> None:
    calibration = measured((0.03, 0.002))
    with pytest.raises(ValueError, match="quality must be near-lossless, balanced or small, got 'tiny'"):
        SpectralCache(calibration, quality="tiny")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give either quality or bits, got quality='balanced' and bits=0"):
        SpectralCache(calibration, quality="balanced", bits=0)
    with pytest.raises(
        QuantCacheError, match=r"quality='balanced' needs a prediction, .*calibrate again, or give bits"
    ):
        SpectralCache(Calibration.synthetic(llama_config()), quality="balanced")
    with pytest.raises(QuantCacheError, match=r"quality='small' allows a mean KL of 0\.02 .* predicts .* at 8 bits"):
        SpectralCache(measured((90.0, 80.0)), quality="small")
    with pytest.raises(ValueError, match="quality needs a calibration"):
        SpectralCache.self_calibrating(shared_model(FAMILIES[0]), quality="balanced")
    check_quality(None, 3.0)
    check_quality("small")


@words
def test_caches_have_the_bits_of_the_word(tmp_path) -> None:
    calibration = measured((0.03, 0.002))
    calibration.save_pretrained(tmp_path)
    cache = SpectralCache.from_pretrained(tmp_path, quality="near-lossless")
    assert cache.calibration.metadata.rate == at_quality(calibration, "near-lossless").metadata.rate


def test_nothing_predicted_nothing_chosen() -> None:
    for calibration in (Calibration.synthetic(llama_config()), measured((90.0, 80.0))):
        for rate in quality_rates(calibration):
            assert (rate.bits, rate.bits_per_element, rate.predicted_kl) == (None, None, None)
            assert rate.max_kl == QUALITIES[rate.quality]


def test_words_of_a_divergence() -> None:
    found = [quality_of(kl) for kl in (None, 0.0, 0.001, 0.00101, 0.005, 0.02, 0.021)]
    assert found == [None, "near-lossless", "near-lossless", "balanced", "balanced", "small", None]


@pytest.mark.slow
def test_the_documentation_says_what_the_words_choose() -> None:
    """The page's table is that of the calibrations that ship."""
    root = Path(__file__).resolve().parents[2]
    lines = (root / "docs" / "using-a-cache.md").read_text(encoding="utf-8").splitlines()
    shipped = [Calibration.for_model(name) for name in ("wiki11m", "smollm2-135m", "qwen2.5-coder-1.5b")]
    for own in zip(*map(quality_rates, shipped), strict=True):
        cells = [f"{show_bits(rate.bits)}, {rate.predicted_kl:.2g} predicted" for rate in own]
        assert f"| {' | '.join([f'`{own[0].quality}`', f'{own[0].max_kl:g}', *cells])} |" in lines
