"""Measured figures that come with quantcache.

An installed package has no benchmark records; their figures come with it as one file, made by ``benchmarks/tables.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantcache import data
from quantcache.common.jsonfile import as_type
from quantcache.evaluation.record import RecordError, read_strict_json
from quantcache.planning.records import Fidelity, Measurements, Speed

DIGEST_FORMAT = "quantcache-measurements"
DIGEST_VERSION = 1


def bundled_measurements() -> Measurements:
    """The figures that come with quantcache.

    Returns:
        Those of the newest committed benchmark records.

    Raises:
        RecordError: The installation's digest is damaged.
    """
    path = data.measurements_path()
    return from_digest(read_strict_json(path), str(path))


def to_digest(measurements: Measurements) -> dict[str, Any]:
    """Figures as one JSON object, each origin once.

    Args:
        measurements: Figures of any number of records.

    Returns:
        What :func:`from_digest` reads.
    """
    figures: Sequence[Fidelity | Speed] = [*measurements.fidelity, *measurements.speed]
    origins = list(dict.fromkeys(figure.origin for figure in figures))
    tables: dict[str, list[dict[str, Any]]] = {"fidelity": [], "speed": []}
    for figure in figures:
        row = {**asdict(figure), "origin": origins.index(figure.origin)}
        tables["fidelity" if isinstance(figure, Fidelity) else "speed"].append(row)
    return {
        "format": DIGEST_FORMAT,
        "schema_version": DIGEST_VERSION,
        "origins": [asdict(origin) for origin in origins],
        **tables,
    }


def from_digest(content: Any, where: str) -> Measurements:
    """Read what :func:`to_digest` made.

    Args:
        content: Parsed JSON.
        where: What errors call it.

    Returns:
        The figures.

    Raises:
        RecordError: The data are not a digest, or one of another version.
    """
    if not isinstance(content, dict) or content.get("format") != DIGEST_FORMAT:
        raise RecordError(f"{where} is not a digest of measurements: its format must be {DIGEST_FORMAT!r}")
    if content.get("schema_version") != DIGEST_VERSION:
        raise RecordError(
            f"{where} has schema version {content.get('schema_version')!r}, this quantcache reads {DIGEST_VERSION}"
        )
    try:
        origins = content["origins"]
        tables = {
            name: [{**row, "origin": origins[row["origin"]]} for row in content[name]] for name in ("fidelity", "speed")
        }
        found: Measurements = as_type(Measurements, tables)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecordError(f"{where} is a damaged digest of measurements: {error}") from error
    return found
