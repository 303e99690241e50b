"""What an error in a cached key or value costs: the loss's gradients at the tokens that are read as codes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.attention.probe import run
from quantcache.calibration.recompute import ReplayingCache, cut_below_head, recomputed_layers
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError

PASSES = 16
"""Passes that a sequence is read in at most: every one reads all weights, twice."""


class Gathered(NamedTuple):
    """One side of a layer, ``[B, Hkv, T, D]`` each.

    Attributes:
        vectors: Keys or values as they are cached.
        coded: Gradients at them where they are read as codes; zeros at tokens that never are.
        read: Gradients at them wherever they are read, as codes or as they are.
    """

    vectors: Tensor
    coded: Tensor
    read: Tensor


def reads_in_chunks(model: PreTrainedModel) -> bool:
    """Whether gradients of a text that a model reads in chunks are those of the text.

    Args:
        model: The model.

    Returns:
        False if it has recurrent layers: they write their states in place, or start anew with every chunk.
    """
    return not any(map(compat.is_stateful, cache_layout.stock_layers(model.config)))


def gather_gradients(
    model: PreTrainedModel,
    sequence: Tensor,
    layers: Collection[int],
    residual_length: int,
    loss: Callable[[Tensor], Tensor],
    on_update: Callable[[int, Tensor, Tensor], None] = lambda *_: None,
) -> dict[int, dict[str, Gathered]]:
    """Keys and values of a batch, and the gradients of a loss at them.

    The tokens right behind a token look at it most, and they read it as it is: it is in the residual window. What they
    make of it is most of its gradient, and says little of what its codes cost. So the batch is read in chunks, like a
    text by a compressed cache: what is behind the window when a chunk begins, the chunk reads as codes. A model that
    cannot be read in chunks is read at once, and nothing as codes.

    Args:
        model: The model, in evaluation mode.
        sequence: Token ids, ``[B, T]``.
        layers: Layers with full attention.
        residual_length: Recent tokens that are no codes yet.
        loss: Takes the logits of a chunk, ``[B, t, V]``, and returns a scalar; those of all chunks are added up.
        on_update: Called with the layer, keys and values of every chunk.

    Returns:
        By layer and side.

    Raises:
        QuantCacheError: The model has no backward pass.
    """
    tokens = sequence.shape[1]
    step = max(BLOCK, -(-tokens // PASSES)) if reads_in_chunks(model) else tokens
    read, coded = _Leaves(layers), _Leaves(layers)

    def record(index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        on_update(index, keys, values)
        if (index, SIDES[0]) not in read.leaves:
            return None
        added = [read.add((index, side), x) for side, x in zip(SIDES, (keys, values), strict=True)]
        return added[0], added[1]

    cache = ReplayingCache(model.config, record)
    ends: list[Tensor] = []
    gradients: list[Tensor | None] = []
    behind = 0
    with torch.enable_grad(), recomputed_layers(model, cache):
        for first in range(0, tokens, step):
            if first - residual_length > behind:
                for index, side in coded.leaves:
                    cached = getattr(cache.layers[index], f"{side}s")
                    parts = list(cached.tensor_split((behind, first - residual_length), dim=2))
                    parts[1] = coded.add((index, side), parts[1])
                    setattr(cache.layers[index], f"{side}s", torch.cat(parts, dim=2))
                behind = first - residual_length
            with cut_below_head(model) as cuts:
                scalar = loss(run(model, sequence[:, first : first + step], cache).logits)
            tops = [left for left, _ in cuts] or [scalar]
            if not (scalar.requires_grad and all(end.requires_grad for end in tops)):
                raise QuantCacheError(
                    f"no gradient reaches the keys and values of {type(model).__name__}: its layers may be quantized, "
                    "and have no backward pass. Use metric='query'"
                )
            ends += tops
            gradients += torch.autograd.grad(scalar, [given for _, given in cuts]) if cuts else [None]
            cache.chunk += 1
        torch.autograd.backward(ends, gradients)
    gathered: dict[int, dict[str, Gathered]] = {}
    for index, side in coded.leaves:
        vectors = getattr(cache.layers[index], f"{side}s").detach()
        found = (leaves.gradients((index, side), vectors) for leaves in (coded, read))
        gathered.setdefault(index, {})[side] = Gathered(vectors, *found)
    return gathered


class _Leaves:
    """Zeros that have been added to tensors: the gradients at them are those at the sums."""

    def __init__(self, layers: Collection[int]):
        self.leaves: dict[tuple[int, str], list[Tensor]] = {(index, side): [] for index in layers for side in SIDES}

    def add(self, place: tuple[int, str], x: Tensor) -> Tensor:
        """Add zeros to the next tokens of a layer's side, ``[B, Hkv, t, D]``."""
        leaf = torch.zeros_like(x, requires_grad=True)
        self.leaves[place].append(leaf)
        return x + leaf

    def gradients(self, place: tuple[int, str], vectors: Tensor) -> Tensor:
        """Gradients at all tokens of a layer's side, of the vectors' shape."""
        # None where the loss does not see the tokens.
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves[place]]
        rest = vectors[:, :, sum(part.shape[2] for part in parts) :]
        return torch.cat((*parts, torch.zeros_like(rest)), dim=2)


def sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Summed negative log-likelihood of one label per position, drawn from the model's own distribution.

    Args:
        logits: ``[B, T, V]``.
        generator: Draws the labels.

    Returns:
        A scalar; its gradients at keys and values give the Fisher metric.
    """
    logits = logits.flatten(0, 1).float()
    with torch.no_grad():
        # Sampled on the CPU, so that a seed means the same on every device.
        labels = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).squeeze(-1).to(logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
