"""Cutting a text's tokens into the sequences that a model reads, each with the BOS token where texts begin with one.

Models that are trained with a token at the start of every text use it as an attention sink. Sequences cut from the
middle of a text lack it: such a model predicts several times worse, and its keys and values are not those of use.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig


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
        ``[n, length]``; tokens at the end that fill no window are left out.
    """
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
