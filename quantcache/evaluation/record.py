"""The record of one run: what ran, on what, and what came out. One JSON file, checked when written and when read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import MAX_RESULT_BYTES, as_type, finite, read_json, write_json

SCHEMA_VERSION = 1

STATUSES = ("ok", "partial", "failed")
"""``ok``: every cell was measured. ``partial``: some method ran out of memory, is not supported or failed."""

HASH = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


class RecordError(QuantCacheError):
    """A file is not a record, or a record lacks something or contradicts itself."""


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        suite: Name of the benchmark, or ``eval``.
        status: One of ``STATUSES``.
        created: When it ended, ISO 8601 with time zone.
        commit: Commit of the checkout that ran; None if there was none.
        dirty: Whether files differed from that commit.
        command: Command line that made it.
        environment: Versions and hardware (see :func:`quantcache.common.env.environment`).
        settings: Everything that was chosen.
        metrics: Everything that was measured. Averages carry ``n`` and ``stderr``, times ``n``, ``p20``, ``median`` and
            ``p80``, shares ``n``, ``low`` and ``high``.
        inputs: SHA-256 of model, tokenizer, calibration and texts, by name.
        seeds: Every seed that was used.
        gates: Checks that came before measuring, such as that of overlapping texts: what each found.
        schema_version: Version of this layout.
    """

    suite: str
    status: str
    created: str
    commit: str | None
    dirty: bool
    command: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, Any]
    inputs: dict[str, str | None] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    gates: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def clean(self) -> bool:
        """Whether a commit says exactly what ran."""
        return self.commit is not None and not self.dirty

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON, the schema's version first."""
        data = asdict(self)
        return finite({"schema_version": data.pop("schema_version"), **data})

    @classmethod
    def from_dict(cls, data: Any, where: str = "record") -> Record:
        """Check parsed JSON.

        Args:
            data: Parsed JSON.
            where: What errors call it.

        Returns:
            The record; fields that this version does not know are left out.

        Raises:
            RecordError: Something is missing, of the wrong kind, or contradicts itself.
        """
        check(data, where)
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


def check(data: Any, where: str = "record") -> None:
    """Check a record's JSON against the schema.

    Args:
        data: Parsed JSON.
        where: What the error calls it.

    Raises:
        RecordError: The first flaw found.
    """

    def require(holds: bool, flaw: str) -> None:
        if not holds:
            raise RecordError(f"{where}: {flaw}")

    require(isinstance(data, dict), f"a record must be an object, got {data!r:.60}")
    version = data.get("schema_version")
    require(version is not None, "not a record: missing schema_version")
    known = isinstance(version, int) and not isinstance(version, bool) and version == SCHEMA_VERSION
    require(known, f"schema version {version!r}, this quantcache reads {SCHEMA_VERSION}")
    try:
        as_type(Record, data)
    except ValueError as error:
        raise RecordError(f"{where}: {error}") from error
    require(data["status"] in STATUSES, f"status must be one of {', '.join(STATUSES)}, got {data['status']!r}")
    require(_is_time(data["created"]), f"created must be a time with its zone, got {data['created']!r}")
    commit = data["commit"]
    require(commit is None or bool(COMMIT.fullmatch(commit)), f"commit must be a full hash, got {commit!r}")
    require(commit is not None or data["dirty"], "without a commit dirty must be true")
    for name, digest in data.get("inputs", {}).items():
        good = digest is None or (isinstance(digest, str) and bool(HASH.fullmatch(digest)))
        require(good, f"inputs[{name!r}] must be a SHA-256 in hexadecimal or null, got {digest!r}")
    for name in ("environment", "settings", "metrics", "gates"):
        flaw = _flaw(data.get(name, {}), name)
        require(flaw is None, str(flaw))


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _flaw(value: Any, path: str) -> str | None:
    """The first thing that is not a JSON value, or a summary that contradicts itself."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{path} has a key that is not a string: {key!r}"
            found = _flaw(item, f"{path}.{key if key.isprintable() else repr(key)}")
            if found:
                return found
        return _summary_flaw(value, path)
    if isinstance(value, list):
        for number, item in enumerate(value):
            found = _flaw(item, f"{path}[{number}]")
            if found:
                return found
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value}, which JSON cannot hold"
    good = value is None or isinstance(value, str | int | float)
    return None if good else f"{path} is of type {type(value).__name__}, which JSON cannot hold"


def _summary_flaw(value: dict[str, Any], path: str) -> str | None:
    """What is wrong with a summary: quantiles, an average with its error, or a share with its interval."""
    orders = (("p20", "median", "p80"), ("low", "share", "high"))
    for order in orders:
        if order[0] in value and order[2] in value:
            numbers: list[Any] = [value.get(name) for name in order]
            if not all(_is_number(number) for number in numbers):
                return f"{path} must have the numbers {', '.join(order)}"
            if not numbers[0] <= numbers[1] <= numbers[2]:
                return f"{path} has {' <= '.join(order)} out of order: {numbers}"
    summarizes = "stderr" in value or any(order[0] in value and order[2] in value for order in orders)
    if not summarizes:
        return None
    count = value.get("n")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return f"{path} summarizes measurements and must say how many: n is {count!r}"
    stderr = value.get("stderr")
    if stderr is not None and (not _is_number(stderr) or stderr < 0):
        return f"{path}.stderr must be a number from 0 up or null, got {stderr!r}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_record(path: Path, record: Record, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Check a record and write it, complete or not at all.

    Args:
        path: The file; its folder must exist.
        record: Finished run.
        extra: Further top-level entries, for readers of other layouts.

    Returns:
        What was written.

    Raises:
        RecordError: The record is not sound.
    """
    data = {**finite(extra or {}), **record.to_dict()}
    check(data, path.name)
    write_json(path, data)
    return data


def read_record(path: Path) -> Record:
    """Read a record.

    Args:
        path: File that :func:`write_record` has written.

    Returns:
        The record.

    Raises:
        RecordError: The file cannot be read, is not JSON, or is not a sound record.
    """
    return Record.from_dict(read_strict_json(path), str(path))


def read_strict_json(path: Path) -> Any:
    """Parse a JSON file, without the extensions that Python's parser allows.

    Args:
        path: JSON file.

    Returns:
        Its content.

    Raises:
        RecordError: The file cannot be read or parsed.
    """
    try:
        return read_json(path, MAX_RESULT_BYTES)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from error
