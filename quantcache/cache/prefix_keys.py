"""What a stored prefix is known by: its tokens, and all that gives its codes their meaning."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.cache.fingerprints import calibration_digest, model_digest, model_settings
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.mixed_layers import SpectralRecurrentLayer
from quantcache.cache.rows import held_rows
from quantcache.coding.growth import num_blocks
from quantcache.coding.packing import BLOCK
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError, UnsupportedModel

if TYPE_CHECKING:
    from quantcache.cache.spectral_cache import SpectralCache

_digests: WeakKeyDictionary[Calibration, str] = WeakKeyDictionary()
"""Digests of calibrations, whose constants are large and do not change."""

_first_seen: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
"""How many changes of a model's weights torch had counted when it was first asked for."""


_PROCESS = uuid.uuid4().hex
"""Tells processes apart, whose numbers of hooks have nothing to do with each other."""


def row_of(tokens: Sequence[int] | Tensor) -> np.ndarray:
    """The token ids of one text, also where they come as a tokenizer gives them, as a batch of one row.

    Args:
        tokens: T of them, or a tensor or list ``[1, T]``.

    Returns:
        The ids, ``[T]``.

    Raises:
        ValueError: There are several rows, or numbers that are not whole.
    """
    numbers = np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise ValueError(f"token ids must be whole numbers, got {numbers.dtype}")
    if numbers.ndim == 2 and len(numbers) == 1:
        numbers = numbers[0]
    if numbers.ndim != 1:
        raise ValueError(f"a prefix is one row of token ids, [T] or [1, T], got shape {list(numbers.shape)}")
    return numbers


def key_of(tokens: Sequence[int] | np.ndarray) -> bytes:
    """A token sequence as bytes that sort as the tokens do, so that the longest common prefixes are neighbours.

    Args:
        tokens: Token ids, T of them.

    Returns:
        4 T bytes.

    Raises:
        ValueError: A number is not a token id.
    """
    numbers = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < 1 << 32:
        raise ValueError(f"token ids must lie between 0 and {(1 << 32) - 1}, got {numbers.min()} to {numbers.max()}")
    return numbers.astype(">u4").tobytes()


def tokens_in(key: bytes) -> int:
    """How many tokens a key stands for."""
    return len(key) // 4


def shared_tokens(first: bytes, second: bytes) -> int:
    """Length of the longest common prefix of two keys, in tokens."""
    count = min(len(first), len(second)) // 4
    differ = np.frombuffer(first, np.uint32, count) != np.frombuffer(second, np.uint32, count)
    return int(differ.argmax()) if differ.any() else count


def prefix_digest(cache: SpectralCache, model: PreTrainedModel) -> str:
    """Digest of what must be the same for codes to mean the same: a prefix is served under no other.

    Weights are looked at anew every time, since a model may have been trained, or another adapter chosen, in between:
    a sample of their values, and how often torch has seen them change since the first look. So are hooks, by which
    steering vectors are added and activations are edited: each counts as another model for as long as it is there.

    Args:
        cache: A cache as requests get it; what it holds does not count.
        model: The model that fills it.

    Returns:
        SHA-256 in hex.

    Raises:
        QuantCacheError: The cache fits itself to its prompt, or the model's weights are not in memory.
        UnsupportedModel: The model puts tokens of its own before every prompt.
    """
    if compat.adds_tokens(model):
        raise UnsupportedModel(
            f"{type(model).__name__} puts tokens of its own before every prompt (PEFT's prompt tuning), which no "
            "prefix names: leave prefixes out"
        )
    if cache.calibration is None:
        raise QuantCacheError(
            "a self-calibrating cache has codes of its own for every prompt: prefixes need a calibration"
        )
    model = compat.unwrapped(model)
    if cache.calibration not in _digests:
        _digests[cache.calibration] = calibration_digest(cache.calibration)
    kind = model.device.type
    adapters = [
        [name, *(str(getattr(module, each, None)) for each in ("active_adapters", "disable_adapters", "scaling"))]
        for name, module in model.named_modules()
        if hasattr(module, "disable_adapters") and module is not model
    ]
    said = {
        "calibration": _digests[cache.calibration],
        "model": model_digest(model),
        "settings": model_settings(model),
        "changes": _changes(model),
        "adapters": adapters,
        "dtype": str(model.dtype),
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        "lengths": [[layer.sink_length, layer.residual_length] for layer in cache.spectral_layers],
    }
    if any(module.training for module in model.modules()):
        said["training"] = True  # dropout is in what it caches
    if hooks := _hooks(model):
        said["hooks"] = [_PROCESS, os.getpid(), hooks]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _hooks(model: PreTrainedModel) -> list[list[Any]]:
    """The hooks that stand around a model's modules and may steer it, by numbers that torch gives no second hook."""
    found = []
    for name, module in model.named_modules():
        hooks = {**module._forward_pre_hooks, **module._forward_hooks}
        own = [n for n, hook in hooks.items() if not str(getattr(hook, "__module__", "")).startswith(_OBSERVERS)]
        found += [[name, *own]] if own else []
    return found


_OBSERVERS = ("transformers.", "accelerate.")
"""Modules whose hooks are there whatever a request is about: they collect outputs, and fetch weights."""


def _changes(model: PreTrainedModel) -> int:
    """How many changes of its weights torch has counted since the first call for a model."""
    count = sum(each._version for each in model.parameters() if not each.is_inference())
    return count - _first_seen.setdefault(model, count)


def fits_rotation(tokens: int, model: PreTrainedModel) -> bool:
    """Whether a text is short enough that its beginning is cached as in any other: some RoPE changes with the length.

    Args:
        tokens: T.
        model: The model that reads it.

    Returns:
        False where a longer text's first keys are rotated otherwise than a shorter one's.
    """
    limit = cache_layout.length_of_constant_rotation(model.config)
    return limit is None or tokens <= limit


def can_be_cut(cache: SpectralCache) -> bool:
    """Whether a cache can be taken back to fewer tokens: windows and recurrent states cannot."""
    return all(
        compat.is_placeholder(layer)
        or (isinstance(layer, SpectralLayer) and not isinstance(layer, SpectralRecurrentLayer))
        for layer in cache.layers
    )


def kept_tokens(cache: SpectralCache, held: int, shared: int) -> int:
    """How many tokens of a stored prefix a prompt can begin with.

    All of it where the prompt has all of it. Else it is cut back to what reading the shared tokens from the start
    leaves: the same blocks, never part of one, and behind them recent tokens that are exact. Up to ``residual_length``
    + 63 tokens are then read again.

    Args:
        cache: A cache with the prefix's layers and lengths; what it holds does not count.
        held: Tokens of the stored prefix.
        shared: How many of them the prompt begins with.

    Returns:
        Tokens to keep; 0 if it is of no use.
    """
    if shared == held:
        return held
    if not can_be_cut(cache):
        return 0
    sinks, residual = cache.spectral_layers[0].sink_length, cache.spectral_layers[0].residual_length
    blocks = num_blocks(shared, sinks, residual)
    if blocks == num_blocks(held, sinks, residual):
        return shared
    return sinks + BLOCK * blocks if blocks else 0


def is_plain(cache: SpectralCache) -> bool:
    """Whether a cache is what its tokens alone leave: one row, no padding, and blocks that no crop has shortened.

    Args:
        cache: A cache between two forward passes.

    Returns:
        True if so.
    """
    layers = cache.spectral_layers
    return bool(layers) and all(
        held_rows(layer) == 1
        and layer.state.blocks.grid.frames is None
        and layer.state.trail is None
        and not layer.state.pending
        and not layer.state.blocks.cut
        and len(layer.spans) == num_blocks(layer.get_seq_length(), layer.sink_length, layer.residual_length)
        for layer in layers
    )


class KnownPrefixes(dict[str, list[bytes]]):
    """The keys of stored prefixes by identity, in their order: those that begin alike are neighbours."""

    def add(self, name: str, key: bytes) -> None:
        """Take in a key, once."""
        keys = self.setdefault(name, [])
        place = bisect.bisect_left(keys, key)
        if place == len(keys) or keys[place] != key:
            keys.insert(place, key)

    def remove(self, name: str, key: bytes) -> None:
        """Forget a key, if it is known."""
        keys = self.get(name, [])
        place = bisect.bisect_left(keys, key)
        if place < len(keys) and keys[place] == key:
            del keys[place]
            if not keys:
                del self[name]

    def longer(self, name: str, key: bytes) -> bytes | None:
        """A known key that begins with this one, or is it; None if there is none."""
        keys = self.get(name, [])
        place = bisect.bisect_left(keys, key)
        return keys[place] if place < len(keys) and keys[place].startswith(key) else None

    def shorter(self, name: str, key: bytes) -> list[bytes]:
        """Known keys that this one begins with."""
        keys, found = self.get(name, []), []
        for index in range(bisect.bisect_left(keys, key) - 1, -1, -1):
            if not keys[index] or key[:4] != keys[index][:4]:
                break
            if key.startswith(keys[index]):
                found.append(keys[index])
        return found

    def best(self, name: str, key: bytes, empty: SpectralCache) -> tuple[bytes | None, int]:
        """The prefix that spares a prompt most tokens.

        Args:
            name: Identity under which the prompt is read.
            key: Its tokens.
            empty: A cache with the layers and lengths of the prefixes'.

        Returns:
            The prefix's key, and how many of its tokens are kept; None and 0 if none is of use.
        """
        keys, best, most = self.get(name, []), None, 0
        place, prompt = bisect.bisect_right(keys, key), key[:-4]  # the last token is read in any case
        for walk in (range(place - 1, -1, -1), range(place, len(keys))):
            for index in walk:
                shared = shared_tokens(keys[index], prompt)
                if shared <= most:
                    break  # those further away share no more
                keep = kept_tokens(empty, tokens_in(keys[index]), shared)
                # A few tokens that all prompts begin with are not worth a look into the store.
                if keep > most and (keep >= BLOCK or keep == tokens_in(keys[index])):
                    best, most = keys[index], keep
        return best, most
