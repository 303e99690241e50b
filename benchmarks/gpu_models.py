"""Whole models on a GPU: steps, ``generate``, CUDA graphs, prefill and memory, with the dense cache and with ours."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_run import Run, encoding, fill, measure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Cache, DynamicCache

import quantcache
from quantcache import DecodeGraph, SpectralCache, accounting, backends
from quantcache.backends import BackendName
from quantcache.coding.packing import BLOCK
from quantcache.common.errors import GraphCaptureError
from quantcache.evaluation.summaries import quantiles

KINDS: dict[str, tuple[str, BackendName | None]] = {
    "dense": ("sdpa", None),
    "dense, flash": ("sdpa", None),
    "spectral": ("spectral", "auto"),
    "spectral-cuda": ("spectral", "cuda"),
    "spectral-triton": ("spectral", "triton"),
}
"""Kind of cache, the attention that it needs and the backend that it asks for.

As torch runs dense attention by default, with cuDNN, each step makes a plan for its length; "dense, flash" is without.
"""

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Flash, and where a mask keeps that from running, the next best."""


def layers_of(run: Run, options: argparse.Namespace) -> int:
    """How many layers a model has."""
    return 1 if run.tiny else int(options.layers)


def rungs(run: Run, options: argparse.Namespace) -> list[tuple[str, str, dict[str, int]]]:
    """What a model is timed at, the most telling first: part, kind and sizes."""
    sizes = [{"batch": n, "context": length} for length in options.model_contexts for n in options.batches]
    first = sizes[: len(options.batches)]
    chosen = chosen_by_auto(run)
    ours = ["spectral"] if chosen == "cuda" else ["spectral", "spectral-cuda"]
    graphed = "spectral" if chosen == "cuda" else "spectral-cuda"
    found = [("decode", kind, what) for what in first for kind in ("dense, flash", *ours)]
    found += [("graph", graphed, what) for what in first]
    found += [("decode", kind, what) for what in sizes[len(first) :] for kind in ("dense, flash", *ours)]
    found += [("graph", graphed, what) for what in sizes[len(first) :]]
    found += [("generate", kind, what) for what in first for kind in ("dense, flash", *ours)]
    for tokens in (80,) if run.tiny else (8192, 32_768):
        found += [("prefill", kind, {"tokens": tokens}) for kind in ("dense", *ours)]
    found += [("decode", "dense", what) for what in sizes]
    found += [("decode", "spectral-triton", what) for what in first if chosen != "triton"]
    return found


def chosen_by_auto(run: Run) -> str:
    """The backend that is tried first on the device and can run there."""
    tried = backends.FASTEST_FIRST.get(run.device.type, ())
    return next((each.name for each in tried if each.unavailable(run.device) is None), backends.REFERENCE.name)


@torch.inference_mode()
def model_part(run: Run, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A model with random weights: tokens per second, CUDA graphs, prefill, encoding's share, memory."""
    quantcache.register_attention()
    layers = layers_of(run, options)
    config, calibration = run.config(name, layers), run.calibration(name, layers, options.bits[0])
    with run.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="spectral").eval()
    functions = {"decode": decode_rung, "graph": graph_rung, "generate": generate_rung, "prefill": prefill_rung}
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in functions}

    def attempt(part: str, kind: str, what: dict[str, int]) -> None:
        """Keep one figure; of a failure its status."""
        if not run.has_time(f"{name}, {part}, {kind}, " + ", ".join(f"{key} {n}" for key, n in what.items()), 8):
            return
        entry = {"model": name, "layers": layers, "kind": kind, **what}
        attention, backend = KINDS[kind]
        caches: list[Cache] = []

        def make() -> Cache:
            made = DynamicCache(config=config) if backend is None else None
            caches[:] = [made or SpectralCache(calibration, config, backend=backend)]
            return caches[0]

        flash = kind.endswith("flash") and run.device.type == "cuda"
        try:
            model.set_attn_implementation(attention)
            with sdpa_kernel(WITHOUT_PLANS) if flash else contextlib.nullcontext():
                entry |= functions[part](run, name, model, make, **what)
            if backend is not None and caches:
                entry["backends"] = reports(caches[0])
        except Exception as error:  # a compiler may fail with anything, and the next figure may not
            entry["status"] = f"{type(error).__name__}: {str(error)[:500]}"
        figure = entry.get("tokens_per_second") or entry.get("milliseconds", {}).get("median")
        print(f"  {entry['status']}: {figure} {entry.get('backends', '')}", file=sys.stderr, flush=True)
        parts[part].append(run.keep(part, entry))
        caches.clear()
        run.free()

    for part, kind, what in rungs(run, options):
        attempt(part, kind, what)
    weights = sum(p.nbytes for p in model.parameters())
    return {"model": name, "layers": layers, "weights_bytes": weights, **parts}


def reports(cache: Cache) -> list[str]:
    """What the layers of a compressed cache say of their backends, each text once."""
    assert isinstance(cache, SpectralCache)
    return list(dict.fromkeys(str(layer.backend_report()) for layer in cache.spectral_layers))


def filled_cache(run: Run, name: str, model: Any, make: Callable[[], Cache], batch: int, context: int) -> Cache:
    """A cache of some ``context`` tokens that no model has seen."""
    cache, config = make(), model.config
    if isinstance(cache, SpectralCache):
        for layer in cache.spectral_layers:
            fill(run, layer, name, batch, context)
        return cache
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(*(run.states(batch, config.num_key_value_heads, context, dim) for _ in range(2)), layer)
    return cache


def decode_rung(run: Run, name: str, model: Any, make: Callable[[], Cache], batch: int, context: int) -> dict[str, Any]:
    """Tokens per second behind ``context`` cached tokens, step by step."""
    cache = filled_cache(run, name, model, make, batch, context)
    ids = torch.full((batch, 1), 7, device=run.device)
    samples: list[float] = []
    warmup, steps = (0, 1) if run.tiny else (4, 68)  # one of 64 steps encodes a block in every layer
    before = 0
    for number in range(warmup + steps):
        if number == warmup:
            before = run.reset_peak()
        run.wait()
        started = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        run.wait()
        if number >= warmup:
            samples.append(1e3 * (time.perf_counter() - started))
    times = quantiles(samples)
    memory = accounting.measure(cache).total
    free_bytes = torch.cuda.mem_get_info()[0] + memory if run.device.type == "cuda" else 0
    return {
        "status": "ok",
        "milliseconds": times,
        "slowest_milliseconds": max(samples),
        "tokens_per_second": 1e3 * batch / times["mean"],
        "cache_bytes": memory,
        "peak_bytes_of_a_step": run.peak() - before,
        "context_that_fits_predicted": int(free_bytes / (memory / context)),
    }


def generate_rung(
    run: Run, name: str, model: Any, make: Callable[[], Cache], batch: int, context: int
) -> dict[str, Any]:
    """Tokens per second of ``model.generate``, whose prompt is cached but for its last token."""
    cache = filled_cache(run, name, model, make, batch, context)
    model.generation_config.eos_token_id = None  # random weights may say anything
    seconds = 0.0
    for count in (1, 2) if run.tiny else (4, 68):  # the first warms up; one of 64 steps encodes a block in every layer
        prompt = torch.full((batch, cache.get_seq_length() + 1), 7, device=run.device)
        run.wait()
        started = time.perf_counter()
        text = model.generate(prompt, past_key_values=cache, max_new_tokens=count, do_sample=False)
        run.wait()
        seconds = time.perf_counter() - started
        if text.shape[1] != prompt.shape[1] + count:
            raise RuntimeError(f"{text.shape[1] - prompt.shape[1]} new tokens instead of {count}")
    return {
        "status": "ok",
        "new_tokens": count,
        "milliseconds_a_token": 1e3 * seconds / count,
        "tokens_per_second": batch * count / seconds,
    }


def graph_rung(run: Run, name: str, model: Any, make: Callable[[], Cache], batch: int, context: int) -> dict[str, Any]:
    """Steps of a :class:`DecodeGraph`, the encoding of a block included: their time, or why they cannot be had."""
    if run.device.type != "cuda":
        return {"status": "unsupported: CUDA graphs need a GPU"}
    cache = filled_cache(run, name, model, make, batch, context)
    assert isinstance(cache, SpectralCache)
    ids = torch.full((batch, 1), 7, device=run.device)
    plain, step = cache.fork(), DecodeGraph(model, cache)
    given = {"input_ids": ids, "past_key_values": plain, "use_cache": True}
    expected = [model(**given).logits.clone() for _ in range(BLOCK + 4)]
    try:  # as it is, captured, and replayed until a block has been encoded
        found = [step(ids).clone() for _ in range(BLOCK + 4)]
    except GraphCaptureError as error:
        return {"status": f"unsupported: {error}"}
    for two in (slice(2, 4), slice(-2, None)):
        if reason := repeats(expected[two], found[two]):
            return {"status": f"unsupported: {reason}"}
    samples = []
    for _ in range(68):
        run.wait()
        started = time.perf_counter()
        step(ids)
        run.wait()
        samples.append(1e3 * (time.perf_counter() - started))
    times = quantiles(samples)
    return {
        "status": "ok",
        "milliseconds": times,
        "slowest_milliseconds": max(samples),
        "tokens_per_second": 1e3 * batch / times["mean"],
    }


def repeats(expected: list[Tensor], replayed: list[Tensor]) -> str | None:
    """Why replays of a captured step are of no use.

    Args:
        expected: Logits of two steps as the model takes them.
        replayed: Logits of two replays.

    Returns:
        The reason, None if replays go on as the model does.
    """
    between = float((expected[1] - expected[0]).float().norm())
    first, second = (float((a - b).float().norm()) for a, b in zip(expected, replayed, strict=True))
    if not first < between / 2:
        return f"a captured step gives other logits, by {first:.3g}, where two steps differ by {between:.3g}"
    if not second < between / 2:
        return "a replay repeats the captured step: the host decides how long the cache is (kernels/cuda.md)"
    return None


def prefill_rung(run: Run, name: str, model: Any, make: Callable[[], Cache], tokens: int) -> dict[str, Any]:
    """A prefill, and a second turn over what it left, with their peaks of memory; what of it encoding takes."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=run.device)
    samples, peaks = [], []
    for _ in range(1 if run.tiny else 3):
        cache = make()
        before = run.reset_peak()
        started = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        run.wait()
        samples.append(1e3 * (time.perf_counter() - started))
        peaks.append(run.peak() - before)
    found: dict[str, Any] = {
        "status": "ok",
        "first_milliseconds": samples[0],
        "milliseconds": quantiles(samples[1:] or samples),
        "peak_bytes": max(peaks),
    }
    second = ids[:, : 64 if run.tiny else 1024]
    before = run.reset_peak()
    started = time.perf_counter()
    model(input_ids=second, past_key_values=cache, use_cache=True, logits_to_keep=1)
    run.wait()
    found["second_turn"] = {
        "tokens": second.shape[1],
        "milliseconds": 1e3 * (time.perf_counter() - started),
        "peak_bytes": run.peak() - before,
    }
    if isinstance(cache, SpectralCache):
        layers = cache.spectral_layers
        _, calls = encoding(run, layers[0], 1, tokens - tokens % BLOCK)
        found["encode_milliseconds"] = len(layers) * sum(measure(run, call)["median"] for call in calls.values())
        found["encode_share"] = found["encode_milliseconds"] / found["milliseconds"]["median"]
    return found
