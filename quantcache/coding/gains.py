"""The gain of a token, in 8 bits on a logarithmic scale."""

from __future__ import annotations

import torch
from torch import Tensor

GAIN_STEPS = 32
"""Gain steps per octave: neighbouring gains differ by 2.2 %, and all lie between 1/16 and 16."""

GAIN_CENTER = 128
"""Gain code of 1.0; code 0 is the gain zero."""

LARGEST_GAIN_CODE = 255


def quantize_gain(gain: Tensor) -> Tensor:
    """Quantize gains logarithmically to 8 bits.

    Args:
        gain: Non-negative gains, any shape.

    Returns:
        uint8 codes; 0 stands for gains below 1/16.
    """
    exponent = torch.log2(gain.clamp_min(1e-30)) * GAIN_STEPS
    return (exponent + GAIN_CENTER).round().clamp(0, LARGEST_GAIN_CODE).to(torch.uint8)


def dequantize_gain(code: Tensor) -> Tensor:
    """Invert :func:`quantize_gain`.

    Args:
        code: uint8 codes.

    Returns:
        float32 gains; code 0 is 0.0.
    """
    gain = torch.exp2((code.float() - GAIN_CENTER) / GAIN_STEPS)
    return torch.where(code > 0, gain, torch.zeros_like(gain))
