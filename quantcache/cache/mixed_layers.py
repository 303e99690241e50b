"""Compressed layers that hold more than keys and values: recurrent states, or the keys of an indexer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from quantcache.backends.store import moved
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.rows import chosen_rows, held_rows
from quantcache.cache.transaction import detached_copy


class MixedLayer(SpectralLayer):
    """A compressed layer that holds something else too, whose copies have copies of that.

    Attributes:
        beside: The names of it.
    """

    beside: tuple[str, ...]

    def fork(self) -> Self:
        """See :meth:`SpectralLayer.fork`; what lies beside keys and values is copied."""
        new: Self = copy_beside(super().fork(), self)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy what is stored; constants are shared."""
        new: Self = copy_beside(super().__deepcopy__(memo), self)
        return new


class SpectralRecurrentLayer(LinearAttentionLayer, MixedLayer):  # type: ignore[misc, override]
    """Attention and recurrence in one layer (Falcon-H1, Zamba2): keys and values are compressed, states are not.

    Args:
        arguments: Those of :class:`SpectralLayer`.
        number_of_states: How many states of a kind the layer has.
    """

    is_compileable = False  # as of any layer that grows

    def __init__(self, *arguments: Any, number_of_states: int = 1):
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.beside = ("record_past", *(name for name, value in vars(self).items() if isinstance(value, dict)))
        SpectralLayer.__init__(self, *arguments)

    def __repr__(self) -> str:
        return SpectralLayer.__repr__(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Take dtype and device from the first keys and values, or, by keywords, from the first states."""
        part = SpectralLayer if args else LinearAttentionLayer
        part.lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        """No maximum, -1."""
        return -1

    def offload(self) -> None:
        """Move everything to CPU memory."""
        SpectralLayer.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        SpectralLayer.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        """Forget all tokens."""
        LinearAttentionLayer.reset(self)
        SpectralLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, where the states can go back too.

        Args:
            tokens_to_remove: Zero or negative.

        Raises:
            RuntimeError: The states are not recorded, see ``activate_past_recording``.
        """
        LinearAttentionLayer.crop(self, tokens_to_remove)
        SpectralLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Gather rows.

        Args:
            beam_idx: Row of the present cache that each new row continues, ``[B']``.

        Raises:
            RowError: A row does not exist.
        """
        count = held_rows(self)
        if count is not None:
            rows = chosen_rows(beam_idx, count)  # before either half changes
            LinearAttentionLayer.reorder_cache(self, rows)  # type: ignore[arg-type]
            SpectralLayer.reorder_cache(self, rows)


class SpectralIndexedLayer(MixedLayer, DynamicIndexedLayer):
    """A layer with an indexer (GLM-5, DeepSeek V3.2): keys and values are compressed, the indexer's keys are not.

    Arguments are those of :class:`SpectralLayer`.
    """

    beside = ("indexer_keys", "indexer_position_ids", "is_indexer_initialized", "indexer_dtype", "indexer_device")

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.indexer_keys: Tensor | None = None
        self.indexer_position_ids: Tensor | None = None  # which transformers 5.17 does not have
        self.is_indexer_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, and what the indexer knows of them.

        Args:
            tokens_to_remove: Zero or negative.
        """
        super().crop(tokens_to_remove)
        keep = self.get_seq_length()
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, :keep]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :keep]

    def _map_indexer(self, function: Callable[[Tensor, int], Tensor]) -> None:
        """Apply a function of (tensor, batch dimension) to what the indexer holds."""
        if self.indexer_keys is not None and self.indexer_keys.numel():
            self.indexer_keys = function(self.indexer_keys, 0)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = function(self.indexer_position_ids, 1)

    def _map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        super()._map_batch(function)
        self._map_indexer(function)

    def _move(self, device: torch.device | str) -> None:
        super()._move(device)
        self._map_indexer(lambda tensor, _: moved(tensor, device))


MIXED = (SpectralRecurrentLayer, SpectralIndexedLayer)


def copy_beside(layer: Any, other: Any) -> Any:
    """Copy what another layer of the same kind holds beside keys and values.

    Args:
        layer: The layer to fill.
        other: One of ours, or transformers' own.

    Returns:
        The layer; of a kind that holds nothing else it stays as it is.
    """
    for name in getattr(layer, "beside", ()):
        if name in vars(other):
            setattr(layer, name, detached_copy(getattr(other, name)))
    return layer


def spectral_layer(stock: Any, *arguments: Any) -> SpectralLayer:
    """The compressed layer that takes the place of one of transformers' own.

    Args:
        stock: The empty layer, of a kind that :func:`compat.is_full_attention` accepts.
        arguments: All those of :class:`SpectralLayer`.

    Returns:
        An empty layer.
    """
    if isinstance(stock, LinearAttentionAndFullAttentionLayer):
        return SpectralRecurrentLayer(*arguments, number_of_states=stock.number_of_states)  # type: ignore[misc]
    return SpectralIndexedLayer(*arguments) if isinstance(stock, DynamicIndexedLayer) else SpectralLayer(*arguments)
