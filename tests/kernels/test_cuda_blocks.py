"""``backend="cuda"`` on an emulated warp: shared parity cases, its block layout, and a cache that attends through it.

Nothing here runs on a GPU (test_cuda_device.py does): the barriers of bulk copies an emulation cannot show.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache import Calibration, SpectralCache, backends, data
from quantcache.accounting.memory import calibrated_sizes
from quantcache.accounting.tiles import MORE_BITS, in_tiles
from quantcache.backends import AttentionCall, cuda, cuda_blocks, trials, triton
from quantcache.backends.base import CODE_QUERIES
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES, Coding
from quantcache.common.errors import QuantCacheError
from quantcache_kernels.cuda import calls, conversion, encoding, room
from quantcache_kernels.cuda import codes as kernels
from quantcache_kernels.cuda.blocks import BlockLayout
from quantcache_kernels.cuda.compiler import source
from quantcache_kernels.cuda.driver import unavailable
from quantcache_kernels.cuda.near import NearTokens
from quantcache_kernels.cuda.tables import PLACES, level_tables, stored_codes
from tests.builders import scalar_calibration
from tests.families import FAMILIES
from tests.helpers import attend_by_kernel, feed, few
from tests.kernels import emulation, truth
from tests.kernels.cases import ATTENTION, FEW, TRELLIS, Case, Kernel, codecs, fill, on_device, shared

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")

CUDA = Kernel("cuda", lambda: "", half=True, multiple=16)

CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> Iterator[None]:
    """``backend="cuda"`` runs on the CPU; plain torch decodes, and what kernels allocate is poisoned."""
    monkeypatch.setattr(triton.TritonBackend, "unavailable", lambda self, device: "the interpreter takes its time")
    with emulation.on_the_cpu():
        yield


@pytest.fixture
def patch(emulated: None) -> Iterator[pytest.MonkeyPatch]:
    """Undone before the emulation is: what it replaces would else be put back, and stay for other tests."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    assert conversion.LOADERS["cpu"] is emulation.emulated_conversion
    assert encoding.LOADERS["cpu"] is emulation.emulated_encoder


def in_bfloat16(case: Case) -> Case:
    """A case of the shared suite as the kernels take it."""
    return replace(case, dtype=torch.bfloat16)


PARITY = (
    *("T69", "G1", "G16", "Tq5", "strided", "D80", "D96", "D128", "D64-Dv32", "D64-Dv128"),
    *("width0", "width1", "width5", "width8"),
    *("no-rope", "partial-rope", "all-fast", "padded", "padded-to-the-tail", "holes", "holes-one-mask", "cut"),
    *("cut-padded", "softcap", "sink-logits", "softcap-sink-logits", "no-sinks", "many-sinks", "zero", "1e4", "1e-6"),
    *("width3", "width4", "trellis-width3", "trellis-width6", "trellis-all-fast"),
    *("trellis-keys", "trellis-values", "trellis-width1", "trellis-width2", "trellis-width4", "trellis-width8"),
    *("trellis-few-fast", "trellis-two-heads", "trellis-cut"),
)


@pytest.mark.parametrize("name", few(PARITY, FEW))
def test_parity(name: str, emulated: None) -> None:
    check_parity(in_bfloat16((ATTENTION | TRELLIS)[name]))


def test_queries_whose_own_tokens_are_encoded_are_left_to_plain_torch(emulated: None) -> None:
    """Blocks are every query's past for the kernels; caches encode behind the attention of what they are given."""
    filled = shared(in_bfloat16(Case(tokens=132, queries=2)))
    view = on_device(filled.layer, CUDA).snapshot()
    assert view.key.tail.shape[2] == 0
    assert attend_by_kernel(filled.query, view) is None
    assert attend_by_kernel(filled.query[:, :, -1:], view) is not None


def test_what_does_not_fit_a_small_gpu_is_left_to_plain_torch(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small = room.device_of(CPU)._replace(bytes=8 << 10, block_bytes=7 << 10)
    monkeypatch.setattr(room, "device_of", lambda device: small)
    filled = fill(in_bfloat16(Case()))
    view = on_device(filled.layer, CUDA).snapshot()
    reason = backends.find("cuda").refuses(filled.query, view, AttentionCall(None, 64**-0.5))
    assert reason is not None
    assert re.fullmatch(
        r"a head's constants and blocks take \d{5} bytes of shared memory, and the device has 7168", reason
    )


@pytest.mark.parametrize("tokens", [100, 101])
def test_blocks_begin_at_any_offset_from_their_anchor(tokens: int, emulated: None) -> None:
    case = in_bfloat16(Case(tokens=tokens, sink_length=5 + tokens % 2, cut=True))
    table = shared(case).layer.snapshot().block_table
    assert 39 - tokens % 2 in (table[:, 0] - table[:, 2]).tolist()
    check_parity(case)


def check_parity(case: Case, kernel: Kernel = CUDA) -> None:
    """Attention is at most twice as far from float64 as plain torch in the case's dtype."""
    filled = shared(case)
    view, more = filled.layer.snapshot(), {"softcap": case.softcap, "s_aux": filled.s_aux}
    expected = truth.attention(filled.query, view, filled.mask, **more)
    own = truth.attention(filled.query, view, filled.mask, **more, dtype=case.dtype)
    layer = on_device(filled.layer, kernel)
    query, mask, s_aux = (None if x is None else x.to(kernel.device) for x in (filled.query, filled.mask, filled.s_aux))
    assert query is not None
    found = attend_by_kernel(query, layer.snapshot(), mask, case.softcap, s_aux)
    assert found is not None, "the kernel declined the case"
    assert layer.state.blocks.layout.name == "cuda"
    assert (found.dtype, found.shape) == (case.dtype, expected.shape)
    theirs, allowed = (float((x.cpu().double() - expected).norm()) for x in (found, own))
    assert theirs <= 2 * allowed + 1e-6 * float(expected.norm()), (theirs, allowed)


@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_before_rounding_levels_and_rotations_are_those_of_half_precision(coding: Coding, emulated: None) -> None:
    """A result in bfloat16 hides errors below its own rounding; that of the kernels is eight times finer."""
    case = in_bfloat16(Case(tokens=200, heads=2, coding=(coding, coding)))
    filled = shared(case)
    expected = truth.attention(filled.query.float(), filled.layer.snapshot(), filled.mask)
    own = truth.attention(filled.query.float(), filled.layer.snapshot(), filled.mask, dtype=torch.float16)
    view = on_device(filled.layer, CUDA).snapshot()
    found = cuda.CudaBackend.attend(backends.find("cuda"), filled.query.float(), view, AttentionCall(None, 64**-0.5))
    theirs, allowed = (float((x.double() - expected).norm()) for x in (found, own))
    assert theirs <= 3 * allowed, "queries in coded coordinates and levels are rounded to half precision too"


@pytest.mark.parametrize("blocks", range(1, 5))
def test_blocks_are_taken_by_twos_and_a_last_one_alone(blocks: int, emulated: None) -> None:
    case = in_bfloat16(Case(tokens=64 * blocks + 10, sink_length=4, coding=("trellis", "scalar")))
    assert len(shared(case).layer.snapshot().block_table) == blocks
    check_parity(case)


@pytest.mark.parametrize("lead", [8.0, 12.0])
def test_weights_far_below_an_earlier_peak_keep_their_share(lead: float, emulated: None) -> None:
    """They are rounded to half precision in its units: exp(-lead) each, but there are hundreds of them."""
    filled = shared(in_bfloat16(Case(tokens=700, heads=1, groups=1)))
    layer = filled.layer
    keys = layer.snapshot().dense("key").double()[0, 0]
    direction = keys[20] - keys.mean(0)  # of the first block
    scores = keys @ direction
    query = direction * lead / (scores[20] - scores.mean())
    filled.query.copy_((query * 64**0.5).expand_as(filled.query))
    expected = truth.attention(filled.query.float(), layer.snapshot(), filled.mask)
    own = truth.attention(filled.query.float(), layer.snapshot(), filled.mask, dtype=torch.float16)
    view = on_device(layer, CUDA).snapshot()
    found = cuda.CudaBackend.attend(backends.find("cuda"), filled.query.float(), view, AttentionCall(None, 64**-0.5))
    theirs, allowed = (float((x.double() - expected).norm()) for x in (found, own))
    assert theirs <= 3 * allowed


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_the_number_of_splits_changes_rounding_only(splits: int, emulated: None) -> None:
    filled = shared(in_bfloat16(Case(tokens=500, widths=2)))
    view = on_device(filled.layer, CUDA).snapshot()
    keys, values = (cuda_blocks.prepared(side.codec) for side in (view.key, view.value))
    given = (filled.query.float(), cuda._blocks(view), NearTokens(*view.dense_parts()), keys, values)
    found, alone = (kernels.attend(*given, AttentionCall(None, 0.125), parts) for parts in (splits, 1))
    assert float((found - alone).norm()) <= 2e-4 * float(alone.norm())


@pytest.mark.parametrize("splits", few([1, 3], [3]))
@pytest.mark.parametrize(("in_bulk", "late"), [(True, True), (False, False), (False, True)])
def test_copies_may_be_made_in_pieces_and_land_late(in_bulk: bool, late: bool, splits: int, emulated: None) -> None:
    """GPUs before Hopper copy in pieces; the arithmetic is the same, whatever lands when."""
    filled = shared(in_bfloat16(Case(tokens=600, widths=3, coding=("trellis", "scalar"))))
    view = on_device(filled.layer, CUDA).snapshot()
    keys, values = (cuda_blocks.prepared(side.codec) for side in (view.key, view.value))
    given = (filled.query, cuda._blocks(view), NearTokens(*view.dense_parts()), keys, values)
    expected = kernels.attend(*given, AttentionCall(None, 0.125), splits).clone()
    with emulation.copies(in_bulk, late), emulation.backwards() if late else nullcontext():
        found = kernels.attend(*given, AttentionCall(None, 0.125), splits)
    assert torch.equal(found, expected)


def test_a_query_of_nan_spoils_its_own_row_alone(emulated: None) -> None:
    filled = shared(in_bfloat16(Case(tokens=140, groups=5)))
    view = on_device(filled.layer, CUDA).snapshot()
    right = attend_by_kernel(filled.query, view)
    filled.query[0, 3] = torch.nan
    found = attend_by_kernel(filled.query, view)
    assert right is not None
    assert found is not None
    assert found[0, 0, 3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(found[:, :, others], right[:, :, others])


# ----------------------------------------------------------------------- layout


def random_fields(codec: SpectralCodec, rows: int, count: int) -> dict[str, Tensor]:
    """Blocks drawn bit by bit: whatever a file may hold."""
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(-(2**31), 2**31, (count, rows, codec.num_words), generator=generator).to(torch.int32)
    gains = torch.randint(0, 256, (count, rows, codec.num_heads, BLOCK), generator=generator).to(torch.uint8)
    return {"codes": codes, "gains": gains, "shifts": torch.zeros(count, rows, BLOCK, dtype=torch.int32)}


@pytest.mark.parametrize("coding", few(["scalar", "trellis"], ["trellis"]))
@pytest.mark.parametrize(
    "more",
    [{"heads": 3}, {"dim": 80, "rotary": 0.4}, {"widths": 7}, {"widths": 0}, *({"widths": w} for w in (1, 3, 4, 5))],
)
def test_the_layout_holds_every_bit(coding: Coding, more: dict[str, int]) -> None:
    backend = backends.find("cuda")
    for codec in codecs(Case(coding=(coding, coding), **more)).values():
        for count in (1, cuda_blocks.CONVERTED_BLOCKS + 1):
            fields = random_fields(codec, 2, count)
            ours = backend.from_portable(codec, fields)
            assert ours["codes"].shape == (count, 2, cuda_blocks.prepared(codec).layout.words)
            back = backend.to_portable(codec, ours)
            assert back.keys() == fields.keys()
            assert all(torch.equal(back[name], field) for name, field in fields.items())
            assert backend.gains(codec, ours) is fields["gains"]


def test_half_a_tile_takes_the_bits_of_its_widest_coefficient() -> None:
    codec = codecs(Case(dim=64, rope="none"))["value"]
    constants = codec.constants()
    widths = torch.tensor([[5] * 3 + [3] * 20 + [0] * 41])
    layout = BlockLayout.of(replace(constants, widths=widths))
    assert layout.words * 32 / BLOCK == (widths > 0).sum().new_tensor(bits_of_tiles(widths[0].tolist())).item()


def by_twos(*widths: int) -> Tensor:
    """Widths of pairs of coefficients, of one head."""
    return torch.tensor([widths]).repeat_interleave(2, dim=1)


@pytest.mark.parametrize("half", [(5, 4, 3, 2), (5, 5, 1, 1), (4, 3, 2, 1), (4, 4, 4, 4), (3, 2, 1, 0), (2, 1, 1, 1)])
@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_tables_hold_narrower_codes_beside_wider_ones(coding: Coding, half: tuple[int, ...]) -> None:
    """Widths that a half whose levels are looked up may mix, bit by bit and back."""
    codec = codecs(Case(dim=64, rope="none", coding=(coding, coding)))["value"]
    constants = codec.constants()
    widths = by_twos(*half, *(0,) * 28)
    layout = BlockLayout.of(replace(constants, widths=widths))
    assert layout.tabled.sum() == int(coding == "scalar" or half[0] < 5)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (2, 1, 64, BLOCK), generator=generator)
    kept = widths[0, :, None] - int(coding == "trellis")
    codes = torch.where(kept < 0, 0, codes & (1 << kept.clamp_min(0)) - 1 | (codes & 128) * (coding == "trellis"))
    for values in (False, True):
        words = layout.pack(codes.to(torch.uint8), values)
        assert words.shape == (2, 1, layout.words)
        assert torch.equal(layout.unpack(words, values).long(), codes)


@pytest.mark.parametrize("width", range(1, 6))
@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_tables_hold_levels_in_half_precision(coding: Coding, width: int) -> None:
    """What ``prmt`` finds, with its rule for a selector's highest bit, is the level rounded once."""
    is_trellis = coding == "trellis"
    if width + is_trellis > PLACES:
        return
    constants = codecs(Case(coding=(coding, coding)))["value"].constants()
    levels = torch.tensor((constants.unions if is_trellis else constants.levels)[width], dtype=torch.float64)
    words, unit = level_tables(tuple(levels.tolist()), is_trellis)
    found = []
    for place in range(len(levels)):
        if is_trellis:  # the subset's two bits are below the level's
            stored = int(stored_codes(torch.tensor(place >> 2), width, width, True))
            negative, nibble = stored >> 2, (stored & 3) << 2 | place & 3
            nibble ^= 3 * negative
        else:
            stored = int(stored_codes(torch.tensor(place), width, width, False))
            negative, nibble = (stored & 1, stored >> 1) if width == PLACES else (stored >> 3, stored & 7)
        found.append((-1) ** negative * unit * looked_up(words, nibble))
    expected = (levels / unit).half().double() * unit
    assert torch.equal(torch.tensor(found, dtype=torch.float64), expected)


def looked_up(words: list[int], place: int) -> float:
    """One level by the instructions of ``look_up_two``."""
    halves = []
    for table in (words[0:2], words[2:4]), (words[4:6], words[6:8]):
        halves.append([(pair[0] | pair[1] << 32) >> 8 * (place & 7) & 255 for pair in table])
    other = place >> 3
    halves[1 - other] = [255 * (byte >> 7) for byte in halves[1 - other]]
    high, low = (one ^ (two & 127) for one, two in zip(*halves, strict=True))
    return float(torch.tensor([low, high], dtype=torch.uint8).view(torch.float16))


def test_a_trellis_of_half_a_tile_has_a_whole_word_of_path_bits() -> None:
    constants = codecs(Case(dim=64, rope="none", coding=("trellis", "trellis")))["value"].constants()
    layout = BlockLayout.of(replace(constants, widths=by_twos(*(3,) * 4, *(2,) * 8, *(0,) * 20)))
    assert layout.words == 16 * (3 + 2 + 2 + 1), "the third half has a tile of its own"
    assert layout.tile_words.tolist() == [[16 * 5, 16 * 3]]
    assert layout.table()[0, 1:8].tolist() == [4 * 16 * 8, 2, 0, 0xAB, 0x0A, 0, 0]
    assert layout.table()[0, 36] == 4 * 16 * 8, "all tiles are slow"


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("name", ["wiki11m", "smollm2-135m"])
def test_predictions_know_what_tiles_take(name: str, bits: float) -> None:
    calibration = Calibration.from_pretrained(data.calibrations_path() / name).with_bits(bits)
    sizes = calibrated_sizes(calibration)
    tiled = in_tiles(sizes, calibration)
    for layer, size in zip(list(calibration.layers.values())[:2], tiled, strict=False):
        for side in SIDES:
            rope = layer.rope if side == "key" else Rope()
            codec = SpectralCodec(layer.side(side), rope, calibration.metadata.codec, holds_values=side == "value")
            found = size.key if side == "key" else size.value
            assert found.code_bits == 32 * BlockLayout.of(codec.constants()).words / BLOCK, "bits of a token"
    portable, own = (sum((s.key.code_bits or 0) + (s.value.code_bits or 0) for s in given) for given in (sizes, tiled))
    assert 20 < (own - portable) / sum(size.key.heads + size.value.heads for size in sizes) < MORE_BITS
    if bits == 3:
        assert 1.12 < own / portable < 1.15


def bits_of_tiles(widths: list[int]) -> int:
    """Bits of a token, by the definition."""
    size = 8
    ordered = sorted(widths, reverse=True)
    return sum(size * max(ordered[i : i + size]) for i in range(0, len(ordered), size))


# ----------------------------------------------------------------------- who is served


def test_who_is_not_served_is_told_why(emulated: None) -> None:
    backend = backends.find("cuda")
    codec = codecs(Case())["key"]
    assert backend.lacks(codec, torch.bfloat16) is None
    assert backend.lacks(codec, torch.float32) == "keys or values are of torch.float32"
    assert backend.lacks(codecs(Case(dim=40))["key"], torch.bfloat16) == (
        "a dimension of 40 (16 of them fast) is not a multiple of 16 up to 256"
    )
    filled = fill(in_bfloat16(Case()))
    view = on_device(filled.layer, CUDA).snapshot()
    assert backend.refuses(filled.query.half(), view, AttentionCall(None, 1.0)) == "the queries are of torch.float16"
    heads, count = view.key.tail.shape[1], filled.query.shape[1] * filled.query.shape[2]
    most = kernels.MAX_LINES // calls.lines_of(1, count // view.key.tail.shape[1], heads)
    for batch in (most, most + 1):
        query = filled.query[:1].expand(batch, -1, -1, -1)
        reason = backend.refuses(query, view, AttentionCall(None, 1.0))
        assert (reason is None) == (batch == most)
    assert reason is not None
    assert "lines of queries, more than a launch takes" in reason


def test_a_gpu_gets_it_before_triton() -> None:
    assert [each.name for each in backends.FASTEST_FIRST["cuda"]] == ["cuda", "triton"]
    assert unavailable(CPU) == "the CUDA kernels do not run on cpu devices"
    with pytest.raises(QuantCacheError, match='backend="cuda" cannot be used here: the CUDA kernels do not run on cpu'):
        backends.choose("cuda", CPU, {}, {})


def test_layers_that_it_lacks_are_left_to_triton(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = codecs(Case())
    reasons = {"cuda": "keys or values are of torch.float16"}
    for triton_is_there in (True, False):
        if triton_is_there:
            monkeypatch.setattr(triton.TritonBackend, "unavailable", lambda self, device: None)
        else:
            monkeypatch.setattr(triton.TritonBackend, "unavailable", lambda self, device: "it sleeps")
            reasons["triton"] = "it sleeps"
        backend, report = backends.choose("cuda", CPU, dict.fromkeys(SIDES, torch.float16), made)
        assert backend.name == report.name == ("triton" if triton_is_there else "torch")
        assert report.passed_over == reasons


def test_blocks_that_the_kernels_lack_stay_portable(emulated: None) -> None:
    filled = fill(in_bfloat16(Case(value_dim=72)))
    layer = on_device(filled.layer, CUDA)
    view = layer.snapshot()
    report = layer.backend_report()
    assert report is not None
    assert (report.name, report.attends) == (
        "cuda",
        "values: a dimension of 72 (0 of them fast) is not a multiple of 16 up to 256",
    )
    assert torch.equal(view.value.store.buffers["codes"], filled.layer.stores["value"].buffers["codes"])
    call = AttentionCall(None, 0.125)
    found, expected = (backends.attend(filled.query, each, call) for each in (view, filled.layer.snapshot()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("blocks", "found"), [(2, (1, 1)), (3, (2, 1)), (5, (2, 2)), (10, (3, 2)), (14, (3, 2))])
def test_a_trial_goes_round_the_loop_of_a_split(
    blocks: int, found: tuple[int, int], emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit for each split, as where all fit the GPU at once, shows nothing of what comes while a warp works."""
    trials.forget()
    monkeypatch.setattr(trials, "UNTRIED", set())
    places: list[tuple[int, int]] = []

    def attend(*given: Any) -> Tensor:
        _, held, near, _, _, _, splits = given
        made = held.places(near, -(-held.units // splits))
        places.append((made.per_split, made.splits))
        return own(*given)

    own = kernels.attend
    monkeypatch.setattr(kernels, "attend", attend)
    filled = fill(in_bfloat16(Case(tokens=64 * blocks + 20, sink_length=4)))
    view = on_device(filled.layer, CUDA).snapshot()
    assert view.num_blocks == blocks
    assert backends.find("cuda").refuses(filled.query, view, AttentionCall(None, 64**-0.5)) is None
    assert places == [found]
    trials.forget()


@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_a_kernel_is_tried_before_its_first_use(
    factor: float, emulated: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trials.forget()
    monkeypatch.setattr(trials, "UNTRIED", set())
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: factor * attend(*args))
    filled = fill(in_bfloat16(Case(tokens=280, pads=(0, 9))))
    view = on_device(filled.layer, CUDA).snapshot()
    with caplog.at_level(logging.WARNING, logger="quantcache.backends.trials"):
        found = attend_by_kernel(filled.query, view, filled.mask)
    assert (found is None) == (factor > 1)
    assert len(caplog.records) == (factor > 1)
    if factor > 1:
        assert "not using the attend kernel of backend 'cuda' in this process" in caplog.records[0].getMessage()
        with pytest.raises(QuantCacheError, match="the kernel has failed its trial"):
            backends.choose("cuda", CPU, {}, {})
    trials.forget()


def test_the_sources_are_one_text_for_the_compiler() -> None:
    text = source("codes.h")
    assert "#include" not in text
    assert text.count("#if") == text.count("#endif")
    assert all(f" {name}(" in text for name in ("take_queries", "attend_codes", "merge"))


# ----------------------------------------------------------------------- a cache


@functools.cache
def model() -> torch.nn.Module:
    """The small Llama in bfloat16."""
    return FAMILIES[0].make(dtype=torch.bfloat16)


def tokens(count: int) -> Tensor:
    """Random tokens for two rows."""
    return torch.randint(3, 250, (2, count), generator=torch.Generator().manual_seed(3))


@functools.cache
def seen() -> SpectralCache:
    """A cache of two padded rows that has seen 214 tokens, most of them at once."""
    config = model().config
    found = SpectralCache(scalar_calibration(config, 3), config, residual_length=16, backend="cuda")
    feed(model(), found, tokens(214), [150, 62, 1, 1], padding=(0, 7))
    return found


@pytest.fixture
def filled_cache(emulated: None) -> SpectralCache:
    """A copy of it, which may be changed."""
    return copy.deepcopy(seen())


def next_logits(cache: SpectralCache, count: int, backend: str = "", attention: str = "spectral") -> Tensor:
    """What the model says of some more tokens, which a copy of the cache takes in."""
    forked = copy.deepcopy(cache)
    for layer in forked.spectral_layers:
        layer.backend = backend or layer.backend
    model().set_attn_implementation(attention)
    try:
        mask = torch.ones(2, 214 + count, dtype=torch.long)
        mask[1, :7] = 0
        positions = (mask.cumsum(-1) - 1)[:, 214:]
        with torch.no_grad():
            made = model()(tokens(count), attention_mask=mask, position_ids=positions, past_key_values=forked)
    finally:
        model().set_attn_implementation("spectral")
    return made.logits.double()


@pytest.mark.support("CUDA kernels that attend on blocks, emulated")
def test_a_cache_attends_on_tiles(filled_cache: SpectralCache, tmp_path: Path) -> None:
    reports = filled_cache.backend_report().values()
    assert {(report.name, report.attends, *report.refused) for report in reports} == {("cuda", None)}
    for count in (1, 3, CODE_QUERIES + 1):
        exact, found, dense = (
            next_logits(filled_cache, count, *how) for how in (("torch",), ("cuda",), ("cuda", "sdpa"))
        )
        own, theirs = (float((x - exact).norm()) for x in (dense, found))
        assert theirs <= 2 * own + 1e-6 * float(exact.norm()), (count, theirs, own)
    layer = filled_cache.spectral_layers[0]
    assert layer.state.blocks.layout.name == "cuda"
    measured = filled_cache.memory()
    assert measured.codes == sum(
        each.stores[side].buffers["codes"][: each.stores[side].count].nbytes
        for each in filled_cache.spectral_layers
        for side in SIDES
    ), "the tiles' own bytes are counted"

    filled_cache.save(tmp_path / "cache.safetensors")
    calibration = scalar_calibration(model().config, 3)
    read = SpectralCache.load(tmp_path / "cache.safetensors", calibration, config=model().config, backend="torch")
    for ours, theirs in zip(filled_cache.spectral_layers, read.spectral_layers, strict=True):
        for side in SIDES:
            assert all(torch.equal(ours.fields(side)[name], field) for name, field in theirs.fields(side).items())
    again = SpectralCache.load(tmp_path / "cache.safetensors", calibration, config=model().config, backend="cuda")
    assert torch.equal(next_logits(again, 1), next_logits(filled_cache, 1))


def test_rows_move_and_tokens_go_in_tiles_as_in_blocks(filled_cache: SpectralCache) -> None:
    twin = copy.deepcopy(filled_cache)
    for layer in twin.spectral_layers:
        layer.backend = "torch"
        layer.snapshot()
    for each in (filled_cache, twin):
        each.batch_select_indices(torch.tensor([1, 0]))
        each.crop(-70)
    for ours, theirs in zip(filled_cache.spectral_layers, twin.spectral_layers, strict=True):
        assert ours.state.blocks.layout.name == "cuda"
        assert ours.saturated_gains() == theirs.saturated_gains()
        for side in SIDES:
            assert all(torch.equal(ours.fields(side)[name], field) for name, field in theirs.fields(side).items())
            assert torch.equal(ours.snapshot().dense(side), theirs.snapshot().dense(side))
