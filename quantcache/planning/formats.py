"""Every KV format that is known, and what an element costs in it, scales and gains included."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from quantcache.accounting.memory import DENSE_BITS, LayerSize, SideSize, calibrated_sizes
from quantcache.accounting.tiles import in_tiles
from quantcache.artifact.calibration import Calibration
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES, CodecSettings
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.evaluation.methods import Scheme
from quantcache.evaluation.methods.base import Layout
from quantcache.evaluation.methods.registry import split_name
from quantcache.planning.geometry import Geometry

FORMAT_NAMES = (
    "dense",
    "fp8",
    "int8-token",
    *("q8_0", "q4_0", "int4-token-head"),
    *("quanto-4", "quanto-2", "hqq-4", "hqq-2"),
    *(f"{stem}-{bits}" for stem in ("kivi", "quarot", "turboquant-mse", "turboquant-qjl") for bits in (4, 3, 2)),
    *(f"kvarn-{widths}-{tile}" for widths in ("k4v4", "k4v2", "k3v3", "k2v2") for tile in (64, 128)),
    *("spectral-4", "spectral-3", "spectral-2.5", "spectral-2"),
)
"""The formats that tables list. Other numbers of bits can be named where a family takes them."""

BY_OTHER_NAMES = {"bf16": "dense"}
"""What formats were called in earlier versions."""


@dataclass(frozen=True)
class Format:
    """One way of keeping keys and values.

    Attributes:
        name: Its name, that of the method in measurements.
        bits: Its number: of bits, of KVarN the tokens of a tile; 0 where the family has one setting only.
        scheme: What is known of the family.
    """

    name: str
    bits: float
    scheme: Scheme

    @property
    def layout(self) -> Layout:
        """How a cache of this format stores tokens."""
        return self.scheme.layout

    @property
    def blocks_at_once(self) -> int:
        """Blocks of 64 tokens that a cache of this format encodes together."""
        return max(1, (self.scheme.tile(self.bits) or BLOCK) // BLOCK)

    @property
    def runs(self) -> bool:
        """Whether there is a cache that stores it packed, once its packages are installed."""
        return not self.scheme.simulated


def parse_format(name: str) -> Format:
    """Find a format.

    Args:
        name: Its name, such as ``spectral-3`` or ``dense``, for which ``bf16`` may be said.

    Returns:
        The format.

    Raises:
        QuantCacheError: The name is unknown, or its number out of range.
    """
    name = BY_OTHER_NAMES.get(name, name)
    found = split_name(name)
    if found is None or found[0].family == "floor" or found[0].needs == "statistics":
        raise QuantCacheError(f"unknown format {name!r}: known are {', '.join(FORMAT_NAMES)}")
    scheme, number = found
    if scheme.parameter:
        scheme.check(number)
    return Format(name, number, scheme)


def list_formats() -> list[Format]:
    """The formats of :data:`FORMAT_NAMES`."""
    return [parse_format(name) for name in FORMAT_NAMES]


def bits_per_element(form: Format, geometry: Geometry) -> float:
    """Bits of an encoded element with everything that comes with its codes.

    Sinks, recent tokens, and layers that are not compressed are not in it.

    Args:
        form: The format.
        geometry: The model's cache.

    Returns:
        The mean over all layers that grow with the context.

    Raises:
        UnsupportedModel: The format cannot hold this model's cache.
    """
    if form.layout == "quantized":
        require_full_attention(form, geometry)
    if form.layout in ("dense", "quantized"):
        keys, values = ([getattr(layer, side) for layer in geometry.layers] for side in SIDES)
        elements = sum(side.elements for side in (*keys, *values))
        bits = sum(side.elements * form.scheme.bits(form.bits, "key", side.dim) for side in keys)
        bits += sum(side.elements * form.scheme.bits(form.bits, "value", side.dim) for side in values)
        return bits / elements if elements else float(DENSE_BITS)
    sides = [side for layer in coded_layers(form, geometry) if layer.blocks for side in (layer.key, layer.value)]
    elements = sum(side.elements for side in sides)
    bits = sum((side.code_bits or 0) + 8 * side.gain_bytes for side in sides)
    return bits / elements if elements else float(DENSE_BITS)


@functools.lru_cache(maxsize=32)
def coded_layers(
    form: Format, geometry: Geometry, calibration: Calibration | None = None, tiles: bool = False
) -> tuple[LayerSize, ...]:
    """The layers of a cache that stores blocks in a format.

    Args:
        form: A format of the layouts ``spectral`` and ``blocks``.
        geometry: The model's cache.
        calibration: For ours: the model's calibration, whose allocation then says what codes take. Without it, codes
            take what a joint budget leaves after rounding to whole groups of coefficients.
        tiles: Whether ours stores codes as the CUDA kernels do.

    Returns:
        All layers, those that are not compressed as they are.
    """
    if form.layout == "blocks":
        return tuple(
            replace(layer, key=_stated(form, "key", layer.key), value=_stated(form, "value", layer.value))
            if layer.blocks
            else layer
            for layer in geometry.layers
        )
    stock = [layer for layer in geometry.layers if not layer.blocks]
    if calibration is not None:
        calibration = calibration.with_rate(calibration.metadata.rate.given(bits=form.bits))
        sizes = calibrated_sizes(calibration)
        return (*stock, *(in_tiles(sizes, calibration) if tiles else sizes))
    group = CodecSettings().group_size
    left = int(round(form.bits * geometry.elements, 6) // group) * group
    elements, layers = geometry.elements, []
    for layer in geometry.layers:
        if layer.blocks:
            sides = []
            for side in (layer.key, layer.value):
                share = left * side.elements // elements  # only the sum matters: which side gets what is not known
                left, elements = left - share, elements - side.elements
                sides.append(SideSize(side.heads, side.dim, share, side.heads))
            layers.append(LayerSize(sides[0], sides[1]))
    return (*stock, *(in_tiles(layers) if tiles else layers))


def require_full_attention(form: Format, geometry: Geometry) -> None:
    """Refuse models that transformers' quantized cache does not take.

    Args:
        form: A format of the layout ``quantized``.
        geometry: The model's cache.

    Raises:
        UnsupportedModel: The model has layers that are not plain full attention.
    """
    if geometry.state_bytes or not all(layer.blocks for layer in geometry.layers):
        raise UnsupportedModel(f"{form.name}: transformers' quantized cache supports only full-attention models")


def missing_package(form: Format) -> str | None:
    """Why a cache of this format cannot be made here.

    Args:
        form: The format.

    Returns:
        A clause; None if it can.
    """
    return form.scheme.unsupported() if form.runs else "no packed implementation"


def _stated(form: Format, side: str, size: SideSize) -> SideSize:
    return replace(size, code_bits=size.elements * form.scheme.bits(form.bits, side, size.dim))
