"""Bit allocation: how many bits each dimension of each head and layer gets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcache.coding.packing import MAX_WIDTH
from quantcache.coding.rope import fast_dimensions
from quantcache.coding.schema import SIDES, CodecSettings, Coding, LayerCalibration, Profile, Rate
from quantcache.coding.trellis import code_distortions


@dataclass(frozen=True)
class Group:
    """Dimensions that share one width.

    Attributes:
        weight: Sum of their spectrum: what quantizing all of them with distortion 1 costs.
        size: How many scalar dimensions they are.
    """

    weight: float
    size: int


def check_rate(bits: float, min_bits: int = 0, max_bits: int = MAX_WIDTH, name: str = "bits") -> None:
    """Refuse rates that no allocation can have.

    Args:
        bits: Mean code width in bits.
        min_bits: Smallest width that may be given.
        max_bits: Largest width that may be given.
        name: What the error calls the bits.

    Raises:
        ValueError: ``min_bits`` is negative, or ``bits`` no number or outside ``[min_bits, max_bits]``.
    """
    if not isinstance(min_bits, Integral) or isinstance(min_bits, bool) or min_bits < 0:
        raise ValueError(f"min_bits must be a whole number from 0 up, got {min_bits!r}")
    if not isinstance(bits, Real) or isinstance(bits, bool):
        raise ValueError(f"{name} must be a number from {min_bits} to {max_bits}, got {bits!r}")
    if not min_bits <= bits <= max_bits:  # also refuses NaN
        least = f"min_bits ({min_bits})" if min_bits else "0"
        raise ValueError(f"{name} must lie between {least} and {max_bits}, got {bits}")


def check_rates(rate: Rate) -> None:
    """Refuse bits that no allocation can have, for everything or for one side.

    Args:
        rate: Common bits, those of keys and of values, and the smallest width.

    Raises:
        ValueError: A number is outside ``[min_bits, 8]``, or something else than a number, "dense" or "joint".
    """
    check_rate(rate.bits, rate.min_bits)
    for name, own in (("key_bits", rate.key_bits), ("value_bits", rate.value_bits)):
        if own in ("dense", "joint"):
            continue
        if own is None or isinstance(own, str):
            raise ValueError(f"{name} must be a number, 'dense' or 'joint', got {own!r}")
        check_rate(own, rate.min_bits, name=name)


def allocate(
    groups: Sequence[Group], bits: float, min_bits: int = 0, max_bits: int = MAX_WIDTH, coding: Coding = "scalar"
) -> list[int]:
    """Reverse water-filling over integer widths.

    Minimises Σ weight * D(width), with D the distortion of a unit Gaussian under the coding, at a mean width of at most
    ``bits``. D falls convexly with the width, so taking single-bit steps in order of gain per bit is optimal (up to the
    last group, when group sizes differ). Source: reverse water-filling (Cover and Thomas, "Elements of Information
    Theory", section 10.3), in the integer form of A. Segall, "Bit allocation and encoding for vector sources" (1976).

    Args:
        groups: Everything that shares the budget.
        bits: Mean width wanted, in bits per dimension.
        min_bits: Smallest width that may be given.
        max_bits: Largest width that may be given.
        coding: Whose distortions count.

    Returns:
        One width for each group; their mean weighted by size is at most ``bits``.

    Raises:
        ValueError: ``bits`` is outside ``[min_bits, max_bits]``.
    """
    check_rate(bits, min_bits, max_bits)
    distortion = code_distortions(coding)
    weights = np.array([g.weight for g in groups], dtype=np.float64)
    sizes = np.array([g.size for g in groups], dtype=np.int64)
    # Gain per bit of every single step, [group, step]; rounding must not let a later step overtake an earlier one.
    steps = np.array([distortion[w] - distortion[w + 1] for w in range(min_bits, max_bits)])
    gains = (weights / sizes)[:, None] * steps[None, :]
    order = np.argsort(-gains, axis=None, kind="stable")
    widths = np.full(len(groups), min_bits, dtype=np.int64)
    budget = round(float(bits) * int(sizes.sum()), 6) - min_bits * int(sizes.sum())
    blocked = np.zeros(len(groups), dtype=bool)
    chosen = order // len(steps)
    spent = np.cumsum(sizes[chosen])
    whole = int(np.searchsorted(spent, budget, side="right"))  # all steps up to the first that the budget does not hold
    widths += np.bincount(chosen[:whole], minlength=len(groups))
    budget -= int(spent[whole - 1]) if whole else 0
    least = min((g.size for g in groups), default=0)
    for group in chosen[whole:]:
        if budget < least:
            break
        if blocked[group]:
            continue
        if sizes[group] > budget:
            blocked[group] = True  # its later steps must not be taken without this one
            continue
        widths[group] += 1
        budget -= int(sizes[group])
    return [int(w) for w in widths]


def budgets(layers: dict[int, LayerCalibration], rate: Rate, joint: bool) -> list[tuple[float, list[tuple[int, str]]]]:
    """What shares a budget.

    One budget serves everything that shares a unit: all layers and both sides under the Fisher metric, one side of one
    layer otherwise. A side with a budget of its own leaves the common one; a dense side has none.

    Args:
        layers: Constants by layer index.
        rate: Common bits, and those of keys and values.
        joint: Whether all spectra share one unit.

    Returns:
        Mean width in bits, and the (layer, side) pairs that share it.
    """
    found: dict[tuple[Any, ...], tuple[float, list[tuple[int, str]]]] = {}
    for index in layers:
        for side, own in zip(SIDES, (rate.key_bits, rate.value_bits), strict=True):
            if own != "dense":
                pool = "all" if own == "joint" else side
                bits = rate.bits if own == "joint" else float(own)
                place = (pool,) if joint else (index, side)
                found.setdefault(place, (bits, []))[1].append((index, side))
    return list(found.values())


def allocate_layers(
    layers: dict[int, LayerCalibration], rate: Rate, codec: CodecSettings, joint: bool
) -> dict[int, LayerCalibration]:
    """Give every layer and side its widths; see :func:`budgets` for what shares one."""
    widths: dict[tuple[int, str], Tensor] = {}
    for bits, members in budgets(layers, rate, joint):
        groups: list[Group] = []
        places: list[tuple[tuple[int, str], list[int], int, int]] = []  # side, sizes of groups, the first and the end
        for member in members:
            side = layers[member[0]].side(member[1])
            dims = width_groups(layers[member[0]], member[1], codec)
            sizes = [each.stop - each.start for each in dims]
            sums, first = _sums(side.spectrum, dims, codec.profile), len(groups)
            heads = side.num_heads // len(sums)  # that share a width
            groups += [Group(weight, heads * size) for row in sums for weight, size in zip(row, sizes, strict=True)]
            places.append((member, sizes, first, len(groups)))
        found = np.array(allocate(groups, bits, rate.min_bits, coding=codec.coding), dtype=np.uint8)
        for member, sizes, first, end in places:
            own = torch.from_numpy(found[first:end].reshape(-1, len(sizes)).repeat(sizes, axis=1))
            widths[member] = own.expand(layers[member[0]].side(member[1]).spectrum.shape).contiguous()
    return {
        index: replace(
            layer,
            key=replace(layer.key, widths=widths.get((index, "key"))),
            value=replace(layer.value, widths=widths.get((index, "value"))),
        )
        for index, layer in layers.items()
    }


def _sums(spectrum: Tensor, dims: list[slice], profile: Profile) -> list[list[float]]:
    """What quantizing every group costs with distortion 1: groups of each head, or those that all heads share."""
    if profile == "layer":
        return [[float(spectrum[:, each].sum()) for each in dims]]
    found = []
    for size, same in itertools.groupby(dims, key=lambda each: each.stop - each.start):
        run = list(same)
        found.append(spectrum[:, run[0].start : run[-1].stop].unflatten(1, (-1, size)).sum(-1))
    return torch.cat(found, dim=1).tolist()


def width_groups(layer: LayerCalibration, side: str, codec: CodecSettings) -> list[slice]:
    """The width groups of one side; no group straddles the slow and the fast part of a key."""
    dim = layer.side(side).dim
    parts = [dim]
    if side == "key":
        fast = fast_dimensions(layer.rope, codec.fast_wavelength)
        parts = [dim - fast, fast]
    groups, offset = [], 0
    for size in parts:
        groups += [
            slice(i, min(i + codec.group_size, offset + size)) for i in range(offset, offset + size, codec.group_size)
        ]
        offset += size
    return groups
