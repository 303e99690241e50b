"""What is varied in the ablations: every row of every one, and the budgets that rows give to layers and sides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ablation_statistics import ANCHORS, FRAMES, WAVELENGTHS, Choice
from fidelity import SINKS

from quantcache import Calibration
from quantcache.calibration.data import LENGTH
from quantcache.coding.allocation import allocate_layers
from quantcache.coding.packing import MAX_WIDTH
from quantcache.coding.rope import ANCHOR_LENGTH
from quantcache.coding.schema import SIDES, CodecSettings, Coding, LayerCalibration, Rate
from quantcache.coding.statistics import READ_SHARE
from quantcache.coding.trellis import code_distortions
from quantcache.common.defaults import RESIDUAL_LENGTH

CHECKPOINTS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
"""Numbers of calibration tokens."""

CALIBRATION_TOKENS = 32_768
"""Those of every ablation but the one of them, where nothing else is said."""


@dataclass(frozen=True)
class Gathering:
    """How the text is read that statistics are of; None for the default.

    Attributes:
        bos: Whether sequences begin with BOS; as the tokenizer begins texts if None.
        seq_len: Tokens of a sequence.
        residual_length: Recent tokens that are no codes yet.
    """

    bos: bool | None = None
    seq_len: int | None = None
    residual_length: int | None = None


@dataclass(frozen=True)
class Variant:
    """One row of an ablation: everything that differs from the default is given.

    Attributes:
        choice: How transforms are made.
        codec: What the codes mean.
        joint: One budget for everything; otherwise one for each side of each layer.
        offsets: Bits that keys and values have more than the rate, each with a budget of its own; None shares one.
        min_bits: Smallest width.
        key_min_bits: Smallest width of the keys, with the joint budget; that of all if None.
        floor: No layer gets fewer bits than this on the mean, in bits below the rate; None lets them.
        sinks: First tokens kept.
        tokens: Calibration tokens; the default number if None.
        gain: None for ours; otherwise (kind, bits) of a simulated gain, or (kind, bits, steps per octave).
        books: Whether codebooks are fitted to the calibration text; of scalar codes only.
        gathering: How the calibration text is read.
        reading_bos: Whether the windows that are read begin with BOS; as the tokenizer begins texts if None.
    """

    choice: Choice = field(default_factory=Choice)
    codec: CodecSettings = field(default_factory=CodecSettings)
    joint: bool = True
    offsets: tuple[float, float] | None = None
    min_bits: int = 0
    key_min_bits: int | None = None
    floor: float | None = None
    sinks: int = SINKS
    tokens: int | None = None
    gain: tuple[str, int] | tuple[str, int, int] | None = None
    books: bool = False
    gathering: Gathering = Gathering()
    reading_bos: bool | None = None

    @property
    def reads(self) -> tuple[int, bool | None]:
        """What decides which tokens are read, and in what pieces: variants that agree share the dense cache's."""
        return self.sinks, self.reading_bos


def ablations(tokens: int = CALIBRATION_TOKENS, begins: bool = False) -> dict[str, dict[str, Variant]]:
    """Every ablation.

    Args:
        tokens: Calibration tokens of all others than the one of them.
        begins: Whether the model's tokenizer begins texts with BOS.

    Returns:
        Rows by name, the default among them wherever it can be.
    """
    default = Variant()
    apart = replace(default, joint=False)

    def codec(**more: Any) -> Variant:
        return Variant(codec=replace(default.codec, **more))

    def frame(name: str) -> Variant:
        return Variant(choice=Choice(frame=name), codec=replace(default.codec, fast_wavelength=FRAMES[name][0]))

    searches = {len(factors): factors for factors in ((0.7, 0.9, 1.1), tuple(0.5 + 0.1 * step for step in range(9)))}
    searches[len(default.codec.gain_search)] = default.codec.gain_search
    return {
        "metric": {
            "fisher, joint budget": default,
            "fisher": apart,
            "query, output projection": replace(apart, choice=Choice(key_metric="query", value_metric="output")),
            "identity": replace(apart, choice=Choice(key_metric="identity", value_metric="identity")),
        },
        "readers": {
            f"those of its codes, and {READ_SHARE:.0%} of all": default,
            **{
                f"those of its codes, and {share:.1%} of all": replace(default, choice=Choice(read_share=share))
                for share in (0.005, 0.1)
            },
            "those of its codes": replace(default, choice=Choice(read_share=0.0)),
            "all": replace(default, choice=Choice(key_metric="read", value_metric="read")),
        },
        "calibration-residual": {
            str(length): replace(
                default, gathering=Gathering(residual_length=None if length == RESIDUAL_LENGTH else length)
            )
            for length in (0, RESIDUAL_LENGTH, 256)
        },
        "seq-len": {
            f"{length:,}": replace(default, gathering=Gathering(seq_len=None if length == LENGTH else length))
            for length in (256, 512, 1024, LENGTH)
        },
        "value-metric": {
            "fisher": apart,
            "output projection": replace(apart, choice=Choice(value_metric="output")),
            "eigenbasis of VᵀαᵀαV": replace(apart, choice=Choice(value_metric="gram")),
            "identity": replace(apart, choice=Choice(value_metric="identity")),
        },
        "key-shrinkage": {
            f"{s:g}": replace(default, choice=Choice(key_shrinkage=s)) for s in (0.0, 0.005, 0.02, 0.1, 0.3, 1.0)
        },
        "value-shrinkage": {
            f"{s:g}": replace(default, choice=Choice(value_shrinkage=s))
            for s in (0.0, 0.005, 0.02, 0.1, 0.3, 1.0, 10.0)
        },
        "frame": {
            {"post": "as cached", "full": "fully un-rotated"}.get(name, f"split at wavelength {name}"): frame(name)
            for name in WAVELENGTHS
        },
        "anchor-length": {
            str(length): frame(ANCHORS[length]) if length in ANCHORS else default
            for length in sorted((*ANCHORS, ANCHOR_LENGTH))
        },
        "group-size": {str(size): codec(group_size=size) for size in (1, 2, 4, 8, 16, 32)},
        "profile": {
            f"per {profile}, groups of {size}": codec(profile=profile, group_size=size)
            for profile in ("head", "layer")
            for size in (2, 4, 8)
        },
        "gain": {
            "none": replace(default, gain=("none", 0)),
            "plain": replace(default, gain=("plain", 8)),
            "corrected": codec(gain_search=(1.0,)),
            **{f"searched, {n} factors": codec(gain_search=searches[n]) for n in sorted(searches)},
        },
        "gain-bits": {f"{bits}": replace(default, gain=("searched", bits)) for bits in (4, 6, 8, 16)},
        "gain-steps": {f"{steps}": replace(default, gain=("searched", 8, steps)) for steps in (4, 8, 16, 32, 64)},
        "coding": {"trellis": default, "scalar": codec(coding="scalar")},
        "passes": {str(count): codec(passes=count) for count in (1, 2, 3)},
        "codebooks": {
            "Gaussian, scalar codes": codec(coding="scalar"),
            "fitted, scalar codes": replace(codec(coding="scalar"), books=True),
        },
        "min-width": {
            "0": default,
            "1 for keys": replace(default, key_min_bits=1),
            "1": replace(default, min_bits=1),
        },
        "layer-floor": {
            "none": default,
            "half a bit below": replace(default, floor=0.5),
            "a quarter below": replace(default, floor=0.25),
        },
        "split": {
            "joint": default,
            "equal": replace(default, offsets=(0.0, 0.0)),
            "keys +½, values −½": replace(default, offsets=(0.5, -0.5)),
            "keys −½, values +½": replace(default, offsets=(-0.5, 0.5)),
        },
        "sinks": {f"{count}": replace(default, sinks=count) for count in (0, 1, 2, 4, 8, 16)},
        "calibration-tokens": {
            f"{count:,}": replace(default, tokens=None if count == tokens else count) for count in CHECKPOINTS
        },
        "bos": {
            "with" if begins else "without": default,
            f"read {'without' if begins else 'with'} alone": replace(default, reading_bos=not begins),
            "without" if begins else "with": replace(
                default, reading_bos=not begins, gathering=Gathering(bos=not begins)
            ),
        },
    }


def allocate(variant: Variant, calibration: Calibration, rate: float) -> Calibration:
    """Give a calibration its widths.

    Args:
        variant: Budgets, smallest width and floor.
        calibration: Without widths.
        rate: Mean width.

    Returns:
        With widths.
    """
    key_bits, value_bits = ("joint", "joint") if variant.offsets is None else (rate + o for o in variant.offsets)
    if variant.key_min_bits is not None:
        return with_key_minimum(calibration, rate, variant.key_min_bits)
    allocated = calibration.with_bits(rate, key_bits=key_bits, value_bits=value_bits, min_bits=variant.min_bits)
    if variant.floor is None:
        return allocated
    # Layers below the floor get a budget of their own at the floor; the others share what is left, until none is below.
    floor, raised = rate - variant.floor, set[int]()
    while True:
        below = {i for i, layer in allocated.layers.items() if i not in raised and mean_width(layer) < floor - 1e-9}
        if not below:
            return allocated
        raised |= below
        free = {i: layer for i, layer in calibration.layers.items() if i not in raised}
        # All layers of this model hold equally many elements.
        left = (rate * len(calibration.layers) - floor * len(raised)) / max(len(free), 1)
        layers = allocate_layers(free, Rate(left), variant.codec, True)
        for index in raised:
            layers |= allocate_layers({index: calibration.layers[index]}, Rate(floor), variant.codec, True)
        allocated = Calibration(layers, replace(calibration.metadata, rate=Rate(rate)))


def with_key_minimum(calibration: Calibration, rate: float, key_min_bits: int) -> Calibration:
    """The least distortion with a smallest width of the keys' own, found by trying how to share the budget.

    Args:
        calibration: Without widths; as many key as value elements.
        rate: Mean width over keys and values together.
        key_min_bits: Smallest width of the keys; that of the values is 0.

    Returns:
        With widths.
    """
    least, most = float(key_min_bits), min(2 * rate, MAX_WIDTH)
    for step in (1 / 4, 1 / 32):  # the cost is convex in the share: a fine search around the best of a coarse one
        count = round((most - least) / step)
        found = [_shared_out(calibration, rate, least + step * i, key_min_bits) for i in range(count + 1)]
        _, share, layers = min(found, key=lambda entry: entry[0])
        least, most = max(least, share - step), min(most, share + step)
    return Calibration(layers, replace(calibration.metadata, rate=Rate(rate)))


def _shared_out(
    calibration: Calibration, rate: float, key_rate: float, key_min_bits: int
) -> tuple[float, float, dict[int, LayerCalibration]]:
    """Cost, mean width of the keys, and layers with widths; values get what the keys leave."""
    value_rate = min(2 * rate - key_rate, MAX_WIDTH)
    keys = calibration.with_rate(Rate(key_rate, key_rate, "dense", key_min_bits))
    values = calibration.with_rate(Rate(value_rate, "dense", value_rate))
    layers = {index: replace(layer, value=values.layers[index].value) for index, layer in keys.layers.items()}
    return distortion(layers, calibration.metadata.codec.coding), key_rate, layers


def distortion(layers: dict[int, LayerCalibration], coding: Coding) -> float:
    """What the widths cost, in the metric: the sum over coefficients of variance times the width's distortion."""
    by_width = torch.tensor(code_distortions(coding)).double()
    sides = [layer.side(side) for layer in layers.values() for side in SIDES]
    return sum(float((side.spectrum.double() * by_width[side.widths.long()]).sum()) for side in sides)


def mean_width(layer: LayerCalibration) -> float:
    """Mean width of a layer's coefficients, keys and values together."""
    widths = [side.widths.double().mean() for side in (layer.key, layer.value)]
    return float(sum(widths)) / len(widths)
