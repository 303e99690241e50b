"""Tables of the suites' record: those that ``quantcache eval`` shows, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fidelity_tables import NO_RECORD, Parts, markdown, origin

from quantcache.cli.eval_tables import tables
from quantcache.common.grid import Grid
from quantcache.common.sources import PACKAGED


def suite_table(suite: str, parts: Parts, page: Path) -> str:
    """One suite.

    Args:
        suite: Its name in the record.
        parts: The newest record of every suite.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    if suite not in parts:
        return NO_RECORD
    path, record = parts[suite]
    settings = record["settings"]
    found = tables({**settings, "metrics": {suite: record["metrics"][suite]}})
    caption = (
        f"{settings['model']} in {settings['dtype']}, {settings['sinks']} sinks, "
        f"residual {settings['residuals'][0]}. {origin(path, record, page)}"
    )
    return "\n\n".join(f"{_shown(table)}. {caption}" for table in found)


def _shown(table: Grid | str) -> str:
    """A table as Markdown with its title behind it; a line as it is."""
    if isinstance(table, str):
        return table
    return f"{markdown(list(table.heads), [list(row) for row in table.rows])}\n\n{table.title}"


SUITES = (
    *("divergence", "needle", "records", "lookup", "tools"),
    *("routing", "transfer", "qa", "memory", "speed", "speculative"),
)
REAL = ("divergence", "needle", "records", "lookup", "tools", "transfer", "qa")
"""Those that trained models have a table of."""

SUITE_TABLES: dict[str, tuple[str, Callable[[Parts, Path], str]]] = {
    **{f"suite-{name}": ("suites", partial(suite_table, name)) for name in SUITES},
    **{f"suite-{name}-{model}": (f"suites-{model}", partial(suite_table, name)) for model in PACKAGED for name in REAL},
}
"""Suite of the records, and what makes Markdown of parts and page, by the name of the table."""
