"""The parts of a calibration: constants of each layer, codec settings, bits and provenance.

Shape legend: H is the layer's number of key/value heads (Hkv), D the dimension of a key or a value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from quantcache.coding.rope import FAST_WAVELENGTH, Rope
from quantcache.common.errors import SettingsError

SIDES = ("key", "value")

SideBits = float | Literal["joint", "dense"]
"""Bits of one side: a mean width of its own, ``"joint"`` for a share of the common budget, or ``"dense"``."""


Coding = Literal["scalar", "trellis"]
"""What a code stands for: a level by itself, or a level among those that the tokens before it leave (trellis.py)."""

Profile = Literal["head", "layer"]
"""Whether every head has widths of its own, or those of a layer share them."""


@dataclass(frozen=True)
class SideCalibration:
    """The constants of the keys or the values of one layer.

    Attributes:
        mean: μ in the frame, ``[H, D]`` float32.
        analysis: A, ``[H, D, D]`` float32; block-diagonal over the slow and fast dimensions of a key.
        spectrum: Variance of every coefficient in units of the metric, ``[H, D]`` float64, descending in each part.
        widths: Code width of every coefficient in bits, ``[H, D]`` uint8; None leaves the side dense.
    """

    mean: Tensor
    analysis: Tensor
    spectrum: Tensor
    widths: Tensor | None = None

    @property
    def num_heads(self) -> int:
        """Hkv."""
        return self.mean.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.mean.shape[1]

    def heads(self, rank: int, size: int) -> SideCalibration:
        """The rank-th of ``size`` equal runs of heads."""
        count = self.num_heads // size
        run = slice(rank * count, (rank + 1) * count)
        widths = None if self.widths is None else self.widths[run]
        return SideCalibration(self.mean[run], self.analysis[run], self.spectrum[run], widths)


@dataclass(frozen=True)
class LayerCalibration:
    """One compressed layer: its rotation and the constants of both sides."""

    rope: Rope
    key: SideCalibration
    value: SideCalibration

    def side(self, name: str) -> SideCalibration:
        """The constants of ``"key"`` or ``"value"``."""
        return self.key if name == "key" else self.value


MAX_PASSES = 8
"""How often encoding may be asked to seek the best paths through a trellis."""

MAX_GAINS = 64
"""Gains that encoding may be asked to try."""

MAX_GROUP = 1 << 20
"""Coefficients that may be asked to share a width."""


@dataclass(frozen=True)
class CodecSettings:
    """Choices that fix what the codes mean, recorded in every artifact.

    Attributes:
        group_size: Neighbouring coefficients that share a width.
        profile: ``head`` gives every head its own widths, ``layer`` shares them between the heads of a layer.
        fast_wavelength: Rotary pairs that turn once in fewer tokens than this are un-rotated fully.
        gain_search: Multiples of a token's gain that encoding tries; the one with least weighted error is kept.
        coding: Whether codes are scalar or paths through a trellis, a third less loss at the same bits; scalar in files
            that do not say.
        passes: How often encoding seeks the best paths: each time but the first with the gain that fits the last ones.

    Raises:
        SettingsError: One of them has no meaning.
    """

    group_size: int = 2
    profile: Profile = "head"
    fast_wavelength: float = FAST_WAVELENGTH
    gain_search: tuple[float, ...] = (0.6, 0.75, 0.9, 1.05, 1.25)
    coding: Coding = "trellis"
    passes: int = 1

    def __post_init__(self) -> None:
        for name, kind in (("profile", Profile), ("coding", Coding)):
            if (given := getattr(self, name)) not in get_args(kind):
                raise SettingsError(f"{name} must be one of {', '.join(get_args(kind))}, got {given!r}")
        for name, most in (("group_size", MAX_GROUP), ("passes", MAX_PASSES)):
            if not _is_integer(given := getattr(self, name)) or not 1 <= given <= most:
                raise SettingsError(f"{name} must be an integer from 1 to {most}, got {given!r}")
        if not _is_number(self.fast_wavelength) or not self.fast_wavelength >= 0:
            raise SettingsError(f"fast_wavelength must be a number from 0 up, got {self.fast_wavelength!r}")
        search = self.gain_search
        if not isinstance(search, list | tuple) or not search or not all(_is_number(m) and 0 < m < 16 for m in search):
            raise SettingsError(f"gain_search must be a list of numbers between 0 and 16, got {search!r}")
        if len(search) > MAX_GAINS:
            raise SettingsError(f"gain_search has {len(search)} numbers, at most {MAX_GAINS} are tried")
        object.__setattr__(self, "gain_search", tuple(search))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Rate:
    """The bits an artifact is allocated at.

    Attributes:
        bits: Mean code width over all compressed dimensions, in bits (the 8-bit gain of each token comes on top).
        key_bits: The keys' own mean width, ``"joint"`` or ``"dense"``.
        value_bits: The values' own mean width, ``"joint"`` or ``"dense"``.
        min_bits: Smallest width given to any dimension.
    """

    bits: float = 3.0
    key_bits: SideBits = "joint"
    value_bits: SideBits = "joint"
    min_bits: int = 0

    def given(self, **values: Any) -> Rate:
        """This rate with some values in place of its own; None keeps its own."""
        asked = {name: value for name, value in values.items() if value is not None}
        return replace(self, **asked) if asked else self

    @property
    def shared(self) -> bool:
        """Whether a side shares the common bits."""
        return "joint" in (self.key_bits, self.value_bits)

    @property
    def joint_sides(self) -> bool:
        """Whether both sides share the common bits."""
        return self.key_bits == self.value_bits == "joint"

    def to_dict(self) -> dict[str, Any]:
        """The JSON of artifacts and saved caches, in which a dense side is null."""
        return {name: None if value == "dense" else value for name, value in asdict(self).items()}


def spelled_out(rate: Any) -> Any:
    """The JSON of :meth:`Rate.to_dict`, with the word for a dense side in place of null."""
    if not isinstance(rate, dict):
        return rate
    sides = [f"{side}_bits" for side in SIDES]
    return {name: "dense" if value is None and name in sides else value for name, value in rate.items()}


@dataclass(frozen=True)
class Metadata:
    """Everything about a calibration that is not a tensor.

    Attributes:
        base_model: ``{"id", "revision", "model_type"}`` of the model calibrated, and a ``fingerprint`` of its weights.
        cache_config: The attributes of the model's text config from which transformers derives its cache layers.
        recipe: How the statistics were gathered (metric, tokens, seq_len, seed, text_sha256, ...).
        codec: What the codes mean.
        rate: The present allocation.
        joint: Whether all spectra share one unit, so that one budget can serve all layers and both sides.
        environment: Versions the artifact was made with.
    """

    base_model: dict[str, Any] = field(default_factory=dict)
    cache_config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    codec: CodecSettings = field(default_factory=CodecSettings)
    rate: Rate = field(default_factory=Rate)
    joint: bool = True
    environment: dict[str, Any] = field(default_factory=dict)
