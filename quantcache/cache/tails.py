"""Where a layer's recent tokens lie: memory with space behind them, so that a step copies the new tokens only."""

from __future__ import annotations

from ctypes import memmove

import torch
from torch import Tensor

from quantcache.coding.growth import TAIL_GROWTH, grown


class TailBuffer:
    """Memory that the tails of a layer are views of, ``[B, H, capacity, D]`` for each side.

    Nothing is written but behind all tokens that anybody was given, so a view stays what it was. Several layers may
    hold one buffer (a fork and its original): who appends first goes on in it, and the others get buffers of their own.

    Args:
        tails: Tokens to begin with, ``[B, H, t, D]``; copied.
        count: How many more are about to come.
    """

    __slots__ = ("_inference", "_newest", "_sides", "capacity")

    def __init__(self, tails: dict[str, Tensor], count: int) -> None:
        held = tails["key"].shape[2]
        self.capacity = grown(held, held + count, TAIL_GROWTH)
        self._inference = torch.is_inference_mode_enabled()
        self._sides = {side: _Side(tail, self.capacity) for side, tail in tails.items()}
        if held:
            for side, tail in tails.items():
                self._sides[side].write(0, tail)
        self._newest = [tails]

    def claim(self, tails: dict[str, Tensor], count: int) -> dict[str, Tensor] | None:
        """Take the space behind a layer's tokens for more of them, which the caller writes.

        Args:
            tails: The layer's tails, ``[B, H, t, D]``.
            count: How many more.

        Returns:
            The tails, ``[B, H, t + count, D]``; None where there is no space for them, or somebody else has taken it.
        """
        held = tails["key"].shape[2]
        if held + count > self.capacity or (self._inference and not torch.is_inference_mode_enabled()):
            return None  # torch refuses to write to tensors of its inference mode once that is over
        try:
            newest = self._newest.pop()  # one call into C: of several threads one gets it
        except IndexError:
            return None
        if newest["key"] is not tails["key"] or newest["value"] is not tails["value"]:
            self._newest.append(newest)
            return None
        longer = {side: own.read(held + count) for side, own in self._sides.items()}
        self._newest.append(longer)
        return longer

    def append(self, tails: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Write tokens behind those of a layer.

        Args:
            tails: The layer's tails, ``[B, H, t, D]``.
            new: The new ones, ``[B, H, n, D]``.

        Returns:
            As of :meth:`claim`.
        """
        longer = self.claim(tails, new["key"].shape[2])
        if longer is not None:
            held = tails["key"].shape[2]
            for side, tokens in new.items():
                self._sides[side].write(held, tokens)
        return longer

    def room(self) -> dict[str, Tensor]:
        """All of the memory by side, ``[B, H, capacity, D]``: what lies behind the tokens may be anything."""
        return {side: own.read(self.capacity) for side, own in self._sides.items()}


class _Side:
    """One side's memory, ``[capacity, B, H, D]``: a token of all rows and heads lies together.

    Args:
        tail: Tokens of its geometry, ``[B, H, any, D]``.
        capacity: For how many tokens.
    """

    __slots__ = ("_memory", "_place", "_shape", "_strides", "_writable")

    def __init__(self, tail: Tensor, capacity: int) -> None:
        batch, heads, _, dim = self._shape = tail.shape
        self._strides = heads * dim, dim, batch * heads * dim, 1
        self._memory = tail.new_empty((capacity, batch, heads, dim))
        # Written through an alias of which autograd counts no changes: it may have kept what is in front of them.
        self._writable = self._memory.data.permute(1, 2, 0, 3)
        self._place = _address(self._memory), batch * heads * dim * tail.itemsize

    def write(self, first: int, tokens: Tensor) -> None:
        """Put tokens, ``[B, H, n, D]``, behind the ``first`` ones."""
        start, size = self._place
        source = _address(tokens) if start and tokens.shape[2] == 1 else 0
        if source:  # several times faster than torch, for which so little is as much work as a lot
            memmove(start + first * size, source, size)
        else:
            self._writable.narrow(2, first, tokens.shape[2]).copy_(tokens)

    def read(self, count: int) -> Tensor:
        """The first tokens, ``[B, H, count, D]``."""
        batch, heads, _, dim = self._shape
        return self._memory.as_strided((batch, heads, count, dim), self._strides)


def _address(tensor: Tensor) -> int:
    """Where a tensor's values lie one behind the other in the CPU's memory; 0 if they do not."""
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_neg():
        return 0
    try:
        return tensor.data_ptr() if tensor.is_contiguous() else 0
    except RuntimeError:  # inside a transform such as torch.func.grad
        return 0


def appended(
    tails: dict[str, Tensor], new: dict[str, Tensor], buffer: TailBuffer | None
) -> tuple[dict[str, Tensor], TailBuffer]:
    """Tails with more tokens; those at hand stay as they are.

    Args:
        tails: The tails, ``[B, H, t, D]``.
        new: The new tokens, ``[B, H, n, D]``, without gradients.
        buffer: What the tails are views of, if they are.

    Returns:
        The new tails, and what they are views of.
    """
    longer = None if buffer is None else buffer.append(tails, new)
    if longer is None:
        buffer = TailBuffer(tails, new["key"].shape[2])
        longer = buffer.append(tails, new)
    assert buffer is not None
    assert longer is not None
    return longer, buffer
