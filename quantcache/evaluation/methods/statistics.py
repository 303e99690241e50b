"""What calibrated rivals are fitted with: moments of a model's keys, values, queries and attention outputs on a text.

Vectors are taken as the cache and attention see them, keys and queries after their rotation. Shape legend: H is the
layer's number of key/value heads (Hkv), D the dimension of a key or a value.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcache import data
from quantcache.artifact import cache_layout
from quantcache.coding import linalg
from quantcache.coding.spectral import Moments
from quantcache.common import compat
from quantcache.common.ambient import float64_device
from quantcache.common.defaults import SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.sequences import split_text, text_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATISTICS_TOKENS = 8192
"""Tokens that rivals are fitted to, where nobody says otherwise."""


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one layer, per key/value head.

    Attributes:
        key: Moments of keys as cached, after rotation.
        value: Moments of values.
        query: Rotated queries of all query heads of the group.
        output: Attention outputs before the output projection, of all query heads of the group. With S the attention
            weights and V the values, their second moment is VᵀSᵀSV per query.
    """

    key: Moments
    value: Moments
    query: Moments
    output: Moments

    def side(self, name: str) -> Moments:
        """The moments of ``"key"`` or ``"value"``."""
        return self.key if name == "key" else self.value


@dataclass(frozen=True)
class RivalStatistics:
    """Moments of every full-attention layer.

    Attributes:
        layers: By layer index.
        tokens: How many tokens they are from.
        text_sha256: SHA-256 of the token ids, and of the text where it was given.
    """

    layers: dict[int, LayerMoments]
    tokens: int
    text_sha256: tuple[str, ...]


def collect_statistics(
    model: PreTrainedModel, tokens: Tensor, sequence_length: int = 2048, text: str | None = None
) -> RivalStatistics:
    """Gather the moments in one forward pass; the first tokens of every sequence, the sinks, are left out.

    Args:
        model: Model that reads the tokens.
        tokens: Token ids of a calibration text, ``[N]``.
        sequence_length: Tokens of a sequence; at most the model's limit.
        text: The text itself, for its hash.

    Returns:
        The moments.

    Raises:
        QuantCacheError: The text is too short.
        UnsupportedModel: The model's attention has no known interface.
    """
    from quantcache.attention.probe import RecordingCache, recorded_queries, run  # for a loaded model only

    limit = compat.position_limit(model.config) or sequence_length
    sequences = split_text(model.config, tokens, min(sequence_length, limit))
    sequences = [sequence for sequence in sequences if sequence.shape[1] > 4 * SINK_LENGTH]
    if not sequences:
        raise QuantCacheError(
            f"statistics need a sequence of more than {4 * SINK_LENGTH} tokens, the text has {len(tokens)}"
        )
    wanted = set(cache_layout.full_attention_layers(model.config))
    layers: dict[int, LayerMoments] = {}

    def on_update(index: int, keys: Tensor, values: Tensor) -> None:
        if index not in wanted:
            return
        if index not in layers:
            device = float64_device(keys.device)
            heads, key_dim, value_dim = keys.shape[1], keys.shape[3], values.shape[3]
            layers[index] = LayerMoments(
                *(Moments(heads, dim, device) for dim in (key_dim, value_dim, key_dim, value_dim))
            )
        for side, tensor in (("key", keys), ("value", values)):
            layers[index].side(side).add(tensor[:, :, SINK_LENGTH:].transpose(0, 1).flatten(1, 2))

    def grouped(x: Tensor, heads: int) -> Tensor:
        """``[B, Hq, T, D]`` as ``[H, B * G * T', D]``."""
        return x[:, :, SINK_LENGTH:].unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)

    def on_query(index: int, query: Tensor) -> None:
        if index in layers and query.shape[-1] == layers[index].query.sum.shape[-1]:
            layers[index].query.add(grouped(query, len(layers[index].query.sum)))

    def on_output(index: int, output: Tensor) -> None:
        if index in layers and output.shape[-1] == layers[index].output.sum.shape[-1]:
            layers[index].output.add(grouped(output.transpose(1, 2), len(layers[index].output.sum)))

    with torch.no_grad(), recorded_queries(model, on_query, on_output):
        for sequence in sequences:
            run(model, sequence, RecordingCache(model.config, on_update))
    digests = [hashlib.sha256(tokens.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()]
    if text is not None:
        digests.append(hashlib.sha256(text.encode()).hexdigest())
    return RivalStatistics(layers, sum(s.numel() for s in sequences), tuple(digests))


def text_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    max_tokens: int = STATISTICS_TOKENS,
) -> RivalStatistics:
    """Moments on the start of a text.

    Args:
        model: Model that reads the text.
        tokenizer: Tokenizer of that model.
        text: A calibration text, never one that is evaluated on; the bundled one if None.
        max_tokens: Tokens to use at most.

    Returns:
        The moments.
    """
    text = data.calibration_text() if text is None else text
    return collect_statistics(model, text_tokens(tokenizer, text, max_tokens), text=text)


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, the largest first.

    Args:
        matrix: ``[H, D, D]`` float64.

    Returns:
        Values ``[H, D]``, not negative, and vectors as columns ``[H, D, D]``.
    """
    values, vectors = linalg.eigh(matrix)
    return values.flip(-1).clamp_min(0.0), vectors.flip(-1)
