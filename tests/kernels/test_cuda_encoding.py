"""Blocks encoded by the kernel of ``backend="cuda"``, on an emulated warp, by the rule that holds for every encoder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache import backends
from quantcache.backends import cuda_blocks, trials
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache_kernels.cuda import encoding as kernels
from quantcache_kernels.cuda import room
from quantcache_kernels.cuda.compiler import source
from tests.helpers import few
from tests.kernels import emulation, encoding
from tests.kernels.cases import CODES, FEW, TRELLIS, Case, codecs, fill
from tests.kernels.test_cuda_blocks import emulated as emulated
from tests.kernels.test_cuda_blocks import in_bfloat16
from tests.kernels.test_cuda_blocks import patch as patch
from tests.kernels.test_parity import encoded_by_torch

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")

CASES = (
    *("D80", "D96", "D128", *(f"width{width}" for width in range(9))),
    *(
        "no-rope",
        "interleaved",
        "partial-rope",
        "few-fast",
        "all-fast",
        "padded",
        "cut",
        "strided",
        "zero",
        "1e4",
        "1e-6",
    ),
    *("trellis", "trellis-keys", "trellis-values", *(f"trellis-width{width}" for width in range(9)), "trellis-D256"),
    *("trellis-partial-rope", "trellis-few-fast", "trellis-all-fast", "trellis-two-heads", "trellis-padded"),
    *("trellis-cut", "trellis-zero", "trellis-1e-6"),
)


def encode(codec: SpectralCodec, *given: Tensor | None) -> dict[str, Tensor]:
    """What the kernel makes of some blocks, in the portable layout."""
    assert cuda_blocks.encodes(codec, *given)
    backend = backends.find("cuda")
    return backend.to_portable(codec, backend.encode(codec, *given))


@pytest.mark.parametrize("name", few(CASES, FEW))
def test_codes(name: str, emulated: None, record_property: Any) -> None:
    case = in_bfloat16((CODES | TRELLIS)[name])
    for side in SIDES:
        codec, given, expected = encoded_by_torch(case, side)
        wrong, ties = encoding.compare(codec, *given, encode(codec, *given), expected)
        record_property(f"{side} tokens encoded otherwise", ties)
        assert not wrong, f"{wrong} tokens are encoded as no gain factor says, besides {ties} ties"


def test_another_pass_follows_the_gains_of_the_last(emulated: None) -> None:
    case = in_bfloat16(TRELLIS["trellis-padded"])
    _, given, _ = encoded_by_torch(case, "key")
    found = []
    for passes in (1, 2, 3):
        codec = codecs(case)["key"]
        codec.passes = passes
        found.append(encode(codec, *given))
    assert encoding.wrong_after(codec, given, *found[:2]) == encoding.wrong_after(codec, given, *found[1:]) == 0
    assert encoding.wrong_after(codec, given, *found[::2]), "a pass left out must be seen"


@pytest.mark.parametrize("count", [1, 4, 7])
def test_as_many_factors_as_there_are(count: int, emulated: None) -> None:
    """The kernel tries five at once: others are left out of the search, or tried after them."""
    case = in_bfloat16(TRELLIS["trellis-width2"])
    _, given, _ = encoded_by_torch(case, "value")
    codec = codecs(case)["value"]
    codec.gain_search = tuple(0.5 + 0.13 * f for f in range(count))[::-1]
    found, expected = encode(codec, *given), codec.encode(*given)
    assert encoding.wrong(codec, *given, expected) == 0
    assert encoding.compare(codec, *given, found, expected)[0] == 0


@pytest.mark.parametrize("name", ["padded", "trellis-padded"])
def test_blocks_are_encoded_alone_as_together(name: str, emulated: None) -> None:
    case = in_bfloat16((CODES | TRELLIS)[name])
    codec, (x, block_table, left_padding), _ = encoded_by_torch(case, "key")
    assert block_table.shape[0] > 1
    together = encode(codec, x, block_table, left_padding)
    for index in range(block_table.shape[0]):
        one = x[:, :, index * BLOCK : (index + 1) * BLOCK], block_table[index : index + 1], left_padding
        alone = encode(codec, *one)
        assert all(torch.equal(alone[field][0], together[field][index]) for field in ("codes", "gains"))


@pytest.mark.parametrize("name", ["D96", "trellis-two-heads"])
def test_warps_may_run_in_any_order(name: str, emulated: None) -> None:
    """Where one did not wait for another, what it finds in shared memory would depend on who goes first."""
    codec, given, _ = encoded_by_torch(in_bfloat16((CODES | TRELLIS)[name]), "key")
    codec = copy.deepcopy(codec)
    codec.passes = 2  # so that room is used again
    codec.derived.clear()
    assert cuda_blocks.encoder(codec).warps > 2
    codes, gains = cuda_blocks.encoder(codec).encode(*given)
    with emulation.backwards():
        again = cuda_blocks.encoder(codec).encode(*given)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], gains)


def test_places_may_be_of_64_bits(emulated: None) -> None:
    codec, (x, block_table, left_padding), _ = encoded_by_torch(in_bfloat16(CODES["padded"]), "key")
    found = [encode(codec, x, table, left_padding) for table in (block_table, block_table.long())]
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("codes", "gains"))


@pytest.mark.parametrize("name", ["trellis-keys", "padded"])
def test_words_are_those_that_the_conversion_makes(name: str, emulated: None) -> None:
    """Bits of slots without a coefficient too: they are not left to what shared memory held before."""
    codec, given, _ = encoded_by_torch(in_bfloat16((CODES | TRELLIS)[name]), "key")
    assert (cuda_blocks.prepared(codec).layout.own_widths == 0).any()
    backend = backends.find("cuda")
    fields = backend.encode(codec, *given)
    again = backend.from_portable(codec, backend.to_portable(codec, fields))
    assert all(torch.equal(again[field], fields[field]) for field in ("codes", "gains"))


def test_a_cache_encodes_by_it(patch: pytest.MonkeyPatch) -> None:
    launches = []

    def loader(device: torch.device, is_trellis: bool) -> Mapping[str, Any]:
        launches.append(is_trellis)
        return emulation.emulated_encoder(device, is_trellis)

    patch.setitem(kernels.LOADERS, "cpu", loader)
    case = in_bfloat16(replace(TRELLIS["trellis-keys"], tokens=3 * BLOCK + 10))
    filled = fill(case, backend="cuda")
    assert launches == [True, False]
    view, plain = filled.layer.snapshot(), fill(case).layer.snapshot()
    for side in SIDES:
        held = view.side(side).store.buffers
        codec = plain.side(side).codec
        codes = cuda_blocks._to_portable(codec, held["codes"])
        same = (codes == plain.side(side).store.buffers["codes"]).float().mean()
        assert same > 0.999, "rounding decides where two are as good"


class Refusals:
    """Kernels that must not be asked."""

    def __call__(self, device: torch.device, is_trellis: bool) -> Mapping[str, Any]:
        """Whatever asks is wrong."""
        raise AssertionError("the kernel was asked")


def test_what_it_does_not_take_is_encoded_as_before(patch: pytest.MonkeyPatch) -> None:
    case = in_bfloat16(CODES["width2"])
    codec, (x, block_table, _), expected = encoded_by_torch(case, "value")
    patch.setitem(kernels.LOADERS, "cpu", Refusals())
    backend = backends.find("cuda")
    found = backend.to_portable(codec, backend.encode(codec, x.float(), block_table, None))
    assert all(torch.equal(found[name], field) for name, field in expected.items())
    by_token = torch.zeros(x.shape[0], x.shape[2], dtype=torch.int64)
    assert not cuda_blocks.encodes(codec, x, block_table, by_token)
    small = room.device_of(x.device)._replace(block_bytes=cuda_blocks.encoder(codec).shared_bytes - 1)
    patch.setattr(cuda_blocks, "device_of", lambda device: small)
    assert not cuda_blocks.encodes(codec, x, block_table, None)
    odd = codecs(Case(dim=72, heads=2, rope="none"))["value"]
    assert not cuda_blocks.encodes(odd, x, block_table, None)


class Wrong:
    """The kernel, given the wrong mean."""

    def __call__(self, device: torch.device, is_trellis: bool) -> Mapping[str, Any]:
        """In place of a loader."""
        self.kernel = emulation.emulated_encoder(device, is_trellis)["encode"]
        return {"encode": self}

    def launch(self, grid: Any, threads: int, shared: int, arguments: Any, stream: int) -> None:
        """Carry it out."""
        own = type(arguments).from_buffer_copy(arguments)
        own.mean = own.matrix
        self.kernel.launch(grid, threads, shared, own, stream)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_it_is_tried_before_its_first_use(
    is_wrong: bool, patch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trials.forget()
    patch.setattr(trials, "UNTRIED", set())
    if is_wrong:
        patch.setitem(kernels.LOADERS, "cpu", Wrong())
    codec, given, expected = encoded_by_torch(in_bfloat16(CODES["width3"]), "key")
    backend = backends.find("cuda")
    with caplog.at_level(logging.WARNING, logger="quantcache.backends.trials"):
        found = backend.to_portable(codec, backend.encode(codec, *given))
    assert encoding.compare(codec, *given, found, expected)[0] == 0
    tried = [record.getMessage() for record in caplog.records if record.name == "quantcache.backends.trials"]
    assert [message[:46] for message in tried] == ["not using the encode kernel of backend 'cuda' "] * is_wrong
    trials.forget()


@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_every_bin_has_one_threshold_at_most(coding: str, emulated: None) -> None:
    """Levels just beside each threshold are found, of every width."""
    case = Case(dim=128, rope="none", coding=(coding, coding))  # type: ignore[arg-type]
    constants = codecs(case)["value"].constants()
    for width in range(1, 9):
        levels = torch.tensor((constants.unions if coding == "trellis" else constants.levels)[width]).float()
        apart = 4 if coding == "trellis" else 1
        thresholds = (levels[apart:] + levels[:-apart]) / 2
        at, below, scale = kernels._bins(thresholds)
        beside = torch.cat((thresholds * (1 - 1e-5), thresholds * (1 + 1e-5), levels, levels * 2))
        bins = (beside * scale + 0.5).clamp(0, 1).mul(len(at) - 1).round().long()
        found = below[bins] + (beside > at[bins]).int()
        assert torch.equal(found.long(), torch.bucketize(beside, thresholds))


def test_the_source_is_one_text_for_the_compiler() -> None:
    text = source("encode.h")
    assert "#include" not in text
    assert " encode(" in text


def test_emulation_and_python_agree_on_shared_memory(patch: pytest.MonkeyPatch) -> None:
    """What is written behind the shared memory that is asked for, the emulation sees: a little less does not do."""
    codec, given, _ = encoded_by_torch(in_bfloat16(TRELLIS["trellis-width8"]), "value")
    right = cuda_blocks.encoder(codec).shared_bytes
    patch.setattr(kernels.PreparedEncoder, "shared_bytes", right - 64)
    with pytest.raises(AssertionError, match="some lanes wait"):
        encode(codec, *given)
