"""A cache during a forward pass: what the model says of its tokens, and how that works in a compiled model."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from quantcache.attention import traced
from quantcache.attention.lazy import LazyKV
from quantcache.attention.traced import TracedKV
from quantcache.backends import CacheView
from quantcache.backends.padding import Arrivals
from quantcache.cache.consistency import ConsistentCache
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.passes import nothing_to_read
from quantcache.common import compat

compat.warn_of_unread_masks()  # once in a process: every cache reads them


class TraceableCache(ConsistentCache):
    """A cache that hears of padding, and that a compiled graph can use without knowing it.

    Attributes:
        announced: 2D mask and positions of the next pass, where transformers has told them, and T at its end.
        arrivals: T and Tnew of this pass, and what those say.
        handle: How graphs find the cache, see :func:`quantcache.attention.traced.handle_of`.
        stock_outputs: What layers of transformers' own have returned to a graph that has not read it yet.
        read_once: Whether each layer attends on its own keys: what has been read may then be encoded.
        sees_images: Whether the model turns keys by a place in an image, which differs from that in the text.
    """

    announced: tuple[Tensor | None, Tensor | None, int] | None = None
    arrivals: tuple[int, int, Arrivals] | None = None
    handle: Tensor
    stock_outputs: dict[int, tuple[Tensor, Tensor]]
    read_once: bool = True
    sees_images: bool = False

    def be_traceable(self, read_once: bool) -> None:
        """Get ready to be traced, once the layers are there.

        Args:
            read_once: See above.
        """
        self.handle, self.stock_outputs, self.read_once = traced.handle_of(self), {}, read_once
        for layer in self.spectral_layers[:1]:
            layer.symbolic_length = traced.symbolic_length(0)

    @property
    def spectral_layers(self) -> list[SpectralLayer]:
        """The layers that store blocks."""
        return [layer for layer in self.layers if isinstance(layer, SpectralLayer)]

    # ------------------------------------------------------------------ what a model calls

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values, with what the model says of padding; see :class:`ConsistentCache`."""
        if torch.compiler.is_dynamo_compiling():
            return self._trace_update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._append(False, key_states, value_states, layer_idx, *args, **kwargs)

    def _append(
        self, in_graph: bool, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """:meth:`update`, and for a graph, which says what it knows of the tokens when it attends."""
        layer = self._layer_at(layer_idx)
        if isinstance(layer, SpectralLayer):
            rows, count = key_states.shape[0], key_states.shape[2]
            kwargs["arrivals"] = self._arrivals(layer, rows, layer.get_seq_length() + count, count, in_graph)
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if key_states.shape[2] > 1:
            compat.release_left(layer)
        return found

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a mask; see DynamicCache. Whoever asks is about to say which tokens are padding."""
        if torch.compiler.is_dynamo_compiling():
            length = self._traced_length(layer_idx)
            return _untraced_mask_sizes(self, query_length, layer_idx) if length is None else (length + query_length, 0)
        if query_length == 0 and (held := self.get_seq_length(layer_idx)):
            raise nothing_to_read(held)  # the model would say that it cannot reshape a tensor
        told, sizes = compat.mask_arguments(), super().get_mask_sizes(query_length, layer_idx)
        if told is not None:
            self.announced = (*told, sum(sizes))
        return sizes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached, T; see DynamicCache."""
        if torch.compiler.is_dynamo_compiling():
            length = self._traced_length(layer_idx)
            return _untraced_length(self, layer_idx) if length is None else length
        return super().get_seq_length(layer_idx)

    def _arrivals(
        self, layer: SpectralLayer, rows: int, length: int, count: int, in_graph: bool = True
    ) -> Arrivals | None:
        """What the present pass says of a layer's new tokens; None where it has said nothing."""
        announced, self.announced = self.announced, None
        if announced is not None and announced[2] == length:  # else of a pass that has failed before its first update
            mask, positions, _ = announced
            fits = mask is None or mask.shape[0] == rows
            if positions is not None and (positions.ndim != 2 or positions.shape[0] not in (1, rows)):
                positions = None  # several for every token
            self.arrivals = (length, count, Arrivals.of(mask, positions, length, count)) if fits else None
        elif layer.symbolic_length is not None:  # the first of them
            positions = None if in_graph else compat.rotary_positions()  # all that is known beside a 4D mask
            fits = positions is not None and positions.shape in ((1, count), (rows, count))
            self.arrivals = (length, count, Arrivals.of(None, positions, length, count)) if fits else None
        if self.arrivals is None:
            return None
        return self.arrivals[2] if self.arrivals[:2] == (length, count) else None

    # ------------------------------------------------------------------ while a model is traced

    def _trace_update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """:meth:`update` as an operator, where that serves; else it is called as it is, which breaks the graph."""
        layer = self._layer_at(layer_idx)
        packed = isinstance(layer, SpectralLayer)
        served = (packed or compat.is_window(layer)) and traced.takes(key_states, value_states)
        # What a model says beside (``kwargs=``, since transformers 5.24) is for paged caches.
        if not (served and self.read_once) or args or kwargs.keys() - {"kwargs"}:
            return _untraced_update(self, key_states, value_states, layer_idx, *args, **kwargs)
        torch.ops.quantcache.update(self.handle, key_states, value_states, layer_idx)
        if packed and layer.symbolic_length is not None:
            layer.symbolic_length = traced.extended_length(layer.symbolic_length, key_states.shape[2])
        dense: dict[str, Tensor] = {}
        key = TracedKV(self, layer_idx, "key", key_states.shape[3], packed, dense)
        return key, TracedKV(self, layer_idx, "value", value_states.shape[3], packed, dense)

    def _traced_length(self, layer_idx: int) -> int | None:
        """T as a symbol; None of layers that have no carrier of it."""
        layer = self._layer_at(layer_idx)
        carrier = layer.symbolic_length if isinstance(layer, SpectralLayer) else None
        return None if carrier is None else traced.length_of(carrier)

    # ------------------------------------------------------------------ when its graph runs

    def note_arrivals(
        self, layer_idx: int, count: int, shown: Tensor | None, positions: Tensor | None, known: bool
    ) -> CacheView | None:
        """Note what a graph knows of the tokens that it has brought: it says so when it attends.

        Args:
            layer_idx: Index of the layer.
            count: Tnew.
            shown: The 2D mask that the graph's mask was made of, if any.
            positions: Where the tokens stand, if the graph knows.
            known: Whether its mask was made of a 2D mask or of none; no custom 4D mask.

        Returns:
            What may be read of the layer; None of one that is not spectral.
        """
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, SpectralLayer):
            return None
        first, silent = layer.symbolic_length is not None, self.arrivals is None
        if first and silent and layer.state.pending:
            rows, length = layer.tails["key"].shape[0], layer.get_seq_length()
            counted = positions is not None and positions.shape in ((1, count), (rows, count))
            # Behind an image a graph knows places in the text only: what follows goes on as the token before it stands.
            if (known or counted) and not (self.sees_images and length > count):
                self.announced = (shown if known else None, positions, length)
                layer.tell(self._arrivals(layer, rows, length, count), count)
        return layer.snapshot()

    def last_output(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """What a layer's last update returned.

        Args:
            layer_idx: Index of the layer.

        Returns:
            Keys and values, ``[B, H, T, D]``. Those of a layer of transformers' own are given once, and not kept.
        """
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, SpectralLayer):
            return self.stock_outputs.pop(layer_idx)
        view = layer.snapshot()
        return LazyKV(view, "key"), LazyKV(view, "value")

    # ------------------------------------------------------------------ copies

    def _roll_back(self) -> None:
        super()._roll_back()
        self.announced = None  # by a pass that may have failed before its first update

    def _of(self, layers: list[Any]) -> Self:
        new = super()._of(layers)
        new.announced = None
        return new

    def _clear(self) -> None:
        super()._clear()
        self.announced = self.arrivals = None
        self.stock_outputs = {}

    def __copy__(self) -> Self:
        """Another cache of the same layers."""
        new = super().__copy__()
        new.handle, new.stock_outputs = traced.handle_of(new), {}
        return new


_untraced_update = torch.compiler.disable(TraceableCache.update)
_untraced_mask_sizes = torch.compiler.disable(TraceableCache.get_mask_sizes)
_untraced_length = torch.compiler.disable(TraceableCache.get_seq_length)


@torch.library.impl("quantcache::update", "CompositeExplicitAutograd", lib=traced.operators)
def _update(handle: Tensor, key: Tensor, value: Tensor, layer: int) -> None:
    cache = traced.cache_of(handle)
    found = cache._append(True, key, value, layer)
    if not isinstance(cache.layers[layer], SpectralLayer):
        cache.stock_outputs[layer] = found
