"""What each choice of the codec is worth: every ablation on the same text, at 2, 3 and 4 bits.

Statistics are gathered once, with a checkpoint at every number of calibration tokens; everything else is solved from
them. An interrupted run goes on at the last checkpoint and behind the last variant measured.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ablation_codecs import AnchorCodec, GainCodec, codec_cache, fitted_books, with_books
from ablation_statistics import ANCHORS, FRAMES, SEQUENCE, WAVELENGTHS, AblationStatistics, Choice, gather
from fidelity import CHUNK, SINKS, read, tokenized
from records import ROOT, Run, suite_of, write_record
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import Cache, PreTrainedModel

from quantcache import Calibration, SpectralCache, data
from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import CodecSettings, LayerCalibration, Metadata, Rate
from quantcache.cli.session import load_model
from quantcache.coding.allocation import allocate_layers
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codebook import gaussian_codebook
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import MAX_WIDTH
from quantcache.coding.rope import ANCHOR_LENGTH
from quantcache.coding.schema import SIDES
from quantcache.common import compat
from quantcache.common.sources import MODEL_HELP
from quantcache.data import BUNDLED_MODEL
from quantcache.evaluation import Method, measure_fidelity, parse_methods
from quantcache.evaluation.provenance import model_sha256

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
        key_min_bits: Smallest width of the keys, with the joint budget; that of all if None.
        floor: No layer gets fewer bits than this on the mean, in bits below the rate; None lets them.
        sinks: First tokens kept.
        tokens: Calibration tokens; the default number if None.
        gain: None for ours; otherwise (kind, bits) of a simulated gain, or (kind, bits, steps per octave).
        books: Whether codebooks are fitted to the calibration text.
    """

    choice: Choice = field(default_factory=Choice)
    codec: CodecSettings = field(default_factory=CodecSettings)
    joint: bool = True
    offsets: tuple[float, float] | None = None
    min_bits: int = 0
    key_min_bits: int | None = None
    floor: float | None = None
    sinks: int = SINKS
    tokens: int | None = None
    gain: tuple[str, int] | tuple[str, int, int] | None = None
    books: bool = False


def ablations() -> dict[str, dict[str, Variant]]:
    """Every ablation: its rows by name, the default among them."""
    default = Variant()
    apart = replace(default, joint=False)

    def codec(**more: Any) -> Variant:
        return Variant(codec=replace(CodecSettings(), **more))

    def frame(name: str) -> Variant:
        return Variant(choice=Choice(frame=name), codec=replace(default.codec, fast_wavelength=FRAMES[name][0]))

    searches = {len(factors): factors for factors in ((0.7, 0.9, 1.1), tuple(0.5 + 0.1 * step for step in range(9)))}
    searches[len(default.codec.gain_search)] = default.codec.gain_search
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
            for name in WAVELENGTHS
        },
        "anchor-length": {
            str(length): frame(ANCHORS[length]) if length in ANCHORS else default
            for length in sorted((*ANCHORS, ANCHOR_LENGTH))
        },
        "group-size": {str(size): codec(group_size=size) for size in (1, 2, 4, 8, 16, 32)},
        "profile": {
            f"per {profile}, groups of {size}": codec(profile=profile, group_size=size)
            for profile in ("head", "layer")
            for size in (2, 4, 8)
        },
        "gain": {
            "none": replace(default, gain=("none", 0)),
            "plain": replace(default, gain=("plain", 8)),
            "corrected": codec(gain_search=(1.0,)),
            **{f"searched, {n} factors": codec(gain_search=searches[n]) for n in sorted(searches)},
        },
        "gain-bits": {f"{bits}": replace(default, gain=("searched", bits)) for bits in (4, 6, 8, 16)},
        "gain-steps": {f"{steps}": replace(default, gain=("searched", 8, steps)) for steps in (4, 8, 16, 32, 64)},
        "codebooks": {"Gaussian": default, "fitted": replace(default, books=True)},
        "min-width": {
            "0": default,
            "1 for keys": replace(default, key_min_bits=1),
            "1": replace(default, min_bits=1),
        },
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
    model, tokenizer = load_model(options.model, device="cpu", dtype="float32")
    name = Path(options.model).name
    limit = compat.position_limit(model.config) or options.context or SEQUENCE
    context = options.context or min(SEQUENCE, limit)
    if context > limit:
        sys.exit(f"error: context {context} exceeds the model's limit of {limit} positions")
    calibration_text, calibration_source = read("wiki_calib.txt", data.calibration_text)
    evaluation_text, evaluation_source = read("wiki_eval.txt", data.evaluation_text)
    if calibration_text == evaluation_text:
        sys.exit("error: calibration and evaluation text are the same")
    chosen = {name: rows for name, rows in ablations().items() if not options.only or name in options.only}
    unknown = set(options.only) - set(chosen)
    if unknown:
        sys.exit(f"error: unknown ablation {', '.join(sorted(unknown))}: known are {', '.join(ablations())}")
    checkpoints = [count for count in CHECKPOINTS if count <= options.max_tokens]
    calibration_tokens = tokenized(tokenizer, calibration_text, checkpoints[-1])
    tokens = tokenized(tokenizer, evaluation_text, options.windows * context)
    settings = {
        "model": name,
        "model_sha256": model_sha256(model),
        "dtype": "float32",
        "rates": options.rates,
        "context": context,
        "windows": options.windows,
        "chunk": CHUNK,
        "residual": 0,
        "calibration": {
            "source": calibration_source,
            "tokens": min(options.calibration_tokens, checkpoints[-1]),
            "seq_len": min(SEQUENCE, limit),
            "seed": 0,
            "text_sha256": hashlib.sha256(calibration_text.encode()).hexdigest(),
        },
        "evaluation": {
            "source": evaluation_source,
            "tokens": len(tokens),
            "text_sha256": hashlib.sha256(evaluation_text.encode()).hexdigest(),
        },
    }
    suite = suite_of("ablations", options.model)
    run = Run(suite, {**settings, "max_tokens": options.max_tokens})
    print(f"finished cells: {run.folder.relative_to(ROOT)}", file=sys.stderr)
    out = Console(width=None if sys.stdout.isatty() else 120)
    metrics: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("statistics", total=checkpoints[-1])
        done = partial(bar.advance, task)
        paths = gather(model, calibration_tokens, checkpoints, run.folder, done, settings["calibration"]["seq_len"])
        bar.update(task, completed=checkpoints[-1])
        bench = Bench(model, paths, settings, calibration_tokens, tokens)
        task = bar.add_task("measuring", total=sum(len(rows) for rows in chosen.values()))
        for ablation, rows in chosen.items():
            metrics[ablation] = {}
            for row, variant in rows.items():
                if variant.tokens is None or variant.tokens in paths:
                    # Named by what it is, so that a variant of several ablations is measured once.
                    key = hashlib.sha256(repr(variant).encode()).hexdigest()[:16]
                    metrics[ablation][row] = run.cell(f"variant-{key}", partial(bench.measure, variant))
                bar.advance(task)
            out.print(table(ablation, metrics[ablation], options.rates))
    path = write_record(suite, settings, metrics, run.git)
    run.discard()
    print(f"record: {path.relative_to(ROOT)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=BUNDLED_MODEL, help=f"{MODEL_HELP} The record's suite is named after it.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="ablations to run; all by default")
    parser.add_argument("--bits", dest="rates", type=float, nargs="+", default=[2.0, 3.0, 4.0], help="mean code widths")
    parser.add_argument("--context", type=int, help=f"tokens in a window; by default {SEQUENCE} or the model's limit")
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
        settings: The record's.
        calibration_tokens: The calibration text's tokens, for fitted codebooks.
        tokens: The evaluation text's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        paths: dict[int, Path],
        settings: dict[str, Any],
        calibration_tokens: Tensor,
        tokens: Tensor,
    ):
        self.model, self.paths, self.settings = model, paths, settings
        self.calibration_tokens, self.tokens = calibration_tokens, tokens
        self.statistics = AblationStatistics(model)

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Fidelity of a variant at every rate, by rate."""
        if self.statistics.tokens != (wanted := variant.tokens or self.settings["calibration"]["tokens"]):
            self.statistics.load(self.paths[wanted])
        calibration = Calibration(
            self.statistics.solve(variant.choice),
            Metadata(
                cache_config=cache_layout.cache_config(self.model.config), codec=variant.codec, joint=variant.joint
            ),
        )
        methods = [
            Method(f"{rate:g}", "ours", False, self._maker(variant, calibration, rate))
            for rate in self.settings["rates"]
        ]
        methods += parse_methods(["dense"], self.model.config, None)
        results = measure_fidelity(
            self.model,
            self.tokens,
            methods,
            context=self.settings["context"],
            chunk=CHUNK,
            sink_length=variant.sinks,
        )
        return {name: result.to_dict() for name, result in results.items() if name != "dense"}

    def _maker(self, variant: Variant, calibration: Calibration, rate: float) -> Callable[[], Cache]:
        allocated = allocate(variant, calibration, rate)
        if (change := self._change(variant, allocated)) is None:
            return lambda: SpectralCache(allocated, self.model.config, sink_length=variant.sinks, residual_length=0)
        return codec_cache(allocated, self.model.config, change, variant.sinks, 0)

    def _change(self, variant: Variant, allocated: Calibration) -> Callable[[SpectralCodec], SideCodec] | None:
        """What a variant's codec has that ours has not."""
        if variant.gain is not None:
            return lambda codec: GainCodec(codec, *variant.gain)
        if variant.books:
            books = fitted_books(
                self.model, allocated, self.calibration_tokens[: self.settings["calibration"]["seq_len"]]
            )
            return lambda codec: with_books(codec, books)
        _, anchor_length = FRAMES[variant.choice.frame]
        return None if anchor_length == ANCHOR_LENGTH else lambda codec: AnchorCodec(codec, anchor_length)


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
    if variant.key_min_bits is not None:
        return with_key_minimum(calibration, rate, variant.key_min_bits)
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


def with_key_minimum(calibration: Calibration, rate: float, key_min_bits: int) -> Calibration:
    """The least distortion with a smallest width of the keys' own, found by trying how to share the budget.

    Args:
        calibration: Without widths; as many key as value elements.
        rate: Mean width over keys and values together.
        key_min_bits: Smallest width of the keys; that of the values is 0.

    Returns:
        With widths.
    """
    least, most = float(key_min_bits), min(2 * rate, MAX_WIDTH)
    for step in (1 / 4, 1 / 32):  # the cost is convex in the share: a fine search around the best of a coarse one
        count = round((most - least) / step)
        found = [_shared_out(calibration, rate, least + step * i, key_min_bits) for i in range(count + 1)]
        _, share, layers = min(found, key=lambda entry: entry[0])
        least, most = max(least, share - step), min(most, share + step)
    return Calibration(layers, replace(calibration.metadata, rate=Rate(rate)))


def _shared_out(
    calibration: Calibration, rate: float, key_rate: float, key_min_bits: int
) -> tuple[float, float, dict[int, LayerCalibration]]:
    """Cost, mean width of the keys, and layers with widths; values get what the keys leave."""
    value_rate = min(2 * rate - key_rate, MAX_WIDTH)
    keys = calibration.with_bits(key_rate, key_bits=key_rate, value_bits=None, min_bits=key_min_bits)
    values = calibration.with_bits(value_rate, key_bits=None, value_bits=value_rate)
    layers = {index: replace(layer, value=values.layers[index].value) for index, layer in keys.layers.items()}
    return distortion(layers), key_rate, layers


def distortion(layers: dict[int, LayerCalibration]) -> float:
    """What the widths cost, in the metric: the sum over coefficients of variance times the width's distortion."""
    by_width = torch.tensor([gaussian_codebook(width).distortion for width in range(MAX_WIDTH + 1)]).double()
    sides = [layer.side(side) for layer in layers.values() for side in SIDES]
    return sum(float((side.spectrum.double() * by_width[side.widths.long()]).sum()) for side in sides)


def mean_width(layer: LayerCalibration) -> float:
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
