"""How benchmarks keep what they measured: one JSON file for each run, and its finished cells while it lasts."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantcache.common.env import environment, git_state, machine
from quantcache.common.jsonfile import to_json, write_json
from quantcache.data import BUNDLED_MODEL
from quantcache.evaluation import record as record_schema
from quantcache.evaluation.cells import Cells

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "benchmarks" / "scratch"

STARTED = git_state(ROOT)
"""The state of git when the benchmark began, which imports this first."""


class Run:
    """A run that an interruption does not lose: its finished cells, and a folder for files that go with them.

    They are kept apart by settings, source code and what it runs on: another choice, another version of ours or of a
    library, another processor or number of threads starts afresh.

    Args:
        suite: Name of the benchmark.
        settings: Everything that decides what a cell holds.

    Attributes:
        folder: Where everything is.
        cells: Its finished cells.
    """

    def __init__(self, suite: str, settings: dict[str, Any]):
        surroundings = environment()
        runs_on = {name: surroundings[name] for name in ("versions", "cpu", "gpus")}
        digest = hashlib.sha256((to_json(settings) + to_json(runs_on) + source_digest()).encode())
        self.suite = suite
        self.folder = SCRATCH / "cells" / f"{suite}__{digest.hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cells = Cells(self.folder / "cells.jsonl", {"run": self.folder.name})
        print(f"finished cells: {self.folder}", file=sys.stderr)

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """A cell: measured now, or what was measured before the interruption.

        Args:
            name: Name of the cell, unique in the run.
            measure: Measures it; its result goes to JSON and back. What it raises ends the run.

        Returns:
            The result.
        """
        if not self.has(name):
            self.cells.put(self.suite, "all", name, json.loads(to_json({"value": measure()})))
        return self.cells.get(self.suite, "all", name)["value"]

    def has(self, name: str) -> bool:
        """Whether a cell was measured before."""
        return not self.cells.missing(self.suite, ["all"], name)

    def discard(self) -> None:
        """Forget everything, once the record has it."""
        shutil.rmtree(self.folder)


def source_digest(root: Path = ROOT) -> str:
    """SHA-256 of the source code that a run depends on, in hex: two trees of the same code have the same.

    Args:
        root: The tree.

    Returns:
        The digest.
    """
    digest = hashlib.sha256()
    for name in ("quantcache", "kernels", "benchmarks"):
        for path in sorted((root / name).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def adopt(path: Path, commit: str) -> Path:
    """Take in a record from a machine that had the files of a commit but not the repository.

    Args:
        path: The record, written there.
        commit: The full hash of the commit that was run.

    Returns:
        The record among the results.

    Raises:
        ValueError: The sources that ran are not those of the commit.
    """
    record = json.loads(path.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        expected, found = source_digest(Path(folder)), record["settings"]["source_sha256"]
    if found != expected:
        raise ValueError(f"{path.name} was made by sources {found[:12]}, those of {commit[:12]} are {expected[:12]}")
    record |= {"commit": commit, "dirty": False}
    record_schema.check(record, path.name)
    folder_of_results = RESULTS / machine_name(record["environment"])
    folder_of_results.mkdir(parents=True, exist_ok=True)
    target = folder_of_results / path.name.replace("no-commit", commit[:10])
    write_json(target, record)
    return target


def machine_name(surroundings: dict[str, Any]) -> str:
    """Folder name of the machine of an environment record: lower case with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", machine(surroundings).lower()).strip("-")


def suite_of(suite: str, model: str) -> str:
    """The name under which a model's record is kept.

    Args:
        suite: What is measured.
        model: The model, as it was given.

    Returns:
        The suite's own name for the bundled model, and one with the model's name behind it for others.
    """
    return suite if model == BUNDLED_MODEL else f"{suite}-{Path(model).name}"


def write_record(
    suite: str, settings: dict[str, Any], metrics: dict[str, Any], started: dict[str, Any] | None = None
) -> Path:
    """Write a record into ``results/`` if a commit says what was run, else into the git-ignored ``scratch/``.

    The settings of every record hold the digest of the sources: :func:`adopt` takes in a record from a machine that has
    the files but not the repository.

    Args:
        suite: Name of the benchmark.
        settings: Everything that was chosen.
        metrics: Everything that was measured.
        started: The state of git when the run started, that of :data:`STARTED` if None: where it has changed since, no
            one commit says what was run.

    Returns:
        The file, complete; stderr names it.
    """
    surroundings = environment()
    git = surroundings.pop("git") or {"commit": None, "dirty": True}
    started = STARTED if started is None else started
    if started is not None and started != git:
        git = {"commit": git["commit"], "dirty": True}
    created = datetime.now(UTC)
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    record = {
        "schema_version": record_schema.SCHEMA_VERSION,
        "suite": suite,
        "status": "ok",
        "created": created.isoformat(timespec="seconds"),
        "commit": git["commit"],
        "dirty": git["dirty"],
        "command": shlex.join(["python", name, *sys.argv[1:]]),
        "environment": surroundings,
        "settings": settings | {"source_sha256": source_digest()},
        "metrics": metrics,
    }
    clean = git["commit"] is not None and not git["dirty"]
    folder = (RESULTS if clean else SCRATCH) / machine_name(surroundings)
    folder.mkdir(parents=True, exist_ok=True)
    commit = git["commit"][:10] if clean else "no-commit"
    path = folder / f"{suite}__{commit}__{created:%Y%m%dT%H%M%SZ}.json"
    record_schema.check(json.loads(to_json(record)), path.name)
    write_json(path, record)
    print(f"record: {path}", file=sys.stderr)
    return path


if __name__ == "__main__":
    print(adopt(Path(sys.argv[1]), sys.argv[2]))
