"""Append-only storage of encoded blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROWTH = 16
"""A full buffer grows by 1/16 of what it holds, so at most 6 % of it is ever unused."""


class BlockStore:
    """Growing buffers, one per field of a codec, with the block index first.

    Growing copies the buffer, so that an append costs a constant amortised number of copies of one block.
    """

    def __init__(self) -> None:
        self.count = 0
        self.buffers: dict[str, Tensor] = {}

    @property
    def capacity(self) -> int:
        """Blocks that fit without growing."""
        return next(iter(self.buffers.values())).shape[0] if self.buffers else 0

    def append(self, fields: dict[str, Tensor]) -> None:
        """Add blocks. A first addition, such as a prefill's, is given exactly the room it needs.

        Args:
            fields: The fields of n blocks, ``[n, ...]`` each.
        """
        added = next(iter(fields.values())).shape[0]
        if not self.buffers:
            # Copies: a view would keep the whole prompt it was cut from alive.
            self.buffers = {k: v.clone(memory_format=torch.contiguous_format) for k, v in fields.items()}
            self.count = added
            return
        if self.count + added > self.capacity:
            self._grow(max(self.count + added, self.count + max(1, self.count // GROWTH)))
        for name, value in fields.items():
            self.buffers[name][self.count : self.count + added] = value
        self.count += added

    def _grow(self, capacity: int) -> None:
        grown = {}
        for name, buffer in self.buffers.items():
            grown[name] = buffer.new_empty((capacity, *buffer.shape[1:]))
            grown[name][: self.count] = buffer[: self.count]
        self.buffers = grown

    def slice(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of some blocks.

        Args:
            start: First block.
            stop: One past the last block.

        Returns:
            Fields ``[stop - start, B, ...]``.
        """
        return {name: buffer[start:stop] for name, buffer in self.buffers.items()}

    def truncate(self, count: int) -> None:
        """Forget all blocks from ``count`` on, and give back what the growth rule would not have allocated.

        Args:
            count: Blocks to keep.
        """
        self.count = min(self.count, count)
        if not self.count:
            self.buffers = {}
        elif self.capacity > self.count + self.count // GROWTH:
            self.map_batch(torch.clone)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by a function of its used part, batch dimension second.

        Args:
            function: Maps ``[count, B, ...]`` to ``[count, B', ...]``.
        """
        self.buffers = {name: function(buffer[: self.count]) for name, buffer in self.buffers.items()}

    def copy(self) -> BlockStore:
        """An independent copy of the used part."""
        new = BlockStore()
        new.count, new.buffers = self.count, self.buffers
        new.map_batch(torch.clone)
        return new

    def nbytes(self) -> dict[str, int]:
        """Bytes of the used part of every field."""
        return {name: buffer[: self.count].nbytes for name, buffer in self.buffers.items()}

    def slack(self, name: str) -> int:
        """Bytes of a field that are allocated but unused."""
        return self.buffers[name][self.count :].nbytes

    def to(self, device: torch.device | str) -> None:
        """Move the buffers.

        Args:
            device: Where to.
        """
        self.buffers = {name: buffer.to(device, non_blocking=True) for name, buffer in self.buffers.items()}
