"""What changes when a block is encoded, and launches that find it in memory: they serve until there is no more room."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcache_kernels.cuda.memory import Memory
from quantcache_kernels.cuda.near import NearTokens
from quantcache_kernels.cuda.room import Room
from quantcache_kernels.cuda.structures import Places, pointer


class Starts(NamedTuple):
    """Where the rows of a padded batch begin.

    Attributes:
        origins: Slot of every row's first token, ``[B]`` int32.
        first_seen: Slot behind its sinks, ``[B]`` int32: it sees blocks from there on.
    """

    origins: Tensor
    first_seen: Tensor


@dataclass(frozen=True)
class Blocks:
    """The encoded blocks of a call.

    Attributes:
        packed: Codes ``[n, B, words]`` int32 (:class:`quantcache_kernels.cuda.blocks.BlockLayout`) and gains
            ``[n, B, H, 64]`` uint8 of the keys, then of the values.
        table: First slot, valid tokens and anchor slot of every block, ``[n, 3]`` int32.
        starts: Where padded rows begin; None for slot 0 throughout. A row's sinks are its first valid tokens.
        end: Slot behind the last block.
        paired: Whether blocks 2i and 2i + 1 share an anchor throughout, as they do unless a crop cut one.
        calls: Launches that have been prepared for them, by the kind of call.
    """

    packed: Sequence[Tensor]
    table: Tensor
    starts: Starts | None
    end: int
    paired: bool
    calls: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def units(self) -> int:
        """What a warp takes at once: two blocks that share an anchor, or one."""
        return units_of(self.table.shape[0], self.paired)

    def readable(self) -> Blocks:
        """The same as the kernels can read it."""
        if all(each.is_contiguous() for each in (*self.packed, self.table)):
            return self
        packed = [each.contiguous() for each in self.packed]
        return Blocks(packed, self.table.contiguous(), self.starts, self.end, self.paired)

    def places(self, near: NearTokens, per_split: int) -> Places:
        """Where all of it lies, and how the context is cut.

        Args:
            near: Sinks and tail.
            per_split: Units of a part of the context; 0 while nobody has asked.

        Returns:
            The places; tensors are not kept.
        """
        origins, first_seen = (None, None) if self.starts is None else self.starts
        units, found = self.units, Places(*map(pointer, (*self.packed, self.table, origins, first_seen)))
        for i, part in enumerate(near.parts):
            found.near[i], found.strides[i][:] = part.data_ptr(), part.stride()[:3]
        found.blocks, found.units, found.encoded_end = self.table.shape[0], units, self.end
        if per_split:
            found.per_split, found.splits = per_split, -(-units // per_split)
        return found


def units_of(blocks: int, paired: bool) -> int:
    """Units that so many blocks are."""
    return -(-blocks // 2) if paired else blocks


@dataclass
class Lasting:
    """What launches need that are to serve while blocks are added.

    Attributes:
        units: Units of blocks that there is room for.
        memory: What other calls on this stream use too.
        there: The places, where kernels find them, uint8.
        lines: Of the calls; 0 before the first one.
        room: Their shared memory; None before the first one.
        warps: Of their blocks of threads, as suits the first one; a context that grows takes more blocks of threads.
        out: Where the result goes; None before the first call.
    """

    units: int
    memory: Memory
    there: Tensor
    lines: int = field(default=0, init=False)
    room: Room | None = field(default=None, init=False)
    warps: int = field(default=1, init=False)
    out: Tensor | None = field(default=None, init=False)

    @classmethod
    def of(cls, units: int, memory: Memory, device: torch.device) -> Lasting:
        """Memory for places that are not set yet.

        Args:
            units: Units of blocks that there is to be room for.
            memory: What other calls on this stream use too.
            device: Where.

        Returns:
            What the launches need.
        """
        return cls(units, memory, torch.empty(ctypes.sizeof(Places), dtype=torch.uint8, device=device))

    def units_of_a_split(self, units: int) -> int:
        """How many units a warp takes of so many; 0 before the first call."""
        if self.room is None:
            return 0
        return self.room.units_of_a_split(units, self.lines, self.room.most_splits(self.units, self.lines))
