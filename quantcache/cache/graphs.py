"""A model's decoding steps from CUDA graphs: one by one, and in ``generate``."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from quantcache.attention.function import ATTENTION_NAME
from quantcache.cache.spectral_cache import BlockCache
from quantcache.cache.stages import Graph, Period
from quantcache.common import compat
from quantcache.common.errors import GraphCaptureError, QuantCacheError
from quantcache.common.logs import log_once

logger = logging.getLogger(__name__)

_CACHE = compat.cache_name(CausalLMOutputWithPast)
"""What a model's output calls the cache."""

_READ = ("input_ids", "attention_mask", "position_ids")
"""Arguments of a forward pass that a graph's step is given."""

_KNOWN = ("cache", "past_key_values", "cache_position")
"""Those that follow from the cache."""

_NOTHING_ELSE = {"use_cache": (None, True), "return_dict": (None, True), "logits_to_keep": (None, 0, 1)}
"""Those that ask for nothing else with these values."""


class _Steps:
    """Steps of a model on a cache that the caller holds.

    Args:
        model: The model.

    Raises:
        GraphCaptureError: The model's attention is another one.
    """

    def __init__(self, model: Any):
        names = set(compat.attention_implementations(model.config).values())
        if names != {ATTENTION_NAME}:
            raise GraphCaptureError(f'the model attends by {", ".join(sorted(map(str, names)))}, not by "spectral"')
        self._model = model
        self._period: Period | None = None
        self._graph: Graph | None = None  # the last one, whose memory the next one goes on with

    @torch.no_grad()
    def take(
        self, cache: BlockCache, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Take one step; see :meth:`DecodeGraph.__call__`."""
        cache._require_settled(cache.layers)
        rows, length = input_ids.shape[0], cache.get_seq_length()
        expected = {"input_ids": [rows, 1], "attention_mask": [rows, length + 1], "position_ids": [rows, 1]}
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        for name, tensor in given.items():
            if tensor is not None and list(tensor.shape) != expected[name]:
                raise QuantCacheError(
                    f"a step on {length} tokens takes {name} of shape {expected[name]}, got {list(tensor.shape)}"
                )
        logits: list[Tensor] = []
        cache._change(lambda: logits.append(self._step(cache, input_ids, attention_mask, position_ids)))
        return logits[0]

    def _step(
        self, cache: BlockCache, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        # What a mask hides is on the device: to look would make the host wait at every step. So every mask is followed.
        length, masked = cache.get_seq_length(), attention_mask is not None
        period, longer = self._ready(cache, input_ids.shape[0], masked)
        period.ids.copy_(input_ids)
        if position_ids is None:
            period.positions.fill_(length)
        else:
            period.positions.copy_(position_ids)
        if masked:
            assert attention_mask is not None
            period.mask[:, 0, 0, : length + 1] = attention_mask.bool()
        try:
            logits = period.run(self._graph)
        except BaseException:
            self._period = None  # its counts may be ahead of the cache's
            raise
        self._graph = period.graph or self._graph
        period.note(longer)
        cache.forward_pass = None  # whatever became of the last one, this one is through
        for layer in cache.spectral_layers:
            layer.flush()
        return logits

    def _ready(self, cache: BlockCache, batch: int, masked: bool) -> tuple[Period, list[dict[str, Tensor]]]:
        """The period that the next step is one of, and tails with room for it."""
        period, self._period = self._period, None
        if period is not None and period.serves(batch, masked):
            longer = period.claimed()
            if longer is None and period.follow(cache):
                longer = period.claimed()
            if longer is not None:
                self._period = period
                return period, longer
        period = Period(self._model, cache, masked)
        held = period.ids.shape[0]
        if held != batch:
            raise QuantCacheError(f"the tokens are for {batch} rows, the cache holds {held}")
        longer = period.claimed()
        assert longer is not None
        self._period = period
        return period, longer


class DecodeGraph:
    """Decoding of a model with a compressed cache, its steps replayed from CUDA graphs.

    A call is a forward pass of one new token for every row. The cache is the same as after a pass of the model itself:
    it may be used, copied, cut and saved in between. Needs the CUDA kernels (a GPU of compute capability 8.0 or more,
    bfloat16) and a cache of spectral layers alone. After choosing another adapter, adding hooks or replacing weights
    make a new one: it repeats what the model did when it was captured.

    Args:
        model: The model, with ``attn_implementation="spectral"``.
        cache: Its cache, which holds encoded blocks when the first step is taken.

    Raises:
        GraphCaptureError: The model's attention is another one.
        TypeError: The cache is another one, such as transformers' own.
    """

    def __init__(self, model: Any, cache: BlockCache):
        if not isinstance(cache, BlockCache):
            raise TypeError(f"DecodeGraph needs a SpectralCache, got {type(cache).__name__}")
        self._steps, self.cache = _Steps(model), cache

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Take one step.

        Args:
            input_ids: The new token of every row, ``[B, 1]``.
            attention_mask: Which tokens may be looked at, ``[B, T + 1]``; None for all, which is faster than a mask
                that shows all. It may change from step to step, but what was padding of a row when its last block was
                encoded stays hidden until the next one.
            position_ids: Positions of the new tokens, ``[B, 1]``; None for T.

        Returns:
            Logits, ``[B, 1, V]``.

        Raises:
            GraphCaptureError: The step cannot be captured; the cache is as before.
            QuantCacheError: The arguments do not fit the cache.
        """
        return self._steps.take(self.cache, input_ids, attention_mask, position_ids)


@contextlib.contextmanager
def decode_graphs(model: Any) -> Iterator[Any]:
    """Let a model take its decoding steps on compressed caches from CUDA graphs, in ``generate`` too.

    Steps that a graph cannot hold run as always; why not is logged once. Enter again after choosing another adapter,
    adding hooks or replacing weights: graphs repeat what the model did when they were captured.

    Args:
        model: The model, with ``attn_implementation="spectral"``; the CUDA kernels serve its caches.

    Yields:
        The model.
    """
    before = vars(model).get("forward")
    model.forward = _Forward(model)
    try:
        yield model
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


class _Forward:
    """Stands in for a model's ``forward``.

    Args:
        model: The model.
    """

    def __init__(self, model: Any):
        self.model, self.original, self.has_failed = model, model.forward, False
        self.steps: weakref.WeakKeyDictionary[BlockCache, _Steps | None] = weakref.WeakKeyDictionary()
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass."""
        if args or self.has_failed or not self.is_step(kwargs):
            return self.original(*args, **kwargs)
        cache = compat.given_cache(kwargs)
        try:
            if cache not in self.steps:
                self.steps[cache] = _Steps(self.model)
            step = self.steps[cache]
            if step is not None:
                mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
                if positions is not None:
                    positions = positions.expand(kwargs["input_ids"].shape)
                logits = step.take(cache, kwargs["input_ids"], mask, positions)
                return CausalLMOutputWithPast(logits=logits, **{_CACHE: cache})
        except GraphCaptureError as error:
            self.steps[cache] = None
            # Others of the model's caches would fail as well, and torch keeps the memory of every capture that has.
            self.has_failed = error.__cause__ is not None
            log_once(logger, logging.WARNING, f"decoding without CUDA graphs: {error}")
        return self.original(**kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model runs as if nothing had been captured."""
        copied = memo[id(self.model)]
        return MethodType(type(copied).forward, copied)

    def is_step(self, given: dict[str, Any]) -> bool:
        """Whether a pass is of one new token on a compressed cache that has encoded something, and asks for logits."""
        cache, ids = compat.given_cache(given), given.get("input_ids")
        if not isinstance(cache, BlockCache) or not isinstance(ids, Tensor) or torch.is_grad_enabled():
            return False
        layers, positions, mask = cache.spectral_layers, given.get("position_ids"), given.get("attention_mask")
        rest = {name: value for name, value in given.items() if name not in (*_READ, *_KNOWN)}
        return (
            ids.ndim == 2
            and ids.shape[1] == 1
            and bool(layers)
            and all(layer.spans for layer in layers)
            and (positions is None or positions.shape in (ids.shape, (1, 1)))
            and (mask is None or mask.shape == (ids.shape[0], cache.get_seq_length() + 1))
            and not any(isinstance(value, Tensor) for value in rest.values())
            and all(value in _NOTHING_ELSE.get(name, (None, False)) for name, value in rest.items())
        )
