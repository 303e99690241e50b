"""Shared memory of ``attend_codes``, and how a context is cut into what a device runs at once.

A block of threads has warps that share a head's constants; each has room for its own units (room.h).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from quantcache_kernels.cuda.constants import PreparedCodes
from quantcache_kernels.cuda.structures import BARRIER_BYTES, BLOCK_BYTES, ROOM_BYTES

MAX_WARPS = {(8, 0): 12, (8, 6): 8, (8, 7): 12, (8, 9): 8, (9, 0): 16, (12, 0): 8}
"""Of a block of threads, as in codes.h, and of a multiprocessor, whose registers they fill: from these compute
capabilities on."""

SCHEDULERS = 4
"""Of a multiprocessor; each has every fourth of its warps, and one instruction a cycle for them."""

LATENCY = 3.5
"""What a unit takes however many warps there are, beside one for each warp of a scheduler: chosen by trial on an H100,
of which there is no record."""

OVERHEAD = 0.25
"""What a split takes beside its units, in units; chosen likewise on an H200."""

MOST_UNITS = 64
"""Of a split; longer contexts are tried in up to eight waves instead."""


class Device(NamedTuple):
    """What a device has.

    Attributes:
        processors: Multiprocessors.
        bytes: Shared memory of each.
        block_bytes: The most that a block of threads can have of it.
        max_warps: The most warps of the kernel that it runs at once.
    """

    processors: int
    bytes: int
    block_bytes: int
    max_warps: int

    def even(self, steps: int, lines: int, at_once: int) -> int:
        """Into how many blocks of threads each line's steps are divided, so that they fill the device once.

        Args:
            steps: Of a line.
            lines: How many.
            at_once: Blocks of threads that a multiprocessor runs at once.

        Returns:
            Their number for each line: as many as leave them equally long.
        """
        rounds = -(-steps * lines // (at_once * self.processors))
        return -(-steps // rounds)


class Room(NamedTuple):
    """Shared memory of a call.

    Attributes:
        constants: Bytes of a head's constants.
        warp: Bytes of each warp.
        device: Where it runs.
    """

    constants: int
    warp: int
    device: Device

    @classmethod
    def of(cls, keys: PreparedCodes, values: PreparedCodes, rows: int, query_bytes: int, device: torch.device) -> Room:
        """What a call takes.

        Args:
            keys: The keys' constants.
            values: The values'.
            rows: Rows of queries that share a pass over the codes.
            query_bytes: Bytes of a unit's queries.
            device: Where it runs.

        Returns:
            The sizes, whole lines of 128 bytes.
        """
        constants = BARRIER_BYTES + 4 * (keys.head_words + values.head_words)
        warp = ROOM_BYTES + 2 * (keys.room + values.room) + query_bytes + 64 * rows * values.layout.tiles
        return cls(-(-constants // 128) * 128, -(-warp // 128) * 128, device_of(device))

    def warps_that_fit(self, warps: int) -> int:
        """How many warps a multiprocessor runs at once, in blocks of so many; 0 if a block does not fit."""
        block = self.constants + warps * self.warp
        if block > self.device.block_bytes:
            return 0
        return warps * min(self.device.bytes // (block + BLOCK_BYTES), self.device.max_warps // warps)

    def warps_of_a_block(self, wanted: int) -> int:
        """How many warps share a head's constants.

        Args:
            wanted: Warps of the launch: if they are few, they go to as many multiprocessors as there are.

        Returns:
            The number with which a multiprocessor gets most done.
        """
        return _warps_of_a_block(self, -(-wanted // self.device.processors))

    def units_of_a_split(self, units: int, lines: int, most: int | None = None) -> int:
        """Into what a context is best cut.

        Args:
            units: Of the context.
            lines: Contexts.
            most: How many splits there may be.

        Returns:
            How many units a warp takes.
        """
        return _units_of_a_split(self, units, lines, most or units)

    def most_splits(self, units: int, lines: int) -> int:
        """Into how many splits at most up to so many units are cut in launches that are to last.

        Args:
            units: That there is room for.
            lines: Contexts.

        Returns:
            What is best for all of them, and not less than the device runs at once.
        """
        best = -(-units // self.units_of_a_split(units, lines))
        at_once = self.device.processors * self.warps_that_fit(self.warps_of_a_block(units * lines))
        return min(units, max(best, -(-at_once // lines)))


@cache
def device_of(device: torch.device) -> Device:
    """What a device has; an emulated one is a small Hopper."""
    if device.type != "cuda":
        return Device(4, 228 << 10, 227 << 10, MAX_WARPS[9, 0])
    found = torch.cuda.get_device_properties(device)
    return Device(
        found.multi_processor_count,
        found.shared_memory_per_multiprocessor,
        found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        MAX_WARPS[max(first for first in MAX_WARPS if first <= (found.major, found.minor))],
    )


def time_of_a_unit(warps: int) -> float:
    """What a unit takes where so many warps are on a multiprocessor, in units of its own."""
    return LATENCY + -(-warps // SCHEDULERS)


@cache
def _warps_of_a_block(room: Room, wanted: int) -> int:
    def done(warps: int) -> tuple[float, int]:
        at_once = room.warps_that_fit(warps)
        return at_once / time_of_a_unit(at_once), warps

    best = max(range(1, room.device.max_warps + 1), key=done)
    return max(1, min(best, wanted)) if room.warps_that_fit(best) else 1


@cache
def _units_of_a_split(room: Room, units: int, lines: int, most: int) -> int:
    """The least of waves times units of a split: a last wave that is nearly empty takes as long as a full one."""

    def cost(each: int) -> tuple[float, int]:
        splits = -(-units // each)
        warps = room.warps_of_a_block(splits * lines)
        blocks, processors = lines * -(-splits // warps), room.device.processors
        at_once = max(1, min(room.warps_that_fit(warps) // warps, -(-blocks // processors)))
        waves = -(-blocks // (processors * at_once))
        return waves * (each + OVERHEAD) * time_of_a_unit(warps * at_once), -each

    least = -(-units // most)
    tried = {*range(1, MOST_UNITS + 1), *(-(-units // waves) for waves in range(1, 9))}
    return min((each for each in tried | {least} if least <= each <= units), key=cost)
