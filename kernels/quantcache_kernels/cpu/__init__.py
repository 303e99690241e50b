"""CPU kernels: encoding, decoding, and attention over packed codes, sinks and tail in one call.

The shared library has a plain C interface and knows nothing of torch; :func:`encode`, :func:`decode` and
:func:`attend` hand it pointers, and are registered as ``torch.ops.quantcache_kernels.cpu_encode``, ``cpu_decode`` and
``cpu_attend`` for ``torch.compile``.

Shapes: B batch, H key/value heads, Hq query heads, Tq queries, n blocks of 64 tokens, W words of codes per block and
batch row, D dimension of a key, Dv of a value, S sinks, t tokens of the tail.
"""

from __future__ import annotations

from quantcache_kernels.cpu.constants import Constants, make
from quantcache_kernels.cpu.decoding import decode
from quantcache_kernels.cpu.library import find
from quantcache_kernels.cpu.ops import DTYPES, Blocks, attend, encode

__all__ = ["DTYPES", "Blocks", "Constants", "attend", "available", "decode", "encode", "make", "reason"]


def available() -> bool:
    """Whether the shared library was built and can be loaded."""
    return find()[0] is not None


def reason() -> str:
    """Why the kernels are not available; empty if they are."""
    return find()[1]
