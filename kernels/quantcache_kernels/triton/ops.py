"""The three operations as torch.library ops: shapes for tracing, launches for running.

A side's constants are prepared once (:func:`prepare`) and passed to the ops as a list of tensors and a list of sizes,
which is what an op's schema can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.interface import ANCHOR_LENGTH, SideConstants
from quantcache_kernels.triton import decode, encode, runtime
from quantcache_kernels.triton.decode_attention import attend_kernel, merge_kernel
from quantcache_kernels.triton.dense_attention import dense_kernel
from quantcache_kernels.triton.queries import query_kernel
from quantcache_kernels.triton.runtime import (
    BLOCK,
    launch_on,
    operand_type,
    power_of_two,
    processors,
    stored_type,
    unavailable,
)
from quantcache_kernels.triton.tables import (
    LEAST_PAYLOAD,
    TILE,
    Slots,
    make_codes,
    make_frame,
    make_search,
    make_slots,
    power_of_two_above,
)
from quantcache_kernels.triton.trellis import make_union_search

LOG2_E = 1.4426950408889634

MAX_DIM = 256
"""Largest head dimension: above it a program's sums would not fit in registers."""


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


@dataclass(frozen=True)
class Prepared:
    """A side's constants for one kernel.

    Attributes:
        tensors: Tables on the device, in the order that the kernel takes them.
        sizes: Static sizes, likewise.
    """

    tensors: list[Tensor]
    sizes: list[int]


@dataclass(frozen=True)
class PreparedSide:
    """A side's constants for every kernel.

    Attributes:
        encode: For :func:`encode_blocks`.
        keys: For :func:`attend` as keys.
        values: For :func:`attend` as values.
        decode: For :func:`decode_blocks`.
    """

    encode: Prepared
    keys: Prepared
    values: Prepared
    decode: Prepared

    def held(self) -> list[Tensor]:
        """Every tensor of the tables."""
        return [t for part in (self.encode, self.keys, self.values, self.decode) for t in part.tensors]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the tensor cores are fed with for a model of a dtype: half precision for either half precision type."""
    return torch.float16 if dtype in (torch.float16, torch.bfloat16) else torch.float32


def unsupported(dim: int, num_fast: int, payload: int) -> str | None:
    """Why the kernels cannot take a side.

    Args:
        dim: D.
        num_fast: Fast dimensions.
        payload: Words in a block's codes.

    Returns:
        The reason, or None if they can.
    """
    if dim % TILE or num_fast % TILE or dim > MAX_DIM:
        return f"a dimension of {dim} ({num_fast} of them fast) is not a multiple of {TILE} up to {MAX_DIM}"
    if payload < LEAST_PAYLOAD:
        return f"a block has {payload} words of codes, fewer than {LEAST_PAYLOAD}"
    return None


def prepare(constants: SideConstants, dtype: torch.dtype, device: torch.device) -> PreparedSide:
    """Lay a side's constants out for the kernels.

    Args:
        constants: The side, on the CPU.
        dtype: The model's dtype: half precision for half precision models, float32 for others.
        device: Where the tables go.

    Returns:
        The tables.
    """
    compute = compute_dtype(dtype)
    slots = make_slots(constants.widths, constants.num_slow)
    codes = make_codes(constants, slots, compute)
    frame = make_frame(constants.frame).tensors()
    decoder = slots.gather(constants.decoder, 2) * codes.scale[:, None]  # F in slots, [H, D, S]
    keys = _keys(constants, slots, decoder, compute)
    unit = power_of_two_above(torch.maximum(decoder.abs().amax((1, 2)), constants.mean.abs().amax(1)))
    width = slots.gather(constants.widths.int(), 1)
    books, bins, search = make_search(constants.levels)
    path: list[Tensor] = []
    if codes.trellis:
        unions, union_search = make_union_search(constants.unions)
        path = [union_search[width].transpose(1, 2), *unions]
    whole = [constants.dim, constants.num_slow, slots.slow_tiles, slots.fast_tiles]

    def on_device(tensors: list[Tensor]) -> list[Tensor]:
        return [t.contiguous().to(device) for t in tensors]

    return PreparedSide(
        Prepared(
            on_device(
                [
                    *frame,
                    slots.gather(constants.encoder, 1),
                    constants.mean,
                    slots.gather(constants.weights, 1),
                    width,
                    slots.gather(constants.offsets.int(), 1),
                    search[width].transpose(1, 2),
                    (width > 0).sum(1, dtype=torch.int32).clamp_min(1),
                    *books,
                    bins,
                    torch.tensor(constants.gain_search, dtype=torch.float32, device="cpu"),
                    *path,
                ]
            ),
            [
                constants.dim,
                constants.num_slow,
                slots.tiles * TILE,
                int(2 * constants.widths.sum()),
                int(not constants.frame.is_identity),
                int(codes.trellis) * constants.passes,
            ],
        ),
        Prepared(
            on_device([*frame, *keys[0], *codes.tensors(), *keys[1]]),
            [
                *whole,
                keys[2],
                codes.wide_tiles(0, slots.slow_tiles),
                codes.wide_tiles(slots.slow_tiles, slots.tiles),
                int(codes.trellis),
            ],
        ),
        Prepared(
            on_device([*codes.tensors(), decoder.transpose(1, 2), constants.mean]),
            [constants.dim, slots.tiles, codes.wide_tiles(0, slots.tiles), int(codes.trellis)],
        ),
        Prepared(
            on_device(
                [
                    *frame,
                    *codes.tensors(),
                    (decoder.transpose(1, 2) / unit[:, None, None]).to(compute),
                    constants.mean,
                    unit,
                ]
            ),
            [*whole, int(not constants.frame.is_identity), int(codes.trellis)],
        ),
    )


def _keys(
    constants: SideConstants, slots: Slots, decoder: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], int]:
    """What attention on keys needs beyond the codes' tables: for queries, for the fast part, and its padded half."""
    heads, num_slow, num_fast = decoder.shape[0], constants.num_slow, constants.dim - constants.num_slow
    slow_slots, half = slots.slow_tiles * TILE, num_fast // 2
    padded = -(-half // TILE) * TILE
    slow = decoder[:, :, :slow_slots].clone()
    slow[:, num_slow:] = 0
    fast = decoder[:, num_slow:, slow_slots:]
    fast_mean = constants.mean[:, num_slow:]
    norms = torch.ones(heads, 2, dtype=torch.float32, device="cpu")
    norms[:, 0] = slow.norm(dim=1).amax(1) if slow_slots else 0
    fast_decoder = torch.zeros(heads, fast.shape[2], 2, padded, dtype=torch.float32, device="cpu")
    mean = torch.zeros(heads, 2, padded, dtype=torch.float32, device="cpu")
    rotation = torch.zeros(ANCHOR_LENGTH, 2, padded, dtype=torch.float32, device="cpu")
    if num_fast:
        norms[:, 1] = power_of_two_above(torch.maximum(fast.abs().amax((1, 2)), fast_mean.abs().amax(1)))
        fast_decoder[..., :half] = fast.unflatten(1, (2, half)).permute(0, 3, 1, 2) / norms[:, 1, None, None, None]
        mean[..., :half] = fast_mean.unflatten(1, (2, half)) / norms[:, 1, None, None]
        offsets = torch.arange(ANCHOR_LENGTH, dtype=torch.float64, device="cpu")
        turned = offsets[:, None] * constants.frame.frequencies.cpu()[constants.frame.slow_pairs :]
        rotation[:, 0, :half], rotation[:, 1, :half] = turned.cos().float(), turned.sin().float()
    return [slow, constants.mean, norms], [fast_decoder.to(dtype), mean, rotation], padded


def _check(device: torch.device) -> None:
    reason = unavailable(device)
    if reason is not None:
        raise RuntimeError(reason)


@torch.library.custom_op("quantcache_kernels::encode_blocks", mutates_args=())
def encode_blocks(
    x: Tensor, block_table: Tensor, left_padding: Tensor | None, tables: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Encode whole blocks.

    Args:
        x: Keys or values as the model caches them, ``[B, H, n * 64, D]``, any strides.
        block_table: First slot, valid tokens and anchor slot of every block, ``[n, 3]`` int32.
        left_padding: Left padding of every row, ``[B]``, or None.
        tables: ``PreparedSide.encode.tensors``.
        sizes: ``PreparedSide.encode.sizes``.

    Returns:
        Codes ``[n, B, W]`` int32 and gains ``[n, B, H, 64]`` uint8.
    """
    _check(x.device)
    batch, heads, length, _ = x.shape
    codes = torch.empty(length // BLOCK, batch, sizes[3], dtype=torch.int32, device=x.device)
    gains = torch.empty(length // BLOCK, batch, heads, BLOCK, dtype=torch.uint8, device=x.device)
    with launch_on(x.device):
        encode.launch(x, block_table, left_padding, tables, sizes, codes, gains)
    return codes, gains


@encode_blocks.register_fake
def _(
    x: Tensor, block_table: Tensor, left_padding: Tensor | None, tables: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    n = x.shape[2] // BLOCK
    codes = x.new_empty(n, x.shape[0], sizes[3], dtype=torch.int32)
    return codes, x.new_empty(n, x.shape[0], x.shape[1], BLOCK, dtype=torch.uint8)


@torch.library.custom_op("quantcache_kernels::decode_blocks", mutates_args=())
def decode_blocks(
    codes: Tensor,
    gains: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode blocks to the vectors the model cached.

    Args:
        codes: ``[n, B, W]`` int32.
        gains: ``[n, B, H, 64]`` uint8.
        block_table: ``[n, 3]`` int32.
        left_padding: Left padding of every row, ``[B]``, or None.
        tables: ``PreparedSide.decode.tensors``.
        sizes: ``PreparedSide.decode.sizes``.
        dtype: dtype of the result.

    Returns:
        ``[B, H, n * 64, D]``, slots beyond a block's valid length included.
    """
    _check(codes.device)
    n, batch, heads, _ = gains.shape
    out = torch.empty(batch, heads, n * BLOCK, sizes[0], dtype=dtype, device=codes.device)
    with launch_on(codes.device):
        decode.launch(codes.contiguous(), gains.contiguous(), block_table, left_padding, tables, sizes, out)
    return out


@decode_blocks.register_fake
def _(
    codes: Tensor,
    gains: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    tables: list[Tensor],
    sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    n, batch, heads, _ = gains.shape
    return gains.new_empty(batch, heads, n * BLOCK, sizes[0], dtype=dtype)


@torch.library.custom_op("quantcache_kernels::attend", mutates_args=())
def attend(
    query: Tensor,
    packed: list[Tensor],
    dense: list[Tensor],
    block_table: Tensor,
    left_padding: Tensor | None,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    key_tables: list[Tensor],
    key_sizes: list[int],
    value_tables: list[Tensor],
    value_sizes: list[int],
    encoded_end: int,
    scaling: float,
    softcap: float | None,
    causal: bool,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over packed blocks, sinks and recent tokens.

    Args:
        query: ``[B, Hq, Tq, D]``, any strides.
        packed: The blocks: codes ``[n, B, W]`` int32 and gains ``[n, B, H, 64]`` uint8 of the keys, then of the values.
        dense: Sinks of keys ``[B, H, S, D]`` and values ``[B, H, S, Dv]``, then the tokens behind the last block,
            ``[B, H, t, D]`` and ``[B, H, t, Dv]``; the last Tq of them are the queries' own.
        block_table: First slot, valid tokens and anchor slot of every block, ``[n, 3]`` int32.
        left_padding: Left padding of every row, ``[B]``, or None. A row's sinks are its first valid tokens, and it sees
            blocks from the slot behind them on.
        mask: Which slots a query may see besides, ``[B or 1, 1, Tq, T]`` bool, or None.
        sink_logits: Logits that join the softmax without a value, ``[Hq]``, or None.
        key_tables: ``PreparedSide.keys.tensors`` of the keys.
        key_sizes: ``PreparedSide.keys.sizes`` of the keys.
        value_tables: ``PreparedSide.values.tensors`` of the values.
        value_sizes: ``PreparedSide.values.sizes`` of the values.
        encoded_end: Slot behind the last block.
        scaling: Factor of the scores.
        softcap: Soft cap of the scores, or None.
        causal: Whether queries see only what precedes them.
        paired: Whether blocks 2i and 2i + 1 share an anchor throughout, as they do unless a crop cut one.

    Returns:
        Output ``[B, Tq, Hq, Dv]`` in the query's dtype, and the log-sum-exp of the scores ``[B, H, G * Tq]``, float32.
    """
    _check(query.device)
    batch, query_heads, count, dim = query.shape
    n, device, heads = block_table.shape[0], query.device, dense[0].shape[1]
    rows = query_heads // heads * count
    _, num_slow, slow_tiles, fast_tiles, padded, wide_slow, wide_fast, key_trellis = key_sizes
    value_dim, value_tiles, wide_value, value_trellis = value_sizes
    frame, (slow_decoder, key_mean, norms), key_code, (fast_decoder, fast_mean, rotation) = (
        key_tables[:4], key_tables[4:7], key_tables[7:12], key_tables[12:],
    )  # fmt: skip
    dtype = fast_decoder.dtype
    # The interpreter takes the narrow tile too, so that tests cover it.
    narrow = SETTINGS.narrow and rows <= 8 and torch.version.hip is None and device.type != "xpu"
    tile = 8 if narrow else 16
    row_tiles = -(-rows // tile)
    programs = SETTINGS.programs_per_processor * processors(device)
    wanted = max(1, min(programs // max(1, batch * heads * row_tiles), n // SETTINGS.least_split))
    per_split = -(-n // wanted)
    per_split += per_split % 2  # the two blocks of an anchor stay together
    splits = -(-n // per_split)
    anchors = (n + 1) // 2 if paired else n
    slots, value_slots = 16 * slow_tiles, 16 * value_tiles

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device)

    queries = empty(anchors, batch, heads, rows, slots + 2 * padded, kind=dtype)
    scales = empty(anchors, batch, heads, 2, rows)
    partial, stats = empty(splits, batch, heads, rows, value_slots), empty(splits, batch, heads, 2, rows)
    near, near_stats = empty(batch, heads, rows, value_dim), empty(batch, heads, 2, rows)
    out = empty(batch, count, query_heads, value_dim, kind=stored_type(query.dtype))
    lse = empty(batch, heads, rows)
    if padded != (dim - num_slow) // 2:
        queries[..., slots:].zero_()  # the padding of the fast halves
    keys, key_gains, values, value_gains = (t.contiguous() for t in packed)
    mask_strides = (0, 0, 0)
    if mask is not None:
        mask = mask.contiguous()
        mask_strides = (0 if mask.shape[0] == 1 else mask.stride(0), mask.stride(2), mask.shape[3])
    none = block_table  # stands in for what is not there; never read
    has_starts, has_mask, has_softcap = left_padding is not None, mask is not None, softcap is not None
    left_padding, mask = none if left_padding is None else left_padding, none if mask is None else mask
    sharp = dense[2].dtype == torch.float32
    limits = {"maxnreg": SETTINGS.registers} if SETTINGS.registers and runtime.on_cuda(device) else {}
    with launch_on(device):
        query_rows = power_of_two(min(rows, 16), 1)
        query_anchors = 64 // query_rows
        query_kernel[(-(-anchors // query_anchors), heads, batch * -(-rows // query_rows))](
            query, *frame, slow_decoder, key_mean, norms,
            block_table, left_padding, scaling, 1.0 if has_softcap else LOG2_E,
            queries, scales, *query.stride(), rows, count, batch, anchors,
            D=dim, DS=num_slow, SS=slots, SP=power_of_two(slots), HALF=(dim - num_slow) // 2, P=padded,
            TOP=4096.0, PAIRED=paired, HAS_STARTS=has_starts,
            # Tensor cores, unless the model is of float32.
            PRECISION="tf32x3" if runtime.on_cuda(device) and dtype == torch.float16 else "ieee",
            ROWS=query_rows, ANCHORS=query_anchors, num_warps=8,
        )  # fmt: skip
        attend_kernel[(splits, heads, batch * row_tiles)](
            queries, scales, keys.view(torch.uint32), key_gains, *key_code,
            values.view(torch.uint32), value_gains, *value_tables[:5],
            fast_decoder, fast_mean, rotation, block_table, left_padding, mask, partial, stats,
            rows, n, batch, count, per_split, keys.shape[2], values.shape[2], *mask_strides,
            dense[0].shape[2], softcap or 0.0, 0x3C003C00, 0,
            SLOW=slow_tiles, FAST=fast_tiles, VALUE=value_tiles, P=padded,
            WIDE=bool(wide_slow or wide_fast or wide_value),
            KEY_POLYNOMIAL=key_code[3].dtype == torch.float16, VALUE_POLYNOMIAL=value_tables[3].dtype == torch.float16,
            KEY_TRELLIS=bool(key_trellis), VALUE_TRELLIS=bool(value_trellis),
            PRECISION="ieee", PAIRED=paired, HAS_STARTS=has_starts, HAS_MASK=has_mask, HAS_SOFTCAP=has_softcap,
            ALL_VISIBLE=paired and not has_starts and not has_mask, ROWS=tile,
            num_warps=SETTINGS.warps, num_stages=SETTINGS.stages, **limits,
        )  # fmt: skip
        dense_kernel[(heads, batch * -(-rows // 16))](
            query, *dense, left_padding, mask, near, near_stats,
            *query.stride(), *(size for x in dense for size in x.stride()), *mask_strides, rows, count, batch,
            dense[0].shape[2], dense[2].shape[2], encoded_end, scaling, softcap or 0.0,
            D=dim, DP=power_of_two(dim), DV=value_dim, DVP=power_of_two(value_dim), CAUSAL=causal,
            HAS_STARTS=has_starts, HAS_MASK=has_mask, HAS_SOFTCAP=has_softcap, PRECISION="ieee",
            OPERAND=operand_type(dense[2].dtype), ROWS=16, num_warps=8 if sharp else 4, num_stages=1,
        )  # fmt: skip
        merge_kernel[(rows, heads, batch)](
            partial, stats, near, near_stats, none if sink_logits is None else sink_logits,
            value_tables[5], value_tables[6], out, lse, splits, batch, count,
            VS=value_slots, VP=power_of_two(value_slots), D=value_dim, CHUNK=16, COLUMNS=32,
            HAS_SINK_LOGITS=sink_logits is not None, num_warps=4,
        )  # fmt: skip
    return out.to(query.dtype), lse


@attend.register_fake
def _(
    query: Tensor,
    packed: list[Tensor],
    dense: list[Tensor],
    block_table: Tensor,
    left_padding: Tensor | None,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    key_tables: list[Tensor],
    key_sizes: list[int],
    value_tables: list[Tensor],
    value_sizes: list[int],
    encoded_end: int,
    scaling: float,
    softcap: float | None,
    causal: bool,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    batch, query_heads, count, _ = query.shape
    heads = dense[0].shape[1]
    lse = query.new_empty(batch, heads, query_heads // heads * count, dtype=torch.float32)
    return query.new_empty(batch, count, query_heads, value_sizes[0]), lse
