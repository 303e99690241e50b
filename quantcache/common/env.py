"""The environment record that goes with every measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from quantcache.common import compat

_MORE_PACKAGES = ("safetensors", "scipy", "numpy", "triton", "optimum-quanto", "hqq", "torchao")


def environment() -> dict[str, Any]:
    """Describe what a measurement ran on.

    Returns:
        ``versions``, ``platform``, ``cpu``, ``memory_bytes``, ``gpus`` and ``git``, ready for JSON. What this machine
        does not tell is None; it names neither the host nor its user.
    """
    return {
        "versions": {**compat.versions(), **{name: _version(name) for name in _MORE_PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "name": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
        "git": git_state(Path(__file__).resolve().parents[2]),
    }


def machine(record: dict[str, Any]) -> str:
    """What to call the machine of a measurement.

    Args:
        record: What :func:`environment` returned there.

    Returns:
        Its first GPU, or its CPU with the number of cores.
    """
    cpu, gpus = record["cpu"], record["gpus"]
    return str(gpus[0]["name"]) if gpus else f"{cpu['name'] or 'cpu'} ({cpu['cores']} cores)"


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit of a checkout, and whether its files differ from it.

    Records of earlier measurements (``benchmarks/results``) do not count as a difference.

    Args:
        root: The checkout's top folder.

    Returns:
        ``{"commit", "dirty"}``, the commit None before the first; None if ``root`` is not a checkout or git is missing.
    """
    if not (root / ".git").exists():
        return None
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    if changes is None:
        return None
    # Without --verify, git echoes "HEAD" for a branch that has no commit yet.
    return {"commit": _output("git", "-C", str(root), "rev-parse", "--verify", "-q", "HEAD"), "dirty": bool(changes)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, None if it cannot run or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda,
                "driver": driver.splitlines()[0] if driver else None,
            }
        )
    return found
