"""The benchmark of attention in whole numbers measures what rounding costs."""

from __future__ import annotations

import eight_bits
import pytest
import torch
from eight_bits import PRECISIONS, Precision, largest_level

from quantcache import Calibration, backends, data
from quantcache.cli.loading import load_model
from quantcache.coding.codebook import gaussian_codebook
from quantcache.data import calibrations_path


def test_whole_levels_are_too_coarse_for_a_kernel_from_three_bits_on() -> None:
    """Why none uses integer products: they are further from the codec's levels than twice what bfloat16 is."""
    for width in range(1, 9):
        levels = torch.tensor(gaussian_codebook(width).levels, dtype=torch.float64)
        unit = levels.max() / largest_level(width)
        own, theirs = (float((x - levels).norm()) for x in (levels.bfloat16(), (levels / unit).round() * unit))
        assert (theirs > 2 * own) == (width >= 3), (width, theirs, own)


@pytest.mark.slow
def test_coarser_numbers_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "PRECISIONS", {"coarse": Precision(3, 3), "fine": PRECISIONS["levels alone"]})
    model, tokenizer = load_model("wiki11m", device="cpu", dtype="float32")
    calibration = Calibration.from_pretrained(calibrations_path() / "wiki11m").with_bits(3.0)
    tokens = tokenizer(data.evaluation_text()[:4000], return_tensors="pt").input_ids[0][:200]
    names, few = list(backends.BACKENDS), backends.CODE_QUERIES
    found = eight_bits.measured(model, calibration, tokens, 200)
    assert (names, few) == (list(backends.BACKENDS), backends.CODE_QUERIES)
    assert {name: each["tokens"] for name, each in found.items()} == dict.fromkeys(found, 200 - 68)
    assert found["float32"]["over_float32"] == 1.0
    assert found["coarse"]["kl_mean"] > 2 * found["float32"]["kl_mean"]
    assert found["fine"]["kl_mean"] < (found["coarse"]["kl_mean"] + found["float32"]["kl_mean"]) / 2
