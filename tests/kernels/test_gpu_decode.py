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
from tests import warm
from tests.kernels import emulation

ROOT = Path(__file__).resolve().parent.parent.parent


EMULATED = """
import runpy, sys
from tests.kernels.emulation import on_the_cpu
with on_the_cpu():
    runpy.run_path("benchmarks/gpu_decode.py", run_name="__main__")
"""
"""The script with the CUDA kernels in place of a GPU's."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(emulation.COMPILER is None, reason="no C++ compiler here")
def test_gpu_benchmark_measures_and_writes_its_record(tmp_path: Path) -> None:
    command = [*warm.python(), "-c", EMULATED, "--tiny", "--parts", "parity,copy,attention,models,encode"]
    command += ["--rungs", "1", "--minutes", "30"]
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "benchmarks"))
    given = {**os.environ, "PYTHONPATH": paths, "OUT": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("gpu-decode-*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert "failure" not in kinds, [line["figures"] for line in lines if line["kind"] == "failure"]
    parts = {"parity", "copy", "attention", "encode", "decode", "prefill", "generate", "graph"}
    assert set(kinds) == {"environment", "prepared", *parts, "kernels"}
    (path,) = tmp_path.glob("gpu-decode__*.json")
    record = Record.from_dict(json.loads(path.read_text()))
    assert not record.clean
    parity = record.metrics["parity"]
    assert parity["failed"] == []
    assert parity["summary"].startswith("1 skipped"), "there is no GPU"
    (rung,) = record.metrics["attention"]
    assert rung["status"].pop("triton-3").startswith("unavailable: ")
    assert set(rung["status"].values()) == {"ok"}
    assert set(rung["backend"]) >= {"cuda-3", "cuda-3 step", "cuda-3, 5 queries", "cuda-3 scalar"}
    assert set(rung["backend"].values()) == {"cuda"}
    for found in rung["difference"].values():
        assert found["relative"] < 0.01  # in bfloat16; parity is tests/kernels' affair
    (model,) = record.metrics["models"]
    triton = [entry for entry in model["decode"] if entry["kind"] == "spectral-triton"]
    assert ["triton" in entry["status"] for entry in triton] == [True], "it cannot be used, and that is all"
    model["decode"] = [entry for entry in model["decode"] if entry not in triton]
    for part in ("decode", "prefill", "generate"):
        assert {entry["status"] for entry in model[part]} == {"ok"}
        served = {entry["kind"]: entry["backends"] for entry in model[part] if not entry["kind"].startswith("dense")}
        assert served["spectral-cuda"] == ["cuda"]
        assert set(served) >= {"spectral", "spectral-cuda"}
    assert {entry["kind"] for entry in model["decode"]} >= {"dense", "dense, flash"}
    assert [(entry["kind"], entry["status"]) for entry in model["graph"]] == [
        ("spectral-cuda", "unsupported: CUDA graphs need a GPU")
    ]
    assert all(entry["encode_share"] > 0 for entry in model["prefill"] if entry["kind"] != "dense")
    assert record.metrics["not_measured"] == []


def test_whatever_fails_at_the_end_the_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own structures, which the list of kernels is read from, change with its versions."""
    import gpu_decode

    def changed(run: object) -> None:
        raise KeyError("caches")

    monkeypatch.setattr(gpu_decode, "kernels", changed)
    monkeypatch.setattr(sys, "argv", ["gpu_decode.py", "--tiny", "--parts", "copy"])
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu_decode.main()
    (path,) = tmp_path.glob("gpu-decode__*.json")
    metrics = Record.from_dict(json.loads(path.read_text())).metrics
    assert metrics["copy"]["bytes"] == 2 * 4 * 4096
    assert "KeyError: 'caches'" in metrics["kernels"]["status"]["traceback"]


@torch.inference_mode()
def test_kernels_that_cannot_run_are_said_to_be_unavailable(tmp_path: Path) -> None:
    from gpu_run import Run
    from gpu_steps import Rung, Variant, warm_up

    run, variant = Run(torch.device("cpu"), True, 0.0, tmp_path / "log"), Variant("cuda", "trellis", 3.0)
    rung, why = Rung(run, "llama-8b", 1, 140), "the CUDA kernels do not run on cpu devices"
    rung.ours(variant, whole=True, several=True)
    rung.dense(True)
    assert rung.found["status"] == {"cuda-3": f"unavailable: {why}", "sdpa": "ok", "DynamicCache step": "ok"}
    assert why in warm_up(run, "llama-8b", [variant])["cuda-3"]


@torch.inference_mode()
def test_a_time_that_another_backend_took_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_steps
    from gpu_run import Run

    run = Run(torch.device("cpu"), True, 0.0, tmp_path / "log")
    monkeypatch.setattr(gpu_steps, "declined", lambda layer, backend: "declined: it slept")
    rung = gpu_steps.Rung(run, "llama-8b", 1, 140)
    rung.ours(gpu_steps.Variant("torch", "trellis", 3.0), whole=False, several=False)
    assert rung.found["milliseconds"] == {}
    assert set(rung.found["status"].values()) == {"declined: it slept"}


def test_parity_of_triton_is_asked_of_files_that_are_there() -> None:
    from argparse import Namespace

    from gpu_decode import triton_tests

    files = [name for name in triton_tests(Namespace(tiny=False), Namespace(parity_only=None)) if "/" in name]
    assert len(files) > 1
    assert all((ROOT / name).is_file() for name in files)


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
    assert all(w is not None and w.shape == (heads, dim) and len(w.unique()) >= 3 for w in widths)
