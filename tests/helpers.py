"""Feeding a model through a cache, and how far two sets of logits are apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantcache import backends
from quantcache.backends import AttentionCall, Backend, CacheView
from quantcache.backends.padding import Arrivals
from quantcache_kernels import cpu


def implementation(name: str) -> Backend:
    """The backend that a layer on the CPU gets for a name."""
    if name == "auto":
        return backends.REFERENCE if cpu.unavailable(torch.device("cpu")) else backends.FASTEST_FIRST["cpu"][0]
    return backends.find(name)


def attend_by_kernel(
    query: Tensor,
    view: CacheView,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor | None:
    """Attention by a view's own backend; None where that refuses the call."""
    assert view.backend is not None
    call = AttentionCall(mask, query.shape[3] ** -0.5, True, softcap, sink_logits)
    return None if view.backend.refuses(query, view, call) else view.backend.attend(query, view, call)


ROUNDING = 2e-5
"""Of two float32 runs of a whole model that read the same codes, as a share of the logits' deviation."""


def few(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Parameters of a test that is repeated over many cases: all for CI, a few without it.

    Args:
        values: All of them.
        quick: Those that are not marked as slow.

    Returns:
        One for each value.
    """
    return [pytest.param(value, marks=[] if value in quick else [pytest.mark.slow]) for value in values]


Run = Callable[..., tuple[int, str, str]]
"""Runs the command line with some arguments: exit status, stdout and stderr."""


@torch.no_grad()
def feed(
    model: PreTrainedModel, cache: DynamicCache, tokens: Tensor, steps: Sequence[int], padding: Sequence[int] = ()
) -> Tensor:
    """Logits of tokens fed through a cache in steps.

    Args:
        model: The model.
        cache: The cache, which may hold something already if there is no padding.
        tokens: ``[B, T]``.
        steps: How many tokens each forward pass is given, T in all.
        padding: Left padding of every row.

    Returns:
        ``[B, T, V]`` float64.
    """
    mask = None
    if padding:
        mask = (torch.arange(tokens.shape[1]) >= torch.tensor(padding)[:, None]).long()
    logits, first = [], 0
    for count in steps:
        more = {}
        if mask is not None:
            more["attention_mask"] = mask[:, : first + count]
            if "position_ids" in inspect.signature(model.forward).parameters:
                more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, first : first + count]
        chunk = tokens[:, first : first + count]
        logits.append(model(input_ids=chunk, past_key_values=cache, use_cache=True, **more).logits.double())
        first += count
    assert first == tokens.shape[1]
    return torch.cat(logits, dim=1)


def left_padding(pads: Sequence[int], length: int, count: int) -> Arrivals | None:
    """What a forward pass over left-padded rows says of its tokens.

    Args:
        pads: Left padding of every row.
        length: Tokens cached once the pass is over.
        count: Tokens that it brings.

    Returns:
        What a layer's ``update`` is told; None without padding.
    """
    mask = torch.arange(length) >= torch.tensor(pads)[:, None]
    return Arrivals.of(mask, None, length, count) if any(pads) else None


def error(found: Tensor, reference: Tensor) -> float:
    """Root mean square difference."""
    return float((found - reference).pow(2).mean().sqrt())


def divergence(reference: Tensor, found: Tensor) -> float:
    """Mean KL(reference || found) of logits ``[..., V]``, in nats."""
    reference, found = reference.log_softmax(-1), found.log_softmax(-1)
    return float((reference.exp() * (reference - found)).sum(-1).mean())
