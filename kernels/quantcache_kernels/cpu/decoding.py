"""Decoding blocks to the vectors the model cached, as a function and as a torch operator.

Shapes as in :mod:`quantcache_kernels.cpu`.
"""

from __future__ import annotations

from ctypes import byref, pointer

import torch
from torch import Tensor

from quantcache_kernels.cpu.constants import Constants, require
from quantcache_kernels.cpu.library import check, loaded
from quantcache_kernels.cpu.structures import Decode
from quantcache_kernels.interface import BLOCK


def decode(
    codes: Tensor, gains: Tensor, constants: Constants, block_table: Tensor, left_padding: Tensor | None
) -> Tensor:
    """Decode whole blocks.

    Args:
        codes: ``[n, B, W]`` int32, contiguous, like all of these.
        gains: ``[n, B, H, 64]`` uint8.
        constants: The side's constants.
        block_table: ``[n, 3]`` int32.
        left_padding: What is taken from a row's slots for their positions, ``[B]`` int64, or None.

    Returns:
        ``[B, H, n * 64, D]`` float32.
    """
    if torch.compiler.is_compiling():
        return torch.ops.quantcache_kernels.cpu_decode(codes, gains, block_table, left_padding, *constants.flatten())
    return _decode(codes, gains, constants, block_table, left_padding)


def _decode(
    codes: Tensor, gains: Tensor, constants: Constants, block_table: Tensor, left_padding: Tensor | None
) -> Tensor:
    library = loaded()
    if codes.dim() != 3:
        raise ValueError(f"expected codes of 3 dimensions, got shape {list(codes.shape)}")
    (blocks, batch, _), heads = codes.shape, constants.num_heads
    codes = require("codes", codes, torch.int32, blocks, batch, constants.words)
    gains = require("gains", gains, torch.uint8, blocks, batch, heads, BLOCK)
    block_table = require("block_table", block_table, torch.int32, blocks, 3)
    if left_padding is not None:
        left_padding = require("left_padding", left_padding, torch.int64, batch)
    out = torch.empty((batch, heads, blocks * BLOCK, constants.dim), dtype=torch.float32, device="cpu")
    call = Decode(
        side=pointer(constants.structure("encode")),
        batch=batch,
        heads=heads,
        blocks=blocks,
        codes=codes.data_ptr(),
        gains=gains.data_ptr(),
        block_table=block_table.data_ptr(),
        left_padding=None if left_padding is None else left_padding.data_ptr(),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
        level=library.level,
    )
    check(library.decode(byref(call)))
    return out


@torch.library.custom_op("quantcache_kernels::cpu_decode", mutates_args=(), device_types="cpu")
def _decode_op(
    codes: Tensor,
    gains: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    constants: list[Tensor],
    sizes: list[int],
) -> Tensor:
    return _decode(codes, gains, Constants.unflatten(constants, sizes), block_table, left_padding)


@_decode_op.register_fake
def _(
    codes: Tensor,
    gains: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    constants: list[Tensor],
    sizes: list[int],
) -> Tensor:
    blocks, batch, heads, _ = gains.shape
    return codes.new_empty((batch, heads, blocks * BLOCK, sizes[1]), dtype=torch.float32)
