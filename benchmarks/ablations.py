"""What each choice of the codec is worth on wiki11m: every ablation on the same text, at 2, 3 and 4 bits.

Statistics are gathered once, with a checkpoint at every number of calibration tokens; everything else is solved from
them. An interrupted run goes on at the last checkpoint and behind the last variant measured.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablation_codecs import GainCodec, codec_cache, fitted_books, with_books
from ablation_statistics import FRAMES, SEQUENCE, AblationStatistics, Choice, gather
from fidelity import CHUNK, SINKS, read, tokenized
from records import ROOT, Cells, write_record
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import Cache, PreTrainedModel

from quantcache import Calibration, SpectralCache, compat, data
from quantcache.allocation import allocate_layers
from quantcache.artifact import CodecSettings, Metadata, Rate
from quantcache.cli.session import load_model
from quantcache.evaluation import Method, measure_fidelity, parse_methods

SEARCHED = CodecSettings().gain_search
CHECKPOINTS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)


@dataclass(frozen=True)
class Variant:
    """One row of an ablation: everything that differs from the default is given.

    Attributes:
        choice: How transforms are made.
        codec: What the codes mean.
        joint: One budget for everything; otherwise one for each side of each layer.
        offsets: Bits that keys and values have more than the rate, each with a budget of its own; None shares one.
        min_bits: Smallest width.
        floor: No layer gets fewer bits than this on the mean, in bits below the rate; None lets them.
        sinks: First tokens kept.
        tokens: Calibration tokens; the default number if None.
        gain: None for ours; otherwise (kind, bits) of a simulated gain.
        books: Whether codebooks are fitted to the calibration text.
    """

    choice: Choice = field(default_factory=Choice)
    codec: CodecSettings = field(default_factory=CodecSettings)
    joint: bool = True
    offsets: tuple[float, float] | None = None
    min_bits: int = 0
    floor: float | None = None
    sinks: int = SINKS
    tokens: int | None = None
    gain: tuple[str, int] | None = None
    books: bool = False


def ablations() -> dict[str, dict[str, Variant]]:
    """Every ablation: its rows by name, the default among them."""
    default = Variant()
    apart = replace(default, joint=False)

    def codec(**more: Any) -> Variant:
        return Variant(codec=replace(CodecSettings(), **more))

    def frame(name: str) -> Variant:
        return Variant(choice=Choice(frame=name), codec=CodecSettings(fast_wavelength=FRAMES[name]))

    return {
        "metric": {
            "fisher, joint budget": default,
            "fisher": apart,
            "query, output projection": replace(apart, choice=Choice(key_metric="query", value_metric="output")),
            "identity": replace(apart, choice=Choice(key_metric="identity", value_metric="identity")),
        },
        "value-metric": {
            "fisher": apart,
            "output projection": replace(apart, choice=Choice(value_metric="output")),
            "eigenbasis of VᵀαᵀαV": replace(apart, choice=Choice(value_metric="gram")),
            "identity": replace(apart, choice=Choice(value_metric="identity")),
        },
        "key-shrinkage": {
            f"{s:g}": replace(default, choice=Choice(key_shrinkage=s)) for s in (0.0, 0.005, 0.02, 0.1, 0.3, 1.0)
        },
        "value-shrinkage": {
            f"{s:g}": replace(default, choice=Choice(value_shrinkage=s))
            for s in (0.0, 0.005, 0.02, 0.1, 0.3, 1.0, 10.0)
        },
        "frame": {
            {"post": "as cached", "full": "fully un-rotated"}.get(name, f"split at wavelength {name}"): frame(name)
            for name in FRAMES
        },
        "group-size": {str(size): codec(group_size=size) for size in (1, 2, 4, 8, 16, 32)},
        "profile": {
            f"per {profile}, groups of {size}": codec(profile=profile, group_size=size)
            for profile in ("head", "layer")
            for size in (4, 8, 16)
        },
        "gain": {
            "none": replace(default, gain=("none", 0)),
            "plain": replace(default, gain=("plain", 8)),
            "corrected": codec(gain_search=(1.0,)),
            "searched, 3 factors": codec(gain_search=(0.7, 0.9, 1.1)),
            "searched, 5 factors": default,
            "searched, 9 factors": codec(gain_search=tuple(0.5 + 0.1 * step for step in range(9))),
        },
        "gain-bits": {f"{bits}": replace(default, gain=("searched", bits)) for bits in (4, 6, 8, 16)},
        "codebooks": {"Gaussian": default, "fitted": replace(default, books=True)},
        "min-width": {f"{bits}": replace(default, min_bits=bits) for bits in (0, 1)},
        "layer-floor": {
            "none": default,
            "half a bit below": replace(default, floor=0.5),
            "a quarter below": replace(default, floor=0.25),
        },
        "split": {
            "joint": default,
            "equal": replace(default, offsets=(0.0, 0.0)),
            "keys +½, values −½": replace(default, offsets=(0.5, -0.5)),
            "keys −½, values +½": replace(default, offsets=(-0.5, 0.5)),
        },
        "sinks": {f"{count}": replace(default, sinks=count) for count in (0, 1, 2, 4, 8, 16)},
        "calibration-tokens": {f"{count:,}": replace(default, tokens=count) for count in CHECKPOINTS},
    }


def main() -> None:
    """Gather statistics, measure every variant and write a record."""
    options = parse_arguments()
    model, tokenizer = load_model("wiki11m", device="cpu", dtype="float32")
    calibration_text, calibration_source = read("wiki_calib.txt", data.calibration_text)
    evaluation_text, evaluation_source = read("wiki_eval.txt", data.evaluation_text)
    if calibration_text == evaluation_text:
        sys.exit("error: calibration and evaluation text are the same")
    chosen = {name: rows for name, rows in ablations().items() if not options.only or name in options.only}
    unknown = set(options.only) - set(chosen)
    if unknown:
        sys.exit(f"error: there is no ablation {', '.join(sorted(unknown))}: known are {', '.join(ablations())}")
    checkpoints = [count for count in CHECKPOINTS if count <= options.max_tokens]
    calibration_tokens = tokenized(tokenizer, calibration_text, checkpoints[-1])
    tokens = tokenized(tokenizer, evaluation_text, options.windows * options.context)
    settings = {
        "model": "wiki11m",
        "dtype": "float32",
        "rates": options.rates,
        "context": options.context,
        "windows": options.windows,
        "chunk": CHUNK,
        "residual": 0,
        "calibration": {
            "source": calibration_source,
            "tokens": min(options.calibration_tokens, checkpoints[-1]),
            "seq_len": SEQUENCE,
            "seed": 0,
            "text_sha256": hashlib.sha256(calibration_text.encode()).hexdigest(),
        },
        "evaluation": {
            "source": evaluation_source,
            "tokens": len(tokens),
            "text_sha256": hashlib.sha256(evaluation_text.encode()).hexdigest(),
        },
    }
    cells = Cells("ablations", {**settings, "max_tokens": options.max_tokens})
    print(f"finished cells: {cells.folder.relative_to(ROOT)}", file=sys.stderr)
    out = Console(width=None if sys.stdout.isatty() else 120)
    metrics: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("statistics", total=checkpoints[-1])
        paths = gather(model, calibration_tokens, checkpoints, cells, lambda count: bar.advance(task, count))
        bar.update(task, completed=checkpoints[-1])
        bench = Bench(model, paths, settings["calibration"]["tokens"], calibration_tokens, tokens, options)
        task = bar.add_task("measuring", total=sum(len(rows) for rows in chosen.values()))
        for name, rows in chosen.items():
            metrics[name] = {}
            for row, variant in rows.items():
                if variant.tokens is None or variant.tokens in paths:
                    # Named by what it is, so that a variant of several ablations is measured once.
                    key = hashlib.sha256(repr(variant).encode()).hexdigest()[:16]
                    metrics[name][row] = cells.get(f"variant-{key}", lambda variant=variant: bench.measure(variant))
                bar.advance(task)
            out.print(table(name, metrics[name], options.rates))
    path = write_record("ablations", settings, metrics, cells.git)
    cells.discard()
    print(f"record: {path.relative_to(ROOT)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="ablations to run; all by default")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 3.0, 4.0], help="mean code widths")
    parser.add_argument("--context", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=2, help="windows of the evaluation text")
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="tokens of all other ablations")
    parser.add_argument("--max-tokens", type=int, default=CHECKPOINTS[-1], help="calibration tokens to gather at most")
    options = parser.parse_args()
    if options.max_tokens < CHECKPOINTS[0] or options.calibration_tokens not in CHECKPOINTS:
        parser.error(f"calibration tokens must be among {', '.join(map(str, CHECKPOINTS))}, and at most --max-tokens")
    return options


class Bench:
    """Measures variants on one text.

    Args:
        model: The model.
        paths: Statistics by number of tokens.
        default_tokens: Calibration tokens of a variant that names none.
        calibration_tokens: The calibration text's tokens, for fitted codebooks.
        tokens: The evaluation text's.
        options: ``rates``, ``context``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        paths: dict[int, Path],
        default_tokens: int,
        calibration_tokens: Any,
        tokens: Any,
        options: argparse.Namespace,
    ):
        self.model, self.paths, self.default_tokens = model, paths, default_tokens
        self.calibration_tokens, self.tokens, self.options = calibration_tokens, tokens, options
        self.statistics = AblationStatistics(model)

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Fidelity of a variant at every rate, by rate."""
        if self.statistics.tokens != (wanted := variant.tokens or self.default_tokens):
            self.statistics.load(self.paths[wanted])
        calibration = Calibration(
            self.statistics.solve(variant.choice),
            Metadata(cache_config=compat.cache_config(self.model.config), codec=variant.codec, joint=variant.joint),
        )
        methods = [
            Method(f"{rate:g}", "ours", False, self._maker(variant, calibration, rate)) for rate in self.options.rates
        ]
        methods += parse_methods(["dense"], self.model.config, None)
        results = measure_fidelity(
            self.model, self.tokens, methods, context=self.options.context, chunk=CHUNK, sink_length=variant.sinks
        )
        return {name: result.to_dict() for name, result in results.items() if name != "dense"}

    def _maker(self, variant: Variant, calibration: Calibration, rate: float) -> Callable[[], Cache]:
        allocated = allocate(variant, calibration, rate)
        if variant.gain is None and not variant.books:
            return lambda: SpectralCache(allocated, self.model.config, sink_length=variant.sinks, residual_length=0)
        if variant.gain is not None:
            kind, bits = variant.gain
            return codec_cache(
                allocated, self.model.config, lambda codec: GainCodec(codec, kind, bits), variant.sinks, 0
            )
        books = fitted_books(self.model, allocated, self.calibration_tokens[:SEQUENCE])
        return codec_cache(allocated, self.model.config, lambda codec: with_books(codec, books), variant.sinks, 0)


def allocate(variant: Variant, calibration: Calibration, rate: float) -> Calibration:
    """Give a calibration its widths.

    Args:
        variant: Budgets, smallest width and floor.
        calibration: Without widths.
        rate: Mean width.

    Returns:
        With widths.
    """
    key_bits, value_bits = ("joint", "joint") if variant.offsets is None else (rate + o for o in variant.offsets)
    allocated = calibration.with_bits(rate, key_bits=key_bits, value_bits=value_bits, min_bits=variant.min_bits)
    if variant.floor is None:
        return allocated
    # Layers below the floor get a budget of their own at the floor; the others share what is left, until none is below.
    floor, raised = rate - variant.floor, set[int]()
    while True:
        below = {i for i, layer in allocated.layers.items() if i not in raised and mean_width(layer) < floor - 1e-9}
        if not below:
            return allocated
        raised |= below
        free = {i: layer for i, layer in calibration.layers.items() if i not in raised}
        # All layers of this model hold equally many elements.
        left = (rate * len(calibration.layers) - floor * len(raised)) / max(len(free), 1)
        layers = allocate_layers(free, Rate(left), variant.codec, True)
        for index in raised:
            layers |= allocate_layers({index: calibration.layers[index]}, Rate(floor), variant.codec, True)
        allocated = Calibration(layers, replace(calibration.metadata, rate=Rate(rate)))


def mean_width(layer: Any) -> float:
    """Mean width of a layer's coefficients, keys and values together."""
    widths = [side.widths.double().mean() for side in (layer.key, layer.value)]
    return float(sum(widths)) / len(widths)


def table(name: str, rows: dict[str, Any], rates: list[float]) -> Table:
    """An ablation for people: mean KL at every rate."""
    columns = [f"{rate:g} bits" for rate in rates]
    result = Table(name, *columns, title="Mean KL (bits per element)")
    for column in result.columns[1:]:
        column.justify = "right"
    for row, found in rows.items():
        cells = [
            f"{entry['kl_mean']:.5f} ({entry['bits_per_element']:.3f})" if entry["status"] == "ok" else entry["status"]
            for entry in found.values()
        ]
        result.add_row(row, *cells)
    return result


if __name__ == "__main__":
    main()
