"""Decoding steps that are captured in a CUDA graph and repeated without the host, while there is room for blocks.

Nothing that is launched in a step depends on how many tokens there are: the device counts them itself, and finds in its
memory where blocks and tail lie (:class:`quantcache.backends.Stage`). So the first step runs as it is, the second is
captured, and the others are replays. The host notes that there is one token more, encodes when a block is full, and
says where everything is then. A new graph is captured when there are twice as many blocks as at first.
"""

from __future__ import annotations

import functools
import threading
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
from quantcache.cache.transaction import commit, with_symbolic_length
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from quantcache.common import compat
from quantcache.common.errors import GraphCaptureError, QuantCacheError

FREE_BLOCKS = 64
"""Blocks that there is room for at least beside those at hand: nothing is kept for them but what a call's kernels hand
each other, and the mask."""


class Graph(Protocol):
    """A ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None:
        """Carry out what was captured."""

    def pool(self) -> Any:
        """Where its memory comes from."""


@dataclass
class Staged:
    """One layer, and what is launched for it.

    Attributes:
        layer: The layer.
        stage: Who appends and attends.
        view: What its attention is given, as long as all that there is room for.
        buffer: Its tails' memory, with room until a block is due.
        tails: Its tails as they were left.
        spans: Its blocks.
    """

    layer: SpectralLayer
    stage: Stage
    view: CacheView
    buffer: TailBuffer
    tails: dict[str, Tensor]
    spans: list[Any]

    @classmethod
    def of(cls, layer: SpectralLayer, count: Tensor, masked: bool, shared: dict[str, Any]) -> Staged:
        """Stage a layer; arguments are those of :meth:`quantcache.backends.Backend.stage`."""
        view, (buffer, room) = layer.snapshot(), tail_room(layer)
        assert view.backend is not None
        more = max(view.num_blocks, FREE_BLOCKS)
        stage = view.backend.stage(view, room, count, view.num_blocks + more, masked, shared)
        given = as_given(view, room, stage, view.encoded_end + more * BLOCK)
        return cls(layer, stage, given, buffer, layer.tails, layer.spans)

    def follow(self) -> bool:
        """Go on with what the layer holds now; whether the same launches serve that."""
        layer = self.layer
        view, (buffer, room) = layer.snapshot(), tail_room(layer)
        if not view.num_blocks or not self.stage.follow(view, room, layer.tails["key"].shape[2]):
            return False
        self.view = as_given(view, room, self.stage, self.view.encoded_end)  # keeps no blocks that are not in use
        self.buffer, self.tails, self.spans = buffer, layer.tails, layer.spans
        layer._put(layer.state._replace(buffer=buffer, refused=False))
        return True

    @property
    def holds(self) -> bool:
        """Whether nobody else has changed the layer."""
        state = self.layer.state
        return state.buffer is self.buffer and state.tails is self.tails and state.blocks.spans is self.spans


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
        raise GraphCaptureError("the model asks for the number of tokens in the middle of a step")

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Refused, likewise."""
        raise GraphCaptureError("the model makes a mask of its own in the middle of a step")


def as_given(view: CacheView, room: dict[str, Tensor], stage: Stage, end: int) -> CacheView:
    """What a model's attention is given of a view: all the room behind its blocks, which seem to end at ``end``."""
    key, value = (replace(view.side(side), tail=room[side]) for side in SIDES)
    return replace(view, key=key, value=value, encoded_end=end, flush=None, stage=stage)


def tail_room(layer: SpectralLayer) -> tuple[TailBuffer, dict[str, Tensor]]:
    """Memory for a layer's tails until a block is due, always of the same size; the layer does not know of it yet."""
    held, most = layer.tails["key"].shape[2], layer.residual_length + BLOCK * layer.blocks_at_once
    buffer = TailBuffer(layer.tails, max(1, most - held))
    return buffer, {side: all_of_it.narrow(2, 0, max(most, held + 1)) for side, all_of_it in buffer.room().items()}


class Period:
    """The steps of a batch that are launched alike: what they read and write, and their graph once there is one."""

    def __init__(self, model: Any, cache: BlockCache, masked: bool):
        layers = stageable(cache)
        device, batch = layers[0].device, layers[0].tails["key"].shape[0]
        with torch.inference_mode(False):  # what is made in that mode may not be written to once it is over
            self.counts = torch.zeros(len(layers), dtype=torch.int32, device=device)  # which the stages set
            self.ids, self.positions = (torch.zeros(batch, 1, dtype=torch.int64, device=device) for _ in range(2))
        shared: dict[str, Any] = {}
        counts = self.counts.split(1)
        self.layers = [Staged.of(layer, count, masked, shared) for layer, count in zip(layers, counts, strict=True)]
        for staged in self.layers:
            staged.layer._put(staged.layer.state._replace(buffer=staged.buffer, refused=False))
        length = max(staged.view.length for staged in self.layers)
        self.model, self.masked = model, masked
        with torch.inference_mode(False):
            self.mask = torch.ones(batch if masked else 1, 1, 1, length, dtype=torch.bool, device=device)
        self.cache = StagedCache(self.layers)
        self.looked = True  # the mask, for what is padding now
        self.steps = 0
        self.graph: Graph | None = None
        self.logits: Tensor | None = None

    def serves(self, batch: int, masked: bool) -> bool:
        """Whether steps of some rows are launched like these."""
        return batch == self.ids.shape[0] and masked == self.masked

    def follow(self, cache: BlockCache) -> bool:
        """Go on with what the cache holds now; whether the same launches serve that."""
        self.looked, staged = False, [each.layer for each in self.layers]
        return stageable(cache) == staged and all(each.follow() for each in self.layers)

    def body(self) -> Tensor:
        """One step, the same each time: logits, ``[B, 1, V]``."""
        self.counts.add_(1)
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            **compat.cache_argument(self.model, self.cache),
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    def claimed(self) -> list[dict[str, Tensor]] | None:
        """Every layer's tails with one token more; None where there is no place, or a layer is not as it was left."""
        if not all(staged.holds for staged in self.layers):
            return None
        found = [staged.buffer.claim(staged.tails, 1) for staged in self.layers]
        longer = [tails for tails in found if tails is not None]
        return longer if len(longer) == len(found) else None

    def run(self, earlier: Graph | None) -> Tensor:
        """The next step: as it is the first time, then captured, then again from the graph.

        Args:
            earlier: A graph that is not replayed any more, whose memory a new one may use.

        Returns:
            Logits, ``[B, 1, V]``.

        Raises:
            GraphCaptureError: The step cannot be captured, or the mask shows what has become padding.
        """
        if not self.looked:
            for staged in self.layers:
                staged.stage.require_hidden(self.mask)
            self.looked = True
        self.steps += 1
        if self.steps == 1:
            return self.body()
        if self.graph is None:
            self.graph, self.logits = recorded(self.body, earlier, self.ids.device)
        assert self.logits is not None
        self.graph.replay()
        return self.logits.clone()

    def note(self, longer: list[dict[str, Tensor]]) -> None:
        """Say in all layers at once that there is one token more."""
        states = []
        for staged, tails in zip(self.layers, longer, strict=True):
            state = staged.layer.state
            trail, blocks = state.trail, state.blocks
            if trail is not None:
                new, length = tails["key"][:, :, -1:], blocks.end + tails["key"].shape[2]
                trail = padding.extended(trail, None, blocks.grid, blocks.end, length, new)
            state = state._replace(tails=tails, trail=trail, pending=True, refused=False)
            states.append(with_symbolic_length(staged.layer, {"state": state}))
            staged.tails = tails
        commit([staged.layer for staged in self.layers], states)


_one_capture = threading.Lock()
"""Held while a step is captured: CUDA refuses a second capture beside one, and both would fail."""

_failed: list[Graph] = []
"""Graphs whose capture has failed: torch's allocator may go on asking them what belongs to them."""


@functools.cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's captures: they share memory only on one, and torch's own is of the device used first."""
    return torch.cuda.Stream(device)


def recorded(step: Callable[[], Tensor], earlier: Graph | None, device: torch.device) -> tuple[Graph, Tensor]:
    """Capture a step in a CUDA graph; it is not carried out.

    Args:
        step: The step, which has run before.
        earlier: A graph that is not replayed any more, whose memory this one may use.
        device: Where the step runs, which need not be the current device.

    Returns:
        The graph, and where its result will be.

    Raises:
        GraphCaptureError: The step does something that a graph cannot hold.
    """
    pool = None if earlier is None else earlier.pool()
    try:
        with _one_capture, torch.cuda.device(device):
            graph, stream, before = torch.cuda.CUDAGraph(), _capturing(device), torch.cuda.current_stream(device)
            try:
                # By default CUDA forbids all threads what this one may not do, such as allocating memory.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    result = step()
            except BaseException as error:
                torch.cuda.set_stream(before)  # torch does not where CUDA has ended the capture
                if isinstance(error, RuntimeError):
                    _failed.append(graph)
                raise
    except QuantCacheError:
        raise
    except RuntimeError as error:
        raise GraphCaptureError(f"the step cannot be captured: {type(error).__name__}: {error}") from error
    return graph, result


def stageable(cache: BlockCache) -> list[SpectralLayer]:
    """The layers of a cache all of which can be staged.

    Args:
        cache: The cache.

    Returns:
        The layers.

    Raises:
        GraphCaptureError: A layer cannot be staged.
    """
    if not cache.layers or not cache.read_once:
        raise GraphCaptureError("the model's layers share keys and values")
    for index, layer in enumerate(cache.layers):
        if type(layer) is not SpectralLayer:
            raise GraphCaptureError(f"layer {index} is a {type(layer).__name__}, whose steps change with its length")
        layer.flush()
        if not layer.spans:
            raise GraphCaptureError(f"layer {index} has encoded nothing yet: it holds {layer.get_seq_length()} tokens")
    layers = cache.spectral_layers
    devices = {layer.tails["key"].device for layer in layers}
    if len(devices) > 1:
        raise GraphCaptureError(f"the layers are on several devices: {', '.join(sorted(map(str, devices)))}")
    return layers
