"""Tables of the suites' record: those that ``quantcache eval`` shows, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fidelity_tables import Record, markdown, origin
from rich.table import Table

from quantcache.cli.eval_tables import tables


def suite_table(suite: str, path: Path, record: Record, page: Path) -> str:
    """One suite.

    Args:
        suite: Its name in the record.
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    settings = record["settings"]
    if suite not in record["metrics"]:
        return "Not in the newest record."
    (shown,) = tables({**settings, "metrics": {suite: record["metrics"][suite]}})
    caption = (
        f"{settings['model']} in {settings['dtype']}, {settings['sinks']} sinks, "
        f"residual {settings['residuals'][0]}. {origin(path, record, page)}"
    )
    if not isinstance(shown, Table):
        return f"{shown}. {caption}"
    header = [str(column.header) for column in shown.columns]
    rows = [[str(cell) for cell in row] for row in zip(*(column.cells for column in shown.columns), strict=True)]
    return f"{markdown(header, rows)}\n\n{shown.title}. {caption}"


SUITE_TABLES: dict[str, tuple[str, Callable[[Path, Record, Path], str]]] = {
    f"suite-{name}": ("suites", partial(suite_table, name))
    for name in ("needle", "routing", "transfer", "qa", "memory", "speed", "speculative")
}
"""Suite of the record, and what makes Markdown, by the name of the table."""
