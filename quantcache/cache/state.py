"""What a layer of a spectral cache holds, as one value that never changes: whoever has it has it of one moment.

A layer that takes tokens, encodes, is cut or reordered makes a new value of the old one and puts that in its place.

Shapes: B batch, H key/value heads, t tokens behind the last block, S sinks, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcache.backends import REFERENCE, Backend
from quantcache.backends.padding import Grid
from quantcache.backends.spans import Span
from quantcache.backends.store import BlockStore, moved
from quantcache.cache import guards
from quantcache.cache.tails import TailBuffer
from quantcache.coding.blocks import SideCodec
from quantcache.coding.schema import SIDES


class Blocks(NamedTuple):
    """What has been encoded, and the exact tokens in front of it: the same value from one block to the next.

    Attributes:
        codecs: Of both sides, once there are blocks.
        spans: Where the blocks lie.
        table: The spans once more, as a tensor for attention to read.
        stores: The blocks, by side.
        layout: The backend in whose layout they are.
        sinks: First tokens of every row, by side, ``[B, H, S, D]``.
        leads: What lies before the first block, by side, where that is not the sinks.
        left_padding: Slot of every row's first token, ``[B]``; None for slot 0 throughout.
        origins: Slot at which every row's positions count from zero, ``[B]``; None where that is its start.
        cut: Whether a crop has left some block less than full.
    """

    codecs: dict[str, SideCodec]
    spans: list[Span]
    table: BlockStore
    stores: dict[str, BlockStore]
    layout: Backend
    sinks: dict[str, Tensor]
    leads: dict[str, Tensor]
    left_padding: Tensor | None = None
    origins: Tensor | None = None
    cut: bool = False

    @property
    def end(self) -> int:
        """Slot behind the last encoded token; 0 before the first block."""
        return self.spans[-1].end if self.spans else 0

    @property
    def grid(self) -> Grid:
        """Where the rows lie in the slots."""
        return Grid(self.left_padding, self.origins)


NO_BLOCKS = Blocks({}, [], BlockStore(), {side: BlockStore() for side in SIDES}, REFERENCE, {}, {})
"""Before the first block, codecs included: those that have been fitted to some tokens are not the next ones'."""


class LayerState(NamedTuple):
    """A layer's blocks, its tail of recent tokens, and what is still to be done with them.

    Attributes:
        blocks: What has been encoded.
        tails: Everything behind it, by side, ``[B, H, t, D]``.
        trail: What is known of the tail's tokens, see :func:`quantcache.backends.padding.extended`.
        pending: Whether new tokens await their reader before they may be encoded.
        buffer: What the tails are views of, if they are.
        gains: How many of the last blocks' gains do not fit their range, by side, where that is not known yet.
        refused: Whether the tail's oldest tokens are not finite, and could not be encoded.
        finite_check: Whether the tail's first block, which is not due yet, is finite.
    """

    blocks: Blocks
    tails: dict[str, Tensor]
    trail: Tensor | None = None
    pending: bool = False
    buffer: TailBuffer | None = None
    gains: dict[str, guards.AsyncReadback] | None = None
    refused: bool = False
    finite_check: guards.FiniteCheck | None = None

    @property
    def length(self) -> int:
        """Tokens cached, T."""
        return self.blocks.end + (self.tails["key"].shape[2] if self.tails else 0)

    def changed(self, **new: Any) -> LayerState:
        """Another state, without what follows from tails and blocks of this one, unless that is given too.

        Args:
            new: Attributes that differ.
        """
        return self._replace(**{"finite_check": None, "refused": False, "buffer": None, **new})

    def mapped(self, function: Callable[[Tensor, int], Tensor]) -> LayerState:
        """Another state, of a function of every tensor.

        Args:
            function: Maps a tensor and its batch dimension to another tensor.
        """
        stores = {side: store.mapped(lambda buffer: function(buffer, 1)) for side, store in self.blocks.stores.items()}
        return self._of_tensors(lambda tensor: function(tensor, 0), stores=stores)

    def moved(self, device: torch.device | str) -> LayerState:
        """Another state, on another device.

        Args:
            device: Where to.
        """
        stores = {side: store.moved(device) for side, store in self.blocks.stores.items()}
        table = self.blocks.table.moved(device)
        return self._of_tensors(lambda tensor: moved(tensor, device), stores=stores, table=table)

    def copied(self) -> LayerState:
        """Another state of the same tokens, which shares no memory with this one."""
        stores = {side: store.copy() for side, store in self.blocks.stores.items()}
        return self._of_tensors(torch.clone, stores=stores, table=self.blocks.table.copy())

    def forked(self) -> LayerState:
        """Another state of the same tokens, which shares its memory until one of the two writes."""
        stores = {side: store.fork() for side, store in self.blocks.stores.items()}
        return self._replace(blocks=self.blocks._replace(stores=stores, table=self.blocks.table.fork()))

    def _of_tensors(self, function: Callable[[Tensor], Tensor], **blocks: Any) -> LayerState:
        """Another state, of a function of all tensors but those of the stores, ``[B, ...]`` each."""
        for name in ("sinks", "leads"):
            blocks[name] = {side: function(tensor) for side, tensor in getattr(self.blocks, name).items()}
        for name in ("left_padding", "origins"):
            tensor = getattr(self.blocks, name)
            blocks[name] = None if tensor is None else function(tensor)
        return self.changed(
            blocks=self.blocks._replace(**blocks),
            tails={side: function(tail) for side, tail in self.tails.items()},
            trail=None if self.trail is None else function(self.trail),
        )


NOTHING = LayerState(NO_BLOCKS, {})
"""No tokens."""
