"""Tasks with right answers: a text is read into the cache once, and several questions are asked about it.

Each question is asked of a copy of the cache, so that all find the text as it was kept. Answers are greedy.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import summaries
from quantcache.evaluation.cells import Cells, joint_status
from quantcache.evaluation.feeding import PROMPT_CHUNK, check_lengths, decode_tokens, dense_method, end_tokens, feed
from quantcache.evaluation.methods import Method, reading_codes
from quantcache.evaluation.paired import MIN_DENSE_RATE, against, is_evidence


@dataclass(frozen=True)
class Exercise:
    """One text, and what is asked about it.

    Attributes:
        group: What its answers are counted under, such as the text's length.
        text: Tokens that are read first, ``[T]``.
        questions: Tokens of each question, up to where the answer begins, ``[T]``.
        answers: The right answer to each.
    """

    group: str
    text: Tensor
    questions: tuple[Tensor, ...]
    answers: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Tokens of the text with its longest question."""
        return len(self.text) + max(map(len, self.questions))


@dataclass(frozen=True)
class Task:
    """Exercises of one kind.

    Attributes:
        name: The suite's name.
        title: What is counted, for a table.
        unit: What groups are, for its columns.
        exercises: The exercises.
        right: Whether an answer, given first, is the one that is wanted.
        new_tokens: Tokens of an answer at most; it also ends at a line's end.
        settings: How exercises were made.
    """

    name: str
    title: str
    unit: str
    exercises: tuple[Exercise, ...]
    right: Callable[[str, str], bool]
    new_tokens: int
    settings: dict[str, Any]

    def within(self, limit: int | None) -> Task:
        """The task without exercises that exceed a model's limit.

        Args:
            limit: Positions of the model, None for any number.

        Returns:
            What is left; perhaps no exercise.
        """
        fits = [each for each in self.exercises if limit is None or each.longest + self.new_tokens <= limit]
        return replace(self, exercises=tuple(fits))


@dataclass(frozen=True)
class TaskEntry:
    """How one method answered.

    Attributes:
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache held fake-quantized values instead of codes.
        status: ``ok``, or what went wrong.
        found: Right answers, with a 95 % interval that takes questions about one text for alike, see
            :func:`quantcache.evaluation.summaries.clustered_share`.
        by_group: The same for each group.
        paired: McNemar's test against the dense cache, and against ours, on the same questions, text by text.
    """

    family: str
    simulated: bool
    status: str
    found: summaries.Summary | None = None
    by_group: dict[str, summaries.Summary] = field(default_factory=dict)
    paired: dict[str, summaries.Summary] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskResult:
    """Answers of all methods.

    Attributes:
        settings: Everything that was chosen.
        evidence: By group, and for ``all``: whether the dense cache answers often enough for rates to say anything.
        methods: One entry for each method.
    """

    settings: dict[str, Any]
    evidence: dict[str, bool]
    methods: dict[str, TaskEntry]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def measure_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    methods: Sequence[Method],
    *,
    chunk: int = PROMPT_CHUNK,
    cells: Cells | None = None,
) -> TaskResult:
    """Let every method do the exercises, and the dense cache in any case.

    Args:
        model: Decoder-only model to measure.
        tokenizer: Tokenizer of that model.
        task: The exercises.
        methods: What to measure.
        chunk: Tokens of a text fed at once.
        cells: Where finished cells are kept.

    Returns:
        Counts and intervals. A method that fails, or reads no codes in an exercise, keeps its place, with the reason
        as its status; only what it could do is counted.

    Raises:
        QuantCacheError: There are no exercises, or one exceeds the model's limit.
    """
    cells = cells or Cells()
    if not task.exercises:
        raise QuantCacheError(f"{task.name}: there are no exercises")
    longest = max(each.longest for each in task.exercises) + task.new_tokens
    check_lengths(model, [longest], f"the longest exercise of {task.name}:")
    asked = list(methods)
    if not any(method.family == "dense" for method in methods):
        asked.insert(0, dense_method(model))

    def ask(method: Method, exercise: Exercise) -> dict[str, Any]:
        answers = _answers(model, tokenizer, method, exercise, task.new_tokens, chunk)
        return {"answers": answers, "wanted": list(exercise.answers)}

    cells.plan(task.name, len(task.exercises) * len(asked))
    for number, exercise in enumerate(task.exercises):
        for method in reading_codes(asked, exercise.longest, cached=len(exercise.text)):
            cells.measure(task.name, method.name, _cell(number, exercise), ask, method, exercise)
    right = {method.name: _right(task, method.name, cells) for method in asked}
    entries = {method.name: _entry(task, method, right[method.name], cells) for method in asked}
    reference = entries[next(method.name for method in asked if method.family == "dense")]
    settings = {
        **task.settings,
        "title": task.title,
        "unit": task.unit,
        "exercises": len(task.exercises),
        "questions": sum(len(each.questions) for each in task.exercises),
        "new_tokens": task.new_tokens,
        "chunk": chunk,
        "least_dense_rate": MIN_DENSE_RATE,
    }
    evidence = {group: is_evidence(rate) for group, rate in reference.by_group.items()}
    return TaskResult(
        settings,
        {"all": is_evidence(reference.found), **evidence},
        {m.name: replace(entries[m.name], paired=against(m.name, asked, right, _text_of)) for m in methods},
    )


def _cell(number: int, exercise: Exercise) -> str:
    return f"{exercise.group} {number}"


def _text_of(question: str) -> str:
    """The cell of a question, as :func:`_right` calls it."""
    return question.rpartition(" ")[0]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    exercise: Exercise,
    count: int,
    chunk: int,
) -> list[str]:
    def read() -> Cache:
        cache = method.make_cache()
        feed(model, cache, exercise.text[None], chunk)
        return cache

    cache, answers = read(), []
    for question in exercise.questions:
        try:
            own = copy.deepcopy(cache)
        except (RuntimeError, TypeError):  # optimum-quanto's tensors cannot be copied
            own = read()
        answers.append(answer(model, tokenizer, own, question, count))
    return answers


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, question: Tensor, count: int
) -> str:
    """The most likely answer, up to the end of its first line.

    Args:
        model: Decoder-only model.
        tokenizer: Tokenizer of that model.
        cache: A cache of everything before the question, changed in place.
        question: ``[T]``, T at least 1.
        count: Tokens at most.

    Returns:
        The answer, without white space around it.
    """
    stops, found, text = end_tokens(model), [], ""
    for token in map(int, itertools.islice(decode_tokens(model, cache, question[None]), count)):
        if token in stops:
            break
        found.append(token)
        text = str(tokenizer.decode(found, skip_special_tokens=True)).lstrip()
        if "\n" in text:
            break
    return text.split("\n")[0].strip()


def _right(task: Task, method: str, cells: Cells) -> dict[str, bool]:
    """Whether each question was answered rightly, of those that were answered at all, as ``GROUP NUMBER QUESTION``."""
    found: dict[str, bool] = {}
    for number, exercise in enumerate(task.exercises):
        result = cells.get(task.name, method, cell := _cell(number, exercise))
        if result["status"] == "ok":
            pairs = zip(result["answers"], result["wanted"], strict=True)
            found |= {f"{cell} {at}": task.right(said, wanted) for at, (said, wanted) in enumerate(pairs)}
    return found


def _entry(task: Task, method: Method, right: dict[str, bool], cells: Cells) -> TaskEntry:
    groups: dict[str, list[list[bool]]] = {}
    results = []
    for number, exercise in enumerate(task.exercises):
        results.append(cells.get(task.name, method.name, cell := _cell(number, exercise)))
        if results[-1]["status"] == "ok":
            own = [right[f"{cell} {at}"] for at in range(len(exercise.questions))]
            groups.setdefault(exercise.group, []).append(own)
    whole = [hits for texts in groups.values() for hits in texts]
    return TaskEntry(
        method.family,
        method.simulated,
        joint_status(results, "exercises"),
        summaries.clustered_share(whole) if whole else None,
        {group: summaries.clustered_share(texts) for group, texts in groups.items()},
    )
