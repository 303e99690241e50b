"""Which kernels serve a layer on a GPU: those of CUDA, Triton's where CUDA's cannot, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from quantcache import backends
from quantcache.attention.function import spectral_attention
from quantcache.backends import AttentionCall, cuda, trials
from quantcache.coding.schema import SIDES
from quantcache.common.errors import GraphCaptureError
from quantcache.common.logs import log_once
from quantcache_kernels.cuda import codes as kernels
from quantcache_kernels.cuda.compiler import CudaError
from tests.kernels import emulation
from tests.kernels.cases import Case, codecs, fill

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")

HALVES = dict.fromkeys(SIDES, torch.bfloat16)


class Elsewhere(backends.Backend):
    """Kernels in the portable layout that take what those of CUDA lack: Triton's, as far as a choice goes."""

    name = "triton"

    def __init__(self) -> None:
        self.reason: str | None = None
        self.narrow = 0

    def unavailable(self, device: torch.device) -> str | None:
        """Whatever a test wants."""
        return self.reason

    def lacks(self, codec: Any, dtype: torch.dtype) -> str | None:
        """A dimension, if a test wants so."""
        return "it is narrow" if codec.dim == self.narrow else None

    def refuses(self, query: Any, view: Any, call: Any) -> str | None:
        """Nothing."""
        return None

    def attend(self, query: torch.Tensor, view: Any, call: AttentionCall) -> torch.Tensor:
        """Plain torch's."""
        return backends.REFERENCE.attend(query, view, call)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    """The choice of a GPU on the CPU, with other kernels in the place of Triton's."""
    found, own = Elsewhere(), backends.find("cuda")
    monkeypatch.setattr(own, "_fallback", found)
    monkeypatch.setitem(backends.FASTEST_FIRST, "cpu", (own, found))
    monkeypatch.setitem(backends.BACKENDS, "triton", found)
    log_once.cache_clear()
    trials.forget()
    with emulation.on_the_cpu():
        yield found
    trials.forget()


def test_the_fastest_that_serves_both_sides_is_chosen(elsewhere: Elsewhere, caplog: pytest.LogCaptureFixture) -> None:
    made = codecs(Case())
    caplog.set_level(logging.INFO, logger="quantcache.backends")
    assert backends.choose("auto", CPU, HALVES, made)[1].name == "cuda"
    for dtypes, why in (
        (dict.fromkeys(SIDES, torch.float16), "torch.float16"),
        ({"key": torch.float32, "value": torch.bfloat16}, "torch.float32"),  # as autocast gives them
    ):
        _, report = backends.choose("auto", CPU, dtypes, made)
        assert str(report) == f"triton; not cuda: keys or values are of {why}"
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    assert caplog.records[1].message == (
        "keys and values on cpu are encoded by the triton backend; not cuda: keys or values are of torch.float16"
    )


def test_kernels_that_serve_one_side_alone_keep_portable_blocks(elsewhere: Elsewhere) -> None:
    elsewhere.narrow = 72
    backend, report = backends.choose("auto", CPU, HALVES, codecs(Case(value_dim=72)))
    assert (backend.name, report.attends, list(report.passed_over)) == ("triton", "values: it is narrow", ["cuda"])


def test_only_plain_torch_is_warned_of(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda.CudaBackend, "unavailable", lambda self, device: "it is old")
    made = codecs(Case())
    with caplog.at_level(logging.WARNING, logger="quantcache.backends"):
        _, report = backends.choose("auto", CPU, HALVES, made)
        assert (report.name, report.passed_over) == ("triton", {"cuda": "it is old"})
        assert not caplog.records
        elsewhere.reason = "it is asleep"
        assert backends.choose("auto", CPU, HALVES, made)[0] is backends.REFERENCE
    assert [record.message for record in caplog.records] == [
        "encoding and attending in plain torch, which is slower: no cuda kernels (it is old); "
        "no triton kernels (it is asleep)"
    ]


def test_who_asks_by_name_is_told_of_another(elsewhere: Elsewhere, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="quantcache.backends"):
        _, report = backends.choose("cuda", CPU, dict.fromkeys(SIDES, torch.float16), codecs(Case()))
    assert report.name == "triton"
    assert [record.message for record in caplog.records] == [
        "not using the cuda kernels: keys or values are of torch.float16"
    ]


def test_encoding_in_plain_torch_is_said(elsewhere: Elsewhere, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere.reason = "it is asleep"
    with caplog.at_level(logging.WARNING, logger="quantcache.backends"):
        backends.find("cuda")._portable(CPU)  # type: ignore[attr-defined]
    assert [record.message for record in caplog.records] == [
        "plain torch does what is left to triton's kernels, and is slower: it is asleep"
    ]


def test_a_cache_goes_on_with_other_kernels_when_some_fail_their_trial(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loader(*given: object) -> Mapping[str, Any]:
        raise CudaError("the CUDA kernels do not compile: no luck")

    layer = fill(Case(tokens=280, dtype=torch.bfloat16)).layer
    expected = layer.fork()
    layer.backend = "auto"
    query = torch.randn(1, 3, 1, 64, dtype=torch.bfloat16)
    spectral_attention(query, layer.snapshot(), None)
    assert layer.state.blocks.layout.name == "cuda"
    with monkeypatch.context() as patch:  # undone before the emulation is
        patch.setattr(trials, "UNTRIED", set())
        patch.setitem(kernels.LOADERS, "cpu", loader)
        found = [spectral_attention(query, layer.snapshot(), None) for _ in range(2)]
    report = layer.backend_report()
    assert report is not None
    assert (report.name, list(report.passed_over), layer.state.blocks.layout.name) == ("triton", ["cuda"], "triton")
    assert not report.refused, "the second call was its own"
    expected.backend = "torch"
    for each in found:
        assert torch.equal(each, spectral_attention(query, expected.snapshot(), None))


def test_whoever_asks_while_another_chooses_gets_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks share what was chosen, in as many threads as there are of them."""

    class Watched(backends.Choice):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            for asked in names:  # as another thread might, between any two changes
                seen.append((asked, self.of(asked, CPU, {}, {})[0]))

    names: list[str] = []
    seen: list[tuple[str, Any]] = []
    choice = Watched()
    monkeypatch.setattr(backends, "choose", lambda name, *_: (name, None))
    for name in ("cpu", "torch"):
        names = [name]
        assert choice.of(name, CPU, {}, {})[0] == name
    assert len(seen) > 1
    assert all(asked == found for asked, found in seen), seen


def test_a_step_whose_kernels_do_not_load_cannot_be_repeated(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = fill(Case(tokens=280, dtype=torch.bfloat16)).layer
    layer.backend = "cuda"
    view = layer.snapshot()

    def loader(*given: object) -> Mapping[str, Any]:
        raise CudaError("no luck")

    room = {side: tail.contiguous() for side, tail in layer.tails.items()}
    with monkeypatch.context() as patch:  # undone before the emulation is
        patch.setitem(kernels.LOADERS, "cpu", loader)
        with pytest.raises(GraphCaptureError, match="the kernels cannot be used: no luck"):
            layer.state.blocks.layout.stage(view, room, torch.zeros(1, dtype=torch.int32), 8, False, {})
