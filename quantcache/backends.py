"""Which implementation encodes blocks and attends on them: device kernels where they can, else torch.

Kernels live in ``quantcache_kernels`` and never import quantcache. They are reached through two calls; their
plain-torch counterparts are :meth:`quantcache.codec.SpectralCodec.encode` and
:func:`quantcache.attention.spectral_attention`.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from quantcache.codec import SideCodec, SpectralCodec, dequantize_gain
from quantcache.lazy import CacheView
from quantcache_kernels import cpu

Backend = Literal["auto", "native", "triton", "torch"]
BACKENDS: tuple[str, ...] = ("auto", "native", "triton", "torch")

logger = logging.getLogger(__name__)


def encode(codec: SideCodec, x: Tensor, places: Tensor, starts: Tensor | None, backend: Backend) -> dict[str, Tensor]:
    """Encode n blocks.

    Args:
        codec: The side's codec.
        x: ``[B, H, n * 64, D]``.
        places: The blocks' places, ``[n, 3]``.
        starts: Left padding of every row, ``[B]``, or None.
        backend: Which implementation is wanted.

    Returns:
        The codec's fields, ``[n, B, ...]`` each.
    """
    if isinstance(codec, SpectralCodec) and _native_takes(x, backend):
        codes, gains = cpu.encode(x, _native_constants(codec), places, starts)
        return {"codes": codes, "gains": gains}
    return codec.encode(x, places, starts)


def attend(
    query: Tensor, count: int, view: CacheView, mask: Tensor | None, softcap: float | None, backend: Backend
) -> tuple[Tensor, Tensor] | None:
    """Attend on a view's encoded blocks with a device kernel.

    Args:
        query: Scaled queries, ``[B, H, R, D]`` float32, R = G * Tq with the query index running fastest.
        count: Tq.
        view: What may be read.
        mask: The call's mask, ``[B or 1, 1 or Hq, Tq, T]``, or None.
        softcap: Soft cap of the scores, or None.
        backend: Which implementation is wanted.

    Returns:
        Attention output over the encoded blocks ``[B, H, R, Dv]`` and the log-sum-exp of its scores ``[B, H, R]``, both
        float32; None where no kernel supports the case.
    """
    return None


def attend_view(
    query: Tensor,
    view: CacheView,
    mask: Tensor | None,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor | None:
    """Attend on a whole view, encoded blocks and dense tokens, with one call of a kernel.

    Args:
        query: ``[B, Hq, Tq, D]``; the last Tq tokens of the view are the queries' own.
        view: What may be read; it holds encoded blocks.
        mask: The call's mask, or None.
        scaling: Factor of the scores; D^-½ if None.
        causal: What a missing mask means.
        softcap: Soft cap of the scores, or None.
        s_aux: One attention-sink logit for each query head, ``[Hq]``, or None.

    Returns:
        ``[B, Tq, Hq, Dv]`` in the query's dtype; None where no kernel supports the case.
    """
    keys, values = view.key, view.value
    if not isinstance(keys.codec, SpectralCodec) or not isinstance(values.codec, SpectralCodec):
        return None
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[-1] < view.length):
        return None
    dense = (keys.sinks, values.sinks, keys.tail, values.tail)
    if any(x is None or x.dtype not in cpu.DTYPES for x in dense) or not _native_takes(query, view.layer.backend):
        return None
    count = view.num_blocks
    return cpu.attend(
        query,
        _native_constants(keys.codec),
        _native_constants(values.codec),
        cpu.Blocks(
            *(side.store.buffers[name][:count] for side in (keys, values) for name in ("codes", "gains")),
            view.places,
            view.starts,
            view.encoded_end,
        ),
        dense,
        mask,
        s_aux,
        scaling=query.shape[3] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        causal=causal and mask is None and query.shape[2] > 1,
    )


# ---------------------------------------------------------------------- CPU kernels


def _native_takes(x: Tensor, backend: Backend) -> bool:
    """Whether the CPU kernels are to work on a tensor, and can."""
    if backend not in ("auto", "native") or x.device.type != "cpu" or x.dtype not in cpu.DTYPES:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    if not cpu.available():
        _warn_once(f"attending in plain torch, which is slower: {cpu.reason()}")
        return False
    return True


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _native_constants(codec: SpectralCodec) -> cpu.Constants:
    """A codec's constants in the form of the CPU kernels, made once."""
    found = codec.derived.get("native")
    if not isinstance(found, cpu.Constants):
        found = codec.derived["native"] = cpu.make(
            cpu.Source(
                mean=codec.mean,
                encoder=codec.encoder,
                decoder=codec.decoder,
                weights=codec.weights,
                widths=codec.widths,
                offsets=codec.offsets,
                order=codec.frame.order,
                frequencies=codec.frame.frequencies,
                slow_pairs=codec.frame.slow_pairs,
                fast_pairs=codec.frame.fast_pairs,
                levels={c.width: c.levels for c in codec.classes},
                boundaries={c.width: c.boundaries for c in codec.classes},
                gains=dequantize_gain(torch.arange(256)),
                factors=codec.gain_search,
                words=codec.num_words,
            )
        )
    return found
