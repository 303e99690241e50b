"""The Triton kernels on a GPU: parity first, then attention, encoding and whole models beside the dense cache.

One run takes under nine minutes: whatever does not fit in ``--minutes`` is listed as not measured. ``--tiny`` runs
every part on small shapes, without a GPU under Triton's interpreter; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

import torch
from records import ROOT, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import quantcache
from quantcache import Calibration, SpectralCache, accounting
from quantcache.attention import spectral_attention
from quantcache.cache import SpectralLayer
from quantcache.evaluation.summaries import quantiles
from quantcache_kernels.runtime import unavailable


def llama_config(layers: int = 32, **more: Any) -> LlamaConfig:
    """The architecture of Llama-3.1-8B."""
    size = {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    size |= {"vocab_size": 128_256, "max_position_embeddings": 1 << 20, **more}
    return LlamaConfig(num_hidden_layers=layers, rope_parameters=rope, **size)


def qwen_config(layers: int = 28, **more: Any) -> Qwen2Config:
    """The architecture of Qwen2.5-7B."""
    size = {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28, "num_key_value_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    size |= {"vocab_size": 152_064, "max_position_embeddings": 1 << 20, **more}
    return Qwen2Config(num_hidden_layers=layers, rope_parameters=rope, **size)


CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {"llama-8b": llama_config, "qwen2.5-7b": qwen_config}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@dataclass
class Run:
    """What all parts of a run share.

    Attributes:
        device: The GPU, or the CPU of a tiny run.
        tiny: Whether shapes are small.
        until: When to stop, on the clock of ``time.perf_counter``.
        skipped: What there was no time for.
    """

    device: torch.device
    tiny: bool
    until: float
    skipped: list[str]

    def has_time(self, what: str, seconds: float = 5.0) -> bool:
        """Whether a part still fits; if not, it is noted."""
        if time.perf_counter() + seconds < self.until:
            return True
        self.skipped.append(what)
        return False

    def config(self, name: str, layers: int | None = None) -> PreTrainedConfig:
        """A model's config, of its own size or tiny."""
        more = TINY if self.tiny else {}
        return CONFIGS[name](**({} if layers is None else {"layers": layers}), **more)


def main() -> None:
    """Check, measure, print a table and write a record."""
    options = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := unavailable(device) or (None if options.tiny or device.type == "cuda" else "there is no GPU"):
        sys.exit(f"error: {reason}; --tiny proves the script without one")
    run = Run(device, options.tiny, time.perf_counter() + 60 * options.minutes, [])
    metrics: dict[str, Any] = {"gpu": gpu_state(), "parity": parity(options)}
    print(f"parity: {metrics['parity']['summary']}", file=sys.stderr)
    if metrics["parity"]["exit_status"]:
        sys.exit("error: the kernels differ from the reference; nothing was measured")
    metrics["copy_gigabytes_per_second"] = copy_bandwidth(run)
    metrics["attention"] = list(attention(run, options))
    metrics["models"] = [model_part(run, name, options) for name in CONFIGS if run.has_time(name, 60)]
    metrics["not_measured"] = run.skipped
    Console(width=None if sys.stdout.isatty() else 160).print(table(metrics))
    commit = os.environ.get("QUANTCACHE_COMMIT")  # where the machine has the files but not the repository
    path = write_record("gpu-decode", {**vars(options), "commit_given": commit}, metrics)
    print(f"record: {path.relative_to(ROOT)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072, 8192, 4096, 16_384, 65_536])
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 2.0, 4.0])
    parser.add_argument("--model-context", type=int, default=16_384)
    parser.add_argument("--skip-parity", action="store_true", help="for profiling; the record says so")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.batches, options.lengths, options.bits, options.model_context = [1], [140], [3.0], 80
    return options


def gpu_state() -> dict[str, Any]:
    """Name, clocks and limits as the driver tells them; empty without one."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in line.split(",")), strict=True))


def parity(options: argparse.Namespace) -> dict[str, Any]:
    """The parity suite on this device."""
    if options.skip_parity:
        return {"exit_status": 0, "summary": "skipped", "seconds": 0.0}
    chosen = "triton and (width3 or through)" if options.tiny else "triton"
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines() or ["no output"]
    seconds = time.perf_counter() - started
    return {"exit_status": done.returncode, "summary": lines[-1], "seconds": seconds}


def measure(run: Run, function: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a function: median, 20th and 80th percentile."""
    if run.device.type != "cuda":
        started = time.perf_counter()
        function()
        return quantiles([1e3 * (time.perf_counter() - started)])
    from triton.testing import do_bench

    median, p20, p80 = do_bench(function, warmup=20, rep=80, quantiles=[0.5, 0.2, 0.8])
    return {"median": median, "p20": p20, "p80": p80}


def copy_bandwidth(run: Run) -> dict[str, float]:
    """Bytes read and written per second by a plain copy."""
    data = torch.empty((1 << 12) if run.tiny else (1 << 30), dtype=torch.int32, device=run.device)
    target = torch.empty_like(data)
    times = measure(run, lambda: target.copy_(data))
    return {name: 2 * data.nbytes / value / 1e6 for name, value in times.items() if name != "n"}


# ------------------------------------------------------------------------ attention


@torch.inference_mode()
def attention(run: Run, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One layer's decoding step: every batch, length and geometry, the most telling ones first."""
    for batch in options.batches:
        for length in options.lengths:
            for name in CONFIGS:
                what = f"attention {name}, batch {batch}, {length} tokens"
                if not run.has_time(what, 12 + 60 * len(CONFIGS)):
                    continue
                print(what, file=sys.stderr)
                try:
                    yield attention_rung(run, name, batch, length, options.bits)
                except torch.OutOfMemoryError:
                    run.skipped.append(f"{what}: out of memory")
                free(run)


def attention_rung(run: Run, name: str, batch: int, length: int, rates: list[float]) -> dict[str, Any]:
    """One step over ``length`` cached tokens of ``batch`` rows."""
    config = run.config(name, layers=1)
    heads, query_heads = config.num_key_value_heads, config.num_attention_heads
    dim = config.hidden_size // query_heads
    query = states(run, batch, query_heads, 1, dim)
    new = [states(run, batch, heads, 1, dim) for _ in range(2)]
    found: dict[str, Any] = {"model": name, "batch": batch, "tokens": length, "milliseconds": {}, "status": {}}

    def time_it(label: str, function: Callable[[], object]) -> None:
        try:
            found["milliseconds"][label] = measure(run, function)
            found["status"][label] = "ok"
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found["status"][label] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    for bits in rates:
        layer = filled_layer(run, config, batch, length, bits)
        view = layer.snapshot()
        started = time.perf_counter()
        spectral_attention(query, view, None)
        synchronize(run)
        found.setdefault("first_call_seconds", time.perf_counter() - started)
        time_it(f"spectral-{bits:g}", partial(spectral_attention, query, view, None))
        time_it(f"spectral-{bits:g} step", partial(spectral_step, layer, query, new))
        packed = sum(t[: view.num_blocks].nbytes for s in (view.key, view.value) for t in s.store.buffers.values())
        found.setdefault("packed_bytes", {})[f"spectral-{bits:g}"] = packed
        if bits == rates[0]:
            encode = states(run, batch, heads, min(length, 8192) // 64 * 64, dim)
            time_it("encode 8K of one side", partial(encode_blocks, layer, encode))
        del layer, view
        free(run)
    key, value = (states(run, batch, heads, length, dim) for _ in range(2))
    backends = {"sdpa": None, "sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    for label, backend in backends.items():
        if backend is None:
            time_it(label, lambda: sdpa(query, key, value))
        else:
            with sdpa_kernel(backend):
                time_it(label, lambda: sdpa(query, key, value))
    if flash := flash_decode(query, key, value):
        time_it(*flash)
    dense = DynamicLayer()
    dense.update(key, value)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = query_heads // heads, True

    time_it("DynamicCache step", lambda: sdpa_attention_forward(module, query, *dense.update(*new), None))
    return found


def states(run: Run, batch: int, heads: int, tokens: int, dim: int) -> Tensor:
    """Random queries, keys or values ``[B, H, T, D]``."""
    return torch.randn(batch, heads, tokens, dim, device=run.device, dtype=torch.bfloat16)


def filled_layer(run: Run, config: PreTrainedConfig, batch: int, length: int, bits: float) -> SpectralLayer:
    """A layer with ``length`` encoded tokens, filled piece by piece."""
    cache = SpectralCache(Calibration.synthetic(config, bits=bits), config, backend="triton")
    layer = cache.spectral_layers[0]
    dim = config.hidden_size // config.num_attention_heads
    for first in range(0, length, 8192):
        count = min(8192, length - first)
        layer.update(*(states(run, batch, config.num_key_value_heads, count, dim) for _ in range(2)))
        layer.finish()
    return layer


def spectral_step(layer: SpectralLayer, query: Tensor, new: list[Tensor]) -> None:
    """Update, attend, and now and then encode a block."""
    layer.update(*new)
    spectral_attention(query, layer.snapshot(), None)
    layer.finish()


def encode_blocks(layer: SpectralLayer, x: Tensor) -> None:
    """Encode keys as new blocks, without keeping them."""
    from quantcache import backends

    n = x.shape[2] // 64
    index = torch.arange(n, device=x.device, dtype=torch.int32)
    places = torch.stack((4 + 64 * index, torch.full_like(index, 64), 4 + 128 * (index // 2)), dim=1)
    codec = layer.codecs["key"]
    assert codec is not None
    backends.encode(codec, x, places, None, "triton")


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


# --------------------------------------------------------------------------- models


@torch.inference_mode()
def model_part(run: Run, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A whole model with random weights: prefill, encoding's share, tokens per second, memory."""
    quantcache.register_attention()
    config = run.config(name, layers=2 if run.tiny else None)
    with run.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="spectral").eval()
    calibration = Calibration.synthetic(config, bits=options.bits[0])
    makers: dict[str, Callable[[], Cache]] = {
        "dense": lambda: DynamicCache(config=config),
        "spectral": lambda: SpectralCache(calibration, config, backend="triton"),
    }
    found: dict[str, Any] = {"model": name, "weights_bytes": sum(p.nbytes for p in model.parameters()), "decode": []}
    for batch in sorted(options.batches):
        for kind, make in makers.items():
            what = f"{name}, batch {batch}, {kind}"
            if not run.has_time(what, 15):
                continue
            print(what, file=sys.stderr)
            try:
                model.set_attn_implementation("sdpa" if kind == "dense" else "spectral")
                found["decode"].append(decode_rung(run, model, make(), batch, options.model_context, kind))
            except torch.OutOfMemoryError:
                found["decode"].append({"kind": kind, "batch": batch, "status": "out of memory"})
            free(run)
    if run.has_time(f"{name}, prefill", 20):
        found["prefill"] = prefill_rung(run, model, makers)
    del model
    free(run)
    return found


def decode_rung(run: Run, model: torch.nn.Module, cache: Cache, batch: int, context: int, kind: str) -> dict[str, Any]:
    """Tokens per second behind ``context`` random cached tokens."""
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    for first in range(0, context, 4096):
        count = min(4096, context - first)
        for layer in range(config.num_hidden_layers):
            cache.update(*(states(run, batch, config.num_key_value_heads, count, dim) for _ in range(2)), layer)
    ids = torch.full((batch, 1), 7, device=run.device)
    before, samples = reset_peak(run), []
    warmup, steps = (0, 1) if run.tiny else (4, 16)
    for number in range(warmup + steps):
        synchronize(run)
        started = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        synchronize(run)
        if number >= warmup:
            samples.append(1e3 * (time.perf_counter() - started))
    times = quantiles(samples)
    memory = accounting.measure(cache).total
    per_token = memory / context
    free_bytes = torch.cuda.mem_get_info()[0] + memory if run.device.type == "cuda" else 0
    return {
        "kind": kind,
        "batch": batch,
        "context": context,
        "status": "ok",
        "milliseconds": times,
        "tokens_per_second": 1e3 * batch / times["median"],
        "cache_bytes": memory,
        "peak_bytes_of_a_step": peak(run) - before,
        "context_that_fits_predicted": int(free_bytes / per_token),
    }


def prefill_rung(run: Run, model: torch.nn.Module, makers: dict[str, Callable[[], Cache]]) -> dict[str, Any]:
    """Prefill of 8K tokens with either cache, and a second chunk over the compressed past with its peak memory."""
    tokens = 80 if run.tiny else 8192
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=run.device)
    found: dict[str, Any] = {"tokens": tokens}
    for kind, make in makers.items():
        model.set_attn_implementation("sdpa" if kind == "dense" else "spectral")
        samples = []
        for _ in range(1 if run.tiny else 4):
            cache = make()
            synchronize(run)
            started = time.perf_counter()
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            synchronize(run)
            samples.append(1e3 * (time.perf_counter() - started))
        found[f"{kind}_milliseconds"] = quantiles(samples[-3:])
        before = reset_peak(run)
        model(input_ids=ids[:, :64], past_key_values=cache, use_cache=True, logits_to_keep=1)
        found[f"{kind}_peak_bytes_of_a_second_chunk"] = peak(run) - before
        del cache
        free(run)
    return found


def synchronize(run: Run) -> None:
    """Wait for the device."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(run: Run) -> int:
    """Forget the peak of memory; what is allocated now."""
    if run.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(run: Run) -> int:
    """The most memory allocated since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0


def free(run: Run) -> None:
    """Give memory back."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def table(metrics: dict[str, Any]) -> Table:
    """Attention for people."""
    result = Table("model", "batch", "tokens", title="One layer's attention, median milliseconds")
    labels = list(dict.fromkeys(label for rung in metrics["attention"] for label in rung["milliseconds"]))
    for label in labels:
        result.add_column(label, justify="right")
    for rung in metrics["attention"]:
        times = [rung["milliseconds"].get(label) for label in labels]
        cells = ["" if entry is None else f"{entry['median']:.3f}" for entry in times]
        result.add_row(rung["model"], str(rung["batch"]), f"{rung['tokens']:,}", *cells)
    return result


if __name__ == "__main__":
    main()
