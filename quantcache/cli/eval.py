"""``quantcache eval``."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcache.cli.eval_tables import tables
from quantcache.cli.outputs import check_output_file
from quantcache.cli.session import (
    DebugFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    ModelArgument,
    RevisionOption,
    TrustOption,
    load_calibration,
    load_model,
    position_limit,
    progress_bar,
    read_text,
    session,
    show_cells,
)
from quantcache.cli.terminal import report
from quantcache.common.defaults import CHUNK, RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from quantcache.evaluation.cells import Cells
    from quantcache.evaluation.plan import Material, Plan

METHODS = "dense,spectral-2,spectral-3,spectral-4,turboquant-mse-2,turboquant-mse-3,turboquant-mse-4"
CONTEXT = 2048
QUICK_TOKENS = 2048


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to evaluate on, never one calibrated on.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", "-c", metavar="ARTIFACT", help="For the spectral methods.")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="Comma-separated: fidelity, needle, routing, transfer, qa, memory, speed, or all.")
    ] = "fidelity",
    methods: Annotated[str, typer.Option(help="Comma-separated: dense, spectral-B, turboquant-mse-B, ...")] = METHODS,
    context: Annotated[
        str | None, typer.Option(help="Tokens in a window; several for fidelity. Default: 2048 or the limit.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to use at most.")] = 16_384,
    residual: Annotated[str, typer.Option(help="Recent tokens that every method keeps; several for fidelity.")] = str(
        RESIDUAL_LENGTH
    ),
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that every method keeps.")] = SINK_LENGTH,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens fed at once.")] = CHUNK,
    stride: Annotated[
        int | None, typer.Option(help="Fidelity: windows slide by so many tokens instead of lying side by side.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Quantize the model's weights first: int8 or int4, with quanto- or torchao-.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Small suites, {QUICK_TOKENS} tokens at most.")] = False,
    qa: Annotated[
        Path | None, typer.Option(metavar="FILE", help="SQuAD JSON, or JSON lines of context, question and answers.")
    ] = None,
    domain: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another text for the transfer suite; may be repeated.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Draft model. Default: the model's own first half.")
    ] = None,
    needle_fact: Annotated[str | None, typer.Option(help="How a needle is stated, with {name} and {code}.")] = None,
    needle_question: Annotated[str | None, typer.Option(help="How it is asked for, with {name}.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
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
        names = _names("--methods", methods, "method")
        contexts = None if context is None else _numbers("--context", context, 2)
        residuals = _numbers("--residual", residual, 0)
        if output is not None:
            check_output_file(output)
        content = read_text(text)
        constants = None if calibration is None else load_calibration(calibration)

        from quantcache.evaluation import needs_statistics, runner, text_statistics
        from quantcache.evaluation import qa as questions
        from quantcache.evaluation.fidelity import check_stride
        from quantcache.evaluation.needle import NeedleFormat
        from quantcache.evaluation.plan import QUICK, SUITES, Material, Plan, Sizes
        from quantcache.evaluation.provenance import check_material, check_overlap, text_sha256
        from quantcache.evaluation.weights import quantize_weights, weights_library

        if weights is not None:
            weights_library(weights)  # a wrong name is told before a model is loaded
        if constants is not None:
            check_overlap(constants, content, str(text), used="")  # the whole text first, before a model is loaded

        suites = _suites(suite, SUITES, qa)
        asked = None if qa is None else questions.load_questions(qa)
        domains = {path.stem: read_text(path) for path in domain or ()}
        if len(domains) != len(domain or ()):
            raise ValueError("--domain files must differ in name")
        loading: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        loaded, tokenizer = load_model(model, revision=revision, **loading)
        if constants is not None:
            constants.check_compatible(loaded)
        quantized = None if weights is None else quantize_weights(loaded, weights)
        limit = position_limit(loaded)
        contexts = contexts or (min(CONTEXT, limit or CONTEXT),)
        if limit is not None and max(contexts) > limit:
            raise ValueError(f"--context {max(contexts)} exceeds the model's limit of {limit} positions")
        if stride is not None:
            check_stride(stride, min(contexts))
        wanted = min(tokens, QUICK_TOKENS) if quick else tokens
        if wanted < max(contexts):
            raise ValueError(
                f"{wanted} tokens are less than one window of {max(contexts)}: raise --tokens or lower --context"
            )
        form = NeedleFormat()
        plan = Plan(
            suites=suites,
            methods=tuple(names),
            contexts=contexts,
            tokens=wanted,
            residuals=residuals,
            sinks=sinks,
            chunk=chunk,
            stride=stride,
            sizes=QUICK if quick else Sizes(),
            needle_form=NeedleFormat(needle_fact or form.fact, needle_question or form.question),
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
        if material.statistics is not None and text_sha256(content) in material.statistics.text_sha256:
            raise QuantCacheError(f"{text} is the text that pca, oscar and rank are fitted to: evaluate on another one")
        for residual_length in residuals:
            runner.make_methods(material, plan, residual_length)  # a wrong name is told before anything is hashed
        ids = runner.used_tokens(material, plan)
        used = str(tokenizer.decode(ids, skip_special_tokens=True))
        gates = {} if constants is None else check_material(constants, material, str(text), used)
        inputs = _inputs(material)
        with progress_bar() as bar:
            cells = _cells(output, _fingerprint(plan, inputs, loaded), restart, bar)
            if cells.reused:
                report("note", f"going on with {cells.reused} finished cells of {cells.path}")
            try:
                results = runner.run(material, plan, cells)
            except KeyboardInterrupt:
                kept = "" if cells.path is None else f"; the same command goes on with what is in {cells.path}"
                raise KeyboardInterrupt(f"interrupted{kept}") from None
        failures = runner.failures(results)
        step = stride or contexts[0]
        if not runner.measured(results):
            raise QuantCacheError(f"no method could be measured; {(failures or runner.skipped(results))[0]}")
        data = {
            "model": model,
            "calibration": calibration,
            "context": contexts[0],
            "tokens": (len(ids.unfold(0, contexts[0], step)) - 1) * step + contexts[0],
            "stride": stride,
            "weights": quantized,
            "residual": residuals[0],
            "sinks": sinks,
            "chunk": chunk,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "text": {"name": text.name, "sha256": inputs["text"]},
            "seconds": time.perf_counter() - started,
            **({"methods": results["fidelity"][0]["methods"]} if "fidelity" in results else {}),
        }
        data = _record(plan, results, data, inputs, gates, output, bool(failures))
        cells.close()
        run.finish(data, *tables(data))


def _names(option: str, given: str, kind: str) -> list[str]:
    """The parts of a comma-separated option, each once."""
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise ValueError(f"{option} names no {kind}")
    return names


def _numbers(option: str, given: str, least: int) -> tuple[int, ...]:
    """The whole numbers of a comma-separated option."""
    try:
        numbers = tuple(int(part) for part in _names(option, given, "number"))
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


def _length_text() -> str:
    """What length transfer is calibrated on: the text that comes with the package."""
    from quantcache.data import calibration_text

    return calibration_text()


def _inputs(material: Material) -> dict[str, str | None]:
    """SHA-256 of everything that is measured with."""
    from quantcache.evaluation import provenance

    questions = None if material.questions is None else repr(list(material.questions))
    found = {
        "model": provenance.model_sha256(material.model),
        "tokenizer": provenance.tokenizer_sha256(material.tokenizer),
        "calibration": None if material.calibration is None else provenance.calibration_sha256(material.calibration),
        "text": provenance.text_sha256(material.text),
        "questions": None if questions is None else provenance.text_sha256(questions),
        "draft": None if material.draft is None else provenance.model_sha256(material.draft),
        "code": provenance.code_sha256(),
    }
    return {**found, **{f"domain {name}": provenance.text_sha256(text) for name, text in material.domains.items()}}


def _fingerprint(plan: Plan, inputs: dict[str, str | None], model: PreTrainedModel) -> dict[str, Any]:
    """What decides a cell's figures: more methods or suites may be asked for later, nothing else may change."""
    from quantcache.common.env import environment

    settings = {key: value for key, value in plan.to_dict().items() if key not in ("methods", "suites")}
    machine = {key: value for key, value in environment().items() if key in ("versions", "cpu", "gpus")}
    where = {"device": str(model.device), "dtype": str(model.dtype), **machine}
    return {**{f"{name} hash": digest for name, digest in inputs.items()}, **settings, **where}


def _cells(output: Path | None, fingerprint: dict[str, Any], restart: bool, bar: Progress) -> Cells:
    """Cells that are kept beside the output and shown on a progress bar."""
    from quantcache.evaluation.cells import Cells

    path = None if output is None else output.with_name(f"{output.name}.cells")
    cells = Cells(path, fingerprint, restart)
    show_cells(cells, bar)
    return cells


def _record(
    plan: Plan,
    results: dict[str, Any],
    data: dict[str, Any],
    inputs: dict[str, str | None],
    gates: dict[str, Any],
    output: Path | None,
    partial: bool,
) -> dict[str, Any]:
    """The record of the run, written where it was asked for."""
    from quantcache.common.env import environment
    from quantcache.evaluation.record import Record, write_record

    surroundings = environment()
    git = surroundings.pop("git") or {"commit": None, "dirty": True}
    record = Record(
        suite="eval",
        status="partial" if partial else "ok",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=git["commit"],
        dirty=git["dirty"] or git["commit"] is None,
        command=" ".join(["quantcache", *sys.argv[1:]]),
        environment=surroundings,
        settings=plan.to_dict(),
        metrics=results,
        inputs=inputs,
        seeds=plan.seeds,
        gates=gates,
    )
    if output is None:
        return {**data, **record.to_dict()}
    return write_record(output, record, data)
