"""Compressed caches on a GPU: parity of the kernels, then attention, whole models and encoding beside the dense cache.

Every figure is appended to a file as it comes, under ``$OUT`` if that is set, so that nothing is lost when a run is
cut short; whatever does not fit in ``--minutes`` is listed as not measured. What takes the CPU's time, compiling and
making constants, is done while the CUDA kernels' parity suite runs; that of Triton's takes what is left at the end.
``--quick`` does the former and three attention times. ``--tiny`` runs every part on small shapes, without a GPU under
Triton's interpreter, which ``TRITON_INTERPRET=0`` spares; kernels that cannot run there are said to be unavailable, and
figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

import torch
from gpu_models import layers_of, model_part
from gpu_run import CONFIGS, Run, encoding, filled_layer, kernels, log_path, measure
from gpu_steps import Rung, spectral_attention, variants, warm_up
from records import ROOT, write_record
from rich.console import Console
from rich.table import Table

from quantcache.backends import trials
from quantcache.common.env import environment
from quantcache.evaluation.kernel_check import check_kernels
from quantcache_kernels.cuda import driver
from quantcache_kernels.triton import runtime

PARTS = ("parity", "copy", "attention", "models", "encode", "triton-parity", "sweep", "check")
"""All but the last two run unless something else is asked for."""

RUNGS = (
    ("llama-8b", 8, 32_768),
    ("llama-8b", 1, 32_768),
    ("llama-8b", 8, 4096),
    ("llama-8b", 1, 4096),
    ("qwen2.5-7b", 8, 32_768),
    ("gemma-2-9b", 8, 32_768),
    ("llama-8b", 8, 131_072),
    ("llama-8b", 1, 131_072),
    ("llama-8b", 32, 32_768),
    ("qwen2.5-7b", 1, 32_768),
    ("gemma-2-9b", 1, 32_768),
    ("qwen2.5-7b", 8, 4096),
    ("qwen2.5-7b", 1, 4096),
    ("gemma-2-9b", 8, 4096),
    ("gemma-2-9b", 1, 4096),
    ("qwen2.5-7b", 8, 131_072),
    ("qwen2.5-7b", 1, 131_072),
    ("gemma-2-9b", 1, 131_072),
    ("llama-8b", 32, 4096),
    ("llama-8b", 8, 8192),
    ("llama-8b", 1, 8192),
    ("gemma-2-9b", 8, 131_072),
    ("llama-8b", 32, 131_072),
    ("qwen2.5-7b", 32, 32_768),
    ("gemma-2-9b", 32, 32_768),
    ("qwen2.5-7b", 32, 4096),
    ("gemma-2-9b", 32, 4096),
    ("qwen2.5-7b", 32, 131_072),
    ("gemma-2-9b", 32, 131_072),
)
"""Model, batch and cached tokens of one layer's step, the most telling first."""

QUICK = RUNGS[:3]

RESERVED = {"models": 70.0, "encode": 8.0, "triton-parity": 90.0}
"""Seconds that attention leaves to parts behind it: it has more to measure than there is time."""


def main() -> None:
    """Check, measure, print a table and write a record."""
    options = parse_arguments()
    gc.freeze()  # what imports have left is there to stay: collections between parts need not go over it
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    reason = runtime.unavailable(device) if device.type == "cuda" else "there is no GPU"
    if reason and not options.tiny:
        sys.exit(f"error: {reason}; --tiny proves the script without one")
    until = time.perf_counter() + 60 * options.minutes
    run = Run(device, options.tiny, until, log_path("gpu-decode"), coding=options.coding)
    print(f"figures: {run.log}", file=sys.stderr, flush=True)
    metrics: dict[str, Any] = {"gpu": gpu_state()}
    trials.UNTRIED.add(device.type)  # kernels are timed even if they are wrong; parity and "difference" tell
    metrics["cuda_kernels"] = driver.unavailable(device) or "available"
    run.keep("environment", {**environment(), **metrics, "settings": vars(options)})
    parts: dict[str, Callable[[], Any]] = {
        "parity": lambda: parity(run, options, ["tests/kernels/test_cuda_device.py"], partial(prepare, run, options)),
        "triton-parity": lambda: parity(run, options, triton_tests(run, options)),
        "copy": lambda: copy(run),
        "attention": lambda: list(attention(run, options)),
        "encode": lambda: list(encode(run, options)),
        "sweep": lambda: sweep(run, options),
        "check": lambda: run.keep("check", check_kernels()),
        "models": lambda: [model_part(run, name, options) for name in options.models if run.has_time(name, 20)],
        "kernels": lambda: run.keep("kernels", kernels(run)),
    }
    for name in (*options.parts, "kernels"):
        try:
            metrics[name] = parts[name]()
        except Exception:  # one part's failure must not cost the others
            metrics[name] = {"status": run.keep("failure", {"part": name, "traceback": traceback.format_exc()})}
            print(metrics[name]["status"]["traceback"], file=sys.stderr, flush=True)
        with contextlib.suppress(
            RuntimeError
        ):  # what was measured goes into the record even if the GPU is out of order
            run.free()
    metrics["not_measured"] = run.skipped
    unquoted = {"commit": None} if options.tiny else None  # never among the results
    path = write_record("gpu-decode", vars(options), metrics, unquoted)
    if out := os.environ.get("OUT"):
        shutil.copy(path, out)
    if isinstance(metrics.get("attention"), list):
        Console(width=None if sys.stdout.isatty() else 200).print(table(metrics["attention"]))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=None, help="5, or 2.5 with --quick")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=None, help=f"of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="parity of the CUDA kernels and three attention times")
    parser.add_argument("--sweep", action="store_true", help="also vary the settings of Triton's kernels")
    parser.add_argument("--bits", type=float, nargs="+", default=None, help="3, and without --quick also 2 and 4")
    parser.add_argument("--coding", default="trellis", choices=["scalar", "trellis"])
    parser.add_argument("--rungs", type=int, default=None, help="how many of the attention times, in order")
    parser.add_argument("--thorough", type=int, default=2, help="rungs of them with all bits and codings")
    parser.add_argument("--triton", type=int, default=6, help="rungs of them with Triton's kernels too")
    parser.add_argument("--models", nargs="+", default=["llama-8b"], choices=list(CONFIGS))
    parser.add_argument("--layers", type=int, default=8, help="of whole models")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="of whole models")
    parser.add_argument("--model-contexts", type=int, nargs="+", default=[16_384, 4096])
    parser.add_argument("--parity-only", default=None, help="pytest expression of Triton's parity tests to run")
    parser.add_argument("--parity-seconds", type=float, default=150.0, help="when a parity suite is cut short")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes of a parity suite")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.minutes is None:
        options.minutes = 2.5 if options.quick else 5.0
    if options.parts is None:
        options.parts = ["parity", "attention"] if options.quick else list(PARTS[:-2])
    if options.sweep and "sweep" not in options.parts:
        options.parts.append("sweep")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if options.bits is None:
        options.bits = [3.0] if options.quick or options.tiny else [3.0, 2.0, 4.0]
    if options.tiny:
        options.batches, options.model_contexts = [1], [140]
    return options


def gpu_state() -> dict[str, Any]:
    """Name, clocks and limits as the driver tells them; empty without one."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
        return dict(zip(fields.split(","), (value.strip() for value in line.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}


def triton_tests(run: Run, options: argparse.Namespace) -> list[str]:
    """What pytest is told to run of the suite with Triton's kernels."""
    chosen = options.parity_only or ("triton and (width3 or through)" if run.tiny else "triton")
    names = ("parity",) if run.tiny else ("parity", "triton", "trials", "inputs")
    return [*(f"tests/kernels/test_{name}.py" for name in names), "-k", chosen]


def parity(
    run: Run, options: argparse.Namespace, chosen: list[str], meanwhile: Callable[[], object] | None = None
) -> dict[str, Any]:
    """A parity suite on this device: what failed is reported, and stops nothing.

    Args:
        run: The run.
        options: The command line.
        chosen: What pytest is told to run.
        meanwhile: Is called while it runs.

    Returns:
        What came of it.
    """
    report = run.log.with_name(f"{run.log.stem}-{'parity' if meanwhile else 'triton-parity'}.txt")
    command = [sys.executable, "-m", "pytest", "-v", *chosen, "-m", "not slow", "-p", "no:cacheprovider"]
    command += ["--tb=short", "-rfE", f"--junitxml={report.with_suffix('.xml')}"]
    jobs = 1 if run.tiny else options.jobs
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401

        command += ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    started = time.perf_counter()
    limit = min(options.parity_seconds, max(10.0, run.until - started - 5))
    print(f"parity: at most {limit:.0f} s, output in {report}", file=sys.stderr, flush=True)
    with report.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if meanwhile is not None:
                meanwhile()
            status: int | str = process.wait(timeout=max(1.0, started + limit - time.perf_counter()))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = f"cut short after {limit:.0f} s"
    lines = report.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = lines[-1].strip("= ")
    if isinstance(status, str):
        passed, bad = (sum(word in line for line in lines) for word in (" PASSED ", " FAILED "))
        summary = f"{passed} passed, {bad} failed, then cut short"
    seconds = time.perf_counter() - started
    found = {"tests": " ".join(chosen), "exit_status": status, "summary": summary, "failed": failed, "seconds": seconds}
    print(f"parity: {found['summary']} ({status})", *failed, sep="\n", file=sys.stderr, flush=True)
    return run.keep("parity", found)


def prepare(run: Run, options: argparse.Namespace) -> None:
    """Compile kernels and make constants that later parts need; what fails here is said there."""
    try:
        wanted: dict[str, list[Any]] = {}
        if "attention" in options.parts:
            for number, (name, *_) in enumerate(rungs(run, options)):
                known = wanted.setdefault(name, [])
                known += [each for each in variants_of(run, options, number) if each not in known]
        found: dict[str, Any] = {name: warm_up(run, name, chosen) for name, chosen in wanted.items()}
        if "models" in options.parts:
            for name in options.models:
                run.calibration(name, layers_of(run, options), options.bits[0])
        run.free()
        run.keep("prepared", found)
    except Exception:
        run.keep("prepared", traceback.format_exc())


def copy(run: Run) -> dict[str, Any]:
    """A plain copy, as the ceiling of what memory can do."""
    data = torch.empty((1 << 12) if run.tiny else (1 << 30), dtype=torch.int32, device=run.device)
    target = torch.empty_like(data)
    times = measure(run, lambda: target.copy_(data))
    rate = 2 * data.nbytes / times["median"] / 1e6
    print(f"copy: {rate:.0f} GB/s", file=sys.stderr)
    return run.keep("copy", {"bytes": 2 * data.nbytes, "milliseconds": times, "gigabytes_per_second": rate})


# ------------------------------------------------------------------------ attention


def rungs(run: Run, options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """What attention is timed at."""
    if run.tiny:
        return [("llama-8b", 1, 200), ("gemma-2-9b", 2, 140)][: options.rungs]
    return list(QUICK if options.quick else RUNGS)[: options.rungs]


def variants_of(run: Run, options: argparse.Namespace, number: int) -> list[Any]:
    """What the rung of a number times."""
    return variants(run, options.bits, number < options.thorough, number < options.triton)


@torch.inference_mode()
def attention(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One layer's decoding step: every batch, length and geometry."""
    later = options.parts[options.parts.index("attention") + 1 :]
    reserved = 0.0 if run.tiny else sum(RESERVED.get(part, 0.0) for part in later)
    seen: set[str] = set()
    for number, (name, batch, length) in enumerate(rungs(run, options)):
        what = f"attention {name}, batch {batch}, {length} tokens"
        thorough = number < options.thorough
        if not run.has_time(what, (12 if thorough else 6) + reserved):
            continue
        try:
            rung = Rung(run, name, batch, length)
            for index, variant in enumerate(variants_of(run, options, number)):
                rung.attempt(
                    variant.label,
                    partial(
                        rung.ours, variant, whole=index == 0 and name not in seen, several=number == 0 and index < 2
                    ),
                )
            rung.attempt("dense", partial(rung.dense, thorough))
        except Exception as error:
            run.skip(f"{what}: {type(error).__name__}: {str(error)[:500]}")
            continue
        seen.add(name)
        print(describe(rung.found), file=sys.stderr, flush=True)
        yield run.keep("attention", rung.found)


# ------------------------------------------------------------------------- encoding


@torch.inference_mode()
def encode(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Encoding of many and of few tokens."""
    for name, tokens in itertools.product(("llama-8b", "gemma-2-9b"), (64,) if run.tiny else (8192, 64)):
        batch = 1
        if not run.has_time(f"encode {name}, {tokens} tokens", 5):
            continue
        layer = filled_layer(run, name, batch, 140, options.bits[0], "auto")
        size, calls = encoding(run, layer, batch, tokens)
        found = {
            "model": name,
            "batch": batch,
            "tokens": tokens,
            "bytes": size,
            "backend": layer.state.blocks.layout.name,
        }
        for side, call in calls.items():
            try:
                times = measure(run, call)
                found[side] = times
                found[f"{side}_gigabytes_per_second"] = size / times["median"] / 1e6
            except (RuntimeError, torch.OutOfMemoryError) as error:
                found[side] = f"{type(error).__name__}: {str(error)[:300]}"
        yield run.keep("encode", found)
        run.free()


# ---------------------------------------------------------------------------- sweep


@torch.inference_mode()
def sweep(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """The kernels' settings, one after the other: each keeps the best of those before it."""
    from quantcache_kernels.triton.attention import SETTINGS

    choices: dict[str, tuple[Any, ...]] = {
        "programs_per_processor": (8, 4, 12, 16, 24),
        "registers": (None, 168, 128),
        "warps": (1, 2),
        "stages": (1, 2),
        "least_split": (4, 2, 8, 16),
        "narrow": (True, False),
    }
    found: dict[str, Any] = {"times": [], "best": {}}
    for name, batch, length in rungs(run, options)[:3]:
        layer = filled_layer(run, name, batch, length, options.bits[0], "triton")
        query = run.states(batch, run.config(name, 1).num_attention_heads, 1, layer.tails["key"].shape[3])
        best: dict[str, Any] = {}
        before = vars(SETTINGS).copy()
        call = partial(spectral_attention, query, layer.snapshot(), None)
        for setting, values in choices.items():
            times = {}
            for value in values:
                if not run.has_time(f"sweep {name}, batch {batch}, {length} tokens, {setting}={value}", 15):
                    break
                setattr(SETTINGS, setting, value)
                entry: dict[str, Any] = {"model": name, "batch": batch, "tokens": length, **vars(SETTINGS)}
                try:
                    times[value] = measure(run, call)["median"]
                    entry["milliseconds"] = times[value]
                except Exception as error:
                    entry["status"] = f"{type(error).__name__}: {str(error)[:300]}"
                found["times"].append(run.keep("sweep", entry))
            best[setting] = min(times, key=lambda value: times[value]) if times else before[setting]
            setattr(SETTINGS, setting, best[setting])
        found["best"][f"{name}, batch {batch}, {length} tokens"] = run.keep("best", best)
        print(f"best for {name}, batch {batch}, {length} tokens: {best}", file=sys.stderr, flush=True)
        vars(SETTINGS).update(before)
        del layer, call
        run.free()
    return found


def describe(rung: dict[str, Any]) -> str:
    """One line of what was measured."""
    times = ", ".join(f"{label} {t['median']:.3f} ({t['call']:.3f})" for label, t in rung["milliseconds"].items())
    bad = {label: status for label, status in rung["status"].items() if status != "ok"}
    kernels = {label: us for label, us in rung["kernel_microseconds"].items() if not isinstance(us, str)}
    return f"  ms (with the CPU's part): {times}; difference {rung['difference']}; us: {kernels}; {bad or ''}"


def table(attention: list[dict[str, Any]]) -> Table:
    """Attention for people."""
    result = Table("model", "batch", "tokens", title="One layer's attention, median milliseconds on the GPU")
    labels = list(dict.fromkeys(label for rung in attention for label in rung["milliseconds"]))
    for label in labels:
        result.add_column(label, justify="right")
    for rung in attention:
        times = [rung["milliseconds"].get(label) for label in labels]
        cells = ["" if entry is None else f"{entry['median']:.3f}" for entry in times]
        result.add_row(rung["model"], str(rung["batch"]), f"{rung['tokens']:,}", *cells)
    return result


if __name__ == "__main__":
    main()
