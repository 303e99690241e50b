"""TurboQuant: random rotation, norm and Lloyd-Max codes, with or without a one-bit sketch of the residual."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache

from quantcache.coding import linalg
from quantcache.coding.codebook import lloyd_max
from quantcache.evaluation.methods.base import Scheme, Setting, SimulatedCodec, simulated_cache, two_to_four

SOURCE = "TurboQuant (2025)"


def mse_bits(bits: float, dim: int) -> float:
    """Bits per element: codes, and one 16-bit norm per token and head."""
    return bits + 16 / dim


def qjl_bits(bits: float, dim: int) -> float:
    """Bits per element: codes and sketch, and the 16-bit norms of token and residual."""
    return bits + 32 / dim


class TurboQuantCodec(SimulatedCodec):
    """TurboQuant-MSE: random rotation, per-token norm in float16, Lloyd-Max codes of one width.

    Source: A. Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate" (2025).

    Args:
        dim: D, dimension of a head.
        bits: Width of every code; 0 leaves nothing.
        seed: Decides the random rotation.
        device: Where the constants live.
    """

    def __init__(self, dim: int, bits: int, seed: int, device: torch.device | str = "cpu"):
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
        orthogonal, triangular = linalg.qr(gaussian)
        self.rotation = (orthogonal * triangular.diagonal().sign()).float().to(device)  # Haar-distributed
        book = lloyd_max(bits)
        self.levels = torch.tensor(book.levels, dtype=torch.float32, device=device)
        self.boundaries = torch.tensor(book.boundaries, dtype=torch.float32, device=device)
        super().__init__(mse_bits(bits, dim), [self.rotation, self.levels, self.boundaries])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Normalize, rotate, round every coordinate to its nearest level, and back."""
        scale = (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5).half().float()
        rotated = x / scale.clamp_min(1e-30) @ self.rotation.T
        return self.levels[torch.bucketize(rotated, self.boundaries)] @ self.rotation * scale


class TurboQuantQJLCodec(SimulatedCodec):
    """TurboQuant for inner products: MSE codes of one bit less, and one bit per coordinate of a sketch of the residual.

    With r the residual and S a Gaussian matrix, sign(S r) and the norm of r are kept, and r is estimated as
    √(π/2) / D · ‖r‖ · Sᵀ sign(S r), whose inner product with any query is unbiased. Source: as
    :class:`TurboQuantCodec`; A. Zandieh et al., "QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero
    Overhead" (2024).

    Args:
        dim: D, dimension of a head.
        bits: Bits per coordinate, the sketch's included.
        seed: Seed of rotation and sketch.
        device: Where the constants live.
    """

    def __init__(self, dim: int, bits: int, seed: int, device: torch.device | str = "cpu"):
        self.coarse = TurboQuantCodec(dim, bits - 1, seed, device)
        generator = torch.Generator().manual_seed(seed + (1 << 32))
        self.sketch = torch.randn(dim, dim, generator=generator, dtype=torch.float32, device="cpu").to(device)
        super().__init__(qjl_bits(bits, dim), [*self.coarse.tensors(), self.sketch])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Quantize, and add the estimate of what is left."""
        coarse = self.coarse.reconstruct(x)
        residual = x - coarse
        norm = residual.norm(dim=-1, keepdim=True).half().float()
        signs = torch.where(residual @ self.sketch.T < 0, -torch.ones_like(x), torch.ones_like(x))
        return coarse + math.sqrt(math.pi / 2) / x.shape[-1] * norm * (signs @ self.sketch)


def _seed(index: int, side: str) -> int:
    return 2 * index + (side == "value")


def _mse(bits: float, setting: Setting) -> Callable[[], Cache]:
    return simulated_cache(
        setting,
        lambda index, side, x, device: TurboQuantCodec(x.shape[-1], int(bits), _seed(index, side), device),
    )


def _qjl(bits: float, setting: Setting) -> Callable[[], Cache]:
    # Values enter no inner product with a query: they take the MSE codes at the full width.
    kinds = {"key": TurboQuantQJLCodec, "value": TurboQuantCodec}
    return simulated_cache(
        setting,
        lambda index, side, x, device: kinds[side](x.shape[-1], int(bits), _seed(index, side), device),
    )


SCHEMES = (
    Scheme(
        stem="turboquant-mse",
        family="rival",
        simulated=True,
        description="random rotation, one 16-bit norm per token and head, Lloyd-Max codes",
        source=SOURCE,
        make=_mse,
        bits=lambda bits, side, dim: mse_bits(bits, dim),
        parameter="B",
        numbers=tuple(range(1, 9)),
        defaults=two_to_four,
        own_lengths=(0, 0),
    ),
    Scheme(
        stem="turboquant-qjl",
        family="rival",
        simulated=True,
        description="keys: codes of one bit less and a one-bit sketch of the residual; values: as turboquant-mse",
        source=SOURCE,
        make=_qjl,
        bits=lambda bits, side, dim: (qjl_bits if side == "key" else mse_bits)(bits, dim),
        parameter="B",
        numbers=tuple(range(1, 9)),
        defaults=two_to_four,
        own_lengths=(0, 0),
    ),
)
