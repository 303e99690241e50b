"""The GPU benchmark end to end on small shapes, its record included: on a GPU it must run at the first try."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

pytest.importorskip("triton")

from quantcache.coding.schema import SIDES
from quantcache.evaluation.record import Record

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.triton
def test_gpu_benchmark_measures_and_writes_its_record(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_decode.py", "--tiny", "--parts", "copy,attention,encode,models"]
    command += ["--rungs", "1"]
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels"))
    given = {**os.environ, "PYTHONPATH": paths, "OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("gpu-decode-*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert "failure" not in kinds, [line["figures"] for line in lines if line["kind"] == "failure"]
    assert set(kinds) == {"environment", "copy", "attention", "encode", "decode", "prefill", "kernels"}
    (path,) = tmp_path.glob("gpu-decode__*.json")
    record = Record.from_dict(json.loads(path.read_text()))
    assert not record.clean
    for rung in record.metrics["attention"]:
        assert set(rung["status"].values()) == {"ok"}
        assert rung["difference"]["relative"] < 0.01  # in bfloat16; parity is tests/kernels' affair
    assert {entry["status"] for entry in record.metrics["models"][0]["decode"]} == {"ok"}
    assert {entry["status"] for entry in record.metrics["models"][0]["prefill"]} == {"ok"}


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 128), (2, 256)])
@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0])
def test_realistic_calibrations_keep_their_rate_and_vary(heads: int, dim: int, bits: float) -> None:
    from realistic import realistic_calibration

    config = LlamaConfig(
        hidden_size=2 * heads * dim, num_attention_heads=2 * heads, num_key_value_heads=heads, head_dim=dim,
        num_hidden_layers=7, intermediate_size=64, vocab_size=32,
    )  # fmt: skip
    calibration = realistic_calibration(config, bits)
    assert calibration.bits == pytest.approx(bits, abs=0.01)
    widths = [calibration.layers[i].side(side).widths for i in range(7) for side in SIDES]
    assert all(w is not None and w.shape == (heads, dim) and len(w.unique()) >= 4 for w in widths)
