"""The CUDA kernels' budget, from their machine code for compute capability 9.0: NVRTC needs no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import TypeVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")  # its package brings the disassembler

from gpu_run import CONFIGS
from realistic import realistic_calibration
from sass import AnchorCost, anchor_cost, block_cost, operations, resources

from quantcache.coding.codec import SpectralCodec
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES, CodecSettings
from quantcache_kernels.cuda import driver
from quantcache_kernels.cuda.blocks import BlockLayout
from quantcache_kernels.cuda.layout import CLASSES, TILE, column_tiles
from quantcache_kernels.interface import BLOCK

pytestmark = pytest.mark.triton

REGISTERS = 128
"""Of a thread: then a multiprocessor holds 16 warps, more than shared memory has room for."""

VARIANTS = {(True, 1): REGISTERS, (True, 2): 130, (False, 1): REGISTERS}
"""Registers that ``attend`` may take, by whether queries have twice eight bits and by their tiles of columns."""

OPERATIONS = 2.6
"""Of a lane, for one coefficient of one token, at 3 bits and widths as of a real model."""

Cubins = dict[tuple[bool, int], bytes]
T = TypeVar("T")


def built(compile_it: Callable[[], T]) -> T:
    """What compiling gives; the test is skipped where there is nothing to compile with."""
    for path in Path(torch.__file__).parents[1].glob("nvidia/*/lib/libnvrtc-builtins.so*"):
        ctypes.CDLL(str(path))  # NVRTC asks for it by name; torch has loaded it only where torch has CUDA itself
    try:
        return compile_it()
    except driver.CudaError as error:
        if "can be loaded" not in str(error):
            raise
        pytest.skip(f"neither NVRTC nor nvcc is here: {error}; pip install nvidia-cuda-nvrtc")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Cubins:
    """Machine code of every variant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path_factory.mktemp("cubins")))
        return built(lambda: {variant: driver.compiled((9, 0), *variant) for variant in VARIANTS})


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_keep_to_their_registers(cubins: Cubins, variant: tuple[bool, int]) -> None:
    found = resources(cubins[variant])
    assert found.keys() == {"attend", "merge"}
    assert 32 < found["attend"]["registers"] <= VARIANTS[variant]
    assert 32 < found["merge"]["registers"] <= 64, "a block of up to 1,024 threads"
    assert [(each["stack"], each["local"]) for each in found.values()] == [(0, 0)] * 2, "nothing is spilled"


BLOCK_OPERATIONS = {
    ("llama-8b", "trellis"): 7.9,
    ("llama-8b", "scalar"): 6.4,
    ("qwen2.5-7b", "trellis"): 7.9,
    ("qwen2.5-7b", "scalar"): 6.4,
    ("gemma-2-9b", "trellis"): 9.5,
    ("gemma-2-9b", "scalar"): 7.5,
}
"""The same of the kernel that serves caches. It misses :data:`OPERATIONS`; what is held is what was measured."""


@pytest.fixture(scope="module")
def block_cubins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], bytes]:
    """Machine code of the kernels of a cache's blocks by coding, with marks or without."""
    folder = tmp_path_factory.mktemp("blocks")

    @cache
    def compiled(coding: str, marked: bool) -> bytes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QUANTCACHE_CUDA_CACHE", str(folder))
            return built(lambda: driver.compiled_codes((9, 0), coding == "trellis", coding == "trellis", marked))

    return compiled


@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_kernels_of_blocks_keep_to_their_registers(block_cubins: Callable[[str, bool], bytes], coding: str) -> None:
    found = resources(block_cubins(coding, False))
    assert found.keys() == set(driver.CODE_KERNELS)
    assert found["attend_codes"]["registers"] > 64
    assert max(each["registers"] for each in found.values()) <= REGISTERS
    assert {each["stack"] for each in found.values()} == {0}, "nothing is spilled"


@pytest.mark.parametrize(("name", "coding"), BLOCK_OPERATIONS)
def test_attention_on_blocks_takes_no_more_operations_than_it_took(
    block_cubins: Callable[[str, bool], bytes], name: str, coding: str
) -> None:
    cost, found = block_cost(block_cubins(coding, True)), []
    for layer in realistic_calibration(CONFIGS[name](2), 3.0).with_coding(coding).layers.values():
        keys, values = (
            SpectralCodec(
                layer.side(side),
                layer.rope if side == "key" else Rope(),
                CodecSettings(coding=coding),
                holds_values=side == "value",
            ).constants()
            for side in SIDES
        )
        layouts = BlockLayout.of(keys), BlockLayout.of(values)
        for head in range(layouts[0].heads):
            kinds = [each.kinds[head].tolist() for each in layouts]
            count = cost.instructions(kinds[0], layouts[0].slow_tiles, keys.dim - keys.num_slow, kinds[1])
            found.append(32 * count / (BLOCK * (keys.dim + values.dim)))
    bound = BLOCK_OPERATIONS[name, coding]
    assert 0.9 * bound < mean(found) <= bound


@cache
def tile_widths(name: str) -> Tensor:
    """Widths of tiles of a head's keys and values, ``[heads, 2, tiles]``: a tile has that of its widest coefficient."""
    layers = realistic_calibration(CONFIGS[name](2), 3.0).layers.values()
    sides = [
        torch.cat([widths for layer in layers if (widths := layer.side(side).widths) is not None]) for side in SIDES
    ]
    return torch.stack(sides, dim=1).sort(dim=-1, descending=True).values.unflatten(-1, (-1, TILE)).amax(-1)


@pytest.mark.parametrize("coding", ["scalar", "trellis"])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_takes_few_operations_a_coefficient(cubins: Cubins, name: str, coding: str) -> None:
    config, widths = CONFIGS[name](2), tile_widths(name)
    if coding == "trellis":  # a path through a trellis of k bits is a code of k + 1
        widths = torch.where(widths > 0, widths + 1, 0)
    cost = anchor_cost(cubins[True, column_tiles(config.num_attention_heads // config.num_key_value_heads)])
    assert 1 < mean(cost.lane_operations(*head) for head in widths.tolist()) <= OPERATIONS


def test_what_is_counted_is_what_the_kernel_does(cubins: Cubins) -> None:
    one, two = (anchor_cost(cubins[True, parts]) for parts in (1, 2))
    for costs, more in ((one.keys, two.keys), (one.values, two.values)):
        assert tuple(costs) == CLASSES
        assert costs[8] < costs[1] < costs[2] < costs[3] < costs[4], "bytes are taken as they are"
        assert all(costs[width] < more[width] for width in CLASSES), "more products"
    assert one.body < two.body
    by_hand = 32 * (one.body + one.keys[3] + one.keys[8] + one.values[1]) / (128 * 16 * 4)
    assert one.lane_operations((6, 3), (1, 0)) == by_hand


def test_operations_are_named_without_predicates() -> None:
    code = [(0, "@!P0 BRA 0x10"), (16, "IMAD.MOV.U32 R1, RZ, RZ, R2"), (32, "@UP1 LDL.64 R2, [R1]")]
    assert operations(code) == {"BRA": 1, "IMAD": 1, "LDL": 1}
    assert AnchorCost(64, {3: 1}, {3: 3}).lane_operations((3,), (3,)) == 32 * 68 / (128 * 32)
