"""Prefixes on disk: a folder of saved caches that stays within its bytes, whoever else writes to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from quantcache.cache.files import read_cache, read_description, read_prefix, write_cache
from quantcache.cache.prefix_keys import key_of
from quantcache.common.errors import ArtifactError
from quantcache.common.writing import only_writer, partial_folder, steadily

if TYPE_CHECKING:
    from quantcache.cache.spectral_cache import SpectralCache

SUFFIX = ".prefix.safetensors"


class PrefixFolder:
    """Saved caches by identity and tokens; the least recently used go when the folder is full.

    A file is complete or not there, and its checksum is compared when it is read. Several processes may share a folder.

    Args:
        path: The folder; made if it does not exist.
        max_bytes: Most bytes that its files may take.

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self, path: Path, max_bytes: int):
        self.path, self.max_bytes = path.absolute(), max_bytes  # whatever the working directory is later
        self._sound: set[Path] = set()  # files that were written here, or whose checksums have been compared
        self._seen: dict[Path, tuple[str, bytes]] = {}  # what lay in the folder when it was last looked at
        self.path.mkdir(parents=True, exist_ok=True)
        self._make_room(0)  # it may have had more bytes before

    def file_of(self, identity: str, key: bytes) -> Path:
        """Where a prefix is kept.

        Args:
            identity: What identifies model and calibration.
            key: Its tokens.

        Returns:
            The file, which need not exist.
        """
        return self.path / f"{identity[:16]}-{hashlib.sha256(key).hexdigest()[:32]}{SUFFIX}"

    def scan(self) -> Iterator[tuple[str, bytes]]:
        """Identity and tokens of every prefix in the folder, the least recently used first.

        Files that are something else, or of another version, are passed over.
        """
        for path, _ in self._files():
            try:
                identity, tokens = steadily([path], lambda path=path: read_prefix(path))  # type: ignore[misc]
                key = key_of(tokens.tolist())
            except (ArtifactError, ValueError):
                continue
            if path == self.file_of(identity, key):
                self._seen[path] = identity, key
                yield identity, key

    def gone(self) -> list[tuple[str, bytes]]:
        """Identity and tokens of prefixes that have left the folder, to make room or by another process's doing.

        Returns:
            Those of which this has not been said before.
        """
        seen = [*self._seen]  # before the folder is looked at: another thread may be adding a file
        there = {path for path, _ in self._files()}
        self._sound.difference_update(left := [path for path in seen if path not in there])
        return [place for path in left if (place := self._seen.pop(path, None)) is not None]

    def sizes(self) -> list[int]:
        """Bytes of every file."""
        return [size for _, size in self._files()]

    def write(self, identity: str, key: bytes, cache: SpectralCache, size: int, wanted: Callable[[], bool]) -> None:
        """Keep a prefix that fits and is wanted, in place of those that were used longest ago.

        Args:
            identity: What identifies model and calibration.
            key: Its tokens.
            cache: What they have left; nobody changes it.
            size: About how many bytes it takes.
            wanted: Says whether it is still to be kept once it is written; no longer before a :meth:`clear`.

        Raises:
            OSError: The disk is full, or the folder cannot be written to.
            QuantCacheError: The cache has a layer that cannot be written.
        """
        path = self.file_of(identity, key)
        if path in self._sound and path.exists():
            self.touch(path)
            return
        self.path.mkdir(parents=True, exist_ok=True)  # somebody may have cleared it away
        if size > self.max_bytes or not self._make_room(size):
            return
        tokens = torch.from_numpy(np.frombuffer(key, ">u4").astype(np.int64))
        assert cache.calibration is not None
        with partial_folder(self.path) as partial:
            write_cache(partial / path.name, cache, cache.calibration, None, prefix=(tokens, identity))
            with only_writer(self.path):  # others may have written meanwhile
                if not wanted() or not self._remove_oldest((partial / path.name).stat().st_size):
                    return
                os.replace(partial / path.name, path)
                if not wanted():  # where the file system has no locks, clear() did not wait for this
                    path.unlink(missing_ok=True)
                    return
        self._sound.add(path)
        self._seen[path] = identity, key

    def read(self, identity: str, key: bytes, empty: SpectralCache) -> SpectralCache:
        """Read a prefix.

        Args:
            identity: What identifies model and calibration.
            key: Its tokens.
            empty: A cache of that identity, to be filled.

        Returns:
            The cache, in CPU memory.

        Raises:
            ArtifactError: The file is gone, damaged, or another prefix's.
        """
        path = self.file_of(identity, key)

        def fill() -> SpectralCache:
            cache = empty.fork()
            assert cache.calibration is not None
            read_cache(path, read_description(path), cache, cache.calibration)
            found = read_prefix(path)
            if (found[0], key_of(found[1].tolist())) != (identity, key):
                raise ArtifactError(f"{path} holds another prefix than its name says")
            return cache

        cache = steadily([path], fill)
        self._sound.add(path)
        self._seen[path] = identity, key
        self.touch(path)
        return cache

    def touch(self, path: Path) -> None:
        """Note that a file was used.

        Args:
            path: The file; it may be gone.
        """
        with contextlib.suppress(OSError):
            os.utime(path)

    def clear(self) -> None:
        """Remove all prefixes."""
        with contextlib.suppress(FileNotFoundError), only_writer(self.path):
            for path, _ in self._files():
                path.unlink(missing_ok=True)
        self.gone()  # whoever clears the folder knows of nothing in it any more

    def _files(self) -> list[tuple[Path, int]]:
        """All prefixes with their sizes, the least recently used first."""
        found = []
        for path in self.path.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, path, status.st_size))
        return [(path, size) for _, path, size in sorted(found)]

    def _make_room(self, size: int) -> bool:
        """Remove what was used longest ago until so many more bytes fit."""
        with only_writer(self.path):
            return self._remove_oldest(size)

    def _remove_oldest(self, size: int) -> bool:
        """:meth:`_make_room` for whose turn it is."""
        files = self._files()
        total = sum(size for _, size in files)
        for path, held in files:
            if total + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= held
        return total + size <= self.max_bytes
