"""What a layer refuses at run time: each check passes quietly or raises one error that says where and what."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache.errors import QuantCacheError


class Look:
    """Whether tokens are finite: asked on their device at once, answered when the CPU needs to know.

    Args:
        tokens: Keys, values or both.
    """

    def __init__(self, tokens: dict[str, Tensor]) -> None:
        self._flags: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if not tokens:
            return
        with torch.no_grad():
            flags = torch.stack([torch.isfinite(tensor).all() for tensor in tokens.values()])
            if flags.device.type == "cuda":
                self._flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
                self._flags.copy_(flags, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record(torch.cuda.current_stream(flags.device))
            else:
                self._flags = flags

    @staticmethod
    def pays(device: torch.device) -> bool:
        """Whether asking early spares a wait."""
        return device.type == "cuda"

    def finite(self) -> bool:
        """Whether all tokens are finite; waits for the answer where it is still under way."""
        if self._event is not None:
            self._event.synchronize()
        return self._flags is None or all(self._flags.tolist())


def require_continuation(index: int | None, side: str, cached: Tensor, new: Tensor) -> None:
    """Refuse tokens that do not continue what is cached.

    Args:
        index: The layer.
        side: ``"key"`` or ``"value"``.
        cached: Some cached tokens, ``[B, H, t, D]``.
        new: The new ones, ``[B, H, Tnew, D]``.

    Raises:
        QuantCacheError: Batch size, number of heads, dimension or dtype differ.
    """
    found = (new.shape[0], new.shape[1], new.shape[3], new.dtype)
    expected = (cached.shape[0], cached.shape[1], cached.shape[3], cached.dtype)
    if found == expected:
        return
    names = ("batch size", "number of heads", "dimension", "dtype")
    name, ours, theirs = next(each for each in zip(names, expected, found, strict=True) if each[1] != each[2])
    hint = "repeat or select the cache's rows, or reset() it" if name == "batch size" else "reset() the cache"
    raise QuantCacheError(
        f"layer {index}: the cache holds {side}s of {name} {ours}, the new ones have {theirs}: {hint}"
    )


def require_finite(index: int | None, side: str, tokens: Tensor, start: int, starts: Tensor | None) -> None:
    """Refuse to encode NaN and infinities, which codes cannot express; padding may hold anything.

    Args:
        index: The layer.
        side: ``"key"`` or ``"value"``.
        tokens: What is to be encoded, ``[B, H, T, D]``.
        start: Slot of its first token.
        starts: Left padding of every row, ``[B]``, or None.

    Raises:
        QuantCacheError: A token is not finite.
    """
    if bool(torch.isfinite(tokens).all()):
        return
    bad = ~torch.isfinite(tokens).all(-1)  # [B, H, T]
    if starts is not None:
        slots = torch.arange(start, start + tokens.shape[2], device=tokens.device)
        bad &= (slots >= starts[:, None])[:, None]
    found = bad.nonzero()
    if len(found):
        row, head, slot = found[found[:, 2].argmin()].tolist()
        raise QuantCacheError(
            f"layer {index}: the model gave {side}s that are not finite, first for token {start + slot} of row {row} "
            f"(head {head}, {tokens.dtype}), and these cannot be encoded: reset() the cache"
        )
