"""Round-to-nearest codes behind a Hadamard rotation as engines ship them: vLLM's int4, llama.cpp's q4_0 and q8_0."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import Cache

from quantcache.evaluation.methods.base import Scheme, Setting, SimulatedCodec, hadamard, simulated_cache

SIGN_SEED = 0x9E3779B9
"""Of the signs in front of vLLM's Hadamard matrix."""

GGML_BLOCK = 32
"""Channels that share a float16 scale in llama.cpp's formats."""

VALUE_ROTATION = 64
"""Rows of the Hadamard matrix that llama.cpp turns values with; keys take the largest that fits."""


def int4_bits(dim: int) -> float:
    """Bits per element: 4-bit codes, and a float32 for each token and head whose last four bits are the zero point."""
    return 4 + 32 / dim


def ggml_bits(width: int, dim: int) -> float:
    """Bits per element: codes, and a float16 scale for every block of channels."""
    return width + 16 / math.gcd(dim, GGML_BLOCK)


class Int4TokenHeadCodec(SimulatedCodec):
    """Random signs and a Hadamard rotation, then asymmetric 4-bit codes with one scale per token and head.

    Source: vLLM's ``int4_per_token_head`` (github.com/vllm-project/vllm/pull/40835). The zero point is a whole number
    that stands in the last four bits of the float32 scale.

    Args:
        dim: D, dimension of a head.
        device: Where the constants live.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        generator = torch.Generator().manual_seed(SIGN_SEED)
        signs = 2 * torch.bernoulli(torch.full((dim,), 0.5, dtype=torch.float32, device="cpu"), generator=generator) - 1
        self.rotation = (signs[:, None] * hadamard(dim)).to(device)
        super().__init__(int4_bits(dim), [self.rotation])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Rotate, quantize each token by its own range, rotate back."""
        turned = x @ self.rotation
        low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-8)
        zero = (-low / scale).round().clamp(0, 15)
        codes = (turned / scale + zero).round().clamp(0, 15)
        stored = ((scale.view(torch.int32) & ~15) | zero.int()).view(torch.float32)
        return (codes - zero) * stored @ self.rotation.T


class GgmlCodec(SimulatedCodec):
    """A Hadamard rotation, then llama.cpp's q4_0 or q8_0: blocks of 32 channels with a float16 scale, no zero point.

    Source: github.com/ggml-org/llama.cpp, ``quantize_row_q4_0_ref`` and ``quantize_row_q8_0_ref``; the rotation is that
    of its pull request 21038, which leaves heads alone whose dimension 64 does not divide.

    Args:
        side: ``"key"`` or ``"value"``.
        dim: D; where 32 does not divide it, blocks are as large as both allow.
        bits: 4 or 8.
        device: Where the constants live.
    """

    def __init__(self, side: str, dim: int, bits: int, device: torch.device | str = "cpu"):
        size = VALUE_ROTATION if side == "value" else dim
        plain = torch.eye(dim, dtype=torch.float32, device="cpu")
        whole = torch.block_diag(*[hadamard(size)] * (dim // size)) if dim % VALUE_ROTATION == 0 else plain
        self.rotation = whole.to(device)
        self.width, self.block = bits, math.gcd(dim, GGML_BLOCK)
        super().__init__(ggml_bits(bits, dim), [self.rotation])

    def reconstruct(self, x: Tensor) -> Tensor:
        """Rotate, quantize each block of channels, rotate back."""
        blocks = (x @ self.rotation).unflatten(-1, (-1, self.block))
        if self.width == 4:  # the entry of largest magnitude is -8 steps, whatever its sign
            peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
            scale = peak / -8
            codes = (blocks * _inverse(scale) + 8.5).floor().clamp(0, 15) - 8
        else:
            scale = blocks.abs().amax(-1, keepdim=True) / 127
            codes = (blocks * _inverse(scale)).round()
        return (codes * scale.half().float()).flatten(-2) @ self.rotation.T


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _int4(number: float, setting: Setting) -> Callable[[], Cache]:
    return simulated_cache(setting, lambda index, side, x, device: Int4TokenHeadCodec(x.shape[-1], device))


def _ggml(width: int, number: float, setting: Setting) -> Callable[[], Cache]:
    return simulated_cache(setting, lambda index, side, x, device: GgmlCodec(side, x.shape[-1], width, device))


def _ggml_bits(width: int, number: float, side: str, dim: int) -> float:
    return ggml_bits(width, dim)


SCHEMES = (
    Scheme(
        stem="int4-token-head",
        family="rival",
        simulated=True,
        description="random signs, Hadamard rotation, asymmetric 4-bit codes with a 32-bit scale per token and head",
        source="vLLM's int4_per_token_head",
        make=_int4,
        bits=lambda number, side, dim: int4_bits(dim),
        own_lengths=(0, 0),
    ),
    *(
        Scheme(
            stem=f"q{width}_0",
            family="rival",
            simulated=True,
            description=f"Hadamard rotation, symmetric {width}-bit codes in blocks of 32 channels with a 16-bit scale",
            source="llama.cpp's cache types, rotated since April 2026",
            make=partial(_ggml, width),
            bits=partial(_ggml_bits, width),
            own_lengths=(0, 0),
        )
        for width in (4, 8)
    ),
)
