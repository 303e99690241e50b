"""Where a layer's blocks lie, as Python knows it and as kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import ANCHOR_LENGTH


@dataclass(frozen=True)
class Span:
    """Where one block lies.

    Attributes:
        start: Slot of the block's first token.
        length: Tokens of the block that are valid, 1 to 64 (less than 64 only after a crop).
        anchor: Slot of the block's anchor.
    """

    start: int
    length: int
    anchor: int

    @property
    def end(self) -> int:
        """Slot behind the last valid token."""
        return self.start + self.length


def next_spans(previous: Span | None, lead: int, count: int) -> list[Span]:
    """The spans of new blocks: two share an anchor, unless a crop has shortened one.

    Args:
        previous: The last block, or None.
        lead: Slot of the very first block.
        count: How many blocks.

    Returns:
        Their spans.
    """
    spans: list[Span] = []
    for _ in range(count):
        start = previous.end if previous else lead
        shared = previous is not None and start + BLOCK <= previous.anchor + ANCHOR_LENGTH
        previous = Span(start, BLOCK, previous.anchor if shared and previous else start)
        spans.append(previous)
    return spans


def block_table_of(spans: list[Span], device: torch.device) -> Tensor:
    """What kernels read of spans that :func:`next_spans` gave, or of a single one.

    The table is computed on the device: copying it there would make the CPU wait for all work that is under way.

    Args:
        spans: The spans.
        device: Where to.

    Returns:
        ``[n, 3]`` int32 (see ``SideCodec``).
    """
    first, alone = spans[0], sum(span.anchor == spans[0].anchor for span in spans[:2])
    index = torch.arange(len(spans), dtype=torch.int32, device=device)
    block_table = torch.empty(len(spans), 3, dtype=torch.int32, device=device)
    block_table[:, 0] = index * BLOCK + first.start
    block_table[:, 1].fill_(first.length)
    # Behind those that share the first anchor, an anchor serves two blocks.
    anchors = torch.div(index - alone, 2, rounding_mode="floor") * ANCHOR_LENGTH
    block_table[:, 2] = anchors + (first.start + alone * BLOCK)
    block_table[:alone, 2].fill_(first.anchor)
    return block_table
