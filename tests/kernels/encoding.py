"""What an encoder may answer: the nearest codes and the best gain, up to rounding that float64 bounds.

A kernel sums in another order than torch. Where a coefficient lies on a decision boundary, or two gain factors explain
a token equally well, rounding decides, and either answer is right. How near is near is not chosen here: it is twice the
error of torch's own float32 arithmetic against float64, on the same block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache.coding.blocks import block_positions
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.gains import GAIN_CENTER, GAIN_STEPS
from quantcache.coding.packing import BLOCK, unpack

FLOOR = 1e-6
"""Relative error allowed on top, as everywhere in the suite."""


def compare(
    codec: SpectralCodec,
    x: Tensor,
    places: Tensor,
    starts: Tensor | None,
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> tuple[int, int]:
    """Check every token of an encoding that is not plain torch's, which :func:`wrong` has checked.

    Args:
        codec: The codec.
        x: What was encoded, ``[B, H, n * 64, D]``.
        places: The blocks' places, ``[n, 3]``.
        starts: Left padding of every row, or None.
        found: ``codes`` and ``gains`` of a kernel.
        expected: Those of plain torch.

    Returns:
        How many (token, head) pairs are wrong, and how many of the right ones are not torch's.
    """
    mistakes = ties = 0
    for index, (block, place) in enumerate(zip(x.split(BLOCK, dim=2), places.split(1), strict=True)):
        codes, gains = codes_of(codec, found["codes"][index]), found["gains"][index]
        same = (codes == codes_of(codec, expected["codes"][index])).all(-2) & (gains == expected["gains"][index])
        if not same.all():
            right = same | explained(codec, block.contiguous(), place, starts, codes, gains)
            mistakes += int((~right).sum())
            ties += int((right & ~same).sum())
    return mistakes, ties


def wrong(codec: SpectralCodec, x: Tensor, places: Tensor, starts: Tensor | None, fields: dict[str, Tensor]) -> int:
    """How many (token, head) pairs of an encoding are wrong.

    Args:
        codec: The codec.
        x: What was encoded, ``[B, H, n * 64, D]``.
        places: The blocks' places, ``[n, 3]``.
        starts: Left padding of every row, or None.
        fields: ``codes`` and ``gains``.

    Returns:
        Their number.
    """
    count = 0
    for index, (block, place) in enumerate(zip(x.split(BLOCK, dim=2), places.split(1), strict=True)):
        codes = codes_of(codec, fields["codes"][index])
        right = explained(codec, block.contiguous(), place, starts, codes, fields["gains"][index])
        count += int((~right).sum())
    return count


def explained(
    codec: SpectralCodec, block: Tensor, place: Tensor, starts: Tensor | None, codes: Tensor, gains: Tensor
) -> Tensor:
    """Where codes ``[B, H, D, 64]`` and gains ``[B, H, 64]`` are what some best gain factor gives, ``[B, H, 64]``."""
    rough, exact = codec.coefficients(block, place, starts), coefficients(codec, block, place, starts)
    candidates, least = [], []
    for factor in codec.gain_search:
        nearest, single = _try(codec, exact, factor), _try(codec, rough, factor)
        # A coefficient that is off by e has a level that is at most 2 e further away than the nearest.
        off = 2 * (single.u.double() - nearest.u).abs().amax((-2, -1), keepdim=True) + FLOOR
        own, again = _try(codec, exact, factor, codes), _try(codec, rough, factor, codes)
        candidates.append((own, again, (own.distance <= nearest.distance + 2 * off).all(-2)))
        # What the factor saves at least, whichever way the coefficients on a boundary fall.
        sides = [_try(codec, exact, factor, shift=shift).saved for shift in (-off, 0 * off, off)]
        least.append(torch.stack(sides).amin(0))
    best = torch.stack(least).amax(0)
    right = torch.zeros(gains.shape, dtype=torch.bool)
    for own, again, fits in candidates:
        lost = 2 * _largest(again.saved.double() - own.saved) + FLOOR * best
        drift = 2 * _largest(again.exponent.double() - own.exponent) + FLOOR * GAIN_CENTER
        near = (gains - own.exponent.clamp(0, 255)).abs() <= 0.5 + drift
        right |= fits & (own.saved >= best - 2 * lost) & near
    return right


def coefficients(codec: SpectralCodec, block: Tensor, place: Tensor, starts: Tensor | None) -> Tensor:
    """Coefficients of one block in float64, ``[B, H, D, 64]``."""
    x = block.double()
    if not codec.frame.is_identity:
        positions, anchors = block_positions(place, starts)
        frequencies = codec.frame.frequencies
        slow, fast = (p.double()[:, None, :, None] for p in (anchors, positions))
        count = codec.frame.slow_pairs
        angles = torch.cat((slow * frequencies[:count], fast * frequencies[count:]), dim=-1)
        x = codec.frame.rotate(x[..., codec.frame.order], angles.cos(), -angles.sin())
    return codec.encoder.double() @ (x - codec.mean.double()[:, None]).transpose(-1, -2)


@dataclass
class Try:
    """One gain factor tried on a block.

    Attributes:
        u: Coefficients in steps, ``[B, H, D, 64]``.
        distance: From the level of each code, likewise.
        saved: Energy explained, ``[B, H, 64]``.
        exponent: Of the best gain, in its code's steps, ``[B, H, 64]``.
    """

    u: Tensor
    distance: Tensor
    saved: Tensor
    exponent: Tensor


def _try(
    codec: SpectralCodec, y: Tensor, factor: float, codes: Tensor | None = None, shift: Tensor | float = 0.0
) -> Try:
    """A gain factor on coefficients ``[B, H, D, 64]``, with given codes or those nearest to it, shifted."""
    power = torch.where(codec.coded[..., None], y * y, 0.0).sum(-2) / codec.coded.sum(-1).clamp_min(1)[:, None]
    step = (power.sqrt() * factor).unsqueeze(-2)
    u = torch.where(step > 0, y / step, 0.0)
    flat, levels = (u + shift).flatten(1, 2), torch.zeros_like(u.flatten(1, 2))
    for c in codec.classes:
        if codes is None:
            index = torch.bucketize(flat[:, c.columns], c.boundaries.to(y.dtype))
        else:
            index = codes.flatten(1, 2)[:, c.columns].long()
        levels[:, c.columns] = c.levels.to(y.dtype)[index]
    quantized = levels.view(u.shape)
    weighted = quantized * codec.weights.to(y.dtype)[..., None]
    cross, energy = (weighted * y).sum(-2), (weighted * quantized).sum(-2)
    gain = torch.where(energy > 0, cross / energy, 0.0).clamp_min(0.0)
    exponent = gain.clamp_min(1e-30).log2() * GAIN_STEPS + GAIN_CENTER
    distance = torch.where(codec.coded[..., None], (u - quantized).abs(), 0.0)
    return Try(u, distance, gain * cross, exponent)


def _largest(error: Tensor) -> Tensor:
    """The largest absolute error of each head's block, ``[B, H, 1]``."""
    return error.abs().amax(-1, keepdim=True)


def codes_of(codec: SpectralCodec, words: Tensor) -> Tensor:
    """Codes of one block's words ``[B, W]``, as ``[B, H, D, 64]``."""
    flat = torch.zeros(words.shape[0], codec.num_heads * codec.dim, BLOCK, dtype=torch.int32)
    for c in codec.classes:
        flat[:, c.columns] = unpack(words[:, c.words].unflatten(-1, (-1, 2 * c.width)), c.width)
    return flat.unflatten(1, (codec.num_heads, codec.dim))
