"""The options that several verbs take: one name, one short form, one unit for one thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from quantcache.cli.pages import CACHE, GENERAL, HUB, MODEL, WrongUsage
from quantcache.common.choices import BackendName, Dtype, Quality
from quantcache.common.defaults import QUALITIES
from quantcache.common.errors import QuantCacheError
from quantcache.common.sources import MODEL_HELP
from quantcache.common.units import parse_tokens


def token_count(text: str | int) -> int:
    """Read a number of tokens.

    Args:
        text: As :func:`quantcache.common.units.parse_tokens` reads it; a default comes as a number.

    Returns:
        Tokens.

    Raises:
        typer.BadParameter: The text is not a whole number from 1 up.
    """
    try:
        return parse_tokens(str(text))
    except QuantCacheError:
        raise typer.BadParameter(f"{text!r} is not a number of tokens from 1 up, such as 2048 or 2K") from None


def check_seed(value: int | None) -> int | None:
    """Refuse what torch takes for no seed; the help would show the bound in 19 digits."""
    if value is not None and not 0 <= value < 1 << 63:
        raise typer.BadParameter(f"{value} is not from 0 to 2^63 - 1")
    return value


JsonFlag = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object and nothing else on stdout.", rich_help_panel=GENERAL, show_default=False
    ),
]
DebugFlag = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=GENERAL, show_default=False),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
CALIBRATION_HELP = "folder, Hub id, or the name of a model whose calibration is bundled"
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="ARTIFACT",
        help=f"The model's calibration: {CALIBRATION_HELP}.",
        show_default="the model's own, where it is bundled or in its folder",
    ),
]
NamedOption = Annotated[str | None, typer.Option("--model", hidden=True)]
TokensOption = Annotated[
    int, typer.Option(parser=token_count, metavar="TOKENS", help="Tokens of text to use at most, such as 16K.")
]
SequenceOption = Annotated[
    int | None,
    typer.Option(
        parser=token_count, metavar="TOKENS", help="Tokens in a sequence.", show_default="2048, or the model's limit"
    ),
]
BitsOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=8,
        metavar="BITS",
        help="Mean bits per element, without gains.",
        show_default="the calibration's",
        rich_help_panel=CACHE,
    ),
]
QualityOption = Annotated[
    Quality | None,
    typer.Option(
        help="In place of --bits: the fewest whose predicted KL, in nats per token, is at most "
        + ", ".join(f"{limit:g} ({word})" for word, limit in QUALITIES.items())
        + ".",
        rich_help_panel=CACHE,
    ),
]
SinksOption = Annotated[
    int, typer.Option(min=0, metavar="TOKENS", help="First tokens kept as they are.", rich_help_panel=CACHE)
]
ResidualOption = Annotated[
    int, typer.Option(min=0, metavar="TOKENS", help="Recent tokens kept as they are.", rich_help_panel=CACHE)
]
BackendOption = Annotated[
    BackendName,
    typer.Option(metavar="<auto|cpu|triton|cuda|torch>", help="What encodes and attends.", rich_help_panel=CACHE),
]
SeedOption = Annotated[int, typer.Option(callback=check_seed, metavar="N", help="Seed of what is sampled.")]
PushOption = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Push to this repository, OWNER/NAME.", rich_help_panel=HUB),
]
PrivateOption = Annotated[
    bool,
    typer.Option("--private", help="Make a new repository private.", rich_help_panel=HUB, show_default=False),
]
CardOption = Annotated[
    Path | None,
    typer.Option(
        "--records",
        "--metrics",
        metavar="FILE",
        help="Result of 'quantcache eval -o', to show on the card.",
        rich_help_panel=HUB,
    ),
]
RecordsOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="Result of 'quantcache eval -o', or a folder of them; repeatable."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda, cuda:N, or 'auto' to spread over devices.",
        show_default="cuda if there is one",
        rich_help_panel=MODEL,
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="'auto' is the checkpoint's.", show_default="float32 on a CPU, else auto", rich_help_panel=MODEL),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(metavar="REV", help="Branch, tag or commit of the model on the Hub.", rich_help_panel=MODEL),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Allow model code from the Hub to run.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]


def check_rate(bits: float | None, quality: str | None) -> None:
    """Refuse a number of bits beside a word for one.

    Args:
        bits: What ``--bits`` says.
        quality: What ``--quality`` says.

    Raises:
        WrongUsage: Both are given.
    """
    if bits is not None and quality is not None:
        raise WrongUsage(f"give either --quality or --bits, got --quality {quality} and --bits {bits:g}")


def check_private(private: bool, push_to_hub: str | None) -> None:
    """Refuse a private repository where there is none.

    Args:
        private: Whether ``--private`` is given.
        push_to_hub: What ``--push-to-hub`` says.

    Raises:
        WrongUsage: Nothing is pushed.
    """
    if private and push_to_hub is None:
        raise WrongUsage("--private is of a repository: give --push-to-hub REPO")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was given on the command line.

    Args:
        context: What was given.
        name: The parameter.

    Returns:
        False where it has its default.
    """
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def named_model(argument: str | None, option: str | None) -> str | None:
    """The model of a verb that took it as ``--model`` before it took it as an argument.

    Args:
        argument: The argument.
        option: The option.

    Returns:
        The one that is given; None if none is.

    Raises:
        WrongUsage: Both are given.
    """
    if argument is not None and option is not None:
        raise WrongUsage(f"give the model once, got {argument} and --model {option}")
    return argument if option is None else option


@contextlib.contextmanager
def wrong_usage() -> Iterator[None]:
    """Let what refuses the text of an option end as wrong usage.

    Yields:
        Nothing.

    Raises:
        WrongUsage: The text was refused.
    """
    try:
        yield
    except (QuantCacheError, ValueError) as error:
        raise WrongUsage(str(error)) from error
