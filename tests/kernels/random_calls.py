"""Random legal calls of the CPU kernels, from several threads at once: for sanitizers, and in short for every test run.

A round draws a geometry, makes its codecs anew and starts some threads. Each leads a layer of its own through a life of
updates, attention, cuts, copies and selections; all of them share the codecs, so the first calls race to make the
kernels' constants. What comes out is compared with attention in float64.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantcache.attention.function import spectral_attention
from quantcache.backends.padding import Arrivals
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.schema import Coding
from quantcache_kernels.cpu.library import find
from tests.kernels import truth
from tests.kernels.cases import Case, codecs

CODINGS: tuple[Coding, ...] = ("scalar", "trellis")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
MAX_ROWS = 4


def drive(seed: int, rounds: int | None = None, seconds: float = float("inf")) -> dict[str, Any]:
    """Run rounds.

    Args:
        seed: Of everything that is drawn; the first calls of threads race all the same.
        rounds: How many rounds at most.
        seconds: For how long at most.

    Returns:
        How many rounds, lives, calls of each kind and comparisons there were.

    Raises:
        AssertionError: A kernel's output is wrong.
    """
    library, reason = find()
    assert library is not None, reason
    counts: Counter[str] = Counter()
    level, threads, started = library.level, torch.get_num_threads(), time.monotonic()
    done, interval = 0, sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        while (rounds is None or done < rounds) and time.monotonic() - started < seconds:
            chance = random.Random(f"{seed} {done}")
            library.level = chance.choice(list(library.levels.values()))
            torch.set_num_threads(chance.choice((1, 2, 3)))
            _round(chance, counts)
            done += 1
    finally:
        sys.setswitchinterval(interval)
        library.level = level
        torch.set_num_threads(threads)
    return {"rounds": done, **dict(sorted(counts.items()))}


def _round(chance: random.Random, counts: Counter[str]) -> None:
    dim = chance.choice((16, 20, 40, 64, 64, 80, 96, 100, 128))
    case = Case(
        dim=dim,
        value_dim=chance.choice((None, None, chance.randint(1, 130))),
        heads=chance.randint(1, 3),
        groups=chance.randint(1, 5),
        widths=chance.choice(("mixed", "mixed", *range(9))),
        rope=chance.choice(("none", "half", "half", "interleaved")),
        rotary=chance.choice((1.0, 1.0, 0.5)),
        theta=chance.choice((10.0, 1e4, 1e7)),
        coding=(chance.choice(CODINGS), chance.choice(CODINGS)),
    )
    made, failures = codecs(case), []
    lives = [_Life(case, made, random.Random(chance.random())) for _ in range(chance.choice((1, 3, 4)))]
    barrier = threading.Barrier(len(lives))

    def lead(life: _Life) -> None:
        try:
            for part in (life.begin, life.go_on):  # both begin at once: they race to make the constants they need
                barrier.wait()
                part()
        except threading.BrokenBarrierError:
            pass  # another has failed
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=lead, args=(life,)) for life in lives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise AssertionError(f"{case}: {failures[0]}") from failures[0]
    for life in lives:
        counts.update(life.counts)
    counts["lives"] += len(lives)


class _Life:
    """One layer from its first tokens to its last.

    Args:
        case: Its geometry.
        made: Codecs that other lives share.
        chance: What it draws from.
    """

    def __init__(self, case: Case, made: dict[str, SpectralCodec], chance: random.Random):
        self.chance, self.counts = chance, Counter[str]()
        self.case = replace(case, dtype=chance.choice(DTYPES), sink_length=chance.choice((0, 1, 4, 4, 9)))
        self.generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
        rows = chance.randint(1, 3)
        self.pads = torch.zeros(rows, dtype=torch.int64)
        if chance.random() < 0.4:
            self.pads = torch.tensor([chance.choice((0, chance.randint(0, 150))) for _ in range(rows)])
        residual = chance.choice((0, 0, 7, 64))
        self.padded = bool(self.pads.any())
        self.layer = SpectralLayer(lambda *_: dict(made), None, self.case.sink_length, residual, "cpu")
        self.sizes = {"key": made["key"].dim, "value": made["value"].dim}

    def begin(self) -> None:
        """The first tokens."""
        self.extend(self.chance.choice((1, 63, 64, 111, 200, 333)) + int(self.pads.max()))

    def go_on(self) -> None:
        """Attend, then do some twenty things."""
        self.extend(1)
        moves = (self.step, self.step, self.step, self.crop, self.reorder, self.repeat, self.copy)
        for _ in range(20):
            self.chance.choice(moves)()

    def normal(self, *shape: int) -> Tensor:
        """Numbers of the layer's dtype, sometimes with gaps, strides or negation in how they are stored."""
        x = torch.randn(shape, generator=self.generator).to(self.case.dtype)
        kind = self.chance.randrange(5)
        if kind == 0 and len(shape) == 4:
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == 1:
            return torch.cat((x, x), dim=-1)[..., : shape[-1]]
        if kind == 2:
            return torch.stack((x, x), dim=-1)[..., 1]
        if kind == 3:
            return torch._neg_view(x)
        return x

    def step(self) -> None:
        """A few tokens, or many."""
        self.extend(self.chance.choice((1, 1, 1, 2, 5, 16, 17, 70)))

    def extend(self, count: int) -> None:
        """Append tokens, attend, encode."""
        rows, heads = self.pads.shape[0], self.case.heads
        new = [self.normal(rows, heads, count, self.sizes[side]) for side in ("key", "value")]
        before = len(self.layer.spans)
        length = self.layer.get_seq_length() + count
        shown = torch.arange(length) >= self.pads[:, None]
        self.layer.update(*new, arrivals=Arrivals.of(shown, None, length, count))
        self.attend(count)
        self.layer.flush()
        self.counts["blocks encoded"] += (len(self.layer.spans) - before) * rows

    def attend(self, count: int) -> None:
        """Attention of the newest tokens: few attend on codes, many on blocks that the kernel decodes."""
        view, rows = self.layer.snapshot(), self.pads.shape[0]
        slots = torch.arange(view.length)
        causal = slots <= torch.arange(view.length - count, view.length)[:, None]
        whole = (causal & (slots >= self.pads[:, None, None]))[:, None]
        if not view.num_blocks:
            return
        queries = min(count, self.chance.choice((16, 16, 70)))
        query = self.normal(rows, self.case.heads * self.case.groups, queries, self.sizes["key"]) * 0.3
        options: dict[str, Any] = {
            "softcap": self.chance.choice((None, None, 5.0)),
            "s_aux": self.chance.choice((None, torch.randn(query.shape[1], generator=self.generator))),
        }
        mask = whole[:, :, -queries:] if self.padded else None
        kind = self.chance.randrange(4)
        if kind == 0:
            holes = torch.rand(whole[:, :, -queries:].shape, generator=self.generator) < self.chance.random()
            mask = whole[:, :, -queries:] & holes
        elif kind == 1 and not self.padded:  # the same for all rows, for all queries, or longer than it need be
            shape = (self.chance.choice((1, rows)), 1, self.chance.choice((1, queries)), view.length + 3)
            mask = torch.rand(shape, generator=self.generator) < 0.6
        found = spectral_attention(query, view, mask, **options)
        self.counts["attended"] += 1
        if self.chance.random() < 0.3:
            self.compare(query, mask, found, options)

    def compare(self, query: Tensor, mask: Tensor | None, found: Tensor, options: dict[str, Any]) -> None:
        """The rule of the parity suite, with a floor of one rounding step of the output."""
        view = self.layer.snapshot()
        if mask is not None:
            mask = mask[..., : view.length].expand(query.shape[0], 1, query.shape[2], -1)
        expected = truth.attention(query, view, mask, **options)
        plain = copy.copy(self.layer)
        plain.backend = "torch"
        own = float((spectral_attention(query, plain.snapshot(), mask, **options).double() - expected).norm())
        theirs, floor = float((found.double() - expected).norm()), max(1e-6, torch.finfo(found.dtype).eps)
        assert theirs <= 2 * own + floor * float(expected.norm()), (theirs, own, self.case)
        self.counts["compared"] += 1

    def crop(self) -> None:
        """Drop some of the newest tokens."""
        spare = self.layer.get_seq_length() - int(self.pads.max()) - 1
        self.layer.crop(-self.chance.randint(0, min(spare, 150)))
        self.counts["cropped"] += 1

    def reorder(self) -> None:
        """Take some rows, in some order."""
        rows = torch.tensor([self.chance.randrange(len(self.pads)) for _ in range(self.chance.randint(1, MAX_ROWS))])
        self.layer.reorder_cache(rows)
        self.pads = self.pads[rows]
        self.counts["reordered"] += 1

    def repeat(self) -> None:
        """Every row twice."""
        if len(self.pads) * 2 <= MAX_ROWS:
            self.layer.batch_repeat_interleave(2)
            self.pads = self.pads.repeat_interleave(2)
            self.counts["reordered"] += 1

    def copy(self) -> None:
        """Go on with a fork or a copy."""
        self.layer = self.layer.fork() if self.chance.random() < 0.5 else copy.deepcopy(self.layer)
        self.counts["copied"] += 1
