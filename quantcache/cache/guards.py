"""What a layer refuses to take or to encode, and numbers that it asks a device for without waiting.

Each check passes quietly or raises one error that says where and what.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from quantcache.common.errors import QuantCacheError, TokensNotFinite
from quantcache.common.logs import log_once

logger = logging.getLogger(__name__)


class AsyncReadback:
    """Numbers copied from a device to the CPU, which waits for them only when it reads them.

    Args:
        numbers: The numbers, ``[n]``.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._event = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    @staticmethod
    def is_asynchronous(device: torch.device) -> bool:
        """Whether a device works on while the CPU goes on."""
        return device.type == "cuda"

    def tolist(self) -> list[Any]:
        """The numbers; waits where they are still under way."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


class FiniteCheck:
    """Whether tokens are finite: computed on their device at once, read when the CPU needs to know.

    Args:
        tokens: Keys, values or both.
    """

    def __init__(self, tokens: dict[str, Tensor]) -> None:
        self._flags: AsyncReadback | None = None
        if tokens:
            with torch.no_grad():
                self._flags = AsyncReadback(torch.stack([torch.isfinite(tensor).all() for tensor in tokens.values()]))

    def finite(self) -> bool:
        """Whether all tokens are finite; waits for the answer where it is still under way."""
        return self._flags is None or all(self._flags.tolist())


def require_continuation(index: int | None, cached: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Refuse tokens that do not continue what is cached.

    Args:
        index: The layer.
        cached: Some cached keys and values, ``[B, H, t, D]``.
        new: The new ones, ``[B, H, Tnew, D]``.

    Raises:
        QuantCacheError: Batch size, number of heads, dimension or dtype differ.
    """
    for side, tokens in new.items():
        held = cached[side]
        rows, heads, _, dim = tokens.shape
        batch, own, _, size = held.shape
        if rows == batch and heads == own and dim == size and tokens.dtype == held.dtype:
            continue
        found, expected = (rows, heads, dim, tokens.dtype), (batch, own, size, held.dtype)
        names = ("batch size", "number of heads", "dimension", "dtype")
        name, ours, theirs = next(each for each in zip(names, expected, found, strict=True) if each[1] != each[2])
        hint = "repeat or select the cache's rows, or reset() it" if name == "batch size" else "reset() the cache"
        raise QuantCacheError(
            f"layer {index}: the cache holds {side}s of {name} {ours}, the new ones have {theirs}: {hint}"
        )


def require_finite(index: int | None, side: str, tokens: Tensor, start: int, left_padding: Tensor | None) -> None:
    """Refuse to encode NaN and infinities, which codes cannot express; padding may hold anything.

    Args:
        index: The layer.
        side: ``"key"`` or ``"value"``.
        tokens: What is to be encoded, ``[B, H, T, D]``.
        start: Slot of its first token.
        left_padding: Left padding of every row, ``[B]``, or None.

    Raises:
        TokensNotFinite: A token is not finite.
    """
    if bool(torch.isfinite(tokens).all()):
        return
    bad = ~torch.isfinite(tokens).all(-1)  # [B, H, T]
    if left_padding is not None:
        slots = torch.arange(start, start + tokens.shape[2], dtype=torch.int64, device=tokens.device)
        bad &= (slots >= left_padding[:, None])[:, None]
    found = bad.nonzero()
    if len(found):
        row, head, slot = found[found[:, 2].argmin()].tolist()
        raise TokensNotFinite(
            f"layer {index}: the model gave {side}s that are not finite, first for token {start + slot} of row {row} "
            f"(head {head}, {tokens.dtype}), and these cannot be encoded: select the other rows, crop() or reset() the "
            f"cache"
        )


def warn_of_saturation(index: int | None, gains: dict[str, AsyncReadback]) -> None:
    """Say so, once for each side of a layer, where gains do not fit their range.

    Args:
        index: The layer.
        gains: By side, how many gains have the largest code, how many are zero, and how many there are.
    """
    advice = "the calibration does not fit this model or text; SpectralCache.memory() counts such tokens"
    for side, counts in gains.items():
        above, below, count = counts.tolist()
        if above:
            found = f"some {side}s are at least 16 times larger than in calibration and lose magnitude"
            log_once(logger, logging.WARNING, f"layer {index}: {found}: {advice}")
        if below and below == count:
            log_once(
                logger,
                logging.WARNING,
                f"layer {index}: {side}s are at least 16 times smaller than in calibration and become 0: {advice}",
            )
