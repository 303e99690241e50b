"""Decode attention on the CPU: packed codes beside the dense cache, as one layer and as a whole model.

Every comparison takes turns within one process, so that a disturbance meets both. Memory is measured in a process of
its own for each cache.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from records import write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.cache_utils import DynamicLayer, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import quantcache
from quantcache import Calibration, SpectralCache, accounting
from quantcache.attention.function import spectral_attention_forward
from quantcache.cache.layer import SpectralLayer
from quantcache.data import demo_model_path
from quantcache.evaluation.summaries import quantiles
from quantcache_kernels import cpu
from quantcache_kernels.cpu.library import find


@dataclass(frozen=True)
class Geometry:
    """The attention of one layer.

    Attributes:
        query_heads: Hq.
        heads: Hkv.
        dim: D.
        theta: Base of the rotary embedding.
    """

    query_heads: int
    heads: int
    dim: int
    theta: float

    def config(self, layers: int = 1, positions: int = 65_536) -> LlamaConfig:
        """A Llama with this attention and little else."""
        return LlamaConfig(
            hidden_size=self.query_heads * self.dim,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.heads,
            head_dim=self.dim,
            vocab_size=64,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
        )

    def states(self, heads: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """Random queries, keys or values, ``[1, heads, tokens, D]``."""
        return torch.randn(1, heads, tokens, self.dim).to(dtype)


GEOMETRIES = {
    "llama-8b": Geometry(32, 8, 128, 5e5),
    "smollm2": Geometry(9, 3, 64, 1e5),
    "wiki11m": Geometry(6, 2, 64, 1e4),
}


def qwen_config(positions: int) -> Qwen2Config:
    """The architecture of Qwen2.5-0.5B."""
    return Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_936,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def wiki_config(positions: int) -> PreTrainedConfig:
    """The architecture of wiki11m."""
    config = AutoConfig.from_pretrained(demo_model_path())
    config.max_position_embeddings = positions
    return config


MODELS: dict[str, Callable[[int], PreTrainedConfig]] = {"wiki11m": wiki_config, "qwen2.5-0.5b": qwen_config}


def main() -> None:
    """Measure, print tables and write a record."""
    options = parse_arguments()
    if options.child:
        print(json.dumps(model_run(*options.child, options)))
        return
    if reason := cpu.unavailable(torch.device("cpu")):
        sys.exit(f"error: {reason}")
    metrics: dict[str, Any] = {"attention": {}, "models": {}}
    for threads in options.threads:
        torch.set_num_threads(threads)
        metrics["attention"][f"threads_{threads}"] = attention_suite(options)
    torch.set_num_threads(max(options.threads))
    if "prefill" not in options.skip:
        metrics["encoding"] = encoding_share(options)
    if "models" not in options.skip:
        for name in MODELS:
            for length in options.model_lengths:
                metrics["models"][f"{name}_{length}"] = compare_models(name, length, options)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables(metrics):
        console.print(table)
    settings = {k: v for k, v in vars(options).items() if k != "child"}
    write_record("cpu-decode", {**settings, "level": level_name()}, metrics)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16_384, 32_768], help="cached tokens"
    )
    parser.add_argument("--model-lengths", type=int, nargs="+", default=[8192, 32_768], help="cached tokens, models")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--coding", default="trellis", choices=("scalar", "trellis"), help="new calibrations: trellis")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each rung of the attention ladder")
    parser.add_argument("--steps", type=int, default=24, help="timed decoding steps of a model")
    parser.add_argument("--skip", nargs="*", default=[], choices=("prefill", "models", "quantized"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def level_name() -> str:
    """The instruction set in use."""
    library = find()[0]
    assert library is not None
    return next(name for name, level in library.levels.items() if level == library.level)


# ------------------------------------------------------------------------ attention


def attention_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Every geometry and length with the current number of threads."""
    bandwidth = read_bandwidth()
    found: dict[str, Any] = {"read_gigabytes_per_second": bandwidth, "geometries": {}}
    for name, geometry in GEOMETRIES.items():
        rungs = found["geometries"][name] = {}
        for length in options.lengths:
            rungs[str(length)] = rung = attention_rung(geometry, length, options)
            packed = rung["packed_bytes"] / rung["milliseconds"]["spectral"]["median"] / 1e6
            rung["share_of_read_bandwidth"] = packed / bandwidth["median"]
            print(f"{torch.get_num_threads()} threads, {name}, {length:,} tokens: done", file=sys.stderr)
    return found


def read_bandwidth(megabytes: int = 512, repeats: int = 7) -> dict[str, float]:
    """Gigabytes per second at which all threads together can read memory: a sum over int64."""
    data = torch.ones(megabytes << 17, dtype=torch.int64)
    samples = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        data.sum()
        samples.append(data.nbytes / (time.perf_counter() - started) / 1e9)
    return quantiles(samples[1:])


@torch.inference_mode()
def attention_rung(geometry: Geometry, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One decoding step of one layer over ``length`` cached tokens, each cache in its turn."""
    torch.manual_seed(length)
    calibration = synthetic(geometry.config(), options)
    layer = spectral_layer(geometry, length, torch.float32, calibration)
    steps: dict[str, Callable[[], object]] = {"spectral": transformers_step(layer, geometry, torch.float32)}
    half = spectral_layer(geometry, length, torch.bfloat16, calibration)
    steps["spectral_bfloat16"] = transformers_step(half, geometry, torch.bfloat16)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        steps[f"dense_{name}"] = dense_step(geometry, length, dtype)
        steps[f"sdpa_{name}"] = sdpa_step(geometry, length, dtype)
    problems = {}
    if length == 4096 and "quantized" not in options.skip:
        for backend in ("quanto", "hqq"):
            try:
                steps[f"{backend}_4"] = quantized_step(backend, geometry, length)
            except (ImportError, RuntimeError, ValueError) as error:
                problems[f"{backend}_4"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    samples = take_turns(steps, options.seconds)
    times = {name: quantiles(values) for name, values in samples.items()}
    view = layer.snapshot()
    packed = sum(t[: view.num_blocks].nbytes for s in (view.key, view.value) for t in s.store.buffers.values())
    own = times["spectral"]["median"]
    faster = {name: entry["median"] / own for name, entry in times.items() if not name.startswith("spectral")}
    faster["both_bfloat16"] = times["dense_bfloat16"]["median"] / times["spectral_bfloat16"]["median"]
    return {
        "milliseconds": times,
        "times_faster": faster,
        "not_measured": problems,
        "packed_bytes": packed,
    }


def take_turns(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every step, one after the other until the time is over; the first two rounds are discarded.

    Every round has an order of its own: what a step finds in the processor's caches is what the one before it left
    there, and the one that always came after the longest would always begin cold.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffled = list(steps.items()), random.Random(0)
    began, rounds = time.perf_counter(), 0
    while rounds < 12 or (time.perf_counter() - began < seconds and rounds < 200):
        shuffled.shuffle(order)
        for name, step in order:
            started = time.perf_counter()
            step()
            if rounds >= 2:
                samples[name].append(1e3 * (time.perf_counter() - started))
        rounds += 1
    return samples


def synthetic(config: PreTrainedConfig, options: argparse.Namespace) -> Calibration:
    """Constants of a model's shapes for the codes that are asked for."""
    return Calibration.synthetic(config, bits=options.bits).with_coding(options.coding)


def spectral_layer(geometry: Geometry, length: int, dtype: torch.dtype, calibration: Calibration) -> SpectralLayer:
    """A layer with ``length`` tokens, encoded by the kernels."""
    cache = SpectralCache(calibration, geometry.config(), backend="cpu")
    layer = cache.spectral_layers[0]
    for first in range(0, length, 4096):
        count = min(4096, length - first)
        layer.update(*(geometry.states(geometry.heads, count, dtype) for _ in range(2)))
        layer.flush()
    return layer


def dense_step(geometry: Geometry, length: int, dtype: torch.dtype) -> Callable[[], object]:
    """One step of DynamicCache as transformers runs it: concatenate, then scaled dot-product attention."""
    layer = DynamicLayer()
    layer.update(*(geometry.states(geometry.heads, length, dtype) for _ in range(2)))
    return transformers_step(layer, geometry, dtype)


def transformers_step(layer: Any, geometry: Geometry, dtype: torch.dtype) -> Callable[[], object]:
    """One step of a cache layer as generation makes it: update, attend, and now and then encode a block."""
    query = geometry.states(geometry.query_heads, 1, dtype)
    key, value = (geometry.states(geometry.heads, 1, dtype) for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = geometry.query_heads // geometry.heads
    module.is_causal = True
    attend = spectral_attention_forward if isinstance(layer, SpectralLayer) else sdpa_attention_forward
    return lambda: attend(module, query, *layer.update(key, value), None)


def sdpa_step(geometry: Geometry, length: int, dtype: torch.dtype) -> Callable[[], object]:
    """Attention alone, over keys and values that already lie side by side."""
    query = geometry.states(geometry.query_heads, 1, dtype)
    key, value = (geometry.states(geometry.heads, length, dtype) for _ in range(2))
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def quantized_step(backend: str, geometry: Geometry, length: int) -> Callable[[], object]:
    """One step of transformers' QuantizedCache with 4 bits and its own defaults."""
    cache = QuantizedCache(backend, geometry.config(), nbits=4)
    layer = cache.layers[0]
    layer.update(*(geometry.states(geometry.heads, length, torch.float32) for _ in range(2)))
    return transformers_step(layer, geometry, torch.float32)


# ------------------------------------------------------------------------- encoding


@torch.inference_mode()
def encoding_share(options: argparse.Namespace, tokens: int = 4096) -> dict[str, Any]:
    """What encoding adds to the prefill of a model of Qwen2.5-0.5B's geometry."""
    config = qwen_config(tokens + 1024)
    geometry = Geometry(config.num_attention_heads, config.num_key_value_heads, 64, 1e6)
    torch.manual_seed(0)
    samples = []
    for _ in range(9):
        cache = SpectralCache(synthetic(geometry.config(), options), backend="cpu")
        layer = cache.spectral_layers[0]
        layer.update(*(geometry.states(geometry.heads, 68, torch.float32) for _ in range(2)))
        layer.flush()
        new = [geometry.states(geometry.heads, tokens - 68, torch.float32) for _ in range(2)]
        started = time.perf_counter()
        layer.update(*new)
        layer.flush()
        samples.append(1e3 * config.num_hidden_layers * (time.perf_counter() - started))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    model(input_ids=ids[:, :64], use_cache=True, logits_to_keep=1)
    started = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill = 1e3 * (time.perf_counter() - started)
    encoding = quantiles(samples[2:])
    return {
        "tokens": tokens,
        "encoding_milliseconds": encoding,
        "prefill_milliseconds": prefill,
        "share": encoding["median"] / prefill,
    }


# --------------------------------------------------------------------------- models


def compare_models(name: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Dense and spectral decoding of one model, each in a process of its own."""
    found = {}
    for kind in ("dense", "spectral"):
        command = [sys.executable, __file__, "--child", name, str(length), kind, "--steps", str(options.steps)]
        command += ["--bits", str(options.bits), "--coding", options.coding, "--threads", str(max(options.threads))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found[kind] = {"status": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
        else:
            found[kind] = {"status": "ok", **json.loads(done.stdout)}
        print(f"{name}, {length:,} tokens, {kind}: {found[kind]['status']}", file=sys.stderr)
    return found


@torch.inference_mode()
def model_run(name: str, tokens: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Decoding steps of one model whose cache was filled with random keys and values."""
    torch.set_num_threads(options.threads[0])
    quantcache.register_attention()
    length = int(tokens)
    config = MODELS[name](length + 1024)
    torch.manual_seed(0)
    attention = "sdpa" if kind == "dense" else "spectral"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    cache: Cache
    if kind == "dense":
        cache = DynamicCache(config=config)
    else:
        cache = SpectralCache(synthetic(config, options), config)
    before = peak_resident_bytes()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    for first in range(0, length, 4096):
        shape = (1, config.num_key_value_heads, min(4096, length - first), dim)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, generator=generator) for _ in range(2)), layer)
    samples, ids = [], torch.full((1, 1), 7)
    for number in range(options.steps + 4):
        started = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if number >= 4:
            samples.append(1e3 * (time.perf_counter() - started))
    times = quantiles(samples)
    return {
        "milliseconds": times,
        "tokens_per_second": 1e3 / times["median"],
        "peak_resident_bytes": peak_resident_bytes(),
        "peak_resident_bytes_before_the_cache": before,
        "cache_bytes": accounting.measure(cache).total,
    }


def peak_resident_bytes() -> int:
    """The most memory this process has had; what getrusage says would begin with the parent's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def tables(metrics: dict[str, Any]) -> list[Table]:
    """The measurements for people."""
    result = []
    for threads, suite in metrics["attention"].items():
        for name, rungs in suite["geometries"].items():
            others = sorted({key for rung in rungs.values() for key in rung["times_faster"]})
            table = Table("cached tokens", "spectral, ms", title=f"{name}, {threads}: spectral is so many times faster")
            for other in others:
                table.add_column(other, justify="right")
            table.add_column("of read bandwidth", justify="right")
            for length, rung in rungs.items():
                faster = [rung["times_faster"].get(other) for other in others]
                own = "{median:.3f} ({p20:.3f} to {p80:.3f})".format(**rung["milliseconds"]["spectral"])
                cells = ["" if value is None else f"{value:.2f}" for value in faster]
                table.add_row(f"{int(length):,}", own, *cells, f"{rung['share_of_read_bandwidth']:.1%}")
            result.append(table)
    models = Table("model, cached tokens", "cache", "tokens/s", "cache bytes", "peak bytes", title="Whole models")
    for name, pair in metrics["models"].items():
        for kind, entry in pair.items():
            if entry["status"] != "ok":
                models.add_row(name, kind, entry["status"])
                continue
            sizes = f"{entry['cache_bytes']:,}", f"{entry['peak_resident_bytes']:,}"
            models.add_row(name, kind, f"{entry['tokens_per_second']:.1f}", *sizes)
    return [*result, models]


if __name__ == "__main__":
    main()
