"""How a cache's blocks lie in memory for the CUDA kernels: tiles of 16 coefficients in the order of the tensor cores.

A block holds 64 tokens of all heads of one batch row and one side. A head's coefficients are sorted by width, the
widest first, those of fast dimensions behind the others. Sixteen are a tile, and all its codes take as many bits as the
widest. Every one of 32 lanes has that many words, for its own 32 codes; lane 4 g + j::

    keys    tokens 8 g to 8 g + 7 of coefficients 4 j to 4 j + 3
            register 8 p + t: token 8 g + t, its halves are coefficients 4 j + 2 p and 4 j + 2 p + 1
    values  tokens 16 j to 16 j + 15 of coefficients g and g + 8
            register 8 h + s: coefficient g + 8 h, its halves are tokens 16 j + s and 16 j + 8 + s

Codes are cut into fields of 4, 2 and 1 bits as in the portable layout; a field's word has both halves of 4, 8 or 16
registers. A trellis has fields for its levels' k - 1 bits, and the path's bits behind them: a byte of that word is
eight tokens in a row. The words of a lane come in pieces of four, two and one, each with all lanes side by side.

Shapes: B batch, H key/value heads, D dimension, S slots (16 times the tiles), n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantcache_kernels.interface import BLOCK, MAX_WIDTH, SideConstants

TILE = 16
"""Coefficients of a tile."""

LANES = 32

FIELDS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (4, 4))
"""Bit fields of each width, most significant first."""

PATH_BIT = 7
"""Where a byte has a trellis' path bit, above its level's."""


@dataclass(frozen=True)
class BlockLayout:
    """Where the codes of one side of a layer lie.

    Attributes:
        dims: Coefficient of every slot, -1 for none, ``[H, S]`` int64 on the CPU.
        tile_widths: Bits of every tile's codes, 0 for a tile that a head lacks, ``[H, S / 16]`` int64 on the CPU.
        slow_tiles: Tiles of slow dimensions; they come first.
        dim: D.
        is_trellis: Whether codes are paths through a trellis.
    """

    dims: Tensor
    tile_widths: Tensor
    slow_tiles: int
    dim: int
    is_trellis: bool

    @classmethod
    def of(cls, constants: SideConstants) -> BlockLayout:
        """Lay a side out.

        Args:
            constants: The side, on the CPU.

        Returns:
            The layout.
        """
        parts, widths = [], constants.widths.to(torch.int64)
        for first, last in ((0, constants.num_slow), (constants.num_slow, constants.dim)):
            own = widths[:, first:last]
            tiles = -(-int((own > 0).sum(1).max()) // TILE) if own.numel() else 0
            if not first:
                tiles = max(tiles, 1)  # one of nothing where a side has no codes
            order = own.argsort(dim=1, descending=True, stable=True)[:, : TILE * tiles]
            coded = own.gather(1, order) > 0
            dims = torch.where(coded, order + first, -1)
            parts.append(torch.nn.functional.pad(dims, (0, TILE * tiles - dims.shape[1]), value=-1))
        dims = torch.cat(parts, dim=1)
        own = torch.where(dims < 0, 0, widths.gather(1, dims.clamp_min(0)))
        return cls(
            dims,
            own.unflatten(1, (-1, TILE)).amax(-1),
            parts[0].shape[1] // TILE,
            constants.dim,
            constants.coding == "trellis",
        )

    @property
    def heads(self) -> int:
        """H."""
        return self.dims.shape[0]

    @property
    def tiles(self) -> int:
        """Tiles that every head has room for."""
        return self.tile_widths.shape[1]

    @property
    def words(self) -> int:
        """Words of a block and batch row."""
        return LANES * int(self.tile_widths.sum())

    def gather(self, values: Tensor, dim: int) -> Tensor:
        """Bring per-coefficient values into slot order.

        Args:
            values: ``[H, ..., D, ...]`` on the CPU.
            dim: Which dimension is D.

        Returns:
            The same with S in place of D, zero in slots without a coefficient.
        """
        shape = [1] * values.dim()
        shape[0], shape[dim] = self.dims.shape
        index = self.dims.view(shape)
        index = index.expand(*[size if i != dim else -1 for i, size in enumerate(values.shape)])
        return values.gather(dim, index.clamp_min(0)).masked_fill(index < 0, 0)

    def table(self) -> Tensor:
        """``HeadTiles`` of every head (codes.h), ``[H, 20]`` int32."""
        rows, offset = [], 0
        for widths in self.tile_widths.tolist():
            size = 4 * LANES * sum(widths)
            counts = [
                sum(w == width for w in part)
                for part in (widths[: self.slow_tiles], widths[self.slow_tiles :])
                for width in range(MAX_WIDTH, 0, -1)
            ]
            rows.append([offset, size, *counts, 0, 0])
            offset += size
        return torch.tensor(rows, dtype=torch.int32, device="cpu")

    @cached_property
    def groups(self) -> tuple[tuple[int, Tensor, Tensor], ...]:
        """By width: the coefficients of all heads' tiles ``[m, 16]``, H D for none, and their words ``[m, W 32]``."""
        coefficient = torch.arange(self.heads, dtype=torch.int64, device="cpu")[:, None] * self.dim + self.dims
        coefficient = torch.where(self.dims < 0, self.heads * self.dim, coefficient).view(-1, TILE)
        widths = self.tile_widths.flatten()
        first = LANES * (widths.cumsum(0) - widths)
        found = []
        for width in range(1, MAX_WIDTH + 1):
            own = (widths == width).nonzero().flatten()
            if own.numel():
                inside = torch.arange(LANES * width, dtype=torch.int64, device="cpu")
                found.append((width, coefficient[own], first[own][:, None] + inside))
        return tuple(found)

    def pack(self, codes: Tensor, values: bool) -> Tensor:
        """Pack codes.

        Args:
            codes: A byte for each code, ``[n, B, H D, 64]`` uint8; of a trellis the level in its subset, and the path
                bit above it (:data:`PATH_BIT`).
            values: Whether they are values.

        Returns:
            int32 words, ``[n, B, words]``.
        """
        lead, device = codes.shape[:2], codes.device
        token, coefficient = (each.to(device) for each in _places(values))
        codes = torch.nn.functional.pad(codes, (0, 0, 0, 1))
        out = torch.zeros(*lead, self.words, dtype=torch.int32, device=device)
        for width, dims, words in self.groups:
            tiles = codes[:, :, dims.to(device).flatten()].unflatten(2, (-1, TILE))  # [n, B, m, 16, 64]
            own = tiles.flatten(3)[..., coefficient * BLOCK + token]  # [n, B, m, 32, 16, 2]
            out[:, :, words.to(device).flatten()] = self._pack_tiles(own, width).flatten(2)
        return out

    def _pack_tiles(self, own: Tensor, width: int) -> Tensor:
        """Words of lanes' codes ``[..., 32, 16, 2]``, in pieces, ``[..., 32 W]``."""
        parts = []
        for length, above in self._fields(width):
            bits = (own >> above & ((1 << length) - 1)).to(torch.int64).unflatten(-2, (length, 16 // length))
            step = length * torch.arange(16 // length, dtype=torch.int64, device=own.device)
            place = step[:, None] + 16 * torch.arange(2, dtype=torch.int64, device=own.device)
            parts.append((bits << place).sum((-1, -2)))  # [..., 32, length]
        words = torch.cat(parts, dim=-1)
        words = (words - (words >> 31 << 32)).to(torch.int32)
        return torch.cat([words[..., i : i + size].flatten(-2) for i, size in _pieces(width)], dim=-1)

    def unpack(self, words: Tensor, values: bool) -> Tensor:
        """Invert :meth:`pack`.

        Args:
            words: int32, ``[n, B, words]``.
            values: Whether they are values.

        Returns:
            ``[n, B, H D, 64]`` uint8; zero where a coefficient has no codes.
        """
        lead, device = words.shape[:2], words.device
        token, coefficient = (each.to(device) for each in _places(values))
        codes = torch.zeros(*lead, self.heads * self.dim + 1, BLOCK, dtype=torch.uint8, device=device)
        for width, dims, places in self.groups:
            own = words[:, :, places.to(device).flatten()].unflatten(2, (-1, LANES * width))
            lanes = self._unpack_tiles(own, width)  # [n, B, m, 32, 16, 2]
            tiles = lanes.new_zeros(*lanes.shape[:3], TILE * BLOCK)
            tiles[..., coefficient * BLOCK + token] = lanes
            codes[:, :, dims.to(device).flatten()] = tiles.unflatten(3, (TILE, BLOCK)).flatten(2, 3)
        return codes[:, :, :-1]

    def _unpack_tiles(self, words: Tensor, width: int) -> Tensor:
        pieces = [words[..., LANES * i : LANES * (i + size)].unflatten(-1, (LANES, size)) for i, size in _pieces(width)]
        own, first = torch.cat(pieces, dim=-1), 0
        codes = torch.zeros(*own.shape[:-1], 16, 2, dtype=torch.uint8, device=own.device)
        for length, above in self._fields(width):
            step = length * torch.arange(16 // length, dtype=torch.int32, device=own.device)
            place = step[:, None] + 16 * torch.arange(2, dtype=torch.int32, device=own.device)
            bits = own[..., first : first + length, None, None] >> place & ((1 << length) - 1)
            codes |= bits.to(torch.uint8).flatten(-3, -2) << above
            first += length
        return codes

    def _fields(self, width: int) -> list[tuple[int, int]]:
        """Fields of a width in the order of their words: length, and which bit of a byte is its lowest."""
        fields, above = [], width - 1 if self.is_trellis else width
        for length in FIELDS[above]:
            above -= length
            fields.append((length, above))
        return fields + [(1, PATH_BIT)] * self.is_trellis


def _pieces(width: int) -> list[tuple[int, int]]:
    """First word and number of the words that a lane loads at once."""
    sizes = [4] * (width // 4) + [2] * (width % 4 // 2) + [1] * (width % 2)
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _places(values: bool) -> tuple[Tensor, Tensor]:
    """Token of the block and coefficient of the tile of every code, two ``[32 lanes, 16 registers, 2 halves]``."""
    sizes = (torch.arange(size, dtype=torch.int64, device="cpu") for size in (LANES, 16, 2))
    lane, register, half = torch.meshgrid(*sizes, indexing="ij")
    row, column, upper, low = lane // 4, lane % 4, register // 8, register % 8
    if values:
        return 16 * column + 8 * half + low, row + 8 * upper
    return 8 * row + low, 4 * column + 2 * upper + half
