"""The fast dimensions of keys, laid out for src/fast.h.

Shapes: H heads, F fast dimensions, the first halves of all pairs before the second ones. A step is eight pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache_kernels.interface import ANCHOR_LENGTH


def lay_out_fast(decoder: Tensor, mean: Tensor, frequencies: Tensor) -> list[Tensor]:
    """Constants of the fast dimensions in the order in which lanes take them.

    Args:
        decoder: ``[H, F, tiles, 16]``.
        mean: ``[H, F]``, in the same unit.
        frequencies: Of every pair, radians per token, ``[F / 2]``.

    Returns:
        The decoder ``[H, tiles, 2 halves, F / 8, 8, 4, 2]``, means turned by every offset from the anchor
        ``[H, F / 16, 128, 4, 2, 2, 2]``, and cosines and sines likewise, without H; all float16.
    """
    heads, fast, tiles, _ = decoder.shape
    # The pairs of a step are 16 columns, first halves before second ones; lane 4 g + j holds column g of slots 2 j and
    # 2 j + 1 of either half.
    columns = decoder.unflatten(1, (2, -1, 8)).transpose(1, 2).reshape(heads, fast // 8, 8, tiles, 2, 4, 2)
    fragments = columns.permute(0, 3, 4, 1, 2, 5, 6).half()
    first, second = mean.double().unflatten(1, (2, 1, -1)).unbind(1)  # [H, 1, pairs]
    angles = torch.arange(ANCHOR_LENGTH, dtype=torch.float64, device="cpu")[:, None] * frequencies
    cosines, sines = angles.cos(), angles.sin()
    turned = _by_lanes(first * cosines - second * sines, second * cosines + first * sines)
    return [fragments, turned, _by_lanes(cosines, sines)]


def _by_lanes(first: Tensor, second: Tensor) -> Tensor:
    """Halves of pairs ``[..., offsets, pairs]`` as lanes take them, ``[..., steps, offsets, 4, 2, 2, 2]`` float16.

    A lane has two pairs of a step: their first halves at an offset and at the next one, whatever parity the offset has,
    then their second halves. Even offsets come before odd ones.
    """
    halves = torch.stack((first, second), dim=-1).unflatten(-2, (-1, 4, 2)).transpose(-5, -4)
    halves = halves.transpose(-1, -2)  # [..., steps, offsets, 4, first or second, pair]
    turned = torch.stack((halves, halves.roll(-1, -4)), dim=-2).half()
    return turned.unflatten(-5, (-1, 2)).transpose(-6, -5).flatten(-6, -5)
