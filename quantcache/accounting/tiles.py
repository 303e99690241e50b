"""What codes take in the layout of the CUDA kernels: tiles of coefficients, each half of which has room for its widest.

``SpectralCache.memory()`` counts what is stored. This is for predictions, which do not know where a cache will live.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcache.accounting.memory import LayerSize, SideSize
from quantcache.coding.rope import Frame
from quantcache.coding.schema import Coding, SideCalibration

if TYPE_CHECKING:
    from quantcache.artifact.calibration import Calibration

HALF = 8
"""Coefficients of half a tile."""

MORE_BITS = 30
"""What tiles add to a token's bits for each head where the allocation is not known, whatever the dimension: from 2 to 4
bits 25 to 28 in the calibrations that come along (a test holds it), 22 to 29 for Llama-8B and Gemma-2-9B."""


def tile_bits(widths: Tensor, num_slow: int, trellis: bool) -> int:
    """Bits of a side's codes for each token, all heads together.

    Args:
        widths: Bits of every coefficient, ``[H, D]``.
        num_slow: How many of a head's dimensions are slow: they have tiles of their own.
        trellis: Whether codes are paths through a trellis: a tile's path bits are there for both of its halves.

    Returns:
        Their number.
    """
    total = 0
    for own in (widths[:, :num_slow], widths[:, num_slow:]):
        ordered = own.to(torch.int64).sort(dim=1, descending=True).values
        padded = torch.nn.functional.pad(ordered, (0, -own.shape[1] % (2 * HALF)))
        first, second = padded.unflatten(1, (-1, 2, HALF)).amax(-1).unbind(-1)
        if trellis:
            second = torch.where(first > 0, second.clamp_min(1), 0)
        total += HALF * int((first + second).sum())
    return total


def in_tiles(layers: Iterable[LayerSize], calibration: Calibration | None = None) -> list[LayerSize]:
    """Layers as they are stored in tiles.

    Args:
        layers: Layers that store blocks; a calibration's in its order.
        calibration: The calibration, at its rate; without it :data:`MORE_BITS` are added.

    Returns:
        The layers.
    """
    if calibration is None:
        return [replace(layer, key=_wider(layer.key), value=_wider(layer.value)) for layer in layers]
    codec, found = calibration.metadata.codec, []
    for layer, own in zip(layers, calibration.layers.values(), strict=True):
        slow = Frame(own.key.dim, own.rope, codec.fast_wavelength).num_slow
        key = _side_in_tiles(layer.key, own.key, slow, codec.coding)
        found.append(replace(layer, key=key, value=_side_in_tiles(layer.value, own.value, own.value.dim, codec.coding)))
    return found


def _side_in_tiles(size: SideSize, side: SideCalibration, num_slow: int, coding: Coding) -> SideSize:
    if side.widths is None:
        return size
    return replace(size, code_bits=tile_bits(side.widths, num_slow, coding == "trellis"))


def _wider(side: SideSize) -> SideSize:
    if side.code_bits is None:
        return side
    return replace(side, code_bits=side.code_bits + MORE_BITS * side.heads)
