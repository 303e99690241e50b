"""KVarN: a Hadamard rotation, tiles whose rows and columns are brought to one variance, then min-max codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import Cache

from quantcache.evaluation.methods.base import Scheme, Setting, SimulatedCodec, hadamard, simulated_cache

SOURCE = "KVarN (arXiv 2606.03458)"

PASSES = 16
"""Rounds of levelling, as in the paper; the released vLLM backend makes 8."""

TILES = (64, 128)
"""Tokens that share the scales of their channels: the two presets of the released backend."""

WIDTHS = ((4, 2), (4, 4), (3, 3), (2, 2))
"""Bits of keys and of values. K4V2 is the released preset."""

SINKS = 128
"""First tokens that the released backend never quantizes."""

SPREADS = (1e-3, 1e3)
SCALES = (-0.3, 10.0)
"""Within which a standard deviation, and the logarithm of a scale, are held: those of the released code."""


def kvarn_bits(width: int, side: str, dim: int, tile: float) -> float:
    """Bits per element: codes, and the 16-bit numbers of a tile.

    A key's tile has a scale and a zero point for each channel, and a scale for each token; a value's the reverse.
    """
    twice, once = (tile, dim) if side == "key" else (dim, tile)
    return width + 32 / twice + 16 / once


def level(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Scales that bring rows and columns of matrices to one standard deviation, as far as they allow.

    Columns and rows are divided by their standard deviations in turn; of all rounds the one is taken whose largest and
    smallest deviations are closest, before any of them included.

    Args:
        tiles: ``[..., R, C]`` float32.

    Returns:
        Scales of the rows ``[..., R, 1]`` and of the columns ``[..., 1, C]``.
    """
    rows, columns = torch.zeros_like(tiles[..., :1]), torch.zeros_like(tiles[..., :1, :])
    best = (rows.exp(), columns.exp())
    least = _imbalance(tiles)
    levelled = tiles
    for _ in range(PASSES):
        columns = (columns + levelled.std(-2, keepdim=True).clamp(*SPREADS).log()).clamp(*SCALES)
        levelled = tiles / columns.exp() / rows.exp()
        rows = (rows + levelled.std(-1, keepdim=True).clamp(*SPREADS).log()).clamp(*SCALES)
        levelled = tiles / columns.exp() / rows.exp()
        found = _imbalance(levelled)
        better = found <= least
        best = (torch.where(better, rows.exp(), best[0]), torch.where(better, columns.exp(), best[1]))
        least = torch.where(better, found, least)
    return best


def _imbalance(tiles: Tensor) -> Tensor:
    """How far the standard deviations of rows and of columns lie apart, ``[..., 1, 1]``."""
    spreads = (tiles.std(dim, keepdim=True).flatten(-2) for dim in (-1, -2))
    apart = [spread.amax(-1) / spread.amin(-1).clamp_min(1e-8) for spread in spreads]
    return (apart[0] + apart[1])[..., None, None]


class KVarNCodec(SimulatedCodec):
    """Tiles of rotated tokens, levelled, then asymmetric codes: keys by channel over tokens, values by token.

    Source: L. K. Muller et al., "KVarN: Variance-Normalized KV-Cache Quantization Mitigates Error Accumulation in
    Reasoning Tasks" (2026), arXiv 2606.03458, and its released code, github.com/huawei-csl/KVarN.

    Args:
        side: ``"key"`` or ``"value"``.
        dim: D, dimension of a head.
        bits: Width of every code.
        tile: Tokens of a tile; what is encoded at once must be a multiple of it.
        device: Where the constants live.
    """

    def __init__(self, side: str, dim: int, bits: int, tile: int, device: torch.device | str = "cpu"):
        self.rotation = hadamard(dim).to(device)
        self.side, self.width, self.tile = side, bits, tile
        super().__init__(kvarn_bits(bits, side, dim, tile), [self.rotation])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Rotate, level each tile, quantize its rows, and back."""
        tiles = (x @ self.rotation).unflatten(2, (-1, self.tile))
        if self.side == "key":
            return self._quantize(tiles.mT).mT.flatten(2, 3) @ self.rotation.T
        return self._quantize(tiles).flatten(2, 3) @ self.rotation.T

    def _quantize(self, tiles: Tensor) -> Tensor:
        rows, columns = level(tiles)
        levelled = tiles / columns / rows
        low, high = levelled.amin(-1, keepdim=True), levelled.amax(-1, keepdim=True)
        steps = (1 << self.width) - 1
        scale = ((high - low) / steps).clamp_min(1e-10)
        codes = ((levelled - low) / scale).round().clamp(0, steps)
        # A row's own scale goes into that of its codes: three numbers are stored for it and its column.
        scale, low, columns = ((rows * scale).half(), (rows * low).half(), columns.half())
        return (codes * scale.float() + low.float()) * columns.float()


def _make(widths: tuple[int, int], tile: float, setting: Setting) -> Callable[[], Cache]:
    by_side = dict(zip(("key", "value"), widths, strict=True))
    return simulated_cache(
        setting,
        lambda index, side, x, device: KVarNCodec(side, x.shape[-1], by_side[side], int(tile), device),
        tile=int(tile),
    )


def _bits(widths: tuple[int, int], tile: float, side: str, dim: int) -> float:
    return kvarn_bits(widths[side == "value"], side, dim, tile)


SCHEMES = tuple(
    Scheme(
        stem=f"kvarn-k{widths[0]}v{widths[1]}",
        family="rival",
        simulated=True,
        description=f"Hadamard rotation, variance levelled in tiles, {widths[0]}-bit keys and {widths[1]}-bit values",
        source=SOURCE,
        make=partial(_make, widths),
        bits=partial(_bits, widths),
        parameter="T",
        numbers=TILES,
        defaults=lambda config: TILES,
        own_lengths=(SINKS, 0),
        tile=int,
    )
    for widths in WIDTHS
)
