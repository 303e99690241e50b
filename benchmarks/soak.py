"""The long forms of the property, fuzz and long-haul tests, and a record of their figures.

python benchmarks/soak.py [pytest arguments]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from records import ROOT, write_record

TESTS = (
    "tests/property",
    "tests/integration/test_long_haul.py",
    "tests/integration/test_compiled.py::test_backends",
)

OPTIONS = ("-n", "2", "--dist", "worksteal", "--timeout=14400", "--durations=20")
"""Two processes: the state machine, the first of the tests, takes about as long as all others together."""


def main() -> int:
    """Run the tests, record what they report, and give pytest's exit status."""
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        environment = {**os.environ, "HYPOTHESIS_PROFILE": "soak", "QUANTCACHE_SOAK_REPORT": str(report)}
        tests = () if any(argument.startswith("tests/") for argument in arguments) else TESTS
        command = [sys.executable, "-m", "pytest", *OPTIONS, *tests, *arguments]
        started = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        lines = report.read_text("utf-8").splitlines() if report.exists() else []
    if status == 0:
        figures = {entry.pop("name"): entry for entry in map(json.loads, lines)}
        metrics = {"seconds": round(time.monotonic() - started, 1), **figures}
        write_record("soak", {"arguments": arguments}, metrics)
    return status


if __name__ == "__main__":
    sys.exit(main())
