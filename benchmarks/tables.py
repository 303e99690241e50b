"""Write the tables and figures of the README and the documentation from committed records, or check them.

So is ``quantcache/data/measurements.json``, the figures that an installed package goes by.

Suites whose parts can be run apart are shown part by part, each from the newest record that holds it; a table names the
records that it is made from.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``. A figure is drawn where a page shows it.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
from ablation_tables import ablation_table, findings_table, frames_table
from absorb_tables import absorb_table
from claim_tables import claim_table, predictions_table
from cpu_tables import LEVELS, cpu_attention_table, cpu_models_table, has_level
from fidelity_tables import (
    NO_RECORD,
    Parts,
    all_table,
    contexts_table,
    fidelity_table,
    own_table,
    weights_table,
)
from gpu_tables import attention_rank, gpu_attention_table, gpu_models_table, models_rank
from prefix_tables import prefixes_table
from suite_tables import SUITE_TABLES

from quantcache.common.jsonfile import to_json, write_json
from quantcache.common.sources import PACKAGED
from quantcache.evaluation.record import read_record
from quantcache.planning.digest import to_digest
from quantcache.planning.records import Measurements, measurements_of

ROOT = Path(__file__).resolve().parent.parent
FIGURES = Path("docs") / "figures"
DIGEST = Path("quantcache") / "data" / "measurements.json"
DIGEST_SUITES = ("fidelity", *(f"fidelity-{model}" for model in PACKAGED), "cpu-decode")
MARKERS = re.compile(r"(<!-- table:(?P<name>[a-z0-9.-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
PAGES = (
    "README.md",
    "docs/fidelity.md",
    "docs/fidelity-wiki11m.md",
    "docs/ablations.md",
    "docs/suites.md",
    "docs/absorbed-checkpoints.md",
    "docs/speed.md",
    "docs/prefixes.md",
)

Render = Callable[[Path, dict[str, Any], Path], str]
PartRender = Callable[[Parts, Path], str]

YARDSTICK = "qwen2.5-coder-1.5b"
"""The model of the README's table and figure: the largest that we measure."""

FIDELITY_TABLES: dict[str, PartRender] = {
    "fidelity-all": all_table,
    "fidelity-own": own_table,
    "fidelity-contexts": contexts_table,
    "fidelity-weights": weights_table,
    "claim": claim_table,
}
"""Tables that are made for every model with a record; the bundled model's have its name too."""

PART_TABLES: dict[str, tuple[str, PartRender]] = {
    "fidelity": (f"fidelity-{YARDSTICK}", fidelity_table),
    **{name: ("fidelity", make) for name, make in FIDELITY_TABLES.items()},
    **{f"{name}-{model}": (f"fidelity-{model}", make) for model in PACKAGED for name, make in FIDELITY_TABLES.items()},
    **{
        f"ablations{model}": (f"ablations{model}", ablation_table)
        for model in ("", "-second-model", *(f"-{name}" for name in PACKAGED))
    },
    **SUITE_TABLES,
}
"""Suite of the records, and what makes Markdown of the newest record of every part, and the page."""

TABLES: dict[str, tuple[str, Render]] = {
    "findings": ("findings", findings_table),
    "frames": ("frames", frames_table),
    "absorb": ("absorb", absorb_table),
    **{f"cpu-attention-{level}": ("cpu-decode", cpu_attention_table) for level in LEVELS},
    **{f"cpu-models-{level}": ("cpu-decode", cpu_models_table) for level in LEVELS},
    "gpu-attention": ("gpu-decode", gpu_attention_table),
    "gpu-models": ("gpu-decode", gpu_models_table),
    "prefixes": ("prefixes-smollm2-135m", prefixes_table),
    **{f"predictions-{model}": (f"predictions-{model}", predictions_table) for model in PACKAGED},
}
"""Suite of the record, and what makes Markdown of record file, record and page."""

RANKS: dict[str, Callable[[dict[str, Any]], int]] = {
    "gpu-attention": attention_rank,
    "gpu-models": models_rank,
    **{f"cpu-{table}-{level}": has_level(level) for table in ("attention", "models") for level in LEVELS},
}
"""For tables that not every record of their suite will do for: the newest of the highest rank is shown, none of 0."""


def records_of(root: Path, suite: str) -> list[tuple[Path, dict[str, Any]]]:
    """The records of a suite, the newest last; a quick run does not stand in for a whole one.

    Args:
        root: The checkout.
        suite: The suite.

    Returns:
        Their files, relative to the checkout, and contents.

    Raises:
        RecordError: A file is not a record.
    """
    found = []
    for path in (root / "benchmarks" / "results").rglob(f"{suite}__*.json"):
        record = _content(path, path.stat().st_mtime_ns)
        if record is not None:
            found.append((record["created"], str(path.relative_to(root)), record))
    return [(Path(path), record) for _, path, record in sorted(found, key=lambda entry: entry[:2])]


@functools.cache
def _content(path: Path, changed: int) -> dict[str, Any] | None:
    """A record as it was when its file was last changed; None if tables are not made of it."""
    record = read_record(path)
    return record.to_dict() if record.status == "ok" and record.clean and not record.settings.get("quick") else None


def newest_parts(root: Path, suite: str) -> Parts:
    """The newest record of every part of a suite.

    Args:
        root: The checkout.
        suite: The suite.

    Returns:
        File and content by part; a part is what one key of a record's metrics holds.

    Raises:
        RecordError: A file is not a record.
    """
    return {part: (path, record) for path, record in records_of(root, suite) for part in record["metrics"]}


def render(text: str, root: Path, page: Path) -> str:
    """Fill in every table of a page.

    Args:
        text: The page.
        root: The checkout.
        page: Its file, relative to the checkout.

    Returns:
        The page with tables from the newest records.

    Raises:
        ValueError: A marker names no known table, or the page has none.
    """

    def fill(match: re.Match[str]) -> str:
        name, body = match["name"], NO_RECORD
        if name in PART_TABLES:
            suite, make_of_parts = PART_TABLES[name]
            if parts := newest_parts(root, suite):
                body = make_of_parts(parts, page)
        elif name in TABLES:
            suite, make = TABLES[name]
            rank = RANKS.get(name, lambda record: 1)
            ranked = [(rank(record), path, record) for path, record in records_of(root, suite)]
            if highest := max((each[0] for each in ranked), default=0):
                _, path, record = [each for each in ranked if each[0] == highest][-1]
                body = make(path, record, page)
        else:
            raise ValueError(f"{page}: unknown table {name!r}: known are {', '.join((*PART_TABLES, *TABLES))}")
        return f"{match[1]}{body}\n{match[3]}"

    filled, count = MARKERS.subn(fill, text)
    if not count:
        raise ValueError(f"{page} has no table markers")
    return filled


def outdated_figures(root: Path, text: str) -> list[tuple[Path, str, figures.Lines]]:
    """Figures that a page shows and whose file is missing or shows other data."""
    outdated = []
    for name, (suite, extract, *_) in figures.FIGURES.items():
        found = records_of(root, suite)
        if suite.startswith("fidelity"):
            found = [(path, record) for path, record in found if figures.PART in record["metrics"]]
        if f"figures/{name}.svg" in text and found:
            path, lines = root / FIGURES / f"{name}.svg", extract(found[-1][1])
            if not figures.is_current(path, name, lines):
                outdated.append((path, name, lines))
    return outdated


def digest(root: Path) -> dict[str, Any]:
    """The figures of the newest records that ``quantcache formats`` and ``recommend`` go by.

    Args:
        root: The checkout.

    Returns:
        The content of :data:`DIGEST`.

    Raises:
        RecordError: A file is not a record.
    """
    found = Measurements()
    for suite in DIGEST_SUITES:
        parts = newest_parts(root, suite)
        records = dict(parts.values()) if suite.startswith("fidelity") else dict(records_of(root, suite)[-1:])
        for path, record in records.items():
            own = {part: content for part, content in record["metrics"].items() if parts[part][0] == path}
            found += measurements_of({**record, "metrics": own}, path)
    return to_digest(found)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Regenerate or check the pages and their figures.

    Args:
        arguments: The command line.
        root: The checkout.

    Returns:
        The exit status: 1 if ``--check`` found a difference.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table or figure is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for page in (Path(name) for name in PAGES if (root / name).is_file()):
        text = (root / page).read_text(encoding="utf-8")
        wanted = render(text, root, page)
        figures_due = outdated_figures(root, wanted)
        stale += [str(page)] * (text != wanted) + [str(path.relative_to(root)) for path, *_ in figures_due]
        if options.check:
            continue
        if text != wanted:
            (root / page).write_text(wanted, encoding="utf-8")
        for due in figures_due:
            figures.draw(*due)
    summary = root / DIGEST
    if summary.parent.is_dir():
        content = digest(root)
        if not summary.is_file() or summary.read_text(encoding="utf-8") != to_json(content) + "\n":
            stale.append(str(summary.relative_to(root)))
            if not options.check:
                write_json(summary, content)
    if options.check and stale:
        print(f"error: {', '.join(stale)} differ from the newest records: run benchmarks/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
