"""The methods that can be measured, each able to make its own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig

from quantcache.artifact import Calibration
from quantcache.cache import RESIDUAL_LENGTH, SINK_LENGTH, BlockCache, CodecFactory, SpectralCache
from quantcache.codebook import lloyd_max
from quantcache.codec import SideCodec, join_blocks, split_blocks
from quantcache.errors import QuantCacheError


@dataclass(frozen=True)
class Method:
    """One way of keeping a KV cache.

    Attributes:
        name: As given on the command line.
        family: ``ours``, ``rival`` or ``dense``.
        simulated: Whether the cache holds fake-quantized values instead of codes.
        make_cache: Makes an empty cache.
    """

    name: str
    family: Literal["ours", "rival", "dense"]
    simulated: bool
    make_cache: Callable[[], Cache]


def parse_methods(
    names: Sequence[str],
    config: PreTrainedConfig,
    calibration: Calibration | None,
    sink_length: int = SINK_LENGTH,
    residual_length: int = RESIDUAL_LENGTH,
) -> list[Method]:
    """Turn method names into methods.

    Args:
        names: ``dense``, ``spectral-B`` or ``turboquant-mse-B``, B a number of bits.
        config: The model's config.
        calibration: The model's calibration, for ``spectral-B``.
        sink_length: First tokens kept by every method.
        residual_length: Recent tokens kept by every method.

    Returns:
        The methods, in the order given.

    Raises:
        QuantCacheError: A name is unknown, or its number of bits out of range.
    """
    methods = []
    for name in names:
        stem, _, rate = name.rpartition("-")
        if name == "dense":
            methods.append(Method(name, "dense", False, lambda: DynamicCache(config=config)))
            continue
        try:
            bits = float(rate)
        except ValueError:
            raise QuantCacheError(f"unknown method {name!r}: known are dense, spectral-B, turboquant-mse-B") from None
        if stem == "spectral":
            if calibration is None:
                raise QuantCacheError(f"method {name} needs a calibration")
            if not 0 <= bits <= 8:
                raise QuantCacheError(f"method {name}: bits must lie between 0 and 8, got {rate}")
            allocated = calibration.with_bits(bits)
            methods.append(Method(name, "ours", False, _spectral(allocated, config, sink_length, residual_length)))
        elif stem == "turboquant-mse":
            if bits not in range(1, 9):
                raise QuantCacheError(f"method {name}: bits must be a whole number from 1 to 8, got {rate}")
            methods.append(Method(name, "rival", True, _turboquant(int(bits), config, sink_length, residual_length)))
        else:
            raise QuantCacheError(f"unknown method {name!r}: known are dense, spectral-B, turboquant-mse-B")
    return methods


def _spectral(calibration: Calibration, config: PreTrainedConfig, sinks: int, residual: int) -> Callable[[], Cache]:
    return lambda: SpectralCache(calibration, config, sink_length=sinks, residual_length=residual)


def _turboquant(bits: int, config: PreTrainedConfig, sinks: int, residual: int) -> Callable[[], Cache]:
    codecs: dict[tuple[int, str], TurboQuantCodec] = {}

    def codecs_of(index: int) -> tuple[CodecFactory, None]:
        def make(device: torch.device, tails: dict[str, Tensor], starts: Tensor | None) -> dict[str, SideCodec]:
            for number, (side, tail) in enumerate(tails.items()):
                if (index, side) not in codecs:
                    codecs[index, side] = TurboQuantCodec(tail.shape[-1], bits, seed=2 * index + number, device=device)
            return {side: codecs[index, side] for side in tails}

        return make, None

    return lambda: BlockCache(config, codecs_of, sinks, residual)


class TurboQuantCodec:
    """TurboQuant-MSE, simulated: random rotation, per-token norm in float16, Lloyd-Max codes of one width.

    Source: A. Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate" (2025). Values
    are quantized and dequantized at store time and kept in the model's dtype.

    Args:
        dim: D.
        bits: Width of every code.
        seed: Seed of the rotation.
        device: Where the constants live.
    """

    def __init__(self, dim: int, bits: int, seed: int, device: torch.device | str = "cpu"):
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        orthogonal, triangular = torch.linalg.qr(gaussian)
        self.rotation = (orthogonal * triangular.diagonal().sign()).float().to(device)  # Haar-distributed
        book = lloyd_max(bits)
        self.levels = torch.tensor(book.levels, device=device)
        self.boundaries = torch.tensor(book.boundaries, device=device)
        self.bits: float | None = bits + 16 / dim

    def encode(self, x: Tensor, places: Tensor, starts: Tensor | None) -> dict[str, Tensor]:
        """Quantize and dequantize n blocks ``[B, H, n * 64, D]``."""
        scale = (x.float().norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5).half().float()
        rotated = x.float() / scale.clamp_min(1e-30) @ self.rotation.T
        quantized = self.levels[torch.bucketize(rotated, self.boundaries)]
        return {"simulated": split_blocks((quantized @ self.rotation * scale).to(x.dtype))}

    def decode(self, fields: dict[str, Tensor], places: Tensor, starts: Tensor | None) -> Tensor:
        """Return n blocks ``[n, B, H, 64, D]`` as ``[B, H, n * 64, D]``."""
        return join_blocks(fields["simulated"])

    def tensors(self) -> list[Tensor]:
        """The constants."""
        return [self.rotation, self.levels, self.boundaries]
