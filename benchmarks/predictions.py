"""What a calibration predicts for text of its own kind, and what is measured on such text.

python benchmarks/predictions.py --model smollm2-135m

Predictions are for text like the calibration's. ``fidelity.py`` calibrates on Wikipedia; here the calibration is of
WikiText-2's validation text, and its test text is measured.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fidelity import CHUNK, SINKS, conditions, predicted, table
from inputs import SHARED, WIKITEXT, calibrated
from records import Run, suite_of, write_record
from rich.console import Console

from quantcache.cli.loading import load_model
from quantcache.common.defaults import RESIDUAL_LENGTH
from quantcache.common.sequences import text_tokens
from quantcache.common.sources import MODEL_HELP
from quantcache.evaluation.fidelity import measure_fidelity
from quantcache.evaluation.methods import parse_methods
from quantcache.evaluation.provenance import text_sha256

VALIDATION = "wikitext2_valid.txt"


def main() -> None:
    """Calibrate, measure, print a table and write a record."""
    options = parse_arguments()
    model, tokenizer = load_model(options.model, device="cpu", dtype="float32")
    suite = suite_of("predictions", options.model)
    calibration_text, text = ((SHARED / name).read_text(encoding="utf-8") for name in (VALIDATION, WIKITEXT))
    settings: dict[str, Any] = {
        **conditions(options, model),
        "windows": options.windows,
        "residual": RESIDUAL_LENGTH,
        "evaluation": {"source": f"../shared/data/{WIKITEXT}", "text_sha256": text_sha256(text)},
    }
    run = Run(suite, {**settings, "options": vars(options), "text": text_sha256(calibration_text)})
    calibration, seconds = calibrated(model, tokenizer, calibration_text, run, options)
    recipe = calibration.metadata.recipe
    settings["calibration"] = {**recipe, "source": f"../shared/data/{VALIDATION}", "seconds": seconds}
    tokens = text_tokens(tokenizer, text, options.windows * options.context)
    methods = parse_methods(options.methods.split(","), model.config, calibration, SINKS, RESIDUAL_LENGTH)
    found = measure_fidelity(model, tokens, methods, context=options.context, chunk=CHUNK, sink_length=SINKS)
    results = {name: result.to_dict() for name, result in found.items()}
    settings["predicted_kl"] = predicted(calibration, {suite: results})
    Console(width=None if sys.stdout.isatty() else 120).print(table(suite, results))
    write_record(suite, settings, results)
    run.discard()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--methods", default="dense,spectral-2,spectral-2.5,spectral-3,spectral-4", help="ours")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=4, help="windows of the evaluation text")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.set_defaults(calibration=None, metric="fisher")
    return parser.parse_args()


if __name__ == "__main__":
    main()
