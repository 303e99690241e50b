"""Tables of the ablations and of the published findings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fidelity_tables import Record, markdown, origin, windows

TITLES = {
    "metric": "Metric of the transform (budgets apart: one for each side of each layer)",
    "value-metric": "Metric of the values (keys: Fisher; budgets apart)",
    "key-shrinkage": "Isotropic share of the keys' metric, its trace kept",
    "value-shrinkage": "Isotropic share of the values' metric, its trace kept",
    "frame": "Frame of the keys",
    "anchor-length": "Tokens that share an anchor",
    "group-size": "Coefficients that share a width",
    "profile": "Widths per head or per layer",
    "gain": "Gain of a token",
    "gain-bits": "Bits of the gain (searched)",
    "gain-steps": "Steps per octave of a gain of 8 bits (searched)",
    "codebooks": "Codebooks",
    "min-width": "Smallest width of a coefficient",
    "layer-floor": "Least mean width of a layer",
    "split": "Budgets of keys and values",
    "sinks": "Sinks",
    "calibration-tokens": "Calibration tokens",
}


def ablation_table(path: Path, record: Record, page: Path) -> str:
    """All ablations, one table each."""
    settings = record["settings"]
    rates = [f"{rate:g}" for rate in settings["rates"]]
    parts = [
        f"Mean KL at {', '.join(rates)} bits, in nats per token, and bits per element with scales. {settings['model']} "
        f"in {settings['dtype']}, {windows(settings)} fed "
        f"{settings['chunk']} at a time, no residual; {settings['calibration']['tokens']:,} calibration tokens. "
        f"{origin(path, record, page)}"
    ]
    for name, rows in record["metrics"].items():
        cells = [[row, *(_cell(found.get(rate)) for rate in rates)] for row, found in rows.items()]
        parts.append(f"### {TITLES.get(name, name)}\n\n{markdown([name, *(f'{r} bits' for r in rates)], cells)}")
    return "\n\n".join(parts)


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if entry["status"] != "ok":
        return entry["status"]
    return f"{entry['kl_mean']:.5f} ± {entry['kl_stderr']:.5f} ({entry['bits_per_element']:.3f})"


def findings_table(path: Path, record: Record, page: Path) -> str:
    """The published findings with our numbers."""
    settings, metrics = record["settings"], record["metrics"]
    text = (
        f"{settings['model']} in {settings['dtype']}, {windows(settings)} "
        f"fed {settings['chunk']} at a time, {settings['sinks']} sinks, no residual. {origin(path, record, page)}"
    )
    storage = [
        [name, f"{entry['bits_per_element']:.2f}", f"{entry['kl_mean']:.4f}", f"{entry['perplexity']:.2f}"]
        for name, entry in metrics["storage"].items()
    ]
    bases = [
        [basis, *(f"{found[basis]['kl_mean']:.4f}" for found in metrics["bases"].values())]
        for basis in next(iter(metrics["bases"].values()))
    ]
    spread = [
        max(e["kl_mean"] for e in found.values()) / min(e["kl_mean"] for e in found.values())
        for found in metrics["bases"].values()
    ]
    bases.append(["largest / smallest", *(f"{value:.2f}" for value in spread)])
    perplexities = [
        max(e["perplexity"] for e in found.values()) - min(e["perplexity"] for e in found.values())
        for found in metrics["bases"].values()
    ]
    bases.append(["spread of perplexity", *(f"{value:.3f}" for value in perplexities)])
    ratio = [
        [
            bits,
            f"{3 * 4 ** int(bits):,}",
            *(f"{e['median']:.2f} ({e['p20']:.2f} to {e['p80']:.2f})" for e in found.values()),
        ]
        for bits, found in metrics["ratio"].items()
    ]
    routing = [[name, f"{entry['bits']:.2f}", f"{entry['share']:.2%}"] for name, entry in metrics["routing"].items()]
    return "\n\n".join(
        [
            text,
            "### Quantization against rank reduction at matched storage",
            markdown(["method", "bits per element", "mean KL", "perplexity"], storage),
            "### Routing: share of (query, head) whose strongest key changes",
            "Exact queries of one window on coded keys, sinks and the newest tokens coded too.",
            markdown(["method", "bits per element", "changed"], routing),
            "### Deleting a direction of the keys against quantizing it to b bits",
            "Damage is the second-order KL of the softmax, ½ δsᵀ(diag α − ααᵀ)δs, summed over queries, for each "
            "principal direction of each head. The published 3·2^(2b) has a step of 2σ/2^b; a quantizer that must span "
            "the range has a larger one. Cells: measured ratio over 3·2^(2b), median (20th to 80th percentile).",
            markdown(["b", "3·2^(2b)", "step 2σ/2^b", "step range/(2^b − 1)"], ratio),
            "### Does the basis matter? Flat codes per token in several orthogonal bases, mean KL",
            markdown(["basis", *(f"{bits} bits" for bits in metrics["bases"])], bases),
        ]
    )
