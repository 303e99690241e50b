"""Tables of the ablations and of the published findings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fidelity_tables import Parts, Record, markdown, origin, text_name, windows

from quantcache.evaluation import summaries

TITLES = {
    "metric": "Metric of the transform (budgets apart: one for each side of each layer)",
    "readers": "Whose reading of a token counts in the metric",
    "calibration-residual": "Recent tokens that calibration takes for exact",
    "seq-len": "Tokens of a calibration sequence",
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
    "coding": "What a code stands for",
    "passes": "How often the encoder seeks the best path, each time but the first with the gain that fits the last one",
    "codebooks": "Codebooks of scalar codes",
    "min-width": "Smallest width of a coefficient",
    "layer-floor": "Least mean width of a layer",
    "split": "Budgets of keys and values",
    "sinks": "Sinks",
    "calibration-tokens": "Calibration tokens",
    "bos": "The BOS token in front of every sequence: while calibrating and reading, or reading alone",
}

BEYOND = 2.0
"""Standard errors by which a row is to beat the one that it is held against, to be shown as better."""


def ablation_table(parts: Parts, page: Path) -> str:
    """All ablations, one table each, under the record that it is from."""
    order = [*(name for name in TITLES if name in parts), *(name for name in parts if name not in TITLES)]
    by_record: dict[Path, list[str]] = {}
    for name in order:
        by_record.setdefault(parts[name][0], []).append(name)
    texts = []
    for path, names in by_record.items():
        record = parts[names[0]][1]
        texts.append(_caption(path, record, names, page))
        texts += [_ablation(name, record["metrics"][name], record["settings"]["rates"]) for name in names]
    return "\n\n".join(texts)


def _caption(path: Path, record: Record, names: list[str], page: Path) -> str:
    settings = record["settings"]
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    text = f" of {text_name(settings)}" if "stretch" in settings else ""
    coding = settings.get("codec", {}).get("coding", "scalar")
    codes = "Scalar codes" if coding == "scalar" else f"Codes are {coding} codes where a row does not say otherwise"
    caption = (
        f"Mean KL at {rates} bits, in nats per token, and bits per element with scales. {settings['model']} "
        f"in {settings['dtype']}, {windows(settings)}{text} fed {settings['chunk']} at a time, "
        f"{f'residual {residual}' if (residual := settings.get('residual')) else 'no residual'}; "
        f"{settings['calibration']['tokens']:,} calibration tokens. {codes}. "
    )
    found = [entry for name in names for row in record["metrics"][name].values() for entry in row.values()]
    if any(entry.get("kl_stretches") for entry in found):
        caption += f"Standard errors are over stretches of {settings['stretch']} tokens. "
    entries = [entry for entry in found if "over" in entry]
    if entries:
        caption += (
            "Ratios are of the mean KL to that of the row without one, with a standard error over "
            f"{entries[0]['over']['n']} pairs of stretches of {settings['stretch']} tokens; bold are those that lie "
            f"below 1 by more than {BEYOND:g} of them. "
        )
    return caption + origin(path, record, page)


def _ablation(name: str, rows: dict[str, dict[str, Any]], given: list[float]) -> str:
    rates = [f"{rate:g}" for rate in given]
    paired = any("over" in entry for found in rows.values() for entry in found.values())
    header = [name, *(column for r in rates for column in (f"{r} bits", *([f"ratio at {r} bits"] * paired)))]
    reads_apart = name == "bos"  # the dense cache reads other tokens too
    cells = [
        [row, *(cell for r in rates for cell in (_cell(found.get(r)), *([_ratio(found.get(r))] * paired)))]
        + ([f"{found[rates[0]]['dense_perplexity']:.2f}"] if reads_apart else [])
        for row, found in rows.items()
    ]
    return f"### {TITLES.get(name, name)}\n\n{markdown(header + ['perplexity, dense'] * reads_apart, cells)}"


def _ratio(entry: dict[str, Any] | None) -> str:
    """A row's mean KL over that of the row it is held against; bold where it is lower beyond its error."""
    over = entry and entry.get("over")
    if not over:
        return ""
    if over["stderr"] is None:
        return f"{over['ratio']:.3f}"
    text = f"{over['ratio']:.3f} ± {over['stderr']:.3f}"
    return f"**{text}**" if over["ratio"] + BEYOND * over["stderr"] < 1 else text


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if entry["status"] != "ok":
        return str(entry["status"])
    stretches = entry.get("kl_stretches") or []
    stderr = summaries.mean(stretches)["stderr"] if stretches else None
    error = "" if stderr is None else f" ± {stderr:.5f}"
    return f"{entry['kl_mean']:.5f}{error} ({entry['bits_per_element']:.3f})"


def frames_table(path: Path, record: Record, page: Path) -> str:
    """A step's time by the wavelength below which keys are stored without rotation."""
    settings, rows, wavelengths = record["settings"], [], []
    for geometry, rungs in record["metrics"].items():
        for length, found in rungs.items():
            wavelengths = [f"wavelength {'all' if name == 'inf' else name}" for name in found]
            cells = [f"{entry['median']:.3f} ({entry['times']:.2f}×)" for entry in found.values()]
            rows.append([geometry, f"{int(length):,}", *cells])
    caption = (
        f"One layer, one new token at {settings['bits']:g} bits, trellis codes, float32, {settings['threads']} "
        f"thread{'s' * (settings['threads'] != 1)}: median milliseconds, and how many times those of wavelength "
        f"{settings['default']:g}. {origin(path, record, page)}"
    )
    return markdown(["geometry", "cached tokens", *wavelengths], rows) + f"\n\n{caption}"


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
