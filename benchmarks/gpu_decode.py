"""The Triton kernels on a GPU: parity, then attention, encoding and whole models beside the dense cache.

Every figure is appended to a file as it comes, under ``$OUT`` if that is set, so that nothing is lost when a run is
cut short; whatever does not fit in ``--minutes`` is listed as not measured. ``--quick`` does parity and three attention
times in four minutes. ``--tiny`` runs every part on small shapes, without a GPU under Triton's interpreter; its figures
mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
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
from gpu_models import model_part
from gpu_run import CONFIGS, Run, encoding, filled_layer, kernels, log_path, measure
from records import ROOT, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quantcache import backends
from quantcache.attention.function import spectral_attention
from quantcache.backends import AttentionCall, trials
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.packing import BLOCK
from quantcache.common.env import environment
from quantcache.evaluation.kernel_check import check_kernels
from quantcache_kernels.triton.runtime import unavailable

PARTS = ("parity", "copy", "attention", "encode", "models", "sweep", "check")
"""All but the last two run unless something else is asked for."""

RUNGS = (
    ("llama-8b", 8, 32_768),
    ("llama-8b", 8, 131_072),
    ("llama-8b", 1, 32_768),
    ("llama-8b", 1, 131_072),
    ("llama-8b", 32, 32_768),
    ("llama-8b", 1, 8192),
    ("llama-8b", 8, 4096),
    ("qwen2.5-7b", 8, 32_768),
    ("gemma-2-9b", 8, 32_768),
    ("qwen2.5-7b", 1, 131_072),
    ("llama-8b", 8, 8192),
    ("llama-8b", 32, 8192),
    ("gemma-2-9b", 1, 32_768),
    ("qwen2.5-7b", 32, 32_768),
    ("llama-8b", 1, 4096),
    ("qwen2.5-7b", 8, 131_072),
    ("gemma-2-9b", 8, 131_072),
    ("llama-8b", 32, 131_072),
    ("qwen2.5-7b", 1, 32_768),
    ("gemma-2-9b", 1, 131_072),
    ("qwen2.5-7b", 8, 4096),
    ("gemma-2-9b", 8, 4096),
    ("gemma-2-9b", 32, 32_768),
    ("llama-8b", 32, 4096),
    ("qwen2.5-7b", 1, 4096),
    ("gemma-2-9b", 1, 4096),
    ("qwen2.5-7b", 32, 131_072),
    ("qwen2.5-7b", 32, 4096),
    ("gemma-2-9b", 32, 4096),
    ("gemma-2-9b", 32, 131_072),
)
"""Model, batch and cached tokens of one layer's step, the most telling first."""

QUICK = RUNGS[:3]

RESERVED = {"encode": 30.0, "models": 150.0}
"""Seconds that attention leaves to parts behind it: it has more to measure than there is time."""


def main() -> None:
    """Check, measure, print a table and write a record."""
    options = parse_arguments()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if reason := unavailable(device) or (None if options.tiny or device.type == "cuda" else "there is no GPU"):
        sys.exit(f"error: {reason}; --tiny proves the script without one")
    until = time.perf_counter() + 60 * options.minutes
    run = Run(device, options.tiny, until, log_path("gpu-decode"), coding=options.coding)
    print(f"figures: {run.log}", file=sys.stderr, flush=True)
    metrics: dict[str, Any] = {"gpu": gpu_state()}
    trials.UNTRIED.add(device.type)  # kernels are timed even if they are wrong; parity and "difference" tell
    run.keep("environment", {**environment(), "gpu": metrics["gpu"], "settings": vars(options)})
    parts: dict[str, Callable[[], Any]] = {
        "parity": lambda: parity(run, options),
        "copy": lambda: copy(run),
        "attention": lambda: list(attention(run, options)),
        "encode": lambda: list(encode(run, options)),
        "sweep": lambda: sweep(run, options),
        "check": lambda: run.keep("check", check_kernels()),
        "models": lambda: [model_part(run, name, options) for name in options.models if run.has_time(name, 60)],
    }
    for name in options.parts:
        try:
            metrics[name] = parts[name]()
        except Exception:  # one part's failure must not cost the others
            metrics[name] = {"status": run.keep("failure", {"part": name, "traceback": traceback.format_exc()})}
            print(metrics[name]["status"]["traceback"], file=sys.stderr, flush=True)
        run.free()
    metrics["kernels"] = run.keep("kernels", kernels())
    metrics["not_measured"] = run.skipped
    if isinstance(metrics.get("attention"), list):
        Console(width=None if sys.stdout.isatty() else 200).print(table(metrics["attention"]))
    unquoted = {"commit": None} if options.tiny else None  # never among the results
    path = write_record("gpu-decode", vars(options), metrics, unquoted)
    if out := os.environ.get("OUT"):
        shutil.copy(path, out)
    print(f"record: {path}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=None, help="8.5, or 4 with --quick")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=None, help=f"of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="parity and three attention times")
    parser.add_argument("--sweep", action="store_true", help="also vary the kernels' settings")
    parser.add_argument("--bits", type=float, nargs="+", default=None, help="3, and without --quick also 2 and 4")
    parser.add_argument("--coding", default="trellis", choices=["scalar", "trellis"])
    parser.add_argument("--rungs", type=int, default=None, help="how many of the attention times, in order")
    parser.add_argument("--models", nargs="+", default=["llama-8b"], choices=list(CONFIGS))
    parser.add_argument("--layers", type=int, default=8, help="of whole models")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="of whole models")
    parser.add_argument("--model-context", type=int, default=16_384)
    parser.add_argument("--parity-only", default=None, help="pytest expression of the parity tests to run")
    parser.add_argument("--parity-seconds", type=float, default=150.0, help="when parity is cut short")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes of the parity suite")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.minutes is None:
        options.minutes = 4.0 if options.quick else 8.5
    if options.parts is None:
        options.parts = ["parity", "attention"] if options.quick else list(PARTS[:-2])
    if options.sweep and "sweep" not in options.parts:
        options.parts.append("sweep")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if options.bits is None:
        options.bits = [3.0] if options.quick or options.tiny else [3.0, 2.0, 4.0]
    if options.tiny:
        options.batches, options.model_context = [1], 140
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


def parity(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """The parity suite on this device: what failed is reported, and stops nothing."""
    chosen = options.parity_only or ("triton and (width3 or through)" if run.tiny else "triton")
    report = run.log.with_name(run.log.stem + "-parity.txt")
    where = "tests/kernels/test_parity.py" if run.tiny else "tests/kernels"
    command = [sys.executable, "-m", "pytest", "-q", where, "-k", chosen, "-m", "not slow"]
    command += ["-p", "no:cacheprovider", "--tb=short", "-rfE", f"--junitxml={report.with_suffix('.xml')}"]
    jobs = 1 if run.tiny else options.jobs
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401

        command += ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    started = time.perf_counter()
    limit = min(options.parity_seconds, max(10.0, run.until - started - 60))
    print(f"parity: at most {limit:.0f} s, output in {report}", file=sys.stderr, flush=True)
    with report.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = f"cut short after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = report.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    seconds = time.perf_counter() - started
    found = {"exit_status": status, "summary": lines[-1], "failed": failed, "seconds": seconds}
    print(f"parity: {found['summary']} ({status})", *failed, sep="\n", file=sys.stderr, flush=True)
    return run.keep("parity", found)


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


@torch.inference_mode()
def attention(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One layer's decoding step: every batch, length and geometry."""
    later = options.parts[options.parts.index("attention") + 1 :]
    reserved = 0.0 if run.tiny else sum(RESERVED.get(part, 0.0) for part in later)
    for name, batch, length in rungs(run, options):
        what = f"attention {name}, batch {batch}, {length} tokens"
        if not run.has_time(what, 12 + reserved):
            continue
        try:
            found = attention_rung(run, name, batch, length, options.bits)
            print(describe(found), file=sys.stderr, flush=True)
            yield run.keep("attention", found)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            run.skip(f"{what}: {type(error).__name__}: {str(error)[:500]}")
        run.free()


def attention_rung(run: Run, name: str, batch: int, length: int, rates: list[float]) -> dict[str, Any]:
    """One step over ``length`` cached tokens of ``batch`` rows."""
    config = run.config(name, 1)
    heads, query_heads = config.num_key_value_heads, config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    query = run.states(batch, query_heads, 1, dim)
    new = [run.states(batch, heads, 1, dim) for _ in range(2)]
    found: dict[str, Any] = {"model": name, "batch": batch, "tokens": length, "milliseconds": {}, "status": {}}

    def time_it(label: str, function: Callable[[], object]) -> None:
        try:
            found["milliseconds"][label] = measure(run, function)
            found["status"][label] = "ok"
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found["status"][label] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"

    for bits in rates:
        layer = filled_layer(run, name, batch, length, bits)
        view = layer.snapshot()
        run.wait()
        started = time.perf_counter()
        refused = backends.find("triton").refuses(query, view, AttentionCall(None, query.shape[3] ** -0.5))
        spectral_attention(query, view, None)
        run.wait()
        found.setdefault("first_call_seconds", time.perf_counter() - started)
        found["status"][f"spectral-{bits:g} kernel"] = (
            "ok" if refused is None else f"declined, plain torch ran: {refused}"
        )
        label = f"spectral-{bits:g}"
        time_it(label, partial(spectral_attention, query, view, None))
        if bits == rates[0]:
            found["kernel_microseconds"] = profile(run, partial(spectral_attention, query, view, None))
            found["difference"] = difference(run, layer, query)
        packed = sum(t.nbytes for s in (view.key, view.value) for t in s.store.slice(0, view.num_blocks).values())
        found.setdefault("packed_bytes", {})[label] = packed
        time_it(f"{label} step", partial(spectral_step, layer, query, new))
        del layer, view
        run.free()
    key, value = (run.states(batch, heads, length, dim) for _ in range(2))
    for label, backend in (("sdpa flash", SDPBackend.FLASH_ATTENTION), ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION)):
        if run.device.type == "cuda":
            with sdpa_kernel(backend):
                time_it(label, partial(sdpa, query, key, value))
    time_it("sdpa", partial(sdpa, query, key, value))
    if flash := flash_decode(query, key, value):
        time_it(*flash)
    dense = DynamicLayer()
    dense.update(key, value)
    del key, value
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = query_heads // heads, True

    def dense_step() -> None:
        sdpa_attention_forward(module, query, *dense.update(*new), None)

    time_it("DynamicCache step", dense_step)
    if run.device.type == "cuda":  # cuDNN, torch's first choice, makes a plan for every new length
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            time_it("DynamicCache step, flash", dense_step)
    return found


def difference(run: Run, layer: SpectralLayer, query: Tensor) -> dict[str, float] | str:
    """How far the kernels are from plain torch on the layer's first blocks, relative to the output."""
    small = layer.fork()
    length = small.get_seq_length()
    small.crop(min(length, small.sink_length + BLOCK * (1 if run.tiny else 16)) - length)
    ours = spectral_attention(query, small.snapshot(), None).float()
    small.backend = "torch"
    theirs = spectral_attention(query, small.snapshot(), None).float()
    relative = float((ours - theirs).norm() / theirs.norm())
    return {"relative": relative} if relative == relative else "not a number"


def profile(run: Run, function: Callable[[], object]) -> dict[str, float] | str:
    """Microseconds of every kernel of a call, as the profiler tells."""
    if run.device.type != "cuda":
        return "no GPU"
    try:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(5):
                function()
            run.wait()
        events = [(e.key[:60], e.device_time_total / 5) for e in profiled.key_averages() if e.device_time_total]
    except Exception as error:  # profiling is often forbidden where a GPU is lent
        return f"{type(error).__name__}: {str(error)[:200]}"
    return dict(sorted(events, key=lambda event: -event[1])[:12])


def spectral_step(layer: SpectralLayer, query: Tensor, new: list[Tensor]) -> None:
    """Update, attend, and now and then encode a block."""
    layer.update(*new)
    spectral_attention(query, layer.snapshot(), None)
    layer.flush()


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over dense keys and values."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def flash_decode(query: Tensor, key: Tensor, value: Tensor) -> tuple[str, Callable[[], object]] | None:
    """A decoding kernel made for the purpose, where one is installed."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    return "flash-attn", lambda: flash_attn_with_kvcache(q, k, v)


# ------------------------------------------------------------------------- encoding


@torch.inference_mode()
def encode(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Encoding of many and of few tokens."""
    for name, tokens in itertools.product(("llama-8b", "gemma-2-9b"), (64,) if run.tiny else (8192, 64)):
        batch = 1
        if not run.has_time(f"encode {name}, {tokens} tokens", 12):
            continue
        layer = filled_layer(run, name, batch, 140, options.bits[0])
        size, calls = encoding(run, layer, batch, tokens)
        found = {"model": name, "batch": batch, "tokens": tokens, "bytes": size}
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
        layer = filled_layer(run, name, batch, length, options.bits[0])
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
    return f"  ms (with the CPU's part): {times}; difference {rung.get('difference')}; {bad or ''}"


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
