"""The CUDA kernels' budget, from their machine code: NVRTC needs no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TypeVar

import pytest

pytest.importorskip("triton")  # its package brings the disassembler

from gpu_run import CONFIGS
from realistic import realistic_calibration

from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES, Coding
from quantcache_kernels.cuda import compiler, driver
from quantcache_kernels.cuda.blocks import BlockLayout
from quantcache_kernels.cuda.room import MAX_WARPS
from tests.kernels.sass import UnitCost, operations, resources, unit_cost

pytestmark = pytest.mark.triton

REGISTERS = 128
"""Of a thread: then a multiprocessor holds 16 warps, more than shared memory has room for."""

OPERATIONS = {
    ("llama-8b", "scalar"): 4.8,
    ("llama-8b", "trellis"): 6.2,
    ("qwen2.5-7b", "scalar"): 4.8,
    ("qwen2.5-7b", "trellis"): 6.2,
    ("gemma-2-9b", "scalar"): 5.9,
    ("gemma-2-9b", "trellis"): 7.6,
}
"""Of a lane, for one coefficient of one token, at 3 bits and widths as of a real model: what was measured."""

SPILLS = {
    "13.0": {(8, 0): {"take_queries": (16, 6)}},
    "13.2": {(8, 0): {"take_queries": (16, 7)}, (9, 0): {"merge": (16, 7)}},
}
"""Bytes of stack, and local loads and stores, by NVRTC, capability and kernel: a few words, outside of loops."""

T = TypeVar("T")


def built(compile_it: Callable[[], T]) -> T:
    """What compiling gives; the test is skipped where there is nothing to compile with."""
    try:
        return compile_it()
    except compiler.CudaError as error:
        if "can be loaded" not in str(error):
            raise
        pytest.skip(f"neither NVRTC nor nvcc is here: {error}; pip install nvidia-cuda-nvrtc")


def spilled(found: dict[str, dict[str, int]]) -> dict[str, tuple[int, int]]:
    """The kernels that use local memory: bytes of stack, loads and stores."""
    return {name: (each["stack"], each["local"]) for name, each in found.items() if each["stack"] or each["local"]}


def allowed(capability: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """What may be spilled for a GPU by the NVRTC that is here, or else by the newest known."""
    found = built(compiler.nvrtc)
    major, minor = ctypes.c_int(), ctypes.c_int()
    found.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return SPILLS.get(f"{major.value}.{minor.value}", SPILLS["13.2"]).get(capability, {})


def compiled_codes(capability: tuple[int, int], key_trellis: bool, value_trellis: bool, *defines: str) -> bytes:
    """The machine code of attention, as the driver asks for it."""
    codings = f"KEY_TRELLIS={int(key_trellis)}", f"VALUE_TRELLIS={int(value_trellis)}"
    return compiler.compiled(capability, "codes.h", *codings, *defines)


@pytest.mark.slow
@pytest.mark.parametrize("codings", [(False, False), (True, True)])
def test_kernels_keep_to_their_registers(codings: tuple[bool, bool], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
        found = resources(built(lambda: compiled_codes((9, 0), *codings)))
    assert found.keys() == set(driver.CODE_KERNELS)
    assert found["attend_codes"]["registers"] > 64
    assert max(each["registers"] for each in found.values()) <= REGISTERS
    assert spilled(found) == allowed((9, 0))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
def test_kernels_keep_to_their_registers_on_smaller_gpus(capability: tuple[int, int], tmp_path: Path) -> None:
    """There is shared memory for fewer warps, which then have more registers each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
        found = resources(built(lambda: compiled_codes(capability, True, True)))
    fit = 65536 // (32 * MAX_WARPS[capability])
    assert REGISTERS < found["attend_codes"]["registers"] <= min(fit, 255)
    assert spilled(found) == allowed(capability)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_kernels_that_convert_blocks_keep_to_their_registers(capability: tuple[int, int], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
        found = resources(built(lambda: compiler.compiled(capability, "conversion.h")))
    assert found.keys() == set(driver.CONVERSION_KERNELS)
    assert all(16 < each["registers"] <= 64 for each in found.values())
    assert not spilled(found)


@pytest.mark.parametrize("is_trellis", [False, True])
def test_the_kernel_that_encodes_keeps_to_its_registers(is_trellis: bool, tmp_path: Path) -> None:
    """Then four blocks of threads of a head of 128 dimensions fit on a multiprocessor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
        found = resources(built(lambda: compiler.compiled((9, 0), "encode.h", f"TRELLIS={int(is_trellis)}")))
    assert found.keys() == set(driver.ENCODER_KERNELS)
    assert 64 < found["encode"]["registers"] <= REGISTERS
    assert (found["encode"]["stack"], found["encode"]["local"]) == (0, 0), "nothing is spilled"


@pytest.fixture(scope="module")
def unit_costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, UnitCost]:
    """What attention does for two blocks, by coding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path_factory.mktemp("marked")))
        return {
            coding: unit_cost(built(lambda trellis=trellis: compiled_codes((9, 0), trellis, trellis, "MARKED")))
            for coding, trellis in (("scalar", False), ("trellis", True))
        }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "coding"), OPERATIONS)
def test_attention_takes_no_more_operations_than_it_took(
    unit_costs: dict[str, UnitCost], name: str, coding: Coding
) -> None:
    calibration = realistic_calibration(CONFIGS[name](2), 3.0).with_coding(coding)
    found = []
    for layer in calibration.layers.values():
        ropes = {"key": layer.rope, "value": Rope()}
        keys, values = (
            SpectralCodec(layer.side(side), ropes[side], calibration.metadata.codec, holds_values=side == "value")
            for side in SIDES
        )
        layouts = [BlockLayout.of(codec.constants()) for codec in (keys, values)]
        for own_keys, own_values in zip(*(layout.kinds.tolist() for layout in layouts), strict=True):
            given = own_keys, layouts[0].slow_tiles, keys.frame.num_fast, own_values
            count = unit_costs[coding].instructions(*given)
            found.append(32 * count / (2 * BLOCK * (keys.dim + values.dim)))
    assert 2 < mean(found) <= OPERATIONS[name, coding]


@pytest.mark.slow
def test_what_is_counted_is_what_the_kernel_does(unit_costs: dict[str, UnitCost]) -> None:
    for coding, cost in unit_costs.items():
        widest = 4 if coding == "trellis" else 5
        kinds = {*range(1, 9), *range(9, 9 + widest)}
        for tiles in (cost.slow, cost.fast[32], cost.fast[48], cost.values):
            halves = tiles.halves
            assert halves.keys() == kinds
            assert 4 < tiles.tile < halves[3] < halves[8]
            assert sum(halves[8 + width] for width in range(1, widest + 1)) < sum(
                halves[width] for width in range(1, widest + 1)
            )
            assert tiles.of(0x83) == tiles.tile + halves[3] + halves[8]
            assert tiles.of(0x03) == tiles.tile + halves[3]
            assert tiles.of(0) == 0
        assert cost.fast_pass[32] < cost.fast_pass[48]
        assert all(cost.fast[32].halves[kind] < cost.fast[48].halves[kind] for kind in kinds)
        assert cost.mean > 4
        by_hand = (
            cost.body
            + cost.slow.of(0x33)
            + 2 * (cost.block + cost.fast_pass[32] + cost.fast[32].of(0x04))
            + cost.mean
            + cost.values.of(0xB5)
        )
        assert cost.instructions([0x33, 0x04, 0], 1, 16, [0xB5, 0]) == by_hand
        more = cost.fast_pass[48] + cost.fast[48].of(0x04) - cost.fast[32].of(0x04) - cost.fast_pass[32]
        assert cost.instructions([0x33, 0x04, 0], 1, 48, [0xB5, 0]) == by_hand + 2 * (more + cost.mean)


def test_operations_are_named_without_predicates() -> None:
    code = [(0, "@!P0 BRA 0x10"), (16, "IMAD.MOV.U32 R1, RZ, RZ, R2"), (32, "@UP1 LDL.64 R2, [R1]")]
    assert operations(code) == {"BRA": 1, "IMAD": 1, "LDL": 1}
