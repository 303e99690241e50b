"""Decode attention on packed codes: what a call needs, and its four launches.

Shapes: B batch, Hq and H query and key/value heads, Tq queries, R = G Tq rows of queries that share a head, the query
index running fastest, D and Dv dimensions, S slots, n blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcache_kernels.triton import runtime
from quantcache_kernels.triton.codes import ONE_HALVES
from quantcache_kernels.triton.decode_attention import attend_kernel, merge_kernel
from quantcache_kernels.triton.dense_attention import dense_kernel
from quantcache_kernels.triton.queries import query_kernel
from quantcache_kernels.triton.runtime import operand_type, power_of_two, processors, stored_type
from quantcache_kernels.triton.tables import TILE

TOP = 4096.0
"""Every row of queries is brought below it: half precision then neither overflows nor loses small entries."""


@dataclass
class Settings:
    """What could be tuned, chosen once for all callers: every variant costs seconds to compile.

    Attributes:
        stages: Pipeline stages of the attention kernel; 1 leaves the overlap of loads and work to its many programs.
        programs_per_processor: Programs that a multiprocessor is given.
        least_split: Blocks in a split, at least: below that the merge costs more than the parallelism brings.
        narrow: Whether up to eight rows of queries take a tile of eight where the tensor cores have one.
        warps: Warps of a program of the attention kernel.
        registers: How many registers its threads may have, on NVIDIA; None for as many as they want.
    """

    stages: int = 1
    programs_per_processor: int = 8
    least_split: int = 4
    narrow: bool = True
    warps: int = 1
    registers: int | None = None


SETTINGS = Settings()
"""Read at every call; benchmarks/gpu_decode.py varies it."""


class KeyTables(NamedTuple):
    """Tables of the keys' side, as the kernels take them.

    Attributes:
        frame: Order, partner, sign and turns.
        queries: Slow decoder, mean and norms, for the queries' kernel.
        codes: See ``tables.CodeTables.tensors``.
        fast: Decoder, mean and rotation of the fast part.
    """

    frame: list[Tensor]
    queries: list[Tensor]
    codes: list[Tensor]
    fast: list[Tensor]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> KeyTables:
        """Take apart what an op is given."""
        return cls(tensors[:4], tensors[4:7], tensors[7:12], tensors[12:])


class KeySizes(NamedTuple):
    """Static sizes of the keys' side: dimensions, tiles, P, tiles up to the last with 8-bit codes."""

    dim: int
    num_slow: int
    slow_tiles: int
    fast_tiles: int
    padded: int
    wide_slow: int
    wide_fast: int
    trellis: int


class ValueTables(NamedTuple):
    """Tables of the values' side: ``tables.CodeTables.tensors``, then decoder and mean, for the merge."""

    codes: list[Tensor]
    merge: list[Tensor]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> ValueTables:
        """Take apart what an op is given."""
        return cls(tensors[:5], tensors[5:])


class ValueSizes(NamedTuple):
    """Static sizes of the values' side, likewise."""

    dim: int
    tiles: int
    wide: int
    trellis: int


class Call(NamedTuple):
    """What ``ops.attend`` is given; see there. Blocks and mask are contiguous."""

    query: Tensor
    packed: list[Tensor]
    dense: list[Tensor]
    block_table: Tensor
    left_padding: Tensor | None
    mask: Tensor | None
    sink_logits: Tensor | None
    keys: KeyTables
    key_sizes: KeySizes
    values: ValueTables
    value_sizes: ValueSizes
    encoded_end: int
    scaling: float
    softcap: float | None
    causal: bool
    paired: bool

    def given(self, tensor: Tensor | None) -> Tensor:
        """A tensor, or what stands in for one that is not there and is never read."""
        return self.block_table if tensor is None else tensor

    @property
    def mask_strides(self) -> tuple[int, int, int]:
        """From row to row and from query to query of the mask, and its length."""
        if self.mask is None:
            return 0, 0, 0
        return 0 if self.mask.shape[0] == 1 else self.mask.stride(0), self.mask.stride(2), self.mask.shape[3]

    @property
    def flags(self) -> dict[str, bool]:
        """What of a call makes variants of the kernels that look at tokens."""
        return {
            "HAS_STARTS": self.left_padding is not None,
            "HAS_MASK": self.mask is not None,
            "HAS_SOFTCAP": self.softcap is not None,
        }


@dataclass(frozen=True)
class Plan:
    """How a call is cut up, and the memory that its kernels write.

    Attributes:
        rows: R.
        tile: Rows of queries that a program of ``attend_kernel`` takes.
        anchors: Anchors that queries are brought to.
        per_split: Blocks of a split.
        splits: Parts of the context.
        queries: Queries in coded coordinates, ``[anchors, B, H, R, slow slots + 2 P]``.
        scales: Their units, and their scores against the slow mean, ``[anchors, B, H, 2, R]``.
        partial: Weighted sums of levels, ``[splits, B, H, R, S]``.
        stats: Their peaks (base 2) and sums, ``[splits, B, H, 2, R]``.
        near: Weighted sums of the values of sinks and recent tokens, ``[B, H, R, Dv]``.
        near_stats: Their peaks and sums, ``[B, H, 2, R]``.
        out: Where the result goes, ``[B, Tq, Hq, Dv]``.
        lse: And the log-sum-exp of the scores, ``[B, H, R]``.
    """

    rows: int
    tile: int
    anchors: int
    per_split: int
    splits: int
    queries: Tensor
    scales: Tensor
    partial: Tensor
    stats: Tensor
    near: Tensor
    near_stats: Tensor
    out: Tensor
    lse: Tensor


def choose_split(n: int, lines: int, device: torch.device) -> int:
    """How many blocks a split best has.

    Args:
        n: Blocks.
        lines: Programs of one split.
        device: Where it runs.

    Returns:
        An even number: the two blocks of an anchor stay together.
    """
    programs = SETTINGS.programs_per_processor * processors(device)
    wanted = max(1, min(programs // max(1, lines), n // SETTINGS.least_split))
    per_split = -(-n // wanted)
    return per_split + per_split % 2


def plan(call: Call) -> Plan:
    """Sizes and memory of a call.

    Args:
        call: The call.

    Returns:
        The plan.
    """
    batch, query_heads, count, dim = call.query.shape
    n, device, heads = call.block_table.shape[0], call.query.device, call.dense[0].shape[1]
    rows = query_heads // heads * count
    # The interpreter takes the narrow tile too, so that tests cover it.
    narrow = SETTINGS.narrow and rows <= 8 and torch.version.hip is None and device.type != "xpu"
    tile = 8 if narrow else 16
    per_split = choose_split(n, batch * heads * -(-rows // tile), device)
    splits, anchors = -(-n // per_split), (n + 1) // 2 if call.paired else n
    slots, padded = TILE * call.key_sizes.slow_tiles, call.key_sizes.padded

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    queries = empty(anchors, batch, heads, rows, slots + 2 * padded, kind=call.keys.fast[0].dtype)
    if padded != (dim - call.key_sizes.num_slow) // 2:
        queries[..., slots:].zero_()  # the padding of the fast halves
    return Plan(
        rows, tile, anchors, per_split, splits, queries,
        scales=empty(anchors, batch, heads, 2, rows),
        partial=empty(splits, batch, heads, rows, TILE * call.value_sizes.tiles),
        stats=empty(splits, batch, heads, 2, rows),
        near=empty(batch, heads, rows, call.value_sizes.dim),
        near_stats=empty(batch, heads, 2, rows),
        out=empty(batch, count, query_heads, call.value_sizes.dim, kind=stored_type(call.query.dtype)),
        lse=empty(batch, heads, rows),
    )  # fmt: skip


def launch(call: Call, made: Plan) -> None:
    """Launch a call on the current stream.

    Args:
        call: The call.
        made: Its plan; ``out`` and ``lse`` are written.
    """
    _turn_queries(call, made)
    _attend_codes(call, made)
    _attend_near(call, made)
    _merge(call, made)


def _turn_queries(call: Call, made: Plan) -> None:
    batch, _, count, dim = call.query.shape
    heads, sizes = call.dense[0].shape[1], call.key_sizes
    rows = power_of_two(min(made.rows, 16), 1)
    anchors, slots = 64 // rows, TILE * sizes.slow_tiles
    base = math.log2(math.e) if call.softcap is None else 1.0  # a soft cap comes in between
    # Tensor cores, unless the model is of float32.
    fast = runtime.on_cuda(call.query.device) and made.queries.dtype == torch.float16
    query_kernel[(-(-made.anchors // anchors), heads, batch * -(-made.rows // rows))](
        call.query, *call.keys.frame, *call.keys.queries,
        call.block_table, call.given(call.left_padding), call.scaling, base,
        made.queries, made.scales, *call.query.stride(), made.rows, count, batch, made.anchors,
        D=dim, DS=sizes.num_slow, SS=slots, SP=power_of_two(slots), HALF=(dim - sizes.num_slow) // 2, P=sizes.padded,
        TOP=TOP, PAIRED=call.paired, HAS_STARTS=call.left_padding is not None,
        PRECISION="tf32x3" if fast else "ieee", ROWS=rows, ANCHORS=anchors, num_warps=8,
    )  # fmt: skip


def _attend_codes(call: Call, made: Plan) -> None:
    keys, key_gains, values, value_gains = call.packed
    sizes, value_sizes, device = call.key_sizes, call.value_sizes, call.query.device
    batch, _, count, _ = call.query.shape
    limits: dict[str, Any] = {}
    if SETTINGS.registers and runtime.on_cuda(device):
        limits["maxnreg"] = SETTINGS.registers
    attend_kernel[(made.splits, call.dense[0].shape[1], batch * -(-made.rows // made.tile))](
        made.queries, made.scales, keys.view(torch.uint32), key_gains, *call.keys.codes,
        values.view(torch.uint32), value_gains, *call.values.codes,
        *call.keys.fast, call.block_table, call.given(call.left_padding), call.given(call.mask),
        made.partial, made.stats,
        made.rows, call.block_table.shape[0], batch, count, made.per_split, keys.shape[2], values.shape[2],
        *call.mask_strides, call.dense[0].shape[2], call.softcap or 0.0, ONE_HALVES, 0,
        SLOW=sizes.slow_tiles, FAST=sizes.fast_tiles, VALUE=value_sizes.tiles, P=sizes.padded,
        WIDE=bool(sizes.wide_slow or sizes.wide_fast or value_sizes.wide),
        KEY_POLYNOMIAL=call.keys.codes[3].dtype == torch.float16,
        VALUE_POLYNOMIAL=call.values.codes[3].dtype == torch.float16,
        KEY_TRELLIS=bool(sizes.trellis), VALUE_TRELLIS=bool(value_sizes.trellis),
        PRECISION="ieee", PAIRED=call.paired, **call.flags,
        ALL_VISIBLE=call.paired and call.left_padding is None and call.mask is None, ROWS=made.tile,
        num_warps=SETTINGS.warps, num_stages=SETTINGS.stages, **limits,
    )  # fmt: skip


def _attend_near(call: Call, made: Plan) -> None:
    (batch, _, count, dim), value_dim = call.query.shape, call.value_sizes.dim
    kind = call.dense[2].dtype
    dense_kernel[(call.dense[0].shape[1], batch * -(-made.rows // 16))](
        call.query, *call.dense, call.given(call.left_padding), call.given(call.mask), made.near, made.near_stats,
        *call.query.stride(), *(size for x in call.dense for size in x.stride()), *call.mask_strides,
        made.rows, count, batch, call.dense[0].shape[2], call.dense[2].shape[2],
        call.encoded_end, call.scaling, call.softcap or 0.0,
        D=dim, DP=power_of_two(dim), DV=value_dim, DVP=power_of_two(value_dim), CAUSAL=call.causal, **call.flags,
        PRECISION="ieee", OPERAND=operand_type(kind), ROWS=16,
        num_warps=8 if kind == torch.float32 else 4, num_stages=1,
    )  # fmt: skip


def _merge(call: Call, made: Plan) -> None:
    batch, _, count, _ = call.query.shape
    slots = TILE * call.value_sizes.tiles
    merge_kernel[(made.rows, call.dense[0].shape[1], batch)](
        made.partial, made.stats, made.near, made.near_stats, call.given(call.sink_logits),
        *call.values.merge, made.out, made.lse, made.splits, batch, count,
        VS=slots, VP=power_of_two(slots), D=call.value_sizes.dim, CHUNK=16, COLUMNS=32,
        HAS_SINK_LOGITS=call.sink_logits is not None, num_warps=4,
    )  # fmt: skip
