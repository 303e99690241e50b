"""From a model and a text to a report."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.accounting.memory import bits_per_encoded_element
from quantcache.analysis.figures import cache_figures, depth_laws, input_figures
from quantcache.analysis.gathering import MAX_DIM, SINK_SHARE, Gathered, gather
from quantcache.analysis.grade import collect_samples, grade
from quantcache.analysis.report import RATES, Divergence, Grade, HeadBits, Report, Side, SinkToken, Target
from quantcache.analysis.targets import INPUTS
from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.prediction import UNAVAILABLE, measured_on_seen_text, predict_kl
from quantcache.artifact.quality import quality_rates
from quantcache.attention.probe import detect_ropes, evaluating
from quantcache.calibration.calibrator import calibrate, public_name
from quantcache.coding.schema import Rate
from quantcache.common import compat
from quantcache.common.ambient import standard_settings
from quantcache.common.errors import QuantCacheError
from quantcache.common.progress import progress_bar
from quantcache.common.sequences import cut_windows, text_tokens
from quantcache.common.units import show_bits
from quantcache.evaluation.fidelity import measure_fidelity
from quantcache.evaluation.methods import parse_methods
from quantcache.evaluation.provenance import check_overlap

MIN_SEQUENCE = 256
"""Shortest sequences that say anything about a cache that leaves its last tokens alone."""

ORDER = ("key", "rotated key", "value", *INPUTS)
"""Targets in the order of a report."""


@torch.inference_mode(False)
@standard_settings()
def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    text_name: str = "text",
    max_tokens: int = 8192,
    seq_len: int | None = None,
    calibration: Calibration | None = None,
    verify: bool = False,
    progress: bool = True,
) -> Report:
    """Look at what a model's activations and cache allow, and at what quantcache makes of it.

    The text is cut into sequences of one length. All of them are looked at; the last one is kept out of the
    calibration, and grades and measured divergences come from it alone.

    Args:
        model: A decoder-only model, or an encoder, of which only the weights' inputs are looked at.
        tokenizer: Its tokenizer.
        text: The text.
        text_name: What the report calls it.
        max_tokens: Tokens to use at most.
        seq_len: Tokens of a sequence; by default 2,048 or the model's limit.
        calibration: The model's calibration, made on another text; made here from the text if None.
        verify: Also measure the divergences that are predicted.
        progress: Show progress bars on stderr; where that is no terminal, a line for each minute.

    Returns:
        The report.

    Raises:
        QuantCacheError: The text is too short, is what was calibrated on, or the calibration is another model's.
        UnsupportedModel: The model is an encoder-decoder.
    """
    encoder = _check(model, calibration, text, text_name)
    sequences = _sequences(model, tokenizer, text, max_tokens, seq_len)
    notes: list[str] = []
    layers = [] if encoder else cache_layout.full_attention_layers(model.config)
    targets: list[Target] = []
    with evaluating(model):
        ropes = detect_ropes(model, layers) if layers else {}
        with progress_bar(progress) as bar:
            task = bar.add_task("looking at activations", total=None)
            gathered = gather(
                model,
                sequences,
                ropes,
                lambda target, moments: targets.append(input_figures(target, moments)),
                on_progress=lambda tokens: bar.advance(task, tokens),
                on_plan=lambda tokens: bar.update(task, total=tokens),
            )
        for (index, name), moments in gathered.cache.items():
            targets += cache_figures(index, name, moments)
        targets.sort(key=lambda t: (ORDER.index(t.name), t.layer, t.head or 0))
        grades: list[Grade] = []
        divergences: list[Divergence] = []
        source = _source(calibration) if layers else None
        if layers:
            calibration = calibration or calibrate(model, sequences[:-1], progress=progress)
            with progress_bar(progress) as bar:
                samples, block_table = collect_samples(model, sequences[-1], layers)
                task = bar.add_task("encoding samples", total=len(RATES) * len(samples))
                grades = grade(calibration, samples, block_table, RATES, lambda: bar.advance(task))
                divergences, failed = _divergences(model, calibration, sequences[-1][0] if verify else None, bar)
                notes += failed
    if getattr(tokenizer, "chat_template", None):
        notes.append("The text was read as plain text, without the model's chat template.")
    seen = calibration is not None and measured_on_seen_text(calibration)
    notes += _notes(model, encoder, layers, targets, gathered, divergences, seen)
    text_config = model.config.get_text_config(decoder=True)
    return Report(
        model=public_name(model),
        model_type=model.config.model_type,
        layers=int(getattr(text_config, "num_hidden_layers", 0)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        text=text_name,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokens=sum(s.numel() for s in sequences),
        seq_len=sequences[0].shape[1],
        held_out=sequences[-1].shape[1] if layers else 0,
        dtype=str(model.dtype).removeprefix("torch."),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        calibration=source,
        versions=compat.versions(),
        notes=tuple(notes),
        targets=tuple(targets),
        depth=tuple(depth_laws(targets)),
        grades=tuple(grades),
        divergences=tuple(divergences),
        sinks=_sinks(gathered, tokenizer),
        qualities=tuple(quality_rates(calibration)) if layers and calibration is not None else (),
        widths=_widths(calibration.with_rate(Rate(3.0))) if layers and calibration is not None else (),
    )


def _check(model: PreTrainedModel, calibration: Calibration | None, text: str, text_name: str) -> bool:
    """Whether the model is an encoder; refuses models and calibrations that cannot be analyzed."""
    compat.require_decoder(model.config)
    encoder = compat.is_encoder(model.config)
    if calibration is not None and encoder:
        raise QuantCacheError(
            f"{model.config.model_type} is an encoder: it has no cache that a calibration could serve"
        )
    if calibration is not None:
        calibration.check_compatible(model)
        check_overlap(calibration, text, text_name)
    return encoder


def _source(calibration: Calibration | None) -> str:
    """Where the calibration is from."""
    if calibration is None:
        return "made from the text, without its last sequence"
    if "tokens" in calibration.metadata.recipe:
        return f"given, made from {calibration.metadata.recipe['tokens']:,} tokens of another text"
    return "given"


def _sequences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, seq_len: int | None
) -> list[Tensor]:
    """At least two sequences of one length, each ``[1, T]``."""
    limit = compat.position_limit(model.config) or 2048
    ids = text_tokens(tokenizer, text, max_tokens)
    length = min(seq_len or 2048, limit, len(ids) // 2)
    if length < min(MIN_SEQUENCE, limit):
        raise QuantCacheError(
            f"analysis needs two sequences of at least {min(MIN_SEQUENCE, limit)} tokens: the text gives {len(ids)} "
            f"tokens, which are cut into sequences of {length}"
        )
    return [window[None] for window in cut_windows(model.config, ids, length)]


def _widths(calibration: Calibration) -> tuple[HeadBits, ...]:
    """What every head of a calibration is given."""
    sides: tuple[Side, ...] = ("key", "value")
    return tuple(
        HeadBits(index, side, head, bits)
        for index, layer in calibration.layers.items()
        for side in sides
        if (widths := layer.side(side).widths) is not None
        for head, bits in enumerate(widths.double().mean(-1).tolist())
    )


def _divergences(
    model: PreTrainedModel, calibration: Calibration, held_out: Tensor | None, bar: Progress
) -> tuple[list[Divergence], list[str]]:
    """Predicted divergence at every rate, and the measured one if there is a text ``[T]``; and what failed."""
    names = [f"spectral-{bits:g}" for bits in RATES]
    measured: dict[str, Any] = {}
    if held_out is not None:
        task = bar.add_task("measuring divergence", total=len(held_out))
        before = compat.attention_implementations(model.config)
        compat.use_attention(model, "spectral")
        try:
            measured = measure_fidelity(
                model,
                held_out,
                parse_methods(names, model.config, calibration),
                context=len(held_out),
                on_progress=lambda tokens: bar.advance(task, tokens),
            )
        finally:
            compat.use_attention(model, before)
    found, failed = [], []
    for bits, name in zip(RATES, names, strict=True):
        at_rate = calibration.with_rate(Rate(bits))
        result = measured.get(name)
        good = result is not None and result.status == "ok"
        if result is not None and not good:
            failed.append(f"The divergence at {show_bits(bits)} could not be measured: {result.status}.")
        found.append(
            Divergence(
                bits,
                bits_per_encoded_element(at_rate.layers),
                predict_kl(at_rate),
                result.kl_mean if good and result else None,
                result.kl_stderr if good and result else None,
            )
        )
    return found, failed


def _notes(
    model: PreTrainedModel,
    encoder: bool,
    layers: list[int],
    targets: list[Target],
    gathered: Gathered,
    divergences: list[Divergence],
    seen: bool,
) -> list[str]:
    """What a reader must know; ``seen``: predictions rest on text that the calibration was made of."""
    notes = []
    if encoder:
        notes.append(
            f"{model.config.model_type} is an encoder: it keeps no key/value cache, so only the inputs of its weights "
            "are shown, and there is nothing to compress, grade or predict."
        )
    elif not layers:
        notes.append("No layer has a cache that grows with the context, so there is nothing to compress or grade.")
    else:
        count = int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", len(layers)))
        if count > len(layers):
            notes.append(
                f"{count - len(layers)} of {count} layers have a bounded cache (sliding windows or states): they stay "
                "uncompressed, and only the inputs of their weights are shown."
            )
        if gathered.sinks is None:
            notes.append("The model's attention cannot be observed, so sink tokens were not searched for.")
        elif not gathered.sinks:
            notes.append(f"No token draws {SINK_SHARE:.0%} of a layer's attention from afar: there are no sink tokens.")
    if all(target.name not in INPUTS for target in targets):
        notes.append("No projection was recognised by its name, so no input of weights is shown.")
    wide = {target.dim for target in targets if target.gamma is None}
    if wide:
        notes.append(f"Inputs of {', '.join(map(str, sorted(wide)))} channels have no spectrum: above {MAX_DIM}.")
    if any(not target.reliable and target.gamma is not None for target in targets):
        notes.append(
            "Rows marked ~ have fewer than four samples for each dimension: their smallest eigenvalues, and so the "
            "coding gain, γ and the budgets, are rough. More tokens help."
        )
    if any(".experts." in f".{name}" for target in targets for name in target.projections):
        notes.append("Inputs of experts are taken over all experts together.")
    if divergences and divergences[0].predicted is None:
        notes.append(f"Predicted divergence: {UNAVAILABLE}.")
    elif divergences and seen:
        notes.append(
            "Predicted divergences, and the bits that words of quality stand for, rest on runs on text that the "
            "calibration has seen, and are too low: 'quantcache calibrate' goes on behind it, where the text is longer."
        )
    for each in divergences:
        if each.predicted and each.measured and not 0.5 <= each.predicted / each.measured <= 2:
            notes.append(
                f"At {show_bits(each.bits)} the prediction is {each.predicted / each.measured:.2f} times the measured "
                "one: it is tied to runs on the calibration's text; the held-out text is another one, and at low rates "
                "a second-order model is far from the whole."
            )
    return notes


def _sinks(gathered: Gathered, tokenizer: PreTrainedTokenizerBase) -> tuple[SinkToken, ...] | None:
    """Sink tokens, the strongest first."""
    if gathered.sinks is None:
        return None
    found = [
        SinkToken(position, str(tokenizer.decode([token])), sink.share, len(sink.layers), len(sink.seen))
        for (position, token), sink in gathered.sinks.items()
    ]
    return tuple(sorted(found, key=lambda sink: (-sink.share, sink.position)))
