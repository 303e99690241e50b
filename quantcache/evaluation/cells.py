"""Finished cells of a run, kept in a file so that an interrupted run can be resumed.

A cell is the smallest piece of work that is measured at once: (suite, method, cell), with a JSON object as its result.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import MAX_RESULT_BYTES, finite, parse_json
from quantcache.common.writing import claim, only_writer, partial_folder

Key = tuple[str, str, str]


class Cells:
    """The finished cells of a run.

    Args:
        path: The state file, one JSON line for each cell; None keeps cells in memory only.
        fingerprint: Everything that decides a cell's figures. Cells of another fingerprint are not used.
        restart: Start afresh, whatever the file holds.
        on_plan: Called with (suite, number of cells) when a suite starts.
        on_done: Called with a finished cell's key.

    Attributes:
        finished: Figures of every finished cell.
        reused: How many of them the file held.

    Raises:
        QuantCacheError: The file holds cells of another run, or another process is at work on it.
    """

    def __init__(
        self,
        path: Path | None = None,
        fingerprint: dict[str, Any] | None = None,
        restart: bool = False,
        on_plan: Callable[[str, int], None] | None = None,
        on_done: Callable[[Key], None] | None = None,
    ):
        self.path, self.fingerprint = path, finite(fingerprint or {})
        self.on_plan, self.on_done = on_plan, on_done
        self.finished: dict[Key, dict[str, Any]] = {}
        self.reused = 0
        if path is None:
            return
        with only_writer(path.parent):
            self._file = self._open(path, restart)
        weakref.finalize(self, os.close, self._file)
        self.reused = len(self.finished)

    def _open(self, path: Path, restart: bool) -> int:
        """The state file, this process's until it ends, with what it holds read."""
        if path.exists():
            file = os.open(path, os.O_RDWR | os.O_APPEND)
            try:
                if not claim(file):
                    raise QuantCacheError(f"another run is at work on {path}: let it end, or choose another --output")
                if not restart:
                    self._read(path, file)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)
        with partial_folder(path.parent) as folder:
            fresh = folder / path.name
            fresh.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n", "utf-8")
            file = os.open(fresh, os.O_RDWR | os.O_APPEND)
            claim(file)
            os.replace(fresh, path)
        return file

    def _read(self, path: Path, file: int) -> None:
        size = os.fstat(file).st_size
        lines = os.pread(file, size, 0).split(b"\n")
        try:
            found = parse_json(lines[0], MAX_RESULT_BYTES)["fingerprint"]
            if not isinstance(found, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise QuantCacheError(
                f"{path} is not the saved state of a run: delete it, or start afresh with --restart"
            ) from None
        differing = [key for key in {**found, **self.fingerprint} if found.get(key) != self.fingerprint.get(key)]
        if differing:
            name = differing[0]
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            raise QuantCacheError(
                f"{path} is the state of another run: {name} is {_short(self.fingerprint.get(name))} now and was "
                f"{_short(found.get(name))} then{more}; start afresh with --restart, or choose another --output"
            )
        sound = len(lines[0]) + 1
        for line in lines[1:-1]:  # what follows the last line feed was cut off while it was being written
            try:
                entry = parse_json(line, MAX_RESULT_BYTES)
                key = (str(entry["suite"]), str(entry["method"]), str(entry["cell"]))
                if not isinstance(entry["result"], dict):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                break
            self.finished[key] = entry["result"]
            sound += len(line) + 1
        os.truncate(file, min(sound, size))

    def plan(self, suite: str, count: int) -> None:
        """Say how many cells a suite has.

        Args:
            suite: Name of the suite.
            count: Number of cells, finished ones included.
        """
        if self.on_plan is not None:
            self.on_plan(suite, count)

    def missing(self, suite: str, methods: Iterable[str], cell: str) -> list[str]:
        """Methods for which a cell is not finished.

        Args:
            suite: Name of the suite.
            methods: Names to look for.
            cell: Name of the cell.

        Returns:
            Names, in the order given. Finished ones are reported as done.
        """
        names = []
        for method in methods:
            if (suite, method, cell) in self.finished:
                self._done((suite, method, cell))
            else:
                names.append(method)
        return names

    def put(self, suite: str, method: str, cell: str, result: dict[str, Any]) -> None:
        """Keep a finished cell.

        Args:
            suite: Name of the suite.
            method: Name of the method.
            cell: Name of the cell.
            result: Figures, as JSON holds them.
        """
        result = finite(result)
        self.finished[suite, method, cell] = result
        if self.path is not None:
            entry = {"suite": suite, "method": method, "cell": cell, "result": result}
            line = memoryview(json.dumps(entry, allow_nan=False).encode() + b"\n")
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        self._done((suite, method, cell))

    def get(self, suite: str, method: str, cell: str) -> dict[str, Any]:
        """A finished cell's figures."""
        return self.finished[suite, method, cell]

    def measure(
        self, suite: str, method: str, cell: str, work: Callable[..., dict[str, Any]], *arguments: Any
    ) -> dict[str, Any]:
        """A cell's figures: those kept, or else those measured now.

        Args:
            suite: Name of the suite.
            method: Name of the method.
            cell: Name of the cell.
            work: Measures it. What it raises becomes the cell's status.
            arguments: What it is called with.

        Returns:
            The figures, with ``status``.
        """
        if self.missing(suite, [method], cell):
            self.put(suite, method, cell, attempt(work, *arguments))
        return self.get(suite, method, cell)

    def close(self) -> None:
        """Remove the state file: its run is complete."""
        if self.path is not None:
            with only_writer(self.path.parent):
                self.path.unlink(missing_ok=True)

    def _done(self, key: Key) -> None:
        if self.on_done is not None:
            self.on_done(key)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."


def attempt(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Measure something that may fail.

    Args:
        work: Does it.
        arguments: What it is called with.

    Returns:
        Its figures with ``status`` ``"ok"``; or, where it raised, a ``status`` that says what went wrong.
    """
    try:
        return {"status": "ok", **work(*arguments)}
    except Exception as error:  # whatever a rival's cache raises is a result about that cache
        status = describe_failure(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"status": status}


def joint_status(results: Sequence[Mapping[str, Any]], what: str) -> str:
    """The status of all cells of a method.

    Args:
        results: Their results.
        what: What they are, in the plural.

    Returns:
        ``ok``; what went wrong with the first, where something did; and with how many, where some are ``ok``.
    """
    bad = [str(result["status"]) for result in results if result["status"] != "ok"]
    if len(bad) in (0, len(results)):
        return bad[0] if bad else "ok"
    return f"{len(bad)} of {len(results)} {what}: {bad[0]}"


def describe_failure(error: Exception) -> str:
    """What went wrong, as a table says it.

    Args:
        error: What a method raised.

    Returns:
        ``out of memory``, ``unsupported: ...`` or ``failed: ...``.
    """
    lines = str(error).strip().splitlines()
    message = " ".join(lines[0].split())[:200] if lines else ""
    kind = type(error).__name__
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error).lower() for words in memory):
        return "out of memory"
    if isinstance(error, QuantCacheError | NotImplementedError | ImportError):
        return f"unsupported: {message or kind}"
    return f"failed: {kind}: {message}" if message else f"failed: {kind}"
