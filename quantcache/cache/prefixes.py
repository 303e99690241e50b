"""Compressed caches of earlier prompts, so that a prompt which begins like one of them is not read again."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from quantcache.accounting.measuring import measure
from quantcache.cache.prefix_folder import PrefixFolder
from quantcache.cache.prefix_keys import (
    KnownPrefixes,
    can_be_cut,
    fits_rotation,
    is_plain,
    key_of,
    prefix_digest,
    row_of,
    tokens_in,
)
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import processes
from quantcache.common.errors import ArtifactError, QuantCacheError

logger = logging.getLogger(__name__)

FOLDER_FACTOR = 8
"""Bytes of the folder by default, in terms of those in memory."""

FAILURES = (QuantCacheError, OSError, RuntimeError, MemoryError)
"""What may go wrong with a stored prefix: the prompt is then read from its start."""


_Place = tuple[str, bytes]
"""Identity and tokens of a prefix."""

_Held = tuple[SpectralCache, int]
"""A prefix's cache, and its bytes."""


@dataclass(frozen=True)
class PrefixStatistics:
    """What a store holds and has done.

    Attributes:
        requests: Prompts that were looked for.
        hits: Those that began like a stored prefix.
        prompt_tokens: Tokens of all these prompts.
        reused_tokens: Those that did not have to be read.
        caches: Prefixes in memory.
        bytes: What they take, shared blocks counted in each.
        files: Prefixes in the folder.
        file_bytes: What those take.
        evicted: Prefixes that had to leave memory.
        failures: Prefixes that could not be kept, written or read.
    """

    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    caches: int = 0
    bytes: int = 0
    files: int = 0
    file_bytes: int = 0
    evicted: int = 0
    failures: int = 0

    def to_dict(self) -> dict[str, int]:
        """All fields, ready for JSON."""
        return asdict(self)


class PrefixStore:
    """Caches of earlier prompts by their tokens, within a number of bytes.

    A prompt gets a fork of the cache that shares most tokens with it, and reads only the rest. What was used longest
    ago leaves memory first, for the folder if there is one. A prefix is served only under the model, calibration, bits,
    lengths and dtype it was made with. Whatever goes wrong (a damaged file, a full disk) costs time, not correctness.
    Any number of threads and models may use one store, and any number of processes one folder.

    Args:
        max_bytes: Most bytes of the caches in memory, as ``cache.memory().total`` counts them, and of their tokens.
        folder: Where caches go that leave memory; they are found again after a restart. Without one they are dropped.
        folder_bytes: Most bytes of the folder's files; by default eight times ``max_bytes``.

    Raises:
        TypeError: A number of bytes is not a number.
        ValueError: A number of bytes is negative, or none is left for the folder.
        OSError: The folder cannot be made.
    """

    def __init__(self, max_bytes: int, folder: str | Path | None = None, folder_bytes: int | None = None):
        for name, value in (("max_bytes", max_bytes), ("folder_bytes", folder_bytes or 0)):
            if not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number of bytes, such as 2 << 30, got {value!r}")
            if not value >= 0:  # not a number would never be too little
                raise ValueError(f"{name} must not be negative, got {value}")
        if folder is not None and folder_bytes is None and not max_bytes:
            raise ValueError(f"folder_bytes must be given where max_bytes is 0: {folder} could hold nothing")
        most = FOLDER_FACTOR * max_bytes if folder_bytes is None else folder_bytes
        self.max_bytes = max_bytes
        self.folder = None if folder is None else PrefixFolder(Path(folder), most)
        self._lock = processes.lock()
        self._known = KnownPrefixes()  # in memory or not
        self._held: OrderedDict[_Place, _Held] = OrderedDict()  # last used last
        self._leaving: dict[_Place, SpectralCache] = {}  # on their way to the folder
        self._generation = 0  # how often all was forgotten: what began before must not come back
        self._counts = dict.fromkeys(("requests", "hits", "prompt_tokens", "reused_tokens", "evicted", "failures"), 0)
        for name, key in self.folder.scan() if self.folder else ():
            self._known.add(name, key)

    def __repr__(self) -> str:
        return f"PrefixStore({len(self._held)} caches, {self._bytes():,} of {self.max_bytes:,} bytes)"

    # ------------------------------------------------------------------ use

    def fork(
        self, tokens: Sequence[int] | Tensor, empty: SpectralCache, model: PreTrainedModel
    ) -> SpectralCache | None:
        """A cache that holds the beginning of a prompt already; at least the last token is left to be read.

        Args:
            tokens: The prompt's token ids, or a tensor of them, ``[T]`` or ``[1, T]``.
            empty: A cache as the prompt would get it otherwise.
            model: The model that is to read it.

        Returns:
            The cache, which is the caller's own; None if no stored prefix is of use.

        Raises:
            QuantCacheError: The cache has no calibration, or the model's weights are not in memory.
            UnsupportedModel: The model puts tokens of its own before every prompt.
            ValueError: The tokens are of several rows, or no token ids.
        """
        ids = row_of(tokens)
        name, key = prefix_digest(empty, model), key_of(ids)
        with self._lock:
            self._counts["requests"] += 1
            self._counts["prompt_tokens"] += len(ids)
        if not fits_rotation(len(ids), model):
            return None
        while True:
            with self._lock:
                found, keep = self._known.best(name, key, empty)
                if found is None:
                    return None
                generation, held = self._generation, self._leaving.get((name, found))
                if (name, found) in self._held:
                    held = self._held[name, found][0]
                    self._held.move_to_end((name, found))
            try:
                cache = (self._read(name, found, empty, generation) if held is None else held).fork()
                if keep < tokens_in(found):
                    cache.crop(keep - tokens_in(found))
                if cache.get_seq_length() != keep:
                    raise QuantCacheError(f"a prefix holds {cache.get_seq_length()} tokens, expected {keep}")
            except FAILURES as error:
                self._forget(name, found, error)
                continue
            with self._lock:
                self._counts["hits"] += 1
                self._counts["reused_tokens"] += keep
            return cache

    def add(self, tokens: Sequence[int] | Tensor, cache: SpectralCache, model: PreTrainedModel) -> bool:
        """Keep what a cache holds for prompts to come. The cache itself may be used on.

        Caches of several rows or with padding are not kept, nor any that could not be told from its tokens alone, nor
        texts so long that the model rotates their first keys otherwise (dynamic NTK, longrope).

        Args:
            tokens: Token ids of what the cache holds, or a tensor of them, ``[T]`` or ``[1, T]``; those beyond its
                length do not count.
            cache: A cache between two forward passes.
            model: The model that has filled it.

        Returns:
            Whether it is kept.

        Raises:
            QuantCacheError: A forward pass was interrupted, the cache has no calibration or holds more tokens than are
                named, or the model's weights are not in memory.
            UnsupportedModel: The model puts tokens of its own before every prompt.
            ValueError: The tokens are of several rows, or no token ids.
        """
        ids = row_of(tokens)
        length, generation = cache.get_seq_length(), self._generation
        if length > len(ids):
            raise QuantCacheError(f"the cache holds {length} tokens, only {len(ids)} are named")
        kept = cache.fork()
        kept.arrivals = None
        if not length or not fits_rotation(length, model) or not is_plain(kept):
            return False
        return self._insert(prefix_digest(cache, model), key_of(ids[:length]), kept, generation)

    def save(self) -> int:
        """Write all caches in memory to the folder, where a new store finds them.

        Returns:
            How many of them are there now; a warning is logged if not all are.

        Raises:
            QuantCacheError: The store has no folder.
        """
        if self.folder is None:
            raise QuantCacheError("this PrefixStore has no folder to write to: give it one with folder=")
        with self._lock:
            held, generation = dict(self._held), self._generation
        self._write(held, generation)
        # Where not all have room, the last to be written took the place of the first.
        there = sum(self._in_folder(*place) for place in held)
        if there < len(held) and generation == self._generation:
            logger.warning(
                "%d of %d prefixes in memory are not in %s, which may take %d bytes",
                len(held) - there,
                len(held),
                self.folder.path,
                self.folder.max_bytes,
            )
        return there

    def clear(self) -> None:
        """Forget everything, in the folder too, and whatever is on its way into either.

        What :meth:`add` is given afterwards is kept as ever.
        """
        with self._lock:
            self._generation += 1
            self._known.clear()
            self._held.clear()
            self._leaving.clear()
        if self.folder is not None:
            self.folder.clear()

    def statistics(self) -> PrefixStatistics:
        """What the store holds and has done.

        Returns:
            The figures.
        """
        files = self.folder.sizes() if self.folder else []
        with self._lock:
            sizes: dict[str, Any] = {"caches": len(self._held), "bytes": self._bytes()}
            return PrefixStatistics(**self._counts, **sizes, files=len(files), file_bytes=sum(files))

    # ------------------------------------------------------------------ finding

    def _read(self, name: str, key: bytes, empty: SpectralCache, generation: int) -> SpectralCache:
        """Bring a prefix back from the folder."""
        if self.folder is None:
            raise QuantCacheError("a prefix has left memory meanwhile")
        cache = self.folder.read(name, key, empty)
        self._insert(name, key, cache, generation)
        return cache

    # ------------------------------------------------------------------ keeping

    def _insert(self, name: str, key: bytes, cache: SpectralCache, generation: int) -> bool:
        """Put a cache in memory, and in the folder what has to leave; nothing if all was forgotten meanwhile."""
        size = measure(cache, saturation=False).total + len(key)
        if size > self.max_bytes:
            self._write({(name, key): (cache, size)}, generation)
            return generation == self._generation and self._in_folder(name, key)
        leaving: dict[_Place, _Held] = {}
        try:
            with self._lock:
                if generation != self._generation:
                    return False
                if can_be_cut(cache):
                    if self._is_covered(name, key):
                        return True
                    for shorter in self._known.shorter(name, key):
                        if (name, shorter) in self._held:
                            self._drop(name, shorter)  # what it serves, this one serves too
                self._drop(name, key)
                self._known.add(name, key)
                self._held[name, key] = cache, size
                while self._bytes() > self.max_bytes:
                    place, oldest = next(iter(self._held.items()))
                    if self.folder is None:
                        self._drop(*place)
                    else:
                        leaving[place], self._leaving[place] = oldest, oldest[0]
                        del self._held[place]
                    self._counts["evicted"] += 1
            self._to_folder(leaving, generation)
        finally:  # Ctrl-C must not leave caches beyond the limit in memory
            self._settle(leaving, generation)
        return True

    def _write(self, leaving: dict[_Place, _Held], generation: int) -> None:
        """Write caches to the folder, and forget those that are neither there nor in memory."""
        try:
            self._to_folder(leaving, generation)
        finally:
            self._settle(leaving, generation)

    def _to_folder(self, leaving: dict[_Place, _Held], generation: int) -> None:
        """Write caches to the folder, and forget what has made room for them."""
        if self.folder is None or not leaving:
            return

        def wanted() -> bool:
            return generation == self._generation

        for place, (cache, size) in leaving.items():
            try:
                if wanted():
                    self.folder.write(*place, cache, size, wanted)
            except FAILURES as error:
                self._failed("be written", error)
        gone = self.folder.gone()
        with self._lock:
            for place in gone:
                if place not in self._held and place not in self._leaving:
                    self._known.remove(*place)

    def _settle(self, leaving: Iterable[_Place], generation: int) -> None:
        """End the stay in memory of caches that were to be written."""
        with self._lock:
            for place in leaving if generation == self._generation else ():
                self._leaving.pop(place, None)
                if self._in_folder(*place):
                    self._known.add(*place)
                elif place not in self._held:
                    self._known.remove(*place)

    def _in_folder(self, name: str, key: bytes) -> bool:
        """Whether a prefix is in the folder; what was written later may have taken its room."""
        return self.folder is not None and os.path.exists(
            self.folder.file_of(name, key)
        )  # False for a share that is away

    def _is_covered(self, name: str, key: bytes) -> bool:
        """Whether a longer prefix in memory begins with this one; it then counts as used."""
        longer = self._known.longer(name, key)
        if longer is None or (name, longer) not in self._held:
            return False
        self._held.move_to_end((name, longer))
        return True

    def _bytes(self) -> int:
        """Bytes in memory; counted anew, since a sum that is kept would be wrong after Ctrl-C in between."""
        return sum(size for _, size in self._held.values())

    def _drop(self, name: str, key: bytes) -> None:
        if self._held.pop((name, key), None) is not None:
            self._known.remove(name, key)

    def _forget(self, name: str, key: bytes, error: BaseException) -> None:
        """Drop a prefix that cannot be used; a damaged file too."""
        with self._lock:
            self._drop(name, key)
            self._known.remove(name, key)
        if isinstance(error, ArtifactError) and self.folder is not None:
            file = self.folder.file_of(name, key)
            if not file.exists():
                return  # the folder was full, or is another process's too
            if not isinstance(error.__cause__, OSError):  # no handles left, a share that is away: the file may be sound
                file.unlink(missing_ok=True)
        self._failed("be used", error)

    def _failed(self, what: str, error: BaseException) -> None:
        with self._lock:
            self._counts["failures"] += 1
        logger.warning("a stored prefix cannot %s: %s", what, error)
