"""Every kernel against plain torch: no further from float64 than twice torch's own error, and the same codes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from quantcache import backends
from quantcache.attention.function import spectral_attention
from quantcache.backends import CODE_QUERIES
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES, Coding
from quantcache_kernels import cpu
from quantcache_kernels.cpu.library import find
from quantcache_kernels.interface import AttentionCall
from tests.helpers import attend_by_kernel, implementation
from tests.kernels import encoding, truth
from tests.kernels.cases import (
    ATTENTION,
    BASE,
    CODES,
    KERNELS,
    TORCH,
    TRELLIS,
    Case,
    Filled,
    Kernel,
    as_parameters,
    codecs,
    few_of,
    fill,
    on_device,
    select,
    shared,
    vectors,
)

CODINGS = get_args(Coding)

YARDSTICK = 8
"""Rounding steps that plain torch may be off: whoever is measured by it would pass with the same fault."""


@pytest.fixture(params=as_parameters(KERNELS))
def kernel(request: pytest.FixtureRequest, poisoned: None) -> Iterator[Kernel]:
    """The kernel under test, in use; what it allocates is poisoned."""
    missing = request.param.missing()
    if missing:
        pytest.skip(missing)
    undo = select(request.param)
    yield request.param
    undo()


def attend(filled: Filled, kernel: Kernel, case: Case) -> Tensor:
    """Attention through a kernel, which must not fall back."""
    view = on_device(filled.layer, kernel).snapshot()
    query, mask, s_aux = (None if x is None else x.to(kernel.device) for x in (filled.query, filled.mask, filled.s_aux))
    assert query is not None
    output = attend_by_kernel(query, view, mask, case.softcap, s_aux)
    assert output is not None, "the kernel declined the case"
    return output.cpu()


@functools.cache
def truth_of(case: Case) -> Tensor:
    """Attention in float64."""
    filled = shared(case)
    return truth.attention(filled.query, filled.layer.snapshot(), filled.mask, softcap=case.softcap, s_aux=filled.s_aux)


@functools.cache
def own_error(case: Case, half: bool) -> float:
    """Error of plain torch, in float32 or in the case's own precision."""
    filled = shared(case)
    view, more = filled.layer.snapshot(), {"softcap": case.softcap, "s_aux": filled.s_aux}
    if half and case.dtype != torch.float32:
        output = truth.attention(filled.query, view, filled.mask, **more, dtype=case.dtype)
    else:
        output = spectral_attention(filled.query, view, filled.mask, **more)
    found, expected = float((output.double() - truth_of(case)).norm()), truth_of(case)
    assert found <= YARDSTICK * torch.finfo(case.dtype).eps * float(expected.norm()), "plain torch is wrong itself"
    return found


@pytest.mark.parametrize("case", few_of(ATTENTION | TRELLIS))
def test_attention(kernel: Kernel, case: Case) -> None:
    if kernel.leaves(case):
        pytest.skip(f"not for {kernel.backend}: {kernel.leaves(case)}")
    filled = shared(case)
    expected, own = truth_of(case), own_error(case, kernel.half)
    found = attend(filled, kernel, case)
    assert found.dtype == filled.query.dtype
    assert found.shape == expected.shape
    theirs = float((found.double() - expected).norm())
    assert theirs <= 2 * own + 1e-6 * float(expected.norm()), (theirs, own)


@pytest.mark.parametrize("queries", [2, CODE_QUERIES + 1])
def test_queries_whose_own_tokens_are_encoded(queries: int, kernel: Kernel) -> None:
    """Kernels read blocks as the past of every query, and leave it to plain torch, which hides what comes behind."""
    case = Case(tokens=132, queries=queries)
    view = on_device(shared(case).layer, kernel).snapshot()
    assert view.key.tail.shape[2] == 0
    query = shared(case).query.to(kernel.device)
    assert attend_by_kernel(query, view) is None
    assert attend_by_kernel(query[:, :, -1:], view) is not None
    found, expected = backends.attend(query, view, AttentionCall(None, case.dim**-0.5)), truth_of(case)
    theirs = float((found.cpu().double() - expected).norm())
    assert theirs <= YARDSTICK * torch.finfo(case.dtype).eps * float(expected.norm())


Given = tuple[Tensor, Tensor, Tensor | None]


@functools.cache
def encoded_by_torch(case: Case, side: str) -> tuple[SpectralCodec, Given, dict[str, Tensor]]:
    """Codec, what is to be encoded (tokens, places, starts), and plain torch's codes and gains, found to be right."""
    filled = shared(case)
    view = filled.layer.snapshot()
    count = (case.tokens - case.sink_length) // BLOCK
    block_table = view.block_table[:count].clone()
    block_table[:, 1] = BLOCK
    codec = view.side(side).codec
    assert isinstance(codec, SpectralCodec)
    given = (
        filled.given[side][:, :, case.sink_length : case.sink_length + count * BLOCK],
        block_table,
        view.left_padding,
    )
    fields = codec.encode(*given)
    assert encoding.wrong(codec, *given, fields) == 0
    return codec, given, fields


@pytest.mark.parametrize("case", few_of(CODES | TRELLIS))
def test_codes(kernel: Kernel, case: Case, record_property: Callable[[str, object], None]) -> None:
    if kernel.leaves_codes(case):
        pytest.skip(f"not for {kernel.backend}: {kernel.leaves_codes(case)}")
    theirs = on_device(shared(case).layer, kernel)
    for side in SIDES:
        codec, given, expected = encoded_by_torch(case, side)
        moved = (None if t is None else t.to(kernel.device) for t in given)
        fields = implementation(kernel.backend).encode(theirs.codecs[side], *moved)
        found = {name: field.cpu() for name, field in fields.items()}
        assert {name: (field.shape, field.dtype) for name, field in found.items()} == {
            name: (field.shape, field.dtype) for name, field in expected.items()
        }
        wrong, ties = encoding.compare(codec, *given, found, expected)
        record_property(f"{side} tokens encoded otherwise", ties)
        assert not wrong, f"{wrong} tokens are encoded as no gain factor says, besides {ties} ties"


@pytest.mark.parametrize("name", ["trellis-width2", "trellis-width4", "trellis-padded"])
def test_codes_of_another_pass(kernel: Kernel, name: str) -> None:
    case = TRELLIS[name]
    if kernel.leaves_codes(case):
        pytest.skip(f"not for {kernel.backend}: {kernel.leaves_codes(case)}")
    for side in SIDES if kernel.backend == "cpu" else SIDES[1:]:  # six searches of a side take the interpreter long
        codec, given, _ = encoded_by_torch(case, side)
        moved = [None if t is None else t.to(kernel.device) for t in given]
        found = []
        for passes in (1, 2, 3):
            theirs = codecs(case, kernel.device)[side]
            theirs.passes = passes
            fields = implementation(kernel.backend).encode(theirs, *moved)
            found.append({name: field.cpu() for name, field in fields.items()})
        for before, after in itertools.pairwise(found):
            assert not torch.equal(before["codes"], after["codes"])
            assert encoding.wrong_after(codec, given, before, after) == 0
        assert encoding.wrong_after(codec, given, *found[::2]), "a pass left out must be seen"


DecodeGiven = tuple[dict[str, Tensor], Tensor, Tensor | None]


def assert_decodes(kernel: Kernel, codec: SpectralCodec, given: DecodeGiven, expected: Tensor) -> Tensor:
    """What a kernel decodes, found to be no further from float64 than twice plain torch, one block or several."""
    fields, block_table, left_padding = given
    found = implementation(kernel.backend).decode(codec, *given)
    own, theirs = (float((x.double() - expected).norm()) for x in (codec.decode(*given), found))
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    assert theirs <= 2 * own + 1e-6 * float(expected.norm()), (theirs, own)
    last = {name: field[-1:] for name, field in fields.items()}
    alone = implementation(kernel.backend).decode(codec, last, block_table[-1:], left_padding)
    assert torch.equal(alone, found[:, :, -BLOCK:])
    return found


@pytest.mark.parametrize("case", few_of(CODES | TRELLIS))
def test_decoding(kernel: Kernel, case: Case) -> None:
    if kernel.backend != "cpu":
        pytest.skip("test_triton.py has its own")
    view = shared(case).layer.snapshot()
    for side in (view.key, view.value):
        assert isinstance(side.codec, SpectralCodec)
        given = (side.store.slice(0, view.num_blocks), view.block_table, view.left_padding)
        assert_decodes(kernel, side.codec, given, truth.decoded(side, view))


def random_blocks(codec: SpectralCodec, rows: int, count: int) -> dict[str, Tensor]:
    """Blocks of codes and gains that are drawn bit by bit: whatever a file may hold."""
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(-(2**31), 2**31, (count, rows, codec.num_words), generator=generator).to(torch.int32)
    gains = torch.randint(0, 256, (count, rows, codec.num_heads, BLOCK), generator=generator).to(torch.uint8)
    return {"codes": codes, "gains": gains}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("first", [4, 131_072, 1_000_003])
def test_decoding_far_behind_the_start(kernel: Kernel, first: int, coding: Coding) -> None:
    """Positions that need float64 angles, blocks that begin within an anchor's stretch, and rows of other origins."""
    if kernel.backend != "cpu":
        pytest.skip("test_triton.py has its own")
    codec = codecs(Case(dim=80, heads=2, rotary=0.8, coding=(coding, coding)))["key"]
    places = [[first, 64, first], [first + 64, 64, first], [first + 150, 30, first + 128]]
    block_table = torch.tensor(places, dtype=torch.int32)
    for left_padding in (None, torch.tensor([0, first - 3]), torch.tensor([5, -7])):
        given = (random_blocks(codec, 2, 3), block_table, left_padding)
        found = assert_decodes(kernel, codec, given, codec.decode(*given, torch.float64))
        if left_padding is None:
            assert not torch.equal(found[0], found[1])


def test_tokens_with_shifts_of_their_own(kernel: Kernel) -> None:
    """Kernels know one number a row: they are given keys turned to where their slots say, and those turned back."""
    if kernel.backend != "cpu":
        pytest.skip("of the others only the kernels themselves are tested here")
    codec = codecs(BASE)["key"]
    fields = random_blocks(codec, 2, 2)
    fields["shifts"] = torch.arange(-BLOCK, BLOCK, dtype=torch.int32).view(2, 1, BLOCK).expand(2, 2, BLOCK) * 9
    block_table = torch.tensor([[4, 64, 4], [68, 64, 4]], dtype=torch.int32)
    given = (fields, block_table, None)
    found = assert_decodes(kernel, codec, given, codec.decode(*given, torch.float64))
    shifts = fields["shifts"].transpose(0, 1).flatten(1).long()
    errors = []
    for encoder in map(implementation, (kernel.backend, "torch")):
        again = encoder.encode(codec, found, block_table, shifts) | {"shifts": fields["shifts"]}
        errors.append(float((codec.decode(again, block_table, None, torch.float64) - found).norm()))
    assert errors[0] <= 1.001 * errors[1]  # they may differ where two paths are as good


@pytest.mark.parametrize("part", ["path", "level", "gain"])
def test_a_path_that_is_not_the_best_is_found(part: str) -> None:
    """The rule itself: one wrong bit of a path or a code, and one wrong gain, is wrong."""
    codec, given, expected = encoded_by_torch(TRELLIS["trellis-width4"], "key")
    found = {name: field.clone() for name, field in expected.items()}
    if part == "gain":
        found["gains"][0, 0, 0, 40] += 2
    else:
        found["codes"][0, 0, 6 if part == "path" else 0] ^= 1 << 9  # of the first coefficient
    wrong, ties = encoding.compare(codec, *given, found, expected)
    assert wrong
    assert not ties


@pytest.mark.parametrize("coding", CODINGS)
def test_company_does_not_change_codes(kernel: Kernel, coding: Coding) -> None:
    case = Case(tokens=260, pads=(0, 9)) if coding == "scalar" else Case(tokens=132, coding=(coding, coding))
    view = on_device(fill(case).layer, kernel).snapshot()
    codec = view.key.codec
    assert codec is not None
    x = vectors(case, case.tokens)["key"][:, :, 4:].to(kernel.device)
    together = implementation(kernel.backend).encode(codec, x, view.block_table, view.left_padding)
    for index, (block, place) in enumerate(zip(x.split(BLOCK, dim=2), view.block_table.split(1), strict=True)):
        alone = implementation(kernel.backend).encode(codec, block, place, view.left_padding)
        for name, field in together.items():
            assert torch.equal(field[index : index + 1], alone[name])


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("coding", CODINGS)
def test_threads_change_nothing(kernel: Kernel, coding: Coding, threads: int) -> None:
    if kernel.backend != "cpu":
        pytest.skip("only the CPU kernels have threads")
    case = Case(tokens=3000 if coding == "scalar" else 700, pads=(0, 9), widths=3, coding=(coding, coding))
    filled, before = shared(case), torch.get_num_threads()
    view = on_device(filled.layer, kernel).snapshot()
    assert view.key.codec is not None
    x = filled.given["key"][:, :, 4:260]
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            codes = implementation(kernel.backend).encode(view.key.codec, x, view.block_table[:4], view.left_padding)
            given = (view.key.store.slice(0, view.num_blocks), view.block_table, view.left_padding)
            decoded = implementation(kernel.backend).decode(view.key.codec, *given)
            results.append({**codes, "decoded": decoded, "output": attend(filled, kernel, case)})
    finally:
        torch.set_num_threads(before)
    for name, alone in results[0].items():
        assert torch.equal(alone, results[1][name])


@pytest.mark.skipif(find()[0] is None, reason=f"no CPU kernels: {find()[1]}")
def test_operators_take_trellis_constants() -> None:
    """What a compiled model calls: the constants go through it as tensors and sizes."""
    codec, (x, block_table, left_padding), _ = encoded_by_torch(TRELLIS["trellis"], "key")
    constants = cpu.prepare(codec.constants())
    direct = cpu.encode(x, constants, block_table, left_padding)
    through = torch.ops.quantcache_kernels.cpu_encode(x, block_table, left_padding, *constants.flatten())
    assert all(torch.equal(*pair) for pair in zip(direct, through, strict=True))
    direct = cpu.decode(*through, constants, block_table, left_padding)
    given = (*through, block_table, left_padding, *constants.flatten())
    assert torch.equal(torch.ops.quantcache_kernels.cpu_decode(*given), direct)
    torch.library.opcheck(torch.ops.quantcache_kernels.cpu_decode, given, test_utils=("test_schema", "test_faketensor"))


def test_a_lopsided_union_codebook_is_refused() -> None:
    given = codecs(TRELLIS["trellis-width3"])["key"].constants()
    unions = [list(book) for book in given.unions]
    unions[3][0] -= 1
    with pytest.raises(ValueError, match="the union codebook of 3 bits is not symmetric about zero"):
        cpu.prepare(replace(given, unions=unions))


def test_masks_of_their_own_fall_back(kernel: Kernel) -> None:
    filled = fill(BASE)
    layer, query = on_device(filled.layer, kernel), filled.query.to(kernel.device)
    view = layer.snapshot()
    per_head = torch.rand(1, query.shape[1], 1, view.length, generator=torch.Generator().manual_seed(6)) < 0.5
    additive = torch.zeros(1, 1, 1, view.length).masked_fill(per_head[:, :1], torch.finfo(torch.float32).min)
    for mask in (per_head.to(kernel.device), additive.to(kernel.device)):
        layer.backend = kernel.backend
        view = layer.snapshot()
        assert attend_by_kernel(query, view, mask) is None
        found = spectral_attention(query, view, mask)
        assert sum(layer.backend_report().refused.values()) > 0
        layer.backend = "torch"
        assert torch.equal(found, spectral_attention(query, layer.snapshot(), mask))


def test_gradients_fall_back(kernel: Kernel) -> None:
    filled = fill(BASE)
    query = filled.query.to(kernel.device).requires_grad_()
    spectral_attention(query, on_device(filled.layer, kernel).snapshot(), None).sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0


def test_generation_step_by_step(kernel: Kernel) -> None:
    """Update, encode and attend a token at a time."""
    layer = on_device(fill(Case(tokens=193)).layer, kernel)  # three tokens short of a block
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        new = [torch.randn(1, 1, 1, 64, generator=generator) for _ in range(2)]
        query = 0.2 * torch.randn(1, 3, 1, 64, generator=generator)
        layer.update(*(x.to(kernel.device) for x in new))
        layer.flush()
        found = spectral_attention(query.to(kernel.device), layer.snapshot(), None).cpu()
        mine = on_device(layer, TORCH).snapshot()
        expected = truth.attention(query, mine, None)
        own, theirs = (
            float((output.double() - expected).norm()) for output in (spectral_attention(query, mine, None), found)
        )
        assert theirs <= 2 * own + 1e-6 * float(expected.norm()), (theirs, own)
    assert len(layer.spans) == 3
