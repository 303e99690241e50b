"""The command line: one file per verb.

Every verb takes ``--json``: exactly one JSON object on stdout, and everything else on stderr. Bad input ends in one
line on stderr and a non-zero exit status. Only ``lm-eval`` hands all its arguments on to another program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer

from quantcache import __version__
from quantcache.cli.analyze import analyze
from quantcache.cli.calibrate import calibrate
from quantcache.cli.demo import demo
from quantcache.cli.env import env
from quantcache.cli.eval import evaluate
from quantcache.cli.export import export
from quantcache.cli.formats import formats
from quantcache.cli.generate import generate
from quantcache.cli.inspect import inspect
from quantcache.cli.lm_eval import PASS_ON, lm_eval
from quantcache.cli.pages import OPTIONS, SETTINGS, Verb, Verbs, refusal
from quantcache.cli.recommend import recommend
from quantcache.cli.serve import serve
from quantcache.cli.terminal import StdoutFailed, prepare_streams, report_error, writing_stdout
from quantcache.common.interrupts import INTERRUPTED, interruptible

app = typer.Typer(
    help="Run-time KV-cache compression for Hugging Face transformers.",
    epilog="'quantcache COMMAND --help' has the options of a command, and examples.",
    cls=Verbs,
    context_settings=SETTINGS,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

VERBS: dict[str, dict[str, tuple[Callable[..., None], str]]] = {
    "Start here": {
        "demo": (demo, "Compress the cache of a bundled model, offline"),
        "calibrate": (calibrate, "Calibrate a model on text"),
        "generate": (generate, "Generate text from a compressed cache"),
        "eval": (evaluate, "Measure what compression costs and saves"),
    },
    "Use": {
        "serve": (serve, "Serve models over an OpenAI-compatible API"),
        "export": (export, "Fold a calibration into a model's weights"),
        "lm-eval": (lm_eval, "Run lm-eval's tasks on a compressed cache"),
    },
    "Choose and look up": {
        "recommend": (recommend, "Say what fits a memory, and which format to take"),
        "formats": (formats, "Compare cache formats: size, fidelity, speed"),
        "analyze": (analyze, "Report how far a model's cache can be compressed"),
        "inspect": (inspect, "Show what a calibration or a saved cache holds"),
        "env": (env, "Show versions and hardware, and check the kernels"),
    },
}
"""The verbs in the order of the help page, each with its line there: 55 characters fit any terminal."""


USAGE = {
    "calibrate": "(MODEL --text FILE... | --recipe NAME) -o DIR [OPTIONS]",
    "eval": "MODEL --text FILE [OPTIONS]",
    "lm-eval": "[OPTIONS OF LM-EVAL]",
}
"""How those verbs are called whose parameters alone do not tell."""


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"quantcache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _group, _verbs in VERBS.items():
    for _name, (_verb, _line) in _verbs.items():
        app.command(
            _name,
            cls=Verb,
            short_help=_line,
            rich_help_panel=_group,
            options_metavar=USAGE.get(_name, OPTIONS),
            context_settings=PASS_ON if _verb is lm_eval else SETTINGS,
            add_help_option=_verb is not lm_eval,
        )(_verb)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: The arguments; those of the process if None.

    Raises:
        SystemExit: Always: 0 on success, 1 after an error, 2 after wrong usage, 130 after Ctrl-C, 143 after SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    status: Any = 1
    try:
        with interruptible(), writing_stdout():
            status = app(given or ["--help"], prog_name="quantcache", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        report_error("interrupted")
        status = INTERRUPTED
    except StdoutFailed as error:
        if str(error):  # a reader who has seen enough, as head has, is told nothing
            report_error(str(error))
    except Exception as error:
        # Wrong usage; typer brings its own copy of click, or the real one, depending on its version.
        if not hasattr(error, "format_message"):
            raise
        report_error(refusal(error))
        status = 2
    sys.exit(status or 0)
