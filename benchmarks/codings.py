"""Trellis coding beside scalar coding, with the same calibration: fidelity on a text, encoding and decoding times.

python benchmarks/codings.py [MODEL] [--calibration FOLDER]

Both codings, and rivals for scale, go through the real cache on the same windows, with nothing exact but the sinks.
The times are of one layer of the model's geometry; the two codings take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import torch
from inputs import study, study_parser
from records import Run, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quantcache import Calibration, SpectralCache, data
from quantcache.attention import spectral_attention
from quantcache.coding.schema import Coding
from quantcache.evaluation.fidelity import measure_fidelity
from quantcache.evaluation.methods import needs_statistics, parse_methods, text_statistics

RIVALS = "fp8,quanto-4,kivi-2,kivi-3,kivi-4,quarot-3,quarot-4,turboquant-mse-3,turboquant-mse-4,oscar-3,oscar-4"
CODINGS: tuple[Coding, ...] = get_args(Coding)


def main() -> None:
    """Measure, print and write the record."""
    parser = study_parser(__doc__, windows=4)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--rivals", default=RIVALS)
    parser.add_argument("--tokens", type=int, default=4096, help="of the layer that is timed")
    options = parser.parse_args()
    given = study("codings", options)
    run, model, calibration, tokens = given.run, given.model, given.calibration, given.tokens
    fidelity = {}
    for coding in CODINGS:
        names = [f"spectral-{bits:g}" for bits in options.bits]
        methods = parse_methods(names, model.config, calibration.with_coding(coding), residual_length=0)
        renamed = [replace(method, name=f"{method.name} {coding}") for method in methods]
        fidelity |= measured(run, coding, model, tokens, renamed, options.context)
    seen = cache(lambda: text_statistics(model, given.tokenizer, data.calibration_text(), options.calibration_tokens))
    for name in filter(None, options.rivals.split(",")):
        known = seen() if needs_statistics([name]) else None
        methods = parse_methods([name], model.config, None, residual_length=0, statistics=known)
        fidelity |= measured(run, name, model, tokens, methods, options.context)
    times = run.cell("times", lambda: timed(calibration, model, options.tokens))
    claims = claimed(fidelity, options.bits)
    show(fidelity, times, claims)
    metrics = {"fidelity": fidelity, "milliseconds": times, "claims": claims}
    write_record("codings", given.settings, metrics)
    run.discard()


def measured(run: Run, name: str, model: Any, tokens: Tensor, methods: list[Any], context: int) -> dict[str, Any]:
    """Results of some methods."""

    def measure() -> dict[str, Any]:
        return {n: r.to_dict() for n, r in measure_fidelity(model, tokens, methods, context=context).items()}

    found: dict[str, Any] = run.cell(name, measure)
    return found


def timed(calibration: Calibration, model: Any, tokens: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of encoding ``tokens`` tokens of a layer and of one decoding step on them, by coding."""
    index = min(calibration.layers)
    constants = calibration.layers[index]
    heads, dim, value_dim = constants.key.num_heads, constants.key.dim, constants.value.dim
    queries = model.config.get_text_config().num_attention_heads
    states = [torch.randn(1, heads, tokens, size, dtype=torch.float32) for size in (dim, value_dim)]
    query = torch.randn(1, queries, 1, dim, dtype=torch.float32)
    samples: dict[str, dict[str, list[float]]] = {c: {"encode": [], "step": []} for c in CODINGS}
    caches = {c: SpectralCache(calibration.with_coding(c), model.config, residual_length=0) for c in CODINGS}
    layers = {coding: cache.layers[index] for coding, cache in caches.items()}

    def clock(kept: list[float], work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        kept.append(1e3 * (time.perf_counter() - started))

    for _ in range(6):
        for coding, layer in layers.items():
            layer.reset()
            layer.update(*states)
            clock(samples[coding]["encode"], layer.flush)
    views = {coding: layer.snapshot() for coding, layer in layers.items()}
    for _ in range(60):
        for coding, view in views.items():
            clock(samples[coding]["step"], lambda view=view: spectral_attention(query, view, None))
    return {
        coding: {what: round(statistics.median(kept[1:]), 4) for what, kept in found.items()}
        for coding, found in samples.items()
    }


def claimed(fidelity: dict[str, Any], rates: list[float]) -> dict[str, Any]:
    """What the codings are to be held to: KL over scalar's, and over every rival's of up to one bit more."""
    kl = {name: entry["kl_mean"] for name, entry in fidelity.items() if entry["status"] == "ok"}
    bits = {name: fidelity[name]["bits_per_element"] for name in kl}
    found = {}
    for rate in rates:
        ours = f"spectral-{rate:g} trellis"
        near = [name for name in kl if bits[name] <= bits[ours] + 1 and not name.startswith("spectral")]
        found[f"{rate:g}"] = {
            "over_scalar": kl[ours] / kl[f"spectral-{rate:g} scalar"],
            "over_fp8": kl[ours] / kl["fp8"] if kl.get("fp8") else None,
            "over_rivals_within_a_bit": {name: kl[ours] / kl[name] for name in near},
        }
    return found


def show(fidelity: dict[str, Any], times: dict[str, Any], claims: dict[str, Any]) -> None:
    """The results for people."""
    table = Table("method", "bits/elt", "KL mean", "KL p99", "top-1")
    for name, entry in fidelity.items():
        if entry["status"] != "ok":
            table.add_row(name, entry["status"])
            continue
        mean, agreed = f"{entry['kl_mean']:.5f} ± {entry['kl_stderr']:.5f}", f"{entry['top1_agreement']:.2%}"
        table.add_row(name, f"{entry['bits_per_element']:.3f}", mean, f"{entry['kl_p99']:.4f}", agreed)
    console = Console()
    console.print(table)
    console.print(times)
    console.print(claims)


if __name__ == "__main__":
    main()
