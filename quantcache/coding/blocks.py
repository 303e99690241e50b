"""Blocks of 64 tokens, and what a cache layer needs of a codec for them.

Shapes: B batch, H key/value heads, D dimension, n blocks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quantcache.coding.packing import BLOCK


class SideCodec(Protocol):
    """What a cache layer needs of a codec.

    ``block_table`` says where n blocks lie: ``[n, 3]`` int32, each row the slot of the block's first token, how many
    of its tokens are valid (64 unless a crop cut it), and the slot of its anchor. ``left_padding`` is what is to be
    taken from a slot for its position, by row ``[B]``. Fields have a leading block dimension.
    """

    bits: float | None
    """Mean bits of codes and gains per element, None where blocks stay in the model's dtype."""

    def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
        """Encode n blocks, x ``[B, H, n * 64, D]``; fields come back as ``[n, B, ...]``."""
        ...

    def decode(self, fields: dict[str, Tensor], block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        """Decode n blocks of fields ``[n, B, ...]`` to ``[B, H, n * 64, D]``."""
        ...

    def tensors(self) -> list[Tensor]:
        """The constants."""
        ...


class DenseCodec:
    """Blocks kept as they are, in the model's dtype: a side with no bits of its own."""

    bits = None

    def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
        """Keep n blocks ``[B, H, n * 64, D]`` as ``dense`` ``[n, B, H, 64, D]``."""
        return {"dense": split_blocks(x)}

    def decode(self, fields: dict[str, Tensor], block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        """Return n blocks of ``dense`` ``[n, B, H, 64, D]`` as ``[B, H, n * 64, D]``."""
        return join_blocks(fields["dense"])

    def tensors(self) -> list[Tensor]:
        """No constants."""
        return []


def split_blocks(x: Tensor) -> Tensor:
    """``[B, H, n * 64, D]`` to ``[n, B, H, 64, D]``."""
    blocks: Tensor = x.unflatten(2, (-1, BLOCK))
    return blocks.permute(2, 0, 1, 3, 4)


def join_blocks(blocks: Tensor) -> Tensor:
    """``[n, B, H, 64, D]`` to ``[B, H, n * 64, D]``."""
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)


def block_slots(block_table: Tensor) -> Tensor:
    """Slots of all tokens of some blocks.

    Args:
        block_table: ``[n, 3]``.

    Returns:
        int64, ``[n * 64]``.
    """
    return (block_table[:, :1] + torch.arange(BLOCK, dtype=torch.int64, device=block_table.device)).flatten()


def holds_tokens(block_table: Tensor) -> Tensor:
    """Which of the slots of some blocks hold a token: a block that a crop has cut is not full.

    Args:
        block_table: ``[n, 3]``.

    Returns:
        bool, ``[n * 64]``.
    """
    return block_slots(block_table) < (block_table[:, 0] + block_table[:, 1]).repeat_interleave(BLOCK)


def block_positions(block_table: Tensor, left_padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions of all tokens of some blocks and of their anchors; a row's positions count from its first valid token.

    Args:
        block_table: ``[n, 3]``.
        left_padding: Left padding of every row, ``[B]``, or None; ``[B, n * 64]`` where tokens of a row differ.

    Returns:
        Two int64 tensors ``[B or 1, n * 64]``.
    """
    slots, anchors = block_slots(block_table), block_table[:, 2].long().repeat_interleave(BLOCK)
    if left_padding is None:
        return slots[None], anchors[None]
    shift = left_padding if left_padding.ndim == 2 else left_padding[:, None]
    return slots - shift, anchors - shift
