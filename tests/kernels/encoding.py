"""What an encoder may answer: the nearest codes and the best gain, up to rounding that float64 bounds.

A kernel sums in another order than torch. Where a coefficient lies on a decision boundary, or two gain factors explain
a token equally well, rounding decides, and either answer is right. How near is near is not chosen here: it is twice the
error of torch's own float32 arithmetic against float64, on the same block.

A trellis has one answer for a coefficient's whole block: the path of least error. Where another path costs the same in
float64, up to rounding, it is right too. Which gain factor a token has is not in its codes: where two explain it
equally well, the paths of either may be found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache.coding import trellis
from quantcache.coding.codec import GAIN_CENTER, GAIN_STEPS, SpectralCodec, block_positions
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
    if codec.coding == "trellis":
        return _explained_by_paths(codec, rough, exact, codes, gains)
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


def _explained_by_paths(codec: SpectralCodec, rough: Tensor, exact: Tensor, codes: Tensor, gains: Tensor) -> Tensor:
    """:func:`explained` for a trellis, with coefficients in float32 and float64, ``[B, H, D, 64]``."""
    tries = [(_try(codec, exact, factor), _try(codec, rough, factor)) for factor in codec.gain_search]
    saved = torch.stack([own.saved for own, _ in tries])  # [F, B, H, 64]
    lost = torch.stack([2 * _largest(again.saved.double() - own.saved) for own, again in tries])
    best, lost = saved.amax(0), lost + FLOOR * saved.amax(0)
    fits = saved >= best - 2 * lost  # the factors that explain a token as well as the best
    first = saved.argmax(0)
    choices = [first, torch.stack([again.saved for _, again in tries]).argmax(0)]
    for factor, token in fits.any(1).any(1).nonzero().tolist():  # and another factor for one token after the other
        there = fits[factor] & (torch.arange(BLOCK) == token)
        choices.append(torch.where(there, factor, first))
    own, again = _path_levels(codec, codes, exact.dtype), _path_levels(codec, codes, rough.dtype)
    exponent, rounded = _gain(codec, exact, own)[1], _gain(codec, rough, again)[1]
    drift = 2 * _largest(rounded.double() - exponent) + FLOOR * GAIN_CENTER
    near = (gains - exponent.clamp(0, 255)).abs() <= 0.5 + drift
    right = torch.zeros(gains.shape, dtype=torch.bool)
    for choice in choices:
        steps = [_step(codec, y, codec.gain_search).gather(0, choice[None])[0].unsqueeze(-2) for y in (exact, rough)]
        costs, least = _costs(codec, exact, steps[0], own), _least_cost(codec, exact, steps[0])
        error = 2 * _largest((_costs(codec, rough, steps[1], again) - costs).abs().sum(-1)) + FLOOR * least
        right |= (costs.sum(-1) <= least + 2 * error).all(-1, keepdim=True) & near
        if right.all():
            break
    return right


def _step(codec: SpectralCodec, y: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Steps of some gain factors, ``[F, B, H, 64]``."""
    power = torch.where(codec.coded[..., None], y * y, 0.0).sum(-2) / codec.coded.sum(-1).clamp_min(1)[:, None]
    return torch.stack([power.sqrt() * factor for factor in factors])


def _path_levels(codec: SpectralCodec, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels of places in the union codebooks, ``[B, H, D, 64]``."""
    flat, levels = codes.flatten(1, 2), torch.zeros(codes.flatten(1, 2).shape, dtype=dtype)
    for c in codec.classes:
        assert c.union is not None
        levels[:, c.columns] = c.union.to(dtype)[flat[:, c.columns].long()]
    return levels.view(codes.shape)


def _costs(codec: SpectralCodec, y: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    """What every level costs, ``[B, H, D, 64]``."""
    u = torch.where(step > 0, y / step, 0.0)
    return torch.where(codec.coded[..., None], (u - levels).square() * step.square(), 0.0)


def _least_cost(codec: SpectralCodec, y: Tensor, step: Tensor) -> Tensor:
    """What the best path of every coefficient costs, ``[B, H, D]``."""
    u = torch.where(step > 0, y / step, 0.0)
    flat, weights = u.flatten(1, 2), step.square().expand_as(u).flatten(1, 2)
    levels = torch.zeros_like(flat)
    for c in codec.classes:
        assert c.union is not None
        values = flat[:, c.columns]
        path = trellis.search(values.flatten(0, 1), weights[:, c.columns].flatten(0, 1), c.union.to(y.dtype))
        levels[:, c.columns] = path.quantized.view(values.shape)
    return _costs(codec, y, step, levels.view(y.shape)).sum(-1)


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
    step = _step(codec, y, (factor,))[0].unsqueeze(-2)
    u = torch.where(step > 0, y / step, 0.0)
    flat, levels = (u + shift).flatten(1, 2), torch.zeros_like(u.flatten(1, 2))
    for c in codec.classes:
        if codes is None:
            index = torch.bucketize(flat[:, c.columns], c.boundaries.to(y.dtype))
        else:
            index = codes.flatten(1, 2)[:, c.columns].long()
        levels[:, c.columns] = c.levels.to(y.dtype)[index]
    quantized = levels.view(u.shape)
    distance = torch.where(codec.coded[..., None], (u - quantized).abs(), 0.0)
    return Try(u, distance, *_gain(codec, y, quantized))


def _gain(codec: SpectralCodec, y: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Energy explained by levels ``[B, H, D, 64]`` with the best gain, and its exponent, both ``[B, H, 64]``."""
    weighted = levels * codec.weights.to(y.dtype)[..., None]
    cross, energy = (weighted * y).sum(-2), (weighted * levels).sum(-2)
    gain = torch.where(energy > 0, cross / energy, 0.0).clamp_min(0.0)
    return gain * cross, gain.clamp_min(1e-30).log2() * GAIN_STEPS + GAIN_CENTER


def _largest(error: Tensor) -> Tensor:
    """The largest absolute error of each head's block, ``[B, H, 1]``."""
    return error.abs().amax(-1, keepdim=True)


def codes_of(codec: SpectralCodec, words: Tensor) -> Tensor:
    """Codes of one block's words ``[B, W]``, places in the union codebooks of a trellis, as ``[B, H, D, 64]``."""
    flat = torch.zeros(words.shape[0], codec.num_heads * codec.dim, BLOCK, dtype=torch.int32)
    for c in codec.classes:
        read = unpack if c.union is None else trellis.unpack_path
        flat[:, c.columns] = read(words[:, c.words].unflatten(-1, (-1, 2 * c.width)), c.width)
    return flat.unflatten(1, (codec.num_heads, codec.dim))
