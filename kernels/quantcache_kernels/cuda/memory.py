"""Memory of a call's kernels."""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """Where the kernels of a call leave their results for each other.

    Calls that follow each other on one stream may share it; once it has room for the largest, they allocate nothing.
    """

    def __init__(self) -> None:
        self._room: Tensor | None = None

    def first(self, size: int, device: torch.device) -> int:
        """Address of so many bytes, until the next call.

        Args:
            size: Bytes.
            device: Where.

        Returns:
            The address.
        """
        if self._room is None or self._room.numel() < size:
            self._room = torch.empty(size, dtype=torch.uint8, device=device)
        return self._room.data_ptr()
