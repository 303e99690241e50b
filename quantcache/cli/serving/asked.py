"""What a request asks for: fields that the server cannot follow are refused by name and value, not passed over."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException

from quantcache.common.defaults import COLDEST

ROLES = ("system", "developer", "user", "assistant", "tool")

UNNOTICED = {
    "metadata", "prediction", "prompt_cache_key", "safety_identifier", "service_tier", "store", "stream_options",
    "user",
}  # fmt: skip
"""Fields that transformers' server does not look at, and that no answer depends on."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "include": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Values with which a field that transformers' server does not look at asks for nothing else."""

NOTHING: dict[str, Any] = {"logit_bias": {}, "stop": []}
"""Values with which a request asks for nothing, and which ``generate`` refuses."""

WITHOUT_TOOLS = ("tool_choice", "parallel_tool_calls", "function_call", "max_tool_calls")
"""Fields that say nothing where there are no tools."""

LIMITS = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "frequency_penalty": (-0.99, 2.0),  # transformers' server makes a repetition penalty of 1 and this
}

SEEDS = range(-(1 << 63), 1 << 64)
"""What torch takes."""

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

TEXTS = ("text", "input_text", "output_text")
"""Types of a message's parts that are text."""

ITEMS = {"function_call": ("call_id", "name", "arguments"), "function_call_output": ("call_id", "output")}
"""What a response's items beside messages must have."""

KINDS: dict[str, tuple[type, str]] = {
    "chat_template_kwargs": (dict, "an object"),
    "instructions": (str, "a text"),
    "model": (str, "a text"),
    "suffix": (str, "a text"),
    "tools": (list, "a list"),
}
"""What a field that transformers' server does not check has to be."""

_asked: ContextVar[dict[str, Any] | None] = ContextVar("asked", default=None)


def check_request(body: dict[str, Any], unused: Collection[str]) -> None:
    """Refuse a request for something that its answer would not have, and remember the others until they are answered.

    Args:
        body: The request. What asks for nothing is taken out of it, and so is the seed: transformers' server would sow
            it at once, in the middle of another request's answer.
        unused: Fields that transformers' server knows and does not look at.

    Raises:
        HTTPException: Status 400, with the field and its value.
    """
    for name, value in NOTHING.items():
        if body.get(name) == value:
            del body[name]
    given = {name: value for name, value in body.items() if value is not None}
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _refusal(f"the request holds half a character, {error.object[error.start]!r}") from error
    for name, value in given.items():
        neutral = NEUTRAL.get(name, ())
        if name in unused and name not in UNNOTICED and not any(_same(value, each) for each in neutral):
            if name in WITHOUT_TOOLS and not given.get("tools") and not given.get("functions"):
                continue
            only = ", only " + " or ".join(map(repr, neutral)) if neutral else ""
            raise _refusal(f"{name}={value!r} is not supported here{only}")
    for name, (least, most) in LIMITS.items():
        value = given.get(name, least)
        if not _is_number(value) or not least <= value <= most:
            limits = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise _refusal(f"{name} must be a number {limits}, got {value!r}")
    for name in LENGTHS:
        value = given.get(name, 1)
        if not _is_whole(value) or value < 1:
            raise _refusal(f"{name} must be a whole number of at least 1, got {value!r}")
    seed = given.get("seed", 0)
    if not _is_whole(seed) or seed not in SEEDS:
        bits = " of at most 64 bits" if _is_whole(seed) else ""
        raise _refusal(f"seed must be a whole number{bits}, got {seed!r}")
    if not isinstance(given.get("stream", False), bool):
        raise _refusal(f"stream must be true or false, got {given['stream']!r}")
    stops = given.get("stop", "a")
    if not all(isinstance(stop, str) and stop for stop in (stops if isinstance(stops, list) else [stops])):
        raise _refusal(f"stop must be a text or a list of texts, none of them empty, got {stops!r}")
    for name, (kind, called) in KINDS.items():
        if name in given and not isinstance(given[name], kind):
            raise _refusal(f"{name} must be {called}, got {given[name]!r}")
    if not all(isinstance(tool, dict) for tool in given.get("tools", [])):
        raise _refusal(f"tools must be a list of objects, got {given['tools']!r}")
    _check_config(given.get("generation_config", "{}"))
    _check_bias(given.get("logit_bias", {}))
    for name in ("messages", "input"):
        if name in given and not (name == "input" and isinstance(given[name], str)):
            _check_messages(name, given[name])
    body.pop("seed", None)
    _asked.set(given)


def require_text(messages: list[dict[str, Any]]) -> None:
    """Refuse messages with parts that a model of text would not be given.

    Args:
        messages: The messages.

    Raises:
        HTTPException: Status 400, with the part's type.
    """
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if part["type"] not in TEXTS:
                raise _refusal(f"content of type {part['type']!r}: this model takes text only")


def asks_for_sampling() -> bool | None:
    """Whether the present request wants a random answer: it says so by a temperature or a share of the probability.

    Returns:
        None where it does not say, or its generation config says it.
    """
    given = _asked.get() or {}
    temperature = given.get("temperature")
    if temperature is not None and temperature < COLDEST:
        return False
    if "do_sample" in json.loads(given.get("generation_config", "{}")):
        return None
    return True if temperature is not None or given.get("top_p", 1) < 1 else None


def asked_seed() -> int | None:
    """The seed of the present request's answer; None if it has none."""
    return (_asked.get() or {}).get("seed")


def _check_messages(name: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise _refusal(f"{name} must be a list of at least one message, got {messages!r}")
    for message in messages:
        for field in [field for field, value in message.items() if value is None and field != "content"]:
            del message[field]  # as a client repeats an answer; transformers' server takes it for something
        missing = [field for field in ITEMS.get(str(message.get("type")), ()) if field not in message]
        if name == "input" and missing:
            raise _refusal(f"an item of type {message['type']!r} must have {missing[0]}, got {message!r}")
        if name == "messages" or "role" in message:
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise _refusal(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
            parts = content if isinstance(content, list) else []
            if not isinstance(content, str | list | None) or not all(
                isinstance(p, dict) and "type" in p for p in parts
            ):
                raise _refusal(f"a message's content must be a text or a list of parts with a type, got {content!r}")
            for part in parts:
                if part["type"] in TEXTS and not isinstance(part.get("text"), str):
                    raise _refusal(f"a part of type {part['type']!r} must have a text, got {part!r}")
            _check_calls(message.get("tool_calls", []))


def _check_calls(calls: Any) -> None:
    """Refuse tool calls that no template could show."""
    whole = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    called = [call.get("function") or call for call in calls] if whole else [None]
    if not all(isinstance(each, dict) and {"name", "arguments"} <= each.keys() for each in called):
        raise _refusal(f"tool_calls must be a list of functions with a name and arguments, got {calls!r}")


def _check_config(text: Any) -> None:
    """Refuse a generation config that is not the text of a JSON object."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _refusal(f"generation_config must be the text of a JSON object, got {text!r}")


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, dict):
        raise _refusal(f"logit_bias must be an object of token ids and numbers, got {bias!r}")
    for token, value in bias.items():
        if not str(token).isdigit() or not _is_number(value):
            raise _refusal(f"logit_bias must be of token ids and numbers, got {token!r}: {value!r}")
        bias[token] = float(value)  # transformers takes no whole numbers


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, which in JSON 0 and false are not."""
    return bool(one == other and isinstance(one, bool) == isinstance(other, bool))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refusal(message: str) -> HTTPException:
    return HTTPException(400, message)
