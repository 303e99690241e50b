"""``quantcache lm-eval``."""

from __future__ import annotations

import importlib.util
import sys

import typer

from quantcache.cli.session import describe
from quantcache.cli.terminal import report_error
from quantcache.common.errors import QuantCacheError

EXTRA = "quantcache[lm-eval]"
"""The extra that installs lm-eval."""

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Context settings of the verb: every argument, ``--help`` too, is lm-eval's."""


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with the model type "quantcache"; all arguments are lm-eval's.

    Example: quantcache lm-eval --model quantcache --model_args pretrained=wiki11m,calibration=wiki11m --tasks wikitext
    """
    if importlib.util.find_spec("lm_eval") is None:
        report_error(f"lm-eval is not installed: pip install '{EXTRA}'")
        raise typer.Exit(1)
    from lm_eval.__main__ import cli_evaluate

    from quantcache.evaluation import lm_eval as registers

    del registers
    before, sys.argv = sys.argv, ["lm-eval", *context.args]
    try:
        cli_evaluate()
    except (QuantCacheError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise  # of the stream that lm-eval writes to
        report_error(describe(error))
        raise typer.Exit(1) from None
    finally:
        sys.argv = before
