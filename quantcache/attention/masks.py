"""The masks that transformers makes for the ``"spectral"`` attention."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import eager_mask, sdpa_mask

from quantcache.common import compat
from quantcache.common.logs import log_once

logger = logging.getLogger(__name__)


def spectral_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for scaled dot-product attention, which a traced model's attention can take apart again.

    Args:
        args: As of ``sdpa_mask``.
        kwargs: As of ``sdpa_mask``, such as ``attention_mask``: the 2D mask, ``[B, T]``.

    Returns:
        ``[B, 1, Tq, T]`` bool, or None where attention needs none; as ``eager`` has it, additive, for models that
        compute attention by themselves.
    """
    if _attends_by_itself(type(kwargs.get("config"))):
        return eager_mask(*args, **kwargs)
    # None is causal, whatever a module says of itself: a model that looks ahead gets a mask that says so.
    kwargs["allow_is_bidirectional_skip"] = False
    if not torch.compiler.is_dynamo_compiling():
        if _goes_on(**kwargs):
            return None
        if kwargs.get("q_length") not in (1, kwargs.get("kv_length")):
            # Without a mask the queries are the last of all tokens, which those of a static cache's prompt are not.
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)
    if _sees_all(**kwargs):
        return None
    mask: Any = sdpa_mask(*args, **kwargs)
    if mask is not None:
        mask.shown_ = kwargs.get("attention_mask")
    return mask


@torch.compiler.assume_constant_result  # a fact of the model's class, which cannot be traced
def _attends_by_itself(kind: type) -> bool:
    """Whether a mask is for a model that never calls the attention function."""
    found = compat.attends_by_itself(kind)
    if found:
        log_once(
            logger,
            logging.WARNING,
            f"models with a {kind.__name__} compute attention by themselves: they read a compressed cache decoded, as "
            "with attn_implementation='eager'",
        )
    return found


def _goes_on(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **kwargs: Any,
) -> bool:
    """Whether each of several last tokens sees what precedes it, and no token is hidden.

    transformers makes a mask then too where there are tokens before these, of as many elements as both have in product.
    """
    if not allow_is_causal_skip or local_size is not None or not isinstance(q_offset, int):
        return False
    behind = q_length > 1 and kv_offset == 0 and 0 < q_offset == kv_length - q_length
    return behind and (attention_mask is None or (attention_mask.shape[1] == kv_length and bool(attention_mask.all())))


def _sees_all(
    q_length: int | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **kwargs: Any,
) -> bool:
    """Whether a single query has nothing hidden from it. transformers makes a mask then too, while a model is traced.

    Not only would that be read for nothing: torch 2.11 compiles a graph of its own for a mask of a single token.
    """
    return q_length == 1 and attention_mask is None and allow_is_causal_skip and local_size is None
