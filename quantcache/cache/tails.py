"""Where a layer's recent tokens lie: memory with space behind them, so that a step copies the new tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache.accounting.memory import TAIL_GROWTH, grown


class TailBuffer:
    """Memory that the tails of a layer are views of, ``[B, H, capacity, D]`` for each side.

    Nothing is written but behind all tokens that anybody was given, so a view stays what it was. Several layers may
    hold one buffer (a fork and its original): who appends first goes on in it, and the others get buffers of their own.

    Args:
        tails: Tokens to begin with, ``[B, H, t, D]``; copied.
        count: How many more are about to come.
    """

    __slots__ = ("_inference", "_memory", "_newest", "_writable", "capacity")

    def __init__(self, tails: dict[str, Tensor], count: int) -> None:
        held = tails["key"].shape[2]
        self.capacity = grown(held, held + count, TAIL_GROWTH)
        self._memory = {
            side: tail.new_empty((*tail.shape[:2], self.capacity, tail.shape[3])) for side, tail in tails.items()
        }
        self._inference = torch.is_inference_mode_enabled()
        # Written through aliases of which autograd counts no changes: it may have kept what is in front of them.
        self._writable = {side: memory.data for side, memory in self._memory.items()}
        if held:
            for side, tail in tails.items():
                self._writable[side].narrow(2, 0, held).copy_(tail)
        self._newest = [tails]

    def append(self, tails: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Write tokens behind those of a layer.

        Args:
            tails: The layer's tails, ``[B, H, t, D]``.
            new: The new ones, ``[B, H, n, D]``.

        Returns:
            The tails, ``[B, H, t + n, D]``; None where there is no space for them, or somebody else has taken it.
        """
        held, count = tails["key"].shape[2], new["key"].shape[2]
        if held + count > self.capacity or (self._inference and not torch.is_inference_mode_enabled()):
            return None  # torch refuses to write to tensors of its inference mode once that is over
        try:
            newest = self._newest.pop()  # one call into C: of several threads one gets it
        except IndexError:
            return None
        if newest["key"] is not tails["key"] or newest["value"] is not tails["value"]:
            self._newest.append(newest)
            return None
        for side, tokens in new.items():
            self._writable[side].narrow(2, held, count).copy_(tokens)
        longer = {side: memory.narrow(2, 0, held + count) for side, memory in self._memory.items()}
        self._newest.append(longer)
        return longer


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
