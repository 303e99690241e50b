"""Table of the records of conversations that take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fidelity_tables import markdown, origin


def prefixes_table(path: Path, record: dict[str, Any], page: Path) -> str:
    """How many conversations fit, how often they are found again, and when the answer begins.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    settings, metrics = record["settings"], record["metrics"]
    names = {"dense": "dense", "spectral": f"spectral-{settings['bits']:g}"}
    header = ["cache", "MB each", "that fit", "found again", "first token, ms", "if found", "if not"]
    rows = []
    for key, name in names.items():
        found = metrics[key]
        times = [found["first_token_ms"][kind] for kind in ("hits", "misses")]
        rows.append(
            [
                name,
                f"{found['conversation_bytes'] / 1e6:.1f}",
                str(found["conversations_that_fit"]),
                f"{found['hits']} of {found['later_turns']}",
                f"{found['first_token_ms_mean']:,.0f}",
                *("" if each is None else f"{each['median']:,.0f}" for each in times),
            ]
        )
    caption = (
        f"{settings['conversations']} conversations of {settings['tokens']:,} tokens come back in random order, "
        f"{settings['turns']} times each, with {settings['new']} new tokens, to a store of "
        f"{settings['budget_bytes'] / 1e6:,.0f} MB in which what was used longest ago makes room: "
        f"{metrics['conversations_ratio']:.2f} times as many fit. Times until the first token of later turns: mean of "
        f"all, medians of those found again and of those read anew. {settings['model']} in {settings['dtype']}, "
        f"{settings['threads']} thread{'s' * (settings['threads'] != 1)}. "
    )
    return f"{markdown(header, rows)}\n\n{caption}{origin(path, record, page)}"
