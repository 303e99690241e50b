"""Sizes of caches: what is counted, and what decides it.

``bits_per_element`` counts codes and gains over the encoded elements. ``bits_per_element_total`` counts everything a
cache holds (codes, gains, sinks, residual, stock layers, bookkeeping, allocation slack) over all cached elements, and
therefore depends on the context length. The calibration's constants are shared by all caches of a model and are listed
apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quantcache.coding.schema import LayerCalibration, SideCalibration

if TYPE_CHECKING:
    from quantcache.artifact.calibration import Calibration

DENSE_BITS = 16
"""Bits per element of the caches that sizes are compared with (bfloat16, float16)."""

PLACE_BYTES = 12
"""Bytes that say where a block lies: first slot, valid length and anchor as int32."""


@dataclass(frozen=True)
class CacheMemory:
    """Bytes held by a cache, by kind.

    Attributes:
        tokens: Cached tokens of each row, T.
        codes: Packed codes.
        gains: Per-token gains.
        sinks: First tokens in the model's dtype.
        residual: Recent tokens in the model's dtype.
        dense: Layers and sides that are not compressed, and the states of recurrent layers.
        bookkeeping: Places of the blocks (12 bytes each, with their buffer's slack), left padding, and of padded rows
            what is known of padding and positions.
        slack: Allocated but unused.
        constants: The calibration's constants on the layers' devices, shared by all caches of the model.
        encoded_elements: Elements that codes and gains stand for.
        elements: All cached elements.
        gains_above: How many gains are at the largest code: such a token is 16 times as far from the mean as the
            calibration knows, or more, and what is beyond is lost. None where nothing was measured.
        gains_below: How many are zero: such a token is nearer to the mean than 1/16 of that, and is stored as the mean.
    """

    tokens: int
    codes: int = 0
    gains: int = 0
    sinks: int = 0
    residual: int = 0
    dense: int = 0
    bookkeeping: int = 0
    slack: int = 0
    constants: int = 0
    encoded_elements: int = 0
    elements: int = 0
    gains_above: int | None = field(default=None, compare=False)  # not sizes: no formula predicts them
    gains_below: int | None = field(default=None, compare=False)

    @property
    def total(self) -> int:
        """Bytes of everything but the shared constants."""
        kinds = (self.codes, self.gains, self.sinks, self.residual, self.dense, self.bookkeeping, self.slack)
        return sum(kinds)

    @property
    def bits_per_element(self) -> float:
        """Bits of codes and gains per encoded element; 0 while nothing is encoded."""
        return 8 * (self.codes + self.gains) / self.encoded_elements if self.encoded_elements else 0.0

    @property
    def bits_per_element_total(self) -> float:
        """Bits of everything but the shared constants per cached element."""
        return 8 * self.total / self.elements if self.elements else 0.0

    @property
    def bfloat16_bytes(self) -> int:
        """Bytes of the same elements in bfloat16."""
        return self.elements * DENSE_BITS // 8

    def to_dict(self) -> dict[str, Any]:
        """All fields that are known and derived figures, ready for JSON."""
        derived = {
            name: getattr(self, name)
            for name in ("total", "bits_per_element", "bits_per_element_total", "bfloat16_bytes")
        }
        return {**self._known(), **derived}

    def _known(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        lines = [f"{name:<22}{value:>14,}" for name, value in self._known().items()]
        lines.append(f"{'total':<22}{self.total:>14,}")
        lines.append(f"{'bfloat16_bytes':<22}{self.bfloat16_bytes:>14,}")
        lines.append(f"{'bits_per_element':<22}{self.bits_per_element:>14.3f}")
        lines.append(f"{'bits_per_element_total':<22}{self.bits_per_element_total:>14.3f}")
        return "\n".join(lines)


def bits_per_encoded_element(layers: Mapping[int, LayerCalibration]) -> float:
    """Bits of codes and gains per element of the coded sides.

    Args:
        layers: A calibration's layers, with widths.

    Returns:
        The mean over layers and coded sides, weighted by their elements; 0 if every side is dense.
    """
    bits, elements = 0, 0
    for layer in layers.values():
        for side in (layer.key, layer.value):
            if side.widths is not None:
                bits += int(side.widths.sum()) + 8 * side.num_heads
                elements += side.widths.numel()
    return bits / elements if elements else 0.0


@dataclass(frozen=True)
class SideSize:
    """What decides the bytes of the keys or the values of one layer.

    Attributes:
        heads: Hkv.
        dim: D.
        code_bits: Bits of codes for each token, all heads together; None leaves the side dense.
        gain_bytes: Bytes of gains for each token, all heads together.
    """

    heads: int
    dim: int
    code_bits: float | None = None
    gain_bytes: int = 0

    @property
    def elements(self) -> int:
        """Elements of one token."""
        return self.heads * self.dim


@dataclass(frozen=True)
class LayerSize:
    """What decides the bytes of one layer.

    Attributes:
        key: The keys.
        value: The values.
        blocks: Whether the layer stores blocks; transformers' own layers keep all their tokens as they are.
        window: Sliding window of a layer of transformers' own: it keeps one token less.
    """

    key: SideSize
    value: SideSize
    blocks: bool = True
    window: int | None = None

    @property
    def elements(self) -> int:
        """Elements of one token."""
        return self.key.elements + self.value.elements

    def kept(self, tokens: int) -> int:
        """Tokens that a layer of transformers' own keeps of T."""
        return tokens if self.window is None else min(tokens, self.window - 1)


def calibrated_sizes(calibration: Calibration) -> list[LayerSize]:
    """The sizes of the layers that a calibration compresses.

    Args:
        calibration: The calibration, at its rate.

    Returns:
        One entry for each layer.
    """
    return [LayerSize(_side_size(layer.key), _side_size(layer.value)) for layer in calibration.layers.values()]


def _side_size(side: SideCalibration) -> SideSize:
    if side.widths is None:
        return SideSize(side.num_heads, side.dim)
    return SideSize(side.num_heads, side.dim, int(side.widths.sum()), side.num_heads)
