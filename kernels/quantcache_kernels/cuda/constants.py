"""A side's constants for the kernels of a cache's blocks.

Shapes: H key/value heads, D dimension, S slots of a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.cuda.blocks import BYTE_PLACES, HALF, TILE, BlockLayout
from quantcache_kernels.cuda.conversion import Conversion, lay_out_conversion
from quantcache_kernels.cuda.fast import lay_out_fast
from quantcache_kernels.cuda.tables import PLACES, level_tables
from quantcache_kernels.gpu_tables import HALF_TERMS, make_frame, power_of_two_above
from quantcache_kernels.interface import Frame, SideConstants

TERMS = 8
"""As in decoding.h."""

MAX_DIM = 256

LARGEST_NORM = 64
"""Of a column of the matrix that queries are multiplied with, and of a query (queries.h)."""


def unsupported(dim: int, num_fast: int) -> str | None:
    """Why the kernels cannot take a side.

    Args:
        dim: D.
        num_fast: Fast dimensions.

    Returns:
        The reason, or None if they can.
    """
    if dim % TILE or num_fast % TILE or dim > MAX_DIM:
        return f"a dimension of {dim} ({num_fast} of them fast) is not a multiple of {TILE} up to {MAX_DIM}"
    return None


@dataclass(frozen=True)
class PreparedCodes:
    """A side's constants for the kernels.

    Attributes:
        layout: Where codes lie.
        room: Bytes of the largest head's codes in a block.
        heads: ``HeadTiles`` (codes.h).
        terms: Polynomials, in the order in which lanes take them.
        decoder: Of values, what sums of levels are multiplied by, ``[H, S, D]`` float32.
        mean: ``[H, D]`` float32.
        frame: Of keys, ``Quad`` of queries.h for every four dimensions, ``[D / 4, 8]`` int32.
        matrix: Of keys, from framed queries to coded ones, then the mean of the slow dimensions, and units of the
            matrix and of the fast part in it (queries.h).
        fast: Of keys, decoder of the fast part in fragment order, then its mean, and cosines and sines, by offset.
        num_fast: Fast dimensions.
        conversion: Where the portable layout has the codes.
    """

    layout: BlockLayout
    room: int
    heads: Tensor
    terms: Tensor
    decoder: Tensor
    mean: Tensor
    frame: Tensor
    matrix: list[Tensor]
    fast: list[Tensor]
    num_fast: int
    conversion: Conversion

    def held(self) -> list[Tensor]:
        """Every tensor on the device."""
        return [
            *(self.heads, self.terms, self.decoder, self.mean, self.frame, *self.matrix),
            *self.fast,
            *(self.conversion.slots, self.conversion.places, self.conversion.maps),
            *self.layout.held(),
        ]

    @property
    def is_trellis(self) -> bool:
        """Whether codes are paths through a trellis."""
        return self.layout.is_trellis

    @property
    def head_words(self) -> int:
        """Words of a head's constants that are read for every block: polynomials or tables, and the fast decoder."""
        return (self.terms.numel() + self.fast_words) // self.layout.heads

    @property
    def fast_words(self) -> int:
        """Words of the fast decoder, of all heads."""
        return self.fast[0].numel() // 2 if self.num_fast else 0

    @property
    def fast_tiles(self) -> int:
        """Tiles of fast dimensions."""
        return self.layout.tiles - self.layout.slow_tiles


def prepare(constants: SideConstants, device: torch.device, values: bool) -> PreparedCodes:
    """Lay a side's constants out for the kernels.

    Args:
        constants: The side, on the CPU.
        device: Where they go.
        values: Whether it is the values' side.

    Returns:
        The constants.
    """
    layout = BlockLayout.of(constants)
    terms, scale = _terms(constants, layout, values)
    decoder = layout.gather(constants.decoder, 2) * scale[:, None]  # [H, D, S]
    table = layout.table()
    empty = torch.zeros(0, dtype=torch.float32, device="cpu")
    frame, fast = empty, [empty, empty, empty]
    matrix: list[Tensor] = []
    if not values:
        frame, pairs = _frame(constants.frame)
        matrix, fast = _key_matrices(constants, layout, decoder, pairs)

    def on_device(tensor: Tensor) -> Tensor:
        return tensor.contiguous().to(device)

    return PreparedCodes(
        layout=layout,
        room=int(table[:, 1].max()),
        heads=on_device(table),
        terms=on_device(terms),
        decoder=on_device(decoder.transpose(1, 2) if values else empty),
        mean=on_device(constants.mean),
        frame=on_device(frame),
        matrix=[on_device(each) for each in matrix],
        fast=[on_device(each) for each in fast],
        num_fast=constants.dim - constants.num_slow,
        conversion=lay_out_conversion(constants, layout, device, values),
    )


def _polynomials(constants: SideConstants, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Polynomials of every slot, ``[H, S, terms]`` float16, and what their results are in units of, ``[H, S]``.

    A code of w bits stored in W is v = 1 + code / 2^W in half precision, or v = 1024 + 2^(8 - W) code where codes are
    bytes on their way. The first two terms take it to x = (code + 1/2) / 2^w - 1/2, without rounding. A path of k bits
    has the places of k + 1 bits.
    """
    is_trellis = layout.is_trellis
    width = layout.gather(constants.widths.to(torch.int64), 1)
    stored = layout.widths.repeat_interleave(HALF, dim=1)
    in_bytes = stored + int(is_trellis) <= BYTE_PLACES
    factor = torch.where(width > 0, torch.exp2((stored - width - 8 * in_bytes).double()), 0.0)
    base = torch.where(in_bytes, 1024.0, 1.0)
    half_step = torch.exp2(-(width + 1 + int(is_trellis)).double())
    center = torch.where(width > 0, half_step - 0.5 - base * factor, 0.0)
    if is_trellis:
        books = torch.tensor(HALF_TERMS, dtype=torch.float64, device="cpu")
    else:
        books = torch.tensor([(c, a, b) for c, a, b in constants.polynomials], dtype=torch.float64, device="cpu")
    own = books[width]
    ratios = torch.where((width > 0).unsqueeze(-1), own[..., 1:], 0.0)
    terms = torch.cat((factor.unsqueeze(-1), center.unsqueeze(-1), ratios), dim=-1)
    return terms.half(), torch.where(width > 0, own[..., 0], 0.0).float()


def _terms(constants: SideConstants, layout: BlockLayout, values: bool) -> tuple[Tensor, Tensor]:
    """Polynomials or tables of every half tile in the order in which lanes take them, and units of levels, ``[H, S]``.

    Of keys ``[H, tiles, 4, 2 halves, words]`` int32, a lane's two coefficients in the halves of a word of a polynomial;
    of values ``[H, tiles, 8, 2 halves, words]``, its one coefficient twice.
    """
    terms, scale = _polynomials(constants, layout)
    if values:
        words = terms.unsqueeze(-1).expand(*terms.shape, 2).contiguous().view(torch.int32).squeeze(-1)
        width = layout.own_widths
    else:
        pairs = terms.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
        words, width = pairs.view(torch.int32).squeeze(-1), layout.own_widths.unflatten(1, (-1, 2)).amax(-1)
    words = torch.nn.functional.pad(words, (0, TERMS - words.shape[-1]))
    is_trellis = layout.is_trellis
    most = PLACES - is_trellis
    books = [
        level_tables(tuple((constants.unions if is_trellis else constants.levels)[w]), is_trellis)
        for w in range(most + 1)
    ]
    tables = torch.tensor([words for words, _ in books], dtype=torch.int64, device="cpu").to(torch.int32)
    units = torch.tensor([unit for _, unit in books], dtype=torch.float32, device="cpu")
    lanes = width.shape[1] // layout.widths.shape[1]
    tabled = layout.tabled.repeat_interleave(lanes, dim=1).unsqueeze(-1)
    words = torch.where(tabled, tables[width.clamp_max(most)], words)
    tabled = layout.tabled.repeat_interleave(HALF, dim=1)
    scale = torch.where(tabled & (layout.own_widths > 0), units[layout.own_widths.clamp_max(most)], scale)
    return words.unflatten(1, (layout.tiles, 2, -1)).transpose(2, 3), scale


def paired_frame(frame: Frame) -> tuple[Tensor, Tensor]:
    """Pairs of dimensions that turn together.

    Args:
        frame: The frame.

    Returns:
        ``Pair`` of each (encoding.h), ``[D / 2, 4]`` int32, and its framed dimensions, ``[D / 2, 2]``. Slow pairs come
        first. Dimensions that do not rotate are pairs that turn by nothing; they are among the slow ones.
    """
    tables = make_frame(frame)
    partner = tables.partner.tolist()
    rest = [d for d, other in enumerate(partner) if d == other]
    turning = [(d, other) for d, other in enumerate(partner) if d < other]
    slow = [pair for pair in turning if pair[0] < frame.num_slow]
    found = slow + list(zip(rest[::2], rest[1::2], strict=True)) + turning[len(slow) :]
    pairs = torch.tensor(found, dtype=torch.int64, device="cpu")
    turns = tables.turns[pairs[:, :1]].view(torch.int32)
    return torch.cat((tables.order[pairs], turns), dim=1), pairs


def _frame(frame: Frame) -> tuple[Tensor, Tensor]:
    """The frame of :class:`PreparedCodes`, and framed dimensions of every pair, as :func:`paired_frame` has them."""
    made, pairs = paired_frame(frame)
    by_twos = made.unflatten(0, (-1, 2))
    return torch.cat((by_twos[..., :2].transpose(1, 2).flatten(1), by_twos[..., 2:].flatten(1)), dim=1), pairs


def _key_matrices(
    constants: SideConstants, layout: BlockLayout, decoder: Tensor, pairs: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Matrix and fast part of :class:`PreparedCodes`; decoder ``[H, D, S]``, pairs those of :func:`paired_frame`."""
    slow, slots = constants.num_slow, TILE * layout.slow_tiles
    num_fast = constants.dim - slow
    fast, mean = decoder[:, slow:, slots:], constants.mean[:, slow:]
    unit = torch.zeros(layout.heads, dtype=torch.float32, device="cpu")
    largest = decoder[:, :slow, :slots].norm(dim=1).amax(1) if slots else unit
    if num_fast:
        entries = fast.abs().flatten(1).amax(1) if fast.shape[2] else mean.new_zeros(layout.heads)
        unit = power_of_two_above(torch.maximum(entries, mean.abs().amax(1)))
    own = power_of_two_above(torch.maximum(largest, unit)) / LARGEST_NORM
    own_pairs = pairs[: slow // 2]
    # Lane 4 g + j of a step has, of columns g and 8 + g, two pairs' first halves, then their second ones.
    halves = (decoder[:, own_pairs, :slots] / own[:, None, None, None]).half()  # [H, pairs, 2, slots]
    halves = halves.unflatten(3, (layout.slow_tiles, 2, HALF)).unflatten(1, (slow // TILE, 4, 2))
    matrix = halves.permute(0, 5, 1, 7, 2, 6, 4, 3)
    by_fours = constants.mean[:, own_pairs].unflatten(1, (slow // 4, 2)).transpose(2, 3)
    given = [matrix, by_fours, torch.stack((own, unit / own), dim=1)]
    if not num_fast:
        return given, [torch.zeros(0, dtype=torch.float32, device="cpu")] * 3
    unit = unit[:, None, None]
    by_tile = (fast / unit).unflatten(2, (layout.tiles - layout.slow_tiles, TILE))
    frequencies = constants.frame.frequencies.cpu()[constants.frame.slow_pairs :]
    return given, lay_out_fast(by_tile, mean / unit[..., 0], frequencies)
