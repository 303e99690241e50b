"""Figures from records, as SVG. Each names the hash of what it shows: a check then knows whether it is out of date."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fidelity_tables import stem

from quantcache.common.writing import write_file

VERSION = 1
"""Of the drawing: raise it when a figure is drawn differently from the same data."""

Lines = dict[str, list[tuple[float, float]]]

PART = "residual_0"
"""Of a fidelity record, what figures show."""


def kl_bits(record: dict[str, Any]) -> Lines:
    """Mean KL over bits per element, one line for each family of methods, no residual."""
    lines: Lines = {}
    for name, entry in record["metrics"][PART].items():
        if entry["status"] == "ok" and entry["kl_mean"] > 0 and entry.get("family") != "floor":
            lines.setdefault(stem(name), []).append((entry["bits_per_element"], entry["kl_mean"]))
    return {name: sorted(points) for name, points in lines.items()}


def latency(record: dict[str, Any]) -> Lines:
    """Median milliseconds of a decoding step over cached tokens."""
    return {
        name: [(int(n), entry["milliseconds"]["median"]) for n, entry in per_length.items() if n.isdigit()]
        for name, per_length in record["metrics"].items()
    }


def memory(record: dict[str, Any]) -> Lines:
    """Bytes of the cache over cached tokens."""
    return {
        name: [(int(n), entry["cache_bytes"]) for n, entry in per_length.items() if n.isdigit()]
        for name, per_length in record["metrics"].items()
    }


KL_BITS = (kl_bits, "bits per element, codes and scales", "mean KL to dense, nats per token", False)

FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Lines], str, str, bool]] = {
    "kl-bits": ("fidelity-smollm2-135m", *KL_BITS),
    "kl-bits-gemma3-270m": ("fidelity-gemma3-270m", *KL_BITS),
    "kl-bits-qwen2.5-coder-1.5b": ("fidelity-qwen2.5-coder-1.5b", *KL_BITS),
    "kl-bits-wiki11m": ("fidelity", *KL_BITS),
    "decode-latency": ("decode-latency", latency, "cached tokens", "milliseconds per decoding step", True),
    "memory-ladder": ("decode-latency", memory, "cached tokens", "bytes of the cache", True),
}
"""Suite of the record, what is drawn, axis labels, and whether the x axis is logarithmic."""


def digest(name: str, lines: Lines) -> str:
    """What identifies a figure: the hash of everything that it shows."""
    content = json.dumps([VERSION, name, FIGURES[name][2:], lines])
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def is_current(path: Path, name: str, lines: Lines) -> bool:
    """Whether a file shows these data."""
    return path.is_file() and digest(name, lines) in path.read_text(encoding="utf-8")


def draw(path: Path, name: str, lines: Lines) -> None:
    """Draw a figure into a file, complete or not at all.

    Args:
        path: The file.
        name: Name of the figure.
        lines: Points by family.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    _, _, x_label, y_label, log_x = FIGURES[name]
    style = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        markers = "osv^D<>pPX*hd"
        for number, (family, points) in enumerate(lines.items()):
            ours = family == "spectral"
            axes.plot(
                *zip(*points, strict=True),
                marker=markers[number % len(markers)],
                markersize=5,
                linewidth=2.5 if ours else 1.0,
                color="black" if ours else None,
                zorder=3 if ours else 2,
                label=family,
            )
        axes.set_yscale("log")
        if log_x:
            axes.set_xscale("log", base=2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(True, which="both" if not log_x else "major", linewidth=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Identifier": digest(name, lines)}
        )
        pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())
