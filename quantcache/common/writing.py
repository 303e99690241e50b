"""Files that are written completely or not at all, whoever reads, writes or is killed meanwhile."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import secrets
import shutil
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

    Raises:
        OSError: It cannot be made or written to; the error names a file or folder.
    """
    own = f"{prefix}{platform.node()}-"
    for stale in parent.glob(f"{glob.escape(prefix)}*"):
        if _is_abandoned(stale, own):
            shutil.rmtree(stale, ignore_errors=True)
    # mkdtemp() would make it for its owner only, and asking for the umask changes it, for other threads too.
    partial = parent / f"{own}{os.getpid()}-{_started(os.getpid()) or 0}-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        with only_writer(partial):
            yield partial
    except OSError as error:
        if error.strerror and error.filename is None:
            error.filename = str(parent)  # a write that fails, as on a full disk, does not say where
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def destination(path: Path) -> Path:
    """The file that is written under a name.

    Args:
        path: What was asked for; it need not exist.

    Returns:
        Where links lead.

    Raises:
        OSError: The name is that of a folder, a device or a pipe, which must not be renamed over.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is a device or a pipe: give a file")
    return Path(os.path.realpath(path))


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file into place, with the permissions of what it replaces, or those of any new file.

    Args:
        temporary: A file in a partial folder.
        path: Where it goes.
    """
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        mode = temporary.parent.stat().st_mode & 0o666
    temporary.chmod(mode)  # safetensors may be written for their owner only
    os.replace(temporary, path)


def put_together(temporary: Path, folder: Path, names: Sequence[str]) -> None:
    """Rename files that belong together into place; an error or Ctrl-C on the way leaves those that were there.

    Args:
        temporary: A partial folder that holds them.
        folder: Where they go.
        names: Their names.
    """
    before = [name for name in names if os.path.lexists(folder / name)]
    kept = temporary / "replaced"
    kept.mkdir()
    for name in before:
        with contextlib.suppress(OSError):  # where there are no hard links, what is replaced is gone
            os.link(folder / name, kept / name, follow_symlinks=False)
    try:
        for name in names:
            put_in_place(temporary / name, folder / name)
    except BaseException:
        for name in names:
            if os.path.lexists(kept / name):
                os.replace(kept / name, folder / name)
            elif name not in before:
                (folder / name).unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all.

    Args:
        path: The file; its folder must exist.
        content: What is to be in it.

    Raises:
        OSError: The file cannot be written.
    """
    path = destination(path)
    with partial_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.write_bytes(content)
        put_in_place(temporary, path)


def _is_abandoned(folder: Path, own: str) -> bool:
    if _is_locked(folder):
        return False
    owner, *more = folder.name.removeprefix(own).split("-")
    if folder.name.startswith(own) and owner.isdigit() and len(more) <= 2:
        started = _started(int(owner))
        taken_over = len(more) == 2 and more[0] not in ("0", started) and started is not None
        return taken_over or not _is_running(int(owner))
    try:
        return time.time() - folder.stat().st_mtime > STALE_SECONDS
    except OSError:
        return False


def _is_locked(folder: Path) -> bool:
    """Whether somebody is writing into a partial folder, of whom this process may see nothing else (containers)."""
    if fcntl is None:
        return False
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _started(process: int) -> str | None:
    """When a process began, in clock ticks since the system did: process ids are used again, in containers at once."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


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
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has the handle too
        os.close(handle)


def claim(file: int) -> bool:
    """Take a file for this process, until that closes it or ends, however it ends.

    Args:
        file: Handle of the file, open for writing.

    Returns:
        Whether it is this process's; False where another one has it.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # the file system has no locks
    return True


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
