"""How benchmarks keep what they measured: one JSON file for each run."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantcache.cli.session import write_json
from quantcache.env import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "benchmarks" / "scratch"
SCHEMA_VERSION = 1


def summarize(samples: list[float]) -> dict[str, float]:
    """Describe repeated measurements of one thing.

    Args:
        samples: The measurements.

    Returns:
        ``median``, ``p20``, ``p80``, ``mean`` and ``n``.
    """
    ordered = sorted(samples)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {
        "median": quantile(0.5),
        "p20": quantile(0.2),
        "p80": quantile(0.8),
        "mean": sum(ordered) / len(ordered),
        "n": len(ordered),
    }


def machine_name(record: dict[str, Any]) -> str:
    """Folder name of a machine.

    Args:
        record: An environment record.

    Returns:
        Its GPU, or its CPU with the number of cores, in lower case with hyphens.
    """
    if record["gpus"]:
        name = record["gpus"][0]["name"]
    else:
        name = f"{record['cpu']['name'] or 'cpu'} {record['cpu']['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_record(suite: str, settings: dict[str, Any], metrics: dict[str, Any]) -> Path:
    """Write a record: into ``results/`` if a commit says what was run, else into the git-ignored ``scratch/``.

    Args:
        suite: Name of the benchmark.
        settings: Everything that was chosen.
        metrics: Everything that was measured.

    Returns:
        The file, complete.
    """
    surroundings = environment()
    git = surroundings.pop("git") or {"commit": None, "dirty": True}
    created = datetime.now(UTC)
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    record = {
        "schema_version": SCHEMA_VERSION,
        "suite": suite,
        "status": "ok",
        "created": created.isoformat(timespec="seconds"),
        "commit": git["commit"],
        "dirty": git["dirty"],
        "command": " ".join(["python", name, *sys.argv[1:]]),
        "environment": surroundings,
        "settings": settings,
        "metrics": metrics,
    }
    clean = git["commit"] is not None and not git["dirty"]
    folder = (RESULTS if clean else SCRATCH) / machine_name(surroundings)
    folder.mkdir(parents=True, exist_ok=True)
    commit = git["commit"][:10] if clean else "no-commit"
    path = folder / f"{suite}__{commit}__{created:%Y%m%dT%H%M%SZ}.json"
    write_json(path, record)
    return path
