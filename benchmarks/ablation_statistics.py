"""Everything that the ablations fit transforms from, gathered once: moments and metrics in the frames that are needed.

The labels, the sinks and the losses are those of :func:`quantcache.calibrate`; with the default frame and the Fisher
metric the transforms are the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.attention.output_metrics import output_metrics
from quantcache.attention.probe import RecordingCache, detect_ropes, recorded_queries, run
from quantcache.calibration.data import LENGTH
from quantcache.calibration.gradients import gather_gradients, sampled_loss
from quantcache.coding.rope import ANCHOR_LENGTH, FAST_WAVELENGTH, Frame, Rope
from quantcache.coding.schema import SIDES, LayerCalibration, SideCalibration
from quantcache.coding.spectral import METRIC_SHRINKAGE, Moments, shrink, split_klt
from quantcache.coding.statistics import COVARIANCE_SHRINKAGE, READ_SHARE
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.sequences import split_text
from quantcache.evaluation.methods.statistics import eigenbasis

DEFAULT_FRAME = f"{FAST_WAVELENGTH:g}"

WAVELENGTHS: dict[str, float] = {"post": 0.0, "32": 32.0, "128": 128.0, "1024": 1024.0, "full": 1e30}
"""Frames by the wavelength below which pairs are un-rotated fully; ``post`` leaves keys as they are cached.

Fast dimensions are rounded up to a multiple of 16: of wiki11m's 64 these are 0, 16, 32, 48 and 64.
"""

ANCHORS = {length: f"{DEFAULT_FRAME}, anchors of {length}" for length in (32, 64, 256)}
"""Names of the frames that differ from the default in the tokens of an anchor alone."""

FRAMES = {name: (wavelength, ANCHOR_LENGTH) for name, wavelength in WAVELENGTHS.items()}
FRAMES |= {DEFAULT_FRAME: (FAST_WAVELENGTH, ANCHOR_LENGTH)}
FRAMES |= {name: (FAST_WAVELENGTH, length) for length, name in ANCHORS.items()}
"""Wavelength and tokens of an anchor of every frame."""


class AnchoredFrame(Frame):
    """A frame that finds its anchors itself, so that they may be as long as one likes; rows have no padding.

    Args:
        head_dim: D.
        rope: The rotation that vectors carry.
        wavelength: Pairs with a shorter wavelength (in tokens) are fast.
        anchor_length: Tokens that share an anchor.
    """

    def __init__(self, head_dim: int, rope: Rope, wavelength: float, anchor_length: int):
        super().__init__(head_dim, rope, wavelength)
        self.anchor_length = anchor_length

    def enter(self, x: Tensor, positions: Tensor, anchors: Tensor | None = None) -> Tensor:
        """Like :meth:`Frame.enter`, whatever anchors are given."""
        return super().enter(x, positions, self._anchors(positions))

    def leave(self, framed: Tensor, positions: Tensor, anchors: Tensor | None = None) -> Tensor:
        """Like :meth:`Frame.leave`, whatever anchors are given."""
        return super().leave(framed, positions, self._anchors(positions))

    def _anchors(self, positions: Tensor) -> Tensor:
        stretch = torch.div(positions - SINK_LENGTH, self.anchor_length, rounding_mode="floor")
        return stretch * self.anchor_length + SINK_LENGTH


@dataclass(frozen=True)
class Choice:
    """How transforms are made from the statistics.

    Attributes:
        frame: A name of :data:`FRAMES`.
        key_metric: ``fisher``, ``read`` (of the whole gradient), ``identity``, or ``query``, which the default frame
            alone has.
        value_metric: ``fisher``, ``read``, ``output`` (projection), ``identity``, or ``gram``: the eigenbasis of
            VᵀαᵀαV.
        key_shrinkage: Isotropic share of the keys' metric.
        value_shrinkage: That of the values'.
        read_share: How much of the whole gradient's metric ``fisher`` has.
    """

    frame: str = DEFAULT_FRAME
    key_metric: str = "fisher"
    value_metric: str = "fisher"
    key_shrinkage: float = METRIC_SHRINKAGE
    value_shrinkage: float = METRIC_SHRINKAGE
    read_share: float = READ_SHARE


@dataclass(frozen=True)
class Needs:
    """What has to be gathered; the defaults serve every choice.

    Attributes:
        frames: Names of :data:`FRAMES`.
        queries: Whether queries are.
        outputs: Whether attention outputs are.
    """

    frames: tuple[str, ...] = tuple(FRAMES)
    queries: bool = True
    outputs: bool = True

    @classmethod
    def of(cls, choices: Iterable[Choice]) -> Needs:
        """What some choices need."""
        choices = list(choices)
        return cls(
            tuple(name for name in FRAMES if name in {choice.frame for choice in choices}),
            any(choice.key_metric == "query" for choice in choices),
            any(choice.value_metric == "gram" for choice in choices),
        )


class AblationStatistics:
    """Moments of keys in several frames, of values and of attention outputs, with the metrics at them.

    Args:
        model: The model.
        needs: What is gathered.
        residual_length: Recent tokens that are no codes yet.
    """

    def __init__(self, model: PreTrainedModel, needs: Needs | None = None, residual_length: int = RESIDUAL_LENGTH):
        self.model, self.needs, self.residual_length = model, needs or Needs(), residual_length
        self.layers = cache_layout.full_attention_layers(model.config)
        self.ropes = detect_ropes(model, self.layers)
        heads, dim = cache_layout.kv_geometry(model.config.get_text_config(decoder=True))
        self.projections = output_metrics(model, dict.fromkeys(self.layers, (heads, dim)))
        self.frames = {
            (name, index): AnchoredFrame(dim, Rope() if name == "post" else self.ropes[index], *how)
            for name, how in FRAMES.items()
            if name in self.needs.frames
            for index in self.layers
        }
        kinds = [f"key.{kind}.{name}" for kind in ("vectors", "coded", "read") for name in self.needs.frames]
        kinds += ["value.vectors", "value.coded", "value.read"]
        kinds += [f"key.query.{DEFAULT_FRAME}"] * self.needs.queries + ["value.output"] * self.needs.outputs
        self.sums = {f"{index}.{kind}": Moments(heads, dim) for index in self.layers for kind in kinds}
        # Labels have a generator of their own: they are the same whatever else is gathered.
        self.generators = {what: torch.Generator().manual_seed(0) for what in ("labels", "queries")}
        self.tokens = 0

    def _add_keys(self, index: int, kind: str, x: Tensor, slots: Tensor) -> None:
        """Add key-side vectors ``[B, H, T', D]`` that stand at, or are seen from, some slots."""
        for name in self.needs.frames if kind != "query" else (DEFAULT_FRAME,):
            framed = self.frames[name, index].enter(x.double(), slots)
            self.sums[f"{index}.key.{kind}.{name}"].add(framed.transpose(0, 1).flatten(1, -2))

    def add(self, sequence: Tensor) -> None:
        """Add one sequence, ``[T]``: a forward and backward pass, and a forward pass for queries and outputs if due."""
        slots = torch.arange(SINK_LENGTH, len(sequence))
        found = gather_gradients(
            self.model,
            sequence[None],
            self.layers,
            self.residual_length,
            lambda logits: sampled_loss(logits, self.generators["labels"]),
        )
        for index, sides in found.items():
            for side in SIDES:
                for kind, x in sides[side]._asdict().items():
                    if side == "key":
                        self._add_keys(index, kind, x[:, :, SINK_LENGTH:], slots)
                    else:
                        self.sums[f"{index}.value.{kind}"].add(x[0, :, SINK_LENGTH:])
        if self.needs.queries or self.needs.outputs:
            self._add_queries(sequence, slots)
        self.tokens += len(sequence)

    def _add_queries(self, sequence: Tensor, slots: Tensor) -> None:
        """Add the queries and the attention outputs of a sequence."""

        def on_query(index: int, query: Tensor) -> None:
            if index not in self.ropes or not self.needs.queries:
                return
            # Each query as a randomly drawn earlier key sees it; in the frame of keys as cached this changes nothing.
            drawn = torch.rand(len(slots), generator=self.generators["queries"]) * (slots - SINK_LENGTH + 1)
            heads = len(self.sums[f"{index}.value.vectors"].sum)
            seen = query[0, :, SINK_LENGTH:].unflatten(0, (heads, -1))[None]  # [1, H, G, T', D]
            self._add_keys(index, "query", seen.flatten(2, 3), (drawn.long() + SINK_LENGTH).repeat(seen.shape[2]))

        def on_output(index: int, output: Tensor) -> None:
            if index not in self.ropes or not self.needs.outputs:
                return
            heads = len(self.sums[f"{index}.value.vectors"].sum)
            grouped = output[0, SINK_LENGTH:].transpose(0, 1).unflatten(0, (heads, -1)).flatten(1, 2)
            self.sums[f"{index}.value.output"].add(grouped)

        with torch.no_grad(), recorded_queries(self.model, on_query, on_output):
            run(self.model, sequence[None], RecordingCache(self.model.config, lambda *_: None))

    # ------------------------------------------------------------------ files

    def save(self, path: Path) -> None:
        """Write everything, complete or not at all."""
        tensors = {f"{name}.sum": m.sum for name, m in self.sums.items()}
        tensors |= {f"{name}.outer": m.outer for name, m in self.sums.items()}
        counts = {name: m.count for name, m in self.sums.items()}
        tensors |= {f"generator.{what}": generator.get_state() for what, generator in self.generators.items()}
        temporary = path.with_suffix(".part")
        save_file(tensors, temporary, metadata={"counts": json.dumps(counts), "tokens": str(self.tokens)})
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote."""
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        for name, count in json.loads(metadata["counts"]).items():
            self.sums[name].count = count
            self.sums[name].sum, self.sums[name].outer = tensors[f"{name}.sum"], tensors[f"{name}.outer"]
        for what, generator in self.generators.items():
            generator.set_state(tensors[f"generator.{what}"])
        self.tokens = int(metadata["tokens"])

    # ------------------------------------------------------------------ transforms

    def solve(self, choice: Choice) -> dict[int, LayerCalibration]:
        """Transforms of every layer, without widths."""
        return {index: self._solve_layer(index, choice) for index in self.layers}

    def _solve_layer(self, index: int, choice: Choice) -> LayerCalibration:
        frame = self.frames[choice.frame, index]
        vectors = self.sums[f"{index}.key.vectors.{choice.frame}"]
        eye = torch.eye(frame.head_dim, dtype=torch.float64).expand_as(vectors.outer)
        metrics = {"identity": eye, **self._fisher(f"{index}.key.{{}}.{choice.frame}", choice)}
        if choice.key_metric == "query":
            metrics["query"] = self.sums[f"{index}.key.query.{choice.frame}"].second_moment
        key = _side(vectors, metrics[choice.key_metric], (frame.num_slow, frame.num_fast), choice.key_shrinkage)
        values = self.sums[f"{index}.value.vectors"]
        if choice.value_metric == "gram":
            value = _rotated(values, self.sums[f"{index}.value.output"].second_moment)
        else:
            metrics = {
                "output": self.projections[index],
                "identity": eye,
                **self._fisher(f"{index}.value.{{}}", choice),
            }
            value = _side(values, metrics[choice.value_metric], (frame.head_dim,), choice.value_shrinkage)
        return LayerCalibration(frame.rope, key, value)

    def _fisher(self, name: str, choice: Choice) -> dict[str, Tensor]:
        """The metrics that gradients give to one side of a layer."""
        coded, read = (self.sums[name.format(kind)].second_moment for kind in ("coded", "read"))
        return {"fisher": coded + choice.read_share * read, "read": read}


def _side(vectors: Moments, metric: Tensor, parts: tuple[int, ...], shrinkage: float) -> SideCalibration:
    covariance = shrink(vectors.covariance, COVARIANCE_SHRINKAGE)
    transform = split_klt(covariance, metric, parts, shrinkage)
    # The metric keeps its trace, so that sides of different shrinkage still share a unit; the default is left as it is.
    unit = (1 + METRIC_SHRINKAGE) / (1 + shrinkage)
    return SideCalibration(vectors.mean.float(), (transform.analysis * unit**0.5).float(), transform.spectrum * unit)


def _rotated(vectors: Moments, gram: Tensor) -> SideCalibration:
    """An orthogonal basis of something else, with the variances that the vectors have in it."""
    _, basis = eigenbasis(gram)
    variances = (basis.transpose(-1, -2) @ shrink(vectors.covariance, COVARIANCE_SHRINKAGE) @ basis).diagonal(
        dim1=-2, dim2=-1
    )
    return SideCalibration(vectors.mean.float(), basis.transpose(-1, -2).float().contiguous(), variances.contiguous())


def gather(
    model: PreTrainedModel,
    tokens: Tensor,
    checkpoints: list[int],
    folder: Path,
    on_progress: Callable[[int], None],
    length: int = LENGTH,
    needs: Needs | None = None,
    residual_length: int = RESIDUAL_LENGTH,
) -> dict[int, Path]:
    """Statistics after several numbers of tokens, each in a file; an interrupted run goes on at the last one.

    Args:
        model: The model.
        tokens: Calibration tokens, ``[N]``; where they begin with BOS, every sequence does.
        checkpoints: Numbers of tokens, ascending. One below ``length`` is gathered by itself, from a shorter sequence.
        folder: Where files go.
        on_progress: Called with the tokens of every finished sequence.
        length: Tokens of a sequence.
        needs: What is gathered; by default what any choice needs.
        residual_length: Recent tokens that are no codes yet.

    Returns:
        The file of each checkpoint.

    Raises:
        ValueError: The text is too short.
    """
    needs = needs or Needs()
    kind = hashlib.sha256(repr((needs, length, residual_length, tokens.tolist()[:length])).encode()).hexdigest()[:8]
    paths = {count: folder / f"statistics-{count}-{kind}.safetensors" for count in checkpoints}
    for count in (c for c in checkpoints if c < length):
        if not paths[count].is_file():
            statistics = AblationStatistics(model, needs, residual_length)
            statistics.add(tokens[:count])
            statistics.save(paths[count])
    long = [count for count in checkpoints if count >= length]
    missing = [count for count in long if not paths[count].is_file()]
    if missing:
        statistics = AblationStatistics(model, needs, residual_length)
        done = [count for count in long if count < missing[0]]
        if done:
            statistics.load(paths[done[-1]])
            on_progress(statistics.tokens)
        sequences = split_text(model.config, tokens, length)[: missing[-1] // length]
        for sequence in (s[0] for s in sequences[statistics.tokens // length :]):
            statistics.add(sequence)
            on_progress(len(sequence))
            if statistics.tokens in paths:
                statistics.save(paths[statistics.tokens])
                print(f"statistics of {statistics.tokens:,} tokens", file=sys.stderr)
        if statistics.tokens < missing[-1]:
            raise ValueError(f"{missing[-1]:,} calibration tokens are asked for, the text has {statistics.tokens:,}")
    return paths
