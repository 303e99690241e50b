"""Two versions of quantcache on one machine, taking turns: whether a change made decoding or encoding slower.

python benchmarks/paired.py BASE [--rounds 12]

BASE is a commit. Both versions run the same steps in processes of their own, one short round each in turn, so that
what else the machine does falls on both alike. The record holds medians of all samples, the ratio of this version's to
the base's, and the quartiles of the ratios of single rounds. Codes are scalar, which every version has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from records import ROOT, write_record

CASES: dict[str, dict[str, Any]] = {
    "wiki11m, 1K": {"heads": 4, "groups": 2, "dim": 64, "tokens": 1024, "theta": 1e4},
    "wiki11m, 4K": {"heads": 4, "groups": 2, "dim": 64, "tokens": 4096, "theta": 1e4},
    "Llama-8B, 1K": {"heads": 8, "groups": 4, "dim": 128, "tokens": 1024, "theta": 5e5},
    "Llama-8B, 4K": {"heads": 8, "groups": 4, "dim": 128, "tokens": 4096, "theta": 5e5},
}
"""Geometries of one layer, and how many tokens it holds."""

# Only what every version since 0.2 has, under one name or another: the child runs in the base's tree too.
CHILD = """
import json, sys, time
import torch
from transformers import LlamaConfig
from quantcache import Calibration, SpectralCache
try:
    from quantcache.attention.function import spectral_attention_forward
except ImportError:  # where it was in 0.2
    from quantcache.attention import spectral_attention_forward

torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
layers, module = {}, torch.nn.Module()
for name, case in json.loads(sys.argv[1]).items():
    heads, dim, queries = case["heads"], case["dim"], case["heads"] * case["groups"]
    config = LlamaConfig(
        hidden_size=queries * dim, num_attention_heads=queries, num_key_value_heads=heads, head_dim=dim,
        num_hidden_layers=1, vocab_size=32, intermediate_size=8,
        rope_parameters={"rope_type": "default", "rope_theta": case["theta"]},
    )
    calibration = Calibration.synthetic(config, bits=3.0)
    if hasattr(calibration, "with_coding"):  # later versions would take a trellis
        calibration = calibration.with_coding("scalar")
    layer = SpectralCache(calibration, config).spectral_layers[0]
    states = [torch.randn(1, heads, case["tokens"], dim) for _ in range(2)]
    layers[name] = layer, states, torch.randn(1, queries, 1, dim), [x[:, :, :1].clone() for x in states]

for line in sys.stdin:  # one round for each line
    found = {}
    for name, (layer, states, query, new) in layers.items():
        layer.reset()
        started = time.perf_counter()
        layer.update(*states)
        getattr(layer, "flush", getattr(layer, "finish", None))()  # its name in 0.2
        found[name + ", encode"] = [1e3 * (time.perf_counter() - started)]
        times = []
        for _ in range(34):
            started = time.perf_counter()
            keys, values = layer.update(*new)
            spectral_attention_forward(module, query, keys, values, None)
            times.append(1e3 * (time.perf_counter() - started))
        found[name + ", step"] = times[2:]
    print(json.dumps(found), flush=True)
"""


class Version:
    """A tree of quantcache with a process that times it.

    Args:
        tree: The tree, with its kernels compiled.
        threads: Of torch.
    """

    def __init__(self, tree: Path, threads: int):
        paths = os.pathsep.join((str(tree), str(tree / "kernels")))
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(CASES), str(threads)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "passive"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round(self) -> dict[str, list[float]]:
        """Milliseconds of one round, by what was timed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a version has stopped; what it says stands above")
        found: dict[str, list[float]] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(base: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Time two trees in turn.

    Args:
        base: The base's tree.
        rounds: How many rounds count; one more warms up.
        threads: Of torch.

    Returns:
        For each case: medians in milliseconds, their ratio, and quartiles of the ratios of single rounds.
    """
    versions = {"base": Version(base, threads), "this": Version(ROOT, threads)}
    try:
        every = [{name: version.round() for name, version in versions.items()} for _ in range(rounds + 1)][1:]
    finally:
        for version in versions.values():
            version.close()
    result = {}
    for case in every[0]["base"]:
        medians = {name: statistics.median(x for found in every for x in found[name][case]) for name in versions}
        single = [statistics.median(found["this"][case]) / statistics.median(found["base"][case]) for found in every]
        result[case] = {
            "base_ms": round(medians["base"], 4),
            "this_ms": round(medians["this"], 4),
            "ratio": round(medians["this"] / medians["base"], 4),
            "ratio_quartiles": [round(x, 4) for x in statistics.quantiles(single, n=4)],
        }
    return result


def main() -> None:
    """Check the base out, compile it, take turns and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", f"{options.base}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(base), commit], cwd=ROOT, check=True)
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=base, check=True)
            figures = {f"{n} threads": compare(base, options.rounds, n) for n in options.threads}
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True)
    for threads, cases in figures.items():
        for case, found in cases.items():
            print(f"{threads:<10} {case:<24} {found['base_ms']:9.3f} {found['this_ms']:9.3f}  {found['ratio']:.3f}")
    settings = {"base": commit, "rounds": options.rounds, "bits": 3.0, "coding": "scalar", "cases": CASES}
    write_record("paired", settings, figures)


if __name__ == "__main__":
    main()
