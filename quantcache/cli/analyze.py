"""``quantcache analyze``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from quantcache.cli.loading import load_calibration, load_model, read_text
from quantcache.cli.options import (
    CALIBRATION_HELP,
    DebugFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    ModelArgument,
    RevisionOption,
    SequenceOption,
    TokensOption,
    TrustOption,
)
from quantcache.cli.outputs import output_folder
from quantcache.cli.reaching import expect_model
from quantcache.cli.session import session
from quantcache.common.grid import Prose

FILES = ("report.json", "report.html", "report.png")
"""What a run writes."""


def analyze(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write into.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to analyze.", show_default="a bundled Wikipedia text")
    ] = None,
    tokens: TokensOption = 8192,
    seq_len: SequenceOption = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="ARTIFACT",
            help=f"The model's calibration: {CALIBRATION_HELP}.",
            show_default="one made from the text",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also measure the predicted divergences.", show_default=False)
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Report how far a model's cache can be compressed: spectra, bounds, and what quantcache makes of them.

    Writes report.json, report.html (one page that needs nothing else) and report.png.

    Examples:
        quantcache analyze wiki11m -o report/
        quantcache analyze wiki11m --text my_text.txt -o report/ --verify
    """
    with session(json, debug) as run, output_folder(output):
        started = time.perf_counter()
        expect_model(model, revision)
        constants = None if calibration is None else load_calibration(calibration)
        content, name = _text(text, constants is not None)

        from quantcache.analysis import analyze as analyze_model

        loaded, tokenizer = load_model(
            model,
            attention=None,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            encoders=True,
        )
        report = analyze_model(
            loaded,
            tokenizer,
            content,
            text_name=name,
            max_tokens=tokens,
            seq_len=seq_len,
            calibration=constants,
            verify=verify,
        )
        paths = [output / file for file in FILES]
        report.to_json(paths[0])
        report.to_html(paths[1])
        report.to_png(paths[2])
        seconds = time.perf_counter() - started
        files = ", ".join(str(path) for path in paths)
        data = {**report.to_dict(), "files": [str(path) for path in paths], "seconds": seconds}
        run.finish(data, Prose(report.summary()), Prose(f"\n{files} ({seconds:.0f} s)"))


def _text(path: Path | None, calibrated: bool) -> tuple[str, str]:
    """The text and what to call it: of the bundled ones, the one that the bundled calibration was not made on."""
    if path is not None:
        return read_text(path), path.name
    from quantcache import data

    if calibrated:
        return data.evaluation_text(), "bundled Wikipedia articles (evaluation)"
    return data.calibration_text(), "bundled Wikipedia articles (calibration)"
