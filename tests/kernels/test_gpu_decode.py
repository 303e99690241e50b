"""The GPU benchmark end to end on small shapes, its record included: on a GPU it must run at the first try."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

pytest.importorskip("triton")

from quantcache.coding.schema import SIDES
from quantcache.evaluation.record import Record

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(600)
def test_gpu_benchmark_measures_and_writes_its_record(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_decode.py", "--tiny", "--parts", "parity,copy,attention,encode,models"]
    command += ["--rungs", "1", "--parity-only", "test_attention and triton-width3", "--parity-seconds", "300"]
    command += ["--minutes", "30"]
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels"))
    given = {**os.environ, "PYTHONPATH": paths, "OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("gpu-decode-*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert "failure" not in kinds, [line["figures"] for line in lines if line["kind"] == "failure"]
    parts = {"parity", "copy", "attention", "encode", "decode", "prefill", "generate", "graph"}
    assert set(kinds) == {"environment", *parts, "kernels"}
    (path,) = tmp_path.glob("gpu-decode__*.json")
    record = Record.from_dict(json.loads(path.read_text()))
    assert not record.clean
    parity = record.metrics["parity"]
    assert (parity["exit_status"], parity["failed"]) == (0, []), parity["summary"]
    assert parity["summary"].startswith("1 passed")
    for rung in record.metrics["attention"]:
        assert set(rung["status"].values()) == {"ok"}
        assert rung["difference"]["relative"] < 0.01  # in bfloat16; parity is tests/kernels' affair
    (model,) = record.metrics["models"]
    for part in ("decode", "prefill", "generate"):
        assert [(entry["kind"], entry["status"]) for entry in model[part]] == [("dense", "ok"), ("spectral", "ok")]
    assert [entry["kind"] for entry in model["graph"]] == ["spectral", "spectral-cuda"]
    assert {entry["status"] for entry in model["graph"]} == {"unsupported: CUDA graphs need a GPU"}
    assert model["prefill"][1]["encode_share"] > 0
    assert record.metrics["not_measured"] == []


def test_every_geometry_is_timed_at_every_length_and_batch() -> None:
    from gpu_decode import QUICK, RUNGS
    from gpu_run import CONFIGS

    asked = set(itertools.product(CONFIGS, (1, 8, 32), (4096, 32_768, 131_072)))
    assert asked <= set(RUNGS)
    assert len(set(RUNGS)) == len(RUNGS)
    assert len(QUICK) == 3


@pytest.mark.parametrize(
    ("replayed", "reason"),
    [
        ([0.0, 1.0], None),
        ([0.01, 0.99], None),
        ([0.0, 0.0], "repeats the captured step"),
        ([1.0, 1.0], "gives other logits"),
        ([float("nan"), 1.0], "gives other logits"),
        ([0.0, float("nan")], "repeats the captured step"),
    ],
)
def test_replays_must_go_on_as_the_model_does(replayed: list[float], reason: str | None) -> None:
    from gpu_models import repeats

    found = repeats(*([torch.tensor([x, 2.0]) for x in each] for each in ([0.0, 1.0], replayed)))
    assert found is None if reason is None else reason in str(found)


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
