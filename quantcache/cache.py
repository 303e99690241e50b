"""SpectralCache: a DynamicCache whose full-attention layers hold packed codes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from quantcache import backends, compat
from quantcache.accounting import CacheMemory, measure
from quantcache.artifact import Calibration
from quantcache.attention import register_attention
from quantcache.backends import Backend
from quantcache.codec import DenseCodec, SideCodec, SpectralCodec
from quantcache.errors import CalibrationMismatch
from quantcache.layer import RESIDUAL_LENGTH, SINK_LENGTH, CodecFactory, ShapeCheck, SpectralLayer
from quantcache.lazy import LazyKV
from quantcache.rope import Rope
from quantcache.schema import SIDES, SideBits

__all__ = ["RESIDUAL_LENGTH", "SINK_LENGTH", "BlockCache", "CodecFactory", "SpectralCache", "SpectralLayer"]


class BlockCache(DynamicCache):
    """A DynamicCache whose full-attention layers store blocks through codecs of the caller's choice.

    Args:
        config: A config with the model's cache attributes.
        codecs_of: Gives codec factory and shape check of a layer, by index.
        sink_length: First tokens of every row that stay in the model's dtype.
        residual_length: Recent tokens that stay in the model's dtype.
        backend: Which implementation attends on codes.

    Raises:
        ValueError: A length or the backend is out of range.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codecs_of: Callable[[int], tuple[CodecFactory, ShapeCheck | None]],
        sink_length: int = SINK_LENGTH,
        residual_length: int = RESIDUAL_LENGTH,
        backend: Backend = "auto",
    ):
        for name, length in (("sink_length", sink_length), ("residual_length", residual_length)):
            if length < 0:
                raise ValueError(f"{name} must not be negative, got {length}")
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}, got {backend!r}")
        register_attention()
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if compat.is_full_attention(layer):
                self.layers[index] = SpectralLayer(*codecs_of(index), sink_length, residual_length, backend)

    @property
    def spectral_layers(self) -> list[SpectralLayer]:
        """The layers that store blocks."""
        return [layer for layer in self.layers if isinstance(layer, SpectralLayer)]

    def memory(self) -> CacheMemory:
        """Bytes held, by kind.

        Returns:
            The record; its ``str()`` is a table.
        """
        return measure(self)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Yield dense (keys, values, sliding window) of every layer, as DynamicCache does."""
        for keys, values, window in super().__iter__():
            if isinstance(keys, LazyKV) and isinstance(values, LazyKV):
                keys, values = keys.materialize(), values.materialize()
            yield keys, values, window

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy what is stored; the calibration and its constants are shared."""
        new = copy.copy(self)
        memo[id(self)] = new
        new.layers = copy.deepcopy(self.layers, memo)
        return new


class SpectralCache(BlockCache):
    """A key/value cache that stores packed spectral codes.

    Pass it to ``generate`` as ``past_key_values``. Every plain full-attention layer is compressed; sliding-window,
    linear and placeholder layers stay as transformers makes them. Load the model with
    ``attn_implementation="spectral"`` to attend on the codes; any other implementation gives the same results from
    dense tensors made on the fly.

    Args:
        calibration: The model's calibration.
        config: The model's config; without it the cache's layers follow from the calibration alone.
        bits: Mean code width in bits, if another than the calibration's.
        key_bits: A rate of the keys' own, or None to leave keys dense.
        value_bits: A rate of the values' own, or None to leave values dense.
        min_bits: Smallest width given to any coefficient.
        sink_length: First tokens of every row that stay in the model's dtype.
        residual_length: Recent tokens that stay in the model's dtype.
        backend: ``"auto"``, ``"native"`` (CPU kernels), ``"triton"`` or ``"torch"``.

    Raises:
        CalibrationMismatch: The calibration is for another geometry than ``config``.
        UnsupportedModel: ``config`` is an encoder-decoder's.
        ValueError: A length or rate is out of range.
    """

    def __init__(
        self,
        calibration: Calibration,
        config: PreTrainedConfig | None = None,
        *,
        bits: float | None = None,
        key_bits: SideBits = "joint",
        value_bits: SideBits = "joint",
        min_bits: int | None = None,
        sink_length: int = SINK_LENGTH,
        residual_length: int = RESIDUAL_LENGTH,
        backend: Backend = "auto",
    ):
        if not isinstance(calibration, Calibration):
            raise TypeError(f"SpectralCache needs a Calibration, got {type(calibration).__name__}")
        if config is not None:
            compat.require_decoder(config)
            calibration.check_compatible(config)
        if bits is not None or key_bits != "joint" or value_bits != "joint" or min_bits is not None:
            calibration = calibration.with_bits(bits, key_bits=key_bits, value_bits=value_bits, min_bits=min_bits or 0)
        super().__init__(
            config or compat.config_from_cache_config(calibration.metadata.cache_config),
            lambda index: calibrated_codecs(calibration, index),
            sink_length,
            residual_length,
            backend,
        )
        self.calibration: Calibration | None = calibration

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        config: PreTrainedConfig | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> SpectralCache:
        """A fresh cache from a calibration in a folder or on the Hub.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository id.
            config: The model's config, to check the calibration against.
            revision: Hub branch, tag or commit.
            token: Hub token.
            cache_dir: Hub cache folder.
            local_files_only: Never go to the network.
            subfolder: Folder inside the repository.
            kwargs: Arguments of :class:`SpectralCache`, such as ``bits`` or ``residual_length``.

        Returns:
            An empty cache.

        Raises:
            ArtifactError: The artifact is missing or malformed.
        """
        calibration = Calibration.from_pretrained(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        return cls(calibration, config, **kwargs)

    @classmethod
    def from_dynamic_cache(
        cls, cache: DynamicCache, calibration: Calibration, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> SpectralCache:
        """Compress a cache that transformers filled.

        Args:
            cache: A DynamicCache; it is left as it is.
            calibration: The model's calibration.
            config: The model's config.
            kwargs: Arguments of :class:`SpectralCache`.

        Returns:
            A cache of the same tokens.

        Raises:
            CalibrationMismatch: Number of layers or their geometry differ.
        """
        new = cls(calibration, config, **kwargs)
        if len(new.layers) != len(cache.layers):
            raise CalibrationMismatch(
                f"calibration has {len(new.layers)} layers, the cache to compress has {len(cache.layers)}"
            )
        old: Any
        for index, old in enumerate(cache.layers):
            layer = new.layers[index]
            if not isinstance(layer, SpectralLayer):
                new.layers[index] = copy.deepcopy(old)
            elif getattr(old, "is_initialized", False) and old.get_seq_length():
                layer.update(old.keys.detach(), old.values.detach())
                layer.finish()
        return new

    @classmethod
    def self_calibrating(cls, model: Any, bits: float = 3.0, **kwargs: Any) -> SpectralCache:
        """A cache that needs no artifact: it fits itself to the first prompt it sees.

        Each layer takes the statistics of the first tokens that leave its residual window, without a backward pass, and
        compresses from there on. Fidelity is lower than with a calibration.

        Args:
            model: The model.
            bits: Mean code width of every layer's keys and values.
            kwargs: ``sink_length``, ``residual_length`` and ``backend``.

        Returns:
            An empty cache.
        """
        from quantcache.self_calibration import self_calibrating_cache

        return self_calibrating_cache(cls, model, bits, **kwargs)


def calibrated_codecs(calibration: Calibration, index: int) -> tuple[CodecFactory, ShapeCheck]:
    """How a calibrated layer gets its codecs.

    Args:
        calibration: The model's calibration.
        index: Layer index.

    Returns:
        The factory and the shape check of :class:`SpectralLayer`.

    Raises:
        CalibrationMismatch: The calibration lacks the layer.
    """
    if index not in calibration.layers:
        raise CalibrationMismatch(
            f"the model has a full-attention layer {index}, the calibration covers layers {list(calibration.layers)}"
        )
    layer = calibration.layers[index]

    def check(keys: Tensor, values: Tensor) -> None:
        for name, tensor in (("key", keys), ("value", values)):
            expected = (layer.side(name).num_heads, layer.side(name).dim)
            found = (tensor.shape[1], tensor.shape[3])
            if found != expected:
                raise CalibrationMismatch(
                    f"layer {index}: the model's {name}s have (heads, dimension) {found}, the calibration's {expected}"
                )

    def make(device: torch.device, tails: dict[str, Tensor], starts: Tensor | None) -> dict[str, SideCodec]:
        return {side: _shared_codec(calibration, index, side, device) for side in SIDES}

    return make, check


def _shared_codec(calibration: Calibration, index: int, name: str, device: torch.device) -> SideCodec:
    key = (index, name, str(device))
    if key not in calibration.codecs:
        layer = calibration.layers[index]
        side = layer.side(name)
        rope = layer.rope if name == "key" else Rope()
        calibration.codecs[key] = (
            DenseCodec()
            if side.widths is None
            else SpectralCodec(side, rope, calibration.metadata.codec, device=device)
        )
    return calibration.codecs[key]
