"""What a request asks for: fields that the server cannot follow are refused by name and value, not passed over."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException

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

WITHOUT_TOOLS = ("tool_choice", "parallel_tool_calls", "function_call", "max_tool_calls")
"""Fields that say nothing where there are no tools."""

LIMITS = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "frequency_penalty": (-0.99, 2.0),  # transformers' server makes a repetition penalty of 1 and this
}

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

_asked: ContextVar[dict[str, Any] | None] = ContextVar("asked", default=None)


def check_request(body: dict[str, Any], unused: Collection[str]) -> None:
    """Refuse a request for something that its answer would not have, and remember the others until they are answered.

    Args:
        body: The request.
        unused: Fields that transformers' server knows and does not look at.

    Raises:
        HTTPException: Status 400, with the field and its value.
    """
    given = {name: value for name, value in body.items() if value is not None}
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
    if not _is_whole(given.get("seed", 0)):
        raise _refusal(f"seed must be a whole number, got {given['seed']!r}")
    if not isinstance(given.get("stream", False), bool):
        raise _refusal(f"stream must be true or false, got {given['stream']!r}")
    stops = given.get("stop", "a")
    if not all(isinstance(stop, str) and stop for stop in (stops if isinstance(stops, list) else [stops])):
        raise _refusal(f"stop must be a text or a list of texts, none of them empty, got {stops!r}")
    _check_bias(given.get("logit_bias", {}))
    for name in ("messages", "input"):
        if name in given and not (name == "input" and isinstance(given[name], str)):
            _check_messages(name, given[name])
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
            if part["type"] not in ("text", "input_text", "output_text"):
                raise _refusal(f"content of type {part['type']!r}: this model takes text only")


def asks_for_sampling() -> bool:
    """Whether the present request wants a random answer: it says so by a temperature or a share of the probability."""
    given = _asked.get() or {}
    if "generation_config" in given:
        return False  # which says it itself
    temperature = given.get("temperature")
    return temperature != 0 and (temperature is not None or given.get("top_p", 1) < 1)


def _check_messages(name: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise _refusal(f"{name} must be a list of at least one message, got {messages!r}")
    for message in messages:
        if name == "messages" or "role" in message:
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise _refusal(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
            parts = content if isinstance(content, list) else []
            if not isinstance(content, str | list | None) or not all(
                isinstance(p, dict) and "type" in p for p in parts
            ):
                raise _refusal(f"a message's content must be a text or a list of parts with a type, got {content!r}")


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
