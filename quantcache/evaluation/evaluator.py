"""One whole evaluation: what is checked before measuring, the run, and the record of it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from quantcache.coding.schema import Rate
from quantcache.common.env import environment
from quantcache.common.errors import QuantCacheError
from quantcache.common.sequences import cut_windows
from quantcache.evaluation import provenance, runner
from quantcache.evaluation.cells import Cells
from quantcache.evaluation.needle import haystack_size
from quantcache.evaluation.plan import Material, Plan
from quantcache.evaluation.record import Record, write_record


@dataclass(frozen=True)
class Names:
    """What results call the things that were measured with.

    Attributes:
        model: The model.
        text: The text's file.
        calibration: Where the calibration came from.
        weights: How the model's weights were quantized first.
    """

    model: str
    text: Path
    calibration: str | None = None
    weights: str | None = None


def evaluate(
    material: Material,
    plan: Plan,
    names: Names,
    output: Path | None = None,
    *,
    restart: bool = False,
    started: float | None = None,
    on_start: Callable[[Cells], None] = lambda cells: None,
) -> dict[str, Any]:
    """Check, measure and record.

    Args:
        material: What to measure it on.
        plan: What to measure.
        names: What results call it.
        output: Where the record is written; finished cells are kept beside it until then.
        restart: Forget the finished cells of an earlier run.
        started: When the work began, by ``time.perf_counter``; now if None.
        on_start: Called with the cells before the first is measured.

    Returns:
        The record, with headline figures at its top level.

    Raises:
        QuantCacheError: The text is one that something was fitted to, a name is unknown, or nothing could be measured.
        KeyboardInterrupt: The run was interrupted; the message says what is kept.
    """
    started = time.perf_counter() if started is None else started
    fitted = () if material.statistics is None else material.statistics.text_sha256
    if provenance.text_sha256(material.text) in fitted:
        raise QuantCacheError(
            f"{names.text} is the text that pca, oscar and rank are fitted to: evaluate on another one"
        )
    for residual in plan.residuals:
        runner.make_methods(material, plan, residual)  # a wrong name is told before anything is hashed
    ids = runner.used_tokens(material, plan)
    git = environment()["git"]
    gates: dict[str, Any] = {}
    if material.calibration is not None:
        used = str(material.tokenizer.decode(ids, skip_special_tokens=True))
        used = max(used, _haystack(material.text, plan), key=len)  # both begin where the text does
        gates = provenance.check_material(material.calibration, material, str(names.text), used)
    inputs = provenance.inputs(material)
    path = None if output is None else output.with_name(f"{output.name}.cells")
    cells = Cells(path, fingerprint(plan, inputs, material.model), restart)
    on_start(cells)
    try:
        results = runner.run(material, plan, cells)
    except KeyboardInterrupt:
        kept = "" if path is None else f"; the same command goes on with what is in {path}"
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    failures = runner.failures(results)
    if not runner.measured(results):
        raise QuantCacheError(f"no method could be measured; {(failures or runner.skipped(results))[0]}")
    windows = len(cut_windows(material.model.config, ids, plan.contexts[0], plan.stride))
    data = {
        "model": names.model,
        "calibration": names.calibration,
        "rate": None if material.calibration is None else _sides_of(material.calibration.metadata.rate),
        "context": plan.contexts[0],
        "tokens": (windows - 1) * (plan.stride or plan.contexts[0]) + plan.contexts[0],
        "stride": plan.stride,
        "weights": names.weights,
        "residual": plan.residuals[0],
        "sinks": plan.sinks,
        "chunk": plan.chunk,
        "dtype": str(material.model.dtype).removeprefix("torch."),
        "device": str(material.model.device),
        "text": {"name": names.text.name, "sha256": inputs["text"]},
        "seconds": time.perf_counter() - started,
        **({"methods": results["fidelity"][0]["methods"]} if "fidelity" in results else {}),
    }
    record = make_record(plan, results, inputs, gates, git)
    data = {**data, **record.to_dict()} if output is None else write_record(output, record, data)
    cells.close()
    return data


def fingerprint(plan: Plan, inputs: dict[str, str | None], model: PreTrainedModel) -> dict[str, Any]:
    """What decides a cell's figures: more methods or suites may be asked for later, nothing else may change.

    Args:
        plan: What to measure.
        inputs: Hashes of what it is measured on.
        model: The model.

    Returns:
        Everything that matters, ready for JSON.
    """
    settings = {key: value for key, value in plan.to_dict().items() if key not in ("methods", "suites")}
    # What is there for some methods or suites only; both are of texts that come with the package.
    inputs = {name: digest for name, digest in inputs.items() if name not in ("statistics", "length text")}
    machine = {key: value for key, value in environment().items() if key in ("versions", "cpu", "gpus")}
    where = {"device": str(model.device), "dtype": str(model.dtype), **machine}
    return {**{f"{name} hash": digest for name, digest in inputs.items()}, **settings, **where}


def _sides_of(rate: Rate) -> dict[str, Any]:
    """What methods of ours take from a calibration's rate: all but the bits, which their names say."""
    return {name: value for name, value in asdict(rate).items() if name != "bits"}


def _haystack(text: str, plan: Plan) -> str:
    """The beginning of a text in which a plan's suites plant facts; it may be more than the plan's tokens."""
    seeds = {"needle": plan.sizes.needle_seeds, "records": plan.sizes.task_seeds}
    most = max((drawn for suite, drawn in seeds.items() if suite in plan.suites), default=0)
    return text[: haystack_size(plan.prompt_lengths, most)]


def make_record(
    plan: Plan,
    results: dict[str, Any],
    inputs: dict[str, str | None],
    gates: dict[str, Any],
    started: dict[str, Any] | None,
) -> Record:
    """The record of a run that has just ended.

    Args:
        plan: What was measured.
        results: What :func:`quantcache.evaluation.runner.run` returned.
        inputs: Hashes of what it was measured on.
        gates: What the checks before it found.
        started: The state of git when it began: where it has changed since, no one commit says what was run.

    Returns:
        The record.
    """
    surroundings = environment()
    now = surroundings.pop("git")
    git = now or {"commit": None, "dirty": True}
    return Record(
        suite="eval",
        status="partial" if runner.failures(results) else "ok",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=git["commit"],
        dirty=git["dirty"] or git["commit"] is None or now != started,
        command=shlex.join(["quantcache", *sys.argv[1:]]),
        environment=surroundings,
        settings=plan.to_dict(),
        metrics=results,
        inputs=inputs,
        seeds=plan.seeds,
        gates=gates,
    )
