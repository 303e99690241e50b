"""What a compressed cache costs and saves beside its predictions: every suite of ``quantcache eval`` on a model.

Divergence of long texts, needles, records, lookups, tool calls, routing, transfer between domains and lengths, question
answering, memory, speed and speculative decoding, in one record. An interrupted run goes on behind the last finished
cell.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

from fidelity import SINKS
from inputs import SHARED, calibrated, read
from records import Run, suite_of, write_record
from rich.console import Console

from quantcache import Calibration, data
from quantcache.cli.eval_tables import tables
from quantcache.cli.loading import load_model
from quantcache.cli.session import show_cells
from quantcache.common.choices import SUITES
from quantcache.common.progress import progress_bar
from quantcache.common.sources import MODEL_HELP
from quantcache.data import BUNDLED_MODEL
from quantcache.evaluation import runner
from quantcache.evaluation.plan import Material, Plan, chosen_sizes
from quantcache.evaluation.provenance import calibration_sha256, check_material, model_sha256, text_sha256
from quantcache.evaluation.qa import load_questions

METHODS = "dense,spectral-2,spectral-3,spectral-4,quanto-4,turboquant-mse-3,kivi-4"
MEASURED = tuple(name for name in SUITES if name != "fidelity")
"""Fidelity has a record of its own."""

DOMAINS = ("novel_treasure_island.txt", "dialogue_shakespeare.txt")
QUESTIONS = "xquad_en.json"


def main() -> None:
    """Measure, print the tables and write a record."""
    options = parse_arguments()
    model, tokenizer = load_model(options.model, device="cpu", dtype=options.dtype)
    calibration_text, calibration_source = read("wiki_calib.txt", data.calibration_text)
    text, source = read("wiki_eval.txt", data.evaluation_text)
    sizes = chosen_sizes(options.quick, options.questions, options.trials)
    if options.transfer_tokens is not None:
        sizes = replace(sizes, transfer_tokens=options.transfer_tokens)
    plan = Plan(
        suites=tuple(options.suites),
        methods=tuple(options.methods.split(",")),
        contexts=(options.context,),
        tokens=options.windows * options.context,
        residuals=(options.residual,),
        sinks=SINKS,
        sizes=sizes,
        lengths=None if options.lengths is None else tuple(options.lengths),
        text_name="wikipedia",
    )
    domains = {path.stem: path.read_text(encoding="utf-8") for name in DOMAINS if (path := SHARED / name).is_file()}
    domains["python_library"] = python_library()
    questions = load_questions(SHARED / QUESTIONS) if (SHARED / QUESTIONS).is_file() else None
    settings: dict[str, Any] = {
        "model": Path(options.model).name,
        "model_sha256": model_sha256(model),
        "dtype": options.dtype,
        "quick": options.quick,
        **{name: value for name, value in plan.to_dict().items() if name != "needle_form"},
        "evaluation": {"source": source, "text_sha256": text_sha256(text)},
        "domains": {name: text_sha256(content) for name, content in domains.items()},
        "questions": None if questions is None else text_sha256(repr(questions)),
    }
    given = (
        None if options.calibration is None else calibration_sha256(Calibration.from_pretrained(options.calibration))
    )
    decides = {"calibration": given, "calibration_tokens": options.calibration_tokens, "metric": options.metric}
    suite = suite_of("suites", options.model)
    run = Run(suite, {**settings, **decides, "text": text_sha256(calibration_text)})
    calibration, seconds = calibrated(model, tokenizer, calibration_text, run, options)
    settings["calibration"] = {**calibration.metadata.recipe, "source": calibration_source, "seconds": seconds}
    material = Material(
        model=model,
        tokenizer=tokenizer,
        text=text,
        calibration=calibration,
        questions=questions,
        domains=domains,
        length_text=calibration_text,
    )
    settings["gates"] = check_material(calibration, material, "the evaluation text", text)
    with progress_bar() as bar:
        show_cells(run.cells, bar)
        metrics = runner.run(material, plan, run.cells)
    out = Console(width=None if sys.stdout.isatty() else 160)
    for shown in tables({"metrics": metrics, "model": settings["model"], "sinks": SINKS, "dtype": options.dtype}):
        out.print(shown)
    write_record(suite, settings, metrics)
    run.discard()


def python_library() -> str:
    """Python code that every machine has: the modules of Python's own library, in order of their names."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n\n".join(path.read_text(encoding="utf-8") for path in modules)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=BUNDLED_MODEL, help=f"{MODEL_HELP} The record's suite is named after it.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of model and caches")
    parser.add_argument("--suites", nargs="+", default=list(MEASURED), choices=MEASURED)
    parser.add_argument("--methods", default=METHODS, help="comma-separated")
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens in a window, and of the longest needle prompt"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        help="tokens of needle and records prompts; half the context and it by default",
    )
    parser.add_argument("--trials", type=int, help="needles, texts, tables and prompts of each size")
    parser.add_argument("--questions", type=int, help="questions of the qa suite")
    parser.add_argument("--transfer-tokens", type=int, help="tokens of each calibration of the transfer suite")
    parser.add_argument("--windows", type=int, default=4, help="windows of the evaluation text")
    parser.add_argument("--residual", type=int, default=64, help="recent tokens that every method keeps")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--calibration", type=Path, help="an artifact to use instead of calibrating")
    parser.add_argument("--metric", default="fisher", help="fisher, query or identity")
    parser.add_argument("--quick", action="store_true", help="small suites, to see that everything runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
