"""CPU kernels: encoding, decoding, and attention over packed codes, sinks and tail in one call.

The shared library has a plain C interface and knows nothing of torch; :func:`encode`, :func:`decode` and
:func:`attend` hand it pointers, and are registered as ``torch.ops.quantcache_kernels.cpu_encode``, ``cpu_decode`` and
``cpu_attend`` for ``torch.compile``.

Shapes: B batch, H key/value heads, Hq query heads, Tq queries, n blocks of 64 tokens, W words of codes per block and
batch row, D dimension of a key, Dv of a value, S sinks, t tokens of the tail.
"""

from __future__ import annotations

import torch

from quantcache_kernels.cpu.constants import Constants, prepare
from quantcache_kernels.cpu.decoding import decode
from quantcache_kernels.cpu.library import find
from quantcache_kernels.cpu.ops import DTYPES, Blocks, attend, encode

__all__ = ["DTYPES", "Blocks", "Constants", "attend", "decode", "encode", "prepare", "unavailable"]


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device.

    Args:
        device: Where the tensors live.

    Returns:
        The reason, such as that the shared library was not built; None if they can.
    """
    if device.type != "cpu":
        return f"the CPU kernels do not run on {device.type} devices"
    return find()[1] or None
