"""Exercises drawn by seed: several records in a long text, a table of keys and values, and calls of tools.

They are made so that a model of 135M parameters does most of them from its dense cache: a few are shown with their
answers first, and what an answer begins with is given.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.feeding import encode, frame_of
from quantcache.evaluation.needle import NAMES, NeedleFormat, answer_tokens, haystack_size
from quantcache.evaluation.plan import Sizes
from quantcache.evaluation.tasks import Exercise, Task

KEYS = (
    *("apple", "river", "stone", "cloud", "tiger", "piano", "lemon", "forest", "window", "garden", "bottle", "candle"),
    *("dragon", "engine", "feather", "guitar", "hammer", "island", "jacket", "kettle", "ladder", "magnet", "needle"),
    *("orange", "pencil", "quilt", "rocket", "saddle", "tunnel", "violin", "wallet", "yellow", "zebra", "anchor"),
    *("basket", "camera", "desert", "eagle", "falcon", "glove", "harbor", "igloo", "jungle", "kitten", "lantern"),
    *("mirror", "nickel", "oyster", "pepper", "rabbit", "salmon", "temple", "turtle", "velvet", "walnut", "button"),
    *("carpet", "diamond", "elbow", "fountain", "goblet", "helmet", "ivory", "juggler", "knight", "locket", "meadow"),
)
CITIES = ("Berlin", "Paris", "London", "Madrid", "Rome", "Vienna", "Oslo", "Cairo", "Lima", "Tokyo", "Dublin", "Prague")
TIMES = ("7:15", "6:30", "9:45", "8:20", "5:40", "10:10")
COMPANIES = ("Siemens", "Toyota", "Nokia", "Shell", "Boeing", "Intel")
TOOLS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "get_weather": ("city", "Tell the weather in a city", CITIES, ("What is the weather in {}?", "Is it cold in {}?")),
    "call_person": ("name", "Call somebody on the phone", NAMES, ("Call {}.", "I want to talk to {} on the phone.")),
    "set_alarm": ("time", "Set an alarm", TIMES, ("Wake me up at {}.", "Set an alarm for {}.")),
    "translate_word": ("word", "Translate a word", KEYS[:12], ("Translate the word {}.", "Please translate {}.")),
    "get_price": (
        "company",
        "Tell the price of a share",
        COMPANIES,
        ("What is the price of {}?", "Price of {}, please."),
    ),
}
"""By name of a tool: its one argument, what it does, values of the argument, and how somebody asks for it."""


def drawn(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    lengths: Sequence[int],
    sizes: Sizes,
    form: NeedleFormat,
) -> Task:
    """The exercises of one suite.

    Args:
        name: One of ``records``, ``lookup`` and ``tools``.
        tokenizer: Tokenizer of the model.
        text: What records are planted in.
        lengths: Tokens of their prompts.
        sizes: How many there are.
        form: How records are stated and asked for; its ``chat`` goes for all suites.

    Returns:
        The exercises.
    """
    seeds = sizes.task_seeds
    how: dict[str, Any] = {"questions": sizes.task_questions, "seeds": seeds, "chat": form.chat}
    make: dict[str, Callable[[], Task]] = {
        "records": lambda: records(tokenizer, text, lengths, count=sizes.records, seeds=seeds, form=form),
        "lookup": lambda: lookups(tokenizer, pairs=sizes.lookup_pairs, **how),
        "tools": lambda: tool_calls(tokenizer, shots=sizes.tool_shots, **how),
    }
    return make[name]()


def records(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    lengths: Sequence[int],
    *,
    count: int = 3,
    seeds: int = 4,
    form: NeedleFormat | None = None,
) -> Task:
    """Several facts planted in one text, each asked for: a needle among its like.

    Args:
        tokenizer: Tokenizer of the model.
        text: What they are planted in; every seed takes another stretch of it where it is long enough.
        lengths: Tokens of a whole prompt, question included.
        count: Facts in each text, spread over it.
        seeds: Texts of each length.
        form: How facts are stated and asked for.

    Returns:
        The task ``records``, in groups by length.

    Raises:
        QuantCacheError: The text is too short for a length, a length for the facts, or a number is out of range.
    """
    form = form or NeedleFormat()
    form.check()
    if not 2 <= count <= len(NAMES) or seeds < 1 or not lengths:
        raise QuantCacheError(
            f"records need from 2 to {len(NAMES)} facts, a length and a seed, got {count} facts, lengths "
            f"{list(lengths)} and {seeds} seeds"
        )
    lengths = sorted(set(lengths))
    hay = encode(tokenizer, text[: haystack_size(lengths, seeds)])
    before, behind = frame_of(tokenizer, form.chat)
    exercises = []
    for length in lengths:
        for seed in range(seeds):
            draw = random.Random(f"records {length} {seed}")
            names = draw.sample(NAMES, count)
            codes = ["".join(draw.choices("0123456789", k=form.digits)) for _ in names]
            facts = [
                encode(tokenizer, form.fact.format(name=name, code=code))
                for name, code in zip(names, codes, strict=True)
            ]
            questions = [torch.cat((encode(tokenizer, form.question.format(name=name)), behind)) for name in names]
            room = length - len(before) - sum(map(len, facts)) - max(map(len, questions))
            if room < 0:
                raise QuantCacheError(f"a prompt of {length} tokens is too short for {count} facts and a question")
            if room > len(hay):
                raise QuantCacheError(f"the text has {len(hay)} tokens, {count} records in {length} need {room}")
            first = draw.randrange(len(hay) - room + 1)
            pieces = hay[first : first + room].tensor_split([round((at + 0.5) / count * room) for at in range(count)])
            planted = [part for pair in zip(pieces, facts, strict=False) for part in pair]
            whole = torch.cat((before, *planted, pieces[-1]))
            exercises.append(Exercise(str(length), whole, tuple(questions), tuple(codes)))
    settings = {"lengths": lengths, "records": count, "seeds": seeds, "format": vars(form)}
    new_tokens = answer_tokens(tokenizer, form)
    return Task("records", "Records retrieved", "tokens", tuple(exercises), _holds, new_tokens, settings)


def lookups(
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: Sequence[int] = (16, 32),
    shots: int = 4,
    questions: int = 8,
    seeds: int = 4,
    chat: bool = False,
) -> Task:
    """A table of words and numbers, from which the number of a word is asked for.

    Args:
        tokenizer: Tokenizer of the model.
        pairs: Rows of a table.
        shots: Questions that are shown with their answers first.
        questions: Questions about each table.
        seeds: Tables of each size.
        chat: Put table and questions into the tokenizer's chat template.

    Returns:
        The task ``lookup``, in groups by rows.

    Raises:
        QuantCacheError: A table is too small for the questions, or larger than there are words.
    """
    if min(questions, seeds) < 1 or shots < 0 or not pairs:
        raise QuantCacheError(f"lookups need questions and seeds of at least 1, got {questions} and {seeds}")
    for count in pairs:
        if not shots + questions <= count <= len(KEYS):
            raise QuantCacheError(
                f"a table must have from {shots + questions} rows, for {shots} shown and {questions} asked, to "
                f"{len(KEYS)}, got {count}"
            )
    exercises = []
    for count in sorted(pairs):
        for seed in range(seeds):
            draw = random.Random(f"lookup {count} {seed}")
            table = {key: "".join(draw.choices("123456789", k=3)) for key in draw.sample(KEYS, count)}
            rows = "".join(f"{key}: {value}\n" for key, value in table.items())
            keys = draw.sample(list(table), shots + questions)
            asked = {key: f"What is the value of {key}?" for key in keys}
            turns = [(asked[key], f"{key}: {table[key]}") for key in keys[:shots]]
            text, ends = _dialogue(tokenizer, f"{rows}\n", turns, [asked[key] for key in keys[shots:]], chat)
            starts = [encode(tokenizer, f"{key}:") for key in keys[shots:]]
            own = tuple(torch.cat(pair) for pair in zip(ends, starts, strict=True))
            exercises.append(Exercise(str(count), text, own, tuple(table[key] for key in keys[shots:])))
    settings = {"pairs": sorted(pairs), "shots": shots, "seeds": seeds, "chat": chat}
    return Task("lookup", "Values looked up", "rows", tuple(exercises), _begins, 6, settings)


def tool_calls(
    tokenizer: PreTrainedTokenizerBase,
    *,
    shots: Sequence[int] = (8, 24),
    questions: int = 8,
    seeds: int = 2,
    chat: bool = False,
) -> Task:
    """A list of tools and requests with the calls that they ask for; then requests whose calls are to be written.

    Args:
        tokenizer: Tokenizer of the model.
        shots: Requests that are shown with their calls.
        questions: Requests asked of each list.
        seeds: Lists of each number of shots.
        chat: Put them into the tokenizer's chat template.

    Returns:
        The task ``tools``, in groups by shots. A call is right if tool and argument are.

    Raises:
        QuantCacheError: A number is below 1.
    """
    if min((questions, seeds, *shots), default=0) < 1 or not shots:
        raise QuantCacheError(f"tool calls need shots, requests and seeds of at least 1, got {list(shots)}")
    exercises = []
    for count in sorted(shots):
        for seed in range(seeds):
            draw = random.Random(f"tools {count} {seed}")
            listed = "".join(
                json.dumps({"name": name, "description": tool[1], "parameters": [tool[0]]}) + "\n"
                for name, tool in draw.sample(list(TOOLS.items()), len(TOOLS))
            )
            intro = f"Answer each request with the call of one tool, as JSON. Tools:\n{listed}\n"
            pairs = [_request(draw) for _ in range(count + questions)]
            text, own = _dialogue(tokenizer, intro, pairs[:count], [asked for asked, _ in pairs[count:]], chat)
            exercises.append(Exercise(str(count), text, own, tuple(call for _, call in pairs[count:])))
    settings = {"shots": sorted(shots), "seeds": seeds, "chat": chat}
    return Task("tools", "Tool calls written", "shots", tuple(exercises), _same_call, 40, settings)


def _request(draw: random.Random) -> tuple[str, str]:
    """A request, and the call that it asks for."""
    name = draw.choice(list(TOOLS))
    argument, _, values, phrases = TOOLS[name]
    value = draw.choice(values)
    return draw.choice(phrases).format(value), json.dumps({"name": name, "arguments": {argument: value}})


def _dialogue(
    tokenizer: PreTrainedTokenizerBase, intro: str, turns: list[tuple[str, str]], questions: list[str], chat: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tokens of an introduction and answered questions, and those of each further question."""
    first, *more = turns or [("", "")]
    before, behind = frame_of(tokenizer, chat, [(intro + first[0], first[1]), *more] if turns else ())
    text = before if turns else torch.cat((before, encode(tokenizer, intro)))
    return text, tuple(torch.cat((encode(tokenizer, question), behind)) for question in questions)


def _holds(said: str, wanted: str) -> bool:
    return wanted in said.replace(",", "")


def _begins(said: str, wanted: str) -> bool:
    return said.startswith(wanted) and not said[len(wanted) : len(wanted) + 1].isdigit()


def _same_call(said: str, wanted: str) -> bool:
    try:
        found, _ = json.JSONDecoder().raw_decode(said)
    except ValueError:
        return False
    return bool(found == json.loads(wanted))
