"""Whether the last forward pass that updated a cache has returned.

A pass goes on after its last layer has taken its tokens: the rest of that layer, the final norm, the head. If it fails
there, every layer holds the new tokens, and nothing about the cache tells that nobody ever got logits for them.

A cache does not know its model, and a hook registered in the middle of a call is not called for it. But the call is on
the stack while it uses the cache. So :func:`watch` finds the outermost call of a model that was given the cache and
lays a mark among the arguments of torch's ``Module.__call__``. The mark goes when that call returns, while its caller
is still where it called. When the call fails, its frame is kept with the traceback, and the mark goes later, when the
caller is somewhere else. Nothing is left on the model, and nothing outlives the call but the answer.

A frame that has become part of a cycle, as when an error is kept in a variable, goes whenever the garbage collector
comes, and nothing can be seen of it by then. So it is looked at before.
"""

from __future__ import annotations

import dis
import gc
import inspect
import operator
import sys
import threading
import weakref
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from types import CodeType, FrameType
from typing import Any

import torch
from transformers import EncoderDecoderCache, GenerationMixin, PreTrainedModel

from quantcache.common import compat
from quantcache.common.errors import QuantCacheError, UnsupportedModel

_CALL: CodeType = torch.nn.Module._wrapped_call_impl.__code__
"""What ``Module.__call__`` runs. It hands its arguments on and does not look at them again."""


_GENERATE: CodeType = inspect.unwrap(GenerationMixin.generate).__code__


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
        call: Identity of the frame of the model's call.
        ended: Whether that frame is gone.
        returned: Whether the call has returned.
    """

    start: int
    call: int
    thread: int = field(default_factory=threading.get_ident)
    ended: bool = False
    returned: bool = False
    _mark: weakref.ref[_Mark] | None = None

    def outcome(self, search: bool = False) -> Outcome:
        """How far it is.

        Args:
            search: Whether to search all of memory for what a failed pass of another thread may have left behind;
                without, it counts as running for as long as somebody keeps its traceback.
        """
        if not self.ended:
            if self.thread == threading.get_ident():
                running = _is_on_stack(self.call)
            else:
                running = not (search and _is_left_behind(self._mark))
            if running:
                return Outcome.RUNNING
            self.look()
        return Outcome.RETURNED if self.returned else Outcome.FAILED

    def look(self) -> None:
        """Find out how the call ended by the frame that it has left behind, if it has left one."""
        frame = _frame_left_behind(self._mark)
        if frame is not None:
            self.returned, self.ended = _has_returned(frame), True


_watched: set[ForwardPass] = set()
"""Passes whose marks are still there."""


class _Mark:
    """Lies among the arguments of a call, and goes with them.

    Nobody may hold one while its call is running: it would not go when the call ends.

    Args:
        forward_pass: Told how the call ended.
        caller: The frame that called.
    """

    __slots__ = ("__weakref__", "caller", "forward_pass")

    def __init__(self, forward_pass: ForwardPass, caller: FrameType):
        self.forward_pass = forward_pass
        self.caller = (id(caller), caller.f_lasti)  # not the frame: it would be kept, and all its variables

    def __del__(self) -> None:
        _watched.discard(self.forward_pass)
        if self.forward_pass.ended:
            return  # its frame was looked at before it was collected
        now = sys._getframe().f_back  # there is none when the interpreter ends
        # What dies in a cycle, and nobody could look at, says nothing about the call.
        cyclic = sys.getrefcount(self) > _LAST_REFERENCES
        if cyclic or (now is not None and (id(now), now.f_lasti) == self.caller):
            self.forward_pass.returned = True
        self.forward_pass.ended = True


class _Probe:
    """Counts the references that an object has in its finalizer, if nothing else refers to it."""

    found = 0

    def __del__(self) -> None:
        _Probe.found = sys.getrefcount(self)


_Probe()
_LAST_REFERENCES = _Probe.found


def watch(cache: Any, start: int) -> ForwardPass | None:
    """Find the forward pass that is calling, and see to it that its end is noticed.

    Args:
        cache: The cache it uses.
        start: Tokens cached before it.

    Returns:
        The pass; None where no module was given the cache.

    Raises:
        UnsupportedModel: The module was given it to hold an encoder's output.
        QuantCacheError: ``generate`` gives it the whole text once more, or a part.
    """
    found: FrameType | None = None
    beyond: int | None = None
    of_model = generating = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            arguments = frame.f_locals
            if any(_gives(value, cache) for value in (*arguments["args"], *arguments["kwargs"].values())):
                is_model = isinstance(arguments["self"], PreTrainedModel)
                if is_model or not of_model:  # the outermost model; else, such as under torch.compile, any module
                    found, of_model = frame, is_model
        generating |= frame.f_code is _GENERATE
        beyond = compat.tokens_beyond_cache(frame) if beyond is None else beyond
        frame = frame.f_back
    if found is None or found.f_back is None:
        return None
    if generating:
        _require_new_tokens(found.f_locals["kwargs"], start, beyond)
    forward_pass = ForwardPass(start, id(found))
    mark = _Mark(forward_pass, found.f_back)
    forward_pass._mark = weakref.ref(mark)
    _watched.add(forward_pass)
    found.f_locals["kwargs"][f"quantcache pass {id(cache)}"] = mark
    return forward_pass


def _require_new_tokens(kwargs: dict[str, Any], start: int, beyond: int | None) -> None:
    """Refuse a prompt that ends where its cache does or before, and a step that begins with all that is cached.

    Args:
        kwargs: What the model is given.
        start: Tokens that are cached.
        beyond: As of :func:`quantcache.common.compat.tokens_beyond_cache`.
    """
    if start and beyond is not None and beyond <= 0:
        raise nothing_new(start, f"a prompt of {start + beyond}")
    ids = kwargs.get("input_ids")
    if start and kwargs.get("use_cache") is False and isinstance(ids, torch.Tensor) and ids.shape[1] == start + 1:
        raise QuantCacheError(
            "generate() has a cache and use_cache=False, from its arguments or the model's generation_config, and "
            "gives the cache the whole text again at every step: pass use_cache=True, or leave the cache out"
        )
    new = kwargs.get("inputs_embeds") if ids is None else ids
    count = new.shape[1] if isinstance(new, torch.Tensor) else 0
    if start and count > 1 and _lie_before(kwargs.get("attention_mask"), kwargs.get("position_ids"), start, count):
        raise nothing_new(start, f"{count} for places that are taken")


def nothing_to_read(start: int) -> QuantCacheError:
    """What to raise where a model is called with a cache and no tokens at all.

    Args:
        start: Tokens that are cached.

    Returns:
        The error.
    """
    frame: FrameType | None = sys._getframe(1)
    beyond: int | None = None
    while frame is not None and beyond is None:
        beyond, frame = compat.tokens_beyond_cache(frame), frame.f_back
    return nothing_new(start, "none to read" if beyond is None else f"a prompt of {start + beyond}")


def nothing_new(start: int, given: str) -> QuantCacheError:
    """What to raise where a cache is used with a text that does not go on from what it holds.

    Args:
        start: Tokens that are cached.
        given: What it is given instead, in words.

    Returns:
        The error.
    """
    return QuantCacheError(
        f"the cache holds {start} tokens already, and is given {given}: generate() goes on from a cache with the text "
        "that it holds and at least one token more. For another prompt take a new cache, or reset() this one. For "
        "the same prompt once more crop(-1) leaves a token to read. With prefill_chunk_size, assistant_model or "
        "prompt_lookup_num_tokens, versions of transformers give a cache all of the prompt again: leave those out, or "
        "take a new cache"
    )


def _lie_before(mask: Any, positions: Any, start: int, count: int) -> bool:
    """Whether several tokens are given to a cache, some of which stand before the end of what it holds.

    Args:
        mask: What the model is told of padding, ``[B, T]``; ``generate`` leaves it out where there is none.
        positions: Where the tokens stand, ``[B or 1, Tnew]`` in a text; images have other positions.
        start: Tokens that are cached.
        count: Tnew.
    """
    if isinstance(mask, torch.Tensor):
        return mask.ndim == 2 and mask.shape[1] < start + count
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != count:
        return False
    # From 0 on: the whole text once more, as assisted decoding begins, with new tokens at its end.
    return bool(((positions[:, -1] < start) | (positions[:, 0] == 0)).all())


def _gives(value: Any, cache: Any) -> bool:
    """Whether an argument is a cache, or an encoder-decoder's cache that has it for the decoder's own tokens."""
    if isinstance(value, EncoderDecoderCache):
        if value.cross_attention_cache is cache:
            kind = type(cache).__name__
            raise UnsupportedModel(
                f"a {kind} cannot be the cross-attention cache of an EncoderDecoderCache: make it "
                f"EncoderDecoderCache({kind}(...), DynamicCache())"
            )
        return value.self_attention_cache is cache
    return value is cache


_FULL = 2
"""The generation of a full collection."""


def _before_collection(phase: str, info: dict[str, int]) -> None:
    """Look at the frames that calls have left behind while they are still there.

    Args:
        phase: ``"start"`` or ``"stop"``.
        info: Which generation is collected. Other threads' calls are looked for in a full collection only, for it
            takes about as long as that; those of this thread are known to be over.
    """
    for each in tuple(_watched) if phase == "start" else ():
        if each.thread == threading.get_ident():
            over = not _is_on_stack(each.call)
        else:
            over = info["generation"] == _FULL and _is_left_behind(each._mark)
        if over:
            _watched.discard(each)
            each.look()


gc.callbacks.append(_before_collection)


def _is_on_stack(call: int) -> bool:
    """Whether a frame is one that this thread is in. (Those of other threads cannot be walked while they run.)"""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (id(frame) != call or frame.f_code is not _CALL):
        frame = frame.f_back
    return frame is not None


def _is_left_behind(mark: weakref.ref[_Mark] | None) -> bool:
    """Whether the frame of a call has ended and is kept: one that runs is not seen by the garbage collector.

    All of it is one call into C, so that the mark is held by nobody when another thread goes on.
    """
    marks = filter(None, map(operator.call, [mark] if mark is not None else []))
    arguments = chain.from_iterable(map(gc.get_referrers, marks))
    return FrameType in map(type, chain.from_iterable(map(gc.get_referrers, arguments)))


def _frame_left_behind(mark: weakref.ref[_Mark] | None) -> FrameType | None:
    """That frame."""
    found = None if mark is None else mark()
    for arguments in [] if found is None else gc.get_referrers(found):
        if isinstance(arguments, dict):
            for frame in gc.get_referrers(arguments):
                if isinstance(frame, FrameType) and frame.f_code is _CALL:
                    return frame
    return None


def _has_returned(frame: FrameType) -> bool:
    """Whether a frame stopped at a return: a frame that an exception has left stopped where that came from."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")
