"""One layer's decoding step on a GPU: with the kernels of every backend, and with dense attention at its best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_run import Run, declined, filled_layer, measure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quantcache import backends
from quantcache.attention.function import spectral_attention
from quantcache.backends import BackendName
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import Coding

DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""Kernels of torch that attend on dense keys and values."""

SEVERAL = 5
"""Queries of a step of assisted decoding."""

COMPARED = 8 * 32_768
"""Tokens of all rows that the first rung of a geometry is compared with plain torch on, at most."""


@dataclass(frozen=True)
class Variant:
    """Whose kernels attend on what codes.

    Attributes:
        backend: Whose kernels.
        coding: The codes.
        bits: For each element.
    """

    backend: BackendName
    coding: Coding
    bits: float

    @property
    def label(self) -> str:
        """Its name in records."""
        return f"{self.backend}-{self.bits:g}{' scalar' if self.coding == 'scalar' else ''}"


def variants(run: Run, rates: list[float], thorough: bool, triton: bool) -> list[Variant]:
    """What one rung times, the most telling first.

    Args:
        run: The run.
        rates: Bits; all but the first are for thorough rungs.
        thorough: Whether the other coding is timed, and every rate.
        triton: Whether Triton's kernels are timed.

    Returns:
        The variants.
    """
    first: BackendName = "cuda"
    found = [Variant(first, run.coding, rates[0])]
    if triton:
        found.append(Variant("triton", run.coding, rates[0]))
    if thorough:
        found.append(Variant(first, "scalar" if run.coding == "trellis" else "trellis", rates[0]))
        found += [Variant(first, run.coding, bits) for bits in rates[1:]]
    return found


@torch.inference_mode()
def warm_up(run: Run, name: str, chosen: list[Variant]) -> dict[str, Any]:
    """Compile what a geometry's rungs need and make its constants.

    Args:
        run: The run.
        name: The model.
        chosen: What will be timed.

    Returns:
        By label the seconds that took, encoding included, or why it could not be done.
    """
    found: dict[str, Any] = {}
    for variant in chosen:
        started = time.perf_counter()
        try:
            layer = filled_layer(run, name, 1, 140 if run.tiny else 1000, variant.bits, variant.backend, variant.coding)
            heads, dim = run.config(name, 1).num_attention_heads, layer.tails["key"].shape[3]
            spectral_attention(run.states(1, heads, 1, dim), layer.snapshot(), None)
            run.wait()
            found[variant.label] = time.perf_counter() - started
        except Exception as error:  # said again where it is to be timed
            found[variant.label] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


class Rung:
    """One step over ``length`` cached tokens of ``batch`` rows.

    Args:
        run: The run.
        name: The model.
        batch: Rows.
        length: Tokens.
    """

    def __init__(self, run: Run, name: str, batch: int, length: int):
        config = run.config(name, 1)
        self.run, self.name, self.batch, self.length = run, name, batch, length
        self.heads, self.query_heads = config.num_key_value_heads, config.num_attention_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.query_heads
        self.query = run.states(batch, self.query_heads, 1, self.dim)
        self.new = [run.states(batch, self.heads, 1, self.dim) for _ in range(2)]
        self.found: dict[str, Any] = {"model": name, "batch": batch, "tokens": length}
        self.found |= {key: {} for key in ("milliseconds", "status", "backend", "kernel_microseconds")}
        self.found |= {"difference": {}, "packed_bytes": {}}

    def attempt(self, label: str, part: Callable[[], object]) -> None:
        """Take one part of the rung; a failure is its status and does not cost the others."""
        try:
            part()
        except Exception as error:
            self.found["status"][label] = f"{type(error).__name__}: {str(error)[:300]}"
        self.run.free()

    def time(self, label: str, function: Callable[[], object]) -> None:
        """Keep what a function takes; of a failure its status."""
        status, times = self.found["status"], self.found["milliseconds"]
        try:
            times[label], status[label] = measure(self.run, function), "ok"
        except (RuntimeError, torch.OutOfMemoryError) as error:
            status[label] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"

    def ours(self, variant: Variant, whole: bool, several: bool) -> None:
        """Time a variant: attention, each of its kernels, and the whole step.

        A time that is not the backend's own, because it declined a call, is not kept.

        Args:
            variant: The variant.
            whole: Compare with plain torch on all tokens, as far as :data:`COMPARED` goes.
            several: Time a step of several tokens too.
        """
        run, label, found = self.run, variant.label, self.found
        if reason := backends.find(variant.backend).unavailable(run.device):
            found["status"][label] = f"unavailable: {reason}"
            return
        layer = filled_layer(run, self.name, self.batch, self.length, variant.bits, variant.backend, variant.coding)
        view = layer.snapshot()
        packed = sum(t.nbytes for s in (view.key, view.value) for t in s.store.slice(0, view.num_blocks).values())
        found["packed_bytes"][label] = packed
        attend = partial(spectral_attention, self.query, view, None)
        self.time(label, attend)
        found["kernel_microseconds"][label] = profile(run, attend)
        compared = COMPARED // self.batch if whole else 16 * BLOCK
        found["difference"][label] = difference(layer, variant.backend, self.query, compared)
        labels = [label]
        if several:
            labels.append(f"{label}, {SEVERAL} queries")
            queries = run.states(self.batch, self.query_heads, SEVERAL, self.dim)
            self.time(labels[-1], partial(spectral_attention, queries, view, None))
        labels.append(f"{label} step")
        self.time(labels[-1], partial(spectral_step, layer, self.query, self.new))
        for each in labels:
            found["backend"][each] = variant.backend
        if reason := declined(layer, variant.backend):
            for each in labels:
                found["milliseconds"].pop(each, None)
                found["status"][each] = reason

    def dense(self, thorough: bool) -> None:
        """Time dense attention in every way of asking for it, and transformers' step.

        Args:
            thorough: Also what torch chooses by itself: cuDNN, which makes a plan for every new length.
        """
        run, groups = self.run, self.query_heads // self.heads
        key, value = (run.states(self.batch, self.heads, self.length, self.dim) for _ in range(2))
        folded = self.query.view(self.batch, self.heads, groups, self.dim)
        if run.device.type == "cuda":
            for name, kernel in DENSE.items():
                with sdpa_kernel(kernel):
                    self.time(name, partial(sdpa, self.query, key, value))
                    self.time(f"{name} folded", partial(sdpa, folded, key, value))
        else:
            self.time("sdpa", partial(sdpa, self.query, key, value))
        dense = DynamicLayer()
        dense.update(key, value)
        del key, value
        module = torch.nn.Module()
        module.num_key_value_groups, module.is_causal = groups, True

        def step() -> None:
            sdpa_attention_forward(module, self.query, *dense.update(*self.new), None)

        if run.device.type == "cuda":
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                self.time("DynamicCache step, flash", step)
        if thorough or run.device.type != "cuda":
            self.time("DynamicCache step", step)


def difference(layer: SpectralLayer, backend: str, query: Tensor, tokens: int) -> dict[str, float] | str:
    """How far the kernels are from plain torch on a layer's first tokens, relative to the output."""
    small = layer.fork()
    length = small.get_seq_length()
    whole = (min(length, tokens) - small.sink_length) // BLOCK * BLOCK
    small.crop(small.sink_length + max(BLOCK, whole) - length)
    ours = spectral_attention(query, small.snapshot(), None).float()
    if reason := declined(small, backend):
        return reason
    small.backend = "torch"
    theirs = spectral_attention(query, small.snapshot(), None).float()
    relative = float((ours - theirs).norm() / theirs.norm())
    return {"relative": relative, "tokens": small.get_seq_length()} if relative == relative else "not a number"


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
    """Attention over dense keys and values; heads of a group may be folded into the queries."""
    grouped = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
