"""SpectralCache: a DynamicCache whose full-attention layers hold packed codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from quantcache import backends
from quantcache.accounting.measuring import measure
from quantcache.accounting.memory import CacheMemory
from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.checks import stand_in_config
from quantcache.artifact.quality import at_quality
from quantcache.attention.function import register_attention
from quantcache.attention.lazy import LazyKV
from quantcache.backends import BackendName, BackendReport
from quantcache.backends.padding import Arrivals
from quantcache.cache import files as cache_files
from quantcache.cache.codecs import CodecFactory, ShapeCheck, calibrated_codecs
from quantcache.cache.fingerprints import check_model
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.mixed_layers import copy_beside, spectral_layer
from quantcache.cache.settling import lengths
from quantcache.cache.tracing import TraceableCache
from quantcache.cache.transaction import detached_copy
from quantcache.coding.schema import SideBits
from quantcache.common import compat, processes
from quantcache.common.ambient import default_device
from quantcache.common.choices import Quality
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import CalibrationMismatch, QuantCacheError
from quantcache.common.writing import steadily


class BlockCache(TraceableCache):
    """A DynamicCache whose full-attention layers store blocks through codecs of the caller's choice.

    Args:
        config: A config with the model's cache attributes.
        codecs_of: Gives codec factory and shape check of a layer, by index.
        sink_length: First tokens of every row that stay in the model's dtype.
        residual_length: Recent tokens that stay in the model's dtype.
        backend: Which implementation attends on codes.
        blocks_at_once: Blocks of 64 tokens that are encoded together, for codecs with longer tiles.

    Raises:
        QuantCacheError: The backend cannot run on any device of this machine.
        ValueError: A length, the backend or the number of blocks is out of range.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codecs_of: Callable[[int], tuple[CodecFactory, ShapeCheck | None]],
        sink_length: int = SINK_LENGTH,
        residual_length: int = RESIDUAL_LENGTH,
        backend: BackendName = "auto",
        blocks_at_once: int = 1,
    ):
        for name, number, least in (
            ("sink_length", sink_length, 0),
            ("residual_length", residual_length, 0),
            ("blocks_at_once", blocks_at_once, 1),
        ):
            if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
                raise ValueError(f"{name} must be a whole number from {least} up, got {number!r}")
        backends.known_name(backend)
        if not torch.accelerator.is_available():  # else nobody knows yet where the model will be
            backends.require_usable(backend, torch.device("cpu"))
        processes.use_living_threads()
        register_attention()
        with default_device():  # a sliding-window layer of transformers states none
            super().__init__(config=config)
        self.foreign = frozenset(cache_layout.cross_attention_layers(config))
        for index, layer in enumerate(self.layers):
            if compat.is_full_attention(layer) and index not in self.foreign:
                arguments = (*codecs_of(index), sink_length, residual_length, backend, index)
                own = self.layers[index] = spectral_layer(layer, *arguments)
                own.blocks_at_once = blocks_at_once
        self.be_traceable(read_once=not cache_layout.shares_keys(config))
        rotation = cache_layout.declared(config.get_text_config(decoder=True), "rope_parameters")
        self.sees_images = "mrope_section" in (rotation or {})

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have no keys and values of the whole text: transformers asks one that has for its mask."""
        return [compat.is_recurrent(layer) for layer in self.layers]

    def memory(self) -> CacheMemory:
        """Bytes held, by kind.

        Returns:
            The record; its ``str()`` is a table.
        """
        return measure(self.at_one_moment())

    def backend_report(self) -> dict[int, BackendReport]:
        """Who encodes and attends in each layer, and why not a faster backend.

        Returns:
            By index of the layer; layers that have encoded nothing yet are left out.
        """
        layers: dict[int, Any] = dict(enumerate(self.layers))
        found = {i: layer.backend_report() for i, layer in layers.items() if isinstance(layer, SpectralLayer)}
        return {i: report for i, report in found.items() if report is not None}

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Yield dense (keys, values, sliding window) of every layer, as DynamicCache does."""
        for keys, values, window in DynamicCache.__iter__(self.fork()):
            if isinstance(keys, LazyKV) and isinstance(values, LazyKV):
                keys, values = keys.materialize(), values.materialize()
            yield keys, values, window

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise QuantCacheError(f"a {type(self).__name__} cannot be pickled: use save() and load()")


class SpectralCache(BlockCache):
    """A key/value cache that stores packed spectral codes.

    Pass it to ``generate`` as ``past_key_values``. Every plain full-attention layer is compressed; sliding-window,
    linear and placeholder layers stay as transformers makes them. Load the model with
    ``attn_implementation="spectral"`` to attend on the codes; any other implementation gives the same results from
    dense tensors made on the fly.

    Args:
        calibration: Calibration of the model that will use the cache.
        config: The model's config; without it the cache's layers follow from the calibration alone.
        model: The model itself, with or without its config: its weights are compared with those calibrated, too.
        strict: Refuse a calibration of another model of the same geometry, which is otherwise warned of.
        bits: Mean code width in bits, 0 to 8; what is not given of this and the next four is the calibration's.
        quality: ``"near-lossless"``, ``"balanced"`` or ``"small"`` in place of ``bits``: the fewest at which the
            calibration predicts a mean KL divergence of at most 0.001, 0.005 or 0.02 nats per token.
        key_bits: Separate bits for the keys, ``"dense"`` to leave them uncompressed, or ``"joint"``.
        value_bits: The same for the values.
        min_bits: Smallest width given to any coefficient.
        sink_length: First tokens of every row that stay in the model's dtype.
        residual_length: Recent tokens that stay in the model's dtype.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"torch"``.

    Raises:
        ArtifactError: Neither ``config`` nor ``model`` is given, and the calibration does not say enough of the layers.
        CalibrationMismatch: The calibration is for another geometry than ``config``, or with ``strict`` for another
            model; or a calibrated layer would stay as it is.
        QuantCacheError: ``quality`` is given, and the calibration predicts nothing or no such rate; or ``config`` and
            ``model`` are of different caches; or the backend cannot run on any device of this machine.
        TypeError: The calibration, the config or the model is something else.
        UnsupportedModel: ``config`` is an encoder-decoder's, or no layer of it can be compressed.
        ValueError: A length, a number of bits or the backend is out of range, both ``bits`` and ``quality`` are given,
            or either of them although both sides have bits of their own.
    """

    def __init__(
        self,
        calibration: Calibration,
        config: PreTrainedConfig | None = None,
        *,
        bits: float | None = None,
        quality: Quality | None = None,
        key_bits: SideBits | None = None,
        value_bits: SideBits | None = None,
        min_bits: int | None = None,
        sink_length: int = SINK_LENGTH,
        residual_length: int = RESIDUAL_LENGTH,
        backend: BackendName = "auto",
        model: PreTrainedModel | None = None,
        strict: bool = False,
    ):
        if not isinstance(calibration, Calibration):
            raise TypeError(f"SpectralCache needs a Calibration, got {type(calibration).__name__}")
        if config is not None or model is not None:
            config = _config_of(model, config)
            cache_layout.compressible_layers(config)
            calibration.check_compatible(config if model is None else model, strict=strict)
        sides: Any = {"key_bits": key_bits, "value_bits": value_bits, "min_bits": min_bits}
        if quality is not None:
            calibration = at_quality(calibration, quality, bits=bits, **sides)
        else:
            calibration = calibration.with_bits(bits, **sides)
        super().__init__(
            config or stand_in_config(calibration.metadata.cache_config),
            lambda index: calibrated_codecs(calibration, index),
            sink_length,
            residual_length,
            backend,
        )
        unused = sorted(calibration.layers.keys() - {layer.index for layer in self.spectral_layers})
        if unused:
            raise CalibrationMismatch(f"the calibration covers layers {unused}, which this cache does not compress")
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
            token: Hub access token; by default that of the login.
            cache_dir: Hub cache folder.
            local_files_only: Never go to the network.
            subfolder: Folder inside the repository.
            kwargs: Arguments of :class:`SpectralCache`, such as ``model``, ``bits`` or ``quality``.

        Returns:
            An empty cache.

        Raises:
            ArtifactError: The artifact is missing or malformed, or the download failed.
            CalibrationMismatch: The calibration is for another geometry, or with ``strict`` for another model.
            TypeError: An argument is unknown, or of the wrong kind.
            ValueError: An argument of :class:`SpectralCache` is out of range.
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
            calibration: Calibration of the model that filled ``cache``.
            config: ``model.config``.
            attention_mask: The mask its tokens came with, ``[B, T]``, where rows are padded: says where they begin.
            kwargs: Arguments of :class:`SpectralCache`.

        Returns:
            A cache of the same tokens.

        Raises:
            CalibrationMismatch: Number of layers or their geometry differ.
            QuantCacheError: A layer that is to be compressed is of a kind that does not hold all of its keys as they
                are, or layers hold different numbers of tokens.
            TypeError: The argument is not a DynamicCache.
        """
        if not isinstance(cache, DynamicCache):
            raise TypeError(f"from_dynamic_cache() needs a DynamicCache, got {type(cache).__name__}")
        new = cls(calibration, config, **kwargs)
        if len(new.layers) != len(cache.layers):
            raise CalibrationMismatch(
                f"calibration has {len(new.layers)} layers, the cache to compress has {len(cache.layers)}"
            )
        old: Any
        for index, old in enumerate(cache.layers):
            layer = new.layers[index]
            if not isinstance(layer, SpectralLayer):
                new.layers[index] = detached_copy(old)
            elif getattr(old, "is_initialized", False) and old.get_seq_length():
                length, held = old.get_seq_length(), old.keys.shape[2]
                if held != length:
                    raise QuantCacheError(
                        f"layer {index}, a {type(old).__name__}, holds keys of {held} tokens after {length} tokens"
                    )
                told = Arrivals.of(attention_mask, None, length, length)
                layer.update(old.keys.detach(), old.values.detach(), arrivals=told)
                layer.flush()
                copy_beside(layer, old)
        most = max(lengths(new, new.layers), default=0)
        for layer in new.layers:
            compat.recount(layer, most)
        if len(found := lengths(new, new.layers)) > 1:
            raise QuantCacheError(f"layers hold different numbers of tokens: {', '.join(map(str, sorted(found)))}")
        return new

    def save(self, path: str | Path, model: PreTrainedModel | None = None) -> None:
        """Write what is cached to one safetensors file: a prefix that need not be computed again.

        Args:
            path: The file; complete or not at all.
            model: The model that filled the cache: its weights are then checked when the file is loaded.

        Raises:
            OSError: The disk is full, or the folder cannot be written to.
            QuantCacheError: The cache holds something that cannot be written, a forward pass was interrupted, another
                thread is using the cache, or the model's weights are not in memory.
        """
        if self.calibration is None:
            raise QuantCacheError("a self-calibrating cache has no calibration to be read with and cannot be saved")
        seen = self.settled()
        cache_files.write_cache(
            Path(path), seen.at_one_moment(), self.calibration, model, lambda: self.holds(seen.layers)
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        calibration: Calibration,
        model: PreTrainedModel | None = None,
        config: PreTrainedConfig | None = None,
        backend: BackendName = "auto",
    ) -> SpectralCache:
        """Read a cache that :meth:`save` has written, at the bits and with the lengths it had.

        It comes back in CPU memory, and each layer follows the model to its device with its next update.

        Args:
            path: File that :meth:`save` has written.
            calibration: The calibration it was filled with, at any bits.
            model: The model that is to read it: weights or a rotation other than it was saved with are refused.
            config: The model's config, if the model itself is not at hand.
            backend: As for :class:`SpectralCache`.

        Returns:
            The cache.

        Raises:
            ArtifactError: The file is missing, damaged or malformed.
            CalibrationMismatch: The file was written with another calibration or model.
            QuantCacheError: The model's weights are not in memory, or ``config`` is of another cache than the model.
            TypeError: The calibration is something else, such as its folder.
        """
        if not isinstance(calibration, Calibration):
            kind = type(calibration).__name__
            raise TypeError(f"SpectralCache.load needs a Calibration, got {kind}: use Calibration.from_pretrained()")
        path = Path(path)

        def read() -> SpectralCache:
            description = cache_files.read_description(path)
            saved = cache_files.calibration_at(description, calibration, path)
            cache = cls(
                saved,
                config,
                sink_length=description["sink_length"],
                residual_length=description["residual_length"],
                backend=backend,
                model=model,
            )
            if model is not None:
                check_model(description, model, path)
            cache_files.read_cache(path, description, cache, saved)
            return cache

        return steadily([path], read)

    @classmethod
    def self_calibrating(cls, model: Any, bits: float = 3.0, **kwargs: Any) -> SpectralCache:
        """A cache that needs no artifact: it fits itself to the first prompt it sees.

        Each layer takes the statistics of the first tokens that leave its residual window, without a backward pass, and
        compresses from there on. Fidelity is lower than with a calibration.

        Args:
            model: Model that will use the cache.
            bits: Mean code width of every layer's keys and values.
            kwargs: ``sink_length``, ``residual_length`` and ``backend``.

        Returns:
            An empty cache.

        Raises:
            QuantCacheError: The model's weights are not in memory.
            TypeError: The model is only named and not loaded.
            UnsupportedModel: The model's cache cannot be compressed, or its attention has no known interface.
            ValueError: A number is out of range, or something is given that needs a calibration, such as ``quality``.
        """
        from quantcache.cache.self_calibration import self_calibrating_cache

        return self_calibrating_cache(cls, model, bits, **kwargs)


def _config_of(model: PreTrainedModel | None, config: PreTrainedConfig | None) -> PreTrainedConfig:
    """The config that counts: a model's own, beside which another one must be of the same cache."""
    if config is not None and not isinstance(config, PreTrainedConfig):
        raise TypeError(f"SpectralCache needs a model's config, or model=, got config={type(config).__name__}")
    own = config if model is None else getattr(model, "config", None)
    if not isinstance(own, PreTrainedConfig):
        raise TypeError(f"SpectralCache needs a model's config, or model=, got model={type(model).__name__}")
    if config is None:
        return own
    theirs, ours = cache_layout.cache_config(config), cache_layout.cache_config(own)
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise QuantCacheError(
                f"config= and model= disagree: {name} is {theirs.get(name)!r} and {ours.get(name)!r}; give model= alone"
            )
    return own
