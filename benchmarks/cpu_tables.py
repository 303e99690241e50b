"""Tables of the records of the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fidelity_tables import markdown, origin

RIVALS = {
    "dense_float32": "DynamicCache, float32",
    "dense_bfloat16": "DynamicCache, bfloat16",
    "both_bfloat16": "DynamicCache, both bfloat16",
    "sdpa_float32": "SDPA alone, float32",
    "sdpa_bfloat16": "SDPA alone, bfloat16",
    "quanto_4": "quanto-4",
    "hqq_4": "hqq-4",
}


LEVELS = ("avx512", "avx2")
"""Instruction sets whose newest records are shown."""


def has_level(level: str) -> Callable[[dict[str, Any]], int]:
    """Tell the records of one instruction set.

    Args:
        level: Name of the instruction set.

    Returns:
        What is 1 for its records and 0 for others.
    """
    return lambda record: int(record["settings"].get("level") == level)


def cpu_attention_table(path: Path, record: dict[str, Any], page: Path) -> str:
    """How many times faster one layer's decoding step is, with the most threads of the record.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    threads = max(record["settings"]["threads"])
    ladders = record["metrics"]["attention"][f"threads_{threads}"]["geometries"]
    rungs = [rung for ladder in ladders.values() for rung in ladder.values()]
    rivals = [rival for rival in RIVALS if any(rival in rung["times_faster"] for rung in rungs)]
    names = [RIVALS[rival] for rival in rivals]
    header = ["geometry", "cached tokens", "spectral, ms", *names, "of read bandwidth"]
    rows = []
    for name, ladder in ladders.items():
        for tokens, rung in ladder.items():
            times = rung["milliseconds"]["spectral"]
            own = f"{times['median']:.3f} ({times['p20']:.3f} to {times['p80']:.3f})"
            faster = [rung["times_faster"].get(rival) for rival in rivals]
            cells = ["" if ratio is None else f"{ratio:.2f}×" for ratio in faster]
            rows.append([name, f"{int(tokens):,}", own, *cells, f"{rung['share_of_read_bandwidth']:.1%}"])
    caption = (
        f"One layer, one new token: update and attention at {record['settings']['bits']:g} bits, median with 20th and "
        "80th percentile, and how many times faster that is than the others, which took turns with it. The share of "
        f"the measured read bandwidth counts packed bytes only. {record['settings']['level'].upper()}, {threads} "
        "threads; the record has one thread too. "
    )
    return f"{markdown(header, rows)}\n\n{caption}{origin(path, record, page)}"


def cpu_models_table(path: Path, record: dict[str, Any], page: Path) -> str:
    """Tokens per second and memory of whole models.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    header = ["model", "cached tokens", "cache", "tokens/s", "cache, MB", "peak memory, MB"]
    rows = []
    for key, pair in record["metrics"]["models"].items():
        name, _, tokens = key.rpartition("_")
        for kind, entry in pair.items():
            first = [name, f"{int(tokens):,}", kind]
            if entry["status"] != "ok":
                rows.append([*first, entry["status"]])
                continue
            sizes = [f"{entry[size] / 1e6:,.1f}" for size in ("cache_bytes", "peak_resident_bytes")]
            rows.append([*first, f"{entry['tokens_per_second']:.1f}", *sizes])
    caption = "Random weights and random cached tokens, float32, batch 1."
    if found := record["metrics"].get("encoding"):
        caption += (
            f" Encoding {found['tokens']:,} tokens takes {found['encoding_milliseconds']['median']:.0f} ms over all "
            f"layers of the qwen2.5-0.5b geometry, {found['share']:.2%} of its prefill."
        )
    return f"{markdown(header, rows)}\n\n{caption} {origin(path, record, page)}"
