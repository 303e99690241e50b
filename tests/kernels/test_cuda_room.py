"""Into how many splits a context is cut, and how many warps share a head's constants."""

from __future__ import annotations

import pytest

from quantcache_kernels.cuda.room import MAX_WARPS, OVERHEAD, Device, Room, time_of_a_unit

HOPPER = Device(132, 228 << 10, 227 << 10, MAX_WARPS[9, 0])

LLAMA = Room(7808, 13184, HOPPER)
"""Llama-8B's at 3 bits."""


def waves(room: Room, units: int, lines: int, each: int) -> tuple[int, int]:
    """How often the device is filled, and how many warps a multiprocessor has then."""
    splits = -(-units // each)
    warps = room.warps_of_a_block(splits * lines)
    blocks, processors = lines * -(-splits // warps), room.device.processors
    at_once = min(room.warps_that_fit(warps) // warps, -(-blocks // processors))
    return -(-blocks // (processors * at_once)), warps * at_once


def test_as_many_warps_as_fit_share_constants() -> None:
    assert LLAMA.warps_that_fit(16) == 16
    assert LLAMA.warps_that_fit(17) == 0, "a block has 227 KB"
    assert LLAMA.warps_that_fit(1) < LLAMA.warps_that_fit(16), "each would have constants of its own"
    assert LLAMA.warps_of_a_block(10_000) == 16


def test_schedulers_have_as_many_warps_each() -> None:
    larger = LLAMA._replace(warp=17_000)
    assert larger.warps_that_fit(13) == 13
    assert larger.warps_of_a_block(10_000) == 12, "a thirteenth would be one scheduler's fourth"


def test_few_warps_go_to_all_processors() -> None:
    assert LLAMA.warps_of_a_block(132) == 1
    assert LLAMA.warps_of_a_block(504) == 4


def test_a_block_that_does_not_fit_is_a_launch_that_is_refused() -> None:
    small = LLAMA._replace(device=HOPPER._replace(bytes=20 << 10, block_bytes=20 << 10))
    assert small.warps_that_fit(1) == 0
    assert small.warps_of_a_block(1000) == 1
    assert small.units_of_a_split(100, 8) >= 1


@pytest.mark.parametrize(("units", "lines"), [(255, 64), (1023, 64), (1023, 8), (255, 8), (63, 8), (31, 64), (1, 1)])
def test_a_context_is_cut_into_whole_waves(units: int, lines: int) -> None:
    each = LLAMA.units_of_a_split(units, lines)

    def cost(n: int) -> float:
        rounds, warps = waves(LLAMA, units, lines, n)
        return (n + OVERHEAD) * rounds * time_of_a_unit(warps)

    assert cost(each) == min(cost(n) for n in (each, *range(1, min(units, 64) + 1)))


def test_eight_rows_of_32768_tokens_are_one_wave() -> None:
    assert LLAMA.units_of_a_split(255, 64) == 8
    assert waves(LLAMA, 255, 64, 8) == (1, 16)


@pytest.mark.parametrize(("steps", "lines", "found"), [(32, 64, 6), (32, 8, 32), (1, 1, 1), (100, 200, 2), (9, 1, 9)])
def test_steps_are_divided_evenly(steps: int, lines: int, found: int) -> None:
    assert HOPPER.even(steps, lines, 3) == found


@pytest.mark.parametrize("lines", [1, 8, 64])
def test_fewer_units_have_no_more_splits_than_launches_that_last_have_room_for(lines: int) -> None:
    room_for = 150
    most = LLAMA.most_splits(room_for, lines)
    assert 1 <= most <= room_for
    for units in range(1, room_for + 1):
        assert -(-units // LLAMA.units_of_a_split(units, lines, most)) <= most
