"""Uniform integer codes with a scale for each token or group: int8, KIVI and QuaRot."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from transformers import Cache

from quantcache.evaluation.methods.base import (
    Scheme,
    Setting,
    SimulatedCodec,
    hadamard,
    simulated_cache,
    two_to_four,
    uniform,
)

KIVI_GROUP = 32
"""Tokens (keys) or channels (values) that share a scale and a zero point, as in the paper's main results."""

QUAROT_CLIP = 0.95
"""Share of a token's range that the codes span, as in QuaRot's released settings for keys and values."""


def int8_bits(dim: int) -> float:
    """Bits per element of int8 codes with one 16-bit scale per token and head."""
    return 8 + 16 / dim


def kivi_group(side: str, dim: int) -> int:
    """Elements that share a scale and a zero point: 32 tokens of a key channel, up to 32 channels of a value."""
    return KIVI_GROUP if side == "key" else math.gcd(dim, KIVI_GROUP)


def kivi_bits(bits: float, side: str, dim: int) -> float:
    """Bits per element of KIVI: codes, and a 16-bit scale and zero point per group."""
    return bits + 32 / kivi_group(side, dim)


def quarot_bits(bits: float, side: str, dim: int) -> float:
    """Bits per element of QuaRot: codes, and a 16-bit scale and zero point per token and head."""
    return bits + 32 / dim


class TokenInt8Codec(SimulatedCodec):
    """Symmetric int8 with one float16 scale per token and head.

    Args:
        dim: D, dimension of a head.
    """

    def __init__(self, dim: int):
        super().__init__(int8_bits(dim))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Round to 255 levels between -max and max of each token."""
        scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
        return (x / scale.clamp_min(1e-30)).round().clamp(-127, 127) * scale


class KiviCodec(SimulatedCodec):
    """Asymmetric codes in groups of 32, with float16 scale and zero point: along time for keys, channels for values.

    Source: Z. Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024.

    Args:
        side: ``"key"`` or ``"value"``.
        dim: D; where 32 does not divide it, value groups are as large as both allow.
        bits: Width of every code.
    """

    def __init__(self, side: str, dim: int, bits: int):
        self.side, self.width = side, bits
        self.group = kivi_group(side, dim)
        super().__init__(kivi_bits(bits, side, dim))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Quantize each channel over 32 tokens (keys), or each token over 32 channels (values)."""
        if self.side == "key":
            return (
                uniform(x.transpose(-1, -2).unflatten(-1, (-1, self.group)), self.width).flatten(-2).transpose(-1, -2)
            )
        return uniform(x.unflatten(-1, (-1, self.group)), self.width).flatten(-2)


class QuarotCodec(SimulatedCodec):
    """Hadamard rotation of every head, then asymmetric codes with float16 scale and zero point per token.

    Source: S. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024.

    Args:
        rotation: The rotation, ``[D, D]`` or one for each head ``[H, D, D]``; applied as ``x @ rotation``.
        bits: Width of every code.
        clip: Share of the range that the codes span.
    """

    def __init__(self, rotation: Tensor, bits: int, clip: float):
        super().__init__(quarot_bits(bits, "key", rotation.shape[-1]), [rotation])
        self.rotation, self.width, self.clip = rotation, bits, clip

    def reconstruct(self, x: Tensor) -> Tensor:
        """Rotate, quantize each token, rotate back."""
        return uniform(x @ self.rotation, self.width, self.clip) @ self.rotation.transpose(-1, -2)


def _int8(number: float, setting: Setting) -> Callable[[], Cache]:
    return simulated_cache(setting, lambda index, side, x, device: TokenInt8Codec(x.shape[-1]))


def _kivi(bits: float, setting: Setting) -> Callable[[], Cache]:
    return simulated_cache(setting, lambda index, side, x, device: KiviCodec(side, x.shape[-1], int(bits)))


def _quarot(bits: float, setting: Setting) -> Callable[[], Cache]:
    return simulated_cache(
        setting,
        lambda index, side, x, device: QuarotCodec(hadamard(x.shape[-1]).to(device), int(bits), QUAROT_CLIP),
    )


SCHEMES = (
    Scheme(
        stem="int8-token",
        family="rival",
        simulated=True,
        description="symmetric int8, one 16-bit scale per token and head",
        source="the usual int8 cache",
        make=_int8,
        bits=lambda number, side, dim: int8_bits(dim),
        own_lengths=(0, 0),
    ),
    Scheme(
        stem="kivi",
        family="rival",
        simulated=True,
        description="asymmetric codes in groups of 32: keys per channel over tokens, values per token over channels",
        source="KIVI (ICML 2024)",
        make=_kivi,
        bits=kivi_bits,
        parameter="B",
        numbers=tuple(range(1, 9)),
        defaults=two_to_four,
        own_lengths=(0, 128),
    ),
    Scheme(
        stem="quarot",
        family="rival",
        simulated=True,
        description="Hadamard rotation, asymmetric codes per token and head, range clipped to 95 %",
        source="QuaRot (NeurIPS 2024)",
        make=_quarot,
        bits=quarot_bits,
        parameter="B",
        numbers=tuple(range(1, 9)),
        defaults=two_to_four,
        own_lengths=(0, 0),
    ),
)
