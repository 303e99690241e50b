"""Routing: whether attention still looks at the same keys, and how far its output moves, layer by layer.

One dense forward pass gives queries, keys and values. Every method's cache is handed the same keys and values, and what
it gives back is attended on by the same queries, one layer at a time: an error of one layer does not reach the next.

Shapes: B batch, H key-value heads, G query heads of each, Tq queries, T tokens, R = G * Tq, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.attention import guards
from quantcache.attention.function import spectral_attention_forward
from quantcache.attention.probe import replaced_attention
from quantcache.backends import AttentionCall
from quantcache.backends.online_softmax import QueryRows
from quantcache.common import compat
from quantcache.common.ambient import in_float64
from quantcache.common.defaults import CHUNK, SINK_LENGTH
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.common.sequences import cut_windows
from quantcache.evaluation import summaries
from quantcache.evaluation.cells import Cells, attempt
from quantcache.evaluation.feeding import check_lengths, pieces
from quantcache.evaluation.methods import Method, reading_codes

SUITE = "routing"

GROUP = 8
"""Methods that share one dense pass."""


@dataclass(frozen=True)
class LayerRouting:
    """What one method did to one layer.

    Attributes:
        flips: Share of (query, head) whose key of highest score is another one.
        cosine: Mean cosine between attention outputs of one query and head, before the output projection.
        relative_error: Root of summed squared difference over summed squared output.
        n: Pairs of query and head.
    """

    flips: float
    cosine: float
    relative_error: float
    n: int


@dataclass(frozen=True)
class RoutingEntry:
    """What one method did.

    Attributes:
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache held fake-quantized values instead of codes.
        status: ``ok``, or what went wrong.
        flips: Mean over layers of the share of (query, head) whose key of highest score is another one; its standard
            error is over windows, ``n`` counts windows.
        cosine: The same of the cosine between attention outputs.
        relative_error: The same of the relative error of attention outputs.
        layers: Every full-attention layer's figures.
    """

    family: str
    simulated: bool
    status: str
    flips: summaries.Summary | None = None
    cosine: summaries.Summary | None = None
    relative_error: summaries.Summary | None = None
    layers: dict[str, LayerRouting] = field(default_factory=dict)


@dataclass(frozen=True)
class RoutingResult:
    """Routing of all methods.

    Attributes:
        settings: Everything that was chosen.
        methods: One entry for each method.
    """

    settings: dict[str, Any]
    methods: dict[str, RoutingEntry]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def measure_routing(
    model: PreTrainedModel,
    tokens: Tensor,
    methods: Sequence[Method],
    *,
    context: int,
    windows: int = 2,
    chunk: int = CHUNK,
    sink_length: int = SINK_LENGTH,
    cells: Cells | None = None,
) -> RoutingResult:
    """Compare where attention looks, and what it gives, with the dense cache.

    Queries of a window's first chunk see nothing that was compressed and are not counted.

    Args:
        model: Decoder-only model to measure.
        tokens: Text, ``[N]``.
        methods: What to measure.
        context: Tokens in a window.
        windows: Windows to use at most.
        chunk: Tokens fed at once.
        sink_length: First tokens kept by every method: the first chunk is longer by them.
        cells: Where finished cells are kept.

    Returns:
        Figures of every method and layer. A method that fails, or reads no codes, keeps its place, with the reason as
        its status.

    Raises:
        QuantCacheError: The text is shorter than one window, or a window not longer than its first chunk and the sinks.
        UnsupportedModel: The model does not call attention through transformers' interface.
    """
    cells = cells or Cells()
    check_lengths(model, [context], "context")
    rows = cut_windows(model.config, tokens, context)[:windows]
    if not len(rows):
        raise QuantCacheError(f"the text has {len(tokens)} tokens, one window needs {context}")
    if context <= chunk + sink_length:
        raise QuantCacheError(
            f"routing needs windows of more than the first chunk and sinks: {context} tokens, of which they take "
            f"{chunk + sink_length}"
        )
    last = pieces(rows[:1], chunk, sink_length)[-1].shape[1]
    methods = reading_codes(methods, context, cached=context - last)
    by_name = {method.name: method for method in methods}
    cells.plan(SUITE, len(rows) * len(methods))
    for number, row in enumerate(rows):
        missing = cells.missing(SUITE, by_name, f"window {number}")
        for first in range(0, len(missing), GROUP):
            group = {name: by_name[name] for name in missing[first : first + GROUP]}
            for name, result in _measure_window(model, row[None], group, chunk, sink_length).items():
                cells.put(SUITE, name, f"window {number}", result)
    settings = {"context": context, "windows": len(rows), "chunk": chunk, "sinks": sink_length}
    return RoutingResult(settings, {m.name: _entry(m, len(rows), cells) for m in methods})


@torch.no_grad()
def _measure_window(
    model: PreTrainedModel, tokens: Tensor, methods: dict[str, Method], chunk: int, sink_length: int
) -> dict[str, dict[str, Any]]:
    """Figures of one window ``[1, T]`` by method: ``layers``, and ``status``."""
    full = set(cache_layout.full_attention_layers(model.config))
    results: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in methods}
    caches: dict[str, Cache] = {}

    def make(name: str, method: Method) -> dict[str, Any]:
        caches[name] = method.make_cache()
        return {}

    for name, method in methods.items():
        results[name] = attempt(make, name, method)
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in methods}
    seen: set[int] = set()
    started = False

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any):
        index = getattr(module, "layer_idx", None)
        if index in full:
            seen.add(index)
            reader = _Reader(module, query, key, value, mask, more)
            exact = reader.attend(key, value) if started else None
            new_keys, new_values = key[:, :, -query.shape[2] :], value[:, :, -query.shape[2] :]
            for name, cache in caches.items():
                if results[name]["status"] != "ok":
                    continue

                def work(cache: Cache = cache, name: str = name) -> dict[str, Any]:
                    read_keys, read_values = cache.update(new_keys, new_values, index)
                    # Reading makes the cache encode what is due, also where nothing is compared yet.
                    read_keys, read_values = read_keys + 0, read_values + 0
                    if exact is not None:
                        found = _compare(exact, reader.attend(read_keys, read_values))
                        before = sums[name].get(index)
                        sums[name][index] = found if before is None else before + found
                    return {}

                results[name] = attempt(work)
        return spectral_attention_forward(module, query, key, value, mask, **more)

    dense = DynamicCache(config=model.config)
    with replaced_attention(model, attention):
        for part in pieces(tokens.to(compat.input_device(model)), chunk, sink_length):
            model(input_ids=part, **compat.cache_argument(model, dense), use_cache=True, logits_to_keep=1)
            started = True
    if not seen:
        raise UnsupportedModel(
            f"{type(model).__name__} does not call attention through transformers' attention interface, so its routing "
            "cannot be observed"
        )
    return {
        name: attempt(_layers, sums[name]) if result["status"] == "ok" else result for name, result in results.items()
    }


def _layers(sums: dict[int, Tensor]) -> dict[str, Any]:
    """Figures of every layer, from the sums of :func:`_compare`."""
    for index, total in sorted(sums.items()):
        if not total.isfinite().all():
            raise ArithmeticError(f"attention outputs of layer {index} are not finite")
    return {"layers": {str(index): _figures(total) for index, total in sorted(sums.items())}}


class _Reader:
    """The queries of one attention call, ready to attend on several versions of its keys and values."""

    def __init__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
    ):
        if more.get("position_bias") is not None:
            raise UnsupportedModel(f"{type(module).__name__} adds a position bias, which routing does not support")
        causal = more.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        place = (0, query.shape[2])
        scaling = guards.fitting_scaling(more.get("scaling"), query)
        call = AttentionCall(mask, scaling, causal, more.get("softcap"))
        self.rows = QueryRows(query, key.shape[1], key.shape[2], call, place)
        self.s_aux: Tensor | None = more.get("s_aux")

    def attend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Key of highest score ``[B, H, R]``, and output ``[B, H, R, D]``."""
        raw = self.rows.query @ key.float().transpose(-1, -2)
        scores = self.rows.scores(raw, 0, key.shape[2])
        best = scores.argmax(-1)
        if self.s_aux is not None:
            scores = torch.cat((scores, self.rows.sink_scores(self.s_aux)), dim=-1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        return best, weights @ value.float()


def _compare(exact: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> Tensor:
    """Sums over (query, head): flips, cosine, squared error, squared output, count."""
    output, other = in_float64(exact[1]), in_float64(found[1])
    cosine = torch.nn.functional.cosine_similarity(output, other, dim=-1)
    return torch.stack(
        (
            in_float64(exact[0] != found[0]).sum(),
            cosine.sum(),
            (output - other).square().sum(),
            output.square().sum(),
            torch.tensor(float(cosine.numel()), dtype=torch.float64, device=cosine.device),
        )
    ).cpu()


def _figures(total: Tensor) -> dict[str, Any]:
    flips, cosine, error, power, count = total.tolist()
    return {
        "flips": flips / count,
        "cosine": cosine / count,
        "relative_error": (error / power) ** 0.5 if power else 0.0,
        "n": int(count),
    }


def _entry(method: Method, windows: int, cells: Cells) -> RoutingEntry:
    results = [cells.get(SUITE, method.name, f"window {number}") for number in range(windows)]
    bad = [result["status"] for result in results if result["status"] != "ok"]
    if bad:
        return RoutingEntry(method.family, method.simulated, bad[0])
    names = list(results[0]["layers"])

    def over_layers(figure: str) -> summaries.Summary:
        return summaries.mean([sum(r["layers"][n][figure] for n in names) / len(names) for r in results])

    def over_windows(name: str, figure: str) -> float:
        return sum(result["layers"][name][figure] for result in results) / windows

    layers = {
        name: LayerRouting(
            over_windows(name, "flips"),
            over_windows(name, "cosine"),
            over_windows(name, "relative_error"),
            sum(result["layers"][name]["n"] for result in results),
        )
        for name in names
    }
    return RoutingEntry(
        method.family,
        method.simulated,
        "ok",
        over_layers("flips"),
        over_layers("cosine"),
        over_layers("relative_error"),
        layers,
    )
