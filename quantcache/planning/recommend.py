"""Which format to take for a model, a memory, a context and a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from quantcache.artifact import tracing
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.quality import quality_rates
from quantcache.common import compat
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import UnsupportedModel
from quantcache.common.units import show_bytes
from quantcache.planning import usage
from quantcache.planning.demand import Candidate, Demand, Recommendation
from quantcache.planning.formats import Format, bits_per_element, list_formats, missing_package, parse_format
from quantcache.planning.geometry import Geometry, read_geometry
from quantcache.planning.memory import (
    Widths,
    cache_memory,
    constants_bytes,
    estimate_activations,
    largest_cache,
    read_widths,
)
from quantcache.planning.quality import Quality, expected_quality
from quantcache.planning.records import Measurements
from quantcache.planning.weights import WEIGHTS_FORMATS, Weight, list_weights, weights_bytes

LONGEST = 1 << 32
"""Contexts are looked for up to here."""


@dataclass(frozen=True)
class ModelSizes:
    """What decides how much memory a model takes.

    Attributes:
        config: ``model.config``.
        geometry: Layers of its cache.
        weights: Shapes of its weights.
    """

    config: PreTrainedConfig
    geometry: Geometry
    weights: list[Weight]


def model_sizes(config: PreTrainedConfig) -> ModelSizes:
    """The sizes of a model, from its config alone.

    Args:
        config: ``model.config``, or what :func:`load_config` returns.

    Returns:
        The sizes.

    Raises:
        UnsupportedModel: The model cannot be built from its config, or its cache cannot be estimated.
    """
    return ModelSizes(config, read_geometry(config), list_weights(tracing.empty_model(config)))


def recommend(
    sizes: ModelSizes,
    demand: Demand,
    measurements: Measurements,
    *,
    model: str,
    calibration: Calibration | None = None,
    calibration_name: str | None = None,
    unit: str = "GB",
) -> Recommendation:
    """Choose a format.

    Args:
        sizes: From :func:`model_sizes`.
        demand: What has to fit.
        measurements: Figures to go by.
        model: What the model is called.
        calibration: Its calibration: sizes and predictions of ours then rest on it.
        calibration_name: Where that is, for the lines that use it.
        unit: A size in whose kind of units messages show bytes.

    Returns:
        The choice. Where nothing fits, ``best`` is None and ``reason`` says what would.

    Raises:
        QuantCacheError: The demand makes no sense.
        CalibrationMismatch: The calibration is another model's.
    """
    demand.check()
    config, geometry, widths = sizes.config, sizes.geometry, read_widths(sizes.config)
    if calibration is not None:
        calibration.check_compatible(config)
    weights = weights_bytes(sizes.weights, demand.weights)
    names = [model, str(getattr(config, "_name_or_path", "") or model)]
    least = 0 if calibration is None else calibration.metadata.rate.min_bits
    candidates: list[Candidate] = []
    refused: dict[str, str] = {}
    for form in list_formats():
        if form.layout == "spectral" and form.bits < least:
            refused[form.name] = f"{form.name}: the calibration gives no coefficient less than {least} bits"
            continue
        if form.layout == "spectral" and calibration is not None and not calibration.metadata.rate.shared:
            refused[form.name] = f"{form.name}: the calibration gives keys and values bits of their own"
            continue
        quality = expected_quality(form, names, demand.context, measurements, calibration)
        try:
            candidates.append(_candidate(form, widths, geometry, weights, demand, quality, calibration))
        except UnsupportedModel as error:
            refused[form.name] = str(error)  # this kind of cache does not take this model
    fitting = [each for each in candidates if each.fits and each.usable]
    eligible = [each for each in fitting if each.meets]
    best = min(eligible, key=_preference, default=None)
    reason = _reason(best, fitting, candidates, demand, weights, functools.partial(show_bytes, like=unit))
    limit = compat.position_limit(config)
    commands, python = [], ""
    if best is not None:
        form = parse_format(best.format)
        path = Path(model)
        named = str(path.parent) if path.name == "config.json" and path.is_file() else model  # what loads weights
        commands = usage.commands(form, named, calibration_name)
        python = usage.python_lines(
            form,
            named,
            calibration_name,
            batch=demand.batch,
            chunk=demand.chunk,
            weights=demand.weights,
            loader=compat.auto_class(config).__name__,
        )
    return Recommendation(
        model=model,
        demand=demand,
        weights_bytes=weights,
        geometry=geometry.basis,
        position_limit=limit,
        best=None if best is None else best.format,
        reason=reason,
        commands=commands,
        python=python,
        notes=[
            *_notes(config, demand, geometry, limit),
            *_measured_on_fewer(candidates),
            *(f"Left out: {reason}." for reason in refused.values()),
        ],
        candidates=candidates,
        qualities=[] if calibration is None else quality_rates(calibration),
    )


def _candidate(
    form: Format,
    widths: Widths,
    geometry: Geometry,
    weights: int,
    demand: Demand,
    quality: Quality,
    calibration: Calibration | None,
) -> Candidate:
    constants = constants_bytes(form, geometry, calibration)

    def needed(tokens: int) -> tuple[int, int, int]:
        """Bytes of the cache, of activations, and of all together."""
        cache = largest_cache(form, geometry, tokens, demand.batch, calibration)
        beside = estimate_activations(widths, form, geometry, tokens, demand.batch, demand.chunk).total
        return cache, beside, weights + constants + cache + beside

    cache, activations, total = needed(demand.context)
    obstacle = missing_package(form)
    return Candidate(
        format=form.name,
        bits_per_element=bits_per_element(form, geometry),
        cache_bytes=cache_memory(form, geometry, demand.context, demand.batch, calibration=calibration).total
        + demand.batch * geometry.state_bytes,
        cache_bytes_largest=cache,
        constants_bytes=constants,
        activation_bytes=activations,
        total_bytes=total,
        fits=total <= demand.memory,
        max_context=longest(lambda tokens: needed(tokens)[2] <= demand.memory),
        usable=obstacle is None,
        obstacle=obstacle,
        meets=_meets(quality, demand),
        quality=quality,
    )


def longest(fits: Callable[[int], bool]) -> int | None:
    """The largest number of tokens that fits, by bisection.

    Args:
        fits: Whether some tokens fit; once they do not, more do not either.

    Returns:
        The number; 0 if nothing fits, None if everything does.
    """
    if fits(LONGEST):
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _meets(quality: Quality, demand: Demand) -> bool:
    if demand.max_kl is not None and (quality.kl is None or quality.kl > demand.max_kl):
        return False
    return demand.min_agreement is None or (quality.agreement is not None and quality.agreement >= demand.min_agreement)


def _preference(candidate: Candidate) -> tuple[bool, float, int]:
    """Least expected KL first; formats without figures last; the smaller cache of two alike."""
    kl = candidate.quality.kl
    return kl is None, 0.0 if kl is None else kl, candidate.cache_bytes_largest


def _reason(
    best: Candidate | None,
    fitting: list[Candidate],
    candidates: list[Candidate],
    demand: Demand,
    weights: int,
    show: Callable[[float], str],
) -> str:
    wanted = f"{demand.context:,} tokens in {demand.batch} row{'s' * (demand.batch > 1)}"
    if best is not None:
        total = f"weights, cache and activations take {show(best.total_bytes)} of {show(demand.memory)} for {wanted}"
        if best.quality.basis == "reference":
            return f"nothing needs compressing: {total}"
        kl = best.quality.kl
        if kl is None:
            return f"{total}; its fidelity has not been measured: use 'quantcache eval'"
        return f"{total}; of all that fit it has the least expected KL, {kl:.5f} nats per token"
    if fitting:
        closest = min(fitting, key=_preference)
        figures = {"KL": closest.quality.kl, "agreement": closest.quality.agreement}
        limits = {"KL of at most": demand.max_kl, "agreement of at least": demand.min_agreement}
        known = ", ".join(f"{name} {value:.5f}" for name, value in figures.items() if value is not None)
        asked = " and ".join(f"{words} {value:g}" for words, value in limits.items() if value is not None)
        return (
            f"nothing that fits {show(demand.memory)} with {wanted} is known to have a {asked}: "
            f"the closest is {closest.format} with {known or 'no figures'}"
        )
    usable = [each for each in candidates if each.usable]
    smallest = min(usable, key=lambda each: each.total_bytes)
    reach = max(usable, key=lambda each: each.max_context or 0)
    message = (
        f"nothing fits {show(demand.memory)} with {wanted}: the smallest, {smallest.format}, takes "
        f"{show(smallest.total_bytes)}, {show(weights)} of it weights in {demand.weights}"
    )
    if not reach.max_context:
        return f"{message}; no context fits at batch {demand.batch}"
    return (
        f"{message}; the largest context that fits is {reach.max_context:,} tokens, with {reach.format} at batch "
        f"{demand.batch}"
    )


def _measured_on_fewer(candidates: list[Candidate]) -> list[str]:
    """Which formats' divergence is the worst of fewer models than that of others, and may be smaller for that alone."""
    counts = {each.format: each.quality.models for each in candidates if each.quality.models is not None}
    most = max(counts.values(), default=0)
    fewer = [name for name, count in counts.items() if count < most]
    if not fewer:
        return []
    return [
        f"KL is the worst of {most} other models; of fewer, which may have spared them a worse one, for "
        f"{', '.join(fewer)}."
    ]


def _notes(config: PreTrainedConfig, demand: Demand, geometry: Geometry, limit: int | None) -> list[str]:
    weights = WEIGHTS_FORMATS[demand.weights]
    notes = [
        f"Weights in {weights.name}: {weights.layout}. In transformers: {weights.use}.",
        f"Cache: the most it may hold on its way to the context, by the formulas of its layout, with {SINK_LENGTH} "
        f"sinks and {RESIDUAL_LENGTH} recent tokens in 16 bits. Not counted: the runtime's own memory, fragmentation, "
        "tables that kernels keep.",
        f"Activations are estimated for prompts fed {demand.chunk:,} tokens at a time "
        "(generate's prefill_chunk_size) and attention that keeps no scores.",
        "Fidelity was measured on plain text unless its record says otherwise; for prompts in a chat template measure "
        "with quantcache eval --chat.",
    ]
    if geometry.basis == "declared":
        notes.append(
            "Heads and dimensions are those that the config declares: the model cannot be run without weights."
        )
    if limit is not None and demand.context > limit:
        notes.append(f"The model was made for {limit:,} positions, {demand.context:,} were asked for.")
    if demand.weights.startswith("gguf"):
        notes.append("With transformers, and so with quantcache, such weights take what bf16 takes.")
    if not any(layer.blocks for layer in geometry.layers):
        notes.append("No layer of this model grows with the whole context: there is nothing to compress.")
    return notes
