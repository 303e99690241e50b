"""Constants of the right shapes and of no meaning, for work on speed and memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from quantcache.artifact import cache_layout, tracing
from quantcache.coding import linalg
from quantcache.coding.rope import Frame, Rope
from quantcache.coding.schema import CodecSettings, LayerCalibration, Metadata, SideCalibration
from quantcache.common import compat


def random_constants(
    config: PreTrainedConfig, seed: int, codec: CodecSettings | None = None
) -> tuple[dict[int, LayerCalibration], Metadata]:
    """Random orthogonal transforms and geometric spectra for every layer that can be compressed.

    Args:
        config: The model's config.
        seed: Seed of the transforms.
        codec: Codec choices; the defaults if None.

    Returns:
        The layers, without widths, and what a calibration says of itself.

    Raises:
        UnsupportedModel: No layer can be compressed, or its shapes are not known.
    """
    text_config = config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(seed)
    cache_layout.compressible_layers(config)
    codec = codec or CodecSettings()
    layers = {}
    for index, (key, value) in tracing.cached_shapes(config).items():
        rope = cache_layout.rope_from_config(text_config, index)
        if rope.rotary_dim > key[1] or key != value:
            rope = Rope()  # what is cached is not the rotated keys
        frame = Frame(key[1], rope, codec.fast_wavelength)
        layers[index] = LayerCalibration(
            rope,
            _random_side(*key, (frame.num_slow, frame.num_fast), generator),
            _random_side(*value, (value[1],), generator),
        )
    metadata = Metadata(
        base_model={"id": None, "revision": None, "model_type": text_config.model_type},
        cache_config=cache_layout.cache_config(config),
        recipe={"metric": "synthetic", "seed": seed},
        codec=codec,
        environment=compat.versions(),
    )
    return layers, metadata


def _random_side(heads: int, dim: int, parts: tuple[int, ...], generator: torch.Generator) -> SideCalibration:
    analysis = torch.zeros(heads, dim, dim, dtype=torch.float32, device="cpu")
    offset = 0
    for size in parts:
        if size:
            noise = torch.randn(heads, size, size, generator=generator, dtype=torch.float32, device="cpu")
            analysis[:, offset : offset + size, offset : offset + size] = linalg.qr(noise)[0]
        offset += size
    spectrum = torch.cat([0.9 ** torch.arange(size, dtype=torch.float64, device="cpu") for size in parts])
    return SideCalibration(torch.zeros_like(analysis[..., 0]), analysis, spectrum.expand(heads, dim).contiguous())
