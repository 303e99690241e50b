"""Decoding steps that are captured in a CUDA graph and repeated without the host, until a block is due.

In the steps between two blocks nothing that is launched depends on how many tokens there are: the device counts them
itself (:class:`quantcache.backends.Stage`). So the first of them runs as it is, the second is captured, and the others
are replays. The host only notes that there is one token more, and encodes when a block is full; then a new graph is
captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from quantcache.attention.lazy import LazyKV
from quantcache.backends import CacheView, Stage, padding
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import BlockCache
from quantcache.cache.tails import TailBuffer
from quantcache.cache.transaction import commit, with_ruler
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache.common.errors import CannotRepeat, QuantCacheError


class Graph(Protocol):
    """A ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None:
        """Carry out what was captured."""

    def pool(self) -> Any:
        """Where its memory comes from."""


@dataclass
class Staged:
    """One layer between two of its blocks.

    Attributes:
        layer: The layer.
        buffer: Its tails' memory, with room until a block is due.
        view: What its attention reads, whose stage does the work.
        tails: Its tails as they were left.
        spans: Its blocks.
    """

    layer: SpectralLayer
    buffer: TailBuffer
    view: CacheView
    tails: dict[str, Tensor]
    spans: list[Any]

    @property
    def stage(self) -> Stage:
        """Who appends and attends."""
        assert self.view.stage is not None
        return self.view.stage

    @property
    def holds(self) -> bool:
        """Whether nobody else has changed the layer."""
        layer = self.layer
        return layer.buffer is self.buffer and layer.tails is self.tails and layer.spans is self.spans


class StagedCache(DynamicCache):
    """What a model is given in place of its cache while a step is captured."""

    def __init__(self, layers: list[Staged]):
        super().__init__()
        self._staged = layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a token to a layer; see :meth:`SpectralLayer.update`."""
        staged = self._staged[layer_idx]
        staged.stage.append(key_states, value_states)
        return LazyKV(staged.view, "key"), LazyKV(staged.view, "value")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Refused: a graph would keep the answer."""
        raise CannotRepeat("the model asks for the number of tokens in the middle of a step")

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Refused, likewise."""
        raise CannotRepeat("the model makes a mask of its own in the middle of a step")


class Period:
    """The steps of a batch between two blocks: what they read and write, and their graph once there is one."""

    def __init__(self, model: Any, cache: BlockCache, masked: bool):
        layers = stageable(cache)
        views = [layer.snapshot() for layer in layers]
        device, batch = layers[0].device, layers[0].tails["key"].shape[0]
        held = [layer.tails["key"].shape[2] for layer in layers]
        self.counts = torch.tensor(held, dtype=torch.int32, device="cpu").to(device)
        self.layers: list[Staged] = []
        shared: dict[str, Any] = {}
        for layer, view, count, here in zip(layers, views, self.counts.split(1), held, strict=True):
            assert view.backend is not None
            until_due = layer.residual_length + BLOCK * layer.blocks_at_once
            buffer = TailBuffer(layer.tails, max(1, until_due - here))
            room = buffer.room()
            stage = view.backend.stage(view, room, count, masked, shared)
            key, value = (replace(view.side(side), tail=room[side]) for side in SIDES)
            view = replace(view, key=key, value=value, flush=None, stage=stage)
            self.layers.append(Staged(layer, buffer, view, layer.tails, layer.spans))
        for staged in self.layers:
            staged.layer._go_on(buffer=staged.buffer)
        length = max(staged.view.length for staged in self.layers)
        self.model, self.masked = model, masked
        self.ids, self.positions = (torch.zeros(batch, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.mask = torch.ones(batch if masked else 1, 1, 1, length, dtype=torch.bool, device=device)
        self.cache = StagedCache(self.layers)
        self.steps = 0
        self.graph: Graph | None = None
        self.logits: Tensor | None = None

    def holds(self, batch: int, masked: bool) -> bool:
        """Whether the next step of some rows is one of these."""
        return batch == self.ids.shape[0] and masked == self.masked and all(each.holds for each in self.layers)

    def body(self) -> Tensor:
        """One step, the same each time: logits, ``[B, 1, V]``."""
        self.counts.add_(1)
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    def claimed(self) -> list[dict[str, Tensor]] | None:
        """Every layer's tails with one token more; None where somebody else has taken a place, or there is none."""
        found = [staged.buffer.claim(staged.tails, 1) for staged in self.layers]
        longer = [tails for tails in found if tails is not None]
        return longer if len(longer) == len(found) else None

    def run(self, earlier: Graph | None) -> Tensor:
        """The next step: as it is the first time, then captured, then again from the graph."""
        self.steps += 1
        if self.steps == 1:
            return self.body()
        if self.graph is None:
            self.graph, self.logits = recorded(self.body, earlier)
        assert self.logits is not None
        self.graph.replay()
        return self.logits.clone()

    def note(self, longer: list[dict[str, Tensor]]) -> None:
        """Say in all layers at once that there is one token more."""
        states = []
        for staged, tails in zip(self.layers, longer, strict=True):
            layer, trail = staged.layer, staged.layer.trail
            if trail is not None:
                new, end = tails["key"][:, :, -1:], layer.encoded_end
                trail = padding.extended(trail, None, layer.grid, end, end + tails["key"].shape[2], new)
            states.append(with_ruler(layer, {"tails": tails, "trail": trail, "pending": True, "refused": False}))
            staged.tails = tails
        commit([staged.layer for staged in self.layers], states)


def recorded(step: Callable[[], Tensor], earlier: Graph | None) -> tuple[Graph, Tensor]:
    """Capture a step in a CUDA graph; it is not carried out.

    Args:
        step: The step, which has run before.
        earlier: A graph that is not replayed any more, whose memory this one may use.

    Returns:
        The graph, and where its result will be.

    Raises:
        CannotRepeat: It does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=None if earlier is None else earlier.pool()):
            result = step()
    except QuantCacheError:
        raise
    except RuntimeError as error:
        raise CannotRepeat(f"the step cannot be captured: {type(error).__name__}: {error}") from error
    return graph, result


def stageable(cache: BlockCache) -> list[SpectralLayer]:
    """The layers of a cache all of which can be staged.

    Args:
        cache: The cache.

    Returns:
        The layers.

    Raises:
        CannotRepeat: Some cannot.
    """
    if not cache.layers or not cache.read_once:
        raise CannotRepeat("the model's layers share keys and values")
    for index, layer in enumerate(cache.layers):
        if type(layer) is not SpectralLayer:
            raise CannotRepeat(f"layer {index} is a {type(layer).__name__}, whose steps change with its length")
        layer.flush()
        if not layer.spans:
            raise CannotRepeat(f"layer {index} has encoded nothing yet: it holds {layer.get_seq_length()} tokens")
    layers = cache.spectral_layers
    devices = {layer.tails["key"].device for layer in layers}
    if len(devices) > 1:
        raise CannotRepeat(f"the layers are on several devices: {', '.join(sorted(map(str, devices)))}")
    return layers
