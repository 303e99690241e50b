"""Speed: time of a prefill and of a decoding step, dense and compressed caches taking turns.

Every method is timed beside a dense cache in the same minute, repetition by repetition, so that whatever else the
machine does meets both. Ratios are therefore more reliable than times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.common import compat
from quantcache.common.defaults import PREFILL_CHUNK
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import summaries
from quantcache.evaluation.cells import Cells
from quantcache.evaluation.feeding import check_lengths, dense_method
from quantcache.evaluation.methods import Method

SUITE = "speed"


@dataclass(frozen=True)
class SpeedRung:
    """One method at one batch size.

    Attributes:
        status: ``ok``, or what went wrong.
        prefill_ms: Milliseconds for the prompt.
        decode_ms: Milliseconds for one more token of every row, behind the prompt.
        tokens_per_second: Rows over the median decoding time.
        prefill_ratio: Median prefill time over that of the dense cache beside it.
        decode_ratio: The same of decoding.
    """

    status: str
    prefill_ms: summaries.Summary | None = None
    decode_ms: summaries.Summary | None = None
    tokens_per_second: float | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None


@dataclass(frozen=True)
class SpeedEntry:
    """One method.

    Attributes:
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache held fake-quantized values instead of codes: it is not timed then.
        status: ``ok``, or what went wrong first.
        batches: Its figures by batch size.
    """

    family: str
    simulated: bool
    status: str
    batches: dict[str, SpeedRung] = field(default_factory=dict)


@dataclass(frozen=True)
class SpeedResult:
    """All methods.

    Attributes:
        settings: Everything that was chosen.
        methods: One entry for each method.
    """

    settings: dict[str, Any]
    methods: dict[str, SpeedEntry]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def measure_speed(
    model: PreTrainedModel,
    tokens: Tensor,
    methods: Sequence[Method],
    *,
    context: int,
    batches: Sequence[int] = (1, 4),
    steps: int = 32,
    warmup: int = 4,
    prefills: int = 3,
    cells: Cells | None = None,
) -> SpeedResult:
    """Time prefill and decoding.

    Args:
        model: Decoder-only model to measure.
        tokens: Text, ``[N]``; rows of a batch are taken from it one after the other, from its start again at its end.
        methods: What to measure.
        context: Tokens of the prompt; decoding goes on behind it.
        batches: Numbers of rows to time.
        steps: Decoding steps timed.
        warmup: Decoding steps discarded before them; one prefill is discarded as well.
        prefills: Number of prefills timed.
        cells: Where finished cells are kept.

    Returns:
        Times of every method and batch size. One that fails keeps its place, with the error as its status.

    Raises:
        QuantCacheError: The text is shorter than the prompt, prompt and steps exceed the model's limit, or a count is
            not positive.
    """
    cells = cells or Cells()
    check_lengths(model, [context + warmup + steps], "prompt and decoding steps together,")
    if len(tokens) < context:
        raise QuantCacheError(f"the text has {len(tokens)} tokens, a prompt needs {context}")
    if min(*batches, steps, prefills) < 1 or warmup < 0:
        raise QuantCacheError(f"nothing to time: batches {list(batches)}, {steps} steps, {prefills} prefills")
    cells.plan(SUITE, len(batches) * sum(not method.simulated for method in methods))
    reference = dense_method(model)
    entries = {}
    for method in methods:
        found = {}
        for batch in batches:
            prompt = tokens.repeat(batch * context // len(tokens) + 1)[: batch * context].view(batch, context)
            if method.simulated:
                found[str(batch)] = SpeedRung("skipped: simulated, so its times mean nothing")
            else:
                given = (model, method, reference, prompt, steps, warmup, prefills)
                found[str(batch)] = SpeedRung(**cells.measure(SUITE, method.name, f"batch {batch}", _time, *given))
        bad = next((rung.status for rung in found.values() if rung.status != "ok"), "ok")
        entries[method.name] = SpeedEntry(method.family, method.simulated, bad, found)
    settings = {
        "context": context,
        "batches": list(batches),
        "steps": steps,
        "warmup": warmup,
        "prefills": prefills,
        "prefill_chunk": PREFILL_CHUNK,
        "threads": torch.get_num_threads(),
    }
    return SpeedResult(settings, entries)


@torch.inference_mode()
def _time(
    model: PreTrainedModel, method: Method, reference: Method, prompt: Tensor, steps: int, warmup: int, prefills: int
) -> dict[str, Any]:
    """Times of a method and of the dense cache beside it, on one prompt ``[B, T]``."""
    prompt = prompt.to(compat.input_device(model))
    pair = {"own": method, "dense": reference}
    prefill: dict[str, list[float]] = {name: [] for name in pair}
    decode: dict[str, list[float]] = {name: [] for name in pair}
    caches: dict[str, dict[str, Any]] = {}  # as the model takes them: to find that out is not to be timed with a step

    def read(name: str) -> None:
        caches[name] = compat.cache_argument(model, pair[name].make_cache())
        for part in prompt.split(PREFILL_CHUNK, dim=1):
            model(input_ids=part, **caches[name], use_cache=True, logits_to_keep=1)

    def step(name: str) -> None:
        model(input_ids=prompt[:, -1:], **caches[name], use_cache=True, logits_to_keep=1)

    for number in range(1 + prefills):
        for name in pair:
            duration = timed(prompt.device, partial(read, name))
            if number:
                prefill[name].append(duration)
    for number in range(warmup + steps):
        for name in pair:
            duration = timed(prompt.device, partial(step, name))
            if number >= warmup:
                decode[name].append(duration)
    return {
        "prefill_ms": summaries.quantiles(prefill["own"]),
        "decode_ms": summaries.quantiles(decode["own"]),
        "tokens_per_second": 1e3 * prompt.shape[0] / median(decode["own"]),
        "prefill_ratio": median(prefill["own"]) / median(prefill["dense"]),
        "decode_ratio": median(decode["own"]) / median(decode["dense"]),
    }


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Milliseconds that something takes, until the device is done with it.

    Args:
        device: Where the work is done.
        work: Does it.

    Returns:
        Milliseconds.
    """
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return 1e3 * (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was told.

    Args:
        device: CPU returns at once.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
