"""What attention refuses: each check passes quietly or raises one error that says what does not fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantcache.common.errors import QuantCacheError
from quantcache_kernels.interface import AttentionCall


def require_query(query: Tensor, tail: Tensor) -> None:
    """Refuse queries of another geometry than the keys that are cached.

    Args:
        query: ``[B, Hq, Tq, D]``.
        tail: Some cached keys, ``[B, H, t, D]``.

    Raises:
        QuantCacheError: Batch size, heads, dimension or device do not fit.
    """
    shape, (batch, heads, _, dim) = query.shape, tail.shape
    fits = len(shape) == 4 and shape[0] == batch and shape[1] % heads == 0 and shape[3] == dim
    if not fits or not query.is_floating_point() or query.device != tail.device:
        raise QuantCacheError(
            f"the queries have shape {list(query.shape)} in {query.dtype} on {query.device}, the cache holds keys of "
            f"{batch} rows, {heads} heads and dimension {dim} on {tail.device}"
        )


def fitting_call(
    query: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    s_aux: Tensor | None,
) -> AttentionCall:
    """One call of attention, its numbers checked; its tensors are as they were given (:func:`fitting_tensors`).

    Args:
        query: ``[B, Hq, Tq, D]``.
        mask: The mask, or None.
        scaling: Factor of the scores, a number or a tensor of one; D^-½ if None.
        causal: What a missing mask means.
        softcap: The soft cap; 0 and None mean no cap.
        s_aux: One attention-sink logit for each query head, or None.

    Returns:
        The call.

    Raises:
        QuantCacheError: The factor or the cap is not a number that attention can use.
    """
    return AttentionCall(mask, fitting_scaling(scaling, query), causal, _fitting_softcap(softcap), s_aux)


def fitting_tensors(call: AttentionCall, query: Tensor, length: int) -> AttentionCall:
    """A call whose mask and sink logits are as attention reads them.

    Args:
        call: As of :func:`fitting_call`.
        query: ``[B, Hq, Tq, D]``.
        length: Tokens that may be read, T.

    Returns:
        The call: its mask ``[B or 1, 1 or Hq, Tq, T]``, its logits ``[Hq]``.

    Raises:
        QuantCacheError: Shape, dtype or device of one of them do not fit the queries.
    """
    if call.mask is None and call.sink_logits is None:
        return call
    mask, logits = fitting_mask(call.mask, query, length), _fitting_sink_logits(call.sink_logits, query)
    return call._replace(mask=mask, sink_logits=logits)


def fitting_mask(mask: Tensor | None, query: Tensor, length: int) -> Tensor | None:
    """An attention mask as attention reads it; what it broadcasts over is expanded, as torch does.

    Args:
        mask: The call's mask, boolean or additive, or None.
        query: ``[B, Hq, Tq, D]``.
        length: Tokens that may be read, T.

    Returns:
        ``[B or 1, 1 or Hq, Tq, T]``, boolean or additive; None for None.

    Raises:
        QuantCacheError: Its shape, dtype or device does not fit the queries.
    """
    if mask is None:
        return None
    batch, heads, count = query.shape[:3]
    shape = (*(1,) * (4 - mask.dim()), *mask.shape)
    fits = (
        len(shape) == 4
        and shape[0] in (1, batch)
        and shape[1] in (1, heads)
        and shape[2] in (1, count)
        and (shape[3] == 1 or shape[3] >= length)
    )
    if not fits:
        raise QuantCacheError(
            f"the attention mask has shape {list(mask.shape)}, {count} queries of {batch} rows and {heads} heads on "
            f"{length} tokens need [{batch}, {heads}, {count}, {length}], or 1 in a dimension to broadcast"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise QuantCacheError(f"the attention mask is of {mask.dtype}, it must be boolean or floating point")
    if mask.device != query.device:
        raise QuantCacheError(f"the attention mask is on {mask.device}, the queries are on {query.device}")
    mask = in_fitting_dtype(mask, query)
    if mask.shape == shape and shape[2:] == (count, length):
        return mask
    return mask.reshape(shape)[..., :length].expand(-1, -1, count, length)


def in_fitting_dtype(mask: Tensor, query: Tensor) -> Tensor:
    """A mask in a dtype that torch's fused attention reads rightly beside a query.

    On the CPU torch 2.13 reads a float32 mask beside float64 queries as float64, and beyond its end.

    Args:
        mask: Boolean or additive; the minimum of its dtype means "never".
        query: The query.

    Returns:
        The mask: boolean, or in the query's dtype or float32, where "never" is the minimum of that.
    """
    if mask.dtype in (torch.bool, query.dtype) or (mask.dtype == torch.float32 and query.dtype != torch.float64):
        return mask
    wanted = torch.float64 if query.dtype == torch.float64 else torch.float32
    never = mask.isfinite() & (mask <= torch.finfo(mask.dtype).min / 2)
    return mask.to(wanted).masked_fill(never, torch.finfo(wanted).min)


def _fitting_sink_logits(s_aux: Tensor | None, query: Tensor) -> Tensor | None:
    """Attention-sink logits as attention reads them, ``[Hq]``."""
    if s_aux is None:
        return None
    if s_aux.numel() != query.shape[1] or s_aux.device != query.device or not s_aux.is_floating_point():
        raise QuantCacheError(
            f"the attention-sink logits have shape {list(s_aux.shape)} in {s_aux.dtype} on {s_aux.device}, "
            f"{query.shape[1]} query heads on {query.device} need one each"
        )
    return s_aux.reshape(-1).contiguous()


def _fitting_softcap(softcap: float | None) -> float | None:
    """A soft cap of scores; None where there is none."""
    if not softcap:
        return None
    if not 0 < softcap < math.inf:
        raise QuantCacheError(f"the soft cap of scores must be a positive number or None, got {softcap}")
    return float(softcap)


def fitting_scaling(scaling: float | None, query: Tensor) -> float:
    """A factor of scores.

    Args:
        scaling: The factor, a number or a tensor of one; None is D^-½.
        query: ``[B, Hq, Tq, D]``.

    Returns:
        The factor.

    Raises:
        QuantCacheError: The factor is not finite.
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not math.isfinite(factor):
        raise QuantCacheError(f"the factor of scores must be a finite number, got {factor}")
    return factor
