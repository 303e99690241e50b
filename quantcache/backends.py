"""Which implementation encodes blocks and attends on them: device kernels where they can, else torch.

Kernels live in ``quantcache_kernels`` and never import quantcache. They are reached through two calls; their
plain-torch counterparts are :meth:`quantcache.codec.SpectralCodec.encode` and
:func:`quantcache.attention.spectral_attention`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from quantcache.codec import SideCodec
from quantcache.lazy import CacheView

Backend = Literal["auto", "native", "triton", "torch"]
BACKENDS: tuple[str, ...] = ("auto", "native", "triton", "torch")


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
