"""Tables that the kernels of both GPU back ends read: a side's frame, and levels in half precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.interface import Frame

HALF_TERMS: tuple[tuple[float, ...], ...] = (
    (1.0, 0.0, 0.0, 0.0, 0.0),
    (2.93740992, 0.5444335938, 0.0, 0.0, 0.0),
    (3.098092141, 1.333984375, -6.0234375, 48.5, 0.0),
    (3.365124087, 1.639648438, -7.828125, 70.875, -64.3125),
    (3.933173605, 0.3718261719, 13.8671875, -92.25, 328.5),
    (4.247510198, -0.1961669922, 27.828125, -205.25, 609.5),
    (4.365526149, -0.61328125, 38.75, -292.25, 827.0),
    (4.412767614, -0.8955078125, 45.96875, -352.25, 986.0),
    (4.424798038, -1.026367188, 48.65625, -372.0, 1032.0),
)
"""By width, the union levels of a trellis in half precision: c, a, b, ... of ``c (x + x (a x² + b x⁴ + ...))``. Next to
the coefficients of ``SideConstants.union_terms`` those that, rounded at every step, come nearest to the levels; fitted
by ``benchmarks/trellis_half_terms.py``."""


@dataclass(frozen=True)
class FrameTables:
    """The frame, for kernels that rotate.

    Attributes:
        order: Cached dimension of every framed one, ``[D]`` int32.
        partner: The framed dimension it turns with (itself if it does not turn), ``[D]`` int32.
        sign: What the partner's share is multiplied by on entering the frame, ``[D]`` float32.
        turns: Revolutions per token in units of 2^-64, modulo 1, ``[D]`` int64: the product with a position wraps to
            the exact fraction of a revolution.
    """

    order: Tensor
    partner: Tensor
    sign: Tensor
    turns: Tensor

    def tensors(self) -> list[Tensor]:
        """What the kernels read, in the order of their arguments."""
        return [self.order, self.partner, self.sign, self.turns]


def make_frame(frame: Frame) -> FrameTables:
    """Frame tables of a side.

    Args:
        frame: The frame.

    Returns:
        The tables.
    """
    own = torch.arange(frame.order.shape[0], dtype=torch.int64, device="cpu")
    partner, sign, pair = (
        own.clone(),
        torch.zeros(len(own), dtype=torch.float32, device="cpu"),
        torch.full_like(own, -1),
    )
    if frame.is_identity:
        return FrameTables(own.int(), partner.int(), sign, torch.zeros_like(own))
    for first, count, index in ((0, frame.slow_pairs, 0), (frame.num_slow, frame.fast_pairs, frame.slow_pairs)):
        a, b = own[first : first + count], own[first + count : first + 2 * count]
        partner[a], partner[b], sign[a], sign[b] = b, a, 1.0, -1.0
        pair[a] = pair[b] = torch.arange(index, index + count, dtype=torch.int64, device="cpu")
    units = [round(f / (2 * math.pi) * 2.0**64) % 2**64 for f in frame.frequencies.tolist()]
    units = [u - 2**64 if u >= 2**63 else u for u in units] + [0]
    turns = torch.tensor(units, dtype=torch.int64, device="cpu")[pair]
    return FrameTables(frame.order.cpu().int(), partner.int(), sign, turns)


def power_of_two_above(values: Tensor) -> Tensor:
    """The power of two at or above positive values; 1 for zeros."""
    return torch.where(values > 0, torch.exp2(values.clamp_min(1e-30).log2().ceil()), 1.0)
