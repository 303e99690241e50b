"""Whole models on a GPU: tokens per second, prefill and memory, with the dense cache and with ours."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_run import Run, fill
from transformers import AutoModelForCausalLM, Cache, DynamicCache

import quantcache
from quantcache import SpectralCache, accounting
from quantcache.evaluation.summaries import quantiles


@torch.inference_mode()
def model_part(run: Run, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A model with random weights: tokens per second, prefill, encoding's share, memory."""
    quantcache.register_attention()
    layers = 2 if run.tiny else options.layers
    config = run.config(name, layers)
    with run.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="spectral").eval()
    calibration = run.calibration(name, layers, options.bits[0])
    makers: dict[str, Callable[[], Cache]] = {
        "dense": lambda: DynamicCache(config=config),
        "spectral": lambda: SpectralCache(calibration, config, backend="triton"),
    }
    weights = sum(p.nbytes for p in model.parameters())
    found: dict[str, Any] = {"model": name, "layers": layers, "weights_bytes": weights, "decode": []}
    for batch in options.batches:
        for kind, make in makers.items():
            if not run.has_time(f"{name}, batch {batch}, {kind}", 15):
                continue
            entry: dict[str, Any] = {"kind": kind, "batch": batch, "context": options.model_context}
            try:
                model.set_attn_implementation("sdpa" if kind == "dense" else "spectral")
                entry |= decode_rung(run, name, model, make(), batch, options.model_context)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                entry["status"] = f"{type(error).__name__}: {str(error)[:500]}"
            found["decode"].append(run.keep("decode", {"model": name, "layers": layers, **entry}))
            run.free()
    for tokens in (80,) if run.tiny else (8192, 32_768):
        for kind, make in makers.items():
            if run.has_time(f"{name}, prefill of {tokens} tokens, {kind}", 20):
                model.set_attn_implementation("sdpa" if kind == "dense" else "spectral")
                entry = {"model": name, "layers": layers, "kind": kind, "tokens": tokens}
                try:
                    entry |= prefill_rung(run, model, make, tokens)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    entry["status"] = f"{type(error).__name__}: {str(error)[:500]}"
                found.setdefault("prefill", []).append(run.keep("prefill", entry))
                run.free()
    del model
    run.free()
    return found


def decode_rung(run: Run, name: str, model: torch.nn.Module, cache: Cache, batch: int, context: int) -> dict[str, Any]:
    """Tokens per second behind ``context`` cached tokens."""
    config = model.config
    if isinstance(cache, SpectralCache):
        for layer in cache.spectral_layers:
            fill(run, layer, name, batch, context)
    else:
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            cache.update(*(run.states(batch, config.num_key_value_heads, context, dim) for _ in range(2)), layer)
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


def prefill_rung(run: Run, model: torch.nn.Module, make: Callable[[], Cache], tokens: int) -> dict[str, Any]:
    """A prefill, and a second turn over what it left, with their peaks of memory."""
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
    return found
