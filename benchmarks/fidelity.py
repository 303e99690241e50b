"""What compressing a model's cache does to its predictions: every method on the same text.

Parts: all methods with a residual window and without; all with the sinks and the residual that their authors
recommend; a choice of them at shorter contexts, and on WikiText-2 in sliding windows; ours on models with quantized
weights. A part is measured a few methods
at a time, and an interrupted run goes on behind the last ones measured.

Calibration and evaluation texts are the larger ones beside the checkout where they are to be had, and those that come
with the package otherwise; the record says which.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inputs import BITS, SHARED, WIKITEXT, calibrated, read
from records import Run, suite_of, write_record
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache import Calibration, data
from quantcache.artifact.prediction import predict_kl
from quantcache.cli.loading import load_model
from quantcache.coding.schema import Rate
from quantcache.common import compat
from quantcache.common.sequences import cut_windows, text_tokens
from quantcache.common.sources import MODEL_HELP
from quantcache.data import BUNDLED_MODEL
from quantcache.evaluation.fidelity import FidelityResult, measure_fidelity
from quantcache.evaluation.methods import SCHEMES, RivalStatistics, needs_statistics, parse_methods, text_statistics
from quantcache.evaluation.provenance import calibration_sha256, check_overlap, model_sha256, text_sha256
from quantcache.evaluation.weights import KINDS, quantize_weights, weights_library

SINKS = 4
CHUNK = 64
BATCH = 4
"""Methods measured together: they share the dense cache's predictions."""

CHOICE = (
    "dense,spectral-1,spectral-1.5,spectral-2,spectral-3,spectral-4,quanto-4,kivi-2,kivi-4,quarot-3,turboquant-mse-3,"
    "oscar-2,oscar-3,pca-3.125"
)
"""Methods measured at other contexts and on WikiText-2."""

OURS = "dense,spectral-2,spectral-3,spectral-4"
"""Methods measured on models with quantized weights."""

WIKITEXT_WINDOW = 1024
HELD_OUT = "wiki_eval.txt"
"""Text of the calibration's kind that it has not seen."""


@dataclass(frozen=True)
class Part:
    """One table of the record.

    Attributes:
        name: Its key in the record.
        methods: Names of the methods.
        tokens: The text.
        context: Tokens in a window.
        residual: Recent tokens kept; None for what each method's authors recommend.
        stride: Tokens by which windows slide, None if they do not overlap.
        weights: What the model's weights are quantized to (:func:`quantcache.evaluation.weights.quantize_weights`); the
            dense cache of that model is then the reference, the calibration that of the unquantized one.
        text: SHA-256 of the text where it is not the evaluation text.
    """

    name: str
    methods: str
    tokens: Tensor
    context: int
    residual: int | None
    stride: int | None = None
    weights: str | None = None
    text: str | None = None


def main() -> None:
    """Measure, print a table for each part and write a record."""
    options = parse_arguments()
    model, tokenizer = load_model(options.model, device="cpu", dtype="float32")
    suite = suite_of("fidelity", options.model)
    calibration_text, calibration_source = read("wiki_calib.txt", data.calibration_text)
    evaluation_text, evaluation_source = read(options.text, data.evaluation_text)
    if calibration_text == evaluation_text:
        sys.exit("error: calibration and evaluation text are the same")
    parts = make_parts(options, model, tokenizer, evaluation_text)
    if options.parts is not None:
        if unknown := set(options.parts) - {part.name for part in parts}:
            sys.exit(f"error: no part {', '.join(sorted(unknown))}, only {', '.join(part.name for part in parts)}")
        parts = [part for part in parts if part.name in options.parts]
    settings: dict[str, Any] = {
        **conditions(options, model),
        "windows": len(parts[0].tokens) // options.context,
        "quick": options.quick,
        "residuals": options.residuals,
        "batch": BATCH,
        "parts": {
            p.name: {
                "context": p.context,
                "tokens": len(p.tokens),
                "residual": p.residual,
                "stride": p.stride,
                "weights": p.weights,
                **({} if p.text is None else {"text_sha256": p.text}),
            }
            for p in parts
        },
        "methods": {
            scheme.pattern: {"does": scheme.description, "source": scheme.source} for scheme in SCHEMES.values()
        },
        "evaluation": {
            "source": evaluation_source,
            "tokens": len(parts[0].tokens),
            "text_sha256": text_sha256(evaluation_text),
        },
    }
    asked = {name: value for name, value in vars(options).items() if name != "calibration"}
    if options.calibration is not None:
        given = Calibration.from_pretrained(options.calibration)
        check_overlap(given, evaluation_text, "the evaluation text")
        asked["calibration"] = calibration_sha256(given)
    run = Run(suite, {**settings, "options": asked, "text": text_sha256(calibration_text)})
    calibration, seconds = calibrated(model, tokenizer, calibration_text, run, options)
    statistics = None
    if any(needs_statistics(part.methods.split(",")) for part in parts):
        statistics = text_statistics(model, tokenizer, calibration_text, options.calibration_tokens)
    recipe = calibration.metadata.recipe
    settings["calibration"] = {**recipe, "source": calibration_source, "seconds": seconds}
    settings["codec"] = asdict(calibration.metadata.codec)
    if statistics is not None:
        settings["statistics"] = {"tokens": statistics.tokens, "text_sha256": statistics.text_sha256}
    metrics: dict[str, dict] = {}
    out = Console(width=None if sys.stdout.isatty() else 120)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for part in parts:
            metrics[part.name] = measure_part(part, model, calibration, statistics, run, bar)
            out.print(table(part.name, metrics[part.name]))
    settings["predicted_kl"] = predicted(calibration, metrics)
    write_record(suite, settings, metrics)
    run.discard()


def conditions(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """What a record says of the model and of how text is fed to it.

    Args:
        options: The command line.
        model: The model.

    Returns:
        Settings of the record.
    """
    return {
        "model": Path(options.model).name,
        "model_sha256": model_sha256(model),
        "dtype": "float32",
        "bits": BITS,
        "context": options.context,
        "chunk": CHUNK,
        "sinks": SINKS,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=BUNDLED_MODEL, help=f"{MODEL_HELP} The record's suite is named after it.")
    parser.add_argument("--methods", default="all", help="comma-separated")
    parser.add_argument("--choice", default=CHOICE, help="methods for other contexts and WikiText-2")
    parser.add_argument("--text", default=HELD_OUT, help="evaluation text, a file beside the checkout")
    parser.add_argument(
        "--residuals", type=int, nargs="+", default=[64, 0], help="residual lengths; other parts keep the first"
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 1024], help="other contexts")
    parser.add_argument("--weights", nargs="*", default=[f"quanto-{kind}" for kind in KINDS], help="quantized weights")
    parser.add_argument("--windows", type=int, default=4, help="windows of the evaluation text")
    parser.add_argument("--stride", type=int, default=512, help=f"of WikiText-2's windows of {WIKITEXT_WINDOW}")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--calibration", type=Path, help="an artifact to use instead of calibrating")
    parser.add_argument("--metric", default="fisher", help="fisher, query or identity")
    parser.add_argument("--parts", nargs="+", help="parts to measure, of those that the rest asks for; all if none")
    parser.add_argument("--quick", action="store_true", help="one window of 1,024 tokens, with and without residual")
    options = parser.parse_args()
    if options.quick:
        options.context, options.windows, options.contexts, options.choice = 1024, 1, [], ""
    return options


def make_parts(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> list[Part]:
    """The tables to measure."""
    limit = compat.position_limit(model.config) or options.context
    for context in (options.context, *options.contexts):
        if context > limit:
            sys.exit(f"error: context {context} exceeds the model's limit of {limit} positions")
    tokens = text_tokens(tokenizer, text, options.windows * options.context)
    parts = [Part(f"residual_{r}", options.methods, tokens, options.context, r) for r in options.residuals]
    if options.quick:
        return parts
    parts.append(Part("recommended", options.methods, tokens, options.context, None))
    for context in options.contexts:  # on the same text, or on more of it where a window is longer
        longer = text_tokens(tokenizer, text, max(len(tokens), context))
        parts.append(Part(f"context_{context}", options.choice, longer, context, options.residuals[0]))
    parts += [
        Part(f"weights_{kind}", OURS, tokens, options.context, options.residuals[0], weights=kind)
        for kind in options.weights
    ]
    path = SHARED / WIKITEXT
    if options.text == WIKITEXT:
        other = read(HELD_OUT, data.evaluation_text)[0]
        own = ",".join(name for name in options.choice.split(",") if name == "dense" or name.startswith("spectral"))
        held_out = text_tokens(tokenizer, other, len(tokens))
        parts.append(Part("wikipedia", own, held_out, options.context, options.residuals[0], text=text_sha256(other)))
    elif path.is_file():
        wikitext = text_tokens(tokenizer, path.read_text(encoding="utf-8"), max(len(tokens), WIKITEXT_WINDOW))
        parts.append(Part("wikitext2", options.choice, wikitext, WIKITEXT_WINDOW, options.residuals[0], options.stride))
    return parts


def measure_part(
    part: Part,
    model: PreTrainedModel,
    calibration: Calibration,
    statistics: RivalStatistics | None,
    run: Run,
    bar: Progress,
) -> dict[str, Any]:
    """Measure the methods of a part, a few at a time."""
    methods = parse_methods(
        part.methods.split(","),
        model.config,
        calibration,
        SINKS,
        0 if part.residual is None else part.residual,
        statistics=statistics if needs_statistics(part.methods.split(",")) else None,
        own_lengths=part.residual is None,
    )
    if part.weights is not None:
        if missing := weights_library(part.weights)[2]:
            status = f"unsupported: {missing}"
            return {m.name: FidelityResult(m.family, m.simulated, status).to_dict() for m in methods}
        model, _ = load_model(model.config._name_or_path, device="cpu", dtype="float32")
        quantize_weights(model, part.weights)
    batches = [methods[i : i + BATCH] for i in range(0, len(methods), BATCH)]
    windows = len(cut_windows(model.config, part.tokens, part.context, part.stride))
    task = bar.add_task(part.name, total=len(batches) * windows * part.context)
    results: dict[str, Any] = {}
    for number, batch in enumerate(batches):

        def measure(batch: list = batch) -> dict[str, Any]:
            found = measure_fidelity(
                model,
                part.tokens,
                batch,
                context=part.context,
                chunk=CHUNK,
                sink_length=SINKS,
                stride=part.stride,
                on_progress=lambda count: bar.advance(task, count),
            )
            return {name: result.to_dict() for name, result in found.items()}

        results |= run.cell(f"{part.name}-{number}", measure)
        bar.update(task, completed=(number + 1) * windows * part.context)
    bar.remove_task(task)
    return results


def predicted(calibration: Calibration, metrics: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The mean KL that the calibration predicts for each of our methods, with the default sinks and residual.

    Args:
        calibration: The calibration.
        metrics: Results by part and method.

    Returns:
        Nats per token by method; None where the calibration predicts nothing.
    """
    ours = {name for part in metrics.values() for name, entry in part.items() if entry["family"] == "ours"}
    rates = {name: Rate(float(name.rpartition("-")[2])) for name in sorted(ours)}
    return {name: predict_kl(calibration.with_rate(rate)) for name, rate in rates.items()}


def table(title: str, results: dict[str, dict]) -> Table:
    """The results of a part for people."""
    columns = ("method", "bits/elt", "with sinks and recent", "KL mean", "KL p99", "KL max", "top-1", "perplexity")
    result = Table(*columns, title=title)
    for column in result.columns[1:]:
        column.justify = "right"
    for name, entry in results.items():
        if entry["status"] != "ok":
            result.add_row(name, entry["status"])
            continue
        result.add_row(
            name,
            f"{entry['bits_per_element']:.3f}",
            f"{entry['bits_per_element_total']:.3f}",
            f"{entry['kl_mean']:.5f} ± {entry['kl_stderr']:.5f}",
            f"{entry['kl_p99']:.4f}",
            f"{entry['kl_max']:.3f}",
            f"{entry['top1_agreement']:.2%}",
            f"{entry['perplexity']:.3f} ± {entry['perplexity_stderr']:.2f}",
        )
    return result


if __name__ == "__main__":
    main()
