"""Memory: bytes that caches hold at several lengths, next to the formula's and the process's peak.

Caches are filled with random keys and values of the model's geometry in one update of each layer, so that lengths
beyond the model's limit can be measured. Bytes do not depend on what the keys and values are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from quantcache.accounting.measuring import measure
from quantcache.accounting.predicting import predict
from quantcache.artifact import cache_layout, tracing
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.cells import Cells
from quantcache.evaluation.methods import Method

SUITE = "memory"

LADDER = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)

STATUS_FILE = Path("/proc/self/status")
RESET_FILE = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryRung:
    """One method's cache at one length.

    Attributes:
        status: ``ok``, or what went wrong.
        tokens: Cached tokens of each row.
        bytes: Bytes held, shared constants apart. Of a simulated rival: those that its codes would take.
        predicted_bytes: What the formula says; None where there is none for the method.
        bits_per_element_total: Bits of everything held per cached element.
        times_smaller: Bytes of the same elements in bfloat16 over ``bytes``.
        constants: Bytes of constants that all caches of a model share.
        peak_bytes: Highest memory of the process (on a CUDA device: of the device) while the cache was filled, over
            that before. None where the system does not tell, where the figure is below the bytes held and therefore
            wrong (memory that the process had freed was used again), and for simulated rivals.
    """

    status: str
    tokens: int
    bytes: int | None = None
    predicted_bytes: int | None = None
    bits_per_element_total: float | None = None
    times_smaller: float | None = None
    constants: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class MemoryEntry:
    """One method on the ladder.

    Attributes:
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache held fake-quantized values instead of codes.
        status: ``ok``, or what went wrong first.
        rungs: Its figures by length.
    """

    family: str
    simulated: bool
    status: str
    rungs: dict[str, MemoryRung] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryResult:
    """All methods on the ladder.

    Attributes:
        settings: Everything that was chosen.
        methods: One entry for each method.
    """

    settings: dict[str, Any]
    methods: dict[str, MemoryEntry]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def measure_memory(
    model: PreTrainedModel,
    methods: Sequence[Method],
    *,
    lengths: Sequence[int] = LADDER,
    batch: int = 1,
    cells: Cells | None = None,
) -> MemoryResult:
    """Fill caches and count.

    Args:
        model: The model; only its geometry, dtype and device matter.
        methods: What to measure.
        lengths: Cached tokens.
        batch: B, rows of the cache.
        cells: Where finished cells are kept.

    Returns:
        Figures of every method and length. A rung that fails keeps its place, with the error as its status.

    Raises:
        QuantCacheError: A length or the batch is not positive.
    """
    cells = cells or Cells()
    if batch < 1 or not lengths or min(lengths) < 1:
        raise QuantCacheError(f"memory needs lengths and a batch of at least 1, got {list(lengths)} and {batch}")
    cells.plan(SUITE, len(lengths) * len(methods))
    entries = {}
    for method in methods:
        rungs = {}
        for length in sorted(lengths):
            found = cells.measure(SUITE, method.name, f"{length}", _measure_rung, model, method, length, batch)
            rungs[str(length)] = MemoryRung(**{"tokens": length, **found})
        bad = next((rung.status for rung in rungs.values() if rung.status != "ok"), "ok")
        entries[method.name] = MemoryEntry(method.family, method.simulated, bad, rungs)
    settings = {
        "lengths": sorted(lengths),
        "batch": batch,
        "dtype": str(model.dtype).removeprefix("torch."),
        "filled": "random keys and values, one update of each layer",
    }
    return MemoryResult(settings, entries)


@torch.no_grad()
def _measure_rung(model: PreTrainedModel, method: Method, length: int, batch: int) -> dict[str, Any]:
    device = compat.input_device(model)
    cache = method.make_cache()
    gc.collect()
    _return_freed_memory()
    with PeakMemory(device) as peak:
        _fill(model, cache, length, batch, device)
    held = measure(cache)
    return {
        "tokens": held.tokens,
        "bytes": held.total,
        "predicted_bytes": _predict(cache, length, batch, model.dtype.itemsize),
        "bits_per_element_total": held.bits_per_element_total,
        "times_smaller": held.bfloat16_bytes / held.total if held.total else None,
        "constants": held.constants,
        "peak_bytes": None if method.simulated or (peak.bytes or 0) < held.total else peak.bytes,
    }


def _fill(model: PreTrainedModel, cache: Cache, length: int, batch: int, device: torch.device) -> None:
    """One update of every layer of the model's cache."""
    text = model.config.get_text_config(decoder=True)
    shapes = tracing.cached_shapes(model.config)
    foreign = cache_layout.cross_attention_layers(model.config)
    generator = torch.Generator(device).manual_seed(length)
    for index, stock in enumerate(cache_layout.stock_layers(model.config)):
        if compat.is_recurrent(stock) or compat.is_placeholder(stock) or index in foreign:
            continue
        keys, values = (
            torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float32, device=device).to(
                model.dtype
            )
            for heads, dim in shapes.get(index) or (cache_layout.kv_geometry(text, index),) * 2
        )
        cache.update(keys, values, index)
        layer: Any = cache.layers[index]
        if isinstance(layer, SpectralLayer):
            layer.flush()  # what attention does once it has read the new tokens
        del keys, values


def _predict(cache: Cache, length: int, batch: int, element_bytes: int) -> int | None:
    """The formula's bytes, where there is one: a calibrated cache without stock layers, or a dense one."""
    if isinstance(cache, SpectralCache) and cache.calibration is not None:
        if len(cache.spectral_layers) != len(cache.layers):
            return None
        layer = cache.spectral_layers[0]
        return predict(
            cache.calibration,
            length,
            batch=batch,
            sink_length=layer.sink_length,
            residual_length=layer.residual_length,
            element_bytes=element_bytes,
        ).total
    if type(cache) is DynamicCache and all(compat.is_full_attention(layer) for layer in cache.layers):
        layers: Any = cache.layers  # which may differ in heads and dimensions
        per_token: int = sum(side[:, :, 0].numel() for layer in layers for side in (layer.keys, layer.values))
        return length * per_token * element_bytes
    return None


def _return_freed_memory() -> None:
    """Have glibc give back what it holds on to, so that using it again shows."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Highest memory inside a context, over that at its start.

    On a CUDA device it is what torch allocated there, elsewhere the resident memory of the process, which Linux tells.
    Memory that the process had freed but not returned is used again without raising the peak.

    Args:
        device: Where work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self.start: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        with contextlib.suppress(OSError):
            RESET_FILE.write_text("5")  # the peak becomes the present size
            self.start = _status("VmHWM")
        return self

    def __exit__(self, *error: object) -> None:
        if self.start is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        end = _status("VmHWM")
        self.bytes = None if end is None else max(0, end - self.start)


def _status(name: str) -> int | None:
    try:
        for line in STATUS_FILE.read_text("ascii").splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None
