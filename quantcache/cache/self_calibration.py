"""Caches without an artifact: each layer fits its transforms to the first tokens it has to encode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.attention.output_metrics import output_metrics
from quantcache.attention.probe import detect_ropes, evaluating, observed_values
from quantcache.backends.padding import Grid
from quantcache.cache import guards
from quantcache.cache.codecs import CodecFactory, calibrated_codecs
from quantcache.cache.spectral_cache import BlockCache, SpectralCache
from quantcache.coding.allocation import check_rate
from quantcache.coding.blocks import SideCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import CodecSettings, Metadata, Rate
from quantcache.coding.statistics import COVARIANCE_SHRINKAGE, LayerStatistics
from quantcache.common import compat
from quantcache.common.ambient import standard_settings
from quantcache.common.defaults import SINK_LENGTH
from quantcache.common.errors import QuantCacheError

LEAST_TOKENS = BLOCK - SINK_LENGTH
"""Tokens of a fit, the first of every row left out: those of the shortest text that is encoded, unless it is padded."""

FIT_SHRINKAGE = 0.1
"""Isotropic share of a covariance known from as many tokens as it has dimensions; it falls with more tokens."""


def self_calibrating_cache(
    cls: type[SpectralCache], model: PreTrainedModel, bits: float = 3.0, **kwargs: Any
) -> SpectralCache:
    """See :meth:`quantcache.SpectralCache.self_calibrating`."""
    if isinstance(model, str | Path):  # anything that attends as a model does may be given, in whatever wrapper
        compat.require_loaded(model, "self_calibrating")
    check_rate(bits)
    for name in ("quality", "key_bits", "value_bits", "min_bits"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"{name} needs a calibration, and a self-calibrating cache has none: give bits")
    settings = CodecSettings()
    layers = cache_layout.compressible_layers(model.config)
    with evaluating(model), standard_settings():
        ropes = detect_ropes(model, layers)
        outputs = output_metrics(model, observed_values(model, layers))

    def codecs_of(index: int) -> tuple[CodecFactory, None]:
        def fit(device: torch.device, tails: dict[str, Tensor], grid: Grid) -> dict[str, SideCodec]:
            if not tails["key"].shape[2]:
                raise QuantCacheError(
                    f"a self-calibrating cache cannot follow its model to {device}: reset() it, or calibrate"
                )
            for side, tail in tails.items():
                guards.require_finite(index, side, tail, 0, grid.left_padding)
            statistics = LayerStatistics(index, ropes[index], tails["key"], tails["value"], settings)
            for row in range(tails["key"].shape[0]):
                first = 0 if grid.left_padding is None else int(grid.left_padding[row])
                if tails["key"].shape[2] - first > SINK_LENGTH:
                    origin = 0 if grid.frames is None else int(grid.frames[row])
                    position = first - (origin if grid.shifts is None else grid.shifts[row, first:])
                    for side, tail in tails.items():
                        statistics.add(side, tail[row : row + 1, :, first:], position)
            count = statistics.moments["key"].count
            if count < LEAST_TOKENS:
                return {}
            metric = outputs.get(index)
            share = max(COVARIANCE_SHRINKAGE, FIT_SHRINKAGE * tails["key"].shape[-1] / count)
            layer = statistics.solve(metric, share)
            fitted = Calibration({index: layer}, Metadata(codec=settings, joint=False)).with_rate(Rate(bits))
            return calibrated_codecs(fitted, index)[0](device, tails, grid)

        return fit, None

    cache = cls.__new__(cls)
    BlockCache.__init__(cache, model.config, codecs_of, **kwargs)
    cache.calibration = None
    return cache
