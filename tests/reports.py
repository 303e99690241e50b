"""A report with made-up figures, for what renders and reads reports."""

from __future__ import annotations

import numpy as np
import torch

from quantcache.analysis.figures import cache_figures, depth_laws, input_figures
from quantcache.analysis.gathering import InputMoments
from quantcache.analysis.report import Divergence, Grade, HeadBits, Report, SinkToken, Target
from quantcache.analysis.targets import InputTarget
from quantcache.artifact.quality import QualityRate
from quantcache.coding.schema import SIDES
from quantcache.coding.spectral import Moments


def make_report(layers: int = 4, heads: int = 2, dim: int = 16, seed: int = 0) -> Report:
    """A report of every kind of target.

    Args:
        layers: Number of layers.
        heads: Hkv.
        dim: D.
        seed: Seed of the vectors behind the figures.

    Returns:
        The report.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor(np.exp(-0.5 * np.arange(1, dim + 1) ** 0.6))
    targets: list[Target] = []
    for layer in range(layers):
        for name in ("key", "rotated key", "value"):
            moments = Moments(heads, dim)
            moments.add(torch.randn(heads, 100, dim, generator=generator, dtype=torch.float64) * scales + 0.3)
            targets += cache_figures(layer, name, moments)
        for kind, projections in (("qkv", ("q_proj", "k_proj")), ("o", ("o_proj",)), ("down", ("down_proj",))):
            seen = InputMoments(dim, "cpu")
            seen.add(torch.randn(40 if kind == "down" else 100, dim, generator=generator) * scales)
            targets.append(input_figures(InputTarget(layer, kind, kind, projections, dim), seen))
    rates = (2.0, 3.0, 4.0)
    return Report(
        model="some-owner/some-model",
        model_type="llama",
        layers=layers,
        parameters=11_000_000,
        text="text.txt",
        text_sha256="0" * 64,
        tokens=8192,
        seq_len=2048,
        held_out=2048,
        dtype="float32",
        created="2026-01-01T00:00:00+00:00",
        calibration="given",
        versions={"quantcache": "0.1.0", "torch": "2.13.0"},
        notes=("A note with <markup> & more.",),
        targets=tuple(targets),
        depth=tuple(depth_laws(targets)),
        grades=tuple(
            Grade(side, bits, 1.5, 1.5 * share, share)
            for bits, share in zip(rates, (0.61, 0.7, 0.76), strict=True)
            for side in ("all", "key", "value")
        ),
        divergences=tuple(
            Divergence(bits, bits + 0.125, 0.01 * 4.0 ** (2 - bits), 0.012 * 4.0 ** (2 - bits), 0.0003)
            for bits in rates
        ),
        sinks=(SinkToken(0, "<s>", 0.71, 3, 4), SinkToken(812, "\n", 0.12, 1, 1)),
        qualities=(
            QualityRate("near-lossless", 0.001, 3.75, 3.875, 0.00084),
            QualityRate("balanced", 0.005, 2.75, 2.875, 0.0045),
            QualityRate("small", 0.02),
        ),
        widths=tuple(
            HeadBits(layer, side, head, 1.5 * layer + head) for layer in range(3) for side in SIDES for head in range(2)
        ),
    )
