"""Shared passages, and the check that calibration and evaluation text do not overlap."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantcache import data
from quantcache.artifact.calibration import Calibration
from quantcache.calibration.passages import DIGITS, SKETCH_SIZE, WINDOW, shared, sketch
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.provenance import check_overlap, text_sha256
from tests.builders import llama_config


def calibration_on(text: str, **recipe: object) -> Calibration:
    plain = Calibration.synthetic(llama_config())
    recipe = {"text_sha256": [text_sha256(text)], "passages": sketch(text), **recipe}
    return Calibration(plain.layers, replace(plain.metadata, recipe=recipe))


def test_a_sketch_finds_its_text_wherever_it_stands() -> None:
    text = data.calibration_text()[:20_000]
    known = sketch(text)
    assert len(known) == SKETCH_SIZE * DIGITS
    assert shared(known, "Something else.\n\n" + text.upper().replace(" ", "  ")) == (SKETCH_SIZE, SKETCH_SIZE)
    assert shared(known, data.evaluation_text()[:20_000]) == (0, SKETCH_SIZE)
    found, size = shared(known, text[5_000:10_000])
    assert 0.15 < found / size < 0.35  # a quarter of the passages, sampled


def test_short_texts_have_no_passages() -> None:
    assert sketch("x" * (WINDOW - 1)) == ""
    assert len(sketch("x" * WINDOW)) == DIGITS
    assert shared("", "anything") == (0, 0)


@pytest.mark.parametrize("known", ["zz", "abc", 3, None])
def test_a_malformed_sketch_is_refused(known: object) -> None:
    with pytest.raises(QuantCacheError, match="hexadecimal digits"):
        shared(known, "text")  # type: ignore[arg-type]


def test_texts_that_overlap_are_refused() -> None:
    text, other = data.calibration_text()[:30_000], data.evaluation_text()[:30_000]
    calibration = calibration_on(text)
    assert check_overlap(calibration, other, "other.txt") == {"text": "differs", "passages": 0.0}
    with pytest.raises(QuantCacheError, match=r"same\.txt is the text that was calibrated on"):
        check_overlap(calibration, text, "same.txt")
    with pytest.raises(QuantCacheError, match=r"mixed\.txt holds \d+ of 512 sampled passages"):
        check_overlap(calibration, other + text[:3000], "mixed.txt")
    # What is not used of a text does not matter.
    assert check_overlap(calibration, other + text[:3000], "mixed.txt", used=other)["passages"] == 0.0


def test_calibrations_without_passages_are_compared_by_hash() -> None:
    text = data.calibration_text()[:3000]
    calibration = calibration_on(text, passages="")
    assert check_overlap(calibration, text[:2000], "part.txt") == {"text": "differs", "passages": None}
    with pytest.raises(QuantCacheError, match="was calibrated on"):
        check_overlap(calibration, text, "same.txt")
    bare = Calibration.synthetic(llama_config())
    assert check_overlap(bare, text, "any.txt") == {"text": "not recorded", "passages": None}
