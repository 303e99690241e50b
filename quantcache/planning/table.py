"""All formats beside each other: rows, sorting, filters and comparisons."""

from __future__ import annotations

import fnmatch
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantcache.common.defaults import RESIDUAL_LENGTH
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.planning.formats import BY_OTHER_NAMES, bits_per_element, list_formats, missing_package
from quantcache.planning.geometry import Geometry
from quantcache.planning.records import Fidelity, Measurements, Speed


@dataclass(frozen=True)
class Row:
    """One format on one model.

    Attributes:
        format: Name, such as ``spectral-3``.
        description: What it does, in one line.
        source: Where it is from.
        simulated: Whether no cache stores it packed; sizes are then what its codes would take.
        obstacle: Why it cannot be run here; None if it can.
        bits_per_element: Bits of an encoded element, scales and gains included; None where the model's cache is none
            that the format can hold.
        bytes_per_token: Bytes of an encoded token in all layers that grow with the context.
        fidelity: What was measured of its fidelity on this model; None if nothing was.
        speed: What was measured of its speed on this model; None if nothing was.
    """

    format: str
    description: str
    source: str
    simulated: bool
    obstacle: str | None
    bits_per_element: float | None
    bytes_per_token: float | None
    fidelity: Fidelity | None
    speed: Speed | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


Value = float | None

COLUMNS: dict[str, tuple[Callable[[Row], Value], bool]] = {
    "bits": (lambda row: row.bits_per_element, False),
    "bytes": (lambda row: row.bytes_per_token, False),
    "kl": (lambda row: None if row.fidelity is None else row.fidelity.kl_mean, False),
    "agreement": (lambda row: None if row.fidelity is None else row.fidelity.top1_agreement, True),
    "speed": (lambda row: None if row.speed is None else row.speed.speedup, True),
}
"""What can be sorted and filtered by: how to read it, and whether more is better."""

_COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_FILTER = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>|=)\s*(\S+)\s*")


def rows(geometry: Geometry, model: str, measurements: Measurements) -> list[Row]:
    """All formats, as far as they are known on a model: divergence grows with the context, so at one for all.

    Args:
        geometry: The model's cache.
        model: The model, as records name it.
        measurements: Figures of records.

    Returns:
        One row for each format.
    """
    found, context = [], measurements.shared_context(model, RESIDUAL_LENGTH)
    for form in list_formats():
        obstacle = missing_package(form)
        bits = None
        try:
            bits = bits_per_element(form, geometry)
        except UnsupportedModel as error:
            obstacle = str(error).removeprefix(f"{form.name}: ")
        found.append(
            Row(
                format=form.name,
                description=form.scheme.description,
                source=form.scheme.source,
                simulated=form.scheme.simulated,
                obstacle=obstacle,
                bits_per_element=bits,
                bytes_per_token=None if bits is None else bits * geometry.elements / 8,
                fidelity=measurements.fidelity_of(form.name, model, RESIDUAL_LENGTH, context),
                speed=measurements.speed_of(form.name, model),
            )
        )
    return found


def select(found: Sequence[Row], filters: Sequence[str]) -> list[Row]:
    """The rows that hold to every filter.

    Args:
        found: Rows from :func:`rows`.
        filters: Each a comparison such as ``bits<=4.5``, or a pattern of names such as ``spectral-*,quanto-*``.

    Returns:
        Those rows; a comparison drops rows that have no figure there.

    Raises:
        QuantCacheError: A filter names no column, compares with no number, or matches no name.
    """
    chosen = list(found)
    for text in filters:
        chosen = _compared(chosen, text) if re.search("[<>=]", text) else _named(chosen, text, found)
    return chosen


def _compared(found: Sequence[Row], text: str) -> list[Row]:
    match = _FILTER.fullmatch(text)
    if match is None:
        raise QuantCacheError(f"a filter is a comparison such as bits<=4.5, or a pattern of names, got {text!r}")
    name, sign, number = match.groups()
    if name not in COLUMNS:
        raise QuantCacheError(f"unknown column {name!r}: known are {', '.join(COLUMNS)}")
    read = COLUMNS[name][0]
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if math.isnan(limit):
        raise QuantCacheError(f"filter {text!r}: {number!r} is not a number")
    return [row for row in found if (value := read(row)) is not None and _COMPARISONS[sign](value, limit)]


def _named(found: Sequence[Row], text: str, known: Sequence[Row]) -> list[Row]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    patterns = [BY_OTHER_NAMES.get(part, part) for part in parts]
    for pattern in patterns or [text]:
        if not any(fnmatch.fnmatchcase(row.format, pattern) for row in known):
            names = ", ".join(row.format for row in known)
            raise QuantCacheError(f"filter {pattern!r} matches no format: known are {names}")
    return [row for row in found if any(fnmatch.fnmatchcase(row.format, pattern) for pattern in patterns)]


def sort(found: Sequence[Row], column: str | None) -> list[Row]:
    """Rows with the best first.

    Args:
        found: Rows from :func:`rows`.
        column: A name in :data:`COLUMNS`, ``format``, or None for the usual order.

    Returns:
        The rows; those without a figure there come last.

    Raises:
        QuantCacheError: The column is unknown.
    """
    if column is None:
        return list(found)
    if column == "format":
        return sorted(found, key=lambda row: row.format)
    if column not in COLUMNS:
        raise QuantCacheError(f"unknown column {column!r}: known are format, {', '.join(COLUMNS)}")
    read, more = COLUMNS[column]

    def key(row: Row) -> tuple[bool, float]:
        value = read(row)
        return value is None, 0.0 if value is None else -value if more else value

    return sorted(found, key=key)


def compare(found: Sequence[Row]) -> dict[str, dict[str, dict[str, Value]]]:
    """Every format beside every other.

    Args:
        found: Rows from :func:`rows`.

    Returns:
        ``size`` (bits of the first over bits of the second), ``kl`` (of the first minus that of the second) and
        ``speed`` (of the first over that of the second), by first and second format; None where one is not measured.
    """

    def ratio(a: float, b: float) -> Value:
        return a / b if b else None

    measures: dict[str, tuple[str, Callable[[float, float], Value]]] = {
        "size": ("bits", ratio),
        "kl": ("kl", lambda a, b: a - b),
        "speed": ("speed", ratio),
    }
    table: dict[str, dict[str, dict[str, Value]]] = {}
    for name, (column, relate) in measures.items():
        read = COLUMNS[column][0]
        table[name] = {
            row.format: {
                other.format: None if (a := read(row)) is None or (b := read(other)) is None else relate(a, b)
                for other in found
            }
            for row in found
        }
    return table
