"""Random sequences of what users do to a cache, against a DynamicCache: nothing is lossy, so logits are the same."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quantcache import Calibration, SpectralCache
from tests.builders import scalar_calibration
from tests.helpers import error, few
from tests.property.effort import examples, report

VOCABULARY, MAX_TOKENS, MAX_ROWS, PARTS = 96, 700, 6, 10
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-3}
"""The smallest error that counts, in units of the logits' spread."""

tried: Counter[str] = Counter()
"""Sequences, moves and differences so far."""


@pytest.fixture(autouse=True, scope="module")
def counted() -> Iterator[None]:
    """Report how much was tried."""
    yield
    report("sequences of public calls", tried)


@functools.cache
def model_of(attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """The same small model in some dtype."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        initializer_range=0.15,
        attn_implementation=attention,
        max_position_embeddings=4 * MAX_TOKENS,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


@functools.cache
def calibration() -> Calibration:
    """A calibration of the model; nothing of it is used."""
    return scalar_calibration(model_of("sdpa", torch.float32).config)


@dataclass
class Trio:
    """Our cache and transformers' own; where attention is ours too, a third, in float64, says what is right."""

    attention: str
    dtype: torch.dtype
    caches: list[DynamicCache]
    autocast: bool

    def each(self) -> list[tuple[PreTrainedModel, DynamicCache]]:
        """Models with their caches."""
        dense = "sdpa" if self.attention == "spectral" else self.attention
        models = [model_of(self.attention, self.dtype), model_of(dense, self.dtype), model_of(dense, torch.float64)]
        return list(zip(models[: len(self.caches)], self.caches, strict=True))


class Sequence:
    """One random sequence.

    Args:
        seed: Decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        draw = self.random.choice
        dtype, attention = draw([torch.float32, torch.bfloat16]), draw(["spectral", "spectral", "sdpa", "eager"])
        self.options = {
            "sink_length": draw([4, 4, 0, 1]),
            "residual_length": draw([0, 64, 9]),
            "backend": draw(["auto", "torch"]),
        }
        autocast = dtype == torch.float32 and self.random.random() < 0.2
        self.count = 3 if attention == "spectral" else 2
        self.trio, self.worst = Trio(attention, dtype, self.empty(), autocast), 0.0
        self.forget()

    def empty(self) -> list[DynamicCache]:
        """Two or three empty caches."""
        config = model_of("sdpa", torch.float32).config
        ours = SpectralCache(calibration(), config, key_bits="dense", value_bits="dense", **self.options)
        return [ours, *(DynamicCache(config=config) for _ in range(self.count - 1))]

    def forget(self) -> None:
        """Start a new batch."""
        self.rows, self.length = self.random.choice([1, 2, 3]), 0
        self.shown = torch.zeros(self.rows, 0, dtype=torch.bool)

    def run(self) -> None:
        """Make the moves."""
        self.feed(self.random.choice([150, 70, 250]))
        for _ in range(self.random.randint(3, 9)):
            move = self.random.choice(
                ["feed", "feed", "feed", "decode", "decode", "crop", "reorder", "select", "repeat", "copy", "reset"]
            )
            tried[move] += 1
            getattr(self, move)()

    # -------------------------------------------------------------- masks

    def mask_2d(self, count: int) -> Tensor:
        """A mask of all slots: padding on the left, holes, and now and then other slots than before."""
        new = torch.ones(self.rows, count, dtype=torch.bool)
        if not self.length and self.random.random() < 0.7:
            for row in range(self.rows):
                new[row, : self.random.choice([0, 3, 37, count // 2, count - 1])] = False
        elif self.random.random() < 0.3:
            row, first = self.random.randrange(self.rows), self.random.randrange(count)
            new[row, first : first + self.random.choice([1, 5, 40])] = False
        shown = torch.cat((self.shown, new), dim=1)
        if self.length and self.random.random() < 0.2:
            first = self.random.randrange(self.length)
            shown[self.random.randrange(self.rows), first : first + self.random.choice([1, 30, 90])] ^= True
        # What a query that may look nowhere gives is nobody's business: every row's last token looks at itself.
        shown[:, -1] = True
        return shown

    def mask_4d(self, count: int) -> Tensor:
        """A custom mask: any, but causal and with every query looking at itself."""
        length, heads = self.length + count, self.random.choice([1, 1, 4])
        rows = self.random.choice([1, self.rows])
        slots, own = torch.arange(length), torch.arange(self.length, length)[:, None]
        mask = (torch.rand(rows, heads, count, length, generator=self.generator) < 0.7) & (slots < own)
        if self.random.random() < 0.5:
            mask[..., : self.random.randrange(length)] = False
        return mask | (slots == own)

    # -------------------------------------------------------------- moves

    def feed(self, count: int | None = None) -> None:
        """A forward pass over some tokens."""
        count = self.random.choice([1, 2, 16, 17, 64, 100]) if count is None else count
        if self.length + count > MAX_TOKENS:
            return
        tokens = torch.randint(0, VOCABULARY, (self.rows, count), generator=self.generator)
        more: dict[str, Any] = {}
        kind, looked = self.random.choice(["2d", "2d", "none", "4d", "additive"]), torch.ones(self.rows, count).bool()
        shown = torch.cat((self.shown, looked), dim=1)
        if kind == "2d":
            shown = self.mask_2d(count)
            more["attention_mask"] = shown.long()
            if self.random.random() < 0.7:
                more["position_ids"] = (shown.long().cumsum(-1) - 1).clamp_min(0)[:, -count:]
            looked = shown[:, -count:] & (shown.long().cumsum(-1)[:, -count:] > 0)
        elif kind in ("4d", "additive"):
            more["attention_mask"] = self.mask_4d(count)
        logits = []
        for model, cache in self.trio.each():
            given = dict(more)
            if kind == "additive":
                lowest = torch.finfo(model.dtype).min
                given["attention_mask"] = torch.zeros(more["attention_mask"].shape, dtype=model.dtype).masked_fill(
                    ~more["attention_mask"], lowest
                )
            with self.ambient(model):
                logits.append(model(tokens, past_key_values=cache, **given).logits.double())
        self.shown, self.length = shown, self.length + count
        self.compare([each[looked] for each in logits], kind)

    def ambient(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
        """Autocast, where the sequence has it; what says what is right goes without."""
        wanted = self.trio.autocast and model.dtype != torch.float64
        return torch.autocast("cpu", torch.bfloat16) if wanted else contextlib.nullcontext()

    def compare(self, logits: list[Tensor], kind: str) -> None:
        """Ours must be as near to the truth as the dense cache is, and the same where attention is."""
        ours, dense, right = logits[0], logits[1], logits[-1]
        dtype = torch.bfloat16 if self.trio.autocast else self.trio.dtype
        tried["comparisons"] += 1
        # The logits of a single token share one rounding, so it is the worst of the sequence that twice is allowed of.
        self.worst = max(self.worst, error(dense, right))
        allowed = 2 * self.worst + ROUNDING[dtype] * float(right.std()) if len(logits) == 3 else 0.0
        if not error(ours, right) <= allowed:
            tried["differences"] += 1
        assert error(ours, right) <= allowed, (kind, self.trio.attention, dtype, self.options, self.length)

    def decode(self) -> None:
        """Some single tokens, with whatever masks."""
        for _ in range(self.random.randint(1, 4)):
            self.feed(1)

    def crop(self) -> None:
        """Drop the newest tokens."""
        remove = self.random.choice([1, 5, 64, 100, self.length - 2, self.length])
        remove = max(0, min(remove, self.length))
        for cache in self.trio.caches:
            cache.crop(-remove)
        self.length -= remove
        self.shown = self.shown[:, : self.length]
        if not self.length:
            self.reset()

    def take(self, rows: Tensor, method: str, argument: Any) -> None:
        """Keep, repeat or reorder rows."""
        for cache in self.trio.caches:
            getattr(cache, method)(argument)
        self.rows, self.shown = len(rows), self.shown[rows]

    def reorder(self) -> None:
        """As beam search does."""
        rows = torch.tensor([self.random.randrange(self.rows) for _ in range(self.rows)])
        self.take(rows, "reorder_cache", rows)

    def select(self) -> None:
        """Keep some rows."""
        rows = torch.tensor(sorted(self.random.sample(range(self.rows), self.random.randint(1, self.rows))))
        self.take(rows, "batch_select_indices", rows)

    def repeat(self) -> None:
        """Repeat rows."""
        repeats = self.random.randint(1, 2)
        if self.rows * repeats <= MAX_ROWS:
            rows = torch.arange(self.rows).repeat_interleave(repeats)
            self.take(rows, "batch_repeat_interleave", repeats)

    def copy(self) -> None:
        """Go on with copies, and spoil what they were made of."""
        ours, *dense = self.trio.caches
        new = ours.fork() if self.random.random() < 0.5 else copy.deepcopy(ours)  # type: ignore[attr-defined]
        ours.crop(-(self.length // 2))
        self.trio.caches = [new, *dense]

    def reset(self) -> None:
        """Forget everything, and go on with another batch."""
        self.trio.caches[0].reset()
        self.trio.caches[1:] = self.empty()[1:]
        self.forget()
        self.feed(self.random.choice([90, 140]))


@pytest.mark.support("padding, holes and custom masks in any order (property test)")
@pytest.mark.parametrize("part", few(range(PARTS), range(2)))
def test_any_calls_give_what_the_dense_cache_gives(part: int) -> None:
    count = examples(100) // PARTS
    for seed in range(part * count, (part + 1) * count):
        tried["sequences"] += 1
        with torch.no_grad():
            try:
                Sequence(seed).run()
            except Exception as caught:
                caught.add_note(f"sequence {seed}")
                raise
