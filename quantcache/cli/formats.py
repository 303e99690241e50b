"""``quantcache formats``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcache.cli.loading import find_model
from quantcache.cli.options import (
    DebugFlag,
    JsonFlag,
    NamedOption,
    RecordsOption,
    RevisionOption,
    TrustOption,
    named_model,
    wrong_usage,
)
from quantcache.cli.reaching import expect_model
from quantcache.cli.session import session
from quantcache.common.choices import SortColumn
from quantcache.common.grid import Grid, Prose
from quantcache.common.sources import CONFIG_HELP
from quantcache.data import BUNDLED_MODEL

if TYPE_CHECKING:
    from quantcache.planning.records import Measurements
    from quantcache.planning.table import Row

NOT_MEASURED = "not measured"


def formats(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=CONFIG_HELP, show_default=BUNDLED_MODEL)] = None,
    named: NamedOption = None,
    records: RecordsOption = None,
    sort: Annotated[SortColumn | None, typer.Option(help="The best first.", show_default="by family")] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="EXPR", help="'bits<=4.5', 'kl<0.01', 'spectral-*,quanto-*'; repeatable."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare every format with every other.", show_default=False)
    ] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show every KV format: bits, bytes per token of a model, and what was measured on it.

    Figures are those of records only: the benchmarks that come with quantcache, and your own.

    Examples:
        quantcache formats --sort kl --filter 'bits<=5'
        quantcache formats Qwen/Qwen3-0.6B --records my_eval.json
    """
    with session(json, debug) as run:
        model = named_model(model, named) or BUNDLED_MODEL
        expect_model(model, revision)
        from quantcache.planning import table
        from quantcache.planning.geometry import load_config, read_geometry

        find_model(model, revision)
        measurements = load_measurements(records)
        geometry = read_geometry(load_config(model, revision, trust_remote_code))
        found = table.rows(geometry, model, measurements)
        with wrong_usage():
            found = table.select(found, filters or ())
        found = table.sort(found, sort)
        data: dict[str, Any] = {
            "model": model,
            "elements_per_token": geometry.elements,
            "geometry": geometry.basis,
            "formats": [row.to_dict() for row in found],
            "measured_models": measurements.models(),
        }
        shown: list[Grid | str] = [_table(found, model), *_notes(found, model, measurements)]
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


def _table(found: Sequence[Row], model: str) -> Grid:
    table = Grid("format", "bits", "bytes/token", "KL", "agreement", "speed", title=f"KV formats on {model}")
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

    if not found:
        return ["", Prose("No format is what every --filter asks for.")]
    notes = [
        "bits: per encoded element, scales and gains included. bytes/token: that, over all layers that grow with the "
        "context, sinks and recent tokens not included. KL: mean divergence from the dense cache, nats per token. "
        "agreement: same most likely token. speed: decoding, against the dense cache beside it.",
    ]
    if any(row.simulated for row in found):
        notes.append("* no packed implementation: measured on simulated values, sizes as its codes would take")
    obstacles: dict[str, list[str]] = {}
    for row in found:
        if row.obstacle and not row.simulated:
            obstacles.setdefault(row.obstacle, []).append(row.format)
    notes += [f"{', '.join(names)}: {obstacle}" for obstacle, names in obstacles.items()]
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
    return ["", *map(Prose, notes)]


def _matrix(name: str, matrix: dict[str, dict[str, float | None]]) -> list[Grid | str]:
    """One measure of every format against every other."""
    titles = {
        "size": "Size: bits of the row over bits of the column",
        "kl": "KL of the row minus KL of the column",
        "speed": "Speed of the row over speed of the column",
    }
    if all(value is None for row in matrix.values() for value in row.values()):
        return ["", f"{titles[name]}: {NOT_MEASURED}"]
    form = "+.4f" if name == "kl" else ".2f"
    table = Grid("", *(str(number) for number in range(1, len(matrix) + 1)), title=titles[name])
    for number, (row, cells) in enumerate(matrix.items(), 1):
        values = [cells[other] for other in matrix]
        table.add_row(f"{number} {row}", *("-" if value is None else format(value, form) for value in values))
    return ["", table]
