"""What only the Triton kernels have: decoding to dense, computed levels, tracing. Parity is in test_parity.py.

Without a GPU they run under Triton's interpreter; with one, the same tests run on it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quantcache import backends
from quantcache.attention.function import spectral_attention
from quantcache.backends import Backend
from quantcache.backends.triton import prepared
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import Coding
from quantcache.coding.trellis import union_levels
from quantcache.common.errors import QuantCacheError
from quantcache.common.logs import log_once
from quantcache_kernels.gpu_tables import HALF_TERMS
from quantcache_kernels.triton import encode, ops
from quantcache_kernels.triton.codes import rotation
from quantcache_kernels.triton.runtime import jit, tl
from tests.conftest import ROOT
from tests.kernels import encoding as rule
from tests.kernels import interpreter, truth
from tests.kernels.cases import ATTENTION, BASE, TRELLIS, TRITON, TRITON_DEVICE, fill, on_device, shared

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(bool(TRITON.missing()), reason=f"no Triton here: {TRITON.missing()}"),
    pytest.mark.usefixtures("poisoned"),
]


def assert_near(found: Tensor, reference: Tensor, expected: Tensor) -> None:
    """The rule of the suite: no further from float64 than twice torch's own error."""
    own, theirs = (float((output.cpu().double() - expected).norm()) for output in (reference, found))
    assert theirs <= 2 * own + 1e-6 * float(expected.norm()), (theirs, own)


def test_triton_attention_of_many_queries_decodes_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    decode = Backend.decode

    def counting(self: Backend, codec: Any, fields: dict[str, Tensor], block_table: Tensor, *more: Any) -> Tensor:
        sizes.append(len(block_table))
        return decode(self, codec, fields, block_table, *more)

    monkeypatch.setattr(Backend, "decode", counting)
    monkeypatch.setattr("quantcache.backends.reference.TILE_BLOCKS", 1)
    monkeypatch.setattr("quantcache.backends.reference.QUERY_CHUNK", 64)
    filled = fill(replace(BASE, queries=200, tokens=400))
    view = filled.layer.snapshot()
    expected = truth.attention(filled.query, view, None)
    reference = spectral_attention(filled.query, view, None)
    found = spectral_attention(filled.query.to(TRITON_DEVICE), on_device(filled.layer, TRITON).snapshot(), None)
    assert_near(found, reference, expected)
    assert sizes == [1] * (2 * 2 * len(view.block_table)), (
        "by either, every block is decoded once a side for all queries"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted")
def test_the_quick_interpreter_computes_what_the_plain_one_does() -> None:
    command = [sys.executable, "-m", "tests.kernels.interpreter"]  # nothing makes that one quick
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
    }
    plain = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert plain.stdout.strip() == interpreter.digest()


DECODING = (
    "D80",
    "D96",
    "D128",
    "D64-Dv72",
    "no-rope",
    "interleaved",
    "partial-rope",
    "all-fast",
    "padded",
    "cut-padded",
    "trellis",
    "trellis-padded",
    "trellis-few-fast",
    *(f"trellis-width{width}" for width in range(1, 9)),
)


@pytest.mark.parametrize("name", [*DECODING, *(f"width{width}" for width in range(1, 9))])
def test_triton_decoding(name: str) -> None:
    case = (ATTENTION | TRELLIS)[name]
    if TRITON.leaves(case):
        case = replace(case, value_dim=80)
    layer = shared(case).layer
    view, moved = layer.snapshot(), on_device(layer, TRITON).snapshot()
    for side, other in ((view.key, moved.key), (view.value, moved.value)):
        assert side.codec is not None
        assert other.codec is not None
        reference = side.codec.decode(side.store.slice(0, view.num_blocks), view.block_table, view.left_padding)
        fields = other.store.slice(0, view.num_blocks)
        found = backends.find("triton").decode(other.codec, fields, moved.block_table, moved.left_padding)
        assert_near(found, reference, truth.decoded(side, view))


@jit
def rotation_kernel(positions, turns, cosines, sines, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosines and sines of some positions."""
    place = tl.arange(0, COUNT)
    cos, sin = rotation(tl.load(positions + place), tl.load(turns + place))
    tl.store(cosines + place, cos)
    tl.store(sines + place, sin)


def test_rotations_are_as_exact_as_float32() -> None:
    """In every quarter of a turn and on its edges, at positions on both sides of zero and beyond float32's integers."""
    generator = torch.Generator().manual_seed(1)
    eighths = torch.arange(-8, 9)[:, None] * 2**61 + torch.tensor([-(2**33), 0, 2**33])  # of a turn, and a bit beside
    eighths = eighths.flatten()[4:-4]
    free = torch.randint(-(2**63), 2**63 - 1, (1024 - 2 * len(eighths),), generator=generator)
    turns = torch.cat((eighths, free, eighths))
    positions = torch.randint(-100, 2**40, (1024,), generator=generator)
    positions[: len(eighths)], positions[-len(eighths) :] = 1, -1
    cos, sin = torch.zeros(2, 1024, device=TRITON_DEVICE)
    rotation_kernel[(1,)](positions.to(TRITON_DEVICE), turns.to(TRITON_DEVICE), cos, sin, COUNT=1024)
    angles = (positions * turns).double() * (2 * torch.pi / 2**64)  # the product wraps, as revolutions do
    assert float((cos.cpu() - angles.cos()).abs().max()) < 2e-7
    assert float((sin.cpu() - angles.sin()).abs().max()) < 2e-7


@pytest.mark.parametrize("width", range(1, 9))
def test_levels_of_a_trellis_in_half_precision(width: int) -> None:
    """Computed as the kernels do, rounded at every step, they are about as good as the levels rounded once."""
    levels = torch.tensor(union_levels(width), dtype=torch.float64)
    x = ((torch.arange(len(levels), dtype=torch.float64) + 0.5) / len(levels) - 0.5).half()
    scale, cubic, quintic, seventh, ninth = HALF_TERMS[width]
    square = x * x
    found = x + x * (square * (cubic + square * (quintic + square * (seventh + square * ninth))))
    weights = torch.exp(-(levels**2) / 2) * torch.gradient(levels)[0]
    rounded = scale * (levels / scale).half().double()
    own, theirs = (float(weights @ (other - levels) ** 2) ** 0.5 for other in (rounded, scale * found.double()))
    assert theirs <= 2 * own + 1e-6, (theirs, own)


@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_encoding_takes_some_blocks_at_a_time(coding: Coding, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = shared(replace(BASE, tokens=4 + 5 * BLOCK, dim=16, coding=(coding, coding)))
    side, moved = filled.layer.snapshot().value, on_device(filled.layer, TRITON).snapshot()
    x, block_table = filled.given["value"][:, :, 4:], filled.layer.snapshot().block_table
    monkeypatch.setattr(encode, "SCRATCH", 1)  # four blocks, then the fifth
    fields = backends.find("triton").encode(moved.value.codec, x.to(TRITON_DEVICE), moved.block_table, None)
    found = {name: field.cpu() for name, field in fields.items()}
    assert isinstance(side.codec, SpectralCodec)
    assert rule.compare(side.codec, x, block_table, None, found, side.store.slice(0, 5))[0] == 0


def packed_arguments() -> tuple[Any, ...]:
    """Arguments of the attention op."""
    view = on_device(fill(BASE).layer, TRITON).snapshot()
    keys, values = (prepared(side.codec, torch.float32) for side in (view.key, view.value))
    query = torch.randn(1, 3, 1, 64, device=TRITON_DEVICE)
    dense = [view.key.sinks, view.value.sinks, view.key.tail, view.value.tail]
    tensors = (query, view.packed(), dense, view.block_table, None, None, None)
    tables = (keys.keys.tensors, keys.keys.sizes, values.values.tensors, values.values.sizes)
    return (*tensors, *tables, view.encoded_end, 0.125, None, False, True)


def test_triton_ops_can_be_traced() -> None:
    arguments = packed_arguments()
    torch.library.opcheck(ops.attend, arguments, test_utils=("test_schema", "test_faketensor"))

    def double(query: Tensor) -> Tensor:
        output, lse = ops.attend(query, *arguments[1:])
        return 2 * output + lse.sum() * 0

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(arguments[0]), double(arguments[0]))


@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_triton_encoding_and_decoding_can_be_traced(coding: Coding) -> None:
    view = on_device(fill(replace(BASE, coding=(coding, coding), tokens=74)).layer, TRITON).snapshot()
    tables = prepared(view.key.codec, torch.float32)
    x = torch.randn(1, 1, 64, 64, device=TRITON_DEVICE)
    utilities = ("test_schema", "test_faketensor")
    encoding = (x, view.block_table, None, tables.encode.tensors, tables.encode.sizes)
    torch.library.opcheck(ops.encode_blocks, encoding, test_utils=utilities)
    codes, gains = ops.encode_blocks(*encoding)
    decoding = (codes, gains, view.block_table, None, tables.decode.tensors, tables.decode.sizes, torch.float32)
    torch.library.opcheck(ops.decode_blocks, decoding, test_utils=utilities)


def test_triton_through_the_cache() -> None:
    layer = on_device(fill(replace(BASE, tokens=130)).layer, TRITON)
    layer.update(*(torch.randn(1, 1, 3, 64, device=TRITON_DEVICE) for _ in range(2)))
    layer.flush()
    assert len(layer.spans) == 2
    assert {name for codec in layer.codecs.values() for name in codec.derived} == {"triton torch.float32"}


def test_triton_says_why_it_does_not_take_a_case(caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    layer = on_device(fill(BASE).layer, TRITON)
    mask = torch.zeros(1, 1, 1, BASE.tokens, device=TRITON_DEVICE)
    with caplog.at_level(logging.INFO, logger="quantcache.backends"):
        for _ in range(2):
            spectral_attention(torch.randn(1, 3, 1, 64, device=TRITON_DEVICE), layer.snapshot(), mask)
    assert [record.message for record in caplog.records] == [
        f"keys and values on {TRITON_DEVICE.type} are encoded by the triton backend",
        "attention in plain torch instead of the triton backend: "
        "the mask is not boolean, differs between heads or does not cover the cache",
    ]


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = fill(BASE).layer
    layer.backend = "triton"
    with pytest.raises(QuantCacheError, match=r'backend="triton" cannot be used here: .*TRITON_INTERPRET=1'):
        spectral_attention(torch.randn(1, 3, 1, 64), layer.snapshot(), None)
