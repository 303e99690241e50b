"""One layer of a spectral cache: how tokens come in, and how the oldest of them become blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcache.attention.lazy import LazyKV
from quantcache.backends import Backend, Fields, padding
from quantcache.backends.padding import Arrivals, Grid
from quantcache.backends.spans import Span, block_table_of, next_spans
from quantcache.backends.store import BlockStore
from quantcache.cache import alignment, guards
from quantcache.cache.blocks import BlockLayer
from quantcache.cache.state import Blocks, LayerState
from quantcache.cache.tails import appended
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache.common.ambient import without_autocast

LOOK_AHEAD = 8
"""Tokens before a block is due that it is looked at: more than a step of assisted decoding brings."""


@dataclass(frozen=True)
class _Due:
    """Tokens at the beginning of the tail that are to become blocks.

    Attributes:
        lead: How many of them become sinks.
        count: All of them.
        grid: Where the rows lie, now that this is known of them.
        codecs: Of either side.
        backend: Who encodes them.
        spans: Where the blocks lie.
        block_table: The spans as attention reads them.
        framed: Whether keys are encoded in frames of their positions.
        shifts: By how much tokens lie elsewhere in their frames than their slots say, if any does.
    """

    lead: int
    count: int
    grid: Grid
    codecs: dict[str, SideCodec]
    backend: Backend
    spans: list[Span]
    block_table: Tensor
    framed: bool
    shifts: Tensor | None


class SpectralLayer(BlockLayer):
    """One layer: sinks, encoded blocks and a tail of recent tokens.

    Slots 0 ... T-1 are the layer's tokens in order of arrival, one grid for the whole batch. Until the first block is
    due everything is in the tail. From then on the first ``sink_length`` valid tokens of every row are kept aside, and
    whenever the tail holds ``residual_length + 64`` tokens its oldest 64 become a block, never to be encoded again
    (but for padding, once the row behind it begins elsewhere than was thought). Padding is a matter of fidelity alone:
    every slot is kept, and what a query may look at is for its own mask to say.

    Arguments are those of :class:`quantcache.cache.blocks.BlockLayer`.
    """

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
        held = self.get_seq_length()
        if not held:
            self.lazy_initialization(key_states, value_states)
        new = {"key": key_states, "value": value_states}
        guards.require_continuation(self.index, self.tails, new)
        if key_states.device != self.tails["key"].device:
            self._follow(key_states.device)
        if self.state.pending:
            self.flush()
        self._leave_inference_mode()
        state = self.state
        trail = state.trail
        if trail is not None or arrivals is not None:
            length, blocks = held + key_states.shape[2], state.blocks
            trail = padding.extended(trail, arrivals, blocks.grid, blocks.end, length, key_states)
        if key_states.requires_grad or value_states.requires_grad:
            return self._update_differentiably(new, trail)
        tails, buffer = appended(state.tails, new, state.buffer)
        self._put(state._replace(tails=tails, buffer=buffer, trail=trail, pending=True, refused=False))
        view = self.snapshot()
        return LazyKV(view, "key"), LazyKV(view, "value")

    def tell(self, arrivals: Arrivals | None, count: int) -> None:
        """Say what a pass says of its tokens once :meth:`update` has taken them, and nothing was said.

        Args:
            arrivals: As of :meth:`update`.
            count: Tnew.
        """
        if arrivals is not None:
            state = self.state
            blocks, trail, keys = state.blocks, state.trail, state.tails["key"]
            trail = None if trail is None else trail[:, :, : trail.shape[2] - count]
            new = keys[:, :, -count:] if count else keys[:, :, :0]
            trail = padding.extended(trail, arrivals, blocks.grid, blocks.end, state.length, new)
            self._put(state._replace(trail=trail, refused=False))

    def _leave_inference_mode(self) -> None:
        """Copy what torch's inference mode has made, once it is over: autograd refuses to keep such tensors."""
        if torch.is_inference_mode_enabled():
            return
        held = (*self.sinks.values(), *(buffer for store in self.stores.values() for buffer in store.buffers.values()))
        if any(tensor.is_inference() for tensor in held):
            self._map_batch(lambda tensor, dim: tensor.clone())

    def _follow(self, device: torch.device) -> None:
        """Go where the model has gone, or come back from an offload."""
        self.flush()
        blocks = self.state.blocks
        if device != self.device and blocks.codecs:
            empty = {side: tail[:, :, :0] for side, tail in self.tails.items()}
            codecs = self.make_codecs(device, empty, Grid())
            self._put(self.state._replace(blocks=blocks._replace(codecs=codecs)))
        self._move(device)
        self.device = device

    def _update_differentiably(self, new: dict[str, Tensor], trail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append under autograd: plain tensors, with gradients to the new keys and values; the past is constant."""
        view = self.snapshot()
        dense = {side: torch.cat((view.dense(side), new[side]), dim=2) for side in SIDES}
        state, constant = self.state, {side: tokens.detach() for side, tokens in new.items()}
        tails, buffer = appended(state.tails, constant, state.buffer)
        self._put(state.changed(tails=tails, buffer=buffer, trail=trail, pending=True))
        return dense["key"], dense["value"]

    def flush(self) -> None:
        """Encode what is due, once the newest tokens have been read."""
        state = self.state
        if not state.pending:
            return
        lead = 0 if state.blocks.spans else self.sink_length
        due = (state.tails["key"].shape[2] - lead - self.residual_length) // BLOCK
        due -= due % self.blocks_at_once
        if due > 0:
            self._encode(lead, due)
        else:
            self.state = state._replace(finite_check=self._look_ahead(lead), pending=False)

    finish = flush
    """The name of :meth:`flush` before 0.3."""

    def _look_ahead(self, lead: int) -> guards.FiniteCheck | None:
        """Ask whether the next block is finite shortly before it is due: the answer is there when it is needed."""
        soon, check = BLOCK + max(0, self.residual_length - LOOK_AHEAD), self.state.finite_check
        early = self.tails["key"].shape[2] - lead < soon or self.blocks_at_once > 1
        if check is not None or early or not guards.AsyncReadback.is_asynchronous(self.device):
            return check
        return guards.FiniteCheck({side: tail[:, :, lead : lead + BLOCK] for side, tail in self.tails.items()})

    @without_autocast
    @torch.no_grad()
    def _encode(self, lead: int, blocks: int) -> None:
        """Make blocks of the tail's oldest tokens.

        Args:
            lead: Tokens before them, which become sinks.
            blocks: How many.
        """
        due = self._due(lead, lead + blocks * BLOCK)
        if due is None:
            self.state = self.state._replace(pending=False)
            return
        is_finite = self._require_finite(due)
        state, held = self.state, self.state.blocks
        tails, sinks, leads, stores = {}, {}, {}, {}
        gains: dict[str, guards.AsyncReadback] = {}
        for side in SIDES:
            tail, codec = state.tails[side], due.codecs[side]
            encoded = tail[:, :, lead : due.count]
            sinks[side], before = self._aside(side, due, encoded)
            if before is not None:
                leads[side] = before
            if not is_finite and codec.bits is not None:
                encoded = encoded.nan_to_num(0.0, 0.0, 0.0)  # it must not decide the paths of its block
            store, fields = self._blocks_of(side, due, encoded)
            if isinstance(codec, SpectralCodec):
                found = due.backend.gains(codec, fields)
                gains[side] = guards.AsyncReadback(codec.saturated(found, due.block_table, self.first_read(due.grid)))
            stores[side] = store.appended(fields)
            tails[side] = tail[:, :, due.count :].clone()
        # A GPU is still at work on these gains: what it says of them is asked when the next blocks are due.
        asynchronous = guards.AsyncReadback.is_asynchronous(self.device)
        guards.warn_of_saturation(self.index, (state.gains or {}) if asynchronous else gains)
        encoded_now = Blocks(
            codecs=due.codecs,
            spans=held.spans + due.spans,
            table=held.table.appended({"block_table": due.block_table}),
            stores=stores,
            layout=held.layout,
            sinks=sinks,
            leads=leads,
            left_padding=due.grid.left_padding,
            origins=due.grid.origins,
            cut=held.cut,
        )
        trail = None if state.trail is None else state.trail[:, :, due.count :].clone()
        self._put(LayerState(encoded_now, tails, trail, gains=gains if asynchronous else None))

    def _due(self, lead: int, count: int) -> _Due | None:
        """Settle where the rows lie, who encodes, and where the new blocks go; None where the codecs have to wait."""
        state, held = self.state, self.state.blocks
        grid = held.grid if state.trail is None else padding.settled(state.trail, held.grid, held.end)
        codecs = held.codecs
        if not codecs:
            displaced = None if state.trail is None else padding.filled(state.trail, grid)
            codecs = self.make_codecs(self.device, state.tails, grid._replace(shifts=displaced))
            if not codecs:
                return None
        backend = self._served(codecs)[0]
        self._relay(backend)
        framed = isinstance(codecs["key"], SpectralCodec) and not codecs["key"].frame.is_identity
        grid = grid if framed else Grid(grid.left_padding)
        shifts = alignment.shifts_of(state.trail, grid, held.stores["key"], lead, count) if framed else None
        spans = next_spans(held.spans[-1] if held.spans else None, lead, (count - lead) // BLOCK)
        return _Due(lead, count, grid, codecs, backend, spans, block_table_of(spans, self.device), framed, shifts)

    def _require_finite(self, due: _Due) -> bool:
        """Refuse to encode what is not finite, and leave it where it is; False where padding is not."""
        coded = {
            side: tail[:, :, due.lead : due.count]
            for side, tail in self.tails.items()
            if due.codecs[side].bits is not None
        }
        early = self.state.finite_check if len(due.spans) == 1 else None
        if (early or guards.FiniteCheck(coded)).finite():
            return True
        self._put(self.state.changed(refused=True))
        for side, tokens in coded.items():
            guards.require_finite(self.index, side, tokens, due.spans[0].start, due.grid.left_padding)
        return False

    def _aside(self, side: str, due: _Due, encoded: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sinks, those among the new blocks' tokens too, and what lies before the first block if not the sinks."""
        state, held = self.state, self.state.blocks
        sinks = held.sinks[side] if held.spans else state.tails[side][:, :, : due.lead].clone()
        if due.grid.left_padding is None:
            return sinks, None  # the sinks are the lead: there is no padding, or no row that has it any more
        before = held.leads.get(side)
        if not held.spans:
            # Padding may hold anything; of NaN no more is kept than codes would.
            before = sinks if due.codecs[side].bits is None else sinks.nan_to_num()
            sinks = alignment.with_sinks(torch.zeros_like(sinks), sinks, due.grid.left_padding, 0)
        return alignment.with_sinks(sinks, encoded, due.grid.left_padding, due.spans[0].start), before

    def _blocks_of(self, side: str, due: _Due, encoded: Tensor) -> tuple[BlockStore, Fields]:
        """Encode a side's new blocks.

        Returns:
            What is stored, with keys of rows that have moved encoded anew, and what is to be added.
        """
        held, frames = self.state.blocks, due.grid.frames
        store = held.stores[side]
        if due.framed and side == "key":
            table = held.table.slice(0, held.table.count).get("block_table", due.block_table)
            grids, dtype = (held.grid, due.grid), self.tails[side].dtype
            store = alignment.moved_rows(store, due.codecs[side], table, grids, dtype, due.backend)
            if due.shifts is not None:
                store = alignment.with_shifts(store, due.grid, encoded.shape[0], encoded.device)
                frames = due.shifts
        fields = due.backend.encode(due.codecs[side], encoded, due.block_table, frames)
        if frames is not None and frames.ndim == 2:
            fields["shifts"] = frames.int().unflatten(1, (-1, BLOCK)).transpose(0, 1)
        return store, fields

    @property
    def starts(self) -> Tensor | None:
        """``left_padding`` of its blocks by its former name."""
        return self.state.blocks.left_padding

    def first_read(self, grid: Grid) -> Tensor | None:
        """First slot of every row whose gain counts, ``[B]``: sinks are read elsewhere, padding hardly at all."""
        return None if grid.left_padding is None else grid.left_padding + self.sink_length

    def saturated_gains(self) -> tuple[int, int]:
        """How many tokens' gains lie beyond the largest and below the smallest that can be stored, heads counted apart.

        Returns:
            (above, below): the former are decoded too small, the latter as the mean.
        """
        blocks, above, below = self.state.blocks, 0, 0
        for side, codec in blocks.codecs.items():
            if isinstance(codec, SpectralCodec) and blocks.spans:
                table = blocks.table.slice(0, blocks.table.count)["block_table"]
                gains = blocks.layout.gains(codec, blocks.stores[side].slice(0, len(blocks.spans)))
                found = codec.saturated(gains, table, self.first_read(blocks.grid)).tolist()
                above, below = above + found[0], below + found[1]
        return above, below
