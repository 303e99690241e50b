"""What compressing wiki11m's cache does to its predictions: every method, with and without a residual window.

Calibration and evaluation texts are the larger ones beside the checkout where they are to be had, and those that come
with the package otherwise; the record says which.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable

import torch
from records import ROOT, write_record
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcache import calibrate, data, register_attention
from quantcache.cli.eval import METHODS
from quantcache.evaluation import measure_fidelity, parse_methods

BITS = 3.0
SINKS = 4
CHUNK = 64
SHARED = ROOT.parent / "shared" / "data"


def main() -> None:
    """Measure, print a table for each residual length and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", default=METHODS, help="comma-separated")
    parser.add_argument("--residuals", type=int, nargs="+", default=[64, 0], help="residual lengths")
    parser.add_argument("--context", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=8, help="windows of the evaluation text")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--metric", default="fisher", help="fisher, query or identity")
    options = parser.parse_args()

    register_attention()
    path = data.demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="spectral").eval()
    calibration_text, calibration_source = read("wiki_calib.txt", data.calibration_text)
    evaluation_text, evaluation_source = read("wiki_eval.txt", data.evaluation_text)
    if calibration_text == evaluation_text:
        sys.exit("error: calibration and evaluation text are the same")
    started = time.perf_counter()
    calibration = calibrate(
        model, calibration_text, tokenizer, BITS, max_tokens=options.calibration_tokens, metric=options.metric
    )
    calibration_seconds = time.perf_counter() - started
    needed = options.windows * options.context
    tokens = tokenizer(evaluation_text[: 64 * needed], return_tensors="pt", verbose=False).input_ids[0][:needed]
    metrics: dict[str, dict] = {}
    out = Console(width=None if sys.stdout.isatty() else 120)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=len(tokens) * len(options.residuals))
        for residual in options.residuals:
            methods = parse_methods(options.methods.split(","), model.config, calibration, SINKS, residual)
            results = measure_fidelity(
                model,
                tokens,
                methods,
                context=options.context,
                chunk=CHUNK,
                sink_length=SINKS,
                on_progress=lambda count: bar.advance(task, count),
            )
            metrics[f"residual_{residual}"] = {name: result.to_dict() for name, result in results.items()}
            out.print(table(residual, metrics[f"residual_{residual}"]))
    settings = {
        "model": "wiki11m",
        "dtype": "float32",
        "bits": BITS,
        "context": options.context,
        "windows": len(tokens) // options.context,
        "chunk": CHUNK,
        "sinks": SINKS,
        "residuals": options.residuals,
        "calibration": {**calibration.metadata.recipe, "source": calibration_source, "seconds": calibration_seconds},
        "evaluation": {
            "source": evaluation_source,
            "tokens": len(tokens),
            "text_sha256": hashlib.sha256(evaluation_text.encode()).hexdigest(),
        },
    }
    path = write_record("fidelity", settings, metrics)
    print(f"record: {path.relative_to(ROOT)}", file=sys.stderr)


def read(name: str, bundled: Callable[[], str]) -> tuple[str, str]:
    """A text beside the checkout, or the bundled one.

    Args:
        name: File name of the former.
        bundled: Gives the latter.

    Returns:
        The text, and where it comes from.
    """
    path = SHARED / name
    if path.is_file():
        return path.read_text(encoding="utf-8"), f"../shared/data/{name}"
    return bundled(), "bundled"


def table(residual: int, results: dict[str, dict]) -> Table:
    """The results at one residual length for people."""
    columns = ("method", "bits/elt", "bits in all", "KL mean", "KL p99", "top-1", "perplexity", "KL / turboquant-mse-3")
    result = Table(*columns, title=f"Residual {residual}")
    for column in result.columns[1:]:
        column.justify = "right"
    rival = (results.get("turboquant-mse-3") or {}).get("kl_mean")
    for name, entry in results.items():
        if entry["status"] != "ok":
            result.add_row(name, entry["status"])
            continue
        result.add_row(
            name,
            f"{entry['bits_per_element']:.3f}",
            f"{entry['bits_per_element_total']:.3f}",
            f"{entry['kl_mean']:.5f}",
            f"{entry['kl_p99']:.4f}",
            f"{entry['top1_agreement']:.2%}",
            f"{entry['perplexity']:.3f} ± {entry['perplexity_stderr']:.2f}",
            f"{entry['kl_mean'] / rival:.3f}" if rival else "",
        )
    return result


if __name__ == "__main__":
    main()
