"""Needle retrieval: a fact is planted in a long text, fed through the cache, and asked for.

All tokens but those of the question and answer have passed into the cache in chunks before the question comes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import summaries
from quantcache.evaluation.cells import Cells, joint_status
from quantcache.evaluation.feeding import PROMPT_CHUNK, check_lengths, encode, feed, frame_of, greedy
from quantcache.evaluation.methods import Method, reading_codes
from quantcache.evaluation.paired import MIN_DENSE_RATE, against, is_evidence

SUITE = "needle"

NAMES = ("Marlow", "Ada", "Victor", "Clara", "Hugo", "Nora", "Oscar", "Ruth", "Simon", "Vera")


@dataclass(frozen=True)
class NeedleFormat:
    """How a fact is stated and asked for.

    Attributes:
        fact: Holds ``{name}`` and ``{code}``.
        question: Holds ``{name}``; the answer follows it.
        digits: Length of a code.
        chat: Put text and question into the tokenizer's chat template.
    """

    fact: str = "\nThe secret code of {name} is {code}.\n"
    question: str = "\nQuestion: What is the secret code of {name}? Answer:"
    digits: int = 5
    chat: bool = False

    def check(self) -> None:
        """Refuse templates that lack a place.

        Raises:
            QuantCacheError: A place is missing, or a template cannot be filled in.
        """
        for text, places in ((self.fact, ("name", "code")), (self.question, ("name",))):
            for place in places:
                if f"{{{place}}}" not in text:
                    raise QuantCacheError(f"needle template {text!r} lacks {{{place}}}")
            try:
                text.format(name="", code="")
            except (KeyError, IndexError, ValueError) as error:
                raise QuantCacheError(f"needle template {text!r} cannot be filled in: {error}") from None


@dataclass(frozen=True)
class NeedleEntry:
    """What one method retrieved.

    Attributes:
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache held fake-quantized values instead of codes.
        status: ``ok``, or what went wrong.
        found: Trials in which the code was given, with a 95 % Wilson interval.
        by_length: The same for each length.
        by_cell: The same for each ``LENGTH@DEPTH``.
        paired: McNemar's test against the dense cache, and against ours, on the same needles.
    """

    family: str
    simulated: bool
    status: str
    found: summaries.Summary | None = None
    by_length: dict[str, summaries.Summary] = field(default_factory=dict)
    by_cell: dict[str, summaries.Summary] = field(default_factory=dict)
    paired: dict[str, summaries.Summary] = field(default_factory=dict)


@dataclass(frozen=True)
class NeedleResult:
    """Retrieval of all methods.

    Attributes:
        settings: Everything that was chosen.
        methods: One entry for each method.
        evidence: By length, and for ``all``: whether the dense cache finds enough for rates to say anything. Empty
            where it was not measured.
    """

    settings: dict[str, Any]
    methods: dict[str, NeedleEntry]
    evidence: dict[str, bool] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def measure_needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    methods: Sequence[Method],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    seeds: int = 4,
    form: NeedleFormat | None = None,
    chunk: int = PROMPT_CHUNK,
    cells: Cells | None = None,
) -> NeedleResult:
    """Plant codes in a text and ask for them.

    Args:
        model: Decoder-only model to measure.
        tokenizer: Tokenizer of that model.
        text: The haystack; every seed takes another stretch of it where it is long enough.
        methods: What to measure.
        lengths: Tokens of a whole prompt, question included.
        depths: Where the fact stands, as a share of the text before the question.
        seeds: Trials of each length and depth; each has its own name, code and stretch of text.
        form: How the fact is stated and asked for; what wiki11m was trained on if None.
        chunk: Tokens fed at once.
        cells: Where finished cells are kept.

    Returns:
        Counts and intervals. A method that fails, or reads no codes at a length, keeps its place, with the reason as
        its status; only what it could do is counted.

    Raises:
        QuantCacheError: The text is too short for a length, a length exceeds the model's limit, or a depth or a
            template makes no sense.
    """
    form, cells = form or NeedleFormat(), cells or Cells()
    form.check()
    check_lengths(model, lengths, "needle length")
    if seeds < 1 or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise QuantCacheError(f"needles need depths from 0 to 1 and at least one seed, got {list(depths)} and {seeds}")
    lengths, depths = sorted(set(lengths)), list(dict.fromkeys(depths))
    haystack = encode(tokenizer, text[: haystack_size(lengths, seeds)])
    if len(haystack) < max(lengths):
        raise QuantCacheError(f"the text has {len(haystack)} tokens, a needle prompt of {max(lengths)} needs as many")

    def ask(method: Method, prompts: Tensor, codes: list[str]) -> dict[str, Any]:
        answers = _answers(model, tokenizer, method, prompts, form, chunk)
        hits = _hits(codes, answers)
        return {"found": sum(hits), "n": len(hits), "answers": answers, "codes": codes}

    grid = [(length, depth) for length in lengths for depth in depths]
    cells.plan(SUITE, len(grid) * len(methods))
    for length, depth in grid:
        prompts, codes = _prompts(tokenizer, haystack, form, length, depth, seeds)
        for method in reading_codes(methods, length, cached=length - _asking(tokenizer, form)):
            cells.measure(SUITE, method.name, f"{length}@{depth:g}", ask, method, prompts, codes)
    settings = {
        "lengths": lengths,
        "depths": depths,
        "seeds": seeds,
        "chunk": chunk,
        "format": asdict(form),
        "least_dense_rate": MIN_DENSE_RATE,
    }
    right = {method.name: _right(method, grid, cells) for method in methods}
    entries = {m.name: replace(_entry(m, grid, cells), paired=against(m.name, methods, right)) for m in methods}
    dense = next((entries[method.name] for method in methods if method.family == "dense"), None)
    rates = {} if dense is None else {"all": dense.found, **dense.by_length}
    return NeedleResult(settings, entries, {place: is_evidence(rate) for place, rate in rates.items()})


def haystack_size(lengths: Sequence[int], seeds: int) -> int:
    """How much of a text is looked at for stretches to plant facts in.

    Args:
        lengths: Tokens of the prompts.
        seeds: Stretches of each length.

    Returns:
        Characters, enough for any tokenizer, without all of a long text.
    """
    return 64 * max(lengths) * seeds


def _hits(codes: list[str], answers: list[str]) -> list[bool]:
    return [code in answer.replace(",", "") for code, answer in zip(codes, answers, strict=True)]


def _right(method: Method, grid: list[tuple[int, float]], cells: Cells) -> dict[str, bool]:
    """Whether each needle was found, of those that were asked for."""
    found: dict[str, bool] = {}
    for length, depth in grid:
        result = cells.get(SUITE, method.name, cell := f"{length}@{depth:g}")
        if result["status"] == "ok":
            found |= {f"{cell} {seed}": hit for seed, hit in enumerate(_hits(result["codes"], result["answers"]))}
    return found


def _prompts(
    tokenizer: PreTrainedTokenizerBase, haystack: Tensor, form: NeedleFormat, length: int, depth: float, seeds: int
) -> tuple[Tensor, list[str]]:
    """Prompts of equal length, ``[seeds, length]``, and the code that each asks for."""
    before, behind = frame_of(tokenizer, form.chat)
    rows, codes = [], []
    for seed in range(seeds):
        draw = random.Random(f"needle {seed} {length} {depth:g}")
        name, code = draw.choice(NAMES), "".join(draw.choices("0123456789", k=form.digits))
        fact = encode(tokenizer, form.fact.format(name=name, code=code))
        question = encode(tokenizer, form.question.format(name=name))
        room = length - sum(len(part) for part in (before, fact, question, behind))
        if room < 0:
            raise QuantCacheError(f"a needle prompt of {length} tokens is too short for fact and question")
        first = draw.randrange(len(haystack) - room + 1)
        hay = haystack[first : first + room]
        place = round(depth * room)
        rows.append(torch.cat((before, hay[:place], fact, hay[place:], question, behind)))
        codes.append(code)
    return torch.stack(rows), codes


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    prompts: Tensor,
    form: NeedleFormat,
    chunk: int,
) -> list[str]:
    """What the model says to every prompt ``[B, T]``."""
    cache = method.make_cache()
    held = prompts.shape[1] - _asking(tokenizer, form)
    feed(model, cache, prompts[:, :held], chunk)
    found = greedy(model, cache, prompts[:, held:], answer_tokens(tokenizer, form))
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in found]


def _asking(tokenizer: PreTrainedTokenizerBase, form: NeedleFormat) -> int:
    """Tokens of a prompt that come once everything before them has gone into the cache."""
    return len(encode(tokenizer, form.question.format(name=NAMES[0]))) + len(frame_of(tokenizer, form.chat)[1])


def answer_tokens(tokenizer: PreTrainedTokenizerBase, form: NeedleFormat) -> int:
    """Tokens that an answer may take: chat models say the question again before they come to the code.

    Args:
        tokenizer: The model's tokenizer.
        form: How facts are stated and asked for.

    Returns:
        Tokens.
    """
    return len(encode(tokenizer, form.question.format(name=NAMES[0]))) + 2 * form.digits


def _entry(method: Method, grid: list[tuple[int, float]], cells: Cells) -> NeedleEntry:
    results = {(length, depth): cells.get(SUITE, method.name, f"{length}@{depth:g}") for length, depth in grid}
    good = {place: result for place, result in results.items() if result["status"] == "ok"}

    def share(places: list[tuple[int, float]]) -> summaries.Summary:
        return summaries.share(sum(good[p]["found"] for p in places), sum(good[p]["n"] for p in places))

    lengths = sorted({length for length, _ in good})
    return NeedleEntry(
        method.family,
        method.simulated,
        joint_status(list(results.values()), "cells"),
        share(list(good)) if good else None,
        {str(length): share([place for place in good if place[0] == length]) for length in lengths},
        {f"{length}@{depth:g}": share([(length, depth)]) for length, depth in good},
    )
