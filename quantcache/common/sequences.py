"""A text's tokens, and sequences cut from them for a model to read, each with the BOS token where texts begin with one.

Models that are trained with a token at the start of every text use it as an attention sink. Sequences cut from the
middle of a text lack it: such a model predicts several times worse, and its keys and values are not those of use.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int | None = None, add_special_tokens: bool = True
) -> Tensor:
    """Tokens of a text, in which a mark for an unknown word stays the text that it is.

    WikiText writes ``<unk>`` for rare words, and some tokenizers have a token of that name. A model has not met it in
    training: its keys and values are unlike all others, and one token in 25 of such a text would be it.

    Args:
        tokenizer: Any transformers tokenizer.
        text: Plain text, or chats in the model's own template.
        count: Tokens that are wanted, all by default. Megabytes behind them are not tokenized.
        add_special_tokens: Put the tokenizer's special tokens around the text.

    Returns:
        ``[N]``, at most ``count``.
    """
    size = len(text) if count is None else 16 * count
    while True:
        ids = _ids(tokenizer, text[:size], add_special_tokens)
        if count is None or len(ids) >= count or size >= len(text):
            return torch.tensor(ids[:count], dtype=torch.long, device="cpu")
        size *= 4


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    unknown = getattr(tokenizer, "unk_token", None)
    if unknown and unknown in text:
        found = set(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        # Other special tokens belong to a chat template, say, which stays as it is.
        if found.intersection(tokenizer.all_special_ids) == {tokenizer.unk_token_id}:
            whole = tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True, verbose=False)
            return list(whole.input_ids)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)


def without_padding(batch: Tensor, padding: set[int], ends: set[int]) -> list[Tensor]:
    """A batch without the padding at either end of its rows.

    Args:
        batch: Token ids, ``[B, T]``.
        padding: Ids of padding tokens.
        ends: Ids of BOS and EOS tokens, with which many models pad: the one beside the text belongs to it.

    Returns:
        The batch itself where no row is padded; else its rows, ``[1, T']`` each, but those of nothing else.
    """
    pads = torch.isin(batch, torch.tensor(sorted(padding | ends), dtype=batch.dtype, device=batch.device))
    rows = []
    for row, padded in zip(batch, pads, strict=True):
        shown = (~padded).nonzero().flatten().tolist()
        if shown:
            begin, end = shown[0], shown[-1] + 1
            begin -= begin > 0 and int(row[begin - 1]) in ends
            end += end < len(row) and int(row[end]) in ends
            rows.append(row[begin:end][None])
    whole = len(rows) == len(batch) and all(row.shape[1] == batch.shape[1] for row in rows)
    return [batch] if whole or not batch.numel() else rows


def leading_token(config: PreTrainedConfig, tokens: Tensor) -> Tensor | None:
    """The token that belongs in front of every sequence that is cut from a text.

    Args:
        config: The model's configuration.
        tokens: The text as its tokenizer gives it, ``[N]``.

    Returns:
        ``[1]``: the first of ``tokens`` where it is the model's BOS token; None where the text does not begin with it.
    """
    bos = getattr(config.get_text_config(), "bos_token_id", None)
    return tokens[:1] if bos is not None and len(tokens) and int(tokens[0]) == bos else None


def cut_windows(config: PreTrainedConfig, tokens: Tensor, length: int, stride: int | None = None) -> Tensor:
    """Windows of one length, side by side or overlapping.

    Args:
        config: The model's configuration.
        tokens: The text, ``[N]``.
        length: Tokens in a window, a BOS token included.
        stride: Tokens from the start of one window to that of the next; by default they do not overlap.

    Returns:
        ``[n, length]``; tokens at the end that fill no window are left out. None of a text that fills no window at all.
    """
    if len(tokens) < length:
        return tokens.new_empty(0, length)
    leading = leading_token(config, tokens)
    if leading is None:
        return tokens.unfold(0, length, stride or length)
    windows = tokens[1:].unfold(0, length - 1, stride or length - 1)
    return torch.cat((leading.expand(len(windows), 1), windows), dim=1)


def split_text(config: PreTrainedConfig, tokens: Tensor, length: int) -> list[Tensor]:
    """All of a text in sequences, the last of them shorter.

    Args:
        config: The model's configuration.
        tokens: The text, ``[N]``.
        length: Tokens in a sequence at most, a BOS token included.

    Returns:
        Sequences ``[1, T]``.
    """
    leading = leading_token(config, tokens)
    if leading is None:
        return list(tokens[None].split(length, dim=1))
    return [torch.cat((leading, part))[None] for part in tokens[1:].split(length - 1)]
