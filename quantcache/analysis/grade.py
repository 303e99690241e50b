"""The grade: what share of the theoretical gain the codec realises on real vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.analysis.report import Grade
from quantcache.analysis.spectrum import Floats, water_filling
from quantcache.artifact.calibration import Calibration
from quantcache.attention.probe import RecordingCache, run
from quantcache.coding.codebook import gaussian_codebook
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK, MAX_WIDTH
from quantcache.coding.rope import Rope, anchor_of
from quantcache.coding.schema import SIDES, Rate
from quantcache.common.defaults import SINK_LENGTH

SAMPLE_BLOCKS = 8
"""Blocks of a sequence that are encoded, spread over it."""

Samples = dict[tuple[int, str], Tensor]
"""Blocks of keys or values ``[1, H, n * 64, D]`` by layer and side."""


def collect_samples(model: PreTrainedModel, sequence: Tensor, layers: Sequence[int]) -> tuple[Samples, Tensor]:
    """Keys and values of some blocks of one sequence.

    Args:
        model: The model.
        sequence: Token ids, ``[1, T]``, T at least a block and the sinks.
        layers: Layers wanted.

    Returns:
        The blocks, and their places ``[n, 3]``.
    """
    available = (sequence.shape[1] - SINK_LENGTH) // BLOCK
    chosen = (
        torch.linspace(0, available - 1, min(SAMPLE_BLOCKS, available), dtype=torch.float32, device="cpu")
        .long()
        .unique()
    )
    first = SINK_LENGTH + chosen * BLOCK
    slots = (first[:, None] + torch.arange(BLOCK, dtype=torch.int64, device="cpu")).flatten()
    samples: Samples = {}

    def record(index: int, keys: Tensor, values: Tensor) -> None:
        if index in layers:
            for side, x in zip(SIDES, (keys, values), strict=True):
                samples[index, side] = x.detach()[:1, :, slots.to(x.device)].cpu()

    with torch.no_grad():
        run(model, sequence, RecordingCache(model.config, record))
    block_table = torch.stack((first, torch.full_like(first, BLOCK), anchor_of(first, SINK_LENGTH)), dim=1)
    return samples, block_table.to(torch.int32)


def grade(
    calibration: Calibration,
    samples: Samples,
    block_table: Tensor,
    bits: Sequence[float],
    on_progress: Callable[[], None] = lambda: None,
) -> list[Grade]:
    """Encode samples and compare their error with what coding theory allows.

    The yardsticks are, in bits per coefficient at the same rate with gains counted: codebooks of one width for every
    coefficient (0 %), and the Shannon bound of Gaussians with the samples' variances (100 %). Half of log2 of a ratio
    of errors is a difference in bits. The error is weighted as the calibration weighs it.

    Args:
        calibration: The calibration, at any rate.
        samples: Real keys and values.
        block_table: Where their blocks lie, ``[n, 3]``.
        bits: Mean code widths to grade.
        on_progress: Called after every side of every layer and rate.

    Returns:
        Grades of all, keys and values at every rate.
    """
    grades = []
    for rate in bits:
        at_rate = calibration.with_rate(Rate(rate))
        found: dict[str, list[tuple[Floats, float, float]]] = {side: [] for side in SIDES}
        for (index, side), x in samples.items():
            layer = at_rate.layers[index]
            codec = SpectralCodec(layer.side(side), layer.rope if side == "key" else Rope(), calibration.metadata.codec)
            found[side].append((*_errors(codec, layer.side(side).spectrum, x, block_table), codec.bits))
            on_progress()
        pools = {"all": found["key"] + found["value"], **found}
        grades += [_grade(name, rate, parts, calibration.metadata.joint) for name, parts in pools.items()]
    return grades


def _errors(codec: SpectralCodec, spectrum: Tensor, x: Tensor, block_table: Tensor) -> tuple[Floats, float]:
    """The samples' variances, one for each coefficient, and the summed mean squared error of their codes."""
    energy, error = (torch.zeros(spectrum.shape, dtype=torch.float64, device="cpu") for _ in range(2))
    for block, place in zip(x.split(BLOCK, dim=2), block_table.split(1), strict=True):
        exact = codec.coefficients(block.contiguous(), place, None)
        codes, gains = codec.encode_block(block.contiguous(), place, None)
        decoded = codec.dequantize({"codes": codes[None], "gains": gains[None]})[0]
        energy += exact.double().pow(2).mean((0, -1))
        error += (exact - decoded).double().pow(2).mean((0, -1))
    scale = spectrum / len(block_table)
    return (energy * scale).flatten().numpy(), float((error * scale).sum())


def _grade(name: str, rate: float, parts: list[tuple[Floats, float, float]], joint: bool) -> Grade:
    """One grade: over one common budget, or the mean of budgets that have no unit in common."""
    pools = [parts] if joint else [[part] for part in parts]
    possible, realised = [], []
    for pool in pools:
        variances = np.concatenate([part[0] for part in pool])
        error = sum(part[1] for part in pool)
        total = sum(part[0].size * part[2] for part in pool) / variances.size
        flat = float(variances.sum()) * flat_distortion(total)
        possible.append(0.5 * math.log2(flat / water_filling(variances, total)))
        realised.append(0.5 * math.log2(flat / error))
    gain, best = float(np.mean(realised)), float(np.mean(possible))
    return Grade(name, rate, best, gain, gain / best)


def flat_distortion(bits: float) -> float:
    """Mean squared error of a unit Gaussian under one codebook for all, between whole widths as a mixture of both.

    Args:
        bits: Mean width, 0 to 8.

    Returns:
        The error.
    """
    low = min(int(bits), MAX_WIDTH - 1)
    below, above = (gaussian_codebook(width).distortion for width in (low, low + 1))
    return below + (bits - low) * (above - below)
