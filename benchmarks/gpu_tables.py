"""Tables of the records of kernels and caches on a GPU.

Records from before the CUDA kernels served caches are of Triton's kernels; they are shown until there is a newer one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fidelity_tables import markdown, origin

RIVALS = {
    "sdpa flash": "flash",
    "sdpa cudnn": "cuDNN",
    "DynamicCache step, flash": "DynamicCache step, flash",
}
"""Of records of Triton's kernels."""

DENSE = ("flash", "flash folded", "cudnn", "cudnn folded")
OURS, STEP, DENSE_STEP = "cuda-3", "cuda-3 step", "DynamicCache step, flash"


def attention_rank(record: dict[str, Any]) -> int:
    """How fit a record is for :func:`gpu_attention_table`: 2 with the CUDA kernels, 1 with Triton's, 0 not at all."""
    found = record["metrics"].get("attention")
    times = [rung["milliseconds"] for rung in found] if isinstance(found, list) else []
    return max((2 if OURS in each else int("spectral-3" in each) for each in times), default=0)


def models_rank(record: dict[str, Any]) -> int:
    """How fit a record is for :func:`gpu_models_table`: 2 where it names the backends, 1 where not, 0 not at all."""
    found = record["metrics"].get("models")
    entries = [entry for model in found for entry in model["decode"]] if isinstance(found, list) else []
    return max((2 if "backends" in entry else 1 for entry in entries), default=0)


def gpu_attention_table(path: Path, record: dict[str, Any], page: Path) -> str:
    """How long one layer's decoding step takes, and how that compares.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    if attention_rank(record) < 2:
        return _triton_attention_table(path, record, page)
    header = ["geometry", "batch", "cached tokens", "attention, µs", "best dense, µs", "times faster"]
    header += ["whole step, µs", "DynamicCache's step, µs", "times faster", "as called"]
    rows, more = [], []
    for rung in sorted(record["metrics"]["attention"], key=lambda r: (r["model"], r["batch"], r["tokens"])):
        times = rung["milliseconds"]
        if OURS not in times:
            continue
        first = [rung["model"], str(rung["batch"]), f"{rung['tokens']:,}"]
        cells = [_us(times[OURS]["median"]), "", "", "", "", "", ""]
        if known := [name for name in DENSE if name in times]:
            best = min(known, key=lambda name: times[name]["median"])
            cells[1] = f"{_us(times[best]['median'])} ({best})"
            cells[2] = _times(times[best]["median"], times[OURS]["median"])
        if STEP in times:
            cells[3] = _us(times[STEP]["median"])
        if STEP in times and DENSE_STEP in times:
            cells[4] = _us(times[DENSE_STEP]["median"])
            cells[5] = _times(times[DENSE_STEP]["median"], times[STEP]["median"])
            cells[6] = _times(times[DENSE_STEP]["call"], times[STEP]["call"])
        rows.append([*first, *cells])
        for label in [label for label in rung["packed_bytes"] if label in times and len(rung["packed_bytes"]) > 1]:
            kernels = rung["kernel_microseconds"].get(label)
            parts = ", ".join(f"{name} {us:.0f}" for name, us in kernels.items()) if isinstance(kernels, dict) else ""
            several = next((times[name] for name in times if name.startswith(f"{label}, ")), None)
            found = [label, _us(times[label]["median"]), "" if several is None else _us(several["median"])]
            more.append([*first, *found, f"{rung['packed_bytes'][label] / 1e6:,.1f}", parts])
    copy = record["metrics"].get("copy", {}).get("gigabytes_per_second")
    caption = (
        "One layer, one new token, bfloat16, a trellis at 3 bits, widths as of a real model; median time on the GPU, "
        "caches cold. Dense is the best of flash and cuDNN over bfloat16, with the heads of a group as they are or "
        "folded; DynamicCache's step is with flash. *As called* is how many times faster steps follow each other, the "
        f"CPU's part included.{f' A plain copy moves {copy:,.0f} GB/s.' if copy else ''}"
        f"{_differences(record)}{_parity(record)} "
    )
    table = f"{markdown(header, rows)}\n\n{caption}{origin(path, record, page)}"
    if more:
        header = ["geometry", "batch", "cached tokens", "kernels, bits", "attention, µs", "5 tokens, µs", "blocks, MB"]
        table += f"\n\n{markdown([*header, 'of each kernel, µs'], more)}"
    return table


def _us(milliseconds: float) -> str:
    return f"{1e3 * milliseconds:,.0f}"


def _times(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}×"


def _differences(record: dict[str, Any]) -> str:
    """The largest distance from plain torch, in words."""
    found = [each for rung in record["metrics"]["attention"] for each in rung["difference"].items()]
    ours = [each["relative"] for label, each in found if label.startswith("cuda") and isinstance(each, dict)]
    return f" Results differ from plain torch's by at most {100 * max(ours):.2g} %." if ours else ""


def _parity(record: dict[str, Any]) -> str:
    """What the parity suites said, in words."""
    names = {"parity": "CUDA", "triton-parity": "Triton"}
    found = {whose: record["metrics"].get(part) for part, whose in names.items()}
    said = [f"{who}: {each['summary'].split(' in ')[0]}" for who, each in found.items() if each and "summary" in each]
    return f" Parity on this GPU: {'; '.join(said)}." if said else ""


def _triton_attention_table(path: Path, record: dict[str, Any], page: Path) -> str:
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
    if models_rank(record) < 2:
        return _triton_models_table(path, record, page)
    header = ["model", "layers", "batch", "cached tokens", "cache", "kernels", "tokens/s", "with a CUDA graph"]
    header += ["generate, tokens/s", "cache, MB"]
    rows, notes = [], []
    for model in record["metrics"]["models"]:
        parts = {
            part: {(e["batch"], e["context"], e["kind"]): e for e in model[part]}
            for part in ("decode", "graph", "generate")
        }
        for batch, context, kind in sorted(dict.fromkeys(key for part in parts.values() for key in part)):
            found = {part: entries.get((batch, context, kind)) for part, entries in parts.items()}
            speeds = [
                "" if e is None else f"{e['tokens_per_second']:,.1f}" if e["status"] == "ok" else e["status"]
                for e in found.values()
            ]
            backends = next((e["backends"] for e in found.values() if e and "backends" in e), [])
            size = (found["decode"] or {}).get("cache_bytes")
            first = [model["model"], str(model["layers"]), str(batch), f"{context:,}", kind, "; ".join(backends)]
            rows.append([*first, *speeds, "" if size is None else f"{size / 1e6:,.1f}"])
        for entry in model["prefill"]:
            if entry["status"] == "ok":
                share = f", of which {100 * entry['encode_share']:.0f} % encoding" if "encode_share" in entry else ""
                notes.append(
                    f"{entry['tokens']:,} tokens, {entry['kind']}: {entry['milliseconds']['median']:.0f} ms{share}, "
                    f"at most {entry['peak_bytes'] / 1e9:.2f} GB"
                )
    prefill = f" Prefill: {'; '.join(notes)}." if notes else ""
    caption = f"Random weights, random cached tokens, bfloat16; *tokens/s* are of eager steps.{prefill} "
    return f"{markdown(header, rows)}\n\n{caption}{origin(path, record, page)}"


def _triton_models_table(path: Path, record: dict[str, Any], page: Path) -> str:
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
