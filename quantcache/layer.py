"""One layer of a spectral cache: sinks, packed blocks and a tail of recent tokens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from quantcache import backends, compat, guards, padding
from quantcache.ambient import without_autocast
from quantcache.backends import Backend
from quantcache.codec import SideCodec, SpectralCodec
from quantcache.errors import QuantCacheError, TokensNotFinite
from quantcache.lazy import CacheView, LazyKV, SideView
from quantcache.packing import BLOCK
from quantcache.padding import Arrivals, Grid
from quantcache.rope import ANCHOR_LENGTH
from quantcache.schema import SIDES
from quantcache.store import BlockStore

SINK_LENGTH = 4
RESIDUAL_LENGTH = 64


def _with_sinks(sinks: Tensor, chunk: Tensor, starts: Tensor, slot: int) -> Tensor:
    """The sinks with those tokens of ``chunk`` (first slot ``slot``) filled in that are sinks of their row."""
    if not chunk.shape[2] or not sinks.shape[2]:
        return sinks
    index = starts[:, None] + torch.arange(sinks.shape[2], dtype=torch.int64, device=sinks.device) - slot  # [B, S]
    inside = ((index >= 0) & (index < chunk.shape[2]))[:, None, :, None]
    index = index.clamp(0, chunk.shape[2] - 1)[:, None, :, None].expand(sinks.shape)
    return torch.where(inside, chunk.gather(2, index), sinks)


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


CodecFactory = Callable[[torch.device, dict[str, Tensor], Grid], dict[str, SideCodec]]
"""Makes a layer's codecs when the first block is due, given device, tails (all that is cached) and where rows lie.

With tails of no tokens it is asked for the same codecs on another device.
"""

ShapeCheck = Callable[[Tensor, Tensor], None]
"""Raises if a layer's first keys and values do not fit its codecs."""


class SpectralLayer(DynamicLayer):
    """One layer: sinks, encoded blocks and a tail of recent tokens.

    Slots 0 ... T-1 are the layer's tokens in order of arrival, one grid for the whole batch. Until the first block is
    due everything is in the tail. From then on the first ``sink_length`` valid tokens of every row are kept aside, and
    whenever the tail holds ``residual_length + 64`` tokens its oldest 64 become a block, never to be encoded again
    (but for padding, once the row behind it begins elsewhere than was thought). Padding is a matter of fidelity alone:
    every slot is kept, and what a query may look at is for its own mask to say.

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
    leads: dict[str, Tensor]  # what lies before the first block, where that is not the sinks
    starts: Tensor | None
    origins: Tensor | None
    trail: Tensor | None  # what is known of the tail's tokens, see padding.extended
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
            leads={},
            starts=None,
            origins=None,
            trail=None,
            cut=False,
            pending=False,
            is_initialized=False,
        )

    def _commit(self, **state: Any) -> None:
        """Put a new state in place: one call into C, which no signal handler and no exception can come between."""
        vars(self).update(state)

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
        return self.encoded_end + (self.tails["key"].shape[2] if self.tails else 0)

    @property
    def keys(self) -> Tensor | None:
        """Dense keys of all slots, ``[B, H, T, D]``, for code that reads a layer's tensors."""
        return LazyKV(self.snapshot(), "key", guarded=True) if self.is_initialized else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @property
    def values(self) -> Tensor | None:
        """Dense values of all slots, ``[B, H, T, D]``, for code that reads a layer's tensors."""
        return LazyKV(self.snapshot(), "value", guarded=True) if self.is_initialized else None

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
        sides = {
            side: SideView(
                self.codecs.get(side), self.stores[side], self.sinks.get(side), self.tails[side], self.leads.get(side)
            )
            for side in SIDES
        }
        if self.spans:
            places = self.places.buffers["places"][: self.places.count]
        else:
            places = torch.zeros(0, 3, dtype=torch.int32, device=self.device)
        return CacheView(
            self, sides["key"], sides["value"], places, self.encoded_end, self.cut, self.starts, self.origins
        )

    @property
    def grid(self) -> Grid:
        """Where the rows lie in the slots."""
        return Grid(self.starts, self.origins)

    # ------------------------------------------------------------------ append and encode

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        arrivals: Arrivals | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values.

        Args:
            key_states: ``[B, Hkv, Tnew, D]``, rotated as the model caches them.
            value_states: ``[B, Hkv, Tnew, Dv]``.
            args: Ignored, as by DynamicLayer.
            arrivals: What the pass says of padding and positions; None where nobody knows.
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
        self._leave_inference_mode()
        length = self.get_seq_length() + key_states.shape[2]
        trail = padding.extended(self.trail, arrivals, self.grid, self.encoded_end, length, key_states)
        if key_states.requires_grad or value_states.requires_grad:
            return self._update_differentiably(new, trail)
        tails = {side: torch.cat((self.tails[side], new[side]), dim=2) for side in SIDES}
        self._commit(tails=tails, trail=trail, pending=True)
        view = self.snapshot()
        return LazyKV(view, "key"), LazyKV(view, "value")

    def _leave_inference_mode(self) -> None:
        """Copy what torch's inference mode has made, once it is over: autograd refuses to keep such tensors."""
        held = (*self.sinks.values(), *(buffer for store in self.stores.values() for buffer in store.buffers.values()))
        if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in held):
            self._map_batch(lambda tensor, dim: tensor.clone())

    def _follow(self, device: torch.device) -> None:
        """Go where the model has gone, or come back from an offload."""
        self.finish()
        if device != self.device and self.codecs:
            empty = {side: tail[:, :, :0] for side, tail in self.tails.items()}
            self.codecs = self.make_codecs(device, empty, Grid())
        self._move(device)
        self.device = device

    def _update_differentiably(self, new: dict[str, Tensor], trail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append under autograd: plain tensors, with gradients to the new keys and values; the past is constant."""
        view = self.snapshot()
        dense = {side: torch.cat((view.dense(side), new[side]), dim=2) for side in SIDES}
        tails = {side: torch.cat((self.tails[side], new[side].detach()), dim=2) for side in SIDES}
        self._commit(tails=tails, trail=trail, pending=True)
        return dense["key"], dense["value"]

    @without_autocast
    def finish(self) -> None:
        """Encode what is due, once the newest tokens have been read."""
        if not self.pending:
            return
        lead = 0 if self.spans else self.sink_length
        due = (self.tails["key"].shape[2] - lead - self.residual_length) // BLOCK
        if due > 0:
            self._encode(lead, due)
        else:
            self.pending = False

    def finish_if_finite(self) -> None:
        """Encode what is due, unless it is not finite.

        It then stays as it is and can be copied, cut, selected from and saved; the next update tries again.
        """
        with contextlib.suppress(TokensNotFinite):
            self.finish()

    @torch.no_grad()
    def _encode(self, lead: int, due: int) -> None:
        """Make blocks of the tail's oldest tokens.

        Args:
            lead: Tokens before them, which become sinks.
            due: How many blocks.
        """
        grid, count = self.grid, lead + due * BLOCK
        if self.trail is not None:
            grid = padding.settled(self.trail, grid, self.encoded_end)
        codecs = self.codecs or self.make_codecs(self.device, self.tails, grid)
        framed = isinstance(codecs["key"], SpectralCodec) and not codecs["key"].frame.is_identity
        grid = grid if framed else Grid(grid.starts)
        shifts = self._shifts(grid, lead, count) if framed else None
        spans = self._next_spans(lead, due)
        places = torch.tensor([astuple(span) for span in spans], dtype=torch.int32, device=self.device)
        tails, sinks, stores, leads = {}, {}, {}, dict(self.leads)
        for side in SIDES:
            tail, store = self.tails[side], self.stores[side]
            encoded = tail[:, :, lead:count]
            if codecs[side].bits is not None:
                guards.require_finite(self.index, side, encoded, spans[0].start, grid.starts)
            sinks[side] = self.sinks[side] if self.spans else tail[:, :, :lead].clone()
            if grid.starts is not None:
                if not self.spans:
                    # Padding may hold anything; of NaN no more is kept than codes would.
                    leads[side] = sinks[side] if codecs[side].bits is None else sinks[side].nan_to_num()
                    sinks[side] = _with_sinks(torch.zeros_like(sinks[side]), sinks[side], grid.starts, 0)
                sinks[side] = _with_sinks(sinks[side], encoded, grid.starts, spans[0].start)
            frames = grid.frames
            if framed and side == "key":
                store = self._moved_to(grid, codecs[side], store)
                if shifts is not None:
                    store, frames = self._with_shifts(store, grid), shifts
            fields = backends.encode(codecs[side], encoded, places, frames, self.backend)
            if frames is not None and frames.ndim == 2:
                fields["shifts"] = frames.int().unflatten(1, (-1, BLOCK)).transpose(0, 1)
            if isinstance(codec := codecs[side], SpectralCodec):
                saturated = codec.saturated(fields["gains"], places, self._first_read(grid))
                guards.warn_of_saturation(self.index, side, *saturated)
            stores[side] = store.appended(fields)
            tails[side] = tail[:, :, count:].clone()
        self._commit(
            starts=grid.starts,
            origins=grid.origins,
            trail=None if self.trail is None else self.trail[:, :, count:].clone(),
            leads=leads,
            codecs=codecs,
            spans=self.spans + spans,
            stores=stores,
            places=self.places.appended({"places": places}),
            sinks=sinks,
            tails=tails,
            pending=False,
        )

    def _first_read(self, grid: Grid) -> Tensor | None:
        """First slot of every row whose gain counts, ``[B]``: sinks are read elsewhere, padding hardly at all."""
        return None if grid.starts is None else grid.starts + self.sink_length

    def saturated_gains(self) -> tuple[int, int]:
        """How many tokens' gains lie beyond the largest and below the smallest that can be stored, heads counted apart.

        Returns:
            (above, below): the former are decoded too small, the latter as the mean.
        """
        above = below = 0
        for side, codec in self.codecs.items():
            if isinstance(codec, SpectralCodec) and self.spans:
                store, places = self.stores[side], self.places
                gains, where = store.slice(0, store.count)["gains"], places.slice(0, places.count)["places"]
                found = codec.saturated(gains, where, self._first_read(self.grid))
                above, below = above + found[0], below + found[1]
        return above, below

    def _next_spans(self, lead: int, count: int) -> list[Span]:
        spans: list[Span] = []
        previous = self.spans[-1] if self.spans else None
        for _ in range(count):
            start = previous.end if previous else lead
            shared = previous is not None and start + BLOCK <= previous.anchor + ANCHOR_LENGTH
            previous = Span(start, BLOCK, previous.anchor if shared and previous else start)
            spans.append(previous)
        return spans

    def _shifts(self, grid: Grid, first: int, last: int) -> Tensor | None:
        """What is to be taken from the slots of some of the tail for their positions, ``[B, last - first]``.

        None where that is the same for all tokens of a row, the encoded ones included.
        """
        if self.trail is None:
            return None
        shifts = padding.filled(self.trail, grid)[:, first:last]
        frames = torch.zeros_like(shifts[:, 0]) if grid.frames is None else grid.frames
        return shifts if "shifts" in self.stores["key"].buffers or bool((shifts != frames[:, None]).any()) else None

    def _moved_to(self, grid: Grid, codec: SideCodec, store: BlockStore) -> BlockStore:
        """The keys' blocks once more for rows that begin elsewhere than was thought: so far they held padding only."""
        old, new = self.grid.frames, grid.frames
        if not self.spans or old is None or new is None or "shifts" in store.buffers:
            return store
        rows = (old != new).nonzero().flatten()
        if not len(rows):
            return store
        places, fields = self.places.buffers["places"][: self.places.count], store.slice(0, store.count)
        held = codec.decode({name: each[:, rows] for name, each in fields.items()}, places, old[rows])
        again = backends.encode(codec, held.to(self.tails["key"].dtype), places, new[rows], self.backend)
        return store.mapped_fields({name: each.index_copy(1, rows, again[name]) for name, each in fields.items()})

    def _with_shifts(self, store: BlockStore, grid: Grid) -> BlockStore:
        """The keys' blocks with a field that says what is to be taken from each token's slot for its position."""
        if not self.spans or "shifts" in store.buffers:
            return store
        rows = self.tails["key"].shape[0]
        shifts = padding.plain(grid, rows, 0, BLOCK, self.device)[:, 0]
        fields = store.slice(0, store.count)
        return store.mapped_fields({**fields, "shifts": shifts.expand(store.count, rows, BLOCK)})

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
        self.finish_if_finite()
        length = self.get_seq_length()
        keep = length - compat.tokens_to_remove(tokens_to_remove, length)
        state: dict[str, Any] = {} if keep else {"starts": None, "origins": None, "trail": None, "pending": False}
        if keep and self.trail is not None:
            state["trail"] = self.trail[:, :, : max(0, keep - self.encoded_end)].clone()
        if keep >= self.encoded_end:
            state["tails"] = {side: tail[:, :, : keep - self.encoded_end].clone() for side, tail in self.tails.items()}
        elif keep <= self.sink_length:
            view = self.snapshot()
            state["tails"] = {side: view.dense(side)[:, :, :keep].clone() for side in SIDES}
            if keep and self.trail is not None:
                state["trail"] = padding.plain(self.grid, self.trail.shape[0], 0, keep, self.trail.device)
            state |= {"spans": [], "sinks": {}, "leads": {}, "cut": False, "places": BlockStore()}
            state |= {"starts": None, "origins": None}
            state["stores"] = {side: BlockStore() for side in SIDES}
        else:
            spans = [span for span in self.spans if span.start < keep]
            last = spans[-1]
            spans[-1] = Span(last.start, min(last.length, keep - last.start), last.anchor)
            cut = torch.tensor([astuple(spans[-1])], dtype=torch.int32, device=self.device)
            state |= {"spans": spans, "cut": any(span.length < BLOCK for span in spans)}
            state["places"] = self.places.truncated(len(spans) - 1).copy().appended({"places": cut})
            state["stores"] = {side: store.truncated(len(spans)) for side, store in self.stores.items()}
            state["tails"] = {side: tail[:, :, :0].clone() for side, tail in self.tails.items()}
        self._commit(**state)

    def _map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        """Apply a function of (tensor, batch dimension) to everything stored."""
        if not self.is_initialized:
            return
        self.finish_if_finite()
        self._commit(
            stores={side: store.mapped(lambda buffer: function(buffer, 1)) for side, store in self.stores.items()},
            tails={side: function(tail, 0) for side, tail in self.tails.items()},
            sinks={side: function(sinks, 0) for side, sinks in self.sinks.items()},
            leads={side: function(lead, 0) for side, lead in self.leads.items()},
            starts=None if self.starts is None else function(self.starts, 0),
            origins=None if self.origins is None else function(self.origins, 0),
            trail=None if self.trail is None else function(self.trail, 0),
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gather rows, for beam search.

        Args:
            beam_idx: Row of the present cache that each new row continues, ``[B']``.
        """
        self._map_batch(lambda tensor, dim: tensor.index_select(dim, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows.

        Args:
            indices: Row indices, or a boolean mask over rows.
        """
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place.

        Args:
            repeats: How often.
        """
        self._map_batch(lambda tensor, dim: tensor.repeat_interleave(repeats, dim=dim))

    def _move(self, device: torch.device | str) -> None:
        self.finish_if_finite()
        self._commit(
            places=self.places.moved(device),
            starts=None if self.starts is None else self.starts.to(device),
            origins=None if self.origins is None else self.origins.to(device),
            trail=None if self.trail is None else self.trail.to(device),
            leads={side: lead.to(device, non_blocking=True) for side, lead in self.leads.items()},
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
        self.finish_if_finite()
        new = copy.copy(self)
        new.stores = {side: store.fork() for side, store in self.stores.items()}
        new.places = self.places.fork()
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralLayer:
        """Copy what is stored; constants are shared."""
        self.finish_if_finite()
        new = copy.copy(self)
        memo[id(self)] = new
        new.spans = list(self.spans)
        new.stores = {side: store.copy() for side, store in self.stores.items()}
        new.places = self.places.copy()
        new.sinks = {side: tensor.clone() for side, tensor in self.sinks.items()}
        new.tails = {side: tensor.clone() for side, tensor in self.tails.items()}
        new.leads = {side: tensor.clone() for side, tensor in self.leads.items()}
        new.starts = None if self.starts is None else self.starts.clone()
        new.origins = None if self.origins is None else self.origins.clone()
        new.trail = None if self.trail is None else self.trail.clone()
        return new
