"""One look at a model at work: second moments of weights' inputs, keys and values, and attention sinks.

Memory does not grow with the text. Inputs whose moments do not fit the budget together are taken in several passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantcache.analysis.targets import InputTarget, find_inputs, observed_inputs
from quantcache.attention import guards
from quantcache.attention.function import spectral_attention_forward
from quantcache.attention.probe import RecordingCache, replaced_attention, run
from quantcache.coding.rope import Frame, Rope
from quantcache.coding.spectral import Moments
from quantcache.common import compat
from quantcache.common.ambient import float64_device
from quantcache.common.defaults import SINK_LENGTH

MOMENT_BYTES = 2 << 30
"""Memory that the second moments of weights' inputs may take at a time."""

MAX_DIM = 8192
"""Wider inputs have no spectrum: it would take too long; their channels are still looked at."""

PROBE_TOKENS = 16

SINK_QUERIES = 32
"""Queries, spread over the second half of a sequence, whose attention is looked at for sinks."""

SINK_SHARE = 0.1
"""Share of a layer's attention that makes a token a sink, averaged over heads and queries."""


class InputMoments:
    """Mean, channel energies and, unless it is too wide, second moment of one input.

    Args:
        dim: D.
        device: Where sums are kept.
    """

    def __init__(self, dim: int, device: torch.device | str):
        self.energy = torch.zeros(dim, dtype=torch.float64, device=device)
        self.full = Moments(1, dim, device) if dim <= MAX_DIM else None
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add inputs ``[..., D]``."""
        rows = x.detach().flatten(0, -2).to(device=self.sum.device, dtype=torch.float64)
        self.count += rows.shape[0]
        self.sum += rows.sum(0)
        self.energy += rows.pow(2).sum(0)
        if self.full is not None:
            self.full.add(rows[None])


@dataclass
class Sink:
    """A token that draws attention.

    Attributes:
        share: Largest share of a layer's attention, averaged over heads.
        layers: Layers in which it is a sink.
        seen: Sequences in which it is one.
    """

    share: float = 0.0
    layers: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)


Place = tuple[int, str]
"""Layer, and ``key`` (before rotation), ``rotated key`` or ``value``."""


class CacheMoments:
    """Second moments of what reaches the cache, and of keys with their rotation undone.

    Args:
        ropes: The rotation of every layer that is looked at.
    """

    def __init__(self, ropes: dict[int, Rope]):
        self.ropes = ropes
        self.moments: dict[Place, Moments] = {}

    def add(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values ``[B, H, T, D]`` of whole sequences, their sinks left out."""
        rope = self.ropes.get(index)
        if rope is None:
            return
        device = float64_device(keys.device)
        keys, values = (x.detach()[:, :, SINK_LENGTH:].to(device).double() for x in (keys, values))
        if rope.rotary_dim:
            positions = torch.arange(SINK_LENGTH, SINK_LENGTH + keys.shape[2], dtype=torch.int64, device=device)
            plain = Frame(keys.shape[-1], rope, device=device).enter(keys, positions, positions)
            self._add((index, "rotated key"), keys)
        else:
            plain = keys
        self._add((index, "key"), plain)
        self._add((index, "value"), values)

    def _add(self, place: Place, x: Tensor) -> None:
        if place not in self.moments:
            self.moments[place] = Moments(x.shape[1], x.shape[3], x.device)
        self.moments[place].add(x.transpose(0, 1).flatten(1, 2))


@dataclass
class Gathered:
    """Everything that was seen.

    Attributes:
        cache: Moments of keys and values, by layer and kind; empty for encoders.
        sinks: Attention sinks by position and token; None where attention cannot be seen.
    """

    cache: dict[Place, Moments]
    sinks: dict[tuple[int, int], Sink] | None


def gather(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    ropes: dict[int, Rope],
    on_moments: Callable[[InputTarget, InputMoments], None],
    on_progress: Callable[[int], None] = lambda tokens: None,
    on_plan: Callable[[int], None] = lambda tokens: None,
    moment_bytes: int = MOMENT_BYTES,
) -> Gathered:
    """Run a model over text and gather its moments.

    Args:
        model: The model, in evaluation mode.
        sequences: Token ids, each ``[1, T]``.
        ropes: Rotations of the cache layers to look at; none for an encoder.
        on_moments: Called with the moments of every input of weights, which are let go afterwards.
        on_progress: Called with the tokens of every finished sequence.
        on_plan: Called once, with the tokens of all passes.
        moment_bytes: Bytes that moments of weights' inputs may take at a time.

    Returns:
        What was seen besides the weights' inputs.
    """
    decoder = bool(ropes)

    def forward(ids: Tensor, cache: RecordingCache | None = None) -> None:
        if decoder:
            run(model, ids, cache or RecordingCache(model.config, lambda *_: None))
        else:
            model(input_ids=ids.to(compat.input_device(model)))

    with torch.no_grad():
        targets = find_inputs(model, lambda: forward(sequences[0][:, :PROBE_TOKENS]))
        passes = _passes(targets, moment_bytes)
        on_plan(len(passes) * sum(s.numel() for s in sequences))
        cached = CacheMoments(ropes)
        sinks = _Sinks()
        for number, group in enumerate(passes):
            moments: dict[InputTarget, InputMoments] = {}

            def on_input(target: InputTarget, x: Tensor, moments: dict[InputTarget, InputMoments] = moments) -> None:
                if target not in moments:
                    moments[target] = InputMoments(target.dim, "cpu" if x.device.type == "mps" else x.device)
                moments[target].add(x)

            for place, sequence in enumerate(sequences):
                record = cached.add if not number else lambda *_: None
                with observed_inputs(model, group, on_input):
                    forward(sequence, RecordingCache(model.config, record) if decoder else None)
                on_progress(sequence.numel())
                if decoder and not number:
                    sinks.look(model, sequence, place, forward)
            for target, own in moments.items():
                on_moments(target, own)
    return Gathered(cached.moments, sinks.found if sinks.visible else None)


def _passes(targets: list[InputTarget], budget: int) -> list[list[InputTarget]]:
    """Cut targets into groups whose moments fit the budget; at least one group, each of at least one target."""
    passes: list[list[InputTarget]] = [[]]
    used = 0
    for target in targets:
        size = 8 * target.dim**2 if target.dim <= MAX_DIM else 0
        if passes[-1] and used + size > budget:
            passes.append([])
            used = 0
        passes[-1].append(target)
        used += size
    return passes


class _Sinks:
    """Looks for tokens that draw a large share of the attention."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Sink] = {}
        self.visible = False

    def look(self, model: PreTrainedModel, sequence: Tensor, number: int, forward: Callable[[Tensor], None]) -> None:
        """Run one sequence with its attention in view; models with an attention of their own are passed over."""

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
        ) -> Any:
            index = getattr(module, "layer_idx", None)
            if index is not None and query.shape[2] == key.shape[2]:
                self._shares(index, number, sequence, query, key, attention_mask, kwargs)
            return spectral_attention_forward(module, query, key, value, attention_mask, **kwargs)

        if not compat.can_change_attention(model):
            return
        with replaced_attention(model, attention):
            forward(sequence)

    def _shares(
        self,
        index: int,
        number: int,
        sequence: Tensor,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> None:
        """Note the tokens of the first row that draw much of a layer's attention, as far as its mask shows them."""
        self.visible = True
        length = query.shape[2]
        rows = (
            torch.linspace(length // 2, length - 1, SINK_QUERIES, dtype=torch.float32, device="cpu")
            .long()
            .unique()
            .to(query.device)
        )
        groups = query.shape[1] // key.shape[1]
        q = query[:1, :, rows].float().unflatten(1, (key.shape[1], groups))
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        scores = torch.einsum("bhgqd,bhkd->bhgqk", q, key[:1].float()) * scaling
        if options.get("softcap") is not None:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        mask = guards.fitting_mask(mask, query, length)
        if mask is None:
            hidden = torch.arange(length, dtype=torch.int64, device=query.device) > rows[:, None]
        else:  # a sliding window's, say
            shown = mask[:1, :, rows]
            shown = shown.unflatten(1, (key.shape[1], groups) if shown.shape[1] > 1 else (1, 1))
            hidden = ~shown if shown.dtype == torch.bool else shown < torch.finfo(shown.dtype).min / 2
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1).mean((0, 1, 2, 3))
        for position in (shares >= SINK_SHARE).nonzero().flatten().tolist():
            sink = self.found.setdefault((position, int(sequence[0, position])), Sink())
            sink.share = max(sink.share, float(shares[position]))
            sink.layers.add(index)
            sink.seen.add(number)
