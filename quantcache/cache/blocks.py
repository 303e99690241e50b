"""What a layer of a spectral cache stores, and how that is read, cut, reordered, moved and copied.

How tokens come in and become blocks is :mod:`quantcache.cache.layer`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from quantcache.attention import guards
from quantcache.attention.lazy import LazyKV
from quantcache.backends import (
    REFERENCE,
    Backend,
    BackendName,
    BackendReport,
    CacheView,
    Choice,
    Fields,
    Shared,
    padding,
    trials,
)
from quantcache.backends.padding import Grid
from quantcache.backends.spans import Span, block_table_of
from quantcache.backends.store import BlockStore, moved
from quantcache.cache.codecs import CodecFactory, ShapeCheck
from quantcache.cache.rows import chosen_rows, repeated_rows
from quantcache.cache.tails import TailBuffer
from quantcache.cache.transaction import put, shallow_copy, with_symbolic_length
from quantcache.coding.blocks import SideCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache.common import compat
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError, TokensNotFinite

_of_one_moment = itemgetter(
    *("tails", "shared", "codecs", "spans", "stores", "sinks", "leads"),
    *("left_padding", "origins", "cut", "layout", "block_table", "backend"),
)
"""Of a layer's attributes those that views are made of, whatever other threads do."""

_tokens = itemgetter("spans", "tails")  # and those that say how many there are


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

    codecs: dict[str, SideCodec]  # of both sides, once there are blocks
    spans: list[Span]
    stores: dict[str, BlockStore]
    block_table: BlockStore  # the spans once more, as a tensor for attention to read
    sinks: dict[str, Tensor]
    tails: dict[str, Tensor]
    buffer: TailBuffer | None  # what the tails are views of, if they are
    leads: dict[str, Tensor]  # what lies before the first block, where that is not the sinks
    left_padding: Tensor | None
    origins: Tensor | None
    trail: Tensor | None  # what is known of the tail's tokens, see padding.extended
    cut: bool  # whether a crop has left some block less than full
    pending: bool  # whether new tokens await their reader before they may be encoded
    gains: dict[str, guards.AsyncReadback]  # how many of the last blocks' gains do not fit their range
    refused: bool  # whether the tail's oldest tokens are not finite, and could not be encoded
    finite_check: guards.FiniteCheck | None  # whether the tail's first block, which is not due yet, is finite
    layout: Backend  # in whose layout the blocks are
    symbolic_length: Tensor | None = None  # T as a graph reads it; of the cache's first layer only
    shared: Shared | None  # what views of these blocks have in common

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
        self._commit(
            codecs={},  # those that have been fitted to these tokens are not the next ones'
            spans=[],
            stores={side: BlockStore() for side in SIDES},
            block_table=BlockStore(),
            sinks={},
            tails={},
            leads={},
            gains={},
            left_padding=None,
            origins=None,
            trail=None,
            cut=False,
            pending=False,
            layout=REFERENCE,
            is_initialized=False,
        )

    def _commit(self, **state: Any) -> None:
        """Put a new state in place at once. What follows from the old one is gone, unless the new one names it."""
        state = {"finite_check": None, "refused": False, "buffer": None, "shared": None, **state}
        put(self, with_symbolic_length(self, state))

    def _go_on(self, **state: Any) -> None:
        """Put a new state in place at once, for blocks that stay as they are."""
        state["refused"] = False
        put(self, with_symbolic_length(self, state))

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
        spans, tails = _tokens(vars(self))
        return (spans[-1].end if spans else 0) + (tails["key"].shape[2] if tails else 0)

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
        tails, shared, *lasting = [*list(_of_one_moment(vars(self))), trials.rejections()]
        if shared is None or not all(map(operator.is_, shared.made_of, lasting)):
            if self.spans:
                self._relay(self._served()[0])
            tails, _, *lasting = [*list(_of_one_moment(vars(self))), trials.rejections()]
            self.shared = shared = self._shared(lasting)
        return shared.view(tails, self.flush)

    def _shared(self, lasting: list[Any]) -> Shared:
        """What views have in common until blocks change."""
        codecs, spans, stores, sinks, leads, left_padding, origins, cut, layout, block_table, *_ = lasting
        key, value = ((codecs.get(side), stores[side], sinks.get(side), leads.get(side)) for side in SIDES)
        if spans:
            table = block_table.buffers["block_table"][: block_table.count]
            end, backend, report = spans[-1].end, layout, self._served(codecs)[1]
        else:
            table, end, backend, report = torch.zeros(0, 3, dtype=torch.int32, device=self.device), 0, None, None
        return Shared(lasting, key, value, (table, end, cut, left_padding, origins, spans, backend, report, {}))

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
        store = self.stores[side]
        return self.layout.to_portable(self.codecs[side], store.slice(0, store.count)) if store.count else {}

    def _relay(self, backend: Backend) -> None:
        """Bring the blocks into a backend's layout."""
        if backend.layout != self.layout.layout:
            stores = {
                side: store.mapped_fields(backend.from_portable(self.codecs[side], self.fields(side)))
                for side, store in self.stores.items()
                if store.count
            }
            put(self, {"stores": {**self.stores, **stores}, "layout": backend})
        elif backend is not self.layout:
            put(self, {"layout": backend})

    @property
    def grid(self) -> Grid:
        """Where the rows lie in the slots."""
        return Grid(self.left_padding, self.origins)

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
        length = self.get_seq_length()
        keep = length - compat.tokens_to_remove(tokens_to_remove, length)
        state: dict[str, Any] = {} if keep else {"left_padding": None, "origins": None, "trail": None, "pending": False}
        if keep and self.trail is not None:
            state["trail"] = self.trail[:, :, : max(0, keep - self.encoded_end)].clone()
        if keep >= self.encoded_end:
            state["tails"] = {side: tail[:, :, : keep - self.encoded_end].clone() for side, tail in self.tails.items()}
        elif keep <= self.sink_length:
            view = self.snapshot()
            state["tails"] = {side: view.dense(side)[:, :, :keep].clone() for side in SIDES}
            if keep and self.trail is not None:
                state["trail"] = padding.plain(self.grid, self.trail.shape[0], 0, keep, self.trail.device)
            state |= {"spans": [], "sinks": {}, "leads": {}, "cut": False, "block_table": BlockStore()}
            state |= {"left_padding": None, "origins": None, "codecs": {}}
            state["stores"] = {side: BlockStore() for side in SIDES}
        else:
            spans = [span for span in self.spans if span.start < keep]
            last = spans[-1]
            spans[-1] = Span(last.start, min(last.length, keep - last.start), last.anchor)
            cut = block_table_of(spans[-1:], self.device)
            state |= {"spans": spans, "cut": any(span.length < BLOCK for span in spans)}
            state["block_table"] = self.block_table.truncated(len(spans) - 1).copy().appended({"block_table": cut})
            state["stores"] = {side: store.truncated(len(spans)) for side, store in self.stores.items()}
            state["tails"] = {side: tail[:, :, :0].clone() for side, tail in self.tails.items()}
        self._commit(**state)

    def _map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        """Apply a function of (tensor, batch dimension) to everything stored."""
        if not self.is_initialized:
            return
        self.flush_if_finite()
        self._commit(
            stores={side: store.mapped(lambda buffer: function(buffer, 1)) for side, store in self.stores.items()},
            tails={side: function(tail, 0) for side, tail in self.tails.items()},
            sinks={side: function(sinks, 0) for side, sinks in self.sinks.items()},
            leads={side: function(lead, 0) for side, lead in self.leads.items()},
            left_padding=None if self.left_padding is None else function(self.left_padding, 0),
            origins=None if self.origins is None else function(self.origins, 0),
            trail=None if self.trail is None else function(self.trail, 0),
        )

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
        optional = {name: getattr(self, name) for name in ("left_padding", "origins", "trail")}
        self._commit(
            block_table=self.block_table.moved(device),
            **{name: None if tensor is None else moved(tensor, device) for name, tensor in optional.items()},
            leads={side: moved(lead, device) for side, lead in self.leads.items()},
            stores={side: store.moved(device) for side, store in self.stores.items()},
            tails={side: moved(tail, device) for side, tail in self.tails.items()},
            sinks={side: moved(sinks, device) for side, sinks in self.sinks.items()},
        )

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
        new.stores = {side: store.fork() for side, store in new.stores.items()}
        new.block_table = new.block_table.fork()
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy what is stored; constants are shared."""
        self.flush_if_finite()
        new = shallow_copy(self)
        memo[id(self)] = new
        new.stores = {side: store.copy() for side, store in new.stores.items()}
        new.block_table = new.block_table.copy()
        new.sinks = {side: tensor.clone() for side, tensor in new.sinks.items()}
        new.tails, new.buffer = {side: tensor.clone() for side, tensor in new.tails.items()}, None
        new.leads = {side: tensor.clone() for side, tensor in new.leads.items()}
        optional = (new.left_padding, new.origins, new.trail)
        new.left_padding, new.origins, new.trail = (None if t is None else t.clone() for t in optional)
        return new
