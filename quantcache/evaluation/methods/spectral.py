"""SpectralCache as a method to measure."""

from __future__ import annotations

from collections.abc import Callable

from transformers import Cache

from quantcache.coding.schema import Rate
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.methods.base import Scheme, Setting

GAIN_BITS = 8
"""Of the gain of every token and head."""


def _make(bits: float, setting: Setting) -> Callable[[], Cache]:
    if setting.calibration is None:
        raise QuantCacheError(
            f"method spectral-{bits:g} needs a calibration: give the model's (--calibration), or leave the method out"
        )
    allocated = setting.calibration.with_rate(Rate(bits))

    def make_cache() -> Cache:
        from quantcache.cache.spectral_cache import SpectralCache  # methods are listed without what generation needs

        return SpectralCache(
            allocated, setting.config, sink_length=setting.sink_length, residual_length=setting.residual_length
        )

    return make_cache


SCHEMES = (
    Scheme(
        stem="spectral",
        family="ours",
        simulated=False,
        description="loss-aware transform, water-filled trellis codes, one 8-bit gain per token and head, packed",
        source="quantcache SpectralCache",
        make=_make,
        bits=lambda bits, side, dim: bits + GAIN_BITS / dim,
        parameter="B",
        defaults=lambda config: (2, 2.5, 3, 4),
        own_lengths=(SINK_LENGTH, RESIDUAL_LENGTH),
        needs="calibration",
        layout="spectral",
    ),
)
