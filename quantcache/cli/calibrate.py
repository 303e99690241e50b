"""``quantcache calibrate``."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcache.cli.loading import load_model, read_text
from quantcache.cli.metrics import read_metrics
from quantcache.cli.options import (
    CardOption,
    DebugFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    PrivateOption,
    PushOption,
    RevisionOption,
    SeedOption,
    SequenceOption,
    TokensOption,
    TrustOption,
    check_private,
    is_given,
)
from quantcache.cli.outputs import holds_calibration, output_folder
from quantcache.cli.pages import WrongUsage
from quantcache.cli.reaching import expect_model
from quantcache.cli.session import session
from quantcache.common.choices import Metric
from quantcache.common.defaults import RESIDUAL_LENGTH
from quantcache.common.errors import HubError
from quantcache.common.grid import Grid, Prose
from quantcache.common.sources import MODEL_HELP

if TYPE_CHECKING:
    from quantcache.artifact.calibration import Calibration
    from quantcache.artifact.recipes import Recipe
    from quantcache.coding.schema import SideBits

RATE = "Bits"


def calibrate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} A recipe names its model."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...",
            help="Text to calibrate on, or .jsonl with a text in each line. Several files take turns.",
        ),
    ] = None,
    more_text: Annotated[list[Path] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Model, text and settings from a recipe; --list-recipes has the names."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder to write into; an older calibration of the model is replaced."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Also replace a calibration of another model in DIR.", show_default=False),
    ] = False,
    tokens: TokensOption = 32_768,
    seq_len: SequenceOption = None,
    residual: Annotated[
        int, typer.Option(min=0, metavar="TOKENS", help="Recent tokens that caches will keep as they are.")
    ] = RESIDUAL_LENGTH,
    metric: Annotated[
        Metric,
        typer.Option(
            help="How errors are weighed: by the loss (fisher, one backward pass), by the queries, or all alike."
        ),
    ] = "fisher",
    seed: SeedOption = 0,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="List the recipes that come with quantcache.", show_default=False)
    ] = False,
    bits: Annotated[
        float,
        typer.Option(min=0, max=8, metavar="BITS", help="Mean bits per element, without gains.", rich_help_panel=RATE),
    ] = 3.0,
    key_bits: Annotated[
        str,
        typer.Option(
            metavar="BITS", help="Bits of the keys alone; 'dense' leaves them uncompressed.", rich_help_panel=RATE
        ),
    ] = "joint",
    value_bits: Annotated[
        str,
        typer.Option(
            metavar="BITS", help="Bits of the values alone; 'dense' leaves them uncompressed.", rich_help_panel=RATE
        ),
    ] = "joint",
    min_bits: Annotated[
        int,
        typer.Option(min=0, max=8, metavar="BITS", help="Fewest bits of any coefficient.", rich_help_panel=RATE),
    ] = 0,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    records: CardOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Calibrate a model on text, and save the calibration.

    The bits chosen here are a default: one calibration serves every number of bits from 0 to 8.

    Examples:
        quantcache calibrate wiki11m --text a.txt b.txt -o calibration/
        quantcache calibrate --recipe qwen3-0.6b -o calibration/
        quantcache calibrate Qwen/Qwen3-0.6B --text a.txt --push-to-hub ME/REPO
    """
    with session(json, debug) as run, contextlib.ExitStack() as stack:
        if list_recipes:
            run.finish(*_recipes())
            return
        if output is None and push_to_hub is None:
            raise WrongUsage("no output: give -o DIR, --push-to-hub REPO, or both")
        check_private(private, push_to_hub)
        keys, values = side_bits("--key-bits", key_bits), side_bits("--value-bits", value_bits)
        if recipe is not None:
            chosen = _recipe(recipe, context)
            revision = chosen.revision if model in (None, chosen.model) else revision  # which is of that model
            model, texts = model or chosen.model, chosen.texts()
            bits, min_bits = chosen.bits, chosen.min_bits
            keys, values = chosen.side_bits("key"), chosen.side_bits("value")
            metric, tokens, seq_len = chosen.metric, chosen.tokens, chosen.seq_len
            residual, seed, dtype = chosen.residual_length, chosen.seed, chosen.dtype
        else:
            if model is None or not text:
                raise WrongUsage("nothing to calibrate: give MODEL and --text FILE, or --recipe NAME")
            if "joint" not in (keys, values):
                if is_given(context, "bits"):
                    beside = f"--key-bits {key_bits} and --value-bits {value_bits}"
                    raise WrongUsage(f"--bits {bits:g} has no effect beside {beside}")
                bits = max(bits, min_bits)  # which no side has
            if metric != "fisher" and is_given(context, "residual"):
                raise WrongUsage(f"--residual has no effect beside --metric {metric}")
            for name, rate in (("--bits", bits), ("--key-bits", keys), ("--value-bits", values)):
                if not isinstance(rate, str) and min_bits > rate:
                    raise WrongUsage(f"--min-bits {min_bits} exceeds {name} {rate:g}")
            # An option takes one value, so further files of `--text a b` arrive as arguments.
            texts = [read_text(path) for path in [*text, *(more_text or [])]]
        rows = None if records is None else read_metrics(records, model)
        expect_model(model, revision)

        stack.enter_context(output_folder(output, _FOLDERS))
        if push_to_hub is not None:
            from quantcache.artifact import hub

            hub.check_push(push_to_hub)

        from quantcache.calibration.calibrator import calibrate as calibrate_model

        started = time.perf_counter()
        loaded, tokenizer = load_model(
            model, attention=None, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        replaces = output is not None and holds_calibration(output, loaded, model, overwrite)
        calibration = calibrate_model(
            loaded,
            texts,
            tokenizer,
            bits,
            key_bits=keys,
            value_bits=values,
            min_bits=min_bits,
            metric=metric,
            max_tokens=tokens,
            seq_len=seq_len,
            residual_length=residual,
            seed=seed,
        )
        url = None
        if output is not None:
            calibration.save_pretrained(output, model_card_kwargs={"metrics": rows})
        if push_to_hub is not None:
            url = push(calibration, push_to_hub, rows, output, private)
        where = {"output": None if output is None else str(output), "url": url}
        run.finish(*_result(calibration, model, where, replaces, time.perf_counter() - started))


def _result(
    calibration: Calibration, model: str, where: dict[str, str | None], replaces: bool, seconds: float
) -> tuple[dict[str, Any], Prose]:
    """What is said of a calibration that has been made: as JSON, and in a line."""
    data = {
        "model": model,
        **where,
        "replaced": replaces,
        "layers": len(calibration.layers),
        "bits": calibration.bits,
        "bits_per_element": calibration.bits_per_element,
        "recipe": calibration.metadata.recipe,
        "seconds": seconds,
    }
    line = (
        f"{' and '.join(place for place in where.values() if place)}: {data['layers']} layers at "
        f"{calibration.bits_per_element:.3f} bits per element, gains included "
        f"({calibration.metadata.recipe['tokens']:,} tokens, {seconds:.0f} s)"
        f"{', in place of an older one' if replaces else ''}"
    )
    return data, Prose(line)


def _recipe(name: str, context: typer.Context) -> Recipe:
    from quantcache.artifact.recipes import load_recipe

    refuse_options(context)
    return load_recipe(name)


def _recipes() -> tuple[dict[str, Any], Grid]:
    """The recipes that come with quantcache: as JSON, and as a table."""
    from quantcache.artifact.recipes import load_recipe, recipe_names

    found = {name: load_recipe(name) for name in recipe_names()}
    columns = ("model", "bits", "tokens", "seq_len", "metric", "dtype")
    data = [{"recipe": name, **{column: getattr(each, column) for column in columns}} for name, each in found.items()]
    grid = Grid("recipe", "model", "bits", "tokens", text=2)
    for each in data:
        grid.add_row(each["recipe"], each["model"], f"{each['bits']:g}", f"{each['tokens']:,}")
    return {"recipes": data}, grid


def push(
    calibration: Calibration, repo_id: str, rows: list[dict[str, Any]] | None, saved: Path | None, private: bool
) -> str:
    """Push a calibration, and keep it where that fails: it may have taken hours.

    Args:
        calibration: Freshly made, perhaps not saved yet.
        repo_id: Hub repository, ``owner/name``.
        rows: Measurements for its card.
        saved: Where it has been saved already.
        private: Whether a new repository is private.

    Returns:
        The commit's URL.

    Raises:
        HubError: The Hub refuses, or cannot be reached; the message says where the calibration is.
        KeyboardInterrupt: Ctrl-C was pressed; the calibration is kept too.
    """
    try:
        return calibration.push_to_hub(repo_id, private=private or None, model_card_kwargs={"metrics": rows})
    except (HubError, KeyboardInterrupt) as error:
        # From Python 3.12 on the name is a whole path.
        kept = saved or Path(Path(tempfile.mkdtemp(prefix=f"{repo_id.rpartition('/')[2]}-", dir=".")).name)
        if saved is None:
            calibration.save_pretrained(kept, model_card_kwargs={"metrics": rows})
        raise type(error)(f"{str(error) or 'interrupted'}; the calibration is kept in {kept}") from error


_FOLDERS = ("calibration_config.json", "config.json", "calibration.safetensors")
"""What tells a folder that a calibration may be written into: an older one, or a model's own."""

_BESIDE_A_RECIPE = {
    "model",
    "recipe",
    "output",
    "overwrite",
    "push_to_hub",
    "private",
    "records",
    "list_recipes",
    "device",
    "trust_remote_code",
    "json",
    "debug",
}


def refuse_options(context: typer.Context) -> None:
    """Refuse options that a recipe sets.

    Args:
        context: What was given on the command line.

    Raises:
        WrongUsage: An option was given that the recipe sets.
    """
    given = [name for name in sorted(context.params) if name not in _BESIDE_A_RECIPE and is_given(context, name)]
    if given:
        options = ", ".join("more text" if name == "more_text" else f"--{name.replace('_', '-')}" for name in given)
        raise WrongUsage(f"--recipe sets {options} already: leave that out, or copy the recipe and change it")


def side_bits(option: str, given: str) -> SideBits:
    """Read the bits of one side.

    Args:
        option: The option's name, for the error.
        given: What the user wrote.

    Returns:
        What ``Calibration.with_bits`` takes.

    Raises:
        typer.BadParameter: The text is not a number from 0 to 8, ``dense`` or ``joint``.
    """
    if given == "joint" or given == "dense":
        return given  # type: ignore[return-value]
    try:
        bits = float(given)
    except ValueError:
        bits = -1.0
    if not 0 <= bits <= 8:
        raise typer.BadParameter(f"{given!r} is not a number from 0 to 8, 'dense' or 'joint'", param_hint=f"'{option}'")
    return bits
