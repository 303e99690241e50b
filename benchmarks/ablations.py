"""What each choice of the codec is worth: every ablation on the same text, at 2, 3 and 4 bits.

The default is the codec that new calibrations are made with; a row that names scalar codes differs in that too. Every
row is held against the default in pairs, stretch by stretch of the text, or against the ablation's first row where the
default is not among them.

Statistics are gathered once, of what the chosen ablations need, with a checkpoint at every number of calibration
tokens; everything else is solved from them. Some variants at a time share the dense cache's predictions. An interrupted
run goes on at the last checkpoint and behind the last variants measured.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ablation_codecs import AnchorCodec, GainCodec, codec_cache, fitted_books, with_books
from ablation_statistics import FRAMES, AblationStatistics, Needs, gather
from ablation_variants import CALIBRATION_TOKENS, CHECKPOINTS, Gathering, Variant, ablations, allocate
from fidelity import CHUNK
from inputs import read
from records import Run, suite_of, write_record
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import Cache, PreTrainedModel

from quantcache import Calibration, SpectralCache, data
from quantcache.artifact import cache_layout
from quantcache.calibration.data import LENGTH
from quantcache.cli.loading import load_model
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.rope import ANCHOR_LENGTH
from quantcache.coding.schema import Metadata
from quantcache.common import compat
from quantcache.common.defaults import RESIDUAL_LENGTH
from quantcache.common.sequences import leading_token, text_tokens
from quantcache.common.sources import MODEL_HELP
from quantcache.data import BUNDLED_MODEL
from quantcache.evaluation import summaries
from quantcache.evaluation.fidelity import STRETCH, measure_fidelity
from quantcache.evaluation.methods import Method, parse_methods
from quantcache.evaluation.provenance import model_sha256, text_sha256

CONTEXT = 2048
"""Tokens in a window, where nothing else is said and the model allows."""

GROUP = 8
"""Caches that are measured together: they share the dense cache's predictions."""


def main() -> None:
    """Gather statistics, measure every variant and write a record."""
    options = parse_arguments()
    model, tokenizer = load_model(options.model, device="cpu", dtype="float32")
    name = Path(options.model).name
    limit = compat.position_limit(model.config) or options.context or CONTEXT
    context = options.context or min(CONTEXT, limit)
    if context > limit:
        sys.exit(f"error: context {context} exceeds the model's limit of {limit} positions")
    calibration_text, calibration_source = read("wiki_calib.txt", data.calibration_text)
    evaluation_text, evaluation_source = read(options.text, data.evaluation_text)
    if calibration_text == evaluation_text:
        sys.exit("error: calibration and evaluation text are the same")
    tokens = text_tokens(tokenizer, evaluation_text, options.windows * context + 1)
    if len(tokens) <= options.windows * context:
        sys.exit(f"error: the text has {len(tokens)} tokens, {options.windows} windows of {context} need more")
    chosen = choose(options, model, leading_token(model.config, tokens) is not None)
    variants = list(dict.fromkeys(variant for rows in chosen.values() for variant in rows.values()))
    settings = {
        "model": name,
        "model_sha256": model_sha256(model),
        "dtype": "float32",
        "codec": asdict(Variant().codec),
        "rates": options.rates,
        "context": context,
        "windows": options.windows,
        "chunk": CHUNK,
        "stretch": STRETCH,
        "residual": options.residual,
        "calibration": {
            "source": calibration_source,
            "tokens": options.calibration_tokens,
            "seq_len": min(LENGTH, limit),
            "residual": RESIDUAL_LENGTH,
            "seed": 0,
            "text_sha256": text_sha256(calibration_text),
        },
        "evaluation": {
            "source": evaluation_source,
            "tokens": options.windows * context,
            "text_sha256": text_sha256(evaluation_text),
        },
    }
    suite = suite_of("ablations", options.model)
    run = Run(suite, settings)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        most = max(variant.tokens or options.calibration_tokens for variant in variants)
        calibration_tokens = text_tokens(tokenizer, calibration_text, most + 1)  # BOS may be left out
        bench = Bench(model, settings, calibration_tokens, tokens)
        bench.gather(variants, run.folder, bar)
        task = bar.add_task("measuring", total=len(variants))
        for group in groups([v for v in variants if not run.has(cell_name(v))], GROUP // len(options.rates) or 1):
            for variant, found in zip(group, bench.measure(group), strict=True):
                run.cell(cell_name(variant), lambda found=found: found)
            bar.update(task, completed=sum(run.has(cell_name(variant)) for variant in variants))
    measured = {variant: run.cell(cell_name(variant), dict) for variant in variants}
    metrics = {name: compared(rows, measured) for name, rows in chosen.items()}
    out = Console(width=None if sys.stdout.isatty() else 120)
    for ablation, found in metrics.items():
        out.print(table(ablation, found))
    write_record(suite, settings, metrics)
    run.discard()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=BUNDLED_MODEL, help=f"{MODEL_HELP} The record's suite is named after it.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="ablations to run; all by default")
    parser.add_argument("--rates", "--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0], help="mean code widths")
    parser.add_argument("--text", default="wiki_eval.txt", help="evaluation text, a file beside the checkout")
    parser.add_argument("--context", type=int, help=f"tokens in a window; by default {CONTEXT} or the model's limit")
    parser.add_argument("--residual", type=int, default=0, help="recent tokens that the caches keep as they are")
    parser.add_argument("--windows", type=int, default=2, help="windows of the evaluation text")
    parser.add_argument(
        "--calibration-tokens", type=int, default=CALIBRATION_TOKENS, help="tokens of all other ablations"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=CHECKPOINTS[-1], help="most of the calibration-tokens ablation"
    )
    options = parser.parse_args()
    if options.calibration_tokens not in CHECKPOINTS:
        parser.error(
            f"calibration tokens must be among {', '.join(map(str, CHECKPOINTS))}, got {options.calibration_tokens}"
        )
    return options


def choose(options: argparse.Namespace, model: PreTrainedModel, begins: bool) -> dict[str, dict[str, Variant]]:
    """The ablations that the command line asks for and the model allows.

    Args:
        options: Of the command line.
        model: The model.
        begins: Whether its tokenizer begins texts with BOS.

    Returns:
        Rows by ablation.
    """
    known = ablations(options.calibration_tokens, begins)
    if unknown := set(options.only) - set(known):
        sys.exit(f"error: unknown ablation {', '.join(sorted(unknown))}: known are {', '.join(known)}")
    most = max(options.max_tokens, options.calibration_tokens)
    known["calibration-tokens"] = {
        row: variant for row, variant in known["calibration-tokens"].items() if (variant.tokens or 0) <= most
    }
    if bos_token(model) is None:
        del known["bos"]
        if "bos" in options.only:
            sys.exit(f"error: {options.model} has no BOS token")
    return {name: rows for name, rows in known.items() if not options.only or name in options.only}


def bos_token(model: PreTrainedModel) -> int | None:
    """The model's BOS token, if it has one."""
    token: int | None = getattr(model.config.get_text_config(), "bos_token_id", None)
    return token


def begun(model: PreTrainedModel, tokens: Tensor, bos: bool | None) -> Tensor:
    """A text with BOS in front or without it, ``[N]``; as it is if None."""
    has = leading_token(model.config, tokens) is not None
    if bos is None or bos == has:
        return tokens
    return torch.cat((torch.tensor([bos_token(model)]), tokens)) if bos else tokens[1:]


def cell_name(variant: Variant) -> str:
    """A variant's cell: it is named by what it is, so that one of several ablations is measured once."""
    return f"variant-{hashlib.sha256(repr(variant).encode()).hexdigest()[:16]}"


def groups(variants: list[Variant], size: int) -> list[list[Variant]]:
    """Variants that share the dense cache's predictions, at most so many together."""
    by_reading: dict[tuple[int, bool | None], list[Variant]] = {}
    for variant in variants:
        by_reading.setdefault(variant.reads, []).append(variant)
    return [alike[i : i + size] for alike in by_reading.values() for i in range(0, len(alike), size)]


def compared(rows: dict[str, Variant], measured: dict[Variant, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results of an ablation, each with its mean KL over that of the row that it is held against.

    Args:
        rows: The ablation's.
        measured: Results at every rate, by variant.

    Returns:
        By row and rate; ``over`` names the other row and gives the ratio with its error, in pairs of stretches. The
        row that all are held against has none.
    """
    basis = next((row for row, variant in rows.items() if variant == Variant()), next(iter(rows)))
    found: dict[str, dict[str, Any]] = {}
    for row, variant in rows.items():
        found[row] = {}
        for rate, entry in measured[variant].items():
            other = measured[rows[basis]][rate]
            found[row][rate] = dict(entry)
            stretches = [each.get("kl_stretches") or [] for each in (entry, other)]
            if row != basis and all(stretches) and sum(stretches[1]) > 0:
                found[row][rate]["over"] = {"to": basis, **summaries.ratio(*stretches)}
    return found


class Bench:
    """Measures variants on one text.

    Args:
        model: The model.
        settings: The record's.
        calibration_tokens: The calibration text's tokens.
        tokens: The evaluation text's.
    """

    def __init__(self, model: PreTrainedModel, settings: dict[str, Any], calibration_tokens: Tensor, tokens: Tensor):
        self.model, self.settings = model, settings
        self.calibration_tokens, self.tokens = calibration_tokens, tokens
        self.needs = Needs()
        self.paths: dict[Gathering, dict[int, Path]] = {}
        self.loaded: tuple[Path, AblationStatistics] | None = None

    def gather(self, variants: list[Variant], folder: Path, bar: Progress) -> None:
        """Gather the statistics that variants are solved from, into files."""
        self.needs = Needs.of(variant.choice for variant in variants)
        for how in dict.fromkeys(variant.gathering for variant in variants):
            counts = sorted({self._tokens(variant) for variant in variants if variant.gathering == how})
            task = bar.add_task("statistics", total=counts[-1])
            self.paths[how] = gather(
                self.model,
                begun(self.model, self.calibration_tokens, how.bos),
                counts,
                folder,
                partial(bar.advance, task),
                how.seq_len or self.settings["calibration"]["seq_len"],
                self.needs,
                self.settings["calibration"]["residual"] if how.residual_length is None else how.residual_length,
            )
            bar.update(task, completed=counts[-1])

    def measure(self, variants: list[Variant]) -> list[dict[str, Any]]:
        """Fidelity of some variants that read alike, each at every rate, by rate."""
        rates, context = self.settings["rates"], self.settings["context"]
        sinks, bos = variants[0].reads
        methods = []
        for number, variant in enumerate(variants):
            calibration = self._calibration(variant)
            methods += [
                Method(f"{number} at {rate:g}", "ours", False, self._maker(variant, calibration, rate))
                for rate in rates
            ]
        tokens = begun(self.model, self.tokens, bos)
        shared = self.settings["windows"] if leading_token(self.model.config, tokens) is not None else 1
        tokens = tokens[: self.settings["windows"] * context + 1 - shared]
        stretches: dict[str, list[float]] = {}

        def keep(name: str, kl: Tensor) -> None:
            means = [
                stretch.mean(1) for stretch in kl.view(-1, context).tensor_split(max(1, context // STRETCH), dim=1)
            ]
            stretches[name] = [float(f"{mean:.5g}") for mean in torch.stack(means, dim=1).flatten().tolist()]

        results = measure_fidelity(
            self.model,
            tokens,
            [*methods, *parse_methods(["dense"], self.model.config, None)],
            context=context,
            chunk=CHUNK,
            sink_length=sinks,
            on_divergence=keep,
        )
        dense = {"dense_perplexity": results["dense"].perplexity}
        return [
            {
                f"{rate:g}": results[name].to_dict() | {"kl_stretches": stretches.get(name, [])} | dense
                for rate in rates
                for name in (f"{number} at {rate:g}",)
            }
            for number in range(len(variants))
        ]

    def _tokens(self, variant: Variant) -> int:
        """Tokens that a variant is calibrated on."""
        count: int = variant.tokens or self.settings["calibration"]["tokens"]
        return count

    def _calibration(self, variant: Variant) -> Calibration:
        """A variant's transforms, without widths."""
        path = self.paths[variant.gathering][self._tokens(variant)]
        if self.loaded is None or self.loaded[0] != path:
            statistics = AblationStatistics(self.model, self.needs) if self.loaded is None else self.loaded[1]
            statistics.load(path)
            self.loaded = path, statistics
        return Calibration(
            self.loaded[1].solve(variant.choice),
            Metadata(
                cache_config=cache_layout.cache_config(self.model.config), codec=variant.codec, joint=variant.joint
            ),
        )

    def _maker(self, variant: Variant, calibration: Calibration, rate: float) -> Callable[[], Cache]:
        allocated, residual = allocate(variant, calibration, rate), self.settings["residual"]
        if (change := self._change(variant, allocated)) is None:
            lengths = {"sink_length": variant.sinks, "residual_length": residual}
            return lambda: SpectralCache(allocated, self.model.config, **lengths)
        return codec_cache(allocated, self.model.config, change, variant.sinks, residual)

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


def table(name: str, rows: dict[str, Any]) -> Table:
    """An ablation for people: mean KL at every rate, and over that of the row it is held against."""
    columns = [f"{rate} bits" for rate in next(iter(rows.values()))]
    result = Table(name, *columns, title="Mean KL (bits per element): over the row without a ratio")
    for column in result.columns[1:]:
        column.justify = "right"
    for row, found in rows.items():
        result.add_row(row, *map(_cell, found.values()))
    return result


def _cell(entry: dict[str, Any]) -> str:
    if entry["status"] != "ok":
        return str(entry["status"])
    over = entry.get("over")
    ratio = f": {over['ratio']:.3f} ± {over['stderr'] or 0:.3f}" if over else ""
    return f"{entry['kl_mean']:.5f} ({entry['bits_per_element']:.3f}){ratio}"


if __name__ == "__main__":
    main()
