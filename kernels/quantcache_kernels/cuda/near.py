"""The tokens that are not encoded: attention on them as one more split of a call, and how new ones join the tail.

Shapes: B batch, H key/value heads, S sinks, t tokens behind the last block, D and Dv dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache_kernels.cuda.structures import AppendArguments, NearArguments, Places, Queries, pointer

NEAR_THREADS, NEAR_TOKENS, MAX_ROWS = 256, 64, 8
"""As in near.h."""

MAX_SPLITS = 16
"""Into how many parts a tail is cut at most; a longer one takes more than one round."""

VECTOR_BYTES = 16
"""What the kernels read at once."""


@dataclass(frozen=True)
class NearTokens:
    """Sinks and tail of a call.

    Attributes:
        key_sinks: ``[B, H, S, D]`` bfloat16.
        value_sinks: ``[B, H, S, Dv]``.
        key_tail: ``[B, H, t, D]``; the last tokens are the queries' own.
        value_tail: ``[B, H, t, Dv]``.
        tail_tokens: How many tokens the tail has, ``[1]`` int32 on the device: it may then hold room for more. None for
            all of them.
    """

    key_sinks: Tensor
    value_sinks: Tensor
    key_tail: Tensor
    value_tail: Tensor
    tail_tokens: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sinks of keys and values, then their tails."""
        return self.key_sinks, self.value_sinks, self.key_tail, self.value_tail

    def readable(self) -> NearTokens:
        """The same as the kernels can read it."""
        if all(map(_is_readable, self.parts)):
            return self
        keys, values, key_tail, value_tail = map(readable, self.parts)
        return NearTokens(keys, values, key_tail, value_tail, self.tail_tokens)

    @property
    def splits(self) -> int:
        """Parts that one call is cut into; follows from the room in the tail, not from what it holds."""
        return min(MAX_SPLITS, -(-(self.key_sinks.shape[2] + self.key_tail.shape[2]) // NEAR_TOKENS))

    def shared_bytes(self, rows: int) -> int:
        """Shared memory of a block of threads with so many rows of queries."""
        dim, value_dim = self.key_tail.shape[3], self.value_tail.shape[3]
        groups = NEAR_THREADS // (value_dim // 4)
        return 4 * (rows * (dim + groups * value_dim) + MAX_ROWS * (NEAR_TOKENS + 3))

    def arguments(self, queries: Queries, places: Places, addresses: tuple[int | None, ...]) -> NearArguments:
        """Arguments of attention on these tokens.

        Args:
            queries: The queries.
            places: Where the tokens lie, and the blocks end.
            addresses: Addresses, from ``there`` to ``lse``.

        Returns:
            The arguments; what they say of the call is left to the caller.
        """
        found = NearArguments(queries, places, *addresses)
        found.sinks, found.tail = self.key_sinks.shape[2], self.key_tail.shape[2]
        found.dim, found.value_dim, found.splits = self.key_tail.shape[3], self.value_tail.shape[3], self.splits
        return found


def append_arguments(key: Tensor, value: Tensor, near: NearTokens, there: int) -> AppendArguments:
    """Arguments of the kernel that puts new tokens into a tail, behind those that it had.

    Args:
        key: ``[B, H, Tnew, D]`` bfloat16, readable.
        value: ``[B, H, Tnew, Dv]``.
        near: The tail's room, and how many tokens it has, the new ones included.
        there: Where in memory it is said where the tail lies.

    Returns:
        The arguments.
    """
    batch, heads, count, dim = key.shape
    found = AppendArguments(key.data_ptr(), value.data_ptr(), there, pointer(near.tail_tokens))
    for i, tensor in enumerate((key, value)):
        found.strides[i][:] = tensor.stride()[:3]
    found.heads, found.count, found.vectors = heads, count, batch * heads * count
    found.dim, found.value_dim, found.tail = dim, value.shape[3], near.key_tail.shape[2]
    return found


def readable(tensor: Tensor) -> Tensor:
    """A tensor as the kernels can read it: itself, or a copy."""
    return tensor if _is_readable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _is_readable(tensor: Tensor) -> bool:
    """Whether every vector lies together, and where 16 bytes can be read at once."""
    each = VECTOR_BYTES // tensor.itemsize
    *outer, last = tensor.stride()
    return last == 1 and not tensor.data_ptr() % VECTOR_BYTES and not any(stride % each for stride in outer)
