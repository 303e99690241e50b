"""When tokens are encoded, and how buffers of blocks and of recent tokens grow."""

from __future__ import annotations

from quantcache.coding.packing import BLOCK

GROWTH = 16
"""A full buffer of blocks grows by 1/16 of what it holds, so at most 6 % of it is ever unused."""

TAIL_GROWTH = 8
"""A full tail grows by 1/8 of what it holds: so few tokens are copied again, and at most 11 % of it is ever unused."""


def num_blocks(tokens: int, sink_length: int, residual_length: int, blocks_at_once: int = 1) -> int:
    """Blocks that a cache of some tokens has encoded, however they arrived.

    Args:
        tokens: T (rows without left padding).
        sink_length: First tokens kept aside.
        residual_length: Recent tokens kept.
        blocks_at_once: Blocks that are encoded together.

    Returns:
        The number of 64-token blocks.
    """
    blocks = max(0, (tokens - sink_length - residual_length) // BLOCK)
    return blocks - blocks % blocks_at_once


def grown(held: int, needed: int, growth: int = GROWTH) -> int:
    """What a full buffer's capacity becomes.

    Args:
        held: How much it holds.
        needed: How much it is to hold.
        growth: It gets at least 1/growth of what it holds on top; an empty one gets what is needed.

    Returns:
        The new capacity.
    """
    return max(needed, held + max(1, held // growth)) if held else needed


def capacity(count: int, first: int, growth: int = GROWTH) -> int:
    """What a buffer has room for after growing from a first addition one by one.

    Args:
        count: Blocks of a store, or tokens of a tail.
        first: How many the first addition brought.
        growth: See :func:`grown`.

    Returns:
        The capacity.
    """
    room = first
    for held in range(first, count):
        if held + 1 > room:
            room = grown(held, held + 1, growth)
    return room


def tail_capacity(tokens: int, prefilled: int, sink_length: int, residual_length: int, at_once: int = 1) -> int:
    """Tokens that a layer's tail has room for after growing from a prefill one token at a time.

    Args:
        tokens: T (rows without left padding).
        prefilled: Tokens that the first update brought.
        sink_length: First tokens kept aside.
        residual_length: Recent tokens kept.
        at_once: Blocks that are encoded together.

    Returns:
        The capacity.
    """
    blocks, first = (num_blocks(each, sink_length, residual_length, at_once) for each in (tokens, prefilled))
    aside = BLOCK * blocks + (sink_length if blocks else 0)
    # Encoding leaves a tail of its own size; token by token that is the residual.
    return capacity(tokens - aside, prefilled - aside if blocks == first else residual_length, TAIL_GROWTH)


def largest_capacity(count: int, growth: int = GROWTH) -> int:
    """What a buffer may have room for at most, however its content arrived.

    Args:
        count: Blocks of a store, or tokens of a tail.
        growth: See :func:`grown`.

    Returns:
        The largest value of :func:`capacity`.
    """
    return grown(count - 1, count, growth) if count else 0
