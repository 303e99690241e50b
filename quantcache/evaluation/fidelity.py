"""How far a compressed cache moves a model's predictions: KL divergence, agreement and perplexity.

Text is fed in chunks through real caches, so that every chunk reads the compressed past; only the tokens of the chunk
itself, the sinks and the residual window are exact. All methods see the same chunks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.accounting.measuring import measure
from quantcache.common import compat
from quantcache.common.defaults import CHUNK, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.methods import Method, MethodUnavailable, parse_methods


@dataclass(frozen=True)
class FidelityResult:
    """What one method did to the predictions.

    Attributes:
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache held fake-quantized values instead of codes.
        status: ``ok``, ``unsupported: ...``, ``out of memory`` or ``failed: ...``.
        bits_per_element: Codes and scales over encoded elements, at the end of a window (dense: the dtype's bits).
        bits_per_element_total: Everything but shared constants over all cached elements, likewise.
        cache_bytes: Bytes of the cache at the end of a window.
        kl_mean: Mean KL divergence from the dense predictions, nats per token.
        kl_stderr: Standard error of that mean over tokens.
        kl_p99: Its 99th percentile.
        kl_max: Largest KL of any position.
        perplexity: exp of the mean negative log-likelihood of the text.
        perplexity_stderr: Standard error of the perplexity over tokens.
        top1_agreement: Share of positions with the same most likely token.
        tokens: Positions measured.
        sink_length: First tokens that the method keeps; None where its cache decides for itself.
        residual_length: Recent tokens that it keeps, likewise.
    """

    family: str
    simulated: bool
    status: str
    bits_per_element: float | None = None
    bits_per_element_total: float | None = None
    cache_bytes: int | None = None
    kl_mean: float | None = None
    kl_stderr: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    top1_agreement: float | None = None
    tokens: int = 0
    sink_length: int | None = None
    residual_length: int | None = None

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

    def add(self, dense: Tensor, own: Tensor, targets: Tensor) -> None:
        """Add the log-probabilities ``[T, vocabulary]`` of one chunk, and the next tokens ``[T or T - 1]``."""
        # Words that a model never says have no probability under either: 0 times log(0 / 0).
        kl = torch.where(dense == -torch.inf, 0.0, dense.exp() * (dense - own)).sum(-1)
        self.kl.append(kl.double().cpu())
        self.agree.append((dense.argmax(-1) == own.argmax(-1)).cpu())
        self.nll.append(-own[: len(targets)].gather(-1, targets[:, None]).squeeze(-1).double().cpu())

    def result(self, method: Method) -> FidelityResult:
        """The method's figures."""
        kl, nll, agree = torch.cat(self.kl), torch.cat(self.nll), torch.cat(self.agree)
        assert self.sizes is not None
        lost = int((~kl.isfinite()).sum())
        if lost:
            status = f"failed: at {lost} of {len(kl)} positions the KL divergence is not finite"
            return FidelityResult(method.family, method.simulated, status)
        perplexity = float(nll.mean().exp())
        return FidelityResult(
            family=method.family,
            simulated=method.simulated,
            status="ok",
            bits_per_element=self.sizes[0],
            bits_per_element_total=self.sizes[1],
            cache_bytes=self.sizes[2],
            kl_mean=float(kl.mean()),
            kl_stderr=float(kl.std()) / math.sqrt(len(kl)),
            kl_p99=float(kl.quantile(0.99)) if kl.numel() < 1 << 24 else float(kl.kthvalue(int(0.99 * len(kl)))[0]),
            kl_max=float(kl.max()),
            perplexity=perplexity,
            perplexity_stderr=perplexity * float(nll.std()) / math.sqrt(len(nll)),
            top1_agreement=float(agree.double().mean()),
            tokens=len(kl),
            sink_length=method.sink_length,
            residual_length=method.residual_length,
        )


def chunk_edges(context: int, chunk: int, sink_length: int) -> list[tuple[int, int]]:
    """Where a window is cut.

    The first chunk is longer by the sinks, so that with no residual every later chunk starts at a block and reads
    nothing but codes and sinks.

    Args:
        context: Tokens in a window.
        chunk: Tokens in a chunk.
        sink_length: First tokens kept by every method.

    Returns:
        (first token, one past the last) of every chunk.
    """
    edges = [0, *range(min(context, chunk + sink_length), context, chunk), context]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


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
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, FidelityResult]:
    """Measure methods against the dense cache on the same text.

    Args:
        model: The model; attention ``"spectral"`` is the fast one, any is right.
        tokens: Text, ``[N]``; cut into ``N // context`` windows.
        methods: What to measure.
        context: Tokens in a window.
        chunk: Tokens fed at once.
        sink_length: First tokens kept by every method, for :func:`chunk_edges`.
        stride: Let windows slide by so many tokens instead; each then predicts the last ``stride`` of its tokens only,
            the first one all of them, so that every token is predicted once and from a long past.
        on_progress: Called with the tokens of every finished chunk.

    Returns:
        One result for each method. A method that fails or cannot be run keeps its place, with the reason as its status.

    Raises:
        QuantCacheError: The text is shorter than one window, or the stride is none.
    """
    if len(tokens) < context:
        raise QuantCacheError(f"the text has {len(tokens)} tokens, one window needs {context}")
    if stride is not None:
        check_stride(stride, context)
    device = compat.input_device(model)
    tallies = {method.name: _Tally() for method in methods}
    failed = {method.name: f"unsupported: {method.unsupported}" for method in methods if method.unsupported}
    dense_method = next((m for m in methods if m.family == "dense"), None)
    reference = dense_method or parse_methods(["dense"], model.config, None)[0]
    for number, window in enumerate(tokens.unfold(0, context, stride or context).to(device)):
        scored = range(0 if not number or stride is None else context - stride - 1, context - (stride is not None))
        dense_cache = reference.make_cache()
        caches = {}
        for method in methods:
            if method is not dense_method and method.name not in failed:
                with _recorded(failed, method.name):
                    caches[method.name] = method.make_cache()
        for first, last in chunk_edges(context, chunk, sink_length):
            targets = window[first + 1 : last + 1]
            rows = slice(max(scored.start - first, 0), max(scored.stop - first, 0))
            dense = _log_probabilities(model, window[first:last], dense_cache)
            if dense_method is not None:
                tallies[dense_method.name].add(dense[rows], dense[rows], targets[rows])
            for name, cache in caches.items():
                if name not in failed:
                    with _recorded(failed, name):
                        own = _log_probabilities(model, window[first:last], cache)
                        tallies[name].add(dense[rows], own[rows], targets[rows])
            if on_progress is not None:
                on_progress(last - first)
        for name, cache in [*caches.items(), *([(dense_method.name, dense_cache)] if dense_method else [])]:
            if name not in failed:
                memory = measure(cache)
                total = memory.bits_per_element_total
                tallies[name].sizes = (memory.bits_per_element or total, total, memory.total)
    return {
        method.name: FidelityResult(method.family, method.simulated, failed[method.name])
        if method.name in failed
        else tallies[method.name].result(method)
        for method in methods
    }


@contextlib.contextmanager
def _recorded(failed: dict[str, str], name: str) -> Iterator[None]:
    """Turn a method's failure into its status, so that the others go on."""
    try:
        yield
    except MethodUnavailable as error:
        failed[name] = f"unsupported: {error}"
    except (MemoryError, torch.OutOfMemoryError):
        failed[name] = "out of memory"
    except (RuntimeError, ValueError, NotImplementedError, QuantCacheError) as error:
        failed[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"


def _log_probabilities(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Log-probabilities ``[T, vocabulary]`` of one chunk."""
    logits = model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits
    return logits[0].float().log_softmax(-1)
