"""The codecs that a calibration gives to the layers of all caches of its model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed

from quantcache.artifact.calibration import Calibration
from quantcache.backends.padding import Grid
from quantcache.coding.blocks import DenseCodec, SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES
from quantcache.common.errors import CalibrationMismatch

CodecFactory = Callable[[torch.device, dict[str, Tensor], Grid], dict[str, SideCodec]]
"""Makes a layer's codecs when the first block is due, given device, tails (all that is cached) and where rows lie.

With tails of no tokens it is asked for the same codecs on another device. It gives none where it needs more tokens:
they stay in the tail, and it is asked again with the next.
"""

ShapeCheck = Callable[[Tensor, Tensor], None]
"""Raises if a layer's first keys and values do not fit its codecs."""


def calibrated_codecs(calibration: Calibration, index: int) -> tuple[CodecFactory, ShapeCheck]:
    """How a calibrated layer gets its codecs.

    Args:
        calibration: Calibration of the whole model.
        index: Layer to make codecs for.

    Returns:
        The factory and the shape check of :class:`SpectralLayer`.

    Raises:
        CalibrationMismatch: The calibration lacks the layer.
    """
    if index not in calibration.layers:
        raise CalibrationMismatch(
            f"the model has a full-attention layer {index}, the calibration covers layers {list(calibration.layers)}"
        )

    def check(keys: Tensor, values: Tensor) -> None:
        for name, tensor in (("key", keys), ("value", values)):
            side = own_heads(calibration, index, tensor.shape[1]).layers[index].side(name)
            expected, found = (side.num_heads, side.dim), (tensor.shape[1], tensor.shape[3])
            if found != expected:
                raise CalibrationMismatch(
                    f"layer {index}: the model's {name}s have (heads, dimension) {found}, the calibration's {expected}"
                )

    def make(device: torch.device, tails: dict[str, Tensor], grid: Grid) -> dict[str, SideCodec]:
        ours = own_heads(calibration, index, tails["key"].shape[1])
        return {side: _shared_codec(ours, index, side, device) for side in SIDES}

    return make, check


def own_heads(calibration: Calibration, index: int, heads: int) -> Calibration:
    """The part of a calibration that a process needs which has only some of a layer's heads.

    transformers' tensor parallelism splits the key projection by columns, so that each process computes and caches a
    run of heads, in the order of the ranks.

    Args:
        calibration: Calibration with all heads.
        index: Layer that has keys and values already.
        heads: Key/value heads that reach the cache.

    Returns:
        The calibration itself, or its shard for this process if all processes together have all heads.
    """
    total = calibration.layers[index].key.num_heads
    if heads == total or not 0 < heads < total or not distributed.is_available() or not distributed.is_initialized():
        return calibration
    size = distributed.get_world_size()
    return calibration.shard(distributed.get_rank(), size) if size * heads == total else calibration


def _shared_codec(calibration: Calibration, index: int, name: str, device: torch.device) -> SideCodec:
    key = (index, name, str(device))
    found = calibration.codecs.get(key)
    if found is None:
        layer = calibration.layers[index]
        side = layer.side(name)
        rope, settings = layer.rope if name == "key" else Rope(), calibration.metadata.codec
        made = (
            DenseCodec()
            if side.widths is None
            else SpectralCodec(side, rope, settings, device, f"layer {index}, {name}s", name == "value")
        )
        found = calibration.codecs.setdefault(key, made)  # all threads take the one that was there first
    return found
