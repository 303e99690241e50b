"""Write the tables of README and docs from committed records, or check that they say what the records say.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/absorbed-checkpoints.md")
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


def absorb_table(path: Path, record: dict[str, Any]) -> str:
    """The table of absorbed checkpoints.

    Args:
        path: The record's file, relative to the page.
        record: The record.

    Returns:
        Markdown.
    """
    settings, models = record["settings"], record["metrics"]["models"]
    original = models["original"]["methods"]
    lines = [
        "| cache | " + " | ".join(models) + " | change with flat, window by window |",
        "|---|" + "---|" * (len(models) + 1),
    ]
    for method, entry in original.items():
        if method == "dense" or entry["status"] != "ok":
            continue
        windows = [models[name]["methods"][method]["kl_by_window"] for name in models]
        cells = [f"{sum(kl) / len(kl):.5f}" for kl in windows]
        flat = models["flat"]["methods"][method]["kl_by_window"]
        changes = [after / before - 1 for before, after in zip(windows[0], flat, strict=True)]
        cells.append(f"{min(changes):+.1%} to {max(changes):+.1%}")
        lines.append(f"| {method}{' (simulated)' if entry['simulated'] else ''} | " + " | ".join(cells) + " |")
    work = [model["flops_per_layer"] for model in models.values()]
    for what, name in (("encode_values", "to encode a token's values"), ("decode", "of a decoding step")):
        lines.append(f"| operations {name} | " + " | ".join(f"{counts[what]:,.0f}" for counts in work) + " | |")
    cpu, bits = record["environment"]["cpu"], record["metrics"]["rounding"]
    rounded = "; ".join(
        f"{name}: {entry['kl_mean']:.1e} nats, logits by at most {entry['max_abs'] / entry['scale']:.1e} of the largest"
        for name, entry in bits.items()
    )
    lines += [
        "",
        f"Mean KL to the dense cache of the same model, nats per token. {settings['model']} in {settings['dtype']}, "
        f"{settings['windows']} windows of {settings['context']:,} tokens fed {settings['chunk']} at a time; spectral "
        f"caches keep {settings['sinks']} sinks and {settings['residual']} recent tokens. Operations are those of "
        f"matrix products in plain torch, for each layer; of a decoding step those of the whole model, at "
        f"{settings['context']:,} cached tokens. What rounding the "
        f"absorbed weights costs, against the original weights, all else in float32: {rounded}. "
        f"{cpu['name']} ({cpu['cores']} cores), commit {record['commit'][:10]}, [record]({path.as_posix()}).",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[Path, dict[str, Any]], str]] = {
    "fidelity": fidelity_table,
    "absorb": absorb_table,
}


def render(text: str, root: Path, page: str = "README.md") -> str:
    """Fill in every table of a page.

    Args:
        text: The page.
        root: The checkout.
        page: The page's file, relative to the checkout.

    Returns:
        The page with tables from the newest records.

    Raises:
        ValueError: A marker names no known table, or the page has none.
    """

    def link(record: Path) -> Path:
        return Path(os.path.relpath(record, (root / page).parent))

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}: known are {', '.join(TABLES)}")
        newest = newest_record(root / "benchmarks" / "results", name)
        body = NO_RECORD if newest is None else TABLES[name](link(newest[0]), newest[1])
        return f"{match[1]}{body}\n{match[3]}"

    filled, count = MARKERS.subn(fill, text)
    if not count:
        raise ValueError("the page has no table markers")
    return filled


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Regenerate or check the pages.

    Args:
        arguments: The command line.
        root: The checkout.

    Returns:
        The exit status: 1 if ``--check`` found a difference.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a table is out of date")
    options = parser.parse_args(arguments)
    pages = {page: (root / page).read_text(encoding="utf-8") for page in PAGES if (root / page).exists()}
    wanted = {page: render(text, root, page) for page, text in pages.items()}
    stale = [page for page in pages if wanted[page] != pages[page]]
    for page in stale:
        if options.check:
            print(f"error: {page} differs from the newest records: run benchmarks/tables.py", file=sys.stderr)
        else:
            (root / page).write_text(wanted[page], encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
