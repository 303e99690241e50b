"""A kernel's first use: what agrees with plain torch is used, what does not is named once and left alone."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from quantcache import backends
from quantcache.attention.function import spectral_attention
from quantcache.backends import trials, triton
from quantcache.cli import app
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import Coding
from quantcache.evaluation import kernel_check
from tests.helpers import attend_by_kernel
from tests.kernels.cases import ATTENTION, BASE, TRITON, TRITON_DEVICE, Case, codecs, fill, on_device, vectors

pytestmark = pytest.mark.triton

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No trial is remembered, and the interpreter is tried too."""
    trials.forget()
    monkeypatch.setattr(trials, "UNTRIED", set())
    yield
    trials.forget()


def work(kernel: Callable[[], Tensor]) -> Callable[[], tuple[Callable[[], Tensor], Tensor, Tensor]]:
    """Work whose result is ones, which plain torch is a thousandth off when done otherwise."""
    return lambda: (kernel, torch.ones(8), torch.full((8,), 1.001))


def failing() -> Tensor:
    """A kernel that does not compile."""
    raise ValueError("line 7:\n  no such register")


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (lambda: torch.full((8,), 1.0019), ""),
        (lambda: torch.full((8,), 1.0021), r"differs from plain torch by 2.10e-03 of the result, more than 2.00e-03"),
        (lambda: torch.full((8,), torch.nan), r"differs from plain torch by nan"),
        (failing, r"it failed: ValueError: line 7: no such register"),
    ],
)
def test_a_kernel_is_judged_once(kernel: Callable[[], Tensor], problem: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def counted() -> Tensor:
        calls.append(1)
        return kernel()

    with caplog.at_level(logging.WARNING, logger="quantcache.backends.trials"):
        for geometry in (1, 1, 2, 2):
            assert trials.passes("attend", "triton", CPU, geometry, work(counted)) == (not problem)
    assert trials.rejected("attend", "triton", CPU) == bool(problem)
    assert trials.passes("encode", "triton", CPU, 1, work(lambda: torch.ones(8)))
    messages = [record.getMessage() for record in caplog.records]
    if problem:
        assert len(messages) == len(calls) == 1
        assert "not using the attend kernel of backend 'triton' in this process" in messages[0]
        assert f"on cpu (torch {torch.__version__}" in messages[0]
        assert problem in messages[0]
    else:
        assert not messages
        assert len(calls) == 2, "once for each geometry"


def test_memory_that_runs_out_says_nothing_about_a_kernel() -> None:
    def greedy() -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        trials.passes("attend", "triton", CPU, 1, work(greedy))
    assert trials.passes("attend", "triton", CPU, 1, work(lambda: torch.ones(8)))


needs_triton = pytest.mark.skipif(bool(TRITON.missing()), reason=f"no Triton here: {TRITON.missing()}")
NAMES = ("bfloat16-padded", "softcap-sink-logits")


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_pass_their_trial(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case: Case = replace(ATTENTION[name], tokens=min(ATTENTION[name].tokens, 280))
    filled = fill(case)
    layer = on_device(filled.layer, TRITON)
    query, mask, s_aux = (None if x is None else x.to(TRITON_DEVICE) for x in (filled.query, filled.mask, filled.s_aux))
    assert query is not None
    with caplog.at_level(logging.WARNING):
        found = spectral_attention(query, layer.snapshot(), mask, softcap=case.softcap, s_aux=s_aux)
        x = filled.given["key"][:, :, 4:68].to(TRITON_DEVICE)
        fields = backends.find("triton").encode(
            layer.codecs["key"], x, layer.snapshot().block_table[:1], layer.state.blocks.left_padding
        )
        backends.find("triton").decode(
            layer.codecs["key"], fields, layer.snapshot().block_table[:1], layer.state.blocks.left_padding
        )
    assert not caplog.records
    operations = sorted(outcome.operation for outcome in trials._outcomes.values())
    assert operations == ["attend", "decode", "encode"]
    for outcome in trials._outcomes.values():
        assert outcome.difference is not None
        assert outcome.allowed < (0.05 if outcome.operation != "encode" else 0.5)  # codes of random widths are coarse
    direct = attend_by_kernel(query, layer.snapshot(), mask, case.softcap, s_aux)
    assert direct is not None
    assert torch.equal(found, direct)


@needs_triton
def test_triton_kernels_that_are_wrong_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled = fill(BASE)
    layer, query = on_device(filled.layer, TRITON), filled.query.to(TRITON_DEVICE)
    attend, right, decode = triton.TritonBackend.attend, triton.encode, triton.decode
    monkeypatch.setattr(triton.TritonBackend, "attend", lambda *args: 1.01 * attend(*args))
    monkeypatch.setattr(triton, "decode", lambda *args: decode(*args) + 1e-3)

    def encode(*args: object) -> dict[str, Tensor]:
        fields = right(*args)
        return {"codes": fields["codes"] ^ 0x01010101, "gains": fields["gains"] + 40}

    monkeypatch.setattr(triton, "encode", encode)
    block_table, x = layer.snapshot().block_table[:1], filled.given["key"][:, :, 4:68].to(TRITON_DEVICE)
    codec = layer.codecs["key"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = spectral_attention(query, layer.snapshot(), None)
            fields = backends.find("triton").encode(codec, x, block_table, None)
            decoded = backends.find("triton").decode(codec, fields, block_table, None)
    layer.backend = "torch"
    assert torch.equal(found, spectral_attention(query, layer.snapshot(), None))
    assert all(torch.equal(fields[name], field) for name, field in codec.encode(x, block_table, None).items())
    assert torch.equal(decoded, codec.decode(fields, block_table, None))
    assert sorted(record.getMessage().split()[3] for record in caplog.records) == ["attend", "decode", "encode"]


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_encoding_is_tried_beside_codes(coding: Coding, scale: float) -> None:
    """Beside the vectors themselves an encoder of coarse codes would pass that forgets the gains."""
    case = Case(tokens=64, widths=2, coding=(coding, coding), scale=scale)
    given = vectors(case, BLOCK)["key"], torch.tensor([[4, BLOCK, 4]], dtype=torch.int32), None

    def encode(codec: SpectralCodec, *given: Any) -> dict[str, Tensor]:
        return codec.encode(*given)

    def without_gains(codec: SpectralCodec, *given: Any) -> dict[str, Tensor]:
        fields = codec.encode(*given)
        return {**fields, "gains": torch.zeros_like(fields["gains"])}

    right, wrong = (
        trials.attempt(
            "encode", "any", CPU, functools.partial(trials.encoding_trial, each, codecs(case)["key"], *given)
        )
        for each in (encode, without_gains)
    )
    assert right.difference == 0.0
    assert right.allowed > 0.01, "rounding decides some codes"
    assert wrong.problem


def test_every_backend_can_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "GEOMETRIES", ((32, 3, 1e4),))
    monkeypatch.setattr(kernel_check, "DTYPES", (torch.float32,))
    found = kernel_check.check_kernels()
    assert {each["backend"] for each in found} == {"cpu", "triton", "cuda"}
    for each in found:
        if each["operation"] is None:
            assert each["problem"], "a backend that is not there says why"
            continue
        assert not each["problem"]
        assert each["difference"] <= each["allowed"] < 0.5, "an empty encoding would be off by 1"
    cases = {coding: f"D=32, G=3, {coding}, float32" for coding in ("scalar", "trellis")}
    for backend in {each["backend"] for each in found if each["operation"]}:
        operations = [(each["case"], each["operation"]) for each in found if each["backend"] == backend]
        assert operations == [(case, o) for case in cases.values() for o in ("attend", "encode", "decode")]


needs_library = pytest.mark.skipif(backends.find("cpu").unavailable(CPU) is not None, reason="no C++ kernels here")


@needs_library
@pytest.mark.parametrize(
    ("coding", "operation", "side"),
    [
        ("trellis", "attend", "key"),
        ("scalar", "encode", "key"),
        ("trellis", "encode", "value"),
        ("trellis", "decode", "key"),
    ],
)
def test_the_check_finds_what_is_wrong_with_one_coding_alone(
    coding: str, operation: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = type(backends.find("cpu"))
    right = {name: getattr(backend, name) for name in ("attend", "encode", "decode")}

    def wrong(self: backends.Backend, first: Any, *rest: Any) -> Any:
        made = right[operation](self, first, *rest)
        codec = rest[0].key.codec if operation == "attend" else first
        if codec.coding != coding or (codec.frame.is_identity != (side == "value")):
            return made
        return {**made, "codes": made["codes"] ^ 0x01010101} if operation == "encode" else 1.01 * made

    monkeypatch.setattr(backend, operation, wrong)
    monkeypatch.setattr(kernel_check, "GEOMETRIES", ((32, 2, 1e4),))
    monkeypatch.setattr(kernel_check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(backends, "BACKENDS", {"torch": backends.REFERENCE, "cpu": backends.find("cpu")})
    bad = [(each["case"], each["operation"]) for each in kernel_check.check_kernels() if each["problem"]]
    assert bad == [(f"D=32, G=2, {coding}, float32", operation)]


def test_env_shows_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        vars(trials.Outcome("attend", "cpu", "cpu", 1e-7, 2e-6, "")) | {"case": "D=64, G=3, scalar, float32"},
        vars(trials.Outcome("encode", "triton", "H100", None, 0.1, "it failed: ValueError"))
        | {"case": "D=64, G=3, trellis, float32"},
        {"backend": "triton", "device": "cpu", "operation": None, "problem": "no Triton"},
    ]
    monkeypatch.setattr(kernel_check, "check_kernels", lambda: rows)
    shown = CliRunner().invoke(app, ["env", "--check"]).output
    assert all(text in shown for text in ("1.0e-07", "2.0e-06", "ok", "it failed", "not used: no Triton", "trellis"))
    assert json.loads(CliRunner().invoke(app, ["env", "--check", "--json"]).output)["kernels"] == rows
    assert "kernels" not in json.loads(CliRunner().invoke(app, ["env", "--json"]).output)
