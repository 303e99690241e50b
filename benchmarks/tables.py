"""Write the README's tables from committed records, or check that they say what the records say.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NO_RECORD = "No record yet."
MARKERS = re.compile(r"(<!-- table:(?P<name>[a-z-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def newest_record(results: Path, suite: str) -> tuple[Path, dict[str, Any]] | None:
    """The latest record of a suite.

    Args:
        results: Folder of the records.
        suite: The suite.

    Returns:
        Its file and content; None if there is none.
    """
    found = []
    for path in results.rglob(f"{suite}__*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["status"] == "ok" and record["commit"] and not record["dirty"]:
            found.append((record["created"], path, record))
    if not found:
        return None
    _, path, record = max(found, key=lambda entry: (entry[0], str(entry[1])))
    return path, record


def fidelity_table(path: Path, record: dict[str, Any]) -> str:
    """The fidelity table.

    Args:
        path: The record's file, relative to the README.
        record: The record.

    Returns:
        Markdown.
    """
    settings, metrics = record["settings"], record["metrics"]
    default, bare = metrics["residual_64"], metrics["residual_0"]
    lines = [
        "| method | bits per element | ... in all | mean KL | top-1 agreement | perplexity | mean KL, no residual |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in default.items():
        if entry["status"] != "ok":
            lines.append(f"| {name} | {entry['status']} | | | | | |")
            continue
        without = bare.get(name, {})
        cells = [
            f"{name}{' (simulated)' if entry['simulated'] else ''}",
            f"{entry['bits_per_element']:.3f}",
            f"{entry['bits_per_element_total']:.3f}",
            f"{entry['kl_mean']:.5f}",
            f"{entry['top1_agreement']:.2%}",
            f"{entry['perplexity']:.2f}",
            f"{without['kl_mean']:.5f}" if without.get("status") == "ok" else without.get("status", ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    cpu = record["environment"]["cpu"]
    gpus = record["environment"]["gpus"]
    machine = gpus[0]["name"] if gpus else f"{cpu['name']} ({cpu['cores']} cores)"
    lines += [
        "",
        f"{settings['model']} in {settings['dtype']}, {settings['windows']} windows of {settings['context']:,} tokens "
        f"of held-out Wikipedia text, fed {settings['chunk']} at a time; {settings['sinks']} sinks and 64 recent "
        "tokens exact, in the last column no recent token but those of the chunk itself. All spectral rates come from "
        f"one calibration on {settings['calibration']['tokens']:,} tokens. KL against the dense cache, nats per token. "
        f"{machine}, commit {record['commit'][:10]}, [record]({path.as_posix()}).",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[Path, dict[str, Any]], str]] = {"fidelity": fidelity_table}


def render(text: str, root: Path) -> str:
    """Fill in every table of a page.

    Args:
        text: The page, at the top of the checkout.
        root: The checkout.

    Returns:
        The page with tables from the newest records.

    Raises:
        ValueError: A marker names no known table, or the page has none.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}: known are {', '.join(TABLES)}")
        newest = newest_record(root / "benchmarks" / "results", name)
        body = NO_RECORD if newest is None else TABLES[name](newest[0].relative_to(root), newest[1])
        return f"{match[1]}{body}\n{match[3]}"

    filled, count = MARKERS.subn(fill, text)
    if not count:
        raise ValueError("the page has no table markers")
    return filled


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Regenerate or check the README.

    Args:
        arguments: The command line.
        root: The checkout.

    Returns:
        The exit status: 1 if ``--check`` found a difference.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is out of date")
    options = parser.parse_args(arguments)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    wanted = render(text, root)
    if text == wanted:
        return 0
    if options.check:
        print("error: README.md differs from the newest records: run benchmarks/tables.py", file=sys.stderr)
        return 1
    readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
