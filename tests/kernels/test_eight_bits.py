"""The benchmark of the CUDA kernel's whole numbers rounds as the kernel does, and measures what rounding costs."""

from __future__ import annotations

import ctypes
import math

import eight_bits
import pytest
import torch
from eight_bits import PRECISIONS, Precision, whole_scores, whole_weights
from torch import Tensor

from quantcache import Calibration, backends, data
from quantcache.cli.loading import load_model
from quantcache.data import calibrations_path
from quantcache_kernels.cuda import layout as layouts
from tests.kernels import test_cuda
from tests.kernels.test_cuda import LEVELS, Case, Inputs, emulator, run

__all__ = ["emulator"]


def in_whole_numbers(inputs: Inputs, precision: Precision) -> Tensor:
    """Attention by the benchmark's arithmetic in float64, ``[B, H, G, D]``."""
    units = [
        layouts.steps(LEVELS)[torch.tensor(widths).repeat_interleave(16, dim=1)].unsqueeze(-1)  # [H, D, 1]
        for widths in (inputs.layout.key_widths, inputs.layout.value_widths)
    ]
    gains = [gain.double().unflatten(2, (-1, 128)) for gain in inputs.gains]
    levels = [
        (x.unflatten(2, (-1, 128)) / gain[..., None] / unit.mT.unsqueeze(-2).clamp_min(1e-30)).round()
        for x, gain, unit in zip(inputs.layout.unpack(inputs.rows, LEVELS, torch.float64), gains, units, strict=True)
    ]  # [B, H, N, 128, D]
    peaks, totals, sums = [], [], []
    for anchor, (queries, offsets) in enumerate(zip(inputs.queries.double(), inputs.offsets.double(), strict=True)):
        own = [gain[:, :, anchor].unsqueeze(-2) for gain in gains]
        scores = whole_scores(queries * units[0].mT, levels[0][:, :, anchor].mT, own[0], precision.queries)
        scores[..., max(0, inputs.case.tokens - 128 * anchor) :] = float("-inf")
        scores = scores * math.log(2)
        weights, scaled = whole_weights(scores, own[1], precision.weights)
        peaks.append(scores.amax(-1) + offsets * math.log(2))
        totals.append(weights.sum(-1))
        sums.append(scaled @ levels[1][:, :, anchor])
    factors = torch.exp(torch.stack(peaks) - torch.stack(peaks).amax(0))
    total = (factors * torch.stack(totals)).sum(0).unsqueeze(-1)
    vectors = (factors.unsqueeze(-1) * torch.stack(sums)).sum(0) / total
    return (vectors * units[1].mT) @ inputs.decoder.double() + inputs.mean.double().unsqueeze(1)


@test_cuda.pytestmark  # it needs a C++ compiler
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("group", [1, 4])
def test_the_kernel_rounds_like_the_benchmark(group: int, precise: bool, emulator: ctypes.CDLL) -> None:
    inputs = Inputs(Case(group=group, precise=precise, batch=1))
    call = inputs.plan()
    run(emulator, call)
    truth, _ = inputs.attention(torch.float64)
    rounded = in_whole_numbers(inputs, PRECISIONS["twice 8 bits" if precise else "8 bits"])
    theirs, ours = (float((x.double() - truth).norm()) for x in (call.out, rounded))
    apart = float((call.out.double() - rounded).norm())
    assert 0 < ours < 1.1 * theirs
    assert apart < theirs / 2, "the same errors, not errors of the same size"


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
