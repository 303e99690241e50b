"""Child processes made by ``fork()``: they lack torch's threads, for which torch would wait forever.

A forked child has only the thread that called ``fork()``, while OpenMP still counts on the others. Anything that torch
divides among threads then hangs, as do this library's kernels, which share those threads. One thread is right.
Nor is there a thread that could open a lock which it had.
"""

from __future__ import annotations

import os
import threading
import warnings
from weakref import WeakSet

import torch

_had_threads = False
_threads_lost = False
_locks: WeakSet[threading.Lock] = WeakSet()


def lock() -> threading.Lock:
    """A lock that is open in a forked child, whoever had it in the parent.

    Returns:
        The lock.
    """
    new = threading.Lock()
    _locks.add(new)
    return new


def _before_fork() -> None:
    global _had_threads
    try:
        _had_threads = len(os.listdir("/proc/self/task")) > threading.active_count()
    except OSError:  # not Linux: unknown
        _had_threads = True


def _after_fork() -> None:
    global _threads_lost
    _threads_lost = _threads_lost or _had_threads
    for each in [*_locks]:
        each._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def use_living_threads() -> None:
    """In a forked child whose parent's threads are gone, let torch use one thread from here on, and say so once."""
    global _threads_lost
    if not _threads_lost:
        return
    _threads_lost = False
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
        warnings.warn(
            f"this process was forked from one that had torch's {threads} threads, and forking does not copy threads: "
            "torch.set_num_threads(1) was called to avoid a deadlock; start processes with 'spawn' to use more",
            RuntimeWarning,
            stacklevel=3,
        )
