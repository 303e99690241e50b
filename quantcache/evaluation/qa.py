"""Question answering: exact match and F1 as SQuAD counts them, through ``generate()`` with the method's cache.

The paragraph passes into the cache in chunks first, so that question and answer read what the cache kept of it. A weak
model answers wrongly whatever its cache; therefore agreement with the dense cache's answers is counted as well.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from quantcache.common.jsonfile import MAX_RESULT_BYTES, parse_json
from quantcache.common.plaintext import read_utf8
from quantcache.evaluation import summaries
from quantcache.evaluation.cells import Cells, joint_status
from quantcache.evaluation.feeding import PROMPT_CHUNK, dense_method, encode, feed, frame_of
from quantcache.evaluation.methods import Method, reading_codes
from quantcache.evaluation.paired import MIN_DENSE_RATE, against, is_evidence

SUITE = "qa"

Value = TypeVar("Value")

TEMPLATE = "{context}\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """One question about one paragraph.

    Attributes:
        id: Names it in records.
        context: Paragraph that holds the answer.
        question: What is asked about it.
        answers: Acceptable answers, one or more.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QAEntry:
    """How one method answered.

    Attributes:
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache held fake-quantized values instead of codes.
        status: ``ok``, or what went wrong.
        f1: Mean F1 over the questions that it answered, 0 to 1; its error takes those about one paragraph for alike.
        exact: Share of answers that match exactly once articles, capitals and punctuation are gone, likewise.
        agreement_f1: Mean F1 with the dense cache's answers, where that answered too.
        agreement_exact: Share of answers that are the dense cache's.
        paired: McNemar's test of its exact answers against the dense cache's, and ours, paragraph by paragraph.
    """

    family: str
    simulated: bool
    status: str
    f1: summaries.Summary | None = None
    exact: summaries.Summary | None = None
    agreement_f1: summaries.Summary | None = None
    agreement_exact: summaries.Summary | None = None
    paired: dict[str, summaries.Summary] = field(default_factory=dict)


@dataclass(frozen=True)
class QAResult:
    """Answers of all methods.

    Attributes:
        settings: Everything that was chosen.
        methods: One entry for each method.
        evidence: For ``f1`` and ``exact``: whether the dense cache scores enough for either to say anything.
    """

    settings: dict[str, Any]
    methods: dict[str, QAEntry]
    evidence: dict[str, bool]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def load_questions(path: Path) -> list[Question]:
    """Read questions: a SQuAD file, or JSON lines with ``context``, ``question`` and ``answers``.

    Args:
        path: The file. In JSON lines ``answers`` is a string, a list of strings, or SQuAD's ``{"text": [...]}``.

    Returns:
        The questions.

    Raises:
        QuantCacheError: The file is malformed or holds none.
        OSError: The file cannot be read.
    """
    text = read_utf8(path.read_bytes(), path)
    try:
        whole = parse_json(text, MAX_RESULT_BYTES)
    except ValueError:
        whole = None
    try:
        if isinstance(whole, dict) and "data" in whole:
            found = [
                _question(qa.get("id", f"{number}"), paragraph["context"], qa["question"], qa["answers"])
                for article in whole["data"]
                for paragraph in article["paragraphs"]
                for number, qa in enumerate(paragraph["qas"])
            ]
        else:
            # Strings of JSON may hold other ends of lines than the line feed.
            lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
            found = []
            for number, line in lines:
                try:
                    entry = parse_json(line, MAX_RESULT_BYTES)
                except ValueError as error:
                    raise QuantCacheError(f"{path}, line {number} is not JSON: {error}") from None
                answers = entry["answers"] if "answers" in entry else entry["answer"]
                found.append(_question(entry.get("id", f"{number}"), entry["context"], entry["question"], answers))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        flaw = f"{type(error).__name__}: {error}"
        raise QuantCacheError(f"{path} is not a file of context, question and answers ({flaw})") from None
    if not found:
        raise QuantCacheError(f"{path} holds no questions")
    return found


def _question(name: Any, context: Any, question: Any, answers: Any) -> Question:
    if isinstance(answers, str):
        answers = [answers]
    elif isinstance(answers, dict):
        answers = answers["text"]
    texts = tuple(answer if isinstance(answer, str) else answer["text"] for answer in answers)
    for value in (context, question, *texts):
        if not isinstance(value, str):
            raise TypeError(f"expected a string, got {value!r:.40}")
    if not texts:
        raise ValueError(f"question {question!r:.40} has no answer")
    return Question(str(name), context, question, texts)


def normalize(answer: str) -> str:
    """An answer without capitals, punctuation, articles and superfluous white space.

    Source: the evaluation script of P. Rajpurkar et al., "SQuAD" (2016).

    Args:
        answer: Any text.

    Returns:
        Its words, one space between them.
    """
    bare = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of the share of words found and the share of words right.

    Source: as :func:`normalize`.

    Args:
        answer: What the model said.
        reference: What it is held against.

    Returns:
        0 to 1; 1 if both are empty once normalized.
    """
    found, wanted = normalize(answer).split(), normalize(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def exact(answer: str, reference: str) -> bool:
    """Whether two answers are the same once normalized.

    Args:
        answer: What the model said.
        reference: What it is held against.

    Returns:
        Whether they match.
    """
    return normalize(answer) == normalize(reference)


def measure_qa(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    methods: Sequence[Method],
    *,
    count: int = 16,
    seed: int = 0,
    new_tokens: int = 16,
    template: str = TEMPLATE,
    chat: bool = False,
    shots: int = 0,
    chunk: int = PROMPT_CHUNK,
    cells: Cells | None = None,
) -> QAResult:
    """Ask questions about paragraphs.

    Args:
        model: Decoder-only model to measure.
        tokenizer: Tokenizer of that model.
        questions: From :func:`load_questions`.
        methods: What to measure.
        count: Questions to ask at most, drawn at random from those that fit into the model's context.
        seed: Decides which questions are drawn.
        new_tokens: Tokens of an answer at most; it also ends at a line's end.
        template: Holds ``{context}`` and ``{question}``.
        chat: Put the prompt into the tokenizer's chat template.
        shots: Questions about other paragraphs that are shown with their answers first, as far as there are any.
        chunk: Tokens fed at once.
        cells: Where finished cells are kept.

    Returns:
        Scores of every method, and agreement with the dense cache. A method that fails, or reads no codes in a prompt,
        keeps its place, with the reason as its status; only what it could answer is counted.

    Raises:
        QuantCacheError: The template lacks a place, no question fits, or a number is out of range.
    """
    cells = cells or Cells()
    for name, number, least in (("count", count, 1), ("new_tokens", new_tokens, 1), ("shots", shots, 0)):
        if number < least:
            raise QuantCacheError(f"{name} must be at least {least}, got {number}")
    for place in ("{context}", "{question}"):
        if place not in template:
            raise QuantCacheError(f"question template {template!r} lacks {place}")
    chosen = _choose(model, tokenizer, questions, count, seed, new_tokens, template, chat, shots)
    asked = list(methods)
    if not any(method.family == "dense" for method in methods):
        asked.insert(0, dense_method(model))

    def ask(method: Method, prompt: Tensor) -> dict[str, Any]:
        return {"answer": _answer(model, tokenizer, method, prompt, new_tokens, chunk)}

    cells.plan(SUITE, len(chosen) * len(asked))
    for number, (question, prompt) in enumerate(chosen):
        for method in reading_codes(asked, len(prompt), cached=len(prompt) - 1):
            cells.measure(SUITE, method.name, f"{number} {question.id}", ask, method, prompt)
    reference = next(method.name for method in asked if method.family == "dense")
    settings = {
        "questions": len(chosen),
        "seed": seed,
        "new_tokens": new_tokens,
        "template": template,
        "chat": chat,
        "shots": shots,
        "chunk": chunk,
        "least_dense_rate": MIN_DENSE_RATE,
    }
    entries = {m.name: _entry(m, reference, [q for q, _ in chosen], cells) for m in asked}
    right = {method.name: _right(method, [q for q, _ in chosen], cells) for method in asked}
    dense = entries[reference]

    def paragraph(number: str) -> str:
        return chosen[int(number)][0].context

    return QAResult(
        settings,
        {m.name: replace(entries[m.name], paired=against(m.name, asked, right, paragraph)) for m in methods},
        {"f1": is_evidence(dense.f1), "exact": is_evidence(dense.exact)},
    )


def _right(method: Method, questions: list[Question], cells: Cells) -> dict[str, bool]:
    """Which questions a method answered exactly, of those that it answered at all."""
    found = {}
    for number, question in enumerate(questions):
        result = cells.get(SUITE, method.name, f"{number} {question.id}")
        if result["status"] == "ok":
            found[f"{number}"] = any(exact(str(result["answer"]), wanted) for wanted in question.answers)
    return found


def _choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    count: int,
    seed: int,
    new_tokens: int,
    template: str,
    chat: bool,
    shots: int,
) -> list[tuple[Question, Tensor]]:
    """Questions that fit, with their prompts ``[T]``."""
    room = compat.position_limit(model.config)
    chosen = []
    order = random.Random(seed).sample(list(questions), len(questions))

    def text(question: Question) -> str:
        return template.replace("{context}", question.context).replace("{question}", question.question)

    # One question of each paragraph may be shown, the shortest first: they take room from the context.
    about = {question.context: question for question in order}
    shown = sorted(about.values(), key=lambda question: len(question.context))[: shots + 1]
    for question in order:
        turns = [(text(each), each.answers[0]) for each in shown if each.context != question.context][:shots]
        before, behind = frame_of(tokenizer, chat, turns)
        prompt = torch.cat((before, encode(tokenizer, text(question)), behind))
        if room is None or len(prompt) + new_tokens <= room:
            chosen.append((question, prompt))
            if len(chosen) == count:
                break
    if not chosen:
        raise QuantCacheError(f"none of {len(questions)} questions fits into the model's limit of {room} positions")
    return chosen


@torch.no_grad()
def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, method: Method, prompt: Tensor, new_tokens: int, chunk: int
) -> str:
    ids = prompt[None].to(compat.input_device(model))
    cache = method.make_cache()
    feed(model, cache, ids[:, :-1], chunk)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **compat.generate_argument(cache),
        use_cache=True,
        max_new_tokens=new_tokens,
        do_sample=False,
    )[0, len(prompt) :]
    text = str(tokenizer.decode(output, skip_special_tokens=True)).strip()
    return text.splitlines()[0].strip() if text else ""


def _entry(method: Method, reference: str, questions: list[Question], cells: Cells) -> QAEntry:
    names = [f"{number} {question.id}" for number, question in enumerate(questions)]
    results = [cells.get(SUITE, method.name, name) for name in names]
    answered = [
        (question, str(mine["answer"]), cells.get(SUITE, reference, name).get("answer"))
        for question, mine, name in zip(questions, results, names, strict=True)
        if mine["status"] == "ok"
    ]
    status = joint_status(results, "questions")
    if not answered:
        return QAEntry(method.family, method.simulated, status)
    scores = [(q.context, max(f1(mine, wanted) for wanted in q.answers)) for q, mine, _ in answered]
    right = [(q.context, any(exact(mine, wanted) for wanted in q.answers)) for q, mine, _ in answered]
    both = [(q.context, mine, dense) for q, mine, dense in answered if isinstance(dense, str)]
    alike = [(context, f1(mine, dense)) for context, mine, dense in both]
    same = [(context, exact(mine, dense)) for context, mine, dense in both]
    return QAEntry(
        method.family,
        method.simulated,
        status,
        summaries.clustered_mean(_by_paragraph(scores)),
        summaries.clustered_share(_by_paragraph(right)),
        agreement_f1=summaries.clustered_mean(_by_paragraph(alike)) if alike else None,
        agreement_exact=summaries.clustered_share(_by_paragraph(same)) if same else None,
    )


def _by_paragraph(found: Sequence[tuple[str, Value]]) -> list[list[Value]]:
    """What was found of questions, with the paragraph of each."""
    grouped: dict[str, list[Value]] = {}
    for context, value in found:
        grouped.setdefault(context, []).append(value)
    return list(grouped.values())
