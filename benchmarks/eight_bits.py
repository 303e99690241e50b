"""What attention in whole numbers would do to a model: KL divergence beside the same cache read in float32.

python benchmarks/eight_bits.py [MODEL] [--calibration FOLDER]

The cache encodes as ever. Attention on its codes rounds what the integer products of a GPU's tensor cores would take,
which no kernel here uses: levels to signed bytes, gains to half precision, and queries in coded coordinates and weights
to whole numbers, with one unit for each anchor and row; once in twice eight bits and once in eight. The fast dimensions
of keys are read in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from inputs import study, study_parser
from records import suite_of, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from quantcache import Calibration, SpectralCache, backends
from quantcache.backends import reference
from quantcache.backends.cpu import CpuBackend
from quantcache.backends.online_softmax import OnlineSoftmax, QueryRows
from quantcache.backends.view import CacheView
from quantcache.coding import trellis
from quantcache.coding.codebook import gaussian_codebook
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.gains import GAIN_CENTER, dequantize_gain
from quantcache.coding.packing import BLOCK
from quantcache.common.ambient import matmul
from quantcache.common.defaults import CHUNK, SINK_LENGTH
from quantcache.common.sequences import cut_windows
from quantcache.evaluation.feeding import chunk_edges
from quantcache.evaluation.fidelity import kl_divergence, log_probabilities
from quantcache.evaluation.summaries import ratio
from quantcache_kernels.interface import AttentionCall

BOUND = 1.03
"""Mean KL over that of float32 that is aimed at."""


@dataclass(frozen=True)
class Precision:
    """How fine whole numbers are.

    Attributes:
        queries: The largest.
        weights: The largest.
    """

    queries: int
    weights: int


PRECISIONS = {
    "twice 8 bits": Precision(127 * 128, 65_535),
    "8 bits": Precision(127, 255),
    "levels alone": Precision(1 << 30, 1 << 30),  # finer than float32
}


class Rounding(CpuBackend):
    """Encodes as the CPU backend does, and attends in plain torch: in whole numbers, or in float32.

    Args:
        name: The backend's name.
        precision: How fine these are; None for float32.
    """

    def __init__(self, name: str, precision: Precision | None):
        self.name, self.precision = name, precision

    def refuses(self, query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
        """Nothing: it is plain torch."""
        return None

    def attend(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """Attend on sinks, codes and tail."""
        if self.precision is None:
            return reference.attend(query, view, call, True)
        rows = QueryRows(query, view.key.tail.shape[1], view.length, call, (0, query.shape[2]))
        softmax = OnlineSoftmax(rows.query, view.value.tail.shape[3])
        if call.sink_logits is not None:
            softmax.add(rows.sink_scores(call.sink_logits))
        reference._attend_sinks(rows, view, softmax)
        attend_codes(rows, softmax, view, self.precision)
        reference._attend_tail(rows, view, softmax)
        return rows.to_output(softmax.result(), query.dtype)


def largest_level(width: int) -> int:
    """The largest whole level: sixteen of them come from two tables of eight, whose bytes lie around 64."""
    return 63 if width == 4 else 127


def unit_levels(codec: SpectralCodec) -> Tensor:
    """What one unit of a whole level stands for, by coefficient ``[H, D]``; 0 where there are no bits."""
    units = [0.0]
    for width in range(1, 9):
        book = trellis.union_levels(width) if codec.coding == "trellis" else gaussian_codebook(width).levels
        units.append(max(book) / largest_level(width + (codec.coding == "trellis")))
    return torch.tensor(units, dtype=torch.float32)[codec.widths.long()]


def whole_levels(codec: SpectralCodec, fields: dict[str, Tensor], unit: Tensor) -> Tensor:
    """Levels of n blocks as signed bytes hold them, ``[n, B, H, D, 64]`` float32."""
    plain = {"codes": fields["codes"], "gains": torch.full_like(fields["gains"], GAIN_CENTER)}
    scale = torch.where(unit > 0, 1 / unit.clamp_min(1e-30), 0.0)
    return (codec.dequantize(plain) * scale[..., None]).round()


def whole_scores(queries: Tensor, levels: Tensor, gains: Tensor, largest: int) -> Tensor:
    """Scores of one anchor's tokens.

    Args:
        queries: In coded coordinates, times what one unit of a level stands for, ``[..., R, D]``.
        levels: Whole levels, ``[..., D, N]``.
        gains: ``[..., 1, N]``.
        largest: The largest whole number of a query.

    Returns:
        ``[..., R, N]``.
    """
    unit = (queries.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-30)
    return matmul((queries / unit).round() * unit, levels) * gains


def whole_weights(scores: Tensor, gains: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Weights of one anchor's tokens, relative to the largest score.

    Args:
        scores: ``[..., R, N]``, -inf for what is not seen.
        gains: Of the values, ``[..., 1, N]``.
        largest: The largest whole number of a weight times a gain.

    Returns:
        Weights, and weights times gains in whole numbers of a unit, both ``[..., R, N]``.
    """
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).clamp_min(-1e30))
    unit = gains.amax(-1, keepdim=True).clamp_min(1e-10) / largest
    return weights, (weights * gains / unit).round() * unit


def attend_codes(rows: QueryRows, softmax: OnlineSoftmax, view: CacheView, precision: Precision) -> None:
    """Attend on the encoded blocks, anchor by anchor, in whole numbers."""
    keys, values = view.key.codec, view.value.codec
    assert isinstance(keys, SpectralCodec)
    assert isinstance(values, SpectralCodec)
    frame, slow = keys.frame, keys.frame.num_slow
    key_unit, value_unit = unit_levels(keys), unit_levels(values)
    ends = [*itertools.accumulate(len(list(each)) for _, each in itertools.groupby(s.anchor for s in view.spans))]
    for first, last in itertools.pairwise([0, *ends]):
        block_table = view.block_table[first:last]
        fields = view.fields("key", first, last)
        gains = dequantize_gain(fields["gains"]).half().float().unsqueeze(-2)  # [n, B, H, 1, 64]
        raw = reference.code_scores(rows.query, keys, fields, block_table, view.frames)
        # What float32 makes of the slow dimensions is taken out, and what whole numbers make of them put in.
        query = rows.query[None]
        if not frame.is_identity:
            anchors = block_table[:, 2:].long()
            anchors = (anchors if view.frames is None else anchors - view.frames)[:, :, None, None]
            query = frame.enter(query, anchors, anchors)
        coded = matmul(query[..., :slow], keys.decoder[:, :slow, :slow])  # [n, B, H, R, D]
        exact = matmul(coded, keys.dequantize(fields)[..., :slow, :])
        levels = whole_levels(keys, fields, key_unit)[..., :slow, :]
        whole = whole_scores(coded * key_unit[:, None, :slow], levels, gains, precision.queries)
        raw = raw + (whole - exact).permute(1, 2, 3, 0, 4).flatten(3)
        scores = reference._tile_scores(rows, view, block_table, raw)  # [B, H, R, n * 64]
        softmax.add(scores)
        factor = torch.exp(scores.amax(-1, keepdim=True).clamp_min(-1e30) - softmax.peak.clamp_min(-1e30))
        fields = view.fields("value", first, last)
        gains = dequantize_gain(fields["gains"]).half().float().permute(1, 2, 0, 3).flatten(2).unsqueeze(2)
        weights, scaled = (factor * each for each in whole_weights(scores, gains, precision.weights))
        levels = whole_levels(values, fields, value_unit) * value_unit[..., None]
        per_block = scaled.unflatten(-1, (-1, BLOCK)).permute(3, 0, 1, 2, 4)  # [n, B, H, R, 64]
        softmax.accumulate(matmul(per_block, levels.transpose(-1, -2)).sum(0), "codes")
        softmax.accumulate(weights.sum(-1, keepdim=True), "mass")
    in_codes, mass = softmax.sums.pop("codes"), softmax.sums.pop("mass")
    softmax.accumulate(values.synthesize(in_codes) + mass * values.mean[:, None])


@contextmanager
def on_codes(backend: Rounding) -> Iterator[None]:
    """Let a backend serve caches by its name, and whole chunks of queries attend on codes."""
    few, backends.CODE_QUERIES = backends.CODE_QUERIES, CHUNK
    backends.BACKENDS[backend.name] = backend
    try:
        yield
    finally:
        backends.CODE_QUERIES = few
        del backends.BACKENDS[backend.name]


@torch.no_grad()
def measured(model: Any, calibration: Calibration, tokens: Tensor, context: int) -> dict[str, Any]:
    """KL divergence from the dense cache, in float32 and in whole numbers.

    All read the same codes, those of the cache that is read in float32: codes of a cache of one's own differ from the
    first rounding on, and how lucky they are moves the mean by several times what is to be seen here.

    Args:
        model: The model, with spectral attention.
        calibration: How the cache encodes.
        tokens: Text, ``[N]``; cut into windows.
        context: Tokens in a window.

    Returns:
        By what was rounded the mean KL, also of every window, its 99th percentile, and its ratio to that of float32
        with a standard error over windows; all over the positions that read codes.
    """
    backend = Rounding("whole-numbers", None)
    choices: dict[str, Precision | None] = {**PRECISIONS, "float32": None}  # the cache itself goes on last
    kept: dict[str, list[Tensor]] = {name: [] for name in choices}
    with on_codes(backend):
        for window in cut_windows(model.config, tokens, context):
            dense_cache = DynamicCache(config=model.config)
            cache = SpectralCache(calibration, model.config, residual_length=0, backend=backend.name)
            parts: dict[str, list[Tensor]] = {name: [] for name in choices}
            for number, (first, last) in enumerate(chunk_edges(context, CHUNK, SINK_LENGTH)):
                ids = window[first:last]
                dense = log_probabilities(model, ids, dense_cache)
                for name, precision in choices.items():
                    if number or precision is None:  # the first chunk reads no codes
                        backend.precision = precision
                        own = log_probabilities(model, ids, cache if precision is None else cache.fork())
                        if number:
                            parts[name].append(kl_divergence(dense, own))
            for name, each in parts.items():
                kept[name].append(torch.cat(each))
    windows = {name: [float(window.mean()) for window in each] for name, each in kept.items()}
    found = {}
    for name, each in kept.items():
        kl, over = torch.cat(each), ratio(windows[name], windows["float32"])
        found[name] = {
            "tokens": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_p99": float(kl.quantile(0.99)),
            "kl_windows": windows[name],
            "over_float32": over["ratio"],
            "over_float32_stderr": over["stderr"],
        }
    return found


def main() -> None:
    """Measure, print and write the record."""
    parser = study_parser(__doc__, windows=1)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--codings", nargs="+", default=["scalar", "trellis"])
    options = parser.parse_args()
    suite = suite_of("eight-bits", options.model)
    given = study(suite, options)
    found = {}
    for coding in options.codings:
        own = given.calibration.with_bits(options.bits).with_coding(coding)
        found[coding] = given.run.cell(
            coding, lambda own=own: measured(given.model, own, given.tokens, options.context)
        )
    show(found)
    write_record(suite, {**given.settings, "bound": BOUND}, found)
    given.run.discard()


def show(found: dict[str, Any]) -> None:
    """The results for people."""
    table = Table("coding", "queries and weights", "KL mean", "KL p99", "over float32")
    for coding, entries in found.items():
        for name, entry in entries.items():
            stderr = entry["over_float32_stderr"]
            over = f"{entry['over_float32']:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
            table.add_row(coding, name, f"{entry['kl_mean']:.6f}", f"{entry['kl_p99']:.5f}", over)
    Console().print(table)


if __name__ == "__main__":
    main()
