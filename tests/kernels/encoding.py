"""What an encoder may answer: the nearest codes and the best gain, up to rounding that float64 bounds.

A kernel sums in another order than torch. Where a coefficient lies on a decision boundary, two gain factors explain a
token equally well, or two paths through a trellis a block, rounding decides, and either answer is right. How near is
near is not chosen here: it is twice the error of torch's own float32 arithmetic against float64, on the same block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache.coding.blocks import block_positions
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.gains import GAIN_CENTER, GAIN_STEPS
from quantcache.coding.packing import BLOCK, unpack
from quantcache.coding.trellis import STATES, branch_subsets, unpack_path

FLOOR = 1e-6
"""Relative error allowed on top, as everywhere in the suite."""


def compare(
    codec: SpectralCodec,
    x: Tensor,
    block_table: Tensor,
    left_padding: Tensor | None,
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> tuple[int, int]:
    """Check every token of an encoding that is not plain torch's, which :func:`wrong` has checked.

    Args:
        codec: The codec.
        x: What was encoded, ``[B, H, n * 64, D]``.
        block_table: The blocks' places, ``[n, 3]``.
        left_padding: Left padding of every row, or None.
        found: ``codes`` and ``gains`` of a kernel.
        expected: Those of plain torch.

    Returns:
        How many (token, head) pairs are wrong, and how many of the right ones are not torch's.
    """
    mistakes = ties = 0
    for index, (block, place) in enumerate(zip(x.split(BLOCK, dim=2), block_table.split(1), strict=True)):
        codes, gains = codes_of(codec, found["codes"][index]), found["gains"][index]
        same = (codes == codes_of(codec, expected["codes"][index])).all(-2) & (gains == expected["gains"][index])
        if not same.all():
            right = same | explained(codec, block.contiguous(), place, left_padding, codes, gains)
            mistakes += int((~right).sum())
            ties += int((right & ~same).sum())
    return mistakes, ties


def wrong(
    codec: SpectralCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None, fields: dict[str, Tensor]
) -> int:
    """How many (token, head) pairs of an encoding are wrong.

    Args:
        codec: The codec.
        x: What was encoded, ``[B, H, n * 64, D]``.
        block_table: The blocks' places, ``[n, 3]``.
        left_padding: Left padding of every row, or None.
        fields: ``codes`` and ``gains``.

    Returns:
        Their number.
    """
    count = 0
    for index, (block, place) in enumerate(zip(x.split(BLOCK, dim=2), block_table.split(1), strict=True)):
        codes = codes_of(codec, fields["codes"][index])
        right = explained(codec, block.contiguous(), place, left_padding, codes, fields["gains"][index])
        count += int((~right).sum())
    return count


def explained(
    codec: SpectralCodec, block: Tensor, place: Tensor, left_padding: Tensor | None, codes: Tensor, gains: Tensor
) -> Tensor:
    """Where codes ``[B, H, D, 64]`` and gains ``[B, H, 64]`` are what some best gain factor gives, ``[B, H, 64]``."""
    if codec.coding == "trellis":
        return _explained_paths(codec, block, place, left_padding, codes, gains)
    rough, exact = codec.coefficients(block, place, left_padding), coefficients(codec, block, place, left_padding)
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


def coefficients(codec: SpectralCodec, block: Tensor, place: Tensor, left_padding: Tensor | None) -> Tensor:
    """Coefficients of one block in float64, ``[B, H, D, 64]``."""
    x = block.double()
    if not codec.frame.is_identity:
        positions, anchors = block_positions(place, left_padding)
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
    step = _rms(codec, y) * factor
    u = torch.where(step > 0, y / step, 0.0)
    flat, levels = (u + shift).flatten(1, 2), torch.zeros_like(u.flatten(1, 2))
    for c in codec.classes:
        if codes is None:
            index = torch.bucketize(flat[:, c.columns], c.boundaries.to(y.dtype))
        else:
            index = codes.flatten(1, 2)[:, c.columns].long()
        levels[:, c.columns] = c.levels.to(y.dtype)[index]
    quantized = levels.view(u.shape)
    saved, exponent = _gain(codec, y, quantized)
    distance = torch.where(codec.coded[..., None], (u - quantized).abs(), 0.0)
    return Try(u, distance, saved, exponent)


def _rms(codec: SpectralCodec, y: Tensor) -> Tensor:
    """Root mean square of every token's coded coefficients, ``[B, H, 1, 64]``."""
    power = torch.where(codec.coded[..., None], y * y, 0.0).sum(-2) / codec.coded.sum(-1).clamp_min(1)[:, None]
    return power.sqrt().unsqueeze(-2)


def _gain(codec: SpectralCodec, y: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """The energy that levels explain, and their best gain in its code's steps, ``[B, H, 64]``."""
    weighted = quantized * codec.weights.to(y.dtype)[..., None]
    cross, energy = (weighted * y).sum(-2), (weighted * quantized).sum(-2)
    gain = torch.where(energy > 0, cross / energy, 0.0).clamp_min(0.0)
    return gain * cross, gain.clamp_min(1e-30).log2() * GAIN_STEPS + GAIN_CENTER


def _explained_paths(
    codec: SpectralCodec, block: Tensor, place: Tensor, left_padding: Tensor | None, codes: Tensor, gains: Tensor
) -> Tensor:
    """:func:`explained` for codes that are places in union codebooks: a head's paths are right together, or wrong."""
    rough, exact = codec.coefficients(block, place, left_padding), coefficients(codec, block, place, left_padding)
    rms, levels = _rms(codec, exact), _levels(codec, codes)
    least, most, lost, fits = [], [], [], []
    for factor in codec.gain_search:
        nearest, single = _try(codec, exact, factor), _try(codec, rough, factor)
        off = 2 * (single.u.double() - nearest.u).abs().amax((-2, -1), keepdim=True) + FLOOR
        sides = torch.stack([_try(codec, exact, factor, shift=shift).saved for shift in (-off, 0 * off, off)])
        least.append(sides.amin(0))
        most.append(sides.amax(0))
        lost.append(2 * _largest(single.saved.double() - nearest.saved))
        # Whatever the path, every level is the nearest of its subset.
        closest = _distances(codec, nearest.u).gather(0, (codes % 4).long()[None])[0]
        fits.append((~codec.coded[..., None] | ((nearest.u - levels).abs() <= closest + 2 * off)).all(-2))
    best = torch.stack(least).amax(0)
    may = torch.stack(most) >= best - 2 * (torch.stack(lost) + FLOOR * best)  # [factors, B, H, 64]
    may &= torch.stack(fits)
    may[1:] &= rms.squeeze(-2) > 0  # else every step is zero
    factors = torch.tensor(codec.gain_search, dtype=torch.float64)
    first = factors[may.int().argmax(0)].unsqueeze(-2)
    right = may.any(0).all(-1) & _best_paths(codec, exact, rough, codes, rms * first)  # [B, H]
    for row, head in (~right & may.any(0).all(-1)).nonzero().tolist():
        free = (may[:, row, head].sum(0) > 1).nonzero().flatten().tolist()
        assert len(free) <= MAX_TIES, f"{len(free)} tokens of a block have gain factors that are as good"
        for chosen in itertools.product(*(factors[may[:, row, head, t]].tolist() for t in free)):
            tried = first.clone()
            tried[row, head, 0, free] = torch.tensor(chosen, dtype=torch.float64)
            right[row, head] |= _best_paths(codec, exact, rough, codes, rms * tried)[row, head]
    return right[..., None] & _gains_fit(codec, exact, rough, codes, gains)


def wrong_after(
    codec: SpectralCodec,
    given: tuple[Tensor, Tensor, Tensor | None],
    before: dict[str, Tensor],
    found: dict[str, Tensor],
) -> int:
    """How many heads' blocks another pass has coded wrongly: not on best paths with the gains that fit the last ones.

    Args:
        codec: The codec.
        given: What was encoded, ``[B, H, n * 64, D]``, the blocks' places and the left padding.
        before: ``codes`` and ``gains`` of one pass less, by whoever made ``found``.
        found: Those of this pass.

    Returns:
        Their number.
    """
    x, block_table, left_padding = given
    count = 0
    for index, (block, place) in enumerate(zip(x.split(BLOCK, dim=2), block_table.split(1), strict=True)):
        rough = codec.coefficients(block.contiguous(), place, left_padding)
        exact = coefficients(codec, block.contiguous(), place, left_padding)
        last = _levels(codec, codes_of(codec, before["codes"][index]))
        steps, short = (_gain(codec, y, last.to(y.dtype))[1] for y in (exact, rough))
        steps, short = (((e - GAIN_CENTER) / GAIN_STEPS).exp2().unsqueeze(-2) for e in (steps, short))
        codes, gains = codes_of(codec, found["codes"][index]), found["gains"][index]
        right = _best_paths(codec, exact, rough, codes, steps, short)
        count += int((~right | ~_gains_fit(codec, exact, rough, codes, gains).all(-1)).sum())
    return count


def _gains_fit(codec: SpectralCodec, exact: Tensor, rough: Tensor, codes: Tensor, gains: Tensor) -> Tensor:
    """Where gains are those of places in union codebooks, up to rounding, ``[B, H, 64]``."""
    levels = _levels(codec, codes)
    exponent, again = _gain(codec, exact, levels)[1], _gain(codec, rough, levels.float())[1]
    drift = 2 * _largest(again.double() - exponent) + FLOOR * GAIN_CENTER
    return (gains - exponent.clamp(0, 255)).abs() <= 0.5 + drift


MAX_TIES = 5
"""Tokens of one block whose gain factors are tried in all combinations."""


def _levels(codec: SpectralCodec, codes: Tensor) -> Tensor:
    """Levels of places in union codebooks, ``[B, H, D, 64]`` float64."""
    flat, levels = codes.flatten(1, 2), torch.zeros(codes.shape, dtype=torch.float64).flatten(1, 2)
    for c in codec.classes:
        assert c.union is not None
        levels[:, c.columns] = c.union.double()[flat[:, c.columns].long()]
    return levels.view(codes.shape)


def _best_paths(
    codec: SpectralCodec, exact: Tensor, rough: Tensor, codes: Tensor, steps: Tensor, short: Tensor | None = None
) -> Tensor:
    """Whether no path is better than a head's, by more than rounding, ``[B, H]``.

    Args:
        codec: The codec.
        exact: Coefficients in float64, ``[B, H, D, 64]``.
        rough: The same in float32.
        codes: Places in union codebooks.
        steps: In float64, ``[B, H, 1, 64]``.
        short: As float32 finds them; None for those rounded.

    Returns:
        By row and head.
    """
    u = torch.where(steps > 0, exact / steps, 0.0)
    levels, weights = _levels(codec, codes), steps.square()
    cost = ((u - levels).square() * weights).sum(-1)  # [B, H, D]
    short = steps.float() if short is None else short
    single = torch.where(short > 0, rough / short, 0.0)
    rounded = ((single - levels.float()).square() * short.square()).sum(-1)
    best = _least_cost(_distances(codec, u).square() * weights)
    lost = torch.zeros_like(cost).flatten(1)
    for c in codec.classes:
        off = (rounded.double() - cost).abs().flatten(1)[:, c.columns]
        lost[:, c.columns] = 2 * off.amax(-1, keepdim=True)
    return (~codec.coded | (cost <= best + 2 * (lost.view_as(cost) + FLOOR * best))).all(-1)


def _distances(codec: SpectralCodec, u: Tensor) -> Tensor:
    """How far the nearest level of each subset is from ``[B, H, D, 64]`` in float64, ``[4, B, H, D, 64]``."""
    found = torch.zeros(4, *u.shape, dtype=torch.float64).flatten(2, 3)
    for c in codec.classes:
        assert c.union is not None
        values = u.flatten(1, 2)[:, c.columns]
        for subset in range(4):
            own = c.union.double()[subset::4].contiguous()
            above = torch.searchsorted(own, values).clamp(1, max(len(own) - 1, 1))
            sides = (own[above - 1], own[above.clamp_max(len(own) - 1)])
            found[subset][:, c.columns] = torch.minimum(*((values - side).abs() for side in sides))
    return found.view(4, *u.shape)


def _least_cost(errors: Tensor) -> Tensor:
    """The cost of the best path, by the errors in each subset ``[4, ..., 64]``."""
    branches, before = branch_subsets(), torch.arange(STATES) >> 1
    cost = torch.full((STATES, *errors.shape[1:-1]), float("inf"), dtype=errors.dtype)
    cost[0] = 0.0
    for error in errors.unbind(-1):
        low, high = cost[before] + error[branches[:, 0]], cost[before + STATES // 2] + error[branches[:, 1]]
        cost = torch.minimum(low, high)
    return cost.amin(0)


def _largest(error: Tensor) -> Tensor:
    """The largest absolute error of each head's block, ``[B, H, 1]``."""
    return error.abs().amax(-1, keepdim=True)


def codes_of(codec: SpectralCodec, words: Tensor) -> Tensor:
    """Codes of one block's words ``[B, W]``, or places in union codebooks, as ``[B, H, D, 64]``."""
    flat = torch.zeros(words.shape[0], codec.num_heads * codec.dim, BLOCK, dtype=torch.int32)
    for c in codec.classes:
        own = words[:, c.words].unflatten(-1, (-1, 2 * c.width))
        flat[:, c.columns] = unpack(own, c.width) if c.union is None else unpack_path(own, c.width)
    return flat.unflatten(1, (codec.num_heads, codec.dim))
