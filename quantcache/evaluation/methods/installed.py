"""transformers' quantized caches, run as installed: quanto, hqq and fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from quantcache.coding.packing import BLOCK
from quantcache.common import compat
from quantcache.evaluation.methods.base import MethodUnavailable, Scheme, Setting, SimulatedCodec, simulated_cache

OPTIONS: dict[str, dict[str, Any]] = {
    "quanto": {"axis_key": 0, "axis_value": 0},
    "hqq": {"axis_key": 1, "axis_value": 1},
}
"""The axes that transformers' documentation recommends for each back end."""


GROUP = 64
"""Elements that share a 16-bit scale and zero point in transformers' quantized caches (its default)."""

FP8_BITS = 8.0


class Fp8Codec(SimulatedCodec):
    """A cast to float8 e4m3 with scale 1, as vLLM does where a checkpoint brings no scales."""

    def __init__(self) -> None:
        super().__init__(FP8_BITS)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Cast there and back; what exceeds the format saturates."""
        limit = torch.finfo(torch.float8_e4m3fn).max
        return x.clamp(-limit, limit).to(torch.float8_e4m3fn).float()


def _grouped_bits(bits: float, side: str, dim: int) -> float:
    return bits + 32 / GROUP


def _integer(backend: str) -> Callable[[float, Setting], Callable[[], Cache]]:
    def make(bits: float, setting: Setting) -> Callable[[], Cache]:
        def cache() -> Cache:
            options = {"nbits": int(bits), "residual_length": setting.residual_length, **OPTIONS[backend]}
            try:
                return compat.quantized_cache(backend, setting.config, **options)
            except (ImportError, ValueError) as error:
                raise MethodUnavailable(str(error)) from error

        return cache

    return make


def _fp8(number: float, setting: Setting) -> Callable[[], Cache]:
    if not compat.HAS_FP8_CACHE:
        return simulated_cache(setting, lambda index, side, x, device: Fp8Codec())

    def cache() -> Cache:
        try:
            return compat.quantized_cache("fp8", setting.config)
        except ValueError as error:
            raise MethodUnavailable(str(error)) from error

    return cache


SCHEMES = (
    Scheme(
        stem="quanto",
        family="rival",
        simulated=False,
        description="min-max codes in groups of 64; everything is coded anew whenever the residual is full; no sinks",
        source="transformers QuantizedCache with optimum-quanto",
        make=_integer("quanto"),
        bits=_grouped_bits,
        parameter="B",
        numbers=(2, 4),
        defaults=lambda config: (2, 4),
        own_lengths=(0, 128),
        layout="quantized",
        tile=lambda number: None,
        unsupported=lambda: compat.missing_quantizer("quanto"),
    ),
    Scheme(
        stem="hqq",
        family="rival",
        simulated=False,
        description="half-quadratic codes in groups of 64; all coded anew whenever the residual is full; no sinks",
        source="transformers QuantizedCache with hqq",
        make=_integer("hqq"),
        bits=_grouped_bits,
        parameter="B",
        numbers=(1, 2, 3, 4, 8),
        defaults=lambda config: (2, 4),
        own_lengths=(0, 128),
        layout="quantized",
        tile=lambda number: None,
        unsupported=lambda: compat.missing_quantizer("hqq"),
    ),
    Scheme(
        stem="fp8",
        family="rival",
        simulated=not compat.HAS_FP8_CACHE,
        description="float8 e4m3, one scale per tensor, set by the first tokens; no sinks, no residual"
        if compat.HAS_FP8_CACHE
        else "float8 e4m3 with scale 1",
        source="transformers QuantizedCache with fp8" if compat.HAS_FP8_CACHE else "vLLM's fp8 cache",
        make=_fp8,
        bits=lambda number, side, dim: FP8_BITS,
        own_lengths=(0, 0),
        keeps_lengths=not compat.HAS_FP8_CACHE,
        layout="quantized" if compat.HAS_FP8_CACHE else "blocks",
        tile=lambda number: None if compat.HAS_FP8_CACHE else BLOCK,
    ),
)
