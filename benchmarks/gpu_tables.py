"""Tables of the records of the Triton kernels on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fidelity_tables import markdown, origin

RIVALS = {
    "sdpa flash": "flash",
    "sdpa cudnn": "cuDNN",
    "DynamicCache step, flash": "DynamicCache step, flash",
}


def gpu_attention_table(path: Path, record: dict[str, Any], page: Path) -> str:
    """How long one layer's decoding step takes, and how that compares.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    header = ["geometry", "batch", "cached tokens", "spectral-3, ms", "whole step, ms", *RIVALS.values()]
    rows = []
    for rung in record["metrics"]["attention"]:
        times = {name: entry["median"] for name, entry in rung["milliseconds"].items()}
        own, step = times["spectral-3"], times["spectral-3 step"]
        ratios = [f"{times[name] / (step if 'step' in name else own):.2f}×" if name in times else "" for name in RIVALS]
        rows.append([rung["model"], str(rung["batch"]), f"{rung['tokens']:,}", f"{own:.3f}", f"{step:.3f}", *ratios])
    copy = record["metrics"]["copy"]["gigabytes_per_second"]
    caption = (
        "One layer, one new token, bfloat16, widths as of a real model; median time on the GPU, and how many times "
        "faster that is than dense attention (SDPA alone) and than transformers' step. A plain copy moves "
        f"{copy:,.0f} GB/s. Parity on this GPU: {record['metrics']['parity']['summary'].split(' in ')[0]}. "
    )
    return f"{markdown(header, rows)}\n\n{caption}{origin(path, record, page)}"


def gpu_models_table(path: Path, record: dict[str, Any], page: Path) -> str:
    """Tokens per second, memory and prefill of whole models.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    header = ["model", "layers", "batch", "cached tokens", "cache", "tokens/s", "cache, MB"]
    rows, notes = [], []
    for model in record["metrics"]["models"]:
        for entry in model["decode"]:
            first = [model["model"], str(model["layers"]), str(entry["batch"]), f"{entry['context']:,}", entry["kind"]]
            if entry["status"] != "ok":
                rows.append([*first, entry["status"]])
                continue
            rows.append([*first, f"{entry['tokens_per_second']:.1f}", f"{entry['cache_bytes'] / 1e6:,.1f}"])
        for entry in model["prefill"]:
            if entry["status"] == "ok":
                notes.append(
                    f"{entry['tokens']:,} tokens, {entry['kind']}: {entry['milliseconds']['median']:.0f} ms, "
                    f"at most {entry['peak_bytes'] / 1e9:.2f} GB"
                )
    caption = f"Random weights, random cached tokens, bfloat16, eager. Prefill: {'; '.join(notes)}. "
    return f"{markdown(header, rows)}\n\n{caption}{origin(path, record, page)}"


def gpu_kernel_table(path: Path, record: dict[str, Any], page: Path) -> str:
    """Times of the CUDA attention kernel by itself, outside of a cache.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    header = ["geometry", "batch", "tokens", "CUDA kernel, µs", "best dense, µs", "times faster", "codes read, GB/s"]
    rows = [
        [
            entry["model"],
            str(entry["batch"]),
            f"{entry['tokens']:,}",
            f"{entry['total_us']:.1f}",
            f"{entry[entry['best_dense']]:.1f} ({entry['best_dense'].split('_')[0]})",
            f"{entry['ratio']:.2f}×",
            f"{entry['kernel_gbs']:,.0f}",
        ]
        for entry in sorted(record["metrics"]["time"], key=lambda e: (e["model"], e["batch"], e["tokens"]))
        if entry["precise"]
    ]
    worst = max(entry["error"] / entry["bfloat16"] for entry in record["metrics"]["check"] if entry["precise"])
    checks = record["metrics"]["check"]
    caption = (
        f"Random codes of {record['metrics']['time'][0]['bits']:.2f} bits per element in tiles of one width, all in "
        "the frame of their anchor; queries come transformed, and tokens that are not coded are not in it. Dense is "
        "the best of flash and cuDNN over bfloat16, with the heads of a group as they are or folded. "
        f"{sum(e['verdict'] == 'PASS' for e in checks)} of {len(checks)} checks against float64 pass; with queries in "
        f"twice eight bits the error is at most {worst:.2f} of that of bfloat16 on decoded tokens. "
    )
    return f"{markdown(header, rows)}\n\n{caption}{origin(path, record, page)}"
