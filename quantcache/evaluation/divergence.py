"""What errors do when a model goes on for long: its own continuation, read again through other caches.

The dense cache writes a continuation, greedy or sampled. Every method then reads the same tokens, a few at a time, and
is compared with the dense predictions at each. A method whose errors feed on each other drifts away: its KL divergence
has a slope over positions.

Up to the first token at which a method would have chosen another than the dense cache's greedy text, it has read what
it would have written itself: there its own greedy text departs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.common import compat
from quantcache.common.defaults import SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation import summaries
from quantcache.evaluation.cells import Cells, attempt
from quantcache.evaluation.feeding import (
    PROMPT_CHUNK,
    check_lengths,
    decode_tokens,
    dense_method,
    end_tokens,
    feed,
    most_likely,
)
from quantcache.evaluation.fidelity import kl_divergence, log_probabilities, recorded
from quantcache.evaluation.methods import Method, reading_codes

SUITE = "divergence"

KINDS = ("greedy", "sampled")
GROUP = 4
"""Methods that share one dense pass: what an interruption can cost."""
STEP = 8
"""Tokens read at once. It divides a block, so blocks are coded behind the same tokens as when decoding one by one."""
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Curve:
    """KL divergence along continuations; errors are over continuations.

    Attributes:
        mean: Mean of all positions.
        bins: Mean of the positions of each bin, in order.
        slope: Nats per 1,000 tokens, of a straight line through the positions of each continuation.
        top1: Share of positions with the same most likely token.
    """

    mean: summaries.Summary
    bins: list[summaries.Summary]
    slope: summaries.Summary
    top1: summaries.Summary


@dataclass(frozen=True)
class Departure:
    """Where greedy texts depart from the dense cache's.

    Attributes:
        points: Tokens in common before the first that differs, by prompt; None if there is none within the text.
        median: Tokens behind which half of the texts have departed; None if fewer than half have.
        within: Tokens compared.
    """

    points: list[int | None]
    median: int | None
    within: int


@dataclass(frozen=True)
class DivergenceEntry:
    """How one method followed the dense cache.

    Attributes:
        family: ``ours``, ``rival``, ``dense`` or ``floor``.
        simulated: Whether the cache held fake-quantized values instead of codes.
        status: ``ok``, or what went wrong.
        curves: KL divergence along greedy and sampled continuations.
        departure: Where greedy texts depart.
    """

    family: str
    simulated: bool
    status: str
    curves: dict[str, Curve] | None = None
    departure: Departure | None = None


@dataclass(frozen=True)
class DivergenceResult:
    """All methods.

    Attributes:
        settings: Everything that was chosen.
        methods: One entry for each method.
    """

    settings: dict[str, Any]
    methods: dict[str, DivergenceEntry]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def measure_divergence(
    model: PreTrainedModel,
    tokens: Tensor,
    methods: Sequence[Method],
    *,
    opening: Tensor | None = None,
    context: int = 256,
    prompts: int = 4,
    new_tokens: int = 1024,
    bins: int = 8,
    step: int = STEP,
    temperature: float = TEMPERATURE,
    sink_length: int = SINK_LENGTH,
    cells: Cells | None = None,
) -> DivergenceResult:
    """Let the dense cache continue stretches of a text, and other caches read what it wrote.

    Args:
        model: Decoder-only model to measure.
        tokens: Text, ``[N]``, without special tokens; prompts are stretches of it.
        methods: What to measure.
        opening: Special tokens in front of every prompt, ``[T]``.
        context: Tokens of a prompt, special ones included.
        prompts: Prompts at most; each is continued once greedily and once by sampling with a seed of its own.
        new_tokens: Tokens of a continuation. It does not end before: tokens that end a text are never chosen.
        bins: Parts of a continuation whose mean is reported.
        step: Tokens read at once.
        temperature: Of the sampled continuations.
        sink_length: First tokens kept by every method; steps are aligned with the blocks behind them.
        cells: Where finished cells are kept.

    Returns:
        Curves of every method. A method that fails, or reads no codes, keeps its place, with the reason as its status.

    Raises:
        QuantCacheError: The text is shorter than a prompt, prompt and continuation exceed the model's limit, or a
            number is out of range.
    """
    cells = cells or Cells()
    check_lengths(model, [context + new_tokens], "prompt and continuation together,")
    for name, number, least in (("bins", bins, 1), ("new_tokens", new_tokens, 2), ("step", step, 1)):
        if number < least:
            raise QuantCacheError(f"{name} must be at least {least}, got {number}")
    if new_tokens < bins:
        raise QuantCacheError(f"{new_tokens} new tokens cannot be parted into {bins} bins")
    if not temperature > 0:
        raise QuantCacheError(f"the temperature must be above 0, got {temperature}")
    rows = _prompts(
        tokens, torch.tensor([], dtype=torch.long, device="cpu") if opening is None else opening, context, prompts
    )
    cells.plan(SUITE, len(rows) * len(KINDS) * (1 + len(methods)))
    methods = reading_codes(methods, context + new_tokens, cached=edges(context, new_tokens, step, sink_length)[-1][0])
    by_name = {method.name: method for method in methods}
    places = [(kind, number) for kind in KINDS for number in range(len(rows))]

    def write(kind: str, number: int) -> dict[str, Any]:
        seed = number if kind == "sampled" else None
        return {"tokens": continuation(model, rows[number], new_tokens, temperature, seed).tolist()}

    for kind, number in places:
        cell = f"{kind} {number}"
        written = cells.measure(SUITE, "dense", f"{cell} text", write, kind, number)
        missing = cells.missing(SUITE, by_name, cell)
        for start in range(0, len(missing), GROUP):
            group = [by_name[name] for name in missing[start : start + GROUP]]
            if written["status"] != "ok":
                found = {method.name: {"status": written["status"]} for method in group}
            else:
                own = torch.tensor(written["tokens"], dtype=torch.long, device="cpu")
                found = _follow(model, group, rows[number], own, bins, step, sink_length)
            for name, result in found.items():
                cells.put(SUITE, name, cell, result)
    settings = {
        "context": context,
        "prompts": len(rows),
        "new_tokens": new_tokens,
        "bins": bins,
        "step": step,
        "temperature": temperature,
    }
    entries = {
        m.name: _entry(m, [(k, cells.get(SUITE, m.name, f"{k} {n}")) for k, n in places], new_tokens) for m in methods
    }
    return DivergenceResult(settings, entries)


def _prompts(tokens: Tensor, opening: Tensor, context: int, count: int) -> Tensor:
    """Prompts ``[count, context]``, from places all over the text that do not overlap."""
    room = context - len(opening)
    most = len(tokens) // room if room > 0 else 0
    if count < 1 or most < 1:
        raise QuantCacheError(
            f"{count} prompts of {context} tokens, {len(opening)} of them special ones, cannot be taken from a text of "
            f"{len(tokens)} tokens"
        )
    count = min(count, most)
    starts = [number * len(tokens) // count for number in range(count)]
    return torch.stack([torch.cat((opening, tokens[start : start + room])) for start in starts])


def continuation(model: PreTrainedModel, prompt: Tensor, count: int, temperature: float, seed: int | None) -> Tensor:
    """What the dense cache writes behind a prompt, token by token.

    Args:
        model: Decoder-only model.
        prompt: ``[T]``.
        count: Tokens to write; those that end a text are never chosen.
        temperature: Of sampling.
        seed: Of sampling; the most likely token each time if None.

    Returns:
        ``[count]``, on the CPU.
    """
    cache = dense_method(model).make_cache()
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    ends = sorted(end_tokens(model))

    def choose(logits: Tensor) -> Tensor:
        scores = logits.float().cpu()
        scores[:, ends] = -torch.inf
        if draw is None:
            return most_likely(scores)
        return torch.multinomial((scores / temperature).softmax(-1), 1, generator=draw)

    feed(model, cache, prompt[None, :-1], PROMPT_CHUNK)
    written = map(int, itertools.islice(decode_tokens(model, cache, prompt[None, -1:], choose), count))
    return torch.tensor(list(written), dtype=torch.long, device="cpu")


def edges(context: int, count: int, step: int, sink_length: int) -> list[tuple[int, int]]:
    """Where a prompt and its continuation are cut: the prompt in large chunks, what follows in steps.

    The prompt's last token predicts the first of the continuation and belongs to the steps. They end where a multiple
    of ``step`` lies behind the sinks, so that blocks fill up at the end of a step.

    Args:
        context: Tokens of the prompt.
        count: Tokens of the continuation; the last one is predicted, not read.
        step: Tokens in a step.
        sink_length: First tokens kept by every method.

    Returns:
        (first token, one past the last) of every piece; together ``context + count - 1`` tokens.
    """
    first, last = context - 1, context + count - 1
    aligned = first + (sink_length - first) % step
    cuts = [*range(0, first, PROMPT_CHUNK), first, *range(aligned, last, step), last]
    return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]


@torch.no_grad()
def _follow(
    model: PreTrainedModel,
    methods: list[Method],
    prompt: Tensor,
    written: Tensor,
    bins: int,
    step: int,
    sink_length: int,
) -> dict[str, dict[str, Any]]:
    """Figures of a few methods that read a continuation, from one dense pass."""
    window = torch.cat((prompt, written)).to(compat.input_device(model))
    ends = torch.tensor(sorted(end_tokens(model)), dtype=torch.long, device=window.device)  # never chosen
    failed = {method.name: f"unsupported: {method.unsupported}" for method in methods if method.unsupported}
    reference, caches = dense_method(model).make_cache(), {}
    for method in methods:
        if method.family != "dense" and method.name not in failed:
            with recorded(failed, method.name):
                caches[method.name] = method.make_cache()
    parts = {method.name: 2 if method.family == "floor" else 1 for method in methods}
    kl: dict[str, list[Tensor]] = {method.name: [] for method in methods}
    best: dict[str, list[Tensor]] = {method.name: [] for method in methods}
    expected = []
    for first, last in edges(len(prompt), len(written), step, sink_length):
        counts = first >= len(prompt) - 1
        dense = log_probabilities(model, window[first:last], reference)
        expected += [dense.index_fill(-1, ends, -torch.inf).argmax(-1).cpu()] * counts
        for method in methods:
            name = method.name
            if name in failed:
                continue
            with recorded(failed, name):
                own = (
                    log_probabilities(model, window[first:last], caches[name], parts[name]) if name in caches else dense
                )
                if counts:
                    kl[name].append(kl_divergence(dense, own))
                    best[name].append(own.index_fill(-1, ends, -torch.inf).argmax(-1).cpu())
    results = {}
    for name in kl:
        if name in failed:
            results[name] = {"status": failed[name]}
            continue
        figures = (torch.cat(kl[name]), torch.cat(best[name]), torch.cat(expected), written, bins)
        results[name] = attempt(_figures, *figures)
    return results


def _figures(kl: Tensor, best: Tensor, expected: Tensor, written: Tensor, bins: int) -> dict[str, Any]:
    """What is kept of one continuation: KL divergence, own and dense most likely tokens, and the text, all ``[T]``."""
    lost = int((~kl.isfinite()).sum())
    if lost:
        raise ArithmeticError(f"at {lost} of {len(kl)} positions the KL divergence is not finite")
    place = torch.arange(len(kl), dtype=torch.float64, device=kl.device) - (len(kl) - 1) / 2
    differs = (best != written).nonzero()
    return {
        "mean": float(kl.mean()),
        "bins": [float(part.mean()) for part in kl.tensor_split(bins)],
        "slope": float((place * kl).sum() / place.square().sum()) * 1000,
        "top1": float((best == expected).float().mean()),
        "departs": int(differs[0]) if len(differs) else None,
    }


def _entry(method: Method, results: list[tuple[str, dict[str, Any]]], new_tokens: int) -> DivergenceEntry:
    bad = [result["status"] for _, result in results if result["status"] != "ok"]
    if bad:
        return DivergenceEntry(method.family, method.simulated, bad[0])
    curves = {}
    for kind in KINDS:
        own = [result for of, result in results if of == kind]
        figures = {name: summaries.mean([result[name] for result in own]) for name in ("mean", "slope", "top1")}
        bins = [summaries.mean(list(each)) for each in zip(*(result["bins"] for result in own), strict=True)]
        curves[kind] = Curve(bins=bins, **figures)
    points: list[int | None] = [result["departs"] for of, result in results if of == "greedy"]
    half = sorted(math.inf if point is None else point for point in points)[(len(points) - 1) // 2]
    median = None if half == math.inf else int(half)
    return DivergenceEntry(method.family, method.simulated, "ok", curves, Departure(points, median, new_tokens))
