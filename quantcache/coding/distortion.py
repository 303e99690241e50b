"""What a calibration's codes should cost by its own model of the loss, before any measurement.

The spectra of a Fisher calibration are in nats: to second order the Kullback-Leibler divergence that quantization
causes is half the expected squared error in every coefficient, summed. That sum follows the rate well, but is several
times too large: in calibration all later tokens see an error, while a cache keeps the most recent tokens exact; errors
of neighbouring tokens are not independent either. Short runs through the real cache tie it to divergences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quantcache.coding.gains import GAIN_STEPS
from quantcache.coding.schema import Coding, LayerCalibration, SideCalibration
from quantcache.coding.trellis import code_distortions

GAIN_NOISE = (math.log(2) / GAIN_STEPS) ** 2 / 12
"""Mean squared relative error of a gain: rounding is uniform over a step, and a step is this share of the gain."""


def coefficient_distortion(widths: Tensor, coding: Coding = "scalar") -> Tensor:
    """Mean squared error of unit-variance Gaussian coefficients of given widths, the rounded gain included.

    Args:
        widths: Code widths, any shape.
        coding: What codes stand for.

    Returns:
        float64 of the same shape; 1 where the width is 0.
    """
    table = torch.tensor(code_distortions(coding), dtype=torch.float64, device="cpu")
    own = table[widths.long()]
    return own + torch.where(widths > 0, GAIN_NOISE * (1 - own), 0.0)


def side_cost(side: SideCalibration, coding: Coding = "scalar") -> float:
    """Half the expected squared error of one side's coefficients, Σ ½ λ D(b), over all heads and dimensions.

    Args:
        side: Spectrum ``[H, D]`` and widths ``[H, D]`` of one side.
        coding: What its codes stand for.

    Returns:
        Nats per token under the Fisher metric; 0 for a dense side.
    """
    if side.widths is None:
        return 0.0
    return 0.5 * float((side.spectrum * coefficient_distortion(side.widths, coding)).sum())


def expected_cost(layers: Mapping[int, LayerCalibration], coding: Coding = "scalar") -> float:
    """:func:`side_cost` of all layers and sides.

    Source: reverse water-filling's objective (Cover and Thomas, "Elements of Information Theory", section 10.3) with
    the codec's distortions, in the Fisher metric (Amari, "Natural gradient works efficiently in learning", 1998).

    Args:
        layers: A calibration's layers, with widths.
        coding: What their codes stand for.

    Returns:
        Nats per token under the Fisher metric.
    """
    return sum(side_cost(side, coding) for layer in layers.values() for side in (layer.key, layer.value))
