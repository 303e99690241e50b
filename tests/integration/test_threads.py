"""Part of the suite once more, at torch's default number of threads and after ``torch.set_num_threads(2)``.

The suite itself runs on one thread in each of its processes, and batched LAPACK calls can fail where it is another.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

FILES = ("tests/unit/test_linalg.py", "tests/unit/test_spectral.py", "tests/integration/test_ambient.py")
CHOSEN = "another_number or klt_decorrelates or ((test_inverse or decoder_undoes) and (2-160 or 2-256))"
OURS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTEST_ADDOPTS")
"""Variables that would give the processes something else than torch's defaults."""


@pytest.mark.slow
@pytest.mark.support("another number of threads")
def test_at_other_numbers_of_threads() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("PYTEST_XDIST")}
    environment |= {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--threads", "0,2"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", CHOSEN, *FILES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"\b14 passed\b", result.stdout), result.stdout[-4000:]  # seven tests, twice
