"""Loading the shared library: found beside this file, where the package's build puts it."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from quantcache_kernels.cpu.structures import ABI, Decode, Encode, Past

LEVEL_VARIABLE = "QUANTCACHE_CPU_LEVEL"
"""Environment variable that names the instruction set to use, for tests and comparisons."""

LIBRARY_VARIABLE = "QUANTCACHE_CPU_LIBRARY"
"""Environment variable that names another build of the library, such as one with sanitizers."""

_ERRORS = {
    1: "out of memory",
    2: "a block begins more than 64 tokens behind its anchor, or a block, a row's start or the sinks lie outside of "
    "what is cached",
}


class Library:
    """The loaded library.

    Args:
        path: The shared library.

    Raises:
        OSError: The library cannot be loaded, or is of another build than this package.
    """

    def __init__(self, path: Path):
        self.path = path
        handle = ctypes.CDLL(str(path))
        if handle.quantcache_abi() != ABI:
            raise OSError(f"{path} is left over from another build")
        handle.quantcache_level_name.restype = ctypes.c_char_p
        handle.quantcache_attend.argtypes = (ctypes.POINTER(Past), ctypes.c_char_p)
        handle.quantcache_encode.argtypes = (ctypes.POINTER(Encode),)
        handle.quantcache_decode.argtypes = (ctypes.POINTER(Decode),)
        self.attend, self.encode = handle.quantcache_attend, handle.quantcache_encode
        self.decode = handle.quantcache_decode
        names = [handle.quantcache_level_name(i).decode() for i in range(handle.quantcache_num_levels())]
        self.levels = {name: i for i, name in enumerate(names) if handle.quantcache_level_supported(i)}
        self.level = max(self.levels.values())
        wanted = os.environ.get(LEVEL_VARIABLE)
        if wanted:
            self.select_level(wanted)

    def select_level(self, name: str) -> None:
        """Use the kernels of one instruction set.

        Args:
            name: One of ``levels``.

        Raises:
            ValueError: This processor lacks it, or the library does.
        """
        if name not in self.levels:
            raise ValueError(f"instruction set {name!r} is not available here; there are {', '.join(self.levels)}")
        self.level = self.levels[name]


@functools.cache
def find() -> tuple[Library | None, str]:
    """The library, or why there is none.

    Returns:
        The library and an empty string, or None and the reason.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    paths = [Path(named)] if named else sorted(Path(__file__).parent.glob("_native*.so"))
    if not paths:
        return None, "quantcache was installed without its CPU kernels (no C++ compiler at build time)"
    try:
        return Library(paths[0]), ""
    except OSError as error:
        return None, f"the CPU kernels cannot be loaded: {error}"


def loaded() -> Library:
    """The library, which must be there.

    Returns:
        The library.

    Raises:
        RuntimeError: The library was not built.
    """
    library, reason = find()
    if library is None:
        raise RuntimeError(reason)
    return library


def check(status: int) -> None:
    """Turn the status of a call into an error.

    Args:
        status: What the call returned.

    Raises:
        RuntimeError: The call failed.
    """
    if status:
        raise RuntimeError(f"CPU kernel failed: {_ERRORS.get(status, status)}")
