"""The constants of one side of a layer, laid out for the kernels.

Kernels work on *slots*: the coded dimensions of a head in an order of their own, sixteen to a tile. A head's
dimensions are sorted by width, so that most tiles hold one or two widths, and paired so that two neighbouring slots
have the same width; dimensions of width zero have no slot. The slow and the fast part of a key have tiles of their own.
Attention does not see the order: query transform and decoder are permuted alike.

Shapes: H key/value heads, D dimension, S slots (16 times the number of tiles), Ds slow and Df fast dimensions, P half
the fast dimensions, padded to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.gpu_tables import HALF_TERMS
from quantcache_kernels.interface import MAX_WIDTH, SideConstants

TILE = 16
"""Slots in a tile: the smallest contraction of a half-precision tensor core."""


@dataclass(frozen=True)
class Slots:
    """The order in which kernels take a side's coefficients.

    Attributes:
        dims: Framed dimension of every slot, -1 for padding, ``[H, S]`` int64.
        slow_tiles: Tiles of slow dimensions; they come first.
        fast_tiles: Tiles of fast dimensions.
    """

    dims: Tensor
    slow_tiles: int
    fast_tiles: int

    @property
    def tiles(self) -> int:
        """All tiles."""
        return self.slow_tiles + self.fast_tiles

    def gather(self, values: Tensor, dim: int, fill: float = 0) -> Tensor:
        """Bring per-dimension values into slot order.

        Args:
            values: ``[H, ..., D, ...]``.
            dim: Which dimension is D.
            fill: What padding slots get.

        Returns:
            The same shape with S in place of D.
        """
        shape = [1] * values.dim()
        shape[0], shape[dim] = self.dims.shape
        index = self.dims.view(shape)
        index = index.expand(*[size if i != dim else -1 for i, size in enumerate(values.shape)])
        return values.gather(dim, index.clamp_min(0)).masked_fill(index < 0, fill)


def make_slots(widths: Tensor, num_slow: int) -> Slots:
    """Sort and pair the coded dimensions of every head.

    Args:
        widths: ``[H, D]`` on the CPU.
        num_slow: Ds.

    Returns:
        The slots. The number of tiles follows from D alone where it can, so that all layers of a model share kernels.
    """
    heads, dim = widths.shape
    parts, tiles = [], []
    for first, last in ((0, num_slow), (num_slow, dim)):
        rows = []
        for head in widths.tolist():
            row: list[int] = []
            for width in range(MAX_WIDTH, 0, -1):
                dims = [d for d in range(first, last) if head[d] == width]
                row += dims + [-1] * (len(dims) % 2)
            rows.append(row)
        count = max(-(-(last - first) // TILE), *(-(-len(row) // TILE) for row in rows))
        padded = [row + [-1] * (count * TILE - len(row)) for row in rows]
        parts.append(torch.tensor(padded, dtype=torch.int64, device="cpu").view(heads, -1))
        tiles.append(count)
    return Slots(torch.cat(parts, dim=1), *tiles)


LEAST_PAYLOAD = 8
"""Words a block must have: the largest field, which is read even for a slot that has none."""


@dataclass(frozen=True)
class CodeTables:
    """Where the words of every slot are, and what its codes mean.

    Attributes:
        words: First word of the 4-, 2- and 1-bit field and of a fourth, ``[H, 4, S]`` int32: the second 4-bit field of
            8-bit codes, or a trellis' path bits.
        factors: What the fields are multiplied by to take their place in a ten-bit code whose highest bits are the
            code's (the first field is masked instead), zero where a slot lacks the field, ``[H, 4, S]`` int32.
        flags: Which fields a tile has: 1, 2, 4 and 8 in the order of ``words``, ``[H, tiles]`` int32.
        meaning: In half precision, for computing levels: -(1 + center) and the polynomial's ratios, ``[H, 3, S]``
            float16, ``[H, 5, S]`` of a trellis. Otherwise, for looking them up: shift and first level of the slot's
            codebook, ``[H, 2, S]`` int32.
        levels: All codebooks, one after the other; empty where levels are computed.
        scale: c of every slot where levels are computed, else ones, ``[H, S]`` float32.
        trellis: Whether the codes are those of a trellis.
    """

    words: Tensor
    factors: Tensor
    flags: Tensor
    meaning: Tensor
    levels: Tensor
    scale: Tensor
    trellis: bool

    def tensors(self) -> list[Tensor]:
        """What the kernels read, in the order of their arguments."""
        return [self.words, self.factors, self.flags, self.meaning, self.levels]

    def wide_tiles(self, first: int, last: int) -> int:
        """How many of the tiles ``first`` to ``last`` come up to the last one that has 8-bit codes."""
        if self.trellis:
            return 0
        wide = (self.flags[:, first:last] & 8).any(0).nonzero().flatten()
        return int(wide[-1]) + 1 if wide.numel() else 0


def make_codes(constants: SideConstants, slots: Slots, dtype: torch.dtype) -> CodeTables:
    """Code tables of a side.

    Args:
        constants: The side, on the CPU.
        slots: Its slots.
        dtype: float32 looks exact levels up, float16 computes them.

    Returns:
        The tables.
    """
    is_trellis = constants.coding == "trellis"
    width = slots.gather(constants.widths.to(torch.int64), 1)
    offset = slots.gather(constants.offsets.to(torch.int64), 1)
    inner = (width - 1).clamp_min(0) if is_trellis else width  # bits that are packed as scalar codes are
    after4 = offset + 8 * (inner >= 4)
    fourth = offset + 2 * inner if is_trellis else offset + 8

    def has_fields(width: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
        return inner >= 4, (inner & 2) > 0, (inner & 1) > 0, width > 0 if is_trellis else width == 8

    has, where = has_fields(width, inner), (offset, after4, after4 + 2 * (inner & 2), fourth)
    # A field that a slot lacks is read all the same, from words that are read anyway, and multiplied by zero.
    payload = int(2 * constants.widths.sum())
    spare = [offset.clamp_max(payload - size) for size in (8, 4, 2, 2 if is_trellis else 8)]
    words = torch.stack([torch.where(h, w, s) for h, w, s in zip(has, where, spare, strict=True)], dim=1)
    # Padding means what the slot it is paired with means.
    width, inner = (each[:, 0::2].repeat_interleave(2, dim=1) for each in (width, inner))
    # A field of f bits with r bits of the code below it stands at bit 10 - length + r of ten.
    length = width + 1 if is_trellis else width
    below = 2 * int(is_trellis)
    last = 1 << (10 - length) if is_trellis else 4 + 0 * width
    places = (0x03C003C0 + 0 * width, 1 << (10 - length + below + (inner & 1)), 1 << (10 - length + below), last)
    factors = torch.stack([torch.where(h, p, 0) for h, p in zip(has_fields(width, inner), places, strict=True)], dim=1)
    flags = sum((h.unflatten(1, (-1, TILE)).any(-1).to(torch.int32) << i) for i, h in enumerate(has))
    assert isinstance(flags, Tensor)

    if dtype == torch.float16:
        per_slot = _polynomials(constants)[width]
        meaning, scale = per_slot[..., :-1].transpose(1, 2).half(), per_slot[..., -1].contiguous()
        levels = torch.zeros(1, dtype=dtype, device="cpu")
    else:
        first = ((1 << length) - (4 if is_trellis else 2)).clamp_min(0)
        meaning = torch.stack((10 - length, first), dim=1).to(torch.int32)
        scale = torch.ones(width.shape, dtype=torch.float32, device="cpu")
        books = constants.unions if is_trellis else constants.levels
        levels = torch.tensor([x for w in range(1, MAX_WIDTH + 1) for x in books[w]], dtype=dtype, device="cpu")
    return CodeTables(
        words=words.to(torch.int32),
        factors=factors.to(torch.int32),
        flags=flags.to(torch.int32),
        meaning=meaning.contiguous(),
        levels=levels,
        scale=scale,
        trellis=is_trellis,
    )


def _polynomials(constants: SideConstants) -> Tensor:
    """By width, what levels are computed from in half precision, ``meaning`` of :class:`CodeTables` and ``scale``."""
    if constants.coding == "trellis":
        rows = [(2.0 ** -(w + 2) - 1.5, *more, first) for w, (first, *more) in enumerate(HALF_TERMS[1:], start=1)]
    else:
        rows = [(2.0 ** -(w + 1) - 1.5, a, b, c) for w, (c, a, b) in enumerate(constants.polynomials[1:], start=1)]
    nothing = (-1.0, *(0.0 for _ in rows[0][2:]), 1.0)  # width 0: the level of code 0 is zero
    return torch.tensor([nothing, *rows], dtype=torch.float32, device="cpu")


def make_search(levels: Sequence[Sequence[float]]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Tables that find the nearest level without a search.

    The range of a codebook's boundaries is cut into ``4 * 2**width`` bins, each with at most one boundary inside.

    Args:
        levels: Codebook of every width from 0 to 8.

    Returns:
        Levels and boundaries (one more than there are, the last infinite) of width 1 to 8, one after the other; how
        many boundaries lie below every bin, likewise, int32; and bins per unit and place of zero by width, ``[9, 2]``.
    """
    places: list[Tensor] = []
    below: list[Tensor] = []
    grid = torch.zeros(MAX_WIDTH + 1, 2, dtype=torch.float64, device="cpu")
    for width in range(1, MAX_WIDTH + 1):
        book = torch.tensor(levels[width], dtype=torch.float64, device="cpu")
        edges = ((book[1:] + book[:-1]) / 2).float().double()
        count = 4 << width
        scale = (count - 2) / max(float(edges[-1] - edges[0]), 1.0)
        # Shift the bins so that no boundary is so near an edge that rounding could put it on the other side.
        shifts = torch.arange(1, 100, dtype=torch.float64, device="cpu") / 100 - float(edges[0]) * scale
        position = edges * scale + shifts[:, None]
        best = (position - position.round()).abs().amin(1).argmax()
        inside = position[best].floor()
        assert len(inside.unique()) == len(inside)
        grid[width] = torch.stack((torch.full_like(shifts[best], scale), shifts[best]))
        below.append(torch.searchsorted(inside, torch.arange(count, dtype=torch.float64, device="cpu")))
        places.append(torch.cat((edges, torch.full_like(edges[:1], float("inf")))))
    every = torch.tensor(
        [x for width in range(1, MAX_WIDTH + 1) for x in levels[width]], dtype=torch.float32, device="cpu"
    )
    return [every, torch.cat(places).float()], torch.cat(below).to(torch.int32), grid.float()
