"""Files that are written completely or not at all, also with concurrent readers, writers and kills."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from quantcache.common.errors import ArtifactError

try:
    import fcntl
except ImportError:  # pragma: no cover (not POSIX: writers do not wait for each other)
    fcntl = None  # type: ignore[assignment]

PREFIX = ".quantcache-"
STALE_SECONDS = 24 * 3600
"""Age at which a partial folder of another machine is taken for abandoned."""

READS = 50
PATIENCE = 0.5
"""How often files that change are read again, and how long two that do not fit are given to become a pair."""

_Result = TypeVar("_Result")


@contextlib.contextmanager
def partial_folder(parent: Path, prefix: str = PREFIX) -> Iterator[Path]:
    """A hidden folder to write into, gone afterwards; what killed writers have left there is cleared away first.

    Args:
        parent: Where the files are to go.
        prefix: What partial folders of this kind are called.

    Yields:
        The folder, whose files are to be renamed into place.
    """
    own = f"{prefix}{platform.node()}-"
    for stale in parent.glob(f"{glob.escape(prefix)}*"):
        if _is_abandoned(stale, own):
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{own}{os.getpid()}-", dir=parent))
    try:
        partial.chmod(0o777 & ~current_umask())  # temporary folders are made for their owner only
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def current_umask() -> int:
    """Which permissions new files do not get."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _is_abandoned(folder: Path, own: str) -> bool:
    owner = folder.name.removeprefix(own).partition("-")[0]
    if folder.name.startswith(own) and owner.isdigit():
        return not _is_running(int(owner))
    try:
        return time.time() - folder.stat().st_mtime > STALE_SECONDS
    except OSError:
        return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Let one writer at a time put several files in place; the system ends a killed writer's turn.

    Args:
        folder: Where they go.

    Yields:
        Once it is this writer's turn; at once where the file system has no locks.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class TornFiles(ArtifactError):
    """Files that belong together were written at different times."""


def steadily(paths: Sequence[Path], read: Callable[[], _Result]) -> _Result:
    """Read files that somebody may be replacing: what failed because they changed is tried again.

    Args:
        paths: Files that ``read`` opens.
        read: Called again if a file changed meanwhile.

    Returns:
        What it returns.

    Raises:
        ArtifactError: As ``read`` does, of files that have stayed as they are.
    """
    waited = 0.0
    for attempt in range(READS):
        before = _identities(paths)
        try:
            return read()
        except ArtifactError as error:
            while isinstance(error, TornFiles) and _identities(paths) == before and waited < PATIENCE:
                time.sleep(0.02)
                waited += 0.02
            if _identities(paths) == before or attempt == READS - 1:
                raise
    raise AssertionError


def _identities(paths: Sequence[Path]) -> list[tuple[int, int, int] | None]:
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return found
