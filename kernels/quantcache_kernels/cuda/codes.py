"""Attention on a cache's blocks: its constants, and one call.

Shapes: B batch, Hq / H query / key-value heads, Tq queries, G = Hq / H, R = G Tq rows of queries that share a head, the
query index running fastest, D dimension, S slots of a side, n blocks.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quantcache_kernels.cuda import structures
from quantcache_kernels.cuda.blocks import BYTE_PLACES, HALF, LANES, TILE, BlockLayout
from quantcache_kernels.cuda.driver import load_codes
from quantcache_kernels.cuda.fast import lay_out_fast
from quantcache_kernels.cuda.memory import Memory
from quantcache_kernels.cuda.near import NEAR_THREADS, NearTokens, append_arguments, readable
from quantcache_kernels.cuda.ops import WARPS_PER_PROCESSOR, choose_splits
from quantcache_kernels.cuda.structures import CodesArguments, MergeArguments, Queries, QueryArguments, Rows, pointer
from quantcache_kernels.cuda.tables import PLACES, level_tables
from quantcache_kernels.interface import AttentionCall, SideConstants
from quantcache_kernels.triton.tables import HALF_TERMS, make_frame, power_of_two_above

LOG2_E = math.log2(math.e)

ROWS = 8
"""Rows of queries that a tile has columns for; more of them read the codes again."""

TURNED_ROWS, TURN_THREADS = 32, 128
"""As in codes.h."""

TERMS, ONE_HALVES = 8, 0x3C003C00
"""As in decoding.h."""

MAX_DIM = 256

KINDS = (torch.bfloat16, torch.float32)
"""Of numbers that the kernels read as they are given."""


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
        fast: Of keys, decoder of the fast part in fragment order, then its mean, and cosines and sines, by offset.
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

    A code of w bits stored in W is v = 1 + code / 2^W in half precision, or v = 1024 + 2^(8 - W) code where codes are
    bytes on their way. The first two terms take it to x = (code + 1/2) / 2^w - 1/2, without rounding. A path of k bits
    has the places of k + 1 bits.
    """
    is_trellis = constants.coding == "trellis"
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
    is_trellis = constants.coding == "trellis"
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
    by_tile = (fast / unit).unflatten(2, (layout.tiles - layout.slow_tiles, TILE))
    frequencies = constants.frame.frequencies.cpu()[constants.frame.slow_pairs :]
    return matrix, norms, lay_out_fast(by_tile, mean / unit[..., 0], frequencies)


class Starts(NamedTuple):
    """Where the rows of a padded batch begin.

    Attributes:
        origins: Slot of every row's first token, ``[B]`` int32.
        first_seen: Slot behind its sinks, ``[B]`` int32: it sees blocks from there on.
    """

    origins: Tensor
    first_seen: Tensor


def attend(
    query: Tensor,
    packed: Sequence[Tensor],
    near: NearTokens,
    block_table: Tensor,
    starts: Starts | None,
    keys: PreparedCodes,
    values: PreparedCodes,
    encoded_end: int,
    call: AttentionCall,
    paired: bool,
    splits: int | None = None,
    memory: Memory | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over packed blocks, sinks and recent tokens.

    Args:
        query: ``[B, Hq, Tq, D]``, any strides.
        packed: The blocks: codes ``[n, B, words]`` int32 (:class:`BlockLayout`) and gains ``[n, B, H, 64]`` uint8 of
            the keys, then of the values.
        near: Sinks and the tokens behind the last block; the last Tq of them are the queries' own.
        block_table: First slot, valid tokens and anchor slot of every block, ``[n, 3]`` int32.
        starts: Where padded rows begin; None for slot 0 throughout. A row's sinks are its first valid tokens.
        keys: The keys' constants.
        values: The values'.
        encoded_end: Slot behind the last block.
        call: The rest of the call.
        paired: Whether blocks 2i and 2i + 1 share an anchor throughout, as they do unless a crop cut one.
        splits: Parts of the context, or None for what fits the device.
        memory: What other calls on this stream use too; None for memory of this call's own.
        out: Where the result goes, ``[B, Tq, Hq, Dv]`` contiguous; None for a new tensor.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype, float32 or bfloat16.
    """
    device, (batch, query_heads, count, dim) = query.device, query.shape
    heads, n = keys.layout.heads, block_table.shape[0]
    total = query_heads // heads * count
    chunks = -(-total // ROWS)
    place = Rows(heads, chunks, -(-total // chunks), count, total)
    rows, lines = place.rows, batch * chunks * heads
    slots, value_dim = TILE * values.layout.tiles, values.mean.shape[1]
    units = -(-n // 2) if paired else n
    near, query = near.readable(), query if query.stride(3) == 1 else query.contiguous()

    query_bytes = LANES * rows * (keys.layout.slow_tiles + keys.num_fast // TILE) + structures.EXTRA_BYTES
    warps = WARPS_PER_PROCESSOR * _processors(device)
    per_split = -(-units // min(splits or choose_splits(units, lines, warps), units))
    splits = -(-units // per_split)

    vectors = lines * rows  # of every split
    sizes = units * lines * query_bytes, 4 * splits * vectors * slots, 8 * splits * vectors
    near_sizes = 4 * near.splits * vectors * value_dim, 4 * near.splits * vectors
    memory = memory or Memory()  # held until everything is launched
    turned, partial, stats, *found = memory.places((*sizes, *near_sizes), device)
    if out is None:
        out = torch.empty(batch, count, query_heads, value_dim, dtype=query.dtype, device=device)
    mask = None if call.mask is None else call.mask.contiguous()
    logits = None if call.sink_logits is None else call.sink_logits.contiguous()
    if logits is not None and logits.dtype not in KINDS:
        logits = logits.float()
    origins, first_seen = (None, None) if starts is None else starts
    packed = [each.contiguous() for each in packed]
    block_table = block_table.contiguous()
    strides, softcap = (0, 0, 0) if mask is None else _mask_strides(mask), call.softcap or 0.0
    queries = Queries(query.data_ptr(), *query.stride()[:3], place, _is_half(query), call.scaling)
    to_turn = QueryArguments(
        queries, *map(pointer, (*keys.frame, keys.matrix, keys.norms, block_table, origins)), turned,
        units, paired, lines, dim, dim - keys.num_fast, keys.layout.slow_tiles, keys.num_fast, query_bytes,
        1.0 if softcap else LOG2_E,
    )  # fmt: skip
    room = keys.room, values.room
    to_attend = CodesArguments(
        *map(pointer, packed), turned,
        *map(pointer, (keys.heads, values.heads, keys.terms, values.terms, *keys.fast)),
        *map(pointer, (block_table, first_seen, mask)), partial, stats,
        n, batch, heads, chunks, rows, count, units, per_split, paired,
        4 * keys.layout.words, 4 * values.layout.words, query_bytes, *room,
        keys.layout.slow_tiles, keys.fast_tiles, keys.num_fast // TILE, values.layout.tiles,
        *strides, softcap, ONE_HALVES,
    )  # fmt: skip
    to_near = near.arguments(queries, (pointer(origins), pointer(mask), pointer(logits), *found))
    to_near.encoded_end, to_near.causal, to_near.lines = encoded_end, call.hides_the_future(count), lines
    to_near.mask_batch, to_near.mask_query, to_near.mask_length = strides
    to_near.logits_are_half, to_near.softcap = logits is not None and _is_half(logits), softcap
    to_merge = MergeArguments(
        partial, stats, *found, *map(pointer, (values.decoder, values.mean, out)), None,
        place, lines, value_dim, slots, splits, near.splits, _is_half(out),
    )  # fmt: skip
    groups = -(-units // (TURNED_ROWS // rows))
    turn_bytes = 4 * (dim * TURNED_ROWS + ROWS + rows * dim)
    shared = structures.ROOM_BYTES + 2 * sum(room) + query_bytes + 512 * values.layout.tiles
    with on_device(device):
        kernels = LOADERS[device.type](device, keys.is_trellis, values.is_trellis)
        stream = stream_of(device)
        kernels["turn_queries"].launch((groups, lines), TURN_THREADS, turn_bytes, to_turn, stream)
        kernels["attend_codes"].launch((splits, lines), 32, shared, to_attend, stream)
        kernels["attend_near"].launch((near.splits, lines), NEAR_THREADS, near.shared_bytes(rows), to_near, stream)
        kernels["merge"].launch((rows, lines), 4 * value_dim, to_merge.shared_bytes, to_merge, stream)
    return out


def append(key: Tensor, value: Tensor, near: NearTokens, keys: PreparedCodes, values: PreparedCodes) -> None:
    """Put new tokens into a tail whose length only the device knows.

    Args:
        key: ``[B, H, Tnew, D]`` bfloat16.
        value: ``[B, H, Tnew, Dv]``.
        near: Where the tail lies, and how many tokens it has, these included.
        keys: The keys' constants: they say which module is loaded.
        values: The values'.
    """
    arguments, device = append_arguments(readable(key), readable(value), near), key.device
    with on_device(device):
        kernels = LOADERS[device.type](device, keys.is_trellis, values.is_trellis)
        kernels["append_tail"].launch((arguments.vectors, 2), 32, 0, arguments, stream_of(device))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream_of(device: torch.device) -> int:
    """Raw handle of a device's current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _is_half(tensor: Tensor) -> bool:
    """Whether numbers are of bfloat16; else they are of float32."""
    if tensor.dtype not in KINDS:
        raise ValueError(f"the CUDA kernels take numbers of bfloat16 and float32, got {tensor.dtype}")
    return tensor.dtype == torch.bfloat16


def _mask_strides(mask: Tensor) -> tuple[int, int, int]:
    """Bytes from row to row and from query to query of a contiguous mask, and its length."""
    shared = mask.shape[0] == 1, mask.shape[2] == 1
    return 0 if shared[0] else mask.stride(0), 0 if shared[1] else mask.stride(2), mask.shape[3]


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
