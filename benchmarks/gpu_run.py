"""What the parts of the GPU benchmark share: the time left, figures kept as they come, and how times are taken."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from realistic import realistic_calibration
from records import SCRATCH
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from quantcache import Calibration, SpectralCache
from quantcache.backends import BackendName
from quantcache.backends.spans import block_table_of, next_spans
from quantcache.backends.store import BlockStore
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES, Coding
from quantcache.common.jsonfile import to_json
from quantcache.evaluation.summaries import quantiles
from quantcache_kernels.cuda import codes as cuda_codes
from quantcache_kernels.cuda import encoding as cuda_encoding
from quantcache_kernels.cuda.driver import LOCAL, REGISTERS, unavailable


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


def gemma_config(layers: int = 42, **more: Any) -> Gemma2Config:
    """The geometry of Gemma-2-9B, full attention in every layer and no soft cap, which the rivals lack."""
    size = {"hidden_size": 3584, "intermediate_size": 14_336, "num_attention_heads": 16, "num_key_value_heads": 8}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    size |= {"vocab_size": 256_000, "max_position_embeddings": 1 << 20, "head_dim": 256, **more}
    types = ["full_attention"] * layers
    return Gemma2Config(num_hidden_layers=layers, rope_parameters=rope, layer_types=types, **size)


CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama-8b": llama_config,
    "qwen2.5-7b": qwen_config,
    "gemma-2-9b": gemma_config,
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
TINY_GEMMA = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@dataclass
class Run:
    """One run of the benchmark.

    Attributes:
        device: The GPU, or the CPU of a tiny run.
        tiny: Whether shapes are small.
        until: When to stop, on the clock of ``time.perf_counter``.
        log: File that every figure is appended to as soon as it is there.
        skipped: What there was no time for, or what failed.
        calibrations: Those made so far.
        coding: ``"scalar"`` or ``"trellis"``.
    """

    device: torch.device
    tiny: bool
    until: float
    log: Path
    skipped: list[str] = field(default_factory=list)
    calibrations: dict[Any, Calibration] = field(default_factory=dict)
    coding: Coding = "trellis"

    def keep(self, kind: str, figures: Any) -> Any:
        """Append figures to the log, so that whatever ends the run leaves them, and give them back."""
        line = to_json({"kind": kind, "seconds": time.perf_counter(), "figures": figures})
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(json.loads(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return figures

    def has_time(self, what: str, seconds: float = 5.0) -> bool:
        """Whether a part still fits; if not, it is noted."""
        if time.perf_counter() + seconds < self.until:
            print(f"[{self.until - time.perf_counter():.0f} s left] {what}", file=sys.stderr, flush=True)
            return True
        self.skip(f"{what}: no time")
        return False

    def skip(self, what: str) -> None:
        """Note what is not measured."""
        print(f"not measured: {what}", file=sys.stderr, flush=True)
        self.skipped.append(self.keep("not measured", what))

    def config(self, name: str, layers: int | None = None) -> PreTrainedConfig:
        """A model's config, of its own size or tiny."""
        more = (TINY | (TINY_GEMMA if name.startswith("gemma") else {})) if self.tiny else {}
        return CONFIGS[name](**({} if layers is None else {"layers": layers}), **more)

    def calibration(self, name: str, layers: int, bits: float, coding: Coding | None = None) -> Calibration:
        """A realistic calibration, made once; of the run's coding unless another is named."""
        key = (name, layers, bits, coding := coding or self.coding)
        if key not in self.calibrations:
            made = realistic_calibration(self.config(name, layers), bits)
            self.calibrations[key] = made.with_coding(coding)
        return self.calibrations[key]

    def states(self, batch: int, heads: int, tokens: int, dim: int) -> Tensor:
        """Random queries, keys or values ``[B, H, T, D]``."""
        return torch.randn(batch, heads, tokens, dim, device=self.device, dtype=torch.bfloat16)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def reset_peak(self) -> int:
        """Forget the peak of memory; what is allocated now."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most memory allocated since :meth:`reset_peak`."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0


def log_path(name: str) -> Path:
    """A new file for figures: in the folder ``$OUT`` where there is one, else among what is not quoted."""
    folder = Path(os.environ.get("OUT") or SCRATCH)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.jsonl"


def measure(run: Run, function: Callable[[], object], seconds: float = 0.15) -> dict[str, Any]:
    """Milliseconds of a function.

    Args:
        run: The run.
        function: The function.
        seconds: About how long to repeat it.

    Returns:
        A summary of what the GPU takes, with its caches cold: it is kept busy until the CPU has launched everything.
        ``call`` is what a call takes when calls follow each other, the CPU's part included.
    """
    if run.device.type != "cuda":
        started = time.perf_counter()
        function()
        elapsed = 1e3 * (time.perf_counter() - started)
        return {**quantiles([elapsed]), "call": elapsed}
    function()
    run.wait()
    started, calls = time.perf_counter(), 0
    while calls < 3 or (time.perf_counter() - started < seconds / 2 and calls < 200):
        function()
        calls += 1
        if calls % 8 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    call = 1e3 * (time.perf_counter() - started) / calls
    flushed = torch.empty(1 << 26, dtype=torch.int32, device=run.device)  # larger than any L2
    count = int(min(50, max(5, 1e3 * seconds / max(call, 0.05))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        flushed.zero_()
        torch.cuda._sleep(3_000_000)  # some 1.7 ms, in which the CPU launches what is timed
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return {**quantiles([begin.elapsed_time(end) for begin, end in events]), "call": call}


def filled_layer(
    run: Run, name: str, batch: int, length: int, bits: float, backend: BackendName, coding: Coding | None = None
) -> SpectralLayer:
    """One layer of a model with at least ``length`` tokens, all but the last 64 of them encoded, to random codes."""
    config = run.config(name, 4)
    cache = SpectralCache(run.calibration(name, 4, bits, coding), config, backend=backend)
    filled = cache.spectral_layers[0]
    fill(run, filled, name, batch, length)
    return filled


def fill(run: Run, layer: SpectralLayer, name: str, batch: int, length: int) -> None:
    """Fill a layer: a first block through the encoder, then random codes. Any word is a code and any byte a gain."""
    config = run.config(name, 1)
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = layer.sink_length + BLOCK + layer.residual_length
    layer.update(*(run.states(batch, heads, tokens, dim) for _ in range(2)))
    layer.flush()
    assert layer.spans
    count = max(1, (length - layer.sink_length - layer.residual_length) // BLOCK)
    spans, stores, blocks = next_spans(None, layer.sink_length, count), {}, layer.state.blocks
    for side in SIDES:
        codec, low = layer.codecs[side], -(1 << 31)
        assert isinstance(codec, SpectralCodec)
        codes = torch.randint(low, -low - 1, (count, batch, codec.num_words), dtype=torch.int32, device=run.device)
        gains = torch.randint(100, 150, (count, batch, heads, BLOCK), dtype=torch.uint8, device=run.device)
        stores[side] = BlockStore(count, blocks.layout.from_portable(codec, {"codes": codes, "gains": gains}))
    table = BlockStore(count, {"block_table": block_table_of(spans, layer.device)})
    layer._put(layer.state.changed(blocks=blocks._replace(spans=spans, stores=stores, table=table)))


def encoding(run: Run, layer: SpectralLayer, batch: int, tokens: int) -> tuple[int, dict[str, Callable[[], object]]]:
    """Calls that encode whole blocks of random tokens as a layer does, by its own backend and into its layout.

    Args:
        run: The run.
        layer: A layer that has seen tokens.
        batch: Rows.
        tokens: A multiple of 64.

    Returns:
        Bytes that a call reads, and a call for each side.
    """
    backend, tail = layer.state.blocks.layout, layer.tails["key"]
    x = run.states(batch, tail.shape[1], tokens, tail.shape[3])
    index = torch.arange(tokens // BLOCK, device=x.device, dtype=torch.int32)
    block_table = torch.stack((4 + BLOCK * index, torch.full_like(index, BLOCK), 4 + 2 * BLOCK * (index // 2)), dim=1)
    calls: dict[str, Callable[[], object]] = {
        side: partial(backend.encode, layer.codecs[side], x, block_table, None) for side in SIDES
    }
    return x.nbytes, calls


def declined(layer: SpectralLayer, backend: str) -> str | None:
    """Why a backend has not served all of a layer's calls; None if it has."""
    report = layer.backend_report()
    if report is None or report.name != backend or report.attends or report.refused:
        return f"declined: {report}"
    return None


def kernels(run: Run) -> list[dict[str, Any]]:
    """Every variant of a kernel that has been compiled in this process, with its registers and spilled bytes."""
    from quantcache_kernels.triton import decode, decode_attention, dense_attention, encode, queries, trellis

    found: list[dict[str, Any]] = []
    for module in (queries, decode_attention, dense_attention, encode, trellis, decode):
        for name, kernel in vars(module).items():
            if not name.endswith("_kernel"):
                continue
            variants = [v for caches in getattr(kernel, "device_caches", {}).values() for v in caches[0].values()]
            for variant in variants:
                attributes = ("n_regs", "n_spills", "n_max_threads")
                found.append({"kernel": name, **{a: getattr(variant, a, None) for a in attributes}})
    if unavailable(run.device) is None:
        for coding, on_trellis in (("scalar", False), ("trellis", True)):
            attention = cuda_codes.LOADERS["cuda"](run.device, on_trellis, on_trellis)
            loaded = {**attention, **cuda_encoding.LOADERS["cuda"](run.device, on_trellis)}
            for name, compiled in loaded.items():
                registers, local = compiled.attribute(REGISTERS), compiled.attribute(LOCAL)
                found.append({"kernel": name, "coding": coding, "n_regs": registers, "local_bytes": local})
    return found
