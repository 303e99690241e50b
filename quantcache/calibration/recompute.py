"""A backward pass in little memory: what a layer computed is computed again when its gradients are due.

transformers' own gradient checkpointing drops the cache, and with it a text that is read chunk by chunk.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from quantcache.artifact.cache_layout import stock_layers
from quantcache.attention.probe import RecordingCache
from quantcache.common import compat


class _Update(NamedTuple):
    """New keys and values of a layer, how many tokens it then saw, and whether they need gradients."""

    new: tuple[Tensor, Tensor]
    seen: int
    requires_grad: tuple[bool, bool]


class ReplayingCache(RecordingCache):
    """A RecordingCache from which a chunk of a text can be read a second time.

    Args:
        config: The model's config.
        on_update: As a RecordingCache has it; not called the second time.
    """

    def __init__(self, config: Any, on_update: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None]):
        super().__init__(config, on_update)
        self.chunk = 0
        self._again: int | None = None
        self._updates: dict[int, list[_Update]] = defaultdict(list)

    @contextlib.contextmanager
    def replaying(self, chunk: int) -> Iterator[None]:
        """Show what an earlier chunk was shown, inside the context."""
        try:
            self._again = chunk
            yield
        finally:
            self._again = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Cache new keys and values, or show what they were shown with."""
        updates = self._updates[layer_idx]
        if self._again is None:
            shown = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            new = key_states.detach(), value_states.detach()
            updates.append(_Update(new, shown[0].shape[2], (shown[0].requires_grad, shown[1].requires_grad)))
            return shown
        again = updates[self._again]
        both = []
        for side, x in enumerate((key_states, value_states)):
            parts = [earlier.new[side] for earlier in updates[: self._again]]
            seen = torch.cat((*parts, x), dim=2)[:, :, -again.seen :]
            # The graph is that of the first time; what counts is that autograd sees tensors of the same kind.
            both.append(seen.detach().requires_grad_(again.requires_grad[side]))
        return both[0], both[1]


@contextlib.contextmanager
def recomputed_layers(model: PreTrainedModel, cache: ReplayingCache) -> Iterator[None]:
    """Keep only what goes into a model's layers, inside the context, and compute the rest again for its gradients.

    Args:
        model: The model, in evaluation mode. If its cache holds more than keys and values, all is kept.
        cache: The cache that it is called with; ``cache.chunk`` counts the calls.

    Yields:
        Nothing.
    """
    plain = all(map(compat.is_plain, stock_layers(model.config)))
    layers = [each for each in model.modules() if plain and isinstance(each, GradientCheckpointingLayer)]
    own = [vars(layer).get("forward") for layer in layers]  # accelerate puts one of its own there

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        chunk = cache.chunk

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return contextlib.nullcontext(), cache.replaying(chunk)

        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
        return checkpoint(original, *args, **options, **kwargs)

    try:
        for layer in layers:
            layer.forward = partial(forward, layer.forward)
        yield
    finally:
        for layer, previous in zip(layers, own, strict=True):
            if previous is None:
                del layer.forward
            else:
                layer.forward = previous


@contextlib.contextmanager
def cut_below_head(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Part the graph below a model's logits, inside the context: they can go as soon as the gradients below are there.

    Args:
        model: The model.

    Yields:
        A list that gets what goes into the model's head, as its layers left it and as the head is given it. It stays
        empty where the model makes its logits otherwise.
    """
    cuts: list[tuple[Tensor, Tensor]] = []

    def cut(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        left, *others = inputs
        cuts.append((left, left.detach().requires_grad_()))
        return cuts[-1][1], *others

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(cut) if head is not None else contextlib.nullcontext()
    with hook:
        yield cuts
