"""Several suites on one model and text: sizes, order, and the cells that let an interrupted run go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.common import compat
from quantcache.common.choices import SUITES
from quantcache.common.errors import QuantCacheError
from quantcache.common.sequences import text_tokens
from quantcache.evaluation import divergence, exercises, memory, needle, qa, routing, speculative, speed, transfer
from quantcache.evaluation.cells import Cells, attempt
from quantcache.evaluation.feeding import check_lengths, has_template, opening
from quantcache.evaluation.fidelity import check_stride, check_tail, measure_fidelity
from quantcache.evaluation.methods import Method, parse_methods
from quantcache.evaluation.paired import relative_kl
from quantcache.evaluation.plan import Material, Plan
from quantcache.evaluation.tasks import measure_task

GROUP = 4
"""Methods that share one dense pass in the fidelity suite: what an interruption can cost."""

ANSWER_ROOM = 64
"""Tokens of a model's limit that are left for answers about records, where no lengths are given."""


def used_tokens(material: Material, plan: Plan) -> Tensor:
    """The tokens of the text that a plan uses, ``[N]``.

    Args:
        material: Model and text.
        plan: What to measure.

    Returns:
        At most ``plan.tokens`` tokens.

    Raises:
        QuantCacheError: The tokens are fewer than one window.
    """
    ids = text_tokens(material.tokenizer, material.text, plan.tokens)
    if len(ids) < max(plan.contexts):
        raise QuantCacheError(f"the text has {len(ids)} tokens, one window needs {max(plan.contexts)}")
    return ids


def run(material: Material, plan: Plan, cells: Cells | None = None) -> dict[str, Any]:
    """Measure every suite of a plan.

    Args:
        material: What to measure it on.
        plan: What to measure.
        cells: Where finished cells are kept.

    Returns:
        Results by suite, ready for JSON: ``fidelity`` is a list with one entry for each context and residual, the
        others are what their ``to_dict()`` gives; a suite that could not be run is ``{"status": why}``.

    Raises:
        QuantCacheError: A name is unknown, the text is too short, or a suite lacks what it works on.
    """
    cells = cells or Cells()
    unknown = [name for name in plan.suites if name not in SUITES]
    if unknown:
        raise QuantCacheError(f"unknown suite {unknown[0]!r}: known are {', '.join(SUITES)}, all")
    check_lengths(material.model, plan.contexts, "context")
    if plan.stride is not None:
        check_stride(plan.stride, min(plan.contexts))
    if plan.equal_tail:
        check_tail(max(plan.residuals), min(plan.contexts), plan.chunk, plan.sinks)
    tokens = used_tokens(material, plan)
    methods = {residual: make_methods(material, plan, residual) for residual in plan.residuals}
    # What rounding moves is a question of predictions alone: elsewhere the floor is the dense cache once more.
    others = [method for method in methods[plan.residuals[0]] if method.family != "floor"]
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "fidelity": lambda: {"fidelity": _fidelity(material, plan, tokens, methods, cells)},
        "divergence": lambda: {"divergence": _divergence(material, plan, tokens, methods[plan.residuals[0]], cells)},
        "needle": lambda: {"needle": _needle(material, plan, others, cells)},
        **{name: partial(_task, name, material, plan, others, cells) for name in ("records", "lookup", "tools")},
        "routing": lambda: {"routing": _routing(material, plan, tokens, others, cells)},
        "transfer": lambda: {"transfer": _transfer(material, plan, others, cells)},
        "qa": lambda: {"qa": _qa(material, plan, others, cells)},
        "memory": lambda: {
            "memory": memory.measure_memory(material.model, others, lengths=plan.sizes.ladder, cells=cells).to_dict()
        },
        "speed": lambda: _speed(material, plan, tokens, others, cells),
    }
    results: dict[str, Any] = {}
    for suite in SUITES:
        if suite in plan.suites:
            results.update(steps[suite]())
    return results


def make_methods(material: Material, plan: Plan, residual: int) -> list[Method]:
    """The plan's methods.

    Args:
        material: Model and calibration.
        plan: What to measure.
        residual: Recent tokens that every method keeps.

    Returns:
        The methods.

    Raises:
        QuantCacheError: A name is unknown, or a method needs a calibration.
    """
    return parse_methods(
        plan.methods,
        material.model.config,
        material.calibration,
        plan.sinks,
        residual,
        statistics=material.statistics,
    )


def _fidelity(
    material: Material, plan: Plan, tokens: Tensor, methods: dict[int, list[Method]], cells: Cells
) -> list[dict[str, Any]]:
    first = next(iter(methods.values()))
    cells.plan("fidelity", len(plan.contexts) * len(methods) * len(first))
    found = []
    for context in plan.contexts:
        for residual, all_methods in methods.items():
            cell = f"context {context} residual {residual}"
            by_name = {method.name: method for method in all_methods}
            missing = cells.missing("fidelity", by_name, cell)
            for start in range(0, len(missing), GROUP):
                group = [by_name[name] for name in missing[start : start + GROUP]]
                for name, result in _fidelity_group(material.model, tokens, group, plan, context, residual).items():
                    cells.put("fidelity", name, cell, result)
            results = {name: dict(cells.get("fidelity", name, cell)) for name in by_name}
            for name, ratio in relative_kl(results).items():
                results[name]["kl_relative"] = ratio
            tail = residual if plan.equal_tail else None
            setting = {"context": context, "residual": residual, "tail": tail, "stride": plan.stride}
            found.append({**setting, "methods": results})
    return found


def _fidelity_group(
    model: PreTrainedModel, tokens: Tensor, methods: list[Method], plan: Plan, context: int, residual: int
) -> dict[str, dict[str, Any]]:
    """Figures of a few methods from one dense pass; each by itself where that fails."""

    def work(few: list[Method]) -> dict[str, Any]:
        how: dict[str, Any] = {
            "context": context,
            "chunk": plan.chunk,
            "sink_length": plan.sinks,
            "stride": plan.stride,
            "tail": residual if plan.equal_tail else None,
        }
        return {name: r.to_dict() for name, r in measure_fidelity(model, tokens, few, **how).items()}

    together = attempt(lambda: {"results": work(methods)})
    if "results" in together:
        results: dict[str, dict[str, Any]] = together["results"]
        return results
    if len(methods) > 1:
        return {
            name: r
            for method in methods
            for name, r in _fidelity_group(model, tokens, [method], plan, context, residual).items()
        }
    (method,) = methods
    return {method.name: {"family": method.family, "simulated": method.simulated, **together}}


def _divergence(material: Material, plan: Plan, tokens: Tensor, methods: list[Method], cells: Cells) -> dict[str, Any]:
    start, count = opening(material.tokenizer), plan.sizes.continued_tokens
    limit = compat.position_limit(material.model.config) or count + plan.contexts[-1]
    context = min(256, plan.contexts[-1], limit // 2)
    count = min(count, limit - context)
    return divergence.measure_divergence(
        material.model,
        # The tokenizer has put its special tokens in front of the text; they stand in front of every prompt.
        tokens[len(start) :] if torch.equal(tokens[: len(start)], start) else tokens,
        methods,
        opening=start,
        context=context,
        prompts=plan.sizes.prompts,
        new_tokens=count,
        sink_length=plan.sinks,
        cells=cells,
    ).to_dict()


def _chat(material: Material, plan: Plan) -> bool:
    """Whether prompts are put into a chat template."""
    return has_template(material.tokenizer) if plan.chat is None else plan.chat


def _needle(material: Material, plan: Plan, methods: list[Method], cells: Cells) -> dict[str, Any]:
    return needle.measure_needle(
        material.model,
        material.tokenizer,
        material.text,
        methods,
        lengths=plan.prompt_lengths,
        depths=plan.sizes.needle_depths,
        seeds=plan.sizes.needle_seeds,
        form=replace(plan.needle_form, chat=_chat(material, plan)),
        cells=cells,
    ).to_dict()


def _task(name: str, material: Material, plan: Plan, methods: list[Method], cells: Cells) -> dict[str, Any]:
    form, limit = replace(plan.needle_form, chat=_chat(material, plan)), compat.position_limit(material.model.config)
    most = math.inf if plan.lengths is not None or limit is None else limit - ANSWER_ROOM
    lengths = [int(min(length, most)) for length in plan.prompt_lengths]
    task = exercises.drawn(name, material.tokenizer, material.text, lengths, plan.sizes, form)
    if name != "records":  # of given lengths none is left out silently
        task = task.within(limit)
    if not task.exercises:
        return {name: {"status": f"skipped: no exercise fits into the model's limit of {limit} positions"}}
    return {name: measure_task(material.model, material.tokenizer, task, methods, cells=cells).to_dict()}


def _routing(material: Material, plan: Plan, tokens: Tensor, methods: list[Method], cells: Cells) -> dict[str, Any]:
    context = min(plan.contexts[-1], plan.sizes.longest or plan.contexts[-1])
    return routing.measure_routing(
        material.model,
        tokens,
        methods,
        context=context,
        windows=plan.sizes.routing_windows,
        chunk=min(plan.chunk, max(1, (context - plan.sinks) // 2)),
        sink_length=plan.sinks,
        cells=cells,
    ).to_dict()


def _transfer(material: Material, plan: Plan, methods: list[Method], cells: Cells) -> dict[str, Any]:
    model, tokenizer, sizes = material.model, material.tokenizer, plan.sizes
    names = [method.name for method in methods if transfer.needs_calibration(method.name, model)]
    if not names:
        return {"status": "skipped: no method needs a calibration"}
    if sizes.transfer_methods is not None:
        names = names[len(names) // 2 :][: sizes.transfer_methods]  # those in the middle of a ladder of rates
    context = plan.contexts[-1]
    halves = {name: transfer.split_domain(text) for name, text in material.domains.items()}
    calibrated_on = {name: half[0] for name, half in halves.items()}
    size: dict[str, int] = {"tokens": sizes.transfer_tokens, "seq_len": context}
    sources = transfer.domain_sources(model, tokenizer, calibrated_on, **size)
    mixed = [text for text in (material.length_text, *calibrated_on.values()) if text is not None]
    if len(mixed) > 1:
        sources.append(transfer.mixed_source(model, tokenizer, mixed, **size))
    calibration = material.calibration
    if calibration is not None:
        sources.insert(0, transfer.Source("given", lambda: calibration))
    if material.length_text is not None and context > 256:
        sources += transfer.length_sources(
            model,
            tokenizer,
            material.length_text,
            plan.text_name,
            tokens=sizes.transfer_tokens,
            lengths=(256, context),
        )
    if not sources:
        return {"status": "skipped: neither a calibration nor a text to calibrate on was given"}
    return transfer.measure_transfer(
        model,
        tokenizer,
        sources,
        {plan.text_name: material.text, **{name: half[1] for name, half in halves.items()}},
        names,
        context=context,
        tokens=context * sizes.transfer_windows,
        chunk=plan.chunk,
        sink_length=plan.sinks,
        residual_length=plan.residuals[0],
        cells=cells,
    ).to_dict()


def _qa(material: Material, plan: Plan, methods: list[Method], cells: Cells) -> dict[str, Any]:
    if material.questions is None:
        return {"status": "skipped: no questions were given"}
    return qa.measure_qa(
        material.model,
        material.tokenizer,
        material.questions,
        methods,
        count=plan.sizes.questions,
        new_tokens=plan.sizes.answer_tokens,
        chat=_chat(material, plan),
        shots=plan.sizes.question_shots,
        cells=cells,
    ).to_dict()


def _speed(
    material: Material, plan: Plan, tokens: Tensor, methods: list[Method], cells: Cells
) -> dict[str, dict[str, Any]]:
    sizes, warmup = plan.sizes, 4
    limit = compat.position_limit(material.model.config)
    room = max(sizes.steps + warmup, sizes.draft_tokens)
    context = min(plan.contexts[-1], sizes.speed_context, *(() if limit is None else (limit - room,)))
    timed = speed.measure_speed(
        material.model,
        tokens,
        methods,
        context=context,
        batches=sizes.speed_batches,
        steps=sizes.steps,
        warmup=warmup,
        prefills=sizes.prefills,
        cells=cells,
    )
    try:
        draft = material.draft or speculative.early_exit_draft(material.model)
    except QuantCacheError as error:
        return {"speed": timed.to_dict(), "speculative": {"status": f"skipped: {error}"}}
    assisted = speculative.measure_speculative(
        material.model,
        tokens,
        methods,
        draft,
        context=min(context, 512),
        prompts=1,
        new_tokens=sizes.draft_tokens,
        cells=cells,
    ).to_dict()
    own = "the model's first layers" if material.draft is None else "given"
    assisted["settings"]["draft"] = own
    return {"speed": timed.to_dict(), "speculative": assisted}


def parts(results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was measured together: a suite has one such part, fidelity one for each context and residual.

    Args:
        results: What :func:`run` returned.

    Yields:
        The suite's name, and the part.
    """
    for suite, result in results.items():
        for part in result if isinstance(result, list) else [result]:
            yield suite, part


def failures(results: Mapping[str, Any]) -> list[str]:
    """What could not be measured, apart from what was left out on purpose.

    Args:
        results: What :func:`run` returned.

    Returns:
        One line for each method that failed in a suite.
    """
    found = []
    for suite, part in parts(results):
        found += [f"{suite} {name}: {entry['status']}" for name, entry in part.get("methods", {}).items()]
        found += [
            f"{suite} {e['method']} {e['calibrated_on']} -> {e['evaluated_on']}: {e['status']}"
            for e in part.get("entries", [])
        ]
    return [line for line in found if not line.endswith(": ok") and ": skipped: " not in line]


def skipped(results: Mapping[str, Any]) -> list[str]:
    """What was left out on purpose.

    Args:
        results: What :func:`run` returned.

    Returns:
        One line for each suite or method, with the reason.
    """
    found = []
    for suite, part in parts(results):
        if "status" in part:
            found.append(f"{suite}: {part['status']}")
        found += [f"{suite} {name}: {entry['status']}" for name, entry in part.get("methods", {}).items()]
    return [line for line in found if ": skipped: " in line]


def measured(results: Mapping[str, Any]) -> bool:
    """Whether anything at all was measured.

    Args:
        results: What :func:`run` returned.

    Returns:
        Whether some method is ``ok`` in some suite.
    """
    found = (
        each for _, part in parts(results) for each in (*part.get("methods", {}).values(), *part.get("entries", ()))
    )
    return any(entry["status"] == "ok" for entry in found)
