"""Calibrations of any geometry whose widths vary as those of a real model do.

How fast a kernel is depends on the widths: on how many coefficients have none, on how many a tile mixes.
``Calibration.synthetic`` has smooth spectra of its own making. Here every spectrum is one of the bundled model's,
wiki11m (6 layers, 2 key/value heads of 64 dimensions), stretched to the wanted dimension; layers and heads take turns.
The transforms stay random: they cost the same whatever is in them. Codes are scalar, until ``with_coding`` says else.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from quantcache import Calibration
from quantcache.coding.allocation import allocate_layers
from quantcache.coding.rope import Frame
from quantcache.coding.schema import SIDES, CodecSettings, LayerCalibration, Rate, SideCalibration
from quantcache.data import calibrations_path


def realistic_calibration(config: PreTrainedConfig, bits: float = 3.0) -> Calibration:
    """A stand-in of a model's geometry with a real model's widths; its codes mean nothing for fidelity.

    Args:
        config: The model's config.
        bits: Mean code width, over all layers and both sides.

    Returns:
        The calibration.
    """
    made = Calibration.synthetic(config, bits, codec=CodecSettings(coding="scalar"))
    source = Calibration.from_pretrained(calibrations_path() / "wiki11m")
    layers, count = {}, len(made.layers)
    for place, (index, layer) in enumerate(made.layers.items()):
        original = source.layers[place * len(source.layers) // count]
        sides = {side: _with_spectrum(layer, original, side, made.metadata.codec.fast_wavelength) for side in SIDES}
        layers[index] = replace(layer, **sides)
    rate = Rate(bits)
    allocated = allocate_layers(layers, rate, made.metadata.codec, joint=True)
    return Calibration(allocated, replace(made.metadata, rate=rate))


def _with_spectrum(
    layer: LayerCalibration, original: LayerCalibration, side: str, wavelength: float
) -> SideCalibration:
    own, theirs = layer.side(side), original.side(side)
    if side == "key":
        frames = [Frame(each.side(side).dim, each.rope, wavelength) for each in (layer, original)]
        sizes, given = ([frame.num_slow, frame.num_fast] for frame in frames)
    else:
        sizes, given = [own.dim], [theirs.dim]
    heads = torch.arange(own.num_heads) % theirs.num_heads
    parts = theirs.spectrum[heads].split(given, dim=1)
    stretched = [stretch(part if part.shape[1] else parts[0], size) for part, size in zip(parts, sizes, strict=True)]
    return replace(own, spectrum=torch.cat(stretched, dim=1))


def stretch(spectrum: Tensor, size: int) -> Tensor:
    """Spectra ``[H, n]`` at another number of dimensions, ``[H, size]``: their logarithms, interpolated."""
    logs = spectrum.double().clamp_min(1e-12).log()[:, None]
    if not size:
        return spectrum.double()[:, :0]
    return torch.nn.functional.interpolate(logs, size, mode="linear", align_corners=False)[:, 0].exp()
