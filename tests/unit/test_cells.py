"""Finished cells: kept at once, found again, and never mixed with those of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.evaluation.cells import Cells, attempt

PRINT = {"text hash": "ab", "context": 512, "residuals": [64, 0]}


def never() -> dict[str, Any]:
    raise AssertionError("a finished cell was measured again")


def test_finished_cells_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "run.cells"
    first = Cells(path, PRINT)
    first.measure("needle", "dense", "512@0.5", lambda: {"found": 3})
    with pytest.raises(KeyboardInterrupt):
        first.measure("needle", "dense", "512@0.9", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    done: list[tuple[str, str, str]] = []
    second = Cells(path, PRINT, on_done=done.append)
    assert second.reused == 1
    assert second.measure("needle", "dense", "512@0.5", never) == {"status": "ok", "found": 3}
    assert second.measure("needle", "dense", "512@0.9", lambda: {"found": 2})["found"] == 2
    assert done == [("needle", "dense", "512@0.5"), ("needle", "dense", "512@0.9")]
    assert Cells(path, PRINT).reused == 2
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "run.cells"
    cells = Cells(path, PRINT)
    for name in ("a", "b"):
        cells.put("qa", "dense", name, {"status": "ok", "answer": "é" + name})
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    one = whole.index(b"\n", start) + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        again = Cells(path, PRINT)
        assert again.reused == (length >= one)
        again.put("qa", "dense", "c", {"status": "ok"})  # what follows a cut must not be lost
        assert Cells(path, PRINT).reused == again.reused + 1


def test_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.cells"
    Cells(path, PRINT).put("qa", "dense", "a", {"status": "ok"})
    with pytest.raises(QuantCacheError, match=r"another run: context is 1024 now and was 512 then; start afresh"):
        Cells(path, {**PRINT, "context": 1024})
    with pytest.raises(QuantCacheError, match=r"context is 1 now and was 512 then \(and 1 more\)"):
        Cells(path, {**PRINT, "context": 1, "seed": 0})
    assert Cells(path, {**PRINT, "context": 1024}, restart=True).reused == 0
    assert Cells(path, {**PRINT, "context": 1024}).reused == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b'{"fingerprint": 3}\n', b"\xff\xfe\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.cells"
    path.write_bytes(content)
    with pytest.raises(QuantCacheError, match="not the saved state of a run"):
        Cells(path, PRINT)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (UnsupportedModel("no such layer"), "unsupported: no such layer"),
        (ImportError("no module"), "unsupported: no module"),
        (IndexError("too many\nindices"), "failed: IndexError: too many"),
    ],
)
def test_failures_become_a_status(error: Exception, status: str) -> None:
    def work() -> dict[str, Any]:
        raise error

    assert attempt(work) == {"status": status}
