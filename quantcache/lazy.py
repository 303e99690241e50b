"""What ``update()`` returns: keys and values of full logical shape that hold no dense copy of the past.

Our attention function takes the :class:`CacheView` out of a :class:`LazyKV` and attends on codes. Any other consumer
(stock sdpa or eager attention, latent attention that expands its cache first, a user's own code) touches it as a tensor
and is served correct dense values through ``__torch_dispatch__``. So the cache is right with every attention
implementation, and economical with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from quantcache.codec import SideCodec, block_slots
from quantcache.packing import BLOCK
from quantcache.store import BlockStore

if TYPE_CHECKING:
    from quantcache.layer import SpectralLayer


FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(slots=True)
class SideView:
    """One side of a :class:`CacheView`.

    Attributes:
        codec: How blocks are decoded.
        store: Encoded blocks.
        sinks: First valid tokens of every row, ``[B, H, S, D]``; None before the first block.
        tail: Everything behind the last block, the new tokens last, ``[B, H, t, D]``.
    """

    codec: SideCodec | None
    store: BlockStore
    sinks: Tensor | None
    tail: Tensor


@dataclass(slots=True)
class CacheView:
    """What the queries of one call may read: a snapshot of one layer, valid until the layer's next update.

    The tokens of the call itself are in the tails, exact; only what is read again later is quantized.

    Attributes:
        layer: The layer, told through ``finish`` that its new tokens have been read.
        key: The keys.
        value: The values.
        places: Places of the n encoded blocks, ``[n, 3]`` int32 (see ``SideCodec``).
        encoded_end: Slot behind the last encoded token; 0 before the first block.
        cut: Whether some block is not full.
        starts: Left padding of every row, ``[B]``, or None.
    """

    layer: SpectralLayer
    key: SideView
    value: SideView
    places: Tensor
    encoded_end: int
    cut: bool
    starts: Tensor | None
    touched: set[str] = field(default_factory=set)

    def side(self, name: str) -> SideView:
        """The view of ``"key"`` or ``"value"``."""
        return self.key if name == "key" else self.value

    @property
    def num_blocks(self) -> int:
        """Encoded blocks, n."""
        return self.places.shape[0]

    @property
    def length(self) -> int:
        """Tokens in the view, T."""
        return self.encoded_end + self.key.tail.shape[2]

    def first_blocks(self, count: int) -> CacheView:
        """A view of the first blocks, the sinks and the tail, without padding: a small piece of the work at hand."""
        spans = self.layer.spans[: min(count, self.num_blocks)]
        starts = None if self.starts is None else torch.zeros_like(self.starts)
        return replace(self, places=self.places[: len(spans)], encoded_end=spans[-1].end, starts=starts, touched=set())

    def sink_slots(self) -> Tensor:
        """Slots of the sinks of every row, ``[B or 1, S]``; those from ``encoded_end`` on are still in the tail."""
        assert self.key.sinks is not None
        offsets = torch.arange(self.key.sinks.shape[2], device=self.key.sinks.device)
        return offsets[None] if self.starts is None else self.starts[:, None] + offsets

    def tiles(self, blocks_per_tile: int) -> list[tuple[int, int]]:
        """Ranges of blocks to work on at once.

        Args:
            blocks_per_tile: Largest size of a range.

        Returns:
            (first block, one past the last block) of every tile.
        """
        edges = range(0, self.num_blocks, blocks_per_tile)
        return [(i, min(i + blocks_per_tile, self.num_blocks)) for i in edges]

    def dense(self, name: str) -> Tensor:
        """Keys or values of all slots, in the model's dtype.

        Args:
            name: ``"key"`` or ``"value"``.

        Returns:
            ``[B, H, T, D]``; slots of left padding hold finite values that mean nothing.
        """
        side = self.side(name)
        if not self.num_blocks:
            return side.tail
        assert side.codec is not None
        assert side.sinks is not None
        batch, heads, _, dim = side.tail.shape
        out = side.tail.new_zeros(batch, heads, self.length, dim)
        for first, last in self.tiles(16):
            places = self.places[first:last]
            decoded = side.codec.decode(side.store.slice(first, last), places, self.starts)
            if out.dtype == torch.float16:  # a token near float16's limit may decode to beyond it
                decoded = decoded.clamp(-FLOAT16_MAX, FLOAT16_MAX)
            decoded = decoded.to(out.dtype)
            slots = block_slots(places)
            if self.cut:
                inside = (slots < (places[:, 0] + places[:, 1]).repeat_interleave(BLOCK)).nonzero().flatten()
                slots, decoded = slots[inside], decoded[:, :, inside]
            out.index_copy_(2, slots, decoded)
        self._place_sinks(out, side.sinks)
        out[:, :, self.encoded_end :] = side.tail
        return out

    def _place_sinks(self, out: Tensor, sinks: Tensor) -> None:
        if self.starts is None:
            out[:, :, : sinks.shape[2]] = sinks
            return
        slots = self.sink_slots()
        inside = (slots < self.encoded_end)[:, None, :, None]
        index = slots.clamp_max(self.encoded_end - 1)[:, None, :, None].expand(
            -1, *sinks.shape[1:2], -1, sinks.shape[3]
        )
        out.scatter_(2, index, torch.where(inside, sinks, out.gather(2, index)))


class LazyKV(torch.Tensor):
    """Keys or values of a :class:`CacheView`: a tensor of shape ``[B, H, T, D]`` without storage.

    Valid until the next update of its layer.
    """

    view_: CacheView
    side_: str
    dense_: Tensor | None

    @staticmethod
    def __new__(cls, view: CacheView, side: str) -> LazyKV:
        tail = view.side(side).tail
        shape = (*tail.shape[:2], view.length, tail.shape[3])
        lazy = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=tail.dtype, device=tail.device)
        lazy.view_, lazy.side_, lazy.dense_ = view, side, None
        return lazy

    def materialize(self) -> Tensor:
        """The dense tensor; made once, and kept only as long as this object.

        Returns:
            ``[B, H, T, D]`` in the model's dtype.
        """
        if self.dense_ is None:
            self.dense_ = self.view_.dense(self.side_)
            self.view_.touched.add(self.side_)
            if len(self.view_.touched) == 2:  # a stock consumer now has both: nothing else will tell the layer
                self.view_.layer.finish()
        return self.dense_

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Serve any operation with the dense tensor."""

        def unwrap(value: Any) -> Any:
            return value.materialize() if isinstance(value, LazyKV) else value

        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyKV({self.side_}, shape={list(self.shape)}, dtype={self.dtype})"
