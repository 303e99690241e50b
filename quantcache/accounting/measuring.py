"""Bytes that a cache holds, counted on its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quantcache.accounting.memory import DENSE_BITS, CacheMemory
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache.common import compat

if TYPE_CHECKING:
    from transformers import Cache

KINDS = ("codes", "gains", "sinks", "residual", "dense", "bookkeeping", "slack")
"""What the bytes of :class:`CacheMemory` are counted as."""


def measure(cache: Cache, saturation: bool = True) -> CacheMemory:
    """Bytes that a cache holds, counted on its tensors.

    Args:
        cache: A SpectralCache, any DynamicCache, or transformers' QuantizedCache, of which what scales take beyond 16
            bits counts as slack.
        saturation: Also look which gains lie beyond their range, which takes longer than all sizes.

    Returns:
        The sizes.
    """
    count, tokens = _Count(saturation=saturation), 0
    layer: Any
    for index, layer in enumerate(cache.layers):
        count.add_states(layer)
        if not getattr(layer, "is_initialized", False) or compat.is_placeholder(layer) or compat.is_recurrent(layer):
            continue
        if index not in getattr(cache, "foreign", ()):
            tokens = max(tokens, layer.get_seq_length())
        indexer = getattr(layer, "indexer_keys", None)
        if indexer is not None:
            count.sizes["dense"] += indexer.nbytes
            count.elements += indexer.numel()
        if hasattr(layer, "stores"):
            count.add_blocks(layer)
        else:
            count.add_stock(layer)
    return CacheMemory(
        tokens=tokens,
        **count.sizes,
        constants=sum(t.untyped_storage().nbytes() for t in count.constants.values()),
        encoded_elements=count.encoded_elements,
        elements=count.elements,
        gains_above=count.gains_above if saturation else None,
        gains_below=count.gains_below if saturation else None,
    )


@dataclass
class _Count:
    """Sums over the layers of a cache."""

    saturation: bool = True
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    encoded_elements: int = 0
    elements: int = 0
    gains_above: int = 0
    gains_below: int = 0
    constants: dict[int, Tensor] = field(default_factory=dict)

    def add_stock(self, layer: Any) -> None:
        """Count a layer of transformers' own."""
        held = [t for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
        quantized = compat.quantized_parts(layer)
        self.sizes["residual" if quantized else "dense"] += sum(t.nbytes for t in held)
        self.elements += sum(t.numel() for t in held)
        for shape, codes, scales in quantized:
            self.elements += shape.numel()
            self.encoded_elements += shape.numel()
            self.sizes["codes"] += sum(t.nbytes for t in codes)
            # A model in float32 makes float32 scales: they count as 16 bits, so that rates can be compared.
            narrow = sum(t.numel() * min(t.element_size(), DENSE_BITS // 8) for t in scales)
            self.sizes["gains"] += narrow
            self.sizes["slack"] += sum(t.nbytes for t in scales) - narrow

    def add_states(self, layer: Any) -> None:
        """Count what a layer's recurrence and convolutions hold."""
        for state in compat.recurrent_states(layer):
            self.sizes["dense"] += state.untyped_storage().nbytes()
            self.elements += state.numel()

    def add_blocks(self, layer: Any) -> None:
        """Count a layer that stores blocks."""
        for side in SIDES:
            self._add_side(layer, side)
        if self.saturation:
            above, below = layer.saturated_gains()
            self.gains_above, self.gains_below = self.gains_above + above, self.gains_below + below
        state, blocks = layer.state, layer.state.blocks
        self.sizes["bookkeeping"] += sum(blocks.table.nbytes().values()) + sum(
            map(blocks.table.slack, blocks.table.buffers)
        )
        told = (blocks.left_padding, blocks.origins, state.trail)
        self.sizes["bookkeeping"] += sum(each.untyped_storage().nbytes() for each in told if each is not None)

    def _add_side(self, layer: Any, side: str) -> None:
        store, tail, codec = layer.stores[side], layer.tails[side], layer.codecs.get(side)
        per_token = tail.shape[0] * tail.shape[1] * tail.shape[3]
        stored = store.count * BLOCK * per_token
        self.elements += layer.get_seq_length() * per_token
        bits = None if codec is None else codec.bits
        if bits is not None:
            self.encoded_elements += stored
        for name, size in store.nbytes().items():
            if name == "simulated":  # a fake-quantized rival: counted at the size its codes would take
                self.sizes["codes"] += round(stored * bits / 8)
            else:
                self.sizes[_kind(name, codec)] += size
                self.sizes["slack"] += store.slack(name)
        self.sizes["residual"] += tail.nbytes
        self.sizes["slack"] += tail.untyped_storage().nbytes() - tail.nbytes
        for aside in (layer.sinks, layer.state.blocks.leads):
            if side in aside:
                self.sizes["sinks"] += aside[side].untyped_storage().nbytes()
        if codec is not None:
            self.constants.update({t.data_ptr(): t for t in codec.tensors() if t.numel()})


def _kind(field_name: str, codec: Any) -> str:
    """What a field of blocks is counted as; those of a codec of the caller's own are codes, if it has a rate."""
    if field_name == "shifts":
        return "bookkeeping"
    if field_name in KINDS:
        return field_name
    return "dense" if codec is None or codec.bits is None else "codes"
