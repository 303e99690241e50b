"""What a layer of a spectral cache stores, and how that is read, cut, reordered, moved and copied.

How tokens come in and become blocks is :mod:`quantcache.cache.layer`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from quantcache.attention.lazy import LazyKV
from quantcache.backends import (
    REFERENCE,
    Backend,
    BackendName,
    BackendReport,
    CacheView,
    Choice,
    Fields,
    padding,
    trials,
)
from quantcache.backends.spans import Span, block_table_of
from quantcache.backends.store import BlockStore
from quantcache.backends.view import SideView
from quantcache.cache.codecs import CodecFactory, ShapeCheck
from quantcache.cache.rows import chosen_rows, repeated_rows
from quantcache.cache.state import NO_BLOCKS, NOTHING, Blocks, LayerState
from quantcache.cache.transaction import commit, shallow_copy, with_symbolic_length
from quantcache.coding.blocks import SideCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache.common import compat
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError, TokensNotFinite


class BlockLayer(DynamicLayer):
    """A layer's sinks, encoded blocks and tail; :class:`quantcache.cache.layer.SpectralLayer` fills them.

    Whatever changes the layer prepares everything first and puts it in place at once: a failure or an interrupt on the
    way leaves the layer as it was.

    Args:
        make_codecs: Gives the codecs of both sides when the first block is due.
        shape_check: Called with the first keys and values; raises if they do not fit.
        sink_length: Tokens at the start of every row that stay in the model's dtype.
        residual_length: At least this many recent tokens stay in the model's dtype.
        backend: Which implementation encodes and attends on codes.
        index: Which layer of the model this is, for messages.
    """

    blocks_at_once = 1
    """Blocks that are encoded together, for codecs whose tiles are longer than a block; fewer wait in the tail."""

    state = NOTHING
    symbolic_length: Tensor | None = None  # T as a graph reads it; of the cache's first layer only
    _past: tuple[tuple[Any, ...], CacheView] | None = None  # a view of these blocks without a tail; what it is made of

    def __init__(
        self,
        make_codecs: CodecFactory,
        shape_check: ShapeCheck | None = None,
        sink_length: int = SINK_LENGTH,
        residual_length: int = RESIDUAL_LENGTH,
        backend: BackendName = "auto",
        index: int | None = None,
    ):
        super().__init__()
        self.make_codecs = make_codecs
        self.shape_check = shape_check
        self.sink_length, self.residual_length, self.backend = sink_length, residual_length, backend
        self.index = index
        self._choice = Choice()
        self.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self.get_seq_length()}, blocks={len(self.spans)})"

    # ------------------------------------------------------------------ state

    def reset(self) -> None:
        """Forget all tokens."""
        self._put(NOTHING, is_initialized=False)

    def _put(self, state: LayerState, **attributes: Any) -> None:
        """Put a new state in place, with other attributes that change with it."""
        if state.blocks is not self.state.blocks:
            attributes["_past"] = None  # it would keep the old ones alive
        if attributes or self.symbolic_length is not None:
            commit([self], [with_symbolic_length(self, {"state": state, **attributes})])
        else:
            self.state = state

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and geometry from the first keys and values."""
        if self.shape_check is not None:
            self.shape_check(key_states, value_states)
        tails = {"key": key_states[:, :, :0].clone(), "value": value_states[:, :, :0].clone()}
        state = self.state.changed(tails=tails)
        self._put(state, dtype=key_states.dtype, device=key_states.device, is_initialized=True)

    def get_seq_length(self) -> int:
        """Tokens cached, T."""
        return self.state.length

    @property
    def codecs(self) -> dict[str, SideCodec]:
        """See :class:`quantcache.cache.state.Blocks`."""
        return self.state.blocks.codecs

    @property
    def spans(self) -> list[Span]:
        """See :class:`quantcache.cache.state.Blocks`."""
        return self.state.blocks.spans

    @property
    def stores(self) -> dict[str, BlockStore]:
        """See :class:`quantcache.cache.state.Blocks`."""
        return self.state.blocks.stores

    @property
    def sinks(self) -> dict[str, Tensor]:
        """See :class:`quantcache.cache.state.Blocks`."""
        return self.state.blocks.sinks

    @property
    def tails(self) -> dict[str, Tensor]:
        """See :class:`quantcache.cache.state.LayerState`."""
        return self.state.tails

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
        state, past = self.state, self._past
        made_of = state.blocks, self.backend, trials.rejections()
        if past is None or not all(map(operator.is_, past[0], made_of)):
            if state.blocks.spans:
                self._relay(self._served()[0])
            state = self.state
            self._past = past = (state.blocks, *made_of[1:]), self._view_without_tail(state.blocks)
        return past[1].with_tails(state.tails, self.flush)

    def _view_without_tail(self, blocks: Blocks) -> CacheView:
        """What may be read of blocks and sinks."""
        empty = {side: tail[:, :, :0].clone() for side, tail in self.tails.items()}  # a view would keep all of a tail
        key, value = (
            SideView(empty[s], blocks.codecs.get(s), blocks.stores[s], blocks.sinks.get(s), blocks.leads.get(s))
            for s in SIDES
        )
        if blocks.spans:
            table = blocks.table.buffers["block_table"][: blocks.table.count]
            backend, report = blocks.layout, self._served(blocks.codecs)[1]
        else:
            table, backend, report = torch.zeros(0, 3, dtype=torch.int32, device=self.device), None, None
        return CacheView(
            key,
            value,
            flush=None,
            block_table=table,
            encoded_end=blocks.end,
            cut=blocks.cut,
            left_padding=blocks.left_padding,
            origins=blocks.origins,
            spans=blocks.spans,
            backend=backend,
            report=report,
        )

    # ------------------------------------------------------------------ backend

    def _served(self, codecs: dict[str, SideCodec] | None = None) -> tuple[Backend, BackendReport]:
        """Who encodes and attends."""
        codecs = codecs or self.codecs
        return self._choice.of(self.backend, self.device, {side: self.tails[side].dtype for side in SIDES}, codecs)

    def backend_report(self) -> BackendReport | None:
        """Who encodes and attends here, and why not a faster backend; None before the first block."""
        return self._served()[1] if self.spans else None

    def fields(self, side: str) -> Fields:
        """All blocks of a side in the portable layout.

        Args:
            side: ``"key"`` or ``"value"``.

        Returns:
            The codec's fields, ``[n, B, ...]`` each.
        """
        store, layout = self.stores[side], self.state.blocks.layout
        return layout.to_portable(self.codecs[side], store.slice(0, store.count)) if store.count else {}

    def _relay(self, backend: Backend) -> None:
        """Bring the blocks into a backend's layout."""
        blocks = self.state.blocks
        if backend is blocks.layout:
            return
        stores = blocks.stores
        if backend.layout != blocks.layout.layout:
            stores = {
                side: store.mapped_fields(backend.from_portable(blocks.codecs[side], self.fields(side)))
                if store.count
                else store
                for side, store in stores.items()
            }
        self._put(self.state._replace(blocks=blocks._replace(stores=stores, layout=backend)))

    def flush(self) -> None:
        """Encode what is due; nothing here."""

    def flush_if_finite(self) -> None:
        """Encode what is due, unless it is not finite.

        It then stays as it is and can be copied, cut, selected from and saved; the next update tries again.
        """
        with contextlib.suppress(TokensNotFinite):
            self.flush()

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
        self.flush_if_finite()
        state, length = self.state, self.get_seq_length()
        keep = length - compat.tokens_to_remove(tokens_to_remove, length)
        blocks, tails, trail = state.blocks, state.tails, state.trail
        if trail is not None:
            trail = trail[:, :, : max(0, keep - blocks.end)].clone()
        if keep >= blocks.end:
            tails = {side: tail[:, :, : keep - blocks.end].clone() for side, tail in tails.items()}
        elif keep <= self.sink_length:
            view = self.snapshot()
            tails = {side: view.dense(side)[:, :, :keep].clone() for side in SIDES}
            if trail is not None:
                trail = padding.plain(blocks.grid, trail.shape[0], 0, keep, trail.device)
            blocks = NO_BLOCKS
        else:
            blocks = self._cut(blocks, keep)
            tails = {side: tail[:, :, :0].clone() for side, tail in tails.items()}
        if not keep:  # nothing is known of the tokens to come
            blocks, trail, state = blocks._replace(left_padding=None, origins=None), None, state._replace(pending=False)
        self._put(state.changed(blocks=blocks, tails=tails, trail=trail))

    def _cut(self, blocks: Blocks, keep: int) -> Blocks:
        """The blocks of the first tokens; the last one may keep codes of more."""
        spans = [span for span in blocks.spans if span.start < keep]
        last = spans[-1]
        spans[-1] = Span(last.start, min(last.length, keep - last.start), last.anchor)
        table = blocks.table.truncated(len(spans) - 1).copy()
        return blocks._replace(
            spans=spans,
            cut=any(span.length < BLOCK for span in spans),
            table=table.appended({"block_table": block_table_of(spans[-1:], self.device)}),
            stores={side: store.truncated(len(spans)) for side, store in blocks.stores.items()},
        )

    def _map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        """Apply a function of (tensor, batch dimension) to everything stored."""
        if not self.is_initialized:
            return
        self.flush_if_finite()
        self._put(self.state.mapped(function))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Gather rows, for beam search.

        Args:
            beam_idx: Row of the present cache that each new row continues, ``[B']``.

        Raises:
            RowError: A row does not exist.
        """
        if self.is_initialized:
            rows = chosen_rows(beam_idx, self.tails["key"].shape[0]).to(self.tails["key"].device)
            self._map_batch(lambda tensor, dim: tensor.index_select(dim, rows))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows.

        Args:
            indices: Row numbers, negative ones counted from the end, or a mask over rows: tensor, array or list.

        Raises:
            RowError: A row does not exist.
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
        self.flush_if_finite()
        self._relay(REFERENCE)
        self._put(self.state.moved(device))

    def offload(self) -> None:
        """Move what is stored to CPU memory; the calibration's constants stay."""
        if self.is_initialized:
            self._move("cpu")

    def prefetch(self) -> None:
        """Move what is stored back to the layer's device; the next update does so by itself."""
        if self.is_initialized and self.tails["key"].device != self.device:
            self._move(self.device)

    def fork(self) -> Self:
        """A layer of the same tokens that shares what is stored; whichever of the two changes copies what it changes.

        Returns:
            The new layer.
        """
        self.flush_if_finite()
        new = shallow_copy(self)
        new._put(new.state.forked())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy what is stored; constants are shared."""
        self.flush_if_finite()
        new = shallow_copy(self)
        memo[id(self)] = new
        new._put(new.state.copied())
        return new
