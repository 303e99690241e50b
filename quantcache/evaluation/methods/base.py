"""What a method is, and what simulated ones share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from scipy import linalg
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from quantcache.artifact.calibration import Calibration
from quantcache.backends.padding import Grid
from quantcache.coding.blocks import SideCodec, join_blocks, split_blocks
from quantcache.coding.packing import BLOCK
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.methods.statistics import RivalStatistics

if TYPE_CHECKING:
    from quantcache.cache.codecs import CodecFactory

Family = Literal["ours", "rival", "dense", "floor"]
"""``floor`` is the dense cache once more, read in other chunks: what rounding alone moves."""

Layout = Literal["dense", "spectral", "blocks", "quantized"]
"""How a method's cache stores tokens: ``dense`` as DynamicCache, ``spectral`` as SpectralCache, ``blocks`` as any other
BlockCache, whose scheme states the bits, ``quantized`` as transformers' QuantizedCache."""


class MethodUnavailable(QuantCacheError):
    """A method cannot be run here: a package, a feature of transformers or a statistic is missing."""


@dataclass(frozen=True)
class Method:
    """One way of keeping a KV cache.

    Attributes:
        name: As given on the command line.
        family: ``ours``, ``rival``, ``dense`` or ``floor``.
        simulated: Whether the cache holds fake-quantized values instead of codes.
        make_cache: Makes an empty cache; raises :class:`MethodUnavailable` where ``unsupported`` says why.
        description: What it does, in one line.
        source: Where it is from.
        unsupported: Why it cannot be run here, None if it can.
        sink_length: First tokens that it keeps; None where its cache decides for itself.
        residual_length: Recent tokens that it keeps, likewise.
        tile: Tokens that it encodes at once, so that how many recent ones are exact can be told; None where its cache
            decides for itself.
    """

    name: str
    family: Family
    simulated: bool
    make_cache: Callable[[], Cache]
    description: str = ""
    source: str = ""
    unsupported: str | None = None
    sink_length: int | None = None
    residual_length: int | None = None
    tile: int | None = None


@dataclass(frozen=True)
class Setting:
    """Everything that a scheme may build a cache from.

    Attributes:
        config: ``model.config``.
        calibration: The model's calibration, for our own methods.
        statistics: Moments of the model's cache on a calibration text, for calibrated rivals.
        sink_length: First tokens to keep.
        residual_length: Recent tokens to keep.
    """

    config: PreTrainedConfig
    calibration: Calibration | None
    statistics: RivalStatistics | None
    sink_length: int
    residual_length: int


@dataclass(frozen=True)
class Scheme:
    """A family of methods that differ in one number.

    Attributes:
        stem: The name, without the number.
        family: ``ours``, ``rival``, ``dense`` or ``floor``.
        simulated: As in :class:`Method`.
        description: What it does, in one line.
        source: Where it is from.
        make: Turns the number (0 where there is none) and a setting into a maker of caches.
        bits: Bits that an element takes, scales and gains included, by number, side and dimension D.
        parameter: What the number is: bits, a rank, the tokens of a tile, or nothing.
        numbers: The numbers that may be given; None for any in ``limits``.
        limits: Smallest and largest number, for bits that need not be whole.
        defaults: The numbers that ``all`` runs on a model.
        own_lengths: Sinks and residual that its authors recommend, where they do.
        keeps_lengths: Whether it takes sinks and residual at all.
        needs: What it is fitted with.
        layout: How its cache stores tokens, for estimates of memory.
        tile: Tokens that it encodes at once, by number; None where its cache decides for itself.
        unsupported: Says why it cannot be run in this environment, None if it can.
    """

    stem: str
    family: Family
    simulated: bool
    description: str
    source: str
    make: Callable[[float, Setting], Callable[[], Cache]]
    bits: Callable[[float, str, int], float]
    parameter: Literal["", "B", "K", "T"] = ""
    numbers: tuple[int, ...] | None = None
    limits: tuple[float, float] = (0, 8)
    defaults: Callable[[PreTrainedConfig], tuple[float, ...]] = lambda config: ()
    own_lengths: tuple[int, int] | None = None
    keeps_lengths: bool = True
    needs: Literal["", "calibration", "statistics"] = ""
    layout: Layout = "blocks"
    tile: Callable[[float], int | None] = lambda number: BLOCK
    unsupported: Callable[[], str | None] = lambda: None

    @property
    def pattern(self) -> str:
        """The name as documentation writes it, such as ``kivi-B``."""
        return f"{self.stem}-{self.parameter}" if self.parameter else self.stem

    def check(self, number: float) -> None:
        """Refuse numbers that it does not take.

        Args:
            number: Bits, or the tokens of a tile.

        Raises:
            QuantCacheError: The number is none of ``numbers``, or outside ``limits``.
        """
        if self.numbers is None:
            low, high = self.limits
            good, wanted = low <= number <= high, f"lie between {low} and {high}"
        else:
            first, last = self.numbers[0], self.numbers[-1]
            every = self.numbers == tuple(range(first, last + 1))
            good = number in self.numbers
            wanted = f"be a whole number from {first} to {last}" if every else f"be one of {str(self.numbers)[1:-1]}"
        if not good:
            what = "the tile" if self.parameter == "T" else "bits"
            raise QuantCacheError(f"{self.stem}-{number:g}: {what} must {wanted}, got {number:g}")


def two_to_four(config: PreTrainedConfig) -> tuple[float, ...]:
    """The rates at which scalar quantizers are compared."""
    return (2, 3, 4)


class SimulatedCodec(ABC):
    """A codec that quantizes and dequantizes at store time, and keeps the result in the model's dtype.

    Attributes:
        bits: Bits per element that its codes and scales would take.
        constants: What all caches of a model share.
    """

    def __init__(self, bits: float, constants: list[Tensor] | None = None):
        self.bits: float | None = bits
        self.constants = constants or []

    @abstractmethod
    def reconstruct(self, x: Tensor) -> Tensor:
        """Quantize and dequantize whole blocks, ``[B, H, n * 64, D]`` float32."""

    def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> dict[str, Tensor]:
        """Quantize and dequantize n blocks ``[B, H, n * 64, D]``."""
        return {"simulated": split_blocks(self.reconstruct(x.float()).to(x.dtype))}

    def decode(self, fields: dict[str, Tensor], block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        """Return n blocks ``[n, B, H, 64, D]`` as ``[B, H, n * 64, D]``."""
        return join_blocks(fields["simulated"])

    def tensors(self) -> list[Tensor]:
        """The constants."""
        return self.constants


def simulated_cache(
    setting: Setting, make_codec: Callable[[int, str, Tensor, torch.device], SideCodec], tile: int = BLOCK
) -> Callable[[], Cache]:
    """A maker of caches that hold what a codec leaves of keys and values.

    Args:
        setting: Config, sinks and residual.
        make_codec: Gives the codec of (layer index, side, an example ``[B, H, T, D]``, device); each is made once.
        tile: Tokens that are encoded together, a multiple of 64.

    Returns:
        Makes an empty cache; all of them share their codecs.
    """
    codecs: dict[tuple[int, str, torch.device], SideCodec] = {}

    def codecs_of(index: int) -> tuple[CodecFactory, None]:
        def make(device: torch.device, tails: dict[str, Tensor], grid: Grid) -> dict[str, SideCodec]:
            for side, tail in tails.items():
                if (index, side, device) not in codecs:
                    codecs[index, side, device] = make_codec(index, side, tail, device)
            return {side: codecs[index, side, device] for side in tails}

        return make, None

    def make_cache() -> Cache:
        from quantcache.cache.spectral_cache import BlockCache  # methods are listed without what generation needs

        lengths = (setting.sink_length, setting.residual_length)
        return BlockCache(setting.config, codecs_of, *lengths, blocks_at_once=tile // BLOCK)

    return make_cache


def uniform(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Asymmetric uniform quantization of each row by its own range, scale and zero point kept in float16.

    Args:
        x: ``[..., n]``, one group in each row.
        bits: Width of every code.
        clip: Share of the range that the codes span; what lies outside saturates.

    Returns:
        The dequantized rows.
    """
    low, high = x.amin(-1, keepdim=True) * clip, x.amax(-1, keepdim=True) * clip
    steps = (1 << bits) - 1
    scale, low = ((high - low) / steps).half().float(), low.half().float()
    codes = ((x - low) / scale.clamp_min(1e-30)).round().clamp(0, steps)
    return codes * scale + low


def hadamard(dim: int) -> Tensor:
    """An orthonormal Hadamard matrix, block-diagonal where the dimension is not a power of two.

    Args:
        dim: D, rows and columns of the matrix.

    Returns:
        ``[D, D]`` float32; its blocks are as large as the largest power of two that divides D.
    """
    size = dim & -dim
    block = torch.from_numpy(linalg.hadamard(size, dtype=float)) / math.sqrt(size)
    return torch.block_diag(*[block] * (dim // size)).float()
