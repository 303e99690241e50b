"""A side's constants, laid out once for every kernel that reads them.

A kernel's constants are a list of tensors and a list of sizes, which is what an op's schema can hold.

Shapes: H key/value heads, D dimension, S slots (tables.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.gpu_tables import make_frame, power_of_two_above
from quantcache_kernels.interface import ANCHOR_LENGTH, SideConstants
from quantcache_kernels.triton.tables import (
    LEAST_PAYLOAD,
    TILE,
    CodeTables,
    Slots,
    make_codes,
    make_search,
    make_slots,
)
from quantcache_kernels.triton.trellis import make_union_search

MAX_DIM = 256
"""Largest head dimension: above it a program's sums would not fit in registers."""


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
        encode: For ``ops.encode_blocks``.
        keys: For ``ops.attend`` as keys.
        values: For ``ops.attend`` as values.
        decode: For ``ops.decode_blocks``.
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
    decoder = slots.gather(constants.decoder, 2) * codes.scale[:, None]  # F in slots, [H, D, S]
    prepared = (
        _encoding(constants, slots, codes.trellis),
        _keys(constants, slots, codes, decoder, compute),
        _values(constants, slots, codes, decoder),
        _decoding(constants, slots, codes, decoder, compute),
    )
    return PreparedSide(*(Prepared([t.contiguous().to(device) for t in each.tensors], each.sizes) for each in prepared))


def _frame(constants: SideConstants) -> list[Tensor]:
    return make_frame(constants.frame).tensors()


def _encoding(constants: SideConstants, slots: Slots, is_trellis: bool) -> Prepared:
    """What ``encode.launch`` takes; of a trellis with what ``trellis.launch`` does."""
    width = slots.gather(constants.widths.int(), 1)
    books, bins, search = make_search(constants.levels)
    path: Sequence[Tensor] = ()
    if is_trellis:
        unions, union_search = make_union_search(constants.unions)
        path = union_search[width].transpose(1, 2), *unions
    tensors = [
        *_frame(constants),
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
    sizes = [
        constants.dim,
        constants.num_slow,
        slots.tiles * TILE,
        int(2 * constants.widths.sum()),
        int(not constants.frame.is_identity),
        int(is_trellis) * constants.passes,
    ]
    return Prepared(tensors, sizes)


def _keys(constants: SideConstants, slots: Slots, codes: CodeTables, decoder: Tensor, dtype: torch.dtype) -> Prepared:
    """What attention takes of keys; ``attention.KeyTables`` and ``attention.KeySizes`` take it apart."""
    slow_slots = slots.slow_tiles * TILE
    slow = decoder[:, :, :slow_slots].clone()
    slow[:, constants.num_slow :] = 0
    unit, fast = _fast_part(constants, decoder[:, constants.num_slow :, slow_slots:])
    norm = slow.norm(dim=1).amax(1) if slow_slots else torch.zeros_like(unit)
    norms = torch.stack((norm, unit), dim=1)
    tensors = [*_frame(constants), slow, constants.mean, norms, *codes.tensors(), fast[0].to(dtype), *fast[1:]]
    sizes = [
        constants.dim,
        constants.num_slow,
        slots.slow_tiles,
        slots.fast_tiles,
        fast[0].shape[-1],
        codes.wide_tiles(0, slots.slow_tiles),
        codes.wide_tiles(slots.slow_tiles, slots.tiles),
        int(codes.trellis),
    ]
    return Prepared(tensors, sizes)


def _fast_part(constants: SideConstants, fast: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Unit of the fast part, and in that unit what attention decodes and turns it with, in halves padded to P.

    Args:
        constants: The side.
        fast: Its decoder, fast rows by fast slots, ``[H, Df, Sf]``.

    Returns:
        The unit, ``[H]``; decoder ``[H, Sf, 2, P]``, mean ``[H, 2, P]``, and cosines and sines of every offset from an
        anchor, ``[128, 2, P]``.
    """
    heads, num_fast, half = fast.shape[0], fast.shape[1], fast.shape[1] // 2
    padded = -(-half // TILE) * TILE
    unit = torch.ones(heads, dtype=torch.float32, device="cpu")
    decoder = torch.zeros(heads, fast.shape[2], 2, padded, dtype=torch.float32, device="cpu")
    mean = torch.zeros(heads, 2, padded, dtype=torch.float32, device="cpu")
    rotation = torch.zeros(ANCHOR_LENGTH, 2, padded, dtype=torch.float32, device="cpu")
    if num_fast:
        fast_mean = constants.mean[:, constants.num_slow :]
        unit = power_of_two_above(torch.maximum(fast.abs().amax((1, 2)), fast_mean.abs().amax(1)))
        decoder[..., :half] = fast.unflatten(1, (2, half)).permute(0, 3, 1, 2) / unit[:, None, None, None]
        mean[..., :half] = fast_mean.unflatten(1, (2, half)) / unit[:, None, None]
        offsets = torch.arange(ANCHOR_LENGTH, dtype=torch.float64, device="cpu")
        turned = offsets[:, None] * constants.frame.frequencies.cpu()[constants.frame.slow_pairs :]
        rotation[:, 0, :half], rotation[:, 1, :half] = turned.cos().float(), turned.sin().float()
    return unit, [decoder, mean, rotation]


def _values(constants: SideConstants, slots: Slots, codes: CodeTables, decoder: Tensor) -> Prepared:
    """What attention takes of values; ``attention.ValueTables`` and ``attention.ValueSizes`` take it apart."""
    tensors = [*codes.tensors(), decoder.transpose(1, 2), constants.mean]
    return Prepared(tensors, [constants.dim, slots.tiles, codes.wide_tiles(0, slots.tiles), int(codes.trellis)])


def _decoding(
    constants: SideConstants, slots: Slots, codes: CodeTables, decoder: Tensor, dtype: torch.dtype
) -> Prepared:
    """What ``decode.launch`` takes."""
    unit = power_of_two_above(torch.maximum(decoder.abs().amax((1, 2)), constants.mean.abs().amax(1)))
    tensors = [
        *_frame(constants),
        *codes.tensors(),
        (decoder.transpose(1, 2) / unit[:, None, None]).to(dtype),
        constants.mean,
        unit,
    ]
    sizes = [
        constants.dim,
        constants.num_slow,
        slots.slow_tiles,
        slots.fast_tiles,
        int(not constants.frame.is_identity),
        int(codes.trellis),
    ]
    return Prepared(tensors, sizes)
