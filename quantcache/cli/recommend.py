"""``quantcache recommend``."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from quantcache.cli.formats import NOT_MEASURED, load_measurements
from quantcache.cli.inspect import rate_line
from quantcache.cli.loading import find_model, load_calibration
from quantcache.cli.options import (
    CALIBRATION_HELP,
    DebugFlag,
    JsonFlag,
    RecordsOption,
    RevisionOption,
    TrustOption,
    token_count,
    wrong_usage,
)
from quantcache.cli.pages import WrongUsage
from quantcache.cli.reaching import expect_model
from quantcache.cli.session import session
from quantcache.common.choices import Quality, WeightsFormatName
from quantcache.common.defaults import PREFILL_CHUNK, QUALITIES
from quantcache.common.errors import QuantCacheError
from quantcache.common.grid import Grid, Prose
from quantcache.common.sources import CONFIG_HELP
from quantcache.common.units import parse_bytes, parse_tokens

if TYPE_CHECKING:
    from quantcache.planning.demand import Candidate, Recommendation


def recommend(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=f"{CONFIG_HELP} A config is enough."),
    ],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="24GB (1000³ bytes) or 24GiB (1024³ bytes).")],
    context: Annotated[str, typer.Option(metavar="TOKENS", help="Cached tokens of each row; 128K is 131,072.")],
    batch: Annotated[int, typer.Option(min=1, metavar="ROWS", help="Rows of the batch.")] = 1,
    max_kl: Annotated[
        float | None, typer.Option(min=0, metavar="NATS", help="Largest mean KL accepted, nats per token.")
    ] = None,
    quality: Annotated[
        Quality | None,
        typer.Option(
            help=f"In place of --max-kl: {', '.join(f'{limit:g} ({word})' for word, limit in QUALITIES.items())}."
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="SHARE", help="Smallest top-1 agreement accepted, such as 0.98."),
    ] = None,
    weights: Annotated[
        WeightsFormatName, typer.Option("--weights", "--weights-format", help="What the model's weights are kept in.")
    ] = "bf16",
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="ARTIFACT",
            help=f"The model's calibration, to predict from: {CALIBRATION_HELP}.",
        ),
    ] = None,
    records: RecordsOption = None,
    prefill_chunk: Annotated[
        int,
        typer.Option(parser=token_count, metavar="TOKENS", help="Prompt tokens that go through the model at once."),
    ] = PREFILL_CHUNK,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say what fits into a memory, and which format to take.

    Examples:
        quantcache recommend wiki11m --memory 88MB --context 32K
        quantcache recommend Qwen/Qwen3-0.6B --memory 24GB --context 128K --batch 4
        quantcache recommend Qwen/Qwen3-8B --memory 24GiB --context 64K \\
          --weights int4-g128 --quality balanced
    """
    with session(json, debug) as run:
        for name, value in (("--max-kl", max_kl), ("--min-agreement", min_agreement)):
            if value is not None and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not a number", param_hint=f"'{name}'")
        if quality is not None and max_kl is not None:
            raise WrongUsage(f"give either --quality or --max-kl, got --quality {quality} and --max-kl {max_kl:g}")
        with wrong_usage():
            sizes = parse_bytes(memory, "--memory"), parse_tokens(context, "--context")
        expect_model(model, revision)

        from quantcache.planning import recommend as planning
        from quantcache.planning.demand import Demand
        from quantcache.planning.geometry import load_config

        demand = Demand(
            *sizes,
            batch=batch,
            max_kl=max_kl if quality is None else QUALITIES[quality],
            min_agreement=min_agreement,
            weights=weights,
            chunk=prefill_chunk,
        )
        demand.check()
        find_model(model, revision)
        measurements = load_measurements(records)
        found = planning.recommend(
            planning.model_sizes(load_config(model, revision, trust_remote_code)),
            demand,
            measurements,
            model=model,
            calibration=None if calibration is None else load_calibration(calibration),
            calibration_name=calibration,
            unit=memory,
        )
        if found.best is None:
            raise QuantCacheError(found.reason)
        run.finish(found.to_dict(), *_shown(found, memory))


def _shown(found: Recommendation, unit: str) -> list[Grid | str]:
    from quantcache.common.units import show_bytes

    demand = found.demand
    assert found.best is not None
    best = found.candidate(found.best)
    summary = Grid("", "", fold=True)
    summary.add_row("take", f"{best.format}: {found.reason}")
    summary.add_row("weights", f"{show_bytes(found.weights_bytes, unit)} in {demand.weights}")
    largest = show_bytes(best.cache_bytes_largest, unit)
    summary.add_row("cache", f"{show_bytes(best.cache_bytes, unit)} after one prompt, at most {largest}")
    beside = show_bytes(best.constants_bytes + best.activation_bytes, unit)
    summary.add_row("beside", f"{beside}: activations (estimate) and the calibration's constants")
    summary.add_row("fidelity", _fidelity(best))
    summary.add_row("risk", f"{best.quality.risk}: {best.quality.basis} ({best.quality.source})")
    for rate in found.qualities:
        summary.add_row(rate.quality, rate_line(asdict(rate)))
    title = (
        f"{found.model}: {show_bytes(demand.memory, unit)}, context {demand.context:,}, batch {demand.batch}, "
        f"weights in {demand.weights}"
    )
    table = Grid("format", "cache", "total", "fits", "max context", "KL", "risk", title=title)
    for each in found.candidates:
        quality = each.quality
        table.add_row(
            each.format + "*" * (each.obstacle is not None),
            show_bytes(each.cache_bytes_largest, unit),
            show_bytes(each.total_bytes, unit),
            "yes" if each.fits else "no",
            "no limit" if each.max_context is None else f"{each.max_context:,}",
            "-" if quality.kl is None else f"{quality.kl:.5f}",  # the last column says that nothing is known
            quality.risk,
            style="bold" if each is best else "",
        )
    obstacles: dict[str, list[str]] = {}
    for each in found.candidates:
        if each.obstacle is not None:
            obstacles.setdefault(each.obstacle, []).append(each.format)
    # Most that are marked have one reason in common: naming them all would hide the others.
    groups = sorted(obstacles.items(), key=lambda group: len(group[1]))
    lines = [f"* {obstacle}: {', '.join(names)}" for obstacle, names in groups[:-1]]
    lines += [f"* {obstacle}: {'the others' if lines else 'all that are marked'}" for obstacle, _ in groups[-1:]]
    use = ["", *(f"$ {command}" for command in found.commands), *([""] if found.commands else []), found.python]
    bases = dict.fromkeys(f"risk {e.quality.risk}: {e.quality.basis}" for e in found.candidates)
    return [summary, "", table, "", *map(Prose, (*lines, *bases)), "", *map(Prose, found.notes), *use]


def _fidelity(best: Candidate) -> str:
    quality = best.quality
    kl = NOT_MEASURED if quality.kl is None else f"KL {quality.kl:.5f} nats per token"
    kl += f" ({quality.word})" if quality.word else ""
    agreement = "" if quality.agreement is None else f", same most likely token at {quality.agreement:.2%}"
    predicted = quality.predicted_kl
    also = "" if predicted in (None, quality.kl) else f"; its calibration predicts KL {predicted:.5f}"
    return f"{kl}{agreement}{also}"
