"""The command line: one file per verb.

Every verb takes ``--json``: exactly one JSON object on stdout, and everything else on stderr. Bad input ends in one
line on stderr and a non-zero exit status. Only ``lm-eval`` hands all its arguments on to another program.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
from quantcache.cli.recommend import recommend
from quantcache.cli.serve import serve
from quantcache.cli.terminal import StdoutFailed, prepare_streams, report_error, writing_stdout
from quantcache.common.interrupts import INTERRUPTED, interruptible

app = typer.Typer(
    help="Run-time KV-cache compression for Hugging Face transformers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"quantcache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("calibrate")(calibrate)
app.command("inspect")(inspect)
app.command("analyze")(analyze)
app.command("generate")(generate)
app.command("serve")(serve)
app.command("eval")(evaluate)
app.command("lm-eval", context_settings=PASS_ON, add_help_option=False)(lm_eval)
app.command("export")(export)
app.command("formats")(formats)
app.command("recommend")(recommend)
app.command("env")(env)
app.command("demo")(demo)


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
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        report_error(message())
        status = 2
    sys.exit(status or 0)
