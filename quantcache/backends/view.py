"""What the queries of one call may read: a snapshot of one layer's sinks, encoded blocks and tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantcache.backends.padding import Grid
from quantcache.backends.spans import Span
from quantcache.backends.store import BlockStore
from quantcache.coding.blocks import SideCodec, block_slots, holds_tokens
from quantcache.coding.codec import SpectralCodec
from quantcache.common.ambient import without_autocast
from quantcache.common.errors import GraphCaptureError

if TYPE_CHECKING:
    from quantcache.backends.base import Backend, BackendReport, Stage

FLOAT16_MAX = torch.finfo(torch.float16).max


DECODED_BLOCKS = 16
"""Blocks of which a dense copy is made at once: they go through float32."""


@dataclass(slots=True)
class SideView:
    """One side of a :class:`CacheView`.

    Attributes:
        tail: Everything behind the last block, the new tokens last, ``[B, H, t, D]``.
        codec: How blocks are decoded.
        store: Encoded blocks.
        sinks: First valid tokens of every row, ``[B, H, S, D]``; None before the first block.
        lead: Tokens of the slots before the first block, ``[B, H, S, D]``; None where these are the sinks.
    """

    tail: Tensor
    codec: SideCodec | None
    store: BlockStore
    sinks: Tensor | None
    lead: Tensor | None = None

    def with_tail(self, tail: Tensor) -> SideView:
        """The same blocks in front of other recent tokens."""
        return SideView(tail, self.codec, self.store, self.sinks, self.lead)


@dataclass(slots=True)
class CacheView:
    """What the queries of one call may read: a snapshot of one layer, valid until the layer's next update.

    The tokens of the call itself are in the tails, exact; only what is read again later is quantized.

    Attributes:
        key: The keys.
        value: The values.
        flush: To be called when the new tokens have been read: the layer may then encode.
        block_table: Places of the n encoded blocks, ``[n, 3]`` int32 (see ``SideCodec``).
        encoded_end: Slot behind the last encoded token; 0 before the first block.
        cut: Whether some block is not full.
        left_padding: Slot of every row's first token, ``[B]``, where its sinks begin; None for slot 0. Hides nothing.
        origins: Slot at which every row's positions count from zero, ``[B]``; None where that is its start.
        spans: ``block_table`` as Python knows them.
        backend: Who attends on the blocks, and in whose layout they are; None before the first block.
        report: Where the backend says which calls it left to plain torch.
        prepared: What backends have made of the blocks and sinks, by name; :meth:`with_tails` hands it on.
        touched: Sides that were asked for as tensors.
        stage: Who attends in place of the backend while a step is captured: tails are then all the room that there is,
            and only the device knows how much of it is taken.
    """

    key: SideView
    value: SideView
    flush: Callable[[], None] | None
    block_table: Tensor
    encoded_end: int
    cut: bool
    left_padding: Tensor | None
    origins: Tensor | None = None
    spans: Sequence[Span] = ()
    backend: Backend | None = None
    report: BackendReport | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    stage: Stage | None = None

    def with_tails(self, tails: dict[str, Tensor], flush: Callable[[], None]) -> CacheView:
        """A view of the same blocks in front of other recent tokens, ``[B, H, t, D]`` by side; ``flush`` as above."""
        key, value = self.key.with_tail(tails["key"]), self.value.with_tail(tails["value"])
        # Every step makes one for each layer: dataclasses.replace would take several times as long.
        where = self.block_table, self.encoded_end, self.cut, self.left_padding, self.origins, self.spans
        return CacheView(key, value, flush, *where, self.backend, self.report, self.prepared)

    def side(self, name: str) -> SideView:
        """The view of ``"key"`` or ``"value"``."""
        return self.key if name == "key" else self.value

    @property
    def num_blocks(self) -> int:
        """Encoded blocks, n."""
        return self.block_table.shape[0]

    @property
    def length(self) -> int:
        """Tokens in the view, T."""
        return self.encoded_end + self.key.tail.shape[2]

    @property
    def frames(self) -> Tensor | None:
        """What is to be taken from a slot for its position, ``[B]``; None for zero."""
        return Grid(self.left_padding, self.origins).frames

    @property
    def on_codes(self) -> bool:
        """Whether few queries can be multiplied with codes: both codecs are SpectralCodecs, and frames are plain."""
        return (
            isinstance(self.key.codec, SpectralCodec)
            and isinstance(self.value.codec, SpectralCodec)
            and not self.shifted
        )

    @property
    def spectral_codecs(self) -> tuple[SpectralCodec, SpectralCodec]:
        """Codecs of keys and values, where both are SpectralCodecs: see :attr:`on_codes`."""
        key, value = self.key.codec, self.value.codec
        assert isinstance(key, SpectralCodec)
        assert isinstance(value, SpectralCodec)
        return key, value

    @property
    def sinks(self) -> tuple[Tensor, Tensor]:
        """Sinks of keys and values, ``[B, H, S, D]`` each, of a view that has blocks."""
        key, value = self.key.sinks, self.value.sinks
        assert key is not None
        assert value is not None
        return key, value

    def fields(self, name: str, first: int, last: int) -> dict[str, Tensor]:
        """Some blocks of ``"key"`` or ``"value"`` in the portable layout.

        Args:
            name: The side.
            first: First block.
            last: One past the last block.

        Returns:
            The codec's fields, ``[last - first, B, ...]`` each.
        """
        side = self.side(name)
        assert side.codec is not None
        fields = side.store.slice(first, last)
        return fields if self.backend is None else self.backend.to_portable(side.codec, fields)

    def dense_parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of the sinks, then of the tail, all of one dtype."""
        parts = *self.sinks, self.key.tail, self.value.tail
        if parts[2].dtype == parts[3].dtype:
            return parts
        wide = torch.promote_types(parts[2].dtype, parts[3].dtype)  # autocast gives some models such
        sinks, value_sinks, tail, value_tail = (part.to(wide) for part in parts)
        return sinks, value_sinks, tail, value_tail

    def packed(self) -> list[Tensor]:
        """Codes and gains of all blocks in the backend's layout, the keys' first."""
        sides = (self.key, self.value)
        return [side.store.buffers[name][: self.num_blocks] for side in sides for name in ("codes", "gains")]

    @property
    def shifted(self) -> bool:
        """Whether tokens of one row differ in what is to be taken from their slots for their positions."""
        return "shifts" in self.key.store.buffers

    def first_blocks(self, count: int) -> CacheView:
        """A view of the first blocks, the sinks and the tail, without padding: a small piece of the work at hand."""
        spans = self.spans[: min(count, self.num_blocks)]
        left_padding = None if self.left_padding is None else torch.zeros_like(self.left_padding)
        block_table, end = self.block_table[: len(spans)], spans[-1].end
        fresh: dict[str, Any] = {"flush": None, "prepared": {}, "touched": set()}
        return replace(self, block_table=block_table, spans=spans, encoded_end=end, left_padding=left_padding, **fresh)

    def sink_slots(self) -> Tensor:
        """Slots of the sinks of every row, ``[B or 1, S]``; those from ``encoded_end`` on are still in the tail."""
        keys, _ = self.sinks
        offsets = torch.arange(keys.shape[2], dtype=torch.int64, device=keys.device)
        return offsets[None] if self.left_padding is None else self.left_padding[:, None] + offsets

    def tiles(self, blocks_per_tile: int) -> list[tuple[int, int]]:
        """Ranges of blocks to work on at once.

        Args:
            blocks_per_tile: Largest size of a range.

        Returns:
            (first block, one past the last block) of every tile.
        """
        edges = range(0, self.num_blocks, blocks_per_tile)
        return [(i, min(i + blocks_per_tile, self.num_blocks)) for i in edges]

    @without_autocast
    def dense(self, name: str, by_kernels: bool = False) -> Tensor:
        """Keys or values of all slots, in the model's dtype.

        Args:
            name: ``"key"`` or ``"value"``.
            by_kernels: Let the layer's backend decode them; else plain torch does, whose digits do not depend on it.

        Returns:
            ``[B, H, T, D]``.
        """
        side = self.side(name)
        if self.stage is not None:
            raise GraphCaptureError(f"something other than spectral attention asks for the {name}s of a captured step")
        if not self.num_blocks:
            return side.tail
        assert side.codec is not None
        assert side.sinks is not None
        batch, heads, _, dim = side.tail.shape
        out = side.tail.new_zeros(batch, heads, self.length, dim)
        backend = self.backend if by_kernels else None
        for first, last in self.tiles(DECODED_BLOCKS):
            block_table = self.block_table[first:last]
            if backend is None:
                decoded = side.codec.decode(self.fields(name, first, last), block_table, self.frames)
            else:
                decoded = backend.decode(side.codec, side.store.slice(first, last), block_table, self.frames)
            if out.dtype == torch.float16:  # a token near float16's limit may decode to beyond it
                decoded = decoded.clamp(-FLOAT16_MAX, FLOAT16_MAX)
            decoded = decoded.to(out.dtype)
            slots = block_slots(block_table)
            if self.cut:
                inside = holds_tokens(block_table).nonzero().flatten()
                slots, decoded = slots[inside], decoded[:, :, inside]
            out.index_copy_(2, slots, decoded)
        if side.lead is not None:
            out[:, :, : side.lead.shape[2]] = side.lead
        self._place_sinks(out, side.sinks)
        out[:, :, self.encoded_end :] = side.tail
        return out

    def _place_sinks(self, out: Tensor, sinks: Tensor) -> None:
        if self.left_padding is None:
            out[:, :, : sinks.shape[2]] = sinks
            return
        slots = self.sink_slots()
        inside = (slots < self.encoded_end)[:, None, :, None]
        index = slots.clamp_max(self.encoded_end - 1)[:, None, :, None].expand(
            -1, *sinks.shape[1:2], -1, sinks.shape[3]
        )
        out.scatter_(2, index, torch.where(inside, sinks, out.gather(2, index)))
