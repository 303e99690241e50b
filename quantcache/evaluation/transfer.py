"""Transfer: what a calibration on one kind of text, or at one length, costs on another.

Every calibration is measured on every text, so that a figure can be set beside that of the calibration made for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.artifact.calibration import Calibration
from quantcache.calibration.calibrator import calibrate
from quantcache.common.defaults import CHUNK, RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.sequences import text_tokens
from quantcache.evaluation.cells import Cells, attempt
from quantcache.evaluation.feeding import check_lengths
from quantcache.evaluation.fidelity import measure_fidelity
from quantcache.evaluation.methods import Method, parse_methods
from quantcache.evaluation.provenance import check_overlap

SUITE = "transfer"

FIGURES = ("family", "simulated", "bits_per_element", "kl_mean", "kl_p99", "top1_agreement", "perplexity", "tokens")


@dataclass(frozen=True)
class TransferEntry:
    """One method with one calibration on one text.

    Attributes:
        method: Name of the method.
        calibrated_on: Name of the calibration's text.
        evaluated_on: Name of the evaluation text.
        status: ``ok``, or what went wrong.
        figures: What :class:`~quantcache.evaluation.fidelity.FidelityResult` says of it.
        ratio: Mean KL over that of the calibration that belongs to the text; None where there is none.
    """

    method: str
    calibrated_on: str
    evaluated_on: str
    status: str
    figures: dict[str, Any]
    ratio: float | None = None


@dataclass(frozen=True)
class TransferResult:
    """All calibrations on all texts.

    Attributes:
        settings: Everything that was chosen.
        entries: One for each method, calibration and text.
    """

    settings: dict[str, Any]
    entries: list[TransferEntry]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """A calibration that is made when it is first needed.

    Attributes:
        name: What results call it.
        make: Makes the calibration.
        home: The text that it belongs to: ratios are taken to its figures there.
    """

    name: str
    make: Callable[[], Calibration]
    home: str | None = None


def split_domain(text: str) -> tuple[str, str]:
    """Cut a text into one half to calibrate on and one to evaluate on.

    Args:
        text: Plain text, cut at its middle.

    Returns:
        Both halves; the cut is at a line's end where there is one near.
    """
    middle = len(text) // 2
    end = text.find("\n", middle, middle + 2000)
    place = middle if end < 0 else end + 1
    return text[:place], text[place:]


def needs_calibration(name: str, model: PreTrainedModel) -> bool:
    """Whether a method's cache depends on a calibration.

    Args:
        name: Name of the method.
        model: Model that the method is made for.

    Returns:
        Whether it cannot be made without one.
    """
    try:
        parse_methods([name], model.config, None)
    except QuantCacheError:
        return True
    return False


def measure_transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    texts: Mapping[str, str],
    methods: Sequence[str],
    *,
    context: int,
    tokens: int = 4096,
    chunk: int = CHUNK,
    sink_length: int = SINK_LENGTH,
    residual_length: int = RESIDUAL_LENGTH,
    cells: Cells | None = None,
) -> TransferResult:
    """Measure every calibration on every text.

    Args:
        model: Decoder-only model to measure.
        tokenizer: Tokenizer of that model.
        sources: Calibrations to compare.
        texts: The texts to evaluate on, by name.
        methods: Names of methods that take a calibration.
        context: Tokens in a window.
        tokens: Tokens of every text to use at most.
        chunk: Tokens fed at once.
        sink_length: First tokens kept by every method.
        residual_length: Recent tokens kept by every method.
        cells: Where finished cells are kept.

    Returns:
        Figures of every method, calibration and text. What fails keeps its place, with the error as its status; so does
        a calibration on a text that it shares passages with.

    Raises:
        QuantCacheError: A text is shorter than one window, or two calibrations have one name.
    """
    cells = cells or Cells()
    named = Counter(source.name for source in sources)
    if more := [name for name, count in named.items() if count > 1]:
        raise QuantCacheError(f"two calibrations are called {more[0]!r}: rename the text of that name")
    check_lengths(model, [context], "context")
    ids = {name: _windows(tokenizer, text, name, tokens, context) for name, text in texts.items()}

    def work(parsed: list[Method], made: Calibration, text: str, used: str) -> dict[str, Any]:
        check_overlap(made, texts[text], text, used)
        how: dict[str, Any] = {"context": context, "chunk": chunk, "sink_length": sink_length}
        (result,) = measure_fidelity(model, ids[text], parsed, **how).values()
        data = result.to_dict()
        return {key: data[key] for key in ("status", *FIGURES)}

    cells.plan(SUITE, len(sources) * len(texts) * len(methods))
    for source in sources:
        missing = {text: cells.missing(SUITE, methods, f"{source.name} -> {text}") for text in texts}
        if not any(missing.values()):
            continue
        made = attempt(lambda make: {"calibration": make()}, source.make)
        for text, names in missing.items():
            cell = f"{source.name} -> {text}"
            if made["status"] != "ok":
                for name in names:
                    cells.put(SUITE, name, cell, made)
                continue
            calibration = made["calibration"]
            used = str(tokenizer.decode(ids[text], skip_special_tokens=True))
            for name in names:
                parsed = parse_methods([name], model.config, calibration, sink_length, residual_length)
                cells.measure(SUITE, name, cell, work, parsed, calibration, text, used)
    settings = {
        "context": context,
        "tokens": {name: len(found) for name, found in ids.items()},
        "chunk": chunk,
        "sinks": sink_length,
        "residual": residual_length,
        "homes": {source.name: source.home for source in sources},
    }
    return TransferResult(settings, _entries(sources, list(texts), methods, cells))


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, name: str, tokens: int, context: int) -> Tensor:
    ids = text_tokens(tokenizer, text, tokens)
    if len(ids) < context:
        raise QuantCacheError(f"{name} has {len(ids)} tokens, one window needs {context}")
    whole: Tensor = ids[: len(ids) // context * context]
    return whole


def _entries(sources: Sequence[Source], texts: list[str], methods: Sequence[str], cells: Cells) -> list[TransferEntry]:
    entries = []
    for method in methods:
        for text in texts:
            found = {source.name: cells.get(SUITE, method, f"{source.name} -> {text}") for source in sources}
            homes = [found[s.name].get("kl_mean") for s in sources if s.home == text]
            for name, result in found.items():
                own = result.get("kl_mean")
                ratio = own / homes[0] if own is not None and homes and homes[0] else None
                figures = {key: value for key, value in result.items() if key != "status"}
                entries.append(TransferEntry(method, name, text, result["status"], figures, ratio))
    return entries


def domain_sources(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], *, tokens: int, seq_len: int
) -> list[Source]:
    """Calibrations on several texts.

    Args:
        model: Model to calibrate.
        tokenizer: Tokenizer of that model.
        texts: The texts to calibrate on, by the name of the text to evaluate on that they belong to.
        tokens: Tokens to calibrate on.
        seq_len: Tokens of a sequence.

    Returns:
        One source for each text.
    """
    return [
        Source(name, _maker(model, tokenizer, text, tokens=tokens, seq_len=seq_len), name)
        for name, text in texts.items()
    ]


def mixed_source(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, tokens: int, seq_len: int
) -> Source:
    """One calibration on several texts, which take turns.

    Args:
        model: Model to calibrate.
        tokenizer: Tokenizer of that model.
        texts: The texts to calibrate on.
        tokens: Tokens to calibrate on, of all texts together.
        seq_len: Tokens of a sequence; fewer where some text would have none.

    Returns:
        The source.
    """
    length = min(seq_len, tokens // len(texts))
    return Source("mixture", _maker(model, tokenizer, texts, tokens=tokens, seq_len=length))


def length_sources(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    home: str,
    *,
    tokens: int,
    lengths: Sequence[int],
) -> list[Source]:
    """Calibrations on one text in sequences of several lengths.

    Args:
        model: Model to calibrate.
        tokenizer: Tokenizer of that model.
        text: The text to calibrate on.
        home: The text to evaluate on; the longest sequences belong to it.
        tokens: Tokens to calibrate on, the same for all.
        lengths: Tokens of a sequence.

    Returns:
        One source for each length.
    """
    return [
        Source(
            f"length {length}",
            _maker(model, tokenizer, text, tokens=tokens, seq_len=length),
            home if length == max(lengths) else None,
        )
        for length in lengths
    ]


def _maker(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str], *, tokens: int, seq_len: int
) -> Callable[[], Calibration]:
    def make() -> Calibration:
        with torch.enable_grad():
            return calibrate(model, text, tokenizer, max_tokens=tokens, seq_len=seq_len, predict=False, progress=False)

    return make
