"""What benchmarks measure on: texts beside the checkout or the bundled ones, and a model with its calibration."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import ROOT, Run
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache import Calibration, calibrate, data
from quantcache.cli.loading import load_model
from quantcache.common.sequences import text_tokens
from quantcache.data import BUNDLED_MODEL

SHARED = ROOT.parent / "shared" / "data"
WIKITEXT = "wikitext2_test.txt"

BITS = 3.0
"""Of calibrations made here."""


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


def calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    run: Run,
    options: argparse.Namespace,
) -> tuple[Calibration, float | None]:
    """The calibration, from a file or an interrupted run if there is one, and the seconds it took."""
    if options.calibration is not None:
        return Calibration.from_pretrained(options.calibration), None
    folder = run.folder / "calibration"

    def make() -> float:
        started = time.perf_counter()
        made = calibrate(model, text, tokenizer, BITS, max_tokens=options.calibration_tokens, metric=options.metric)
        made.save_pretrained(folder)
        return time.perf_counter() - started

    seconds = run.cell("calibration-seconds", make)
    return Calibration.from_pretrained(folder), seconds


@dataclass(frozen=True)
class Study:
    """What a study of the codec measures on.

    Attributes:
        run: Keeps its finished cells.
        model: The model, on the CPU in float32.
        tokenizer: Its tokenizer.
        calibration: Its calibration.
        tokens: The evaluation text's, ``[windows * context]``.
        settings: For the record.
    """

    run: Run
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration
    tokens: Tensor
    settings: dict[str, Any]


def study_parser(description: str | None, windows: int) -> argparse.ArgumentParser:
    """The options that all studies have; ``windows`` is the default of one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=BUNDLED_MODEL, help="wiki11m, a folder or a Hub id")
    parser.add_argument("--calibration", type=Path, help="an artifact to use instead of calibrating")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--metric", default="fisher", help="fisher, query or identity")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=windows)
    return parser


def study(suite: str, options: argparse.Namespace) -> Study:
    """Load what the options of :func:`study_parser` name; calibrate, where nobody has."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    run = Run(suite, asked)
    model, tokenizer = load_model(options.model, device="cpu", dtype="float32")
    calibration, _ = calibrated(model, tokenizer, data.calibration_text(), run, options)
    text, source = read(WIKITEXT, data.evaluation_text)
    tokens = text_tokens(tokenizer, text, options.windows * options.context)
    settings = {**asked, "text": source, "calibration": calibration.metadata.recipe}
    return Study(run, model, tokenizer, calibration, tokens, settings)
