"""What ``quantcache eval`` may be asked to measure: its options read, and its methods listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quantcache.cli.options import is_given, wrong_usage
from quantcache.cli.pages import WrongUsage
from quantcache.common.choices import SUITES, Suite
from quantcache.common.errors import QuantCacheError
from quantcache.common.grid import Grid, Prose
from quantcache.common.units import parse_tokens

if TYPE_CHECKING:
    from quantcache.evaluation.methods import Scheme

ALL = "all"

EXERCISES: tuple[Suite, ...] = ("needle", "records", "lookup", "tools")

OF_SUITES: dict[str, tuple[Suite, ...]] = {
    "chunk": ("fidelity", "routing", "transfer"),
    "stride": ("fidelity",),
    "qa": ("qa",),
    "questions": ("qa",),
    "trials": (*EXERCISES, "divergence"),
    "domain": ("transfer",),
    "draft": ("speed",),
    "lengths": ("needle", "records"),
    "needle_fact": ("needle", "records"),
    "needle_question": ("needle", "records"),
    "chat": (*EXERCISES, "qa"),
}
"""The suites that look at an option; all look at those that are not here."""


def read_names(option: str, given: str) -> list[str]:
    """The parts of a comma-separated option, each once.

    Args:
        option: The option's name, for the error.
        given: What the user wrote.

    Returns:
        The parts.

    Raises:
        typer.BadParameter: There is none.
    """
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("it names nothing", param_hint=f"'{option}'")
    return names


def read_token_counts(option: str, given: str, least: int) -> tuple[int, ...]:
    """The numbers of tokens of a comma-separated option, each once.

    Args:
        option: The option's name, for the error.
        given: What the user wrote.
        least: The smallest number that it may have.

    Returns:
        The numbers.

    Raises:
        typer.BadParameter: A part is no whole number, or too small.
    """
    try:
        return tuple(dict.fromkeys(parse_tokens(part, least=least) for part in read_names(option, given)))
    except QuantCacheError:
        wanted = f"whole numbers from {least} up, comma-separated, such as 1024 or 1K,4K"
        raise typer.BadParameter(f"{given!r} is not one or several {wanted}", param_hint=f"'{option}'") from None


def read_suites(given: str, qa: Path | None) -> tuple[Suite, ...]:
    """The suites of a comma-separated option, in their own order.

    Args:
        given: What the user wrote.
        qa: The file that one of them needs.

    Returns:
        Their names.

    Raises:
        typer.BadParameter: A name is unknown.
        WrongUsage: One needs a file that is not given.
    """
    names = read_names("--suite", given)
    unknown = [name for name in names if name not in (*SUITES, ALL)]
    if unknown:
        message = f"{unknown[0]!r} is not one of {', '.join(SUITES)}, {ALL}"
        raise typer.BadParameter(message, param_hint="'--suite'")
    if "qa" in names and qa is None:
        raise WrongUsage("--suite qa needs --qa FILE")
    return SUITES if ALL in names else tuple(name for name in SUITES if name in names)


def without_effect(suites: Sequence[Suite], invocation: typer.Context) -> list[str]:
    """Options that none of the suites looks at: said, not refused, for a run may go on later with more suites.

    Args:
        suites: What is measured.
        invocation: What was given on the command line.

    Returns:
        A line for each such option.
    """
    return [
        f"--{name.replace('_', '-')} has no effect here: it is for {', '.join(users)}"
        for name, users in OF_SUITES.items()
        if not set(users) & set(suites) and is_given(invocation, name)
    ]


def check_methods(names: Sequence[str]) -> bool:
    """Refuse methods that there are not, before a model is loaded.

    Args:
        names: What ``--methods`` names.

    Returns:
        Whether one of them needs a calibration of the model.

    Raises:
        WrongUsage: A name is unknown, or its number out of range. Ranks are bounded by the model, and checked later.
    """
    from quantcache.evaluation.methods.registry import SCHEMES, split_name

    found: list[Scheme] = []
    for name in names:
        if name == ALL:
            found += SCHEMES.values()
            continue
        known = split_name(name)
        if known is None:
            patterns = ", ".join(each.pattern for each in SCHEMES.values())
            raise WrongUsage(f"unknown method {name!r}: known are {patterns}, {ALL}; --list-methods explains them")
        scheme, number = known
        if scheme.parameter not in ("", "K"):
            with wrong_usage():
                scheme.check(number)
        found.append(scheme)
    return any(scheme.needs == "calibration" for scheme in found)


def methods_known() -> tuple[dict[str, Any], Grid, Prose]:
    """Every method that can be measured: as JSON, and for people."""
    from quantcache.evaluation.methods.registry import SCHEMES

    data = [
        {
            "method": scheme.pattern,
            "numbers": scheme.numbers or (scheme.limits if scheme.parameter in ("B", "T") else None),
            "any_number_between": scheme.numbers is None and scheme.parameter == "B",
            "family": scheme.family,
            "simulated": scheme.simulated,
            "needs": scheme.needs or None,
            "unsupported": scheme.unsupported(),
            "description": scheme.description,
            "source": scheme.source,
        }
        for scheme in SCHEMES.values()
    ]
    grid = Grid("method", "numbers", "what it does", text=3, fold=True)
    for each in data:
        name = f"{each['method']}{'*' if each['simulated'] else ''}"
        lacking = f"; not here: {each['unsupported']}" if each["unsupported"] else ""
        grid.add_row(name, _range(each), f"{each['description']}{lacking}")
    note = (
        "B: bits; K: a rank; T: tokens of a tile. * simulated: no cache stores it packed; its values are rounded as "
        "its codes would round them. 'all' is every family at the numbers it is compared at."
    )
    return {"methods": data}, grid, Prose(f"\n{note}")


def _range(method: dict[str, Any]) -> str:
    """The numbers that a method takes, for people."""
    numbers = method["numbers"]
    if not numbers:
        return "" if not method["method"].endswith("-K") else "1 to D"
    first, last = numbers[0], numbers[-1]
    if method["any_number_between"]:
        return f"{first:g} to {last:g}"
    whole = tuple(numbers) == tuple(range(first, last + 1))
    return f"{first}" if first == last else f"{first}-{last}" if whole else ", ".join(map(str, numbers))
