"""Short runs through the real cache, to scale a calibration's own estimate of its cost."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantcache.artifact.calibration import Calibration
from quantcache.attention.probe import attend_on_codes, evaluating, run
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.distortion import expected_cost
from quantcache.coding.growth import num_blocks
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import Rate
from quantcache.common import compat
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH

YARDSTICK_BITS = (1.0, 2.0, 4.0)
"""Bits at which divergence is measured; most use lies between them."""

YARDSTICK_TOKENS = 2048
"""Tokens of a sequence that are measured at most."""

YARDSTICK_SEQUENCES = 2
"""Sequences measured at most."""


def measure_yardstick(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    held_out: Sequence[Tensor],
    calibration: Calibration,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any] | None:
    """Measure the divergence between the dense cache and the compressed one, fed block by block, at 1, 2 and 4 bits.

    Chunks are cut as ``quantcache eval`` cuts them: each starts at a block, and reads codes of everything but the sinks
    and the residual window.

    Text that the calibration has seen diverges less than other text, several times less where heads are wide and tokens
    few. It serves only where there is no other.

    Args:
        model: Model the calibration was made on.
        sequences: What it was made of, batches of token ids ``[B, T]``; the first rows of some of them are used.
        held_out: The same of text that it has not seen; may be empty.
        calibration: The model's calibration, at any bits.
        on_progress: Called with the tokens of every finished chunk.

    Returns:
        ``tokens``, ``held_out`` (whether the calibration has not seen them), and ``points`` with ``bits``, ``cost``
        (see :func:`expected_cost`) and ``kl`` (mean, nats per token) at each; None if no sequence is long enough for a
        token to read codes, or a divergence is not above 0.
    """
    first = BLOCK + SINK_LENGTH
    unseen, seen = (
        [s for s in found if num_blocks(s.shape[1] - 1, SINK_LENGTH, RESIDUAL_LENGTH)]
        for found in (held_out, sequences)
    )
    usable = unseen or seen
    chosen = usable[:: max(1, -(-len(usable) // YARDSTICK_SEQUENCES))]
    measured = [calibration.with_rate(Rate(bits)) for bits in YARDSTICK_BITS]
    totals, count = [0.0 for _ in measured], 0
    with torch.no_grad(), evaluating(model), _attending_on_codes(model):
        for tokens in (s[:1, :YARDSTICK_TOKENS] for s in chosen):
            count += tokens.shape[1]
            caches = [DynamicCache(config=model.config), *(SpectralCache(each, model.config) for each in measured)]
            for chunk in (tokens[:, :first], *tokens[:, first:].split(BLOCK, dim=1)):
                dense, *own = (run(model, chunk, cache).logits.float().log_softmax(-1) for cache in caches)
                for place, found in enumerate(own):
                    totals[place] += float((dense.exp() * (dense - found)).sum(-1).cpu().double().sum())
                on_progress(chunk.shape[1])
    points = [
        {"bits": bits, "cost": expected_cost(each.layers, each.metadata.codec.coding), "kl": total / max(count, 1)}
        for bits, each, total in zip(YARDSTICK_BITS, measured, totals, strict=True)
    ]
    if not all(math.isfinite(point["kl"]) and point["kl"] > 0 and point["cost"] > 0 for point in points):
        return None
    return {"tokens": count, "held_out": bool(unseen), "points": points}


@contextlib.contextmanager
def _attending_on_codes(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with ``sdpa`` attend on codes if it can: else every pass would decode the whole cache."""
    switched = attend_on_codes(model)
    try:
        yield
    finally:
        if switched is not None:
            compat.use_attention(model, switched[0])
