"""Blocks brought into the tiles of ``backend="cuda"`` and back by kernels, on an emulated warp, beside plain torch."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache import backends
from quantcache.backends import cuda_blocks, trials
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.rope import Rope
from quantcache.coding.schema import CodecSettings, Coding
from quantcache.evaluation import kernel_check
from quantcache_kernels.cuda import conversion
from quantcache_kernels.cuda.compiler import source
from tests.builders import random_side
from tests.kernels import emulation
from tests.kernels.cases import ATTENTION, Case, codecs, fill, on_device
from tests.kernels.test_cuda_blocks import CUDA, by_twos, in_bfloat16
from tests.kernels.test_cuda_blocks import emulated as emulated
from tests.kernels.test_cuda_blocks import patch as patch

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")

CODINGS: tuple[Coding, ...] = ("scalar", "trellis")

GEOMETRIES: dict[str, dict[str, Any]] = {
    "three-heads": {"heads": 3},
    "D80-partial": {"dim": 80, "rotary": 0.4},
    **{f"D{dim}": {"dim": dim} for dim in (128, 256)},
    "no-rope": {"rope": "none"},
    "all-fast": {"theta": 10.0},
    **{f"width{width}": {"widths": width} for width in range(9)},
}

HALVES = (
    ((5, 4, 3, 2), (5, 5, 1, 1), (4, 3, 2, 1), (4, 4, 4, 4)),
    ((3, 2, 1, 0), (2, 1, 1, 1), (1, 0, 0, 0)),
    ((8, 5, 5, 5), (7, 6, 5, 4), (5, 5, 5, 5), (5, 5, 4, 4), (2, 2, 2, 2)),
)
"""Widths of pairs of coefficients in halves of tiles: looked up with others and alone, computed, and left over."""


def random_words(codec: SpectralCodec, count: int = 2, rows: int = 2) -> Tensor:
    """Portable blocks drawn bit by bit: whatever a file may hold."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(-(2**31), 2**31, (count, rows, codec.num_words), generator=generator)
    return drawn.to(torch.int32)


def check(codec: SpectralCodec) -> None:
    """Kernels and plain torch give the same words, either way."""
    words, found = random_words(codec), cuda_blocks.prepared(codec).conversion
    tiles = cuda_blocks._from_portable(codec, words)
    assert torch.equal(found.from_portable(words), tiles)
    assert torch.equal(cuda_blocks._to_portable(codec, tiles), words)
    assert torch.equal(found.to_portable(tiles), words)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_kernels_and_plain_torch_give_the_same_words(name: str, coding: Coding, emulated: None) -> None:
    for codec in codecs(Case(coding=(coding, coding), **GEOMETRIES[name])).values():
        check(codec)


@pytest.mark.parametrize("holds_values", [False, True])
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("halves", HALVES)
def test_halves_of_tiles_may_mix_widths(
    halves: tuple[tuple[int, ...], ...], coding: Coding, holds_values: bool, emulated: None
) -> None:
    pairs = [width for half in halves for width in half]
    widths = by_twos(*pairs, *(0,) * (32 - len(pairs)))
    widths = torch.cat((widths, widths.flip(1)))  # a head of its own order
    side = random_side(2, 64, widths)
    codec = SpectralCodec(side, Rope(), CodecSettings(coding=coding), holds_values=holds_values)
    assert cuda_blocks.prepared(codec).layout.tabled.any()
    check(codec)


@pytest.mark.parametrize("name", ["cut", "padded"])
def test_blocks_of_a_layer_come_and_go_by_kernels(name: str, emulated: None) -> None:
    filled = fill(in_bfloat16(ATTENTION[name]))
    layer = on_device(filled.layer, CUDA)
    view = layer.snapshot()
    for side, codec in layer.codecs.items():
        assert isinstance(codec, SpectralCodec)
        portable = filled.layer.fields(side)
        assert torch.equal(view.side(side).store.buffers["codes"], cuda_blocks._from_portable(codec, portable["codes"]))
        assert torch.equal(layer.fields(side)["codes"], portable["codes"])


class Counted:
    """The conversion's kernels, counted."""

    def __init__(self, wrong: int = 0) -> None:
        self.launches, self.wrong = 0, wrong

    def __call__(self, device: torch.device) -> Mapping[str, Any]:
        """Kernels by name, in place of a loader."""
        self.found = emulation.emulated_conversion(device)
        return {name: _CountedKernel(self, kernel) for name, kernel in self.found.items()}


class _CountedKernel:
    def __init__(self, counted: Counted, kernel: emulation.Emulated) -> None:
        self.counted, self.kernel = counted, kernel

    def launch(self, grid: Any, threads: int, shared: int, arguments: Any, stream: int) -> None:
        """Count, carry it out, and spoil a bit if that is asked for."""
        self.counted.launches += 1
        self.kernel.launch(grid, threads, shared, arguments, stream)
        word = ctypes.cast(arguments.tiles, ctypes.POINTER(ctypes.c_uint32))
        word[1] ^= self.counted.wrong


@pytest.mark.parametrize("coding", CODINGS)
def test_a_conversion_is_one_launch(coding: Coding, patch: pytest.MonkeyPatch) -> None:
    codec, backend = codecs(Case(dim=128, heads=2, coding=(coding, coding)))["key"], backends.find("cuda")
    fields = {"codes": random_words(codec, cuda_blocks.CONVERTED_BLOCKS + 1)}
    counted = Counted()
    patch.setitem(conversion.LOADERS, "cpu", counted)
    cuda_blocks.prepared(codec)
    with emulation.Operations() as operations:
        tiles = backend.from_portable(codec, fields)
        backend.to_portable(codec, tiles)
    assert counted.launches == 2
    assert [name for name in operations.seen if "fill" not in name] == ["aten.empty.memory_format"] * 2
    with emulation.Operations() as operations:
        cuda_blocks._from_portable(codec, fields["codes"][:1])
    assert len(operations.seen) > 100, "what plain torch takes for a single block"


@pytest.mark.parametrize("wrong", [0, 1])
def test_kernels_are_tried_before_their_first_use(
    wrong: int, patch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trials.forget()
    patch.setattr(trials, "UNTRIED", set())
    counted, backend = Counted(wrong), backends.find("cuda")
    patch.setitem(conversion.LOADERS, "cpu", counted)
    with caplog.at_level(logging.WARNING, logger="quantcache.backends.trials"):
        for codec in codecs(Case(dim=128, heads=2)).values():
            words = random_words(codec, 5)
            tiles = backend.from_portable(codec, {"codes": words})
            assert torch.equal(tiles["codes"], cuda_blocks._from_portable(codec, words))
            assert torch.equal(backend.to_portable(codec, tiles)["codes"], words)
    assert counted.launches == (2 if wrong else 8), "two of a trial, and one each way, of keys and of values"
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "not using the convert kernel of backend 'cuda' "
    ] * wrong
    trials.forget()


def test_where_the_kernels_do_not_compile_plain_torch_converts(
    patch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def loader(device: torch.device) -> Mapping[str, Any]:
        raise RuntimeError("the CUDA kernels do not compile: no luck")

    trials.forget()
    patch.setattr(trials, "UNTRIED", set())
    patch.setitem(conversion.LOADERS, "cpu", loader)
    codec = codecs(Case())["value"]
    words = random_words(codec)
    with caplog.at_level(logging.WARNING, logger="quantcache.backends.trials"):
        tiles = backends.find("cuda").from_portable(codec, {"codes": words})
    assert torch.equal(tiles["codes"], cuda_blocks._from_portable(codec, words))
    assert "do not compile: no luck" in caplog.records[0].getMessage()
    trials.forget()


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_check_converts_blocks(wrong: int, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(conversion.LOADERS, "cpu", Counted(wrong))
    given = "cuda", torch.device("cpu"), (64, 2, 1e4), "trellis", torch.bfloat16
    found = {each.operation: each for each in kernel_check._outcomes(*given)}
    assert list(found) == ["attend", "encode", "decode", "convert"]
    assert bool(found["convert"].problem) == wrong
    if not wrong:
        assert not any(each.problem for each in found.values())
        assert found["convert"].difference == 0


def test_the_source_is_one_text_for_the_compiler() -> None:
    text = source("conversion.h")
    assert "#include" not in text
    assert all(f" {name}(" in text for name in ("tiles_from_portable", "portable_from_tiles"))
