"""The only source of sizes: bytes and bits of caches, measured and predicted.

``bits_per_element`` counts codes and gains over the encoded elements. ``bits_per_element_total`` counts everything a
cache holds (codes, gains, sinks, residual, stock layers, bookkeeping, allocation slack) over all cached elements, and
therefore depends on the context length. The calibration's constants are shared by all caches of a model and are listed
apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES, LayerCalibration, SideCalibration
from quantcache.common import compat

if TYPE_CHECKING:
    from transformers import Cache

    from quantcache.artifact.calibration import Calibration

DENSE_BITS = 16
"""Bits per element of the caches that sizes are compared with (bfloat16, float16)."""

GROWTH = 16
"""A full buffer of blocks grows by 1/16 of what it holds, so at most 6 % of it is ever unused."""

PLACE_BYTES = 12
"""Bytes that say where a block lies: first slot, valid length and anchor as int32."""


@dataclass(frozen=True)
class CacheMemory:
    """Bytes held by a cache, by kind.

    Attributes:
        tokens: Cached tokens of each row, T.
        codes: Packed codes.
        gains: Per-token gains.
        sinks: First tokens in the model's dtype.
        residual: Recent tokens in the model's dtype.
        dense: Layers and sides that are not compressed.
        bookkeeping: Places of the blocks (12 bytes each, with their buffer's slack), row starts, and of padded rows
            what is known of padding and positions.
        slack: Allocated but unused.
        constants: The calibration's constants on the layers' devices, shared by all caches of the model.
        encoded_elements: Elements that codes and gains stand for.
        elements: All cached elements.
        gains_above: How many gains are at the largest code: such a token is 16 times as far from the mean as the
            calibration knows, or more, and what is beyond is lost. None where nothing was measured.
        gains_below: How many are zero: such a token is nearer to the mean than 1/16 of that, and is stored as the mean.
    """

    tokens: int
    codes: int = 0
    gains: int = 0
    sinks: int = 0
    residual: int = 0
    dense: int = 0
    bookkeeping: int = 0
    slack: int = 0
    constants: int = 0
    encoded_elements: int = 0
    elements: int = 0
    gains_above: int | None = field(default=None, compare=False)  # not sizes: no formula predicts them
    gains_below: int | None = field(default=None, compare=False)

    @property
    def total(self) -> int:
        """Bytes of everything but the shared constants."""
        kinds = (self.codes, self.gains, self.sinks, self.residual, self.dense, self.bookkeeping, self.slack)
        return sum(kinds)

    @property
    def bits_per_element(self) -> float:
        """Bits of codes and gains per encoded element; 0 while nothing is encoded."""
        return 8 * (self.codes + self.gains) / self.encoded_elements if self.encoded_elements else 0.0

    @property
    def bits_per_element_total(self) -> float:
        """Bits of everything but the shared constants per cached element."""
        return 8 * self.total / self.elements if self.elements else 0.0

    @property
    def bfloat16_bytes(self) -> int:
        """Bytes of the same elements in bfloat16."""
        return self.elements * DENSE_BITS // 8

    def to_dict(self) -> dict[str, Any]:
        """All fields that are known and derived figures, ready for JSON."""
        derived = {
            name: getattr(self, name)
            for name in ("total", "bits_per_element", "bits_per_element_total", "bfloat16_bytes")
        }
        return {**self._known(), **derived}

    def _known(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        lines = [f"{name:<22}{value:>14,}" for name, value in self._known().items()]
        lines.append(f"{'total':<22}{self.total:>14,}")
        lines.append(f"{'bits_per_element':<22}{self.bits_per_element:>14.3f}")
        lines.append(f"{'bits_per_element_total':<22}{self.bits_per_element_total:>14.3f}")
        return "\n".join(lines)


def bits_per_encoded_element(layers: Mapping[int, LayerCalibration]) -> float:
    """Bits of codes and gains per element of the coded sides.

    Args:
        layers: A calibration's layers, with widths.

    Returns:
        The mean over layers and coded sides, weighted by their elements; 0 if every side is dense.
    """
    bits, elements = 0, 0
    for layer in layers.values():
        for side in (layer.key, layer.value):
            if side.widths is not None:
                bits += int(side.widths.sum()) + 8 * side.num_heads
                elements += side.widths.numel()
    return bits / elements if elements else 0.0


def num_blocks(tokens: int, sink_length: int, residual_length: int) -> int:
    """Blocks that a cache of some tokens has encoded, however they arrived.

    Args:
        tokens: T (rows without left padding).
        sink_length: First tokens kept aside.
        residual_length: Recent tokens kept.

    Returns:
        The number of 64-token blocks.
    """
    return max(0, (tokens - sink_length - residual_length) // BLOCK)


def capacity(blocks: int, prefilled: int) -> int:
    """Blocks that a store has room for after growing from a prefill one block at a time.

    Args:
        blocks: Blocks stored.
        prefilled: Blocks that the first update brought.

    Returns:
        The capacity.
    """
    room = prefilled
    for count in range(prefilled, blocks):
        if count + 1 > room:
            room = count + max(1, count // GROWTH)
    return room


@dataclass(frozen=True)
class SideSize:
    """What decides the bytes of the keys or the values of one layer.

    Attributes:
        heads: Hkv.
        dim: D.
        code_bits: Bits of codes for each token, all heads together; None leaves the side dense.
        gain_bytes: Bytes of gains for each token, all heads together.
    """

    heads: int
    dim: int
    code_bits: float | None = None
    gain_bytes: int = 0

    @property
    def elements(self) -> int:
        """Elements of one token."""
        return self.heads * self.dim


@dataclass(frozen=True)
class LayerSize:
    """What decides the bytes of one layer.

    Attributes:
        key: The keys.
        value: The values.
        blocks: Whether the layer stores blocks; transformers' own layers keep all their tokens as they are.
        window: Sliding window of a layer of transformers' own: it keeps one token less.
    """

    key: SideSize
    value: SideSize
    blocks: bool = True
    window: int | None = None

    @property
    def elements(self) -> int:
        """Elements of one token."""
        return self.key.elements + self.value.elements

    def kept(self, tokens: int) -> int:
        """Tokens that a layer of transformers' own keeps of T."""
        return tokens if self.window is None else min(tokens, self.window - 1)


def calibrated_sizes(calibration: Calibration) -> list[LayerSize]:
    """The sizes of the layers that a calibration compresses.

    Args:
        calibration: The calibration, at its rate.

    Returns:
        One entry for each layer.
    """
    return [LayerSize(_side_size(layer.key), _side_size(layer.value)) for layer in calibration.layers.values()]


def _side_size(side: SideCalibration) -> SideSize:
    if side.widths is None:
        return SideSize(side.num_heads, side.dim)
    return SideSize(side.num_heads, side.dim, int(side.widths.sum()), side.num_heads)


def largest_capacity(blocks: int) -> int:
    """Blocks that a store may have room for at most, however its blocks arrived.

    Args:
        blocks: Blocks stored.

    Returns:
        The largest value of :func:`capacity`.
    """
    return max(blocks, blocks - 1 + max(1, (blocks - 1) // GROWTH)) if blocks else 0


def predict(
    calibration: Calibration,
    tokens: int,
    *,
    batch: int = 1,
    sink_length: int = 4,
    residual_length: int = 64,
    element_bytes: int = 2,
    prefill: int | None = None,
) -> CacheMemory:
    """Bytes that the compressed layers of a cache will hold, by formula.

    Stock layers (sliding windows and the like) are not in it.

    Args:
        calibration: The model's calibration.
        tokens: T (rows without left padding).
        batch: B.
        sink_length: First tokens kept aside.
        residual_length: Recent tokens kept.
        element_bytes: Bytes per element of the model's dtype.
        prefill: How many of the tokens arrive in the first update; all if None.

    Returns:
        The sizes, ``constants`` zero.
    """
    blocks = num_blocks(tokens, sink_length, residual_length)
    return predict_layers(
        calibrated_sizes(calibration),
        tokens,
        batch=batch,
        sink_length=sink_length,
        residual_length=residual_length,
        element_bytes=element_bytes,
        room=capacity(blocks, num_blocks(tokens if prefill is None else prefill, sink_length, residual_length)),
    )


def predict_layers(
    layers: Iterable[LayerSize],
    tokens: int,
    *,
    batch: int = 1,
    sink_length: int = 4,
    residual_length: int = 64,
    element_bytes: int = 2,
    room: int | None = None,
) -> CacheMemory:
    """Bytes that a cache will hold, by formula, stock layers included.

    Args:
        layers: Its layers; those that hold nothing may be left out.
        tokens: T (rows without left padding).
        batch: B.
        sink_length: First tokens kept aside.
        residual_length: Recent tokens kept.
        element_bytes: Bytes per element of the model's dtype.
        room: Blocks that the stores have room for (see :func:`capacity`); as many as they hold if None.

    Returns:
        The sizes, ``constants`` zero.
    """
    blocks = num_blocks(tokens, sink_length, residual_length)
    room = blocks if room is None else room
    kinds = ("codes", "gains", "sinks", "residual", "dense", "bookkeeping", "slack", "encoded_elements", "elements")
    sizes = dict.fromkeys(kinds, 0)
    kept = sink_length if blocks else 0
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
            sizes["slack"] += round((room - blocks) * block_bytes)
            sizes["sinks"] += kept * token_elements * element_bytes
            sizes["residual"] += (tokens - kept - blocks * BLOCK) * token_elements * element_bytes
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
        The sizes, counted as :func:`measure` does.
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


def measure(cache: Cache) -> CacheMemory:
    """Bytes that a cache holds, counted on its tensors.

    Args:
        cache: A SpectralCache, any DynamicCache, or transformers' QuantizedCache, of which what scales take beyond 16
            bits counts as slack.

    Returns:
        The sizes.
    """
    sizes = dict.fromkeys(("codes", "gains", "sinks", "residual", "dense", "bookkeeping", "slack"), 0)
    encoded_elements, elements, tokens = 0, 0, 0
    gains_above, gains_below = 0, 0
    constants: dict[int, Tensor] = {}
    layer: Any
    for index, layer in enumerate(cache.layers):
        if not getattr(layer, "is_initialized", False) or compat.is_placeholder(layer):
            continue
        if index not in getattr(cache, "foreign", ()):
            tokens = max(tokens, layer.get_seq_length())
        indexer = getattr(layer, "indexer_keys", None)
        if indexer is not None:
            sizes["dense"] += indexer.nbytes
            elements += indexer.numel()
        if not hasattr(layer, "stores"):
            held = [t for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
            quantized = compat.quantized_parts(layer)
            sizes["residual" if quantized else "dense"] += sum(t.nbytes for t in held)
            elements += sum(t.numel() for t in held)
            for shape, codes, scales in quantized:
                elements += shape.numel()
                encoded_elements += shape.numel()
                sizes["codes"] += sum(t.nbytes for t in codes)
                # A model in float32 makes float32 scales: they count as 16 bits, so that rates can be compared.
                narrow = sum(t.numel() * min(t.element_size(), DENSE_BITS // 8) for t in scales)
                sizes["gains"] += narrow
                sizes["slack"] += sum(t.nbytes for t in scales) - narrow
            continue
        for side in SIDES:
            store, tail = layer.stores[side], layer.tails[side]
            per_token = tail.shape[0] * tail.shape[1] * tail.shape[3]
            elements += layer.get_seq_length() * per_token
            bits = layer.codecs[side].bits if side in layer.codecs else None
            if bits is not None:
                encoded_elements += store.count * BLOCK * per_token
            for name, size in store.nbytes().items():
                if name == "simulated":  # a fake-quantized rival: counted at the size its codes would take
                    sizes["codes"] += round(store.count * BLOCK * per_token * bits / 8)
                else:
                    sizes["bookkeeping" if name == "shifts" else name] += size
                    sizes["slack"] += store.slack(name)
            sizes["residual"] += tail.untyped_storage().nbytes()
            if side in layer.sinks:
                sizes["sinks"] += layer.sinks[side].untyped_storage().nbytes()
            if side in layer.leads:
                sizes["sinks"] += layer.leads[side].untyped_storage().nbytes()
            if side in layer.codecs:
                constants.update({t.data_ptr(): t for t in layer.codecs[side].tensors() if t.numel()})
        above, below = layer.saturated_gains()
        gains_above, gains_below = gains_above + above, gains_below + below
        places = layer.places
        sizes["bookkeeping"] += sum(places.nbytes().values()) + sum(places.slack(name) for name in places.buffers)
        told = (layer.starts, layer.origins, layer.trail)
        sizes["bookkeeping"] += sum(each.untyped_storage().nbytes() for each in told if each is not None)
    return CacheMemory(
        tokens=tokens,
        **sizes,
        constants=sum(t.untyped_storage().nbytes() for t in constants.values()),
        encoded_elements=encoded_elements,
        elements=elements,
        gains_above=gains_above,
        gains_below=gains_below,
    )


def dtype_bytes(dtype: torch.dtype) -> int:
    """Bytes per element of a dtype."""
    return dtype.itemsize
