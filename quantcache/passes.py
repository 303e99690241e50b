"""Whether the forward pass that last brought a cache its tokens has returned.

A pass goes on after its last layer has taken its tokens: the rest of that layer, the final norm, the head. If it fails
there, every layer holds the new tokens, and nothing about the cache tells that nobody ever got logits for them.

A cache does not know its model, and a hook registered in the middle of a call is not called for it. But the call is on
the stack while it uses the cache. So :func:`watch` finds the outermost call of a model that was given the cache and
lays a mark among the arguments of torch's ``Module.__call__``. The mark goes when that call ends, and holds the frame
of the call within; where that frame stopped says how it ended. Nothing is left on the model, and nothing outlives
the call but the answer.
"""

from __future__ import annotations

import dis
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import CodeType, FrameType
from typing import Any

import torch
from transformers import PreTrainedModel

_CALL: CodeType = torch.nn.Module._wrapped_call_impl.__code__
"""What ``Module.__call__`` runs. It hands its arguments on and does not look at them again."""


class Outcome(Enum):
    """How far a forward pass is."""

    RUNNING = "running"
    RETURNED = "returned"
    FAILED = "failed"


@dataclass(eq=False)
class ForwardPass:
    """One forward pass over a cache.

    Attributes:
        start: Tokens that were cached before it.
        thread: The thread it runs in.
    """

    start: int
    thread: int = field(default_factory=threading.get_ident)
    _mark: weakref.ref[_Mark] | None = None
    _returned: bool = False

    @property
    def outcome(self) -> Outcome:
        """How far it is."""
        mark = None if self._mark is None else self._mark()
        if self._returned or (mark is not None and _has_returned(mark.frame)):
            return Outcome.RETURNED
        if mark is not None and any(frame is mark.frame for frame in stack(self.thread)):
            return Outcome.RUNNING
        return Outcome.FAILED


class _Mark:
    """Lies among the arguments of a call, and goes with them."""

    __slots__ = ("__weakref__", "forward_pass", "frame")

    def __init__(self, forward_pass: ForwardPass, frame: FrameType):
        self.forward_pass, self.frame = forward_pass, frame

    def __del__(self) -> None:
        if _has_returned(self.frame):
            self.forward_pass._returned = True


def watch(cache: Any, start: int) -> ForwardPass | None:
    """Find the forward pass that is calling, and see to it that its end is noticed.

    Args:
        cache: The cache it uses.
        start: Tokens cached before it.

    Returns:
        The pass; None where no module was given the cache.
    """
    found: dict[str, Any] | None = None
    within, of_model = sys._getframe(0), False
    frame = within.f_back
    while frame is not None:
        if frame.f_code is _CALL:
            arguments = frame.f_locals
            if any(value is cache for value in (*arguments["args"], *arguments["kwargs"].values())):
                is_model = isinstance(arguments["self"], PreTrainedModel)
                if is_model or not of_model:  # the outermost model; else, such as under torch.compile, any module
                    found, callee, of_model = arguments["kwargs"], within, is_model
        within, frame = frame, frame.f_back
    if found is None:
        return None
    forward_pass = ForwardPass(start)
    mark = _Mark(forward_pass, callee)
    forward_pass._mark = weakref.ref(mark)
    found[f"quantcache pass {id(cache)}"] = mark
    return forward_pass


def stack(thread: int) -> Iterator[FrameType]:
    """What a thread is in the middle of.

    Args:
        thread: Its identifier.

    Yields:
        Frames, the innermost first; none if there is no such thread.
    """
    frame = sys._getframe(1) if thread == threading.get_ident() else sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _has_returned(frame: FrameType) -> bool:
    """Whether a frame stopped at a return: a frame that an exception has left stopped where that came from."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")
