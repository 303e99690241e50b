"""How far a compressed cache moves a model's predictions: KL divergence, agreement and perplexity.

Text is fed in chunks through real caches, so that every chunk reads the compressed past; only the tokens of the chunk
itself, the sinks and the residual window are exact. All methods see the same chunks.

At an equal exact tail the first chunk is longer by sinks and tail, so that whenever a later chunk is read everything
before the tail is coded, whether blocks are of 64 tokens or of 128; only those later chunks count.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.accounting.measuring import measure
from quantcache.common import compat
from quantcache.common.defaults import CHUNK, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.sequences import cut_windows
from quantcache.evaluation import summaries
from quantcache.evaluation.cells import describe_failure
from quantcache.evaluation.feeding import chunk_edges, dense_method
from quantcache.evaluation.methods import Method, reading_codes

STRETCH = 64
"""Neighbouring positions that count as one for a standard error: what is hard about a text is so for all of them, and
over positions by themselves the error of a KL divergence looks half as large as it is."""


@dataclass(frozen=True)
class FidelityResult:
    """What one method did to the predictions.

    Attributes:
        family: ``ours``, ``rival``, ``dense`` or ``floor``.
        simulated: Whether the cache held fake-quantized values instead of codes.
        status: ``ok``, ``unsupported: ...``, ``out of memory`` or ``failed: ...``.
        bits_per_element: Codes and scales over encoded elements, at the end of a window (dense: the dtype's bits).
        bits_per_element_total: Everything but shared constants over all cached elements, likewise.
        cache_bytes: Bytes of the cache at the end of a window.
        kl_mean: Mean KL divergence from the dense predictions, nats per token.
        kl_stderr: Standard error of that mean over stretches of :data:`STRETCH` positions; None for a single one.
        kl_median: Median over positions.
        kl_p99: 99th percentile.
        kl_p999: Percentile 99.9.
        kl_max: Largest KL of any position.
        kl_windows: Mean of every window, to be paired with another method's.
        window_tokens: Positions measured in every window.
        perplexity: exp of the mean negative log-likelihood of the text.
        perplexity_stderr: Standard error of the perplexity, likewise.
        top1_agreement: Share of positions with the same most likely token.
        tokens: Positions measured.
        sink_length: First tokens that the method keeps; None where its cache decides for itself.
        residual_length: Recent tokens that it keeps, likewise.
        exact_tail: Recent tokens that were exact whenever a counted chunk was read; None where none was asked for, or
            the method cannot keep it.
    """

    family: str
    simulated: bool
    status: str
    bits_per_element: float | None = None
    bits_per_element_total: float | None = None
    cache_bytes: int | None = None
    kl_mean: float | None = None
    kl_stderr: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    kl_max: float | None = None
    kl_windows: list[float] = field(default_factory=list)
    window_tokens: list[int] = field(default_factory=list)
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    top1_agreement: float | None = None
    tokens: int = 0
    sink_length: int | None = None
    residual_length: int | None = None
    exact_tail: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


class _Tally:
    """Running figures of one method."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.nll: list[Tensor] = []
        self.agree: list[Tensor] = []
        self.sizes: tuple[float, float, int] | None = None
        self.windows: list[int] = []
        self.predicted: list[int] = []

    def add(self, dense: Tensor, own: Tensor, targets: Tensor) -> None:
        """Add the log-probabilities ``[T, vocabulary]`` of one chunk, and the next tokens ``[T or T - 1]``."""
        self.kl.append(kl_divergence(dense, own))
        self.agree.append((dense.argmax(-1) == own.argmax(-1)).cpu())
        self.nll.append(-own[: len(targets)].gather(-1, targets[:, None]).squeeze(-1).cpu().double())

    def end_window(self, cache: Any) -> None:
        """Take the sizes of a cache that holds a whole window."""
        memory = measure(cache)
        total = memory.bits_per_element_total
        self.sizes = (memory.bits_per_element or total, total, memory.total)
        self.windows.append(sum(map(len, self.kl)) - sum(self.windows))
        self.predicted.append(sum(map(len, self.nll)) - sum(self.predicted))

    def result(self, method: Method, exact_tail: int | None) -> FidelityResult:
        """The method's figures."""
        kl, nll, agree = torch.cat(self.kl), torch.cat(self.nll), torch.cat(self.agree)
        assert self.sizes is not None
        lost = int((~kl.isfinite()).sum())
        if lost:
            status = f"failed: at {lost} of {len(kl)} positions the KL divergence is not finite"
            return FidelityResult(method.family, method.simulated, status)
        perplexity, nll_stderr = float(nll.mean().exp()), _stderr(nll, self.predicted)
        median, p99, p999 = np.quantile(kl.numpy(), (0.5, 0.99, 0.999)).tolist()  # torch's takes 2^24 values at most
        return FidelityResult(
            family=method.family,
            simulated=method.simulated,
            status="ok",
            bits_per_element=self.sizes[0],
            bits_per_element_total=self.sizes[1],
            cache_bytes=self.sizes[2],
            kl_mean=float(kl.mean()),
            kl_stderr=_stderr(kl, self.windows),
            kl_median=median,
            kl_p99=p99,
            kl_p999=p999,
            kl_max=float(kl.max()),
            kl_windows=[float(part.mean()) for part in kl.split(self.windows) if len(part)],
            window_tokens=[count for count in self.windows if count],
            perplexity=perplexity,
            perplexity_stderr=None if nll_stderr is None else perplexity * nll_stderr,
            top1_agreement=float(agree.double().mean()),
            tokens=len(kl),
            sink_length=method.sink_length,
            residual_length=method.residual_length,
            exact_tail=exact_tail,
        )


def kl_divergence(dense: Tensor, own: Tensor) -> Tensor:
    """How far one prediction is from another, position by position.

    Args:
        dense: Log-probabilities of the reference, ``[T, vocabulary]``.
        own: Log-probabilities of what is held against it.

    Returns:
        KL(dense || own) in nats, ``[T]`` float64 on the CPU.
    """
    # Words that a model never says have no probability under either: 0 times log(0 / 0).
    kl = torch.where(dense == -torch.inf, 0.0, dense.exp() * (dense - own)).sum(-1)
    return kl.cpu().double()


def _stderr(values: Tensor, windows: list[int]) -> float | None:
    """Standard error of a mean over stretches of some windows, of so many values each."""
    parts = [part for window in values.split(windows) for part in window.split(STRETCH) if len(part)]
    return summaries.ratio([float(part.sum()) for part in parts], [len(part) for part in parts])["stderr"]


def check_stride(stride: int, context: int) -> None:
    """Refuse windows that do not overlap, or that do not move.

    Args:
        stride: Tokens by which windows slide.
        context: Tokens in a window.

    Raises:
        QuantCacheError: The stride is not below the window, or not above 0.
    """
    if not 0 < stride < context:
        raise QuantCacheError(f"the stride must lie between 1 and {context - 1}, the window less one, got {stride}")


def check_tail(tail: int, context: int, chunk: int, sink_length: int) -> None:
    """Refuse windows in which nothing would be read from codes.

    Args:
        tail: Recent tokens kept by every method.
        context: Tokens in a window.
        chunk: Tokens in a chunk.
        sink_length: First tokens kept by every method.

    Raises:
        QuantCacheError: The first chunk, with sinks and tail, takes the whole window.
    """
    first = chunk + sink_length + tail
    if first >= context:
        raise QuantCacheError(
            f"a window of {context} tokens reads no codes: sinks {sink_length}, tail {tail} and the first chunk of "
            f"{chunk} take {first}"
        )


def exact_tail(method: Method, tail: int | None, chunk: int) -> int | None:
    """The tail of recent tokens that a method keeps exact whenever a chunk is read.

    Args:
        method: The method.
        tail: What was asked for.
        chunk: Tokens in a chunk.

    Returns:
        ``tail``; None where the method's cache decides for itself, or codes more tokens at once than a chunk has.
    """
    keeps = method.tile is not None and chunk % method.tile == 0 and method.residual_length == tail
    return tail if keeps else None


@torch.no_grad()
def measure_fidelity(
    model: PreTrainedModel,
    tokens: Tensor,
    methods: Sequence[Method],
    *,
    context: int,
    chunk: int = CHUNK,
    sink_length: int = SINK_LENGTH,
    stride: int | None = None,
    tail: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_divergence: Callable[[str, Tensor], None] | None = None,
) -> dict[str, FidelityResult]:
    """Measure methods against the dense cache on the same text.

    Args:
        model: The model; attention ``"spectral"`` is the fast one, any is right.
        tokens: Text, ``[N]``; cut into ``N // context`` windows (see :func:`quantcache.common.sequences.cut_windows`).
        methods: What to measure.
        context: Tokens in a window.
        chunk: Tokens fed at once.
        sink_length: First tokens kept by every method, for :func:`quantcache.evaluation.feeding.chunk_edges`.
        stride: Let windows slide by so many tokens instead; each then predicts the last ``stride`` of its tokens only,
            the first one all of them, so that every token is predicted once and from a long past.
        tail: Compare at an equal exact tail: methods were made with this residual, and only what reads codes counts.
        on_progress: Called with the tokens of every finished chunk.
        on_divergence: Called at the end with the name of every measured method and the KL divergence at each of its
            positions, ``[N]``, in the order of the text.

    Returns:
        One result for each method. A method that fails, cannot be run, or reads no codes in a window keeps its place,
        with the reason as its status.

    Raises:
        QuantCacheError: The text is shorter than one window, the stride is out of range, or no token of a window reads
            codes.
    """
    if len(tokens) < context:
        raise QuantCacheError(f"the text has {len(tokens)} tokens, one window needs {context}")
    if stride is not None:
        check_stride(stride, context)
    if tail is not None:
        check_tail(tail, context, chunk, sink_length)
    edges = chunk_edges(context, chunk, sink_length, tail or 0)
    methods = reading_codes(methods, context, cached=edges[-1][0])
    run = _Run(model, methods, edges, on_progress)
    for number, window in enumerate(cut_windows(model.config, tokens, context, stride).to(compat.input_device(model))):
        first = 0 if not number or stride is None else context - stride - 1
        last = context - (stride is not None)
        run.read(window, range(first if tail is None else max(first, edges[0][1]), last))
    if on_divergence is not None:
        for name in (method.name for method in methods if method.name not in run.failed):
            on_divergence(name, torch.cat(run.tallies[name].kl))
    return {
        method.name: FidelityResult(method.family, method.simulated, run.failed[method.name])
        if method.name in run.failed
        else run.tallies[method.name].result(method, exact_tail(method, tail, chunk))
        for method in methods
    }


class _Run:
    """All methods on one text, window by window."""

    def __init__(
        self,
        model: PreTrainedModel,
        methods: Sequence[Method],
        edges: list[tuple[int, int]],
        on_progress: Callable[[int], None] | None,
    ):
        self.model, self.methods, self.edges, self.on_progress = model, methods, edges, on_progress
        self.tallies = {method.name: _Tally() for method in methods}
        self.failed = {method.name: f"unsupported: {method.unsupported}" for method in methods if method.unsupported}
        self.dense = next((method for method in methods if method.family == "dense"), None)
        self.reference = self.dense or dense_method(model)

    def read(self, window: Tensor, scored: range) -> None:
        """Read one window, and add up what is predicted at some places of it."""
        dense_cache = self.reference.make_cache()
        caches = {}
        for method in self.methods:
            if method is not self.dense and method.name not in self.failed:
                with recorded(self.failed, method.name):
                    caches[method.name] = method.make_cache()
        halved = {method.name for method in self.methods if method.family == "floor"}
        for first, last in self.edges:
            targets = window[first + 1 : last + 1]
            rows = slice(max(scored.start - first, 0), max(scored.stop - first, 0))
            dense = log_probabilities(self.model, window[first:last], dense_cache)
            if self.dense is not None:
                self.tallies[self.dense.name].add(dense[rows], dense[rows], targets[rows])
            for name, cache in caches.items():
                if name not in self.failed:
                    with recorded(self.failed, name):
                        own = log_probabilities(self.model, window[first:last], cache, 2 if name in halved else 1)
                        self.tallies[name].add(dense[rows], own[rows], targets[rows])
            if self.on_progress is not None:
                self.on_progress(last - first)
        for name, cache in [*caches.items(), *([(self.dense.name, dense_cache)] if self.dense else [])]:
            if name not in self.failed:
                self.tallies[name].end_window(cache)


@contextlib.contextmanager
def recorded(failed: dict[str, str], name: str) -> Iterator[None]:
    """Turn a method's failure into its status, so that the others go on.

    Args:
        failed: Status by method, added to where it fails.
        name: The method.
    """
    try:
        yield
    except Exception as error:  # whatever a rival's cache raises is a result about that cache
        failed[name] = describe_failure(error)


def log_probabilities(model: PreTrainedModel, ids: Tensor, cache: Any, parts: int = 1) -> Tensor:
    """Read a chunk, and predict the token behind each of its tokens.

    Args:
        model: The model.
        ids: The chunk, ``[T]``.
        cache: A cache of everything before it, changed in place.
        parts: Pieces in which it is read.

    Returns:
        Log-probabilities, ``[T, vocabulary]`` float32.
    """
    logits = [
        model(input_ids=part[None], **compat.cache_argument(model, cache), use_cache=True).logits[0]
        for part in ids.split(math.ceil(len(ids) / parts))
    ]
    return torch.cat(logits).float().log_softmax(-1)
