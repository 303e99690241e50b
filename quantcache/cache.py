"""SpectralCache: a DynamicCache whose full-attention layers hold packed codes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Self, SupportsIndex

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from quantcache import backends, cache_files, cache_layout, compat
from quantcache.accounting import CacheMemory, measure
from quantcache.ambient import default_device
from quantcache.artifact import Calibration
from quantcache.artifact_checks import stand_in_config
from quantcache.attention import register_attention
from quantcache.backends import Backend
from quantcache.calibrated_codecs import calibrated_codecs
from quantcache.errors import CalibrationMismatch, QuantCacheError
from quantcache.layer import RESIDUAL_LENGTH, SINK_LENGTH, CodecFactory, ShapeCheck, SpectralLayer
from quantcache.lazy import LazyKV
from quantcache.mixed_layers import copy_beside, spectral_layer
from quantcache.padding import Arrivals
from quantcache.schema import SideBits

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
        with default_device():  # a sliding-window layer of transformers states none
            super().__init__(config=config)
        self.foreign = cache_layout.cross_attention_layers(config)  # layers that hold another input's tokens
        for index, layer in enumerate(self.layers):
            if compat.is_full_attention(layer) and index not in self.foreign:
                arguments = (*codecs_of(index), sink_length, residual_length, backend, index)
                self.layers[index] = spectral_layer(layer, *arguments)
        self.broken: str | None = None
        self.announced: tuple[Tensor | None, Tensor | None] | None = None  # 2D mask and positions of the next pass
        self.arrivals: tuple[int, int, Arrivals] | None = None  # T and Tnew of this pass, and what those say
        self.updating: int  # the thread inside update(), while there is one

    @property
    def spectral_layers(self) -> list[SpectralLayer]:
        """The layers that store blocks."""
        return [layer for layer in self.layers if isinstance(layer, SpectralLayer)]

    @torch.compiler.disable  # see spectral_attention_forward
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; see :meth:`SpectralLayer.update`.

        Args:
            key_states: ``[B, Hkv, Tnew, D]``.
            value_states: ``[B, Hkv, Tnew, Dv]``.
            layer_idx: The layer.
            args: Passed on.
            kwargs: Passed on.

        Returns:
            Keys and values of all T tokens, lazy from a spectral layer.

        Raises:
            QuantCacheError: A forward pass was interrupted, two threads use the cache at once, or the tokens do not
                continue what is cached.
        """
        me = threading.get_ident()
        if vars(self).setdefault("updating", me) != me:  # one call into C: atomic
            self._break("two threads use it at once")
        try:
            layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
            if isinstance(layer, SpectralLayer):
                kwargs["arrivals"] = self._arrivals(layer, key_states)
            if isinstance(layer, DynamicLayer):
                if layer_idx not in self.foreign:
                    self._check_lengths(layer, layer_idx, key_states.shape[2])
                if not isinstance(layer, SpectralLayer) and layer.is_initialized and layer.device != key_states.device:
                    layer.device = key_states.device
                    layer.prefetch()
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        finally:
            del self.updating

    @torch.compiler.disable  # traced, it would be compiled anew for every block
    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Tokens cached, T; see DynamicCache."""
        return super().get_seq_length(*args, **kwargs)

    @torch.compiler.disable
    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Length and offset of a mask; see DynamicCache. Whoever asks is about to say which tokens are padding."""
        told = compat.mask_arguments()
        if told is not None:
            self.announced = told
        return super().get_mask_sizes(*args, **kwargs)

    def _arrivals(self, layer: SpectralLayer, keys: Tensor) -> Arrivals | None:
        """What the present pass says of a layer's new tokens; None where it has said nothing."""
        sizes = (layer.get_seq_length() + keys.shape[2], keys.shape[2])
        if self.announced is not None:
            (mask, positions), self.announced = self.announced, None
            fits = all(each is None or each.shape[0] in (1, keys.shape[0]) for each in (mask, positions))
            self.arrivals = (*sizes, Arrivals.of(mask, positions, *sizes)) if fits else None
        elif layer is next(each for each in self.layers if isinstance(each, SpectralLayer)):
            self.arrivals = None
        return self.arrivals[2] if self.arrivals is not None and self.arrivals[:2] == sizes else None

    def _break(self, reason: str) -> NoReturn:
        """Refuse to go on until somebody has put the cache in order."""
        self.broken = f"the cache cannot be used as it is: {reason}; call rollback() or reset()"
        raise QuantCacheError(self.broken)

    def _follows_text(self, index: int, layer: Any) -> bool:
        """Whether a layer gets keys and values of every token of the text."""
        return isinstance(layer, DynamicLayer) and index not in self.foreign

    def _check_lengths(self, layer: DynamicLayer, index: int, count: int) -> None:
        """Refuse an update that finds some layers ahead of others: each forward pass brings every layer its tokens."""
        if self.broken is not None:
            raise QuantCacheError(self.broken)
        first = next(i for i, each in enumerate(self.layers) if self._follows_text(i, each))
        cause = "because a forward pass was interrupted or another thread is in one"
        if index == first:
            followers: list[Any] = [each for i, each in enumerate(self.layers) if self._follows_text(i, each)]
            held = {each.get_seq_length() for each in followers if each.is_initialized}
            if len(held) > 1:
                self._break(f"some layers hold {min(held)} tokens and others {max(held)}, {cause}")
            return
        leader: Any = self.layers[first]
        ours, theirs = layer.get_seq_length() + count, leader.get_seq_length() if leader.is_initialized else None
        if theirs is not None and ours != theirs:
            self._break(f"layer {index} would hold {ours} tokens and layer {first} holds {theirs}, {cause}")

    def rollback(self) -> int:
        """Drop the tokens that an interrupted forward pass has brought to some layers only.

        Returns:
            Tokens kept, T.

        Raises:
            QuantCacheError: A layer of transformers' own cannot go back; ``reset()`` is what is left.
        """
        layers: list[Any] = [layer for i, layer in enumerate(self.layers) if self._follows_text(i, layer)]
        lengths = [layer.get_seq_length() for layer in layers]
        keep = min(lengths)
        if not keep:
            self.reset()
            return 0
        other = next((each for each in self.layers if isinstance(each, LinearAttentionCacheLayerMixin)), None)
        if other is not None:
            raise QuantCacheError(f"a {type(other).__name__} cannot go back: call reset()")
        for layer, length in zip(layers, lengths, strict=True):
            if length > keep and not isinstance(layer, SpectralLayer):
                raise QuantCacheError(
                    f"a {type(layer).__name__} holds {length} tokens and cannot go back to {keep}: call reset()"
                )
        for layer, length in zip(layers, lengths, strict=True):
            if length > keep:
                layer.crop(keep - length)
        self.broken = None
        return keep

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.broken = self.announced = self.arrivals = None

    def fork(self) -> Self:
        """A cache of the same tokens that shares the encoded blocks: of one prefix, as many as are wanted.

        Whichever cache encodes a block first copies what it shares, so a fork is free for as long as its own tokens
        fit into the residual window. Layers of transformers' own are copied at once.

        Returns:
            The new cache.
        """
        new = copy.copy(self)
        new.layers = [
            layer.fork() if isinstance(layer, SpectralLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return new

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

    def __copy__(self) -> Self:
        """Another cache of the same layers."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise QuantCacheError(f"a {type(self).__name__} cannot be pickled: use save() and load()")

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
        model: The model itself, in place of its config: its weights are compared with those calibrated, too.
        strict: Refuse a calibration of another model of the same geometry, which is otherwise warned of.
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
        model: PreTrainedModel | None = None,
        strict: bool = False,
    ):
        if not isinstance(calibration, Calibration):
            raise TypeError(f"SpectralCache needs a Calibration, got {type(calibration).__name__}")
        config = config if model is None else model.config
        if config is not None:
            cache_layout.compressible_layers(config)
            calibration.check_compatible(config if model is None else model, strict=strict)
        if bits is not None or key_bits != "joint" or value_bits != "joint" or min_bits is not None:
            calibration = calibration.with_bits(bits, key_bits=key_bits, value_bits=value_bits, min_bits=min_bits or 0)
        super().__init__(
            config or stand_in_config(calibration.metadata.cache_config),
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
            kwargs: Arguments of :class:`SpectralCache`, such as ``model``, ``bits`` or ``residual_length``.

        Returns:
            An empty cache.

        Raises:
            ArtifactError: The artifact is missing or malformed.
            CalibrationMismatch: It is for another geometry, or with ``strict`` for another model.
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
        cls,
        cache: DynamicCache,
        calibration: Calibration,
        config: PreTrainedConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SpectralCache:
        """Compress a cache that transformers filled.

        Args:
            cache: A DynamicCache; it is left as it is.
            calibration: The model's calibration.
            config: The model's config.
            attention_mask: The mask its tokens came with, ``[B, T]``, where rows are padded: says where they begin.
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
                length = old.get_seq_length()
                told = Arrivals.of(attention_mask, None, length, length)
                layer.update(old.keys.detach(), old.values.detach(), arrivals=told)
                layer.finish()
                copy_beside(layer, old)
        return new

    def save(self, path: str | Path, model: PreTrainedModel | None = None) -> None:
        """Write what is cached to one safetensors file: a prefix that need not be computed again.

        Args:
            path: The file; complete or not at all.
            model: The model that filled the cache: its weights are then checked when the file is loaded.

        Raises:
            QuantCacheError: The cache holds something that cannot be written.
        """
        if self.calibration is None:
            raise QuantCacheError("a self-calibrating cache has no calibration to be read with and cannot be saved")
        cache_files.write_cache(Path(path), self, self.calibration, model)

    @classmethod
    def load(
        cls,
        path: str | Path,
        calibration: Calibration,
        model: PreTrainedModel | None = None,
        config: PreTrainedConfig | None = None,
        backend: Backend = "auto",
    ) -> SpectralCache:
        """Read a cache that :meth:`save` has written, at the rate and with the lengths it had.

        It comes back in CPU memory, and each layer follows the model to its device with its next update.

        Args:
            path: The file.
            calibration: The calibration it was filled with, at any rate.
            model: The model that is to read it: weights that differ from those it was saved with are refused.
            config: The model's config, where there is no model at hand.
            backend: As for :class:`SpectralCache`.

        Returns:
            The cache.

        Raises:
            ArtifactError: The file is missing, damaged or malformed.
            CalibrationMismatch: It was written with another calibration or model.
        """
        path = Path(path)
        description = cache_files.read_description(path)
        cache = cls(
            cache_files.calibration_at(description, calibration, path),
            config,
            sink_length=description["sink_length"],
            residual_length=description["residual_length"],
            backend=backend,
            model=model,
        )
        assert cache.calibration is not None
        if model is not None:
            cache_files.check_model(description, model, path)
        cache_files.read_cache(path, description, cache, cache.calibration)
        return cache

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
