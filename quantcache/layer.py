"""One layer of a spectral cache: sinks, packed blocks and a tail of recent tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from quantcache import backends, compat, guards
from quantcache.backends import Backend
from quantcache.codec import SideCodec
from quantcache.errors import QuantCacheError
from quantcache.lazy import CacheView, LazyKV, SideView
from quantcache.packing import BLOCK
from quantcache.rows import chosen_rows, repeated_rows
from quantcache.schema import SIDES
from quantcache.spans import Span, next_spans
from quantcache.store import BlockStore
from quantcache.transaction import commit, glimpse

SINK_LENGTH = 4
RESIDUAL_LENGTH = 64


CodecFactory = Callable[[torch.device, dict[str, Tensor], Tensor | None], dict[str, SideCodec]]
"""Makes a layer's codecs when the first block is due, given device, tails (all that is cached) and the rows' starts.

With tails of no tokens it is asked for the same codecs on another device.
"""

ShapeCheck = Callable[[Tensor, Tensor], None]
"""Raises if a layer's first keys and values do not fit its codecs."""


class SpectralLayer(DynamicLayer):
    """One layer: sinks, encoded blocks and a tail of recent tokens.

    Slots 0 ... T-1 are the layer's tokens in order of arrival, one grid for the whole batch. Until the first block is
    due everything is in the tail. From then on the first ``sink_length`` valid tokens of every row are kept aside, and
    whenever the tail holds ``residual_length + 64`` tokens its oldest 64 become a block, never to be encoded again.

    Whatever changes the layer prepares everything first and puts it in place at once: a failure or an interrupt on the
    way leaves the layer as it was.

    Args:
        make_codecs: Gives the codecs of both sides when the first block is due.
        shape_check: Called with the first keys and values; raises if they do not fit.
        sink_length: Tokens at the start of every row that stay in the model's dtype.
        residual_length: At least this many recent tokens stay in the model's dtype.
        backend: Which implementation attends on codes.
        index: Which layer of the model this is, for messages.
    """

    spans: list[Span]
    stores: dict[str, BlockStore]
    places: BlockStore  # the spans once more, as a tensor for attention to read
    sinks: dict[str, Tensor]
    tails: dict[str, Tensor]
    starts: Tensor | None
    settled: bool  # whether every row has shown a valid token
    cut: bool  # whether a crop has left some block less than full
    pending: bool  # whether new tokens await their reader before they may be encoded

    def __init__(
        self,
        make_codecs: CodecFactory,
        shape_check: ShapeCheck | None = None,
        sink_length: int = SINK_LENGTH,
        residual_length: int = RESIDUAL_LENGTH,
        backend: Backend = "auto",
        index: int | None = None,
    ):
        super().__init__()
        self.make_codecs = make_codecs
        self.shape_check = shape_check
        self.sink_length, self.residual_length, self.backend = sink_length, residual_length, backend
        self.index = index
        self.codecs: dict[str, SideCodec] = {}
        self.reset()

    def __repr__(self) -> str:
        return f"SpectralLayer(tokens={self.get_seq_length()}, blocks={len(self.spans)})"

    # ------------------------------------------------------------------ state

    def reset(self) -> None:
        """Forget all tokens."""
        self._commit(
            spans=[],
            stores={side: BlockStore() for side in SIDES},
            places=BlockStore(),
            sinks={},
            tails={},
            starts=None,
            settled=False,
            cut=False,
            pending=False,
            is_initialized=False,
        )

    def _commit(self, **state: Any) -> None:
        """Put a new state in place at once."""
        commit([self], [state])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and geometry from the first keys and values."""
        if self.shape_check is not None:
            self.shape_check(key_states, value_states)
        self._commit(
            dtype=key_states.dtype,
            device=key_states.device,
            tails={"key": key_states[:, :, :0].clone(), "value": value_states[:, :, :0].clone()},
            is_initialized=True,
        )

    @property
    def encoded_end(self) -> int:
        """Slot behind the last encoded token; 0 before the first block."""
        return self.spans[-1].end if self.spans else 0

    def get_seq_length(self) -> int:
        """Tokens cached, T."""
        spans, tails = itemgetter("spans", "tails")(vars(self))  # of one moment, whatever other threads do
        return (spans[-1].end if spans else 0) + (tails["key"].shape[2] if tails else 0)

    @property
    def keys(self) -> Tensor | None:
        """Dense keys of all slots, ``[B, H, T, D]``, for code that reads a layer's tensors."""
        return LazyKV(self.snapshot(), "key") if self.is_initialized else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @property
    def values(self) -> Tensor | None:
        """Dense values of all slots, ``[B, H, T, D]``, for code that reads a layer's tensors."""
        return LazyKV(self.snapshot(), "value") if self.is_initialized else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    def _refuse_assignment(self, value: Tensor | None) -> None:
        if value is not None:
            raise QuantCacheError("a spectral layer's keys and values are packed: use update(), crop() or reset()")

    def snapshot(self) -> CacheView:
        """What may be read now.

        Returns:
            A view that stays valid until the next update.
        """
        now = glimpse(self)
        sides = {
            side: SideView(now.codecs.get(side), now.stores[side], now.sinks.get(side), now.tails[side])
            for side in SIDES
        }
        if now.spans:
            places = now.places.buffers["places"][: now.places.count]
        else:
            places = torch.zeros(0, 3, dtype=torch.int32, device=now.device)
        return CacheView(self, sides["key"], sides["value"], places, now.encoded_end, now.cut, now.starts)

    # ------------------------------------------------------------------ append and encode

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values.

        Args:
            key_states: ``[B, Hkv, Tnew, D]``, rotated as the model caches them.
            value_states: ``[B, Hkv, Tnew, Dv]``.
            args: Ignored, as by DynamicLayer.
            kwargs: Ignored, as by DynamicLayer.

        Returns:
            Lazy keys and values of all T tokens, the new ones exact.

        Raises:
            QuantCacheError: Batch size, heads, dimension or dtype differ from what is cached, or what is to be encoded
                is not finite.
        """
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
        new = {"key": key_states, "value": value_states}
        for side, tensor in new.items():
            guards.require_continuation(self.index, side, self.tails[side], tensor)
        if key_states.device != self.tails["key"].device:
            self._follow(key_states.device)
        self.finish()
        if key_states.requires_grad or value_states.requires_grad:
            return self._update_differentiably(new)
        tails = {side: torch.cat((self.tails[side], new[side]), dim=2) for side in SIDES}
        self._commit(tails=tails, pending=True)
        view = self.snapshot()
        return LazyKV(view, "key"), LazyKV(view, "value")

    def _follow(self, device: torch.device) -> None:
        """Go where the model has gone, or come back from an offload."""
        self.finish()
        if device != self.device and self.codecs:
            empty = {side: tail[:, :, :0] for side, tail in self.tails.items()}
            self.codecs = self.make_codecs(device, empty, None)
        self._move(device)
        self.device = device

    def _update_differentiably(self, new: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Append under autograd: plain tensors, with gradients to the new keys and values; the past is constant."""
        view = self.snapshot()
        dense = {side: torch.cat((view.dense(side), new[side]), dim=2) for side in SIDES}
        tails = {side: torch.cat((self.tails[side], new[side].detach()), dim=2) for side in SIDES}
        self._commit(tails=tails, pending=True)
        return dense["key"], dense["value"]

    def finish(self, mask: Tensor | None = None) -> None:
        """Encode what is due, once the newest tokens have been read.

        Args:
            mask: The attention mask their reader saw, ``[B, 1, Tq, T]`` boolean or additive: tells each row's padding.
        """
        if not self.pending:
            return
        if mask is None:
            self.settled = self.settled or self.starts is None  # no mask: no padding
        elif not self.settled:
            self._settle_starts(mask)
        lead = 0 if self.spans else self.sink_length
        due = (self.tails["key"].shape[2] - lead - self.residual_length) // BLOCK
        if due > 0:
            self._encode(lead, due)
        else:
            self.pending = False

    @torch.no_grad()
    def _encode(self, lead: int, due: int) -> None:
        """Make blocks of the tail's oldest tokens.

        Args:
            lead: Tokens before them, which become sinks.
            due: How many blocks.
        """
        codecs = self.codecs or self.make_codecs(self.device, self.tails, self.starts)
        spans = next_spans(self.spans[-1] if self.spans else None, lead, due)
        places = torch.tensor([astuple(span) for span in spans], dtype=torch.int32).to(self.device)
        tails, sinks, stores = {}, {}, {}
        for side in SIDES:
            tail = self.tails[side]
            encoded = tail[:, :, lead : lead + due * BLOCK]
            if codecs[side].bits is not None:
                guards.require_finite(self.index, side, encoded, spans[0].start, self.starts)
            sinks[side] = self.sinks[side] if self.spans else torch.zeros_like(tail[:, :, :lead])
            if not self.spans:
                sinks[side] = self._with_sinks(sinks[side], tail[:, :, :lead], 0)
            if self.starts is not None:
                sinks[side] = self._with_sinks(sinks[side], encoded, spans[0].start)
            fields = backends.encode(codecs[side], encoded, places, self.starts, self.backend)
            stores[side] = self.stores[side].appended(fields)
            tails[side] = tail[:, :, lead + due * BLOCK :].clone()
        self._commit(
            codecs=codecs,
            spans=self.spans + spans,
            stores=stores,
            places=self.places.appended({"places": places}),
            sinks=sinks,
            tails=tails,
            pending=False,
        )

    @torch.no_grad()
    def _settle_starts(self, mask: Tensor) -> None:
        """Learn how much left padding each row has; a row that has shown a valid token is settled for good."""
        length, seen = mask.shape[-1], self.get_seq_length() - mask.shape[-2]
        if length != self.get_seq_length():
            return
        last = mask[:, 0, -1]
        valid = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        first = torch.where(valid.any(-1), valid.int().argmax(-1), length)  # all padding so far: start not before here
        first = first.expand(self.tails["key"].shape[0])
        self.starts = first.clone() if self.starts is None else torch.where(self.starts < seen, self.starts, first)
        self.settled = bool((self.starts < length).all())

    def _with_sinks(self, sinks: Tensor, chunk: Tensor, slot: int) -> Tensor:
        """The sinks with those tokens of ``chunk`` (first slot ``slot``) filled in that are sinks of their row."""
        if self.starts is None:
            return chunk.clone()
        if not chunk.shape[2] or not sinks.shape[2]:
            return sinks
        index = self.starts[:, None] + torch.arange(sinks.shape[2], device=sinks.device) - slot  # [B, S]
        inside = ((index >= 0) & (index < chunk.shape[2]))[:, None, :, None]
        index = index.clamp(0, chunk.shape[2] - 1)[:, None, :, None].expand(sinks.shape)
        return torch.where(inside, chunk.gather(2, index), sinks)

    # ------------------------------------------------------------------ cache semantics

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens.

        A cut inside an encoded block keeps the block's codes and shortens its valid length.

        Args:
            tokens_to_remove: Zero or negative, as transformers defines it.
        """
        if not self.is_initialized:
            return
        self.finish()
        length = self.get_seq_length()
        keep = length - compat.tokens_to_remove(tokens_to_remove, length)
        state: dict[str, Any] = {} if keep else {"starts": None, "settled": False}
        if keep >= self.encoded_end:
            state["tails"] = {side: tail[:, :, : keep - self.encoded_end].clone() for side, tail in self.tails.items()}
        elif keep <= self.sink_length:
            view = self.snapshot()
            state["tails"] = {side: view.dense(side)[:, :, :keep].clone() for side in SIDES}
            state |= {"spans": [], "sinks": {}, "cut": False, "places": BlockStore()}
            state["stores"] = {side: BlockStore() for side in SIDES}
        else:
            spans = [span for span in self.spans if span.start < keep]
            last = spans[-1]
            spans[-1] = Span(last.start, min(last.length, keep - last.start), last.anchor)
            cut = torch.tensor([astuple(spans[-1])], dtype=torch.int32).to(self.device)
            state |= {"spans": spans, "cut": any(span.length < BLOCK for span in spans)}
            state["places"] = self.places.truncated(len(spans) - 1).copy().appended({"places": cut})
            state["stores"] = {side: store.truncated(len(spans)) for side, store in self.stores.items()}
            state["tails"] = {side: tail[:, :, :0].clone() for side, tail in self.tails.items()}
        self._commit(**state)

    def _map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        """Apply a function of (tensor, batch dimension) to everything stored."""
        if not self.is_initialized:
            return
        self.finish()
        self._commit(
            stores={side: store.mapped(lambda buffer: function(buffer, 1)) for side, store in self.stores.items()},
            tails={side: function(tail, 0) for side, tail in self.tails.items()},
            sinks={side: function(sinks, 0) for side, sinks in self.sinks.items()},
            starts=None if self.starts is None else function(self.starts, 0),
        )

    def reorder_cache(self, beam_idx: Any) -> None:
        """Gather rows, for beam search.

        Args:
            beam_idx: Row of the present cache that each new row continues, ``[B']``.

        Raises:
            RowError: There is no such row.
        """
        if self.is_initialized:
            rows = chosen_rows(beam_idx, self.tails["key"].shape[0]).to(self.tails["key"].device)
            self._map_batch(lambda tensor, dim: tensor.index_select(dim, rows))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows.

        Args:
            indices: Row numbers, negative ones counted from the end, or a mask over rows: tensor, array or list.

        Raises:
            RowError: There is no such row.
        """
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int | Tensor) -> None:
        """Repeat every row in place.

        Args:
            repeats: How often; or one number for each row.

        Raises:
            RowError: A number is negative, or there are not as many as rows.
        """
        if self.is_initialized:
            self.reorder_cache(repeated_rows(repeats, self.tails["key"].shape[0]))

    def _move(self, device: torch.device | str) -> None:
        self.finish()
        self._commit(
            places=self.places.moved(device),
            starts=None if self.starts is None else self.starts.to(device),
            stores={side: store.moved(device) for side, store in self.stores.items()},
            tails={side: tail.to(device, non_blocking=True) for side, tail in self.tails.items()},
            sinks={side: sinks.to(device, non_blocking=True) for side, sinks in self.sinks.items()},
        )

    def offload(self) -> None:
        """Move what is stored to CPU memory; the calibration's constants stay."""
        if self.is_initialized:
            self._move("cpu")

    def prefetch(self) -> None:
        """Move what is stored back to the layer's device; the next update does so by itself."""
        if self.is_initialized and self.tails["key"].device != self.device:
            self._move(self.device)

    def fork(self) -> SpectralLayer:
        """A layer of the same tokens that shares what is stored; whichever of the two changes copies what it changes.

        Returns:
            The new layer.
        """
        self.finish()
        new = glimpse(self)
        new.stores = {side: store.fork() for side, store in new.stores.items()}
        new.places = new.places.fork()
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralLayer:
        """Copy what is stored; constants are shared."""
        self.finish()
        new = glimpse(self)
        memo[id(self)] = new
        new.stores = {side: store.copy() for side, store in new.stores.items()}
        new.places = new.places.copy()
        new.sinks = {side: tensor.clone() for side, tensor in new.sinks.items()}
        new.tails = {side: tensor.clone() for side, tensor in new.tails.items()}
        new.starts = None if new.starts is None else new.starts.clone()
        return new
