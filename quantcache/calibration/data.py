"""What a calibration is made of: sequences of tokens, from texts or from batches of token ids."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.calibration.passages import sketch
from quantcache.calibration.yardstick import YARDSTICK_SEQUENCES, YARDSTICK_TOKENS
from quantcache.common import compat
from quantcache.common.defaults import SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.sequences import leading_token, split_text, text_tokens, without_padding

LENGTH = 2048
"""Tokens of a sequence where nobody says how many."""

SHORTEST = 4 * SINK_LENGTH
"""Sequences of so many tokens are too short: sinks, which are not compressed, would be much of them."""

LONGEST_NAME = 4096
"""Characters of a text that may be the name of a file."""


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences to calibrate on.

    Attributes:
        sequences: Token ids, ``[B, T]`` each.
        held_out: Sequences behind them, likewise, on which the loss is measured.
        digests: SHA-256 of every text and of every batch that was given.
        passages: The texts' passages, see :func:`quantcache.calibration.passages.sketch`; empty for batches.
    """

    sequences: list[Tensor]
    held_out: list[Tensor]
    digests: list[str]
    passages: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without those held out."""
        return sum(each.numel() for each in self.sequences)


def calibration_data(
    model: PreTrainedModel,
    data: str | Sequence[str] | Iterable[Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    seq_len: int | None,
    max_tokens: int,
) -> CalibrationData:
    """Cut what is given into sequences that a model can read.

    Args:
        model: The model.
        data: Texts, or batches of token ids ``[B, T]`` or ``[T]``, which may be a stream without end.
        tokenizer: Its tokenizer, which texts need.
        seq_len: Tokens of a text's sequences; :data:`LENGTH` if None, at most what the model was made for. Rows of
            batches are cut only where they are longer than that.
        max_tokens: Tokens to calibrate on.

    Returns:
        The sequences; warnings say what was left out.

    Raises:
        QuantCacheError: No sequence is long enough, or texts come without a tokenizer.
        ValueError: Something is neither texts nor token ids, such as a tokenizer, or a text is the name of a file.
    """
    limit = compat.position_limit(model.config) or LENGTH
    if seq_len is not None and seq_len > limit:
        warnings.warn(f"seq_len {seq_len} exceeds the model's limit; using {limit}", stacklevel=3)
    wanted = max_tokens + YARDSTICK_SEQUENCES * YARDSTICK_TOKENS
    if isinstance(data, str | Path):
        data = [data]
    elif isinstance(data, Tensor) and data.ndim == 1:
        data = data[None]
    texts, given, digests = _sorted(model, _items(data), tokenizer, wanted)
    batches = [part for batch in given for part in _within(model, batch, limit)]
    behind: list[Tensor] = []
    passages = ""
    if texts:
        if tokenizer is None:
            raise QuantCacheError("texts need a tokenizer: pass tokenizer=, or batches of token ids")
        length = min(seq_len or LENGTH, limit)
        tokens = _in_turn(model, texts, tokenizer, length, wanted)
        joined = "\n\n".join(texts)
        digests += [hashlib.sha256(text.encode()).hexdigest() for text in dict.fromkeys([*texts, joined])]
        batches += split_text(model.config, tokens[:max_tokens], length)
        leading = leading_token(model.config, tokens)
        later = tokens[max_tokens:] if leading is None else torch.cat((leading, tokens[max_tokens:]))
        behind = split_text(model.config, later, length)
        passages = sketch(str(tokenizer.decode(tokens[:max_tokens], skip_special_tokens=True)))
    sequences, held_out = _divide(batches, max_tokens)
    if not sequences:
        longest = max((batch.shape[1] for batch in batches), default=0)
        raise QuantCacheError(
            f"calibration needs sequences of more than {SHORTEST} tokens, the longest given has {longest}"
        )
    return CalibrationData(sequences, held_out + behind, digests, passages)


def _items(data: Iterable[Any]) -> Iterator[Any]:
    """One text or batch after the other."""
    wrong = f"data must be texts or batches of token ids, [B, T] or [T], got {type(data).__name__}"
    if isinstance(data, Mapping):  # its keys would be taken for texts
        raise ValueError(f"{wrong}: give what is in it" + (", its input_ids" if "input_ids" in data else ""))
    try:
        return iter(data)
    except TypeError:
        raise ValueError(f"{wrong}: the arguments are model, texts, tokenizer") from None


def _sorted(
    model: PreTrainedModel, data: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None, wanted: int
) -> tuple[list[str], list[Tensor], list[str]]:
    """Texts, batches without padding and, as they were given, the batches' digests; no more of them than are wanted."""
    padding, *ends = (_special_tokens(model, tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos"))
    texts: list[str] = []
    batches: list[Tensor] = []
    digests: list[str] = []
    given = padded = short = 0
    for item in data:
        if isinstance(item, str | Path):
            texts.append(_text(item))
            continue
        batch = _token_ids(model, item)
        digests.append(hashlib.sha256(batch.to(torch.int64).contiguous().numpy().tobytes()).hexdigest())
        rows = without_padding(batch[None] if batch.ndim == 1 else batch, padding, set().union(*ends))
        batches += rows
        shown = sum(row.numel() for row in rows)
        given, padded = given + shown, padded + batch.numel() - shown
        short += sum(row.shape[0] for row in rows if row.shape[1] <= SHORTEST)
        if given >= wanted:
            break
    if padded:
        warnings.warn(f"{padded} of {given + padded} token ids are padding, and are left out", stacklevel=4)
    if short and any(row.shape[1] > SHORTEST for row in batches):
        warnings.warn(f"{short} sequences of at most {SHORTEST} tokens are left out", stacklevel=4)
    return texts, batches, digests


def _in_turn(
    model: PreTrainedModel, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, wanted: int
) -> Tensor:
    """Tokens of texts that take turns, ``[N]``: of long ones a sequence at a time; short ones and ends side by side.

    Else a long text would leave no room for those behind it.
    """
    first = text_tokens(tokenizer, texts[0], wanted)
    leading = leading_token(model.config, first)
    begin = 0 if leading is None else 1  # which every sequence begins with, see split_text
    step = length - begin
    between = text_tokens(tokenizer, "\n\n", add_special_tokens=False)
    pieces, rest = [first[:begin]], first.new_empty(0)
    waiting: deque[str | Tensor] = deque([first[begin:], *texts[1:]])
    while waiting and sum(map(len, pieces)) + len(rest) < wanted:
        text = waiting.popleft()
        tokens = text_tokens(tokenizer, text, wanted, add_special_tokens=False) if isinstance(text, str) else text
        if len(tokens) >= step:
            pieces.append(tokens[:step])
            waiting.append(tokens[step:])
        elif len(tokens):
            rest = torch.cat((rest, between, tokens)) if len(rest) else tokens
            if len(rest) >= step:
                pieces.append(rest[:step])
                rest = rest[step:]
    if unread := sum(isinstance(text, str) for text in waiting):
        warnings.warn(f"{unread} of {len(texts)} texts are left out: those before have tokens enough", stacklevel=4)
    return torch.cat((*pieces, rest))[:wanted]


def _within(model: PreTrainedModel, batch: Tensor, limit: int) -> list[Tensor]:
    """A batch whose rows are as long as a model reads; of longer rows the pieces, as of a text."""
    if batch.shape[1] <= limit:
        return [batch]
    return [part for row in batch for part in split_text(model.config, row, limit)]


def _divide(batches: list[Tensor], max_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """What a calibration is made of, ``[B, T]`` each and ``max_tokens`` in all at most, and the sequences left over."""
    kept: list[Tensor] = []
    left: list[Tensor] = []
    remaining = max_tokens
    for batch in batches:
        rows = min(batch.shape[0], max(remaining // max(batch.shape[1], 1), 0))
        if not rows and not kept and remaining:
            batch, rows = batch[:1, :remaining], 1
        if rows and batch.shape[1] > SHORTEST:
            kept.append(batch[:rows])
            remaining -= kept[-1].numel()
        if rows < batch.shape[0]:
            left += batch[rows:].split(1)
    return kept, left


def _token_ids(model: PreTrainedModel, given: Any) -> Tensor:
    """A batch as a tensor, if it is one that a model can read."""
    try:
        batch = torch.as_tensor(given, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"data must be texts or batches of token ids, [B, T] or [T]; one is a {type(given).__name__}: {error}"
        ) from error
    if batch.ndim not in (1, 2) or batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        raise ValueError(
            f"data must be texts or batches of token ids, [B, T] or [T]; one has shape {list(batch.shape)} and dtype "
            f"{batch.dtype}"
        )
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < known:
        raise ValueError(f"token ids must lie between 0 and {known - 1}, got {int(batch.min())} to {int(batch.max())}")
    return batch.long()


def _text(given: str | Path) -> str:
    """A text; not the name of the file that has it."""
    name = str(given)
    if isinstance(given, Path) or (len(name) < LONGEST_NAME and os.path.isfile(name)):
        raise ValueError(f"data must be texts, got the name of a file, {name!r}: read it first")
    return name


def _special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> set[int]:
    """What a model and its tokenizer call, for instance, ``pad_token_id``."""
    found: set[int] = set()
    for source in (model.config.get_text_config(decoder=True), getattr(model, "generation_config", None), tokenizer):
        given = getattr(source, name, None)
        found.update(each for each in (given if isinstance(given, list | tuple) else [given]) if each is not None)
    return found
