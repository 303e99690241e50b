"""Table of the records of absorbed checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fidelity_tables import markdown, origin


def absorb_table(path: Path, record: dict[str, Any], page: Path) -> str:
    """The table of absorbed checkpoints.

    Args:
        path: The record's file, relative to the checkout.
        record: The record.
        page: The page, relative to the checkout.

    Returns:
        Markdown.
    """
    settings, models = record["settings"], record["metrics"]["models"]
    original = models["original"]["methods"]
    rows = []
    for method, entry in original.items():
        if method == "dense" or entry["status"] != "ok":
            continue
        windows = [models[name]["methods"][method]["kl_by_window"] for name in models]
        cells = [f"{sum(kl) / len(kl):.5f}" for kl in windows]
        flat = models["flat"]["methods"][method]["kl_by_window"]
        changes = [after / before - 1 for before, after in zip(windows[0], flat, strict=True)]
        cells.append(f"{min(changes):+.1%} to {max(changes):+.1%}")
        rows.append([f"{method}{' (simulated)' if entry['simulated'] else ''}", *cells])
    work = [model["flops_per_layer"] for model in models.values()]
    for what, name in (("encode_values", "to encode a token's values"), ("decode", "of a decoding step")):
        rows.append([f"operations {name}", *(f"{counts[what]:,.0f}" for counts in work)])
    bits = record["metrics"]["rounding"]
    rounded = "; ".join(
        f"{name}: {entry['kl_mean']:.1e} nats, logits by at most {entry['max_abs'] / entry['scale']:.1e} of the largest"
        for name, entry in bits.items()
    )
    caption = (
        f"Mean KL to the dense cache of the same model, nats per token. {settings['model']} in {settings['dtype']}, "
        f"{settings['windows']} windows of {settings['context']:,} tokens fed {settings['chunk']} at a time; spectral "
        f"caches keep {settings['sinks']} sinks and {settings['residual']} recent tokens. Operations are those of "
        f"matrix products in plain torch, for each layer; of a decoding step those of the whole model, at "
        f"{settings['context']:,} cached tokens. What rounding the absorbed weights costs, against the original "
        f"weights, all else in float32: {rounded}. "
        f"{origin(path, record, page)}"
    )
    header = ["cache", *models, "change with flat, window by window"]
    return markdown(header, rows) + f"\n\n{caption}"
