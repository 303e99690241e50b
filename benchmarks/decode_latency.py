"""Time of one decoding step against the number of cached tokens, DynamicCache beside SpectralCache.

The model has the geometry of wiki11m, random weights and room for longer contexts; the calibration is synthetic.
Neither changes how much work a step is. Codes are scalar: cpu_decode.py has the codes of new calibrations too.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from records import write_record
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

import quantcache
from quantcache import Calibration, SpectralCache, accounting
from quantcache.coding.schema import CodecSettings, Coding
from quantcache.data import demo_model_path
from quantcache.evaluation.summaries import quantiles

PREFILL_CHUNK = 512
CODING: Coding = "scalar"


def main() -> None:
    """Measure, print a table and write a record."""
    options = parse_arguments()
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = make_model(max(options.lengths) + 1024, getattr(torch, options.dtype), device)
    calibration = Calibration.synthetic(model.config, bits=options.bits, codec=CodecSettings(coding=CODING))
    makers: dict[str, Callable[[], Cache]] = {
        "dense": lambda: DynamicCache(config=model.config),
        "spectral": lambda: SpectralCache(calibration, model.config, backend=options.backend),
    }
    metrics: dict[str, dict] = {name: {} for name in makers}
    console = Console(stderr=True)
    filled = {name: make() for name, make in makers.items()}
    for length in track(sorted(options.lengths), "timing", console=console, transient=True):
        for cache in filled.values():
            fill(model, cache, length)
        samples = time_steps(model, filled, options.warmup, options.steps)
        for name, cache in filled.items():
            size = accounting.measure(cache).total
            metrics[name][str(length)] = {"milliseconds": quantiles(samples[name]), "cache_bytes": size}
    for per_length in metrics.values():
        times = {int(length): entry["milliseconds"]["median"] for length, entry in per_length.items()}
        per_length["exponent"] = exponent(times)
    Console(width=None if sys.stdout.isatty() else 120).print(table(metrics, sorted(options.lengths)))
    settings = {**vars(options), "coding": CODING, "geometry": "wiki11m", "prefill_chunk": PREFILL_CHUNK, "batch": 1}
    write_record("decode-latency", settings, metrics)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="cached tokens")
    parser.add_argument("--bits", type=float, default=3.0, help="mean code width")
    parser.add_argument("--backend", default="auto", help="auto, cpu, triton, cuda or torch")
    parser.add_argument("--steps", type=int, default=64, help="timed steps of each cache; 64 include one encoding")
    parser.add_argument("--warmup", type=int, default=8, help="steps that are discarded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves them")
    return parser.parse_args()


def make_model(positions: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of wiki11m's geometry with random weights.

    Args:
        positions: How long its contexts may get.
        dtype: Its dtype.
        device: Where it lives.

    Returns:
        The model.
    """
    quantcache.register_attention()
    config = AutoConfig.from_pretrained(demo_model_path())
    config.max_position_embeddings = positions
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="spectral")
    return model.to(device).eval()


@torch.inference_mode()
def step(model: PreTrainedModel, cache: Cache, tokens: torch.Tensor) -> None:
    """Feed tokens ``[1, T]`` and wait until the device is done."""
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if tokens.is_cuda:
        torch.cuda.synchronize()


def fill(model: PreTrainedModel, cache: Cache, length: int) -> None:
    """Bring a cache to a length with random tokens, so that each step is timed with at least that many."""
    generator = torch.Generator().manual_seed(length)
    missing = length - cache.get_seq_length()
    while missing > 0:
        count = min(missing, PREFILL_CHUNK)
        tokens = torch.randint(2, model.config.vocab_size, (1, count), generator=generator)
        step(model, cache, tokens.to(model.device))
        missing -= count


def time_steps(model: PreTrainedModel, filled: dict[str, Cache], warmup: int, steps: int) -> dict[str, list[float]]:
    """Time single-token steps, the caches taking turns so that both see the same disturbances.

    Args:
        model: The model.
        filled: Caches of the length to time; they are left as they are.
        warmup: Steps of each that are discarded.
        steps: Steps of each that are timed.

    Returns:
        Milliseconds of every step.
    """
    caches = {name: copy.deepcopy(cache) for name, cache in filled.items()}
    samples: dict[str, list[float]] = {name: [] for name in caches}
    token = torch.full((1, 1), 7, device=model.device)
    for number in range(warmup + steps):
        for name, cache in caches.items():
            started = time.perf_counter()
            step(model, cache, token)
            if number >= warmup:
                samples[name].append(1e3 * (time.perf_counter() - started))
    return samples


def exponent(times: dict[int, float]) -> float | None:
    """Slope of a straight line through log time against log length.

    Args:
        times: Milliseconds by cached tokens.

    Returns:
        1 for linear growth; None for fewer than two lengths.
    """
    if len(times) < 2:
        return None
    x, y = [math.log(length) for length in times], [math.log(value) for value in times.values()]
    return statistics.linear_regression(x, y).slope


def table(metrics: dict[str, dict], lengths: list[int]) -> Table:
    """The measurements for people."""
    result = Table("cached tokens", title=f"Milliseconds per decoding step, {CODING} codes: median (p20 to p80)")
    for name in metrics:
        result.add_column(name, justify="right")
    result.add_column("cache bytes, spectral / dense", justify="right")
    for length in lengths:
        entries = [metrics[name][str(length)] for name in metrics]
        cells = ["{median:.2f} ({p20:.2f} to {p80:.2f})".format(**entry["milliseconds"]) for entry in entries]
        sizes = {name: metrics[name][str(length)]["cache_bytes"] for name in metrics}
        result.add_row(f"{length:,}", *cells, f"{sizes['spectral'] / sizes['dense']:.3f}")
    exponents = [metrics[name]["exponent"] for name in metrics]
    result.add_row("exponent of growth", *("" if e is None else f"{e:.2f}" for e in exponents), "")
    return result


if __name__ == "__main__":
    main()
