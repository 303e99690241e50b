"""Whether it is certain which tokens a cache holds, and whether another thread is using it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from quantcache.cache.passes import Outcome

if TYPE_CHECKING:
    from quantcache.cache.consistency import ConsistentCache


def follows_text(cache: ConsistentCache, index: int, layer: Any) -> bool:
    """Whether a layer gets keys and values of every token of the text."""
    return isinstance(layer, DynamicLayer) and index not in cache.foreign


def first_layer(cache: ConsistentCache) -> int:
    """The layer that every forward pass comes to first, of those that count their tokens; behind all if none does."""
    followers = (i for i, each in enumerate(cache.layers) if follows_text(cache, i, each))
    return next(followers, len(cache.layers))


def lengths(cache: ConsistentCache, layers: list[Any]) -> set[int]:
    """How many tokens layers hold that get those of the text."""
    followers: list[Any] = [each for i, each in enumerate(layers) if follows_text(cache, i, each)]
    return {int(each.get_seq_length()) for each in followers if each.is_initialized}


def unsettled(cache: ConsistentCache, layers: list[Any]) -> str | None:
    """Why it is uncertain which tokens the cache holds.

    Args:
        cache: The cache.
        layers: Its layers at one moment.

    Returns:
        A clause; None if it is certain.
    """
    found = lengths(cache, layers)
    if len(found) > 1:
        cause = "because a forward pass was interrupted or another thread is in one"
        return f"some layers hold {min(found)} tokens and others {max(found)}, {cause}"
    if cache.forward_pass is not None and cache.forward_pass.outcome() is Outcome.FAILED:
        start, held = cache.forward_pass.start, max(found, default=0)
        if held != start:
            return f"it held {start} tokens and holds {held}, because a forward pass was interrupted"
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers[: first_layer(cache) + 1]):
            return f"a forward pass was interrupted after {start} tokens, and some layers do not count theirs"
    return None


def busy(cache: ConsistentCache, search: bool = False) -> str | None:
    """What another thread is doing with the cache.

    Args:
        cache: The cache.
        search: As :meth:`quantcache.cache.passes.ForwardPass.outcome` takes it.

    Returns:
        A clause; None if it does nothing.
    """
    me, forward_pass = threading.get_ident(), cache.forward_pass
    if forward_pass is not None and forward_pass.thread != me and forward_pass.outcome(search) is Outcome.RUNNING:
        return "another thread is in a forward pass with the cache"
    if vars(cache).get("updating", me) != me:
        return "another thread is changing the cache"
    return None


def unusable(reason: str) -> str:
    """The error of a cache that must be put in order first."""
    return f"the cache is in an inconsistent state: {reason}; call rollback() or reset()"
