"""Bytes that a cache will hold, by formula."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quantcache.accounting.memory import DENSE_BITS, PLACE_BYTES, CacheMemory, LayerSize, calibrated_sizes
from quantcache.coding.growth import capacity, num_blocks, tail_capacity
from quantcache.coding.packing import BLOCK
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH

if TYPE_CHECKING:
    from quantcache.artifact.calibration import Calibration


def predict(
    calibration: Calibration,
    tokens: int,
    *,
    batch: int = 1,
    sink_length: int = SINK_LENGTH,
    residual_length: int = RESIDUAL_LENGTH,
    element_bytes: int = 2,
    prefill: int | None = None,
    beside: Sequence[LayerSize] = (),
) -> CacheMemory:
    """Bytes that the compressed layers of a cache will hold, by formula.

    Stock layers (sliding windows and the like) are in it where they are given.

    Args:
        calibration: Calibration of the model that will use the cache.
        tokens: T (rows without left padding).
        batch: B.
        sink_length: First tokens kept aside.
        residual_length: Recent tokens kept.
        element_bytes: Bytes per element of the model's dtype.
        prefill: How many of the tokens arrive in the first update; all if None.
        beside: The cache's other layers.

    Returns:
        The sizes, ``constants`` zero.
    """
    blocks, first = num_blocks(tokens, sink_length, residual_length), tokens if prefill is None else prefill
    return predict_layers(
        [*calibrated_sizes(calibration), *beside],
        tokens,
        batch=batch,
        sink_length=sink_length,
        residual_length=residual_length,
        element_bytes=element_bytes,
        room=capacity(blocks, num_blocks(first, sink_length, residual_length)),
        tail_room=tail_capacity(tokens, first, sink_length, residual_length),
    )


def predict_layers(
    layers: Iterable[LayerSize],
    tokens: int,
    *,
    batch: int = 1,
    sink_length: int = SINK_LENGTH,
    residual_length: int = RESIDUAL_LENGTH,
    element_bytes: int = 2,
    room: int | None = None,
    tail_room: int | None = None,
    blocks_at_once: int = 1,
) -> CacheMemory:
    """Bytes that a cache will hold, by formula, stock layers included.

    Args:
        layers: Its layers; those that hold nothing may be left out.
        tokens: T (rows without left padding).
        batch: B.
        sink_length: First tokens kept aside.
        residual_length: Recent tokens kept.
        element_bytes: Bytes per element of the model's dtype.
        room: Blocks that the stores have room for (see :func:`quantcache.coding.growth.capacity`); as many as they
            hold if None.
        tail_room: Tokens that the tails have room for (see :func:`quantcache.coding.growth.tail_capacity`).
        blocks_at_once: Blocks that are encoded together.

    Returns:
        The sizes, ``constants`` zero.
    """
    blocks = num_blocks(tokens, sink_length, residual_length, blocks_at_once)
    room = blocks if room is None else room
    kinds = ("codes", "gains", "sinks", "residual", "dense", "bookkeeping", "slack", "encoded_elements", "elements")
    sizes = dict.fromkeys(kinds, 0)
    kept = sink_length if blocks else 0
    tail = tokens - kept - blocks * BLOCK
    tail_room = tail if tail_room is None else tail_room
    for layer in layers:
        if not layer.blocks:
            sizes["dense"] += batch * layer.kept(tokens) * layer.elements * element_bytes
            sizes["elements"] += batch * layer.kept(tokens) * layer.elements
            continue
        sizes["bookkeeping"] += room * PLACE_BYTES
        for side in (layer.key, layer.value):
            token_elements = batch * side.elements
            stored = BLOCK * batch * blocks
            if side.code_bits is None:
                sizes["dense"] += stored * side.elements * element_bytes
                block_bytes: float = BLOCK * token_elements * element_bytes
            else:
                sizes["codes"] += round(stored * side.code_bits / 8)
                sizes["gains"] += stored * side.gain_bytes
                sizes["encoded_elements"] += stored * side.elements
                block_bytes = BLOCK * batch * (side.code_bits / 8 + side.gain_bytes)
            sizes["slack"] += round((room - blocks) * block_bytes) + (tail_room - tail) * token_elements * element_bytes
            sizes["sinks"] += kept * token_elements * element_bytes
            sizes["residual"] += tail * token_elements * element_bytes
            sizes["elements"] += tokens * token_elements
    return CacheMemory(tokens=tokens, **sizes)


def predict_quantized(
    layers: Iterable[LayerSize],
    tokens: int,
    *,
    bits: int,
    group: int | None,
    batch: int = 1,
    recent: int = 0,
    element_bytes: int = 2,
) -> CacheMemory:
    """Bytes that transformers' quantized cache will hold, by formula.

    Args:
        layers: Its layers.
        tokens: T.
        bits: Width of every code.
        group: Codes that share a 16-bit scale and zero point; None for one float32 scale for each side of a layer.
        batch: B.
        recent: Tokens that it still keeps as they are.
        element_bytes: Bytes per element of the model's dtype.

    Returns:
        The sizes, counted as :func:`quantcache.accounting.measure` does.
    """
    sizes = dict.fromkeys(("codes", "gains", "residual", "slack", "encoded_elements", "elements"), 0)
    for side in (side for layer in layers for side in (layer.key, layer.value)):
        coded = batch * (tokens - recent) * side.elements
        sizes["codes"] += coded * bits // 8
        if group is None:
            sizes["gains"] += DENSE_BITS // 8
            sizes["slack"] += 4 - DENSE_BITS // 8
        else:
            sizes["gains"] += coded // group * 2 * DENSE_BITS // 8
            sizes["slack"] += coded // group * 2 * (element_bytes - DENSE_BITS // 8)
        sizes["residual"] += batch * recent * side.elements * element_bytes
        sizes["encoded_elements"] += coded
        sizes["elements"] += batch * tokens * side.elements
    return CacheMemory(tokens=tokens, **sizes)
