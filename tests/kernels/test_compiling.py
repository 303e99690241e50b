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
def test_every_variant_passes_the_front_end() -> None:
    found = run("--front-end")
    assert not [each for each in found if each["error"]]
    assert all(each["front_end"] or each["registers"] for each in found), "compiled before, or through the front end"
    assert {each["kernel"] for each in found} == {f"{name}_kernel" for name in KERNELS}
    cases = {each["case"] for each in found}
    assert cases >= {"llama-8b", "gemma-2", "trellis-D256", "few-fast", "all-fast", "D256", "softcap", "padded"}
    assert len(found) > 200, "every case is there, and kernels are compiled anew for what differs"


KERNELS = ("attend", "query", "dense", "merge", "decode", "encode", "path", "level")

STACKS = {
    90: {  # bytes of attention's stack, by case
        "llama-8b": 0,
        "llama-8b-trellis": 16,
        "gemma-2": 256,  # more than 32 fast dimensions, and 256 in all
        "D64": 16,
        "T69": None,  # float32: levels are looked up, and products are not for tensor cores
    },
    80: {"llama-8b-trellis": 128},
    120: {"llama-8b-trellis": 32},
}
COMPILED = {
    90: ["^llama-8b$", "^llama-8b-trellis$:attend|decode|encode|path|level", "^gemma-2$:attend", "^D64$:attend|query",
         "^T69$:attend"],
    80: ["^llama-8b-trellis$"],
    120: ["^llama-8b-trellis$"],
}  # fmt: skip
QUERY_STACK = 256
"""Bytes of stack that bringing queries into coded coordinates may take; it took 4,024 on sm_80."""


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", STACKS)
def test_kernels_compile_for(target: int) -> None:
    found = run("--target", str(target), "--only", *COMPILED[target])
    assert not [each for each in found if each["error"]]
    assert {each["kernel"] for each in found} == {f"{name}_kernel" for name in KERNELS}
    assert all(each["stack"] <= QUERY_STACK for each in found if each["kernel"] == "query_kernel")
    attention = {each["case"]: each for each in found if each["kernel"] == "attend_kernel"}
    assert attention.keys() == STACKS[target].keys()
    for case, stack in STACKS[target].items():
        assert 0 < attention[case]["loop"] < 9000
        if stack is not None:
            assert attention[case]["stack"] <= stack, case
            assert attention[case]["local"] <= stack // 4, case
