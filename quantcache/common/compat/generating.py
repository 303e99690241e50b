"""How models and ``generate`` take a cache, and how ``generate`` reads a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

import transformers

from quantcache.common.compat.wrappers import unwrapped

_NAMES = ("past_key_values", "cache")
"""What a cache is called before transformers 5.24 and in models with code of their own, and from then on."""


def cache_name(taker: Callable[..., Any]) -> str:
    """What a function or a class calls the cache that it takes.

    Args:
        taker: The function or class.

    Returns:
        ``"past_key_values"`` or ``"cache"``; what ``generate`` calls it where the signature names neither.
    """
    for each in (taker, transformers.GenerationMixin.prepare_inputs_for_generation):
        for name in _NAMES:
            if name in inspect.signature(each).parameters:
                return name
    raise AssertionError("transformers' generate() takes no cache under a name that is known")


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as a model's forward pass takes it.

    A pass that is given one under the other name may warn, or leave it out and make its own without a word.

    Args:
        model: The model, or a wrapper around it.
        cache: The cache.

    Returns:
        The keyword argument.
    """
    return {cache_name(unwrapped(model).forward): cache}


def generate_argument(cache: Any) -> dict[str, Any]:
    """A cache as ``generate`` takes it.

    Args:
        cache: The cache.

    Returns:
        The keyword argument.
    """
    return {cache_name(transformers.GenerationMixin.prepare_inputs_for_generation): cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward pass or of ``generate``.

    Args:
        arguments: Keyword arguments.

    Returns:
        The cache, under either name; None if there is none.
    """
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def _reads_prompts() -> CodeType:
    """What reads a prompt; looked up where it is needed, for it takes long to import."""
    return inspect.unwrap(transformers.GenerationMixin._prefill).__code__


def tokens_beyond_cache(frame: FrameType) -> int | None:
    """How many tokens a prompt has more than its cache holds, where ``generate`` has compared the two.

    It slices the prompt by that number: where there are none more it takes all of it, where there are fewer a piece.

    Args:
        frame: A frame of the call stack.

    Returns:
        The number; None if the frame is another function's, or nothing is sliced.
    """
    if frame.f_code.co_name != "_prefill" or frame.f_code is not _reads_prompts():
        return None
    found, config = frame.f_locals.get("next_sequence_length"), frame.f_locals.get("generation_config")
    chunked = getattr(config, "prefill_chunk_size", None) is not None
    return found if isinstance(found, int) and not (chunked and found == 0) else None  # a chunk's 0 stands for None


def chunks_go_on() -> bool:
    """Whether a prompt that is read in chunks goes on behind what its cache holds.

    Returns:
        False for versions of transformers that read all of it, once more behind what is cached.
    """
    return "prefill_ids" in _reads_prompts().co_varnames
