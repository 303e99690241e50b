"""Where the encoded blocks of a layer lie."""

from __future__ import annotations

from dataclasses import dataclass

from quantcache.packing import BLOCK
from quantcache.rope import ANCHOR_LENGTH


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
    """Where the next full blocks go.

    Args:
        previous: The last block, if there is one.
        lead: Slot of the first block of all.
        count: How many blocks are wanted.

    Returns:
        Their spans: two full blocks share an anchor.
    """
    spans: list[Span] = []
    for _ in range(count):
        start = previous.end if previous else lead
        shared = previous is not None and start + BLOCK <= previous.anchor + ANCHOR_LENGTH
        previous = Span(start, BLOCK, previous.anchor if shared and previous else start)
        spans.append(previous)
    return spans
