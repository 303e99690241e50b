"""``quantcache formats``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from quantcache.cli.loading import find_model
from quantcache.cli.options import DebugFlag, JsonFlag, RevisionOption, TrustOption
from quantcache.cli.session import session
from quantcache.common.sources import CONFIG_HELP
from quantcache.data import BUNDLED_MODEL

if TYPE_CHECKING:
    from quantcache.planning.records import Measurements
    from quantcache.planning.table import Row

NOT_MEASURED = "not measured"
WIDTH = 80

RecordsOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="Result of 'quantcache eval -o', or a folder of them; may be repeated."),
]


def formats(
    model: Annotated[str, typer.Option(metavar="MODEL", help=CONFIG_HELP)] = BUNDLED_MODEL,
    records: RecordsOption = None,
    sort: Annotated[
        str | None, typer.Option(metavar="COL", help="format, bits, bytes, kl, agreement or speed; the best first.")
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="EXPR", help="'bits<=4.5', 'kl<0.01', 'spectral-*,quanto-*'; repeatable."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare every format with every other.")] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show every KV format: bits, bytes per token of a model, and what was measured on it.

    Figures are those of records only: the benchmarks that come with quantcache, and your own.

    Example: quantcache formats --sort kl --filter 'bits<=5' --records my_eval.json
    """
    with session(json, debug) as run:
        from quantcache.planning import table
        from quantcache.planning.geometry import load_config, read_geometry

        find_model(model)
        measurements = load_measurements(records)
        geometry = read_geometry(load_config(model, revision, trust_remote_code))
        found = table.sort(table.select(table.rows(geometry, model, measurements), filters or ()), sort)
        data: dict[str, Any] = {
            "model": model,
            "elements_per_token": geometry.elements,
            "geometry": geometry.basis,
            "formats": [row.to_dict() for row in found],
            "measured_models": measurements.models(),
        }
        shown: list[Table | str] = [_table(found, model), *_notes(found, model, measurements)]
        if compare:
            data["compare"] = table.compare(found)
            shown += [part for name in data["compare"] for part in _matrix(name, data["compare"][name])]
        run.finish(data, *shown)


def load_measurements(records: Sequence[Path] | None) -> Measurements:
    """The figures that come with quantcache, and those of records.

    Args:
        records: Files and folders.

    Returns:
        All figures.

    Raises:
        RecordError: A file is missing, damaged, or no record.
    """
    from quantcache.planning.digest import bundled_measurements
    from quantcache.planning.records import read_measurements

    return bundled_measurements() + read_measurements(records or ())


def compact_table(*columns: str, title: str | None = None) -> Table:
    """A table that fits 80 columns: little padding, numbers to the right.

    Args:
        columns: Heads; the first column is text.
        title: Line above the table.

    Returns:
        The table.
    """
    table = Table(*columns, title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    table.columns[0].no_wrap = True
    return table


def _table(found: Sequence[Row], model: str) -> Table:
    table = compact_table("format", "bits", "bytes/token", "KL", "agreement", "speed", title=f"KV formats on {model}")
    for row in found:
        fidelity, speed = row.fidelity, row.speed
        table.add_row(
            row.format + "*" * row.simulated,
            "-" if row.bits_per_element is None else f"{row.bits_per_element:.3f}",
            "-" if row.bytes_per_token is None else f"{row.bytes_per_token:,.0f}",
            NOT_MEASURED if fidelity is None else f"{fidelity.kl_mean:.5f}",
            NOT_MEASURED if fidelity is None else f"{fidelity.top1_agreement:.2%}",
            NOT_MEASURED if speed is None else f"{speed.speedup:.2f}x",
        )
    return table


def _notes(found: Sequence[Row], model: str, measurements: Measurements) -> list[str]:
    """What the columns mean, and where the figures are from."""
    from quantcache.planning.quality import describe

    notes = [
        "bits: per encoded element, scales and gains included. bytes/token: that, over all layers that grow with the "
        "context, sinks and recent tokens not included. KL: mean divergence from the dense cache, nats per token. "
        "agreement: same most likely token. speed: decoding, against the dense cache beside it.",
    ]
    if any(row.simulated for row in found):
        notes.append("* no packed implementation: measured on simulated values, sizes as its codes would take")
    notes += [f"{row.format}: {row.obstacle}" for row in found if row.obstacle and not row.simulated]
    figures: dict[str, list[str]] = {}
    for row in found:
        if row.fidelity is not None:
            figures.setdefault(describe(row.fidelity), []).append(row.format)
    most = max(figures, key=lambda line: len(figures[line]), default=None)
    for line, names in figures.items():
        notes.append(f"fidelity{'' if line == most else ' of ' + ', '.join(names)}: {line}")
    speeds = dict.fromkeys(
        f"speed: {row.speed.context:,} cached tokens, batch {row.speed.batch}; {row.speed.origin}"
        for row in found
        if row.speed is not None
    )
    notes += list(speeds)
    if not figures:
        known = ", ".join(measurements.models()) or "none"
        notes.append(f"No record of fidelity on {model}; there are records on: {known}.")
    return ["", *notes]


def _matrix(name: str, matrix: dict[str, dict[str, float | None]]) -> list[Table | str]:
    """One measure of every format against every other, in tables of as many columns as fit."""
    titles = {
        "size": "Size: bits of the row over bits of the column",
        "kl": "KL of the row minus KL of the column",
        "speed": "Speed of the row over speed of the column",
    }
    names = list(matrix)
    if all(value is None for row in matrix.values() for value in row.values()):
        return ["", f"{titles[name]}: {NOT_MEASURED}"]
    form = "+.4f" if name == "kl" else ".2f"
    labels = {other: f"{number} {other}" for number, other in enumerate(names, 1)}
    first = max(len(label) for label in labels.values())
    step = max(1, (WIDTH - first) // (10 if name == "kl" else 7))
    shown: list[Table | str] = []
    for start in range(0, len(names), step):
        part = names[start : start + step]
        heads = [str(names.index(other) + 1) for other in part]
        table = compact_table("", *heads, title=titles[name] if not start else None)
        for row in names:
            cells = [matrix[row][other] for other in part]
            table.add_row(labels[row], *("-" if value is None else format(value, form) for value in cells))
        shown += ["", table]
    return shown
