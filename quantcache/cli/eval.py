"""``quantcache eval``."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcache.cli.eval_choices import (
    check_methods,
    methods_known,
    read_names,
    read_suites,
    read_token_counts,
    without_effect,
)
from quantcache.cli.eval_tables import for_people
from quantcache.cli.loading import load_calibration, load_model, own_calibration, read_text
from quantcache.cli.options import (
    CalibrationOption,
    DebugFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    RevisionOption,
    TokensOption,
    TrustOption,
    is_given,
)
from quantcache.cli.outputs import check_output_file
from quantcache.cli.pages import MODEL, WrongUsage
from quantcache.cli.reaching import expect_model
from quantcache.cli.session import session, show_cells
from quantcache.cli.terminal import report
from quantcache.common.choices import SUITES, QuantizedWeights
from quantcache.common.defaults import CHUNK, RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.progress import progress_bar
from quantcache.common.sources import MODEL_HELP

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from quantcache.evaluation.cells import Cells
    from quantcache.evaluation.needle import NeedleFormat

METHODS = "dense,spectral-2,spectral-3,spectral-4,turboquant-mse-2,turboquant-mse-3,turboquant-mse-4"
CONTEXT = 2048
TAIL_CONTEXTS = (1024, 4096, 8192)
TAIL_CHUNK = 128
"""Of an equal exact tail: the contexts where nothing else is said, and a chunk that fills the longest tiles."""
QUICK_TOKENS = 1024
"""Of a quick run: all methods on a model of 135 million parameters then take minutes."""


SUITE = "Options of single suites"


def evaluate(
    invocation: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to evaluate on, never one calibrated on.")
    ] = None,
    calibration: CalibrationOption = None,
    suite: Annotated[
        str, typer.Option(metavar="NAMES", help=f"Comma-separated: {', '.join(SUITES)}, or all.")
    ] = "fidelity",
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated: dense, spectral-B, ..., or all; --list-methods has the rest.",
            show_default=METHODS.replace(",", ", "),
        ),
    ] = METHODS,
    list_methods: Annotated[
        bool, typer.Option("--list-methods", help="List the methods that can be measured.", show_default=False)
    ] = False,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens in a window, such as 1024 or 4K; several for fidelity.",
            show_default="2K or the model's limit; with --tail 1K, 4K and 8K as far as model and text allow",
        ),
    ] = None,
    tokens: TokensOption = 16_384,
    residual: Annotated[
        str, typer.Option(metavar="TOKENS", help="Recent tokens that every method keeps; several for fidelity.")
    ] = str(RESIDUAL_LENGTH),
    tail: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="In place of --residual, for fidelity: methods read everything but so many recent tokens from codes; "
            "one or several, such as 0,64,256.",
        ),
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, metavar="TOKENS", help="First tokens that every method keeps.")] = (
        SINK_LENGTH
    ),
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="TOKENS", help="Tokens fed at once.", show_default=f"{CHUNK}; with --tail {TAIL_CHUNK}"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="TOKENS", help="From one window of fidelity to the next.", show_default="a whole window"
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"Small suites, on {QUICK_TOKENS} tokens or one window of a longer --context.",
            show_default=False,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            "-o",
            metavar="FILE",
            help="Also write the JSON here.",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the finished cells of an earlier run.", show_default=False)
    ] = False,
    qa: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For qa: SQuAD JSON, or JSON lines of context, question and answers.",
            rich_help_panel=SUITE,
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="For qa: questions asked.",
            show_default="12, with --quick 2",
            rich_help_panel=SUITE,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="For needle, records, lookup, tools and divergence: texts, tables or prompts drawn.",
            rich_help_panel=SUITE,
        ),
    ] = None,
    domain: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="For transfer: another text; repeatable.", rich_help_panel=SUITE),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="For speed: draft model.",
            show_default="the model's own first half",
            rich_help_panel=SUITE,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="For needle and records: lengths of prompts, such as 1K,2K,4K.",
            show_default="half the context and all of it",
            rich_help_panel=SUITE,
        ),
    ] = None,
    needle_fact: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="How a needle is stated, with {name} and {code}.", rich_help_panel=SUITE),
    ] = None,
    needle_question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="How it is asked for, with {name}.", rich_help_panel=SUITE)
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts into the chat template.",
            show_default="if the model has one",
            rich_help_panel=SUITE,
        ),
    ] = None,
    weights: Annotated[
        QuantizedWeights | None, typer.Option(help="Quantize the model's weights first.", rich_help_panel=MODEL)
    ] = None,
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

    Examples:
        quantcache eval wiki11m --text held_out.txt --quick
        quantcache eval MODEL -c calibration/ --text held_out.txt --suite all \\
          --qa questions.json -o result.json
        quantcache eval --list-methods
    """
    with session(json, debug) as run:
        if list_methods:
            run.finish(*methods_known())
            return
        for name, value in (("argument 'MODEL'", model), ("option '--text'", text)):
            if value is None:
                raise WrongUsage(f"Missing {name}.")
        assert model is not None
        assert text is not None
        started = time.perf_counter()
        suites = read_suites(suite, qa)
        names = tuple(read_names("--methods", methods))
        contexts = None if context is None else read_token_counts("--context", context, least=2)
        if tail is not None and is_given(invocation, "residual"):
            raise WrongUsage(f"give either --tail or --residual, got --tail {tail} and --residual {residual}")
        kept = ("--residual", residual) if tail is None else ("--tail", tail)
        residuals = read_token_counts(*kept, least=0)
        prompts = None if lengths is None else read_token_counts("--lengths", lengths, least=2)
        if tokens < 2:
            raise typer.BadParameter("a prediction needs two tokens", param_hint="'--tokens'")
        if output is not None:
            check_output_file(output)
        content = read_text(text)
        expect_model(model, revision)

        from quantcache.data import calibration_text
        from quantcache.evaluation import evaluator
        from quantcache.evaluation.methods import needs_statistics, text_statistics
        from quantcache.evaluation.plan import Material, Plan, chosen_sizes
        from quantcache.evaluation.provenance import check_overlap
        from quantcache.evaluation.qa import load_questions
        from quantcache.evaluation.weights import quantize_weights, require_quantizer

        if check_methods(names) and calibration is None:
            calibration = own_calibration(model)
        constants = None if calibration is None else load_calibration(calibration)
        if constants is not None:
            check_overlap(constants, content, str(text), used="")  # the whole text first, before a model is loaded
        if weights is not None:
            require_quantizer(weights)
        asked = None if qa is None else load_questions(qa)
        domains = _domains(domain or (), text)
        for note in without_effect(suites, invocation):
            report("note", note)
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
            sizes=chosen_sizes(quick, questions, trials),
            needle_form=_needle_form(needle_fact, needle_question),
            lengths=prompts,
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
            length_text=calibration_text() if "transfer" in suites else None,
            draft=None if draft is None else load_model(draft, **loading)[0],
            statistics=text_statistics(loaded, tokenizer) if needs_statistics(names) else None,
        )
        called = evaluator.Names(model, text, calibration, quantized)
        with progress_bar() as bar:
            watch = functools.partial(_watch, bar=bar)
            data = evaluator.evaluate(material, plan, called, output, restart=restart, started=started, on_start=watch)
        run.finish(data, *for_people(data))


def _domains(paths: Sequence[Path], text: Path) -> dict[str, str]:
    """Texts by the names of their files, by which results tell them apart."""
    domains = {path.stem: read_text(path) for path in paths}
    if len(domains) != len(paths):
        raise ValueError("--domain files must differ in name")
    for path in paths:
        if path.stem == text.stem:
            raise ValueError(f"--domain files must differ in name from --text, got --domain {path} and --text {text}")
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
