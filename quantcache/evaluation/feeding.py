"""Feeding a model through a cache, and assembling prompts token by token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from quantcache.common import compat
from quantcache.common.defaults import CHUNK
from quantcache.common.errors import QuantCacheError
from quantcache.common.sequences import text_tokens
from quantcache.evaluation.methods import Method, parse_methods

PROMPT_CHUNK = 256
"""Tokens fed at once of prompts of which only the answer is looked at."""


def dense_method(model: PreTrainedModel) -> Method:
    """The reference: transformers' own cache.

    Args:
        model: Model whose config the cache is made from.

    Returns:
        The method.
    """
    return parse_methods(["dense"], model.config, None)[0]


def chunk_edges(context: int, chunk: int, sink_length: int, tail: int = 0) -> list[tuple[int, int]]:
    """Where a window is cut.

    The first chunk is longer by sinks and tail, so that every later chunk starts where a block has just been filled:
    it reads nothing but codes, sinks and tail.

    Args:
        context: Tokens in a window.
        chunk: Tokens in a chunk.
        sink_length: First tokens kept by every method.
        tail: Recent tokens kept by every method.

    Returns:
        (first token, one past the last) of every chunk.
    """
    edges = [0, *range(min(context, chunk + sink_length + tail), context, chunk), context]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def pieces(tokens: Tensor, chunk: int, sink_length: int) -> list[Tensor]:
    """Windows in the chunks of :func:`chunk_edges`.

    Args:
        tokens: ``[B, T]``.
        chunk: Tokens in a chunk.
        sink_length: First tokens kept by every method.

    Returns:
        The chunks ``[B, t]``.
    """
    return [tokens[:, first:last] for first, last in chunk_edges(tokens.shape[1], chunk, sink_length)]


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    cache: Cache,
    tokens: Tensor,
    chunk: int = CHUNK,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Fill a cache in chunks, so that the later ones read what it keeps of the earlier ones.

    Args:
        model: Model that reads the tokens.
        cache: Cache to fill, changed in place.
        tokens: ``[B, T]``; nothing is read where T is 0.
        chunk: Tokens fed at once.
        on_progress: Called with the tokens of every chunk that has been read.
    """
    given = compat.cache_argument(model, cache)
    for part in tokens.to(compat.input_device(model)).split(chunk, dim=1) if tokens.shape[1] else ():
        model(input_ids=part, **given, use_cache=True, logits_to_keep=1)
        if on_progress is not None:
            on_progress(part.shape[1])


def most_likely(logits: Tensor) -> Tensor:
    """The most likely token of every row.

    Args:
        logits: ``[B, vocabulary]``.

    Returns:
        ``[B, 1]``.
    """
    return logits.argmax(-1, keepdim=True)


@torch.no_grad()
def decode_tokens(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, choose: Callable[[Tensor], Tensor] = most_likely
) -> Iterator[Tensor]:
    """Continue a text without end, one token for each row at a time.

    Args:
        model: Model that continues.
        cache: A cache of everything before ``tokens``, changed in place.
        tokens: Tokens that the cache does not hold yet, ``[B, T]``, T at least 1.
        choose: Takes logits ``[B, vocabulary]`` and returns the next tokens ``[B, 1]``.

    Yields:
        ``[B, 1]``; the cache does not hold them yet.
    """
    device, given = compat.input_device(model), compat.cache_argument(model, cache)
    while True:
        tokens = choose(model(input_ids=tokens.to(device), **given, use_cache=True, logits_to_keep=1).logits[:, -1])
        yield tokens


def greedy(model: PreTrainedModel, cache: Cache, tokens: Tensor, count: int) -> Tensor:
    """The most likely continuation.

    Args:
        model: Model that continues.
        cache: A cache of everything before ``tokens``.
        tokens: Tokens that the cache does not hold yet, ``[B, T]``, T at least 1.
        count: Tokens to add.

    Returns:
        ``[B, count]``.
    """
    return torch.cat(list(itertools.islice(decode_tokens(model, cache, tokens), count)), dim=1).cpu()


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end a text.

    Args:
        model: Model whose generation config names them.

    Returns:
        None, one or several.
    """
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {ends} if isinstance(ends, int) else set(ends or ())


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokens of a text, without special tokens.

    Args:
        tokenizer: Any transformers tokenizer.
        text: Plain text of any length.

    Returns:
        ``[T]``.
    """
    return text_tokens(tokenizer, text, add_special_tokens=False)


def opening(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The special tokens that a tokenizer puts in front of every text.

    Args:
        tokenizer: Any transformers tokenizer.

    Returns:
        ``[T]``, empty for many.
    """
    plain = encode(tokenizer, "a").tolist()
    whole = list(tokenizer("a", verbose=False).input_ids)
    place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return torch.tensor(whole[:place], dtype=torch.long, device="cpu")


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def frame_of(
    tokenizer: PreTrainedTokenizerBase, chat: bool, turns: Sequence[tuple[str, str]] = ()
) -> tuple[Tensor, Tensor]:
    """What stands before and behind a prompt.

    Args:
        tokenizer: Any transformers tokenizer.
        chat: Put the prompt into the tokenizer's chat template, as the user's last message.
        turns: What was said before it: each a message of the user's, and the answer. Without a template they are lines.

    Returns:
        Tokens before ``[T]`` and behind ``[T]``.

    Raises:
        QuantCacheError: The tokenizer has no chat template, or one that does not show messages as they are.
    """
    if not chat:
        said = encode(tokenizer, "".join(f"{question}\n{answer}\n" for question, answer in turns))
        return torch.cat((opening(tokenizer), said)), encode(tokenizer, "\n" if turns else "")
    if not has_template(tokenizer):
        raise QuantCacheError(f"{type(tokenizer).__name__} has no chat template: use the plain prompt")
    mark = "PROMPT-GOES-HERE"
    messages: Any = [
        {"role": role, "content": content}
        for turn in (*turns, (mark,))
        for role, content in zip(("user", "assistant"), turn, strict=False)
    ]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, found, behind = text.partition(mark)
    if not found:
        raise QuantCacheError("the chat template does not show the user's message as it is: use the plain prompt")
    return encode(tokenizer, before), encode(tokenizer, behind)


def check_lengths(model: PreTrainedModel, lengths: Sequence[int], what: str) -> None:
    """Refuse contexts beyond a model's limit.

    Args:
        model: Model whose positions are the limit.
        lengths: Tokens of every context.
        what: What the error calls them.

    Raises:
        QuantCacheError: A length is below 2 or above the limit.
    """
    limit = compat.position_limit(model.config)
    for length in lengths:
        if length < 2:
            raise QuantCacheError(f"{what} {length} is too short: at least 2 tokens")
        if limit is not None and length > limit:
            raise QuantCacheError(f"{what} {length} exceeds the model's limit of {limit} positions")
