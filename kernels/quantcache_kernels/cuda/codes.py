"""Attention on a cache's blocks: its constants, and one call.

Shapes: B batch, Hq / H query / key-value heads, Tq queries, G = Hq / H, R = G Tq rows of queries that share a head, the
query index running fastest, D dimension, S slots of a side, n blocks.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantcache_kernels.cuda.blocks import HALF, LANES, PLACES, TILE, BlockLayout
from quantcache_kernels.cuda.driver import load_codes
from quantcache_kernels.cuda.near import near_attention
from quantcache_kernels.cuda.ops import WARPS_PER_PROCESSOR, choose_splits
from quantcache_kernels.cuda.structures import CodesArguments, MergeArguments, QueryArguments, pointer
from quantcache_kernels.cuda.tables import level_tables
from quantcache_kernels.interface import ANCHOR_LENGTH, AttentionCall, SideConstants
from quantcache_kernels.triton.tables import HALF_TERMS, make_frame, power_of_two_above

LOG2_E = math.log2(math.e)

ROWS = 8
"""Rows of queries that a tile has columns for; more of them read the codes again."""

TURNED_ROWS, TURN_THREADS = 32, 128
"""As in queries.h."""

TERMS, ONE_HALVES = 8, 0x3C003C00
"""As in decoding.h: words of a lane's polynomial or table of half a tile, and 1.0 twice in half precision."""

MAX_DIM = 256

EXTRA_BYTES = 64
"""Of a unit's queries behind their fragments: eight units and eight offsets."""


class Launched(Protocol):
    """A kernel."""

    def launch(
        self, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: ctypes.Structure, stream: int
    ) -> None:
        """See :meth:`quantcache_kernels.cuda.driver.Kernel.launch`."""
        ...


def _on_cuda(device: torch.device, key_trellis: bool, value_trellis: bool) -> Mapping[str, Launched]:
    return load_codes(device.index or 0, key_trellis, value_trellis)


LOADERS: dict[str, Callable[[torch.device, bool, bool], Mapping[str, Launched]]] = {"cuda": _on_cuda}
"""By type of device, who finds the kernels for codings of keys and values; tests add an emulation."""


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
        is_trellis: Whether codes are paths through a trellis.
        room: Bytes of the largest head's codes in a block.
        heads: ``HeadTiles`` (codes.h).
        terms: Polynomials, in the order in which lanes take them.
        decoder: Of values, what sums of levels are multiplied by, ``[H, S, D]`` float32.
        mean: ``[H, D]`` float32.
        frame: Of keys, order, partner, sign and turns.
        matrix: Of keys, from framed queries to coded ones, ``[H, slow, slow slots + 1]``: the last column is the mean.
        norms: Of keys, largest column norm of the matrix, and the fast part's unit, ``[H, 2]``.
        fast: Of keys, decoder of the fast part in fragment order, its mean, and cosines and sines by offset.
        num_fast: Fast dimensions.
    """

    layout: BlockLayout
    is_trellis: bool
    room: int
    heads: Tensor
    terms: Tensor
    decoder: Tensor
    mean: Tensor
    frame: list[Tensor]
    matrix: Tensor
    norms: Tensor
    fast: list[Tensor]
    num_fast: int

    def held(self) -> list[Tensor]:
        """Every tensor on the device."""
        return [
            *(self.heads, self.terms, self.decoder, self.mean, *self.frame, self.matrix, self.norms),
            *self.fast,
            *self.layout.held(),
        ]

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
    frame, matrix, norms, fast = [], empty, empty, [empty, empty, empty]
    if not values:
        tables = make_frame(constants.frame)
        frame = [tables.order, tables.partner, tables.sign, tables.turns]
        matrix, norms, fast = _key_matrices(constants, layout, decoder)

    def on_device(tensor: Tensor) -> Tensor:
        return tensor.contiguous().to(device)

    return PreparedCodes(
        layout,
        constants.coding == "trellis",
        int(table[:, 1].max()),
        on_device(table),
        on_device(terms),
        on_device(decoder.transpose(1, 2) if values else empty),
        on_device(constants.mean),
        [on_device(each) for each in frame],
        on_device(matrix),
        on_device(norms),
        [on_device(each) for each in fast],
        constants.dim - constants.num_slow,
    )


def _polynomials(constants: SideConstants, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Polynomials of every slot, ``[H, S, terms]`` float16, and what their results are in units of, ``[H, S]``.

    A code of w bits stored in W is v = 1 + code / 2^W in half precision. The first two terms take it to
    x = (code + 1/2) / 2^w - 1/2, without rounding. A path of k bits has the places of k + 1 bits.
    """
    is_trellis = constants.coding == "trellis"
    width = layout.gather(constants.widths.to(torch.int64), 1)
    stored = layout.widths.repeat_interleave(HALF, dim=1)
    factor = torch.where(width > 0, torch.exp2((stored - width).double()), 0.0)
    half_step = torch.exp2(-(width + 1 + int(is_trellis)).double())
    center = torch.where(width > 0, half_step - 0.5 - factor, 0.0)
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
    is_trellis = constants.coding == "trellis"
    most = PLACES - is_trellis
    levels = constants.unions if is_trellis else constants.levels
    books = [level_tables(tuple(levels[w]), is_trellis) for w in range(most + 1)]
    tables = torch.tensor([words for words, _ in books], dtype=torch.int64, device="cpu").to(torch.int32)
    units = torch.tensor([unit for _, unit in books], dtype=torch.float32, device="cpu")
    lanes = width.shape[1] // layout.widths.shape[1]
    tabled = layout.tabled.repeat_interleave(lanes, dim=1).unsqueeze(-1)
    words = torch.where(tabled, tables[width.clamp_max(most)], words)
    tabled = layout.tabled.repeat_interleave(HALF, dim=1)
    scale = torch.where(tabled & (layout.own_widths > 0), units[layout.own_widths.clamp_max(most)], scale)
    return words.unflatten(1, (layout.tiles, 2, -1)).transpose(2, 3), scale


def _key_matrices(
    constants: SideConstants, layout: BlockLayout, decoder: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Matrix, norms and fast part of :class:`PreparedCodes`; decoder ``[H, D, S]``."""
    slow, slots = constants.num_slow, TILE * layout.slow_tiles
    num_fast = constants.dim - slow
    matrix = torch.cat((decoder[:, :slow, :slots], constants.mean[:, :slow, None]), dim=2)
    norms = torch.ones(layout.heads, 2, dtype=torch.float32, device="cpu")
    norms[:, 0] = decoder[:, :slow, :slots].norm(dim=1).amax(1) if slow else 0.0
    if not num_fast:
        return matrix, norms, [torch.zeros(0, dtype=torch.float32, device="cpu")] * 3
    fast, mean = decoder[:, slow:, slots:], constants.mean[:, slow:]
    largest = fast.abs().flatten(1).amax(1) if fast.shape[2] else mean.new_zeros(layout.heads)
    norms[:, 1] = power_of_two_above(torch.maximum(largest, mean.abs().amax(1)))
    unit = norms[:, 1, None, None]
    # Column 2 i + e of eight dimensions is the half e of pair i; lane 4 g + j holds column g of
    # slots 2 j and 2 j + 1 of either half.
    by_pair = (fast / unit).unflatten(1, (2, num_fast // 2)).transpose(1, 2).flatten(1, 2)  # [H, dimension, slots]
    fragments = by_pair.unflatten(1, (num_fast // 8, 8)).unflatten(3, (layout.tiles - layout.slow_tiles, 2, 4, 2))
    fragments = fragments.permute(0, 3, 1, 2, 5, 4, 6).half()
    means = (mean / unit[..., 0]).unflatten(1, (2, num_fast // 2)).transpose(1, 2)
    offsets = torch.arange(ANCHOR_LENGTH, dtype=torch.float64, device="cpu")
    angles = offsets[:, None] * constants.frame.frequencies.cpu()[constants.frame.slow_pairs :]
    return matrix, norms, [fragments, means, torch.stack((angles.cos(), angles.sin()), dim=-1).float()]


def attend(
    query: Tensor,
    packed: Sequence[Tensor],
    dense: tuple[Tensor, Tensor, Tensor, Tensor],
    block_table: Tensor,
    left_padding: Tensor | None,
    keys: PreparedCodes,
    values: PreparedCodes,
    encoded_end: int,
    call: AttentionCall,
    paired: bool,
    splits: int | None = None,
) -> Tensor:
    """Attention over packed blocks, sinks and recent tokens.

    Args:
        query: ``[B, Hq, Tq, D]``, any strides.
        packed: The blocks: codes ``[n, B, words]`` int32 (:class:`BlockLayout`) and gains ``[n, B, H, 64]`` uint8 of
            the keys, then of the values.
        dense: Sinks of keys and values, ``[B, H, S, D]``, then the tokens behind the last block; the last Tq of them
            are the queries' own.
        block_table: First slot, valid tokens and anchor slot of every block, ``[n, 3]`` int32.
        left_padding: Left padding of every row, ``[B]``, or None. A row's sinks are its first valid tokens, and it sees
            blocks from the slot behind them on.
        keys: The keys' constants.
        values: The values'.
        encoded_end: Slot behind the last block.
        call: The rest of the call.
        paired: Whether blocks 2i and 2i + 1 share an anchor throughout, as they do unless a crop cut one.
        splits: Parts of the context, or None for what fits the device.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype.
    """
    device, (batch, query_heads, count, dim) = query.device, query.shape
    heads, n = keys.layout.heads, block_table.shape[0]
    total = query_heads // heads * count
    chunks = -(-total // ROWS)
    rows = -(-total // chunks)
    lines, slots = batch * chunks * heads, TILE * values.layout.tiles
    units = -(-n // 2) if paired else n

    grouped = (query.float() * call.scaling).reshape(batch, heads, total, dim)
    near, near_lse = near_attention(grouped, dense, left_padding, call, encoded_end, count)
    grouped, near, near_lse = (_in_chunks(each, chunks, rows) for each in (grouped, near, near_lse.unsqueeze(-1)))

    query_bytes = LANES * rows * (keys.layout.slow_tiles + keys.num_fast // TILE) + EXTRA_BYTES
    warps = WARPS_PER_PROCESSOR * _processors(device)
    per_split = -(-n // min(splits or choose_splits(units, lines, warps), n))
    per_split += per_split % 2  # the two blocks of an anchor stay together
    splits = -(-n // per_split)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    turned = empty(units, lines, query_bytes, dtype=torch.uint8)
    partial, stats = empty(splits, lines, rows, slots), empty(splits, lines, rows, 2)
    out, lse = empty(lines, rows, values.mean.shape[1]), empty(lines, rows)
    origins = first_seen = mask = None
    if left_padding is not None:
        origins = left_padding.int().contiguous()
        first_seen = origins + dense[0].shape[2]
    if call.mask is not None:
        mask = call.mask.contiguous()
    packed = [each.contiguous() for each in packed]
    block_table = block_table.contiguous()
    softcap = call.softcap or 0.0
    to_turn = QueryArguments(
        *map(pointer, (grouped, *keys.frame, keys.matrix, keys.norms, block_table, origins, turned)),
        units, paired, lines, heads, lines // batch, rows,
        dim, dim - keys.num_fast, keys.layout.slow_tiles, keys.num_fast, query_bytes,
        1.0 if softcap else LOG2_E,
    )  # fmt: skip
    room = keys.room, values.room
    to_attend = CodesArguments(
        *map(pointer, (*packed, turned, keys.heads, values.heads, keys.terms, values.terms, *keys.fast)),
        *map(pointer, (block_table, first_seen, mask, partial, stats)),
        n, batch, heads, chunks, rows, count, per_split, paired,
        4 * keys.layout.words, 4 * values.layout.words, query_bytes, *room,
        keys.layout.slow_tiles, keys.fast_tiles, keys.num_fast, values.layout.tiles,
        *((0, 0, 0) if mask is None else _mask_strides(mask)), softcap, ONE_HALVES,
    )  # fmt: skip
    to_merge = MergeArguments(
        *map(pointer, (partial, stats, near, near_lse, values.decoder, values.mean, out, lse)),
        lines, heads, rows, values.mean.shape[1], slots, splits,
    )  # fmt: skip
    groups = -(-units // (TURNED_ROWS // rows))
    shared = 256 + sum(room) + query_bytes + 512 * values.layout.tiles
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernels = LOADERS[device.type](device, keys.is_trellis, values.is_trellis)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        kernels["turn_queries"].launch((groups, lines), TURN_THREADS, 4 * (dim * TURNED_ROWS + ROWS), to_turn, stream)
        kernels["attend_codes"].launch((splits, lines), 32, shared, to_attend, stream)
        kernels["merge"].launch((rows, lines), 4 * to_merge.dim, to_merge.shared_bytes, to_merge, stream)
    joined = out.view(batch, chunks, heads, rows, -1).transpose(1, 2).flatten(2, 3)[:, :, :total]
    by_query = joined.unflatten(2, (query_heads // heads, count)).flatten(1, 2).transpose(1, 2)
    return by_query.to(query.dtype).contiguous()


def _in_chunks(x: Tensor, chunks: int, rows: int) -> Tensor:
    """``[B, H, R, ...]`` as ``[B, chunks, H, rows, ...]``, zero behind R."""
    missing = chunks * rows - x.shape[2]
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (chunks, rows)).transpose(1, 2).contiguous()


def _mask_strides(mask: Tensor) -> tuple[int, int, int]:
    """Bytes from row to row and from query to query of a contiguous mask, and its length."""
    shared = mask.shape[0] == 1, mask.shape[2] == 1
    return 0 if shared[0] else mask.stride(0), 0 if shared[1] else mask.stride(2), mask.shape[3]


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
