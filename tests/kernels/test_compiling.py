"""The Triton kernels compiled for GPUs that are not there; ``make compile-gpu`` compiles all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str) -> list[dict[str, Any]]:
    """Lines of JSON of ``tests.kernels.compiling`` in a process without Triton's interpreter."""
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "benchmarks"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.triton
def test_decoding_compiles_few_variants() -> None:
    (found,) = run("--steps", "600")
    assert set(found) == {"encode_kernel", "query_kernel", "attend_kernel", "dense_kernel", "merge_kernel"}
    assert max(found.values()) <= 4, found


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("case", "kernels", "stack"),
    [
        ("llama-8b", "attend|query|dense|merge|decode|encode", 0),
        ("llama-8b-trellis", "attend|decode|encode|path|level", 16),
        ("gemma-2", "attend", 256),  # more than 32 fast dimensions, and 256 in all
        ("D64", "attend|query", 16),
        ("T69", "attend", None),  # float32: levels are looked up, and products are not for tensor cores
    ],
)
def test_kernels_compile_for_hopper(case: str, kernels: str, stack: int | None) -> None:
    found = run("--only", f"^{case}$", "--kernel", kernels)
    assert {name for name in kernels.split("|")} <= {each["kernel"].partition("_")[0] for each in found}
    assert not [each for each in found if each["error"]]
    (attend,) = (each for each in found if each["kernel"] == "attend_kernel")
    assert 0 < attend["loop"] < 9000
    if stack is not None:
        assert attend["stack"] <= stack
        assert attend["local"] <= stack // 4
