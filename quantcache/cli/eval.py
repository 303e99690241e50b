"""``quantcache eval``."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcache.cli.eval_tables import tables
from quantcache.cli.loading import load_calibration, load_model, read_text
from quantcache.cli.options import (
    CALIBRATION_HELP,
    DebugFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    ModelArgument,
    RevisionOption,
    TrustOption,
)
from quantcache.cli.outputs import check_output_file
from quantcache.cli.session import progress_bar, session, show_cells
from quantcache.cli.terminal import report
from quantcache.common.defaults import CHUNK, RESIDUAL_LENGTH, SINK_LENGTH

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from quantcache.evaluation.cells import Cells
    from quantcache.evaluation.needle import NeedleFormat
    from quantcache.evaluation.plan import Sizes

METHODS = "dense,spectral-2,spectral-3,spectral-4,turboquant-mse-2,turboquant-mse-3,turboquant-mse-4"
CONTEXT = 2048
TAIL_CONTEXTS = (1024, 4096, 8192)
TAIL_CHUNK = 128
"""Of an equal exact tail: the contexts where nothing else is said, and a chunk that fills the longest tiles."""
QUICK_TOKENS = 1024
"""Of a quick run: all methods on a model of 135 million parameters then take minutes."""


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to evaluate on, never one calibrated on.")],
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", "-c", metavar="ARTIFACT", help=f"The model's calibration: {CALIBRATION_HELP}."),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="Comma-separated: fidelity, divergence, needle, records, lookup, tools, routing, transfer, qa, "
            "memory, speed, or all."
        ),
    ] = "fidelity",
    methods: Annotated[
        str, typer.Option(help="Comma-separated: dense, spectral-B, ..., or all (docs/fidelity.md has the list).")
    ] = METHODS,
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens in a window, such as 1024 or 4K; several for fidelity. Default: 2048 or the limit; "
            "with --tail 1K, 4K and 8K as far as the model and --tokens allow."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to use at most.")] = 16_384,
    residual: Annotated[str, typer.Option(help="Recent tokens that every method keeps; several for fidelity.")] = str(
        RESIDUAL_LENGTH
    ),
    tail: Annotated[
        str | None,
        typer.Option(
            help="Fidelity at equal exact tails, such as 0,64,256, in place of --residual (docs/evaluation.md)."
        ),
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that every method keeps.")] = SINK_LENGTH,
    chunk: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens fed at once. Default: {CHUNK}, with --tail {TAIL_CHUNK}.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Fidelity: tokens from one window to the next. Default: a window.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Quantize the model's weights first: int8, int4, or such as quanto-int8.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help=f"Small suites, on {QUICK_TOKENS} tokens or one window of a longer --context."),
    ] = False,
    qa: Annotated[
        Path | None, typer.Option(metavar="FILE", help="SQuAD JSON, or JSON lines of context, question and answers.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Questions asked of --qa FILE. Default: 12.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="How often task and divergence suites draw a text, table or prompt.")
    ] = None,
    domain: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another text for the transfer suite; may be repeated.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Draft model. Default: the model's own first half.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of needle and records prompts, such as 1K,2K,4K. Default: half the context and all of it."
        ),
    ] = None,
    needle_fact: Annotated[str | None, typer.Option(help="How a needle is stated, with {name} and {code}.")] = None,
    needle_question: Annotated[str | None, typer.Option(help="How it is asked for, with {name}.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Put prompts into the chat template. Default: if the model has one."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", metavar="FILE", help="Also write the JSON here.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the finished cells of an earlier run.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Measure how far compressed caches move a model's predictions, and what else they cost and save.

    Text is fed in chunks through the real cache of every method, and compared with the dense cache. With --output,
    finished cells are kept beside it: the same command goes on after an interruption.

    Example: quantcache eval wiki11m -c calibration/ --text held_out.txt --quick
    """
    with session(json, debug) as run:
        started = time.perf_counter()
        names = tuple(_names("--methods", methods, "method"))
        contexts = None if context is None else _numbers("--context", context, 2)
        residuals = _numbers("--residual", residual, 0) if tail is None else _numbers("--tail", tail, 0)
        if output is not None:
            check_output_file(output)
        content = read_text(text)
        constants = None if calibration is None else load_calibration(calibration)

        from quantcache.evaluation import evaluator, needs_statistics, text_statistics
        from quantcache.evaluation.plan import SUITES, Material, Plan
        from quantcache.evaluation.provenance import check_overlap
        from quantcache.evaluation.qa import load_questions
        from quantcache.evaluation.weights import quantize_weights

        _check_weights(weights)
        if constants is not None:
            check_overlap(constants, content, str(text), used="")  # the whole text first, before a model is loaded
        suites = _suites(suite, SUITES, qa)
        asked = None if qa is None else load_questions(qa)
        domains = _domains(domain or ())
        loading: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        loaded, tokenizer = load_model(model, revision=revision, **loading)
        if constants is not None:
            constants.check_compatible(loaded)
        quantized = None if weights is None else quantize_weights(loaded, weights)
        wanted = min(tokens, max((QUICK_TOKENS, *(contexts or ())))) if quick else tokens
        plan = Plan(
            suites=suites,
            methods=names,
            contexts=_contexts(contexts, stride, wanted, loaded, tail is not None, QUICK_TOKENS if quick else CONTEXT),
            tokens=wanted,
            residuals=residuals,
            equal_tail=tail is not None,
            sinks=sinks,
            chunk=chunk or (CHUNK if tail is None else TAIL_CHUNK),
            stride=stride,
            sizes=_sizes(quick, questions, trials),
            needle_form=_needle_form(needle_fact, needle_question),
            lengths=None if lengths is None else _numbers("--lengths", lengths, 2),
            chat=chat,
            text_name=text.stem,
        )
        material = Material(
            model=loaded,
            tokenizer=tokenizer,
            text=content,
            calibration=constants,
            questions=asked,
            domains=domains,
            length_text=_length_text() if "transfer" in suites else None,
            draft=None if draft is None else load_model(draft, **loading)[0],
            statistics=text_statistics(loaded, tokenizer) if needs_statistics(names) else None,
        )
        called = evaluator.Names(model, text, calibration, quantized)
        with progress_bar() as bar:
            watch = functools.partial(_watch, bar=bar)
            data = evaluator.evaluate(material, plan, called, output, restart=restart, started=started, on_start=watch)
        run.finish(data, *tables(data))


def _names(option: str, given: str, kind: str) -> list[str]:
    """The parts of a comma-separated option, each once."""
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise ValueError(f"{option} names no {kind}")
    return names


def _numbers(option: str, given: str, least: int) -> tuple[int, ...]:
    """The whole numbers of a comma-separated option; ``4K`` is 4096."""
    try:
        numbers = tuple(
            1024 * int(part[:-1]) if part[-1] in "kK" else int(part) for part in _names(option, given, "number")
        )
    except ValueError:
        raise ValueError(f"{option} must be whole numbers, comma-separated, got {given!r}") from None
    if min(numbers) < least:
        raise ValueError(f"{option} must be at least {least}, got {min(numbers)}")
    return numbers


def _suites(given: str, known: tuple[str, ...], qa: Path | None) -> tuple[str, ...]:
    names = _names("--suite", given, "suite")
    unknown = [name for name in names if name not in (*known, "all")]
    if unknown:
        raise ValueError(f"unknown suite {unknown[0]!r}: known are {', '.join(known)}, all")
    if "qa" in names and qa is None:
        raise ValueError("--suite qa needs --qa FILE")
    return known if "all" in names else tuple(name for name in known if name in names)


def _check_weights(name: str | None) -> None:
    """Tell a wrong name before a model is loaded."""
    from quantcache.evaluation.weights import weights_library

    if name is not None:
        weights_library(name)


def _sizes(quick: bool, questions: int | None, trials: int | None) -> Sizes:
    """How much each suite does."""
    from quantcache.evaluation.plan import QUICK, Sizes

    sizes = QUICK if quick else Sizes()
    if questions is not None:
        sizes = replace(sizes, questions=questions)
    if trials is not None:
        sizes = replace(sizes, needle_seeds=trials, task_seeds=trials, prompts=trials)
    return sizes


def _length_text() -> str:
    """What length transfer is calibrated on: the text that comes with the package."""
    from quantcache.data import calibration_text

    return calibration_text()


def _domains(paths: Sequence[Path]) -> dict[str, str]:
    """Texts by the names of their files."""
    domains = {path.stem: read_text(path) for path in paths}
    if len(domains) != len(paths):
        raise ValueError("--domain files must differ in name")
    return domains


def _needle_form(fact: str | None, question: str | None) -> NeedleFormat:
    from quantcache.evaluation.needle import NeedleFormat

    usual = NeedleFormat()
    return NeedleFormat(fact or usual.fact, question or usual.question)


def _contexts(
    given: tuple[int, ...] | None, stride: int | None, tokens: int, model: PreTrainedModel, equal_tail: bool, usual: int
) -> tuple[int, ...]:
    """Tokens in a window, within the model's limit and within the text."""
    from quantcache.common import compat
    from quantcache.evaluation.fidelity import check_stride

    limit = compat.position_limit(model.config)
    most = min(tokens, limit or tokens)
    ladder = tuple(context for context in TAIL_CONTEXTS if equal_tail and context <= most)
    contexts = given or ladder or (min(usual, limit or usual),)
    if limit is not None and max(contexts) > limit:
        raise ValueError(f"--context {max(contexts)} exceeds the model's limit of {limit} positions")
    if stride is not None:
        check_stride(stride, min(contexts))
    if tokens < max(contexts):
        raise ValueError(
            f"{tokens} tokens are less than one window of {max(contexts)}: raise --tokens or lower --context"
        )
    return contexts


def _watch(cells: Cells, bar: Progress) -> None:
    """Show cells on a progress bar, and say what is there already."""
    show_cells(cells, bar)
    if cells.reused:
        report("note", f"going on with {cells.reused} finished cells of {cells.path}")
