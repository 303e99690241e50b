"""Loading the CPU kernels' library."""

from __future__ import annotations

import logging

import pytest
import torch

from quantcache import backends
from quantcache.common.errors import QuantCacheError
from quantcache.common.logs import log_once
from quantcache_kernels import cpu
from quantcache_kernels.cpu import library
from quantcache_kernels.cpu.library import Library, find
from tests.kernels.cases import BASE, codecs

needs_library = pytest.mark.skipif(find()[0] is None, reason=f"no CPU kernels: {find()[1]}")


@needs_library
def test_a_library_of_another_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = find()[0]
    assert built is not None
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(OSError, match="left over from another build"):
        Library(built.path)


@needs_library
def test_an_instruction_set_that_is_not_there_is_named() -> None:
    built = find()[0]
    assert built is not None
    with pytest.raises(ValueError, match=r"'sve9' is not available here; there are plain"):
        built.select_level("sve9")


def test_a_library_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, "/nonexistent/_native.so")
    found, reason = find.__wrapped__()
    assert found is None
    assert "cannot be loaded" in reason


def test_without_kernels_auto_says_so_once_and_cpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda device: "there was no compiler")
    log_once.cache_clear()
    layer = (torch.device("cpu"), {"key": torch.float32, "value": torch.float32}, codecs(BASE))
    with caplog.at_level(logging.WARNING, logger="quantcache.backends"):
        chosen = [backends.choose("auto", *layer) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "encoding and attending in plain torch, which is slower: no cpu kernels (there was no compiler)"
    ]
    for backend, report in chosen:
        assert (backend.name, report.name, report.passed_over) == ("torch", "torch", {"cpu": "there was no compiler"})
    for name in ("cpu", "native"):
        with pytest.raises(QuantCacheError, match=r'backend="cpu" cannot be used here: there was no compiler'):
            backends.choose(name, *layer)
