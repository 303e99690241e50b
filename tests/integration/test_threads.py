"""Part of the suite once more, at torch's default number of threads and after ``torch.set_num_threads(2)``.

The suite itself runs on one thread in each of its processes, and batched LAPACK calls can fail where it is another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

CHOSEN = (
    "tests/unit/test_linalg.py::test_inverse[2-160]",
    "tests/unit/test_linalg.py::test_inverse[2-256]",
    "tests/unit/test_linalg.py::test_a_decoder_undoes_its_encoder[2-160]",
    "tests/unit/test_spectral.py::test_klt_decorrelates",
    "tests/integration/test_ambient.py::test_another_number_of_threads",
)
OURS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTEST_ADDOPTS")
"""Variables that would give the processes something else than torch's defaults."""


@pytest.mark.support("another number of threads")
def test_at_other_numbers_of_threads() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("PYTEST_XDIST")}
    environment |= {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--threads", "0,2"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *CHOSEN],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
