"""Published findings about KV caches, each measured again on wiki11m.

Quantization against rank reduction at matched storage, and how many attention decisions each flips; the ratio of what
deleting a direction costs to what quantizing it costs; and whether the basis matters at 4 bits and at 2. Sources:
arXiv 2604.11501 and 2604.20682 for all but the basis at 2 bits, which is OSCAR's (arXiv 2605.17757).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fidelity import CHUNK, SINKS
from inputs import read
from records import Run, write_record
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from quantcache import data
from quantcache.attention.probe import RecordingCache, recorded_queries, run
from quantcache.cli.loading import load_model
from quantcache.coding import linalg
from quantcache.common.sequences import text_tokens
from quantcache.evaluation.fidelity import measure_fidelity
from quantcache.evaluation.methods import Method, parse_methods, text_statistics
from quantcache.evaluation.methods.base import Setting, SimulatedCodec, hadamard, simulated_cache
from quantcache.evaluation.methods.calibrated import PcaCodec, RankCodec
from quantcache.evaluation.methods.integer import QuarotCodec
from quantcache.evaluation.methods.statistics import RivalStatistics, eigenbasis
from quantcache.evaluation.provenance import text_sha256
from quantcache.evaluation.summaries import quantiles

BASES = ("none", "random", "Hadamard", "PCA of the vectors", "queries' and outputs' moments")
FIRST_QUERY = 64
"""Queries before this one see too few keys to say anything."""


def main() -> None:
    """Measure and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--context", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=2, help="windows of the evaluation text")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    options = parser.parse_args()
    model, tokenizer = load_model("wiki11m", device="cpu", dtype="float32")
    calibration_text, calibration_source = read("wiki_calib.txt", data.calibration_text)
    evaluation_text, evaluation_source = read("wiki_eval.txt", data.evaluation_text)
    tokens = text_tokens(tokenizer, evaluation_text, options.windows * options.context)
    statistics = text_statistics(model, tokenizer, calibration_text, options.calibration_tokens)
    settings = {
        "model": "wiki11m",
        "dtype": "float32",
        "context": options.context,
        "windows": options.windows,
        "chunk": CHUNK,
        "sinks": SINKS,
        "residual": 0,
        "calibration": {
            "source": calibration_source,
            "tokens": statistics.tokens,
            "text_sha256": statistics.text_sha256,
        },
        "evaluation": {
            "source": evaluation_source,
            "tokens": len(tokens),
            "text_sha256": text_sha256(evaluation_text),
        },
    }
    kept = Run("findings", settings)

    def fidelity(methods: list[Method]) -> dict[str, Any]:
        found = measure_fidelity(model, tokens, methods, context=options.context, chunk=CHUNK, sink_length=SINKS)
        return {name: result.to_dict() for name, result in found.items()}

    setting = Setting(model.config, None, statistics, SINKS, 0)
    _, dim = next(iter(statistics.layers.values())).key.sum.shape
    names = [name for bits in (2, 3, 4) for name in (f"pca-{bits}", f"rank-{dim * bits // 16}")]
    console = Console(stderr=True)
    metrics: dict[str, Any] = {}
    with console.status("storage"):
        methods = parse_methods(names, model.config, None, SINKS, 0, statistics=statistics)
        metrics["storage"] = kept.cell("storage", lambda: fidelity(methods))
    metrics["bases"] = {}
    for bits in (4, 2):
        with console.status(f"bases at {bits} bits"):
            flat = [Method(basis, "rival", True, flat_cache(setting, basis, bits)) for basis in BASES]
            metrics["bases"][str(bits)] = kept.cell(f"bases-{bits}", lambda flat=flat: fidelity(flat))
    with console.status("ratio and routing"):
        window = tokens[: min(len(tokens), 1024)]
        metrics["ratio"] = kept.cell("ratio", lambda: damage_ratios(model, window))
        metrics["routing"] = kept.cell("routing", lambda: routing_flips(model, window, statistics))
    write_record("findings", settings, metrics)
    kept.discard()


def flat_cache(setting: Setting, basis: str, bits: int) -> Callable[[], Any]:
    """A maker of caches with codes of one width per token, in a basis."""
    statistics = setting.statistics
    assert statistics is not None

    def codec(index: int, side: str, x: Tensor, device: torch.device) -> SimulatedCodec:
        return QuarotCodec(rotation(statistics, index, side, basis).to(device), bits, clip=1.0)

    return simulated_cache(setting, codec)


def rotation(statistics: RivalStatistics, index: int, side: str, basis: str) -> Tensor:
    """An orthogonal basis for one side of a layer, ``[D, D]`` or ``[H, D, D]``."""
    layer = statistics.layers[index]
    heads, dim = layer.side(side).sum.shape
    if basis == "none":
        return torch.eye(dim)
    if basis == "random":
        generator = torch.Generator().manual_seed(2 * index + (side == "value"))
        return linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0]
    if basis == "Hadamard":
        return hadamard(dim)
    if basis == "PCA of the vectors":
        return eigenbasis(layer.side(side).covariance)[1].float()
    seen = layer.query if side == "key" else layer.output
    return eigenbasis(seen.second_moment)[1].float()


def attention(model: PreTrainedModel, tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rotated queries ``[Hkv, G, T, D]`` and keys ``[Hkv, T, D]`` of every layer of one sequence, float64."""
    queries: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}

    def on_query(index: int, query: Tensor) -> None:
        queries[index] = query[0].double()

    def on_update(index: int, key: Tensor, value: Tensor) -> None:
        keys[index] = key[0].double()

    with torch.no_grad(), recorded_queries(model, on_query):
        run(model, tokens[None], RecordingCache(model.config, on_update))
    for index, key in keys.items():
        yield index, queries[index].unflatten(0, (len(key), -1)), key


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Causal scores ``[G, T, T]`` of one head."""
    length = key.shape[0]
    scores = query @ key.T / key.shape[1] ** 0.5
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))


def damage_ratios(model: PreTrainedModel, tokens: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """Second-order KL of deleting a key direction over that of quantizing it, in units of 3·2^(2b).

    Args:
        model: The model.
        tokens: One sequence.

    Returns:
        By bits and step, a summary over all principal directions of all heads.
    """
    found: dict[tuple[int, str], list[float]] = {}
    for _, queries, keys in attention(model, tokens):
        for query, key in zip(queries, keys, strict=True):
            weights = _scores(query, key).softmax(-1)[:, FIRST_QUERY:].flatten(0, 1)  # [Q, T]
            centred = key - key.mean(0)
            basis = linalg.eigh(centred.T @ centred)[1]
            exact = centred @ basis  # [T, D]
            importance = (query[:, FIRST_QUERY:].flatten(0, 1) @ basis).square()  # [Q, D]

            def damage(error: Tensor, weights: Tensor = weights, importance: Tensor = importance) -> Tensor:
                variance = weights @ error.square() - (weights @ error).square()
                return (importance * variance).sum(0)

            deleted = damage(exact)
            for bits in (2, 3, 4):
                spans = {
                    "2 sigma": 2 * exact.std(0) / 2**bits,
                    "range": (exact.amax(0) - exact.amin(0)) / (2**bits - 1),
                }
                for name, step in spans.items():
                    quantized = ((exact - exact.amin(0)) / step).round() * step + exact.amin(0)
                    ratios = deleted / damage(quantized - exact) / (3 * 4**bits)
                    found.setdefault((bits, name), []).extend(ratios.tolist())
    return {str(bits): {name: quantiles(found[bits, name]) for name in ("2 sigma", "range")} for bits in (2, 3, 4)}


def routing_flips(model: PreTrainedModel, tokens: Tensor, statistics: RivalStatistics) -> dict[str, dict[str, float]]:
    """Share of (query, head) whose strongest key changes, exact queries on coded keys.

    Args:
        model: The model.
        tokens: One sequence.
        statistics: For PCA and ranks.

    Returns:
        By method, its bits and the share.
    """
    flips: dict[str, list[float]] = {}
    bits_of: dict[str, float] = {}
    for index, queries, keys in attention(model, tokens):
        moments = statistics.layers[index].key
        dim = keys.shape[-1]
        codecs: dict[str, SimulatedCodec] = {}
        for bits in (2, 3, 4):
            codecs[f"int{bits} per token"] = QuarotCodec(torch.eye(dim), bits, clip=1.0)
            codecs[f"pca-{bits}"] = PcaCodec(moments, bits)
            codecs[f"rank-{dim * bits // 16}"] = RankCodec(moments, dim * bits // 16)
        for name, codec in codecs.items():
            assert codec.bits is not None
            bits_of[name] = codec.bits
            coded = codec.reconstruct(keys[None].float())[0].double()
            for query, key, changed in zip(queries, keys, coded, strict=True):
                exact = _scores(query, key)[:, FIRST_QUERY:].argmax(-1)
                differs = exact != _scores(query, changed)[:, FIRST_QUERY:].argmax(-1)
                flips.setdefault(name, []).append(float(differs.double().mean()))
    return {name: {"bits": bits_of[name], "share": sum(shares) / len(shares)} for name, shares in flips.items()}


if __name__ == "__main__":
    main()
