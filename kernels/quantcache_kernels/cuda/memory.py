"""Memory of a call's kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 256
"""Of places in it, in bytes."""


class Memory:
    """Where the kernels of a call leave their results for each other.

    Calls that follow each other on one stream may share it; once it has room for the largest, they allocate nothing.
    """

    def __init__(self) -> None:
        self._room: Tensor | None = None

    def places(self, sizes: Sequence[int], device: torch.device) -> list[int]:
        """Addresses of so many bytes each, until the next call.

        Args:
            sizes: Bytes.
            device: Where.

        Returns:
            The addresses.
        """
        *offsets, total = itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
        if self._room is None or self._room.numel() < total:
            self._room = torch.empty(total, dtype=torch.uint8, device=device)
        return [self._room.data_ptr() + offset for offset in offsets]
