"""Trellis-coded quantization: the quantizer of a token depends on the codes of the tokens before it in its block.

A scalar quantizer of k bits has 2^k levels. Here a coefficient has a *union codebook* of 2^(k+1) levels, of which a
token may use 2^(k-1): the subset of every fourth level that a convolutional code names. Of the k bits of a token one,
the *path bit* p, drives that code; the others pick the level of the subset::

    c1 = p * h0,  c0 = p * h1        over GF(2), along the tokens of a block, from state zero
    level = levels[4 u + 2 c1 + c0]

Neighbouring tokens thus share bits: of all paths the encoder takes the one of least squared error (Viterbi's
algorithm), and with the same k bits the error falls by a quarter to a third. Decoding is a scalar decode of k + 1 bits
once c1 and c0 are there, and those of 64 tokens are some shifts and exclusive-ors of the two words that hold the
block's path bits.

Source: M. Marcellin and T. Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Trans.
Commun. 38 (1990); codes of G. Ungerboeck, "Channel coding with multilevel/phase signals", IEEE Trans. Inf. Theory 28
(1982), table I.

Shapes: N coefficients (anything that is coded on its own), T = 64 tokens of a block, S states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantcache.coding.codebook import gaussian_codebook
from quantcache.coding.packing import MAX_WIDTH, pack, unpack
from quantcache.coding.schema import Coding

CODES = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4)}
"""Parity-check polynomials h0 and h1 by number of states; bit i multiplies the path bit of i tokens ago."""

STATES = 8
"""States of the codec's trellis."""

TERMS: tuple[tuple[tuple[float, ...], float], ...] = (
    ((), 1.0),
    ((2.93817, 1.59938), 0.31289),
    ((3.09988, 4.09265, -18.5136, 150.473), 0.0885819),
    ((3.36596, 5.51875, -26.355, 238.354, -216.4), 0.0243),
    ((3.93403, 1.45036, 54.5552, -362.846, 1292.01), 0.00657332),
    ((4.24681, -0.822228, 118.456, -875.054, 2595.78), 0.00174894),
    ((4.36537, -2.6976, 169.602, -1278.11, 3612.9), 0.000451569),
    ((4.41386, -3.97834, 202.947, -1553.82, 4348.36), 0.000115041),
    ((4.42461, -4.53809, 215.327, -1646.47, 4567.33), 2.97597e-05),
)
"""By width k, the union codebook and its mean squared error on a unit Gaussian: levels are the odd polynomial with
these coefficients of x, x³, x⁵, ... at x, the index centred and scaled to (-1/2, 1/2). Trained by
``benchmarks/trellis_codebooks.py``; free levels are better by 0.04 % at 4 bits and by 0.4 % at 6."""


def _parity(values: Tensor) -> Tensor:
    """Whether the number of ones in every non-negative integer (below 32) is odd, int64."""
    for shift in (4, 2, 1):
        values = values ^ (values >> shift)
    return values & 1


@cache
def branch_subsets(states: int = STATES) -> Tensor:
    """The subset on every branch of the trellis.

    A state is the last path bits, the newest lowest; state s is reached from s >> 1 and from that plus S / 2.

    Args:
        states: S.

    Returns:
        ``[S, 2]`` int64: the subset 2 c1 + c0 by state reached and the highest bit of the state before.
    """
    h0, h1 = CODES[states]
    register = (
        torch.arange(2 * states, dtype=torch.int64, device="cpu").view(2, states).T
    )  # the path bits that a branch has seen, the oldest highest
    return 2 * _parity(register & h0) + _parity(register & h1)


def subsets_of_path(path: Tensor, states: int = STATES) -> Tensor:
    """The subset of every token: the convolution as it is defined.

    Args:
        path: Path bits, ``[..., T]``.
        states: S.

    Returns:
        2 c1 + c0, ``[..., T]`` int64.
    """
    bits = []
    for polynomial in CODES[states]:
        total = torch.zeros_like(path, dtype=torch.int64)
        for delay in range(polynomial.bit_length()):
            if polynomial >> delay & 1:
                total[..., delay:] += path[..., : path.shape[-1] - delay].to(torch.int64)
        bits.append(total & 1)
    return 2 * bits[0] + bits[1]


def subset_words(path: Tensor, states: int = STATES) -> tuple[Tensor, Tensor]:
    """c1 and c0 of a whole block by shifts and exclusive-ors of words, the way kernels decode.

    Args:
        path: The block's path bits as a packed 1-bit field: even tokens in the first word, odd ones in the second,
            ``[..., 2]`` int32.
        states: S.

    Returns:
        c1 and c0 as packed 1-bit fields, ``[..., 2]`` int32 each.
    """
    even, odd = path.unbind(-1)
    planes = []
    for polynomial in CODES[states]:
        total = [torch.zeros_like(even), torch.zeros_like(odd)]
        for delay in range(polynomial.bit_length()):
            if polynomial >> delay & 1:
                steps, swapped = divmod(delay, 2)
                # An odd delay takes even tokens from odd ones, one step further back, and odd ones from even ones.
                total[0] = total[0] ^ ((odd << (steps + 1)) if swapped else (even << steps))
                total[1] = total[1] ^ ((even if swapped else odd) << steps)
        planes.append(torch.stack(total, dim=-1))
    return planes[0], planes[1]


@cache
def union_levels(width: int) -> tuple[float, ...]:
    """The union codebook of a width.

    Args:
        width: k, 1 to 8.

    Returns:
        ``2**(k + 1)`` levels, ascending and symmetric about zero.
    """
    count = 2 << width
    places = ((index + 0.5) / count - 0.5 for index in range(count))
    return tuple(sum(c * x ** (2 * i + 1) for i, c in enumerate(TERMS[width][0])) for x in places)


def union_terms(width: int) -> tuple[float, ...]:
    """The polynomial behind :func:`union_levels`.

    Args:
        width: k, 0 to 8.

    Returns:
        Coefficients of x, x³, x⁵, x⁷ and x⁹.
    """
    terms = TERMS[width][0]
    return terms + (0.0,) * (5 - len(terms))


@cache
def code_distortions(coding: Coding) -> tuple[float, ...]:
    """Mean squared error of a unit Gaussian by code width.

    Args:
        coding: ``"scalar"`` or ``"trellis"``.

    Returns:
        The errors of widths 0 to 8.
    """
    if coding == "trellis":
        return tuple(distortion for _, distortion in TERMS)
    return tuple(gaussian_codebook(width).distortion for width in range(MAX_WIDTH + 1))


@dataclass(frozen=True)
class Path:
    """What the encoder found for N coefficients of a block.

    Attributes:
        bits: Path bits, ``[N, T]`` uint8.
        inner: Which level of its subset each token takes, ``[N, T]`` uint8.
        quantized: The levels, ``[N, T]`` float32.
    """

    bits: Tensor
    inner: Tensor
    quantized: Tensor


def nearest_by_subset(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest level of each subset.

    Args:
        values: ``[N, T]`` float32.
        levels: The union codebook, ascending, ``[2^(k+1)]``.

    Returns:
        Index in the subset and level, both ``[4, N, T]``.
    """
    index, level = [], []
    for subset in range(4):
        own = levels[subset::4].contiguous()
        nearest = torch.bucketize(values, (own[1:] + own[:-1]) / 2)
        index.append(nearest)
        level.append(own[nearest])
    return torch.stack(index), torch.stack(level)


def best_path(errors: Tensor, states: int = STATES) -> Tensor:
    """The path of least error: Viterbi's algorithm.

    Args:
        errors: Weighted error of every token in each subset, ``[4, N, T]`` float32.
        states: S.

    Returns:
        Path bits, ``[N, T]`` uint8; of equally good paths always the same.
    """
    _, count, tokens = errors.shape
    half = states // 2
    # By the bit that leaves and the state reached: state s from s >> 1, or from that plus S / 2 where the bit is one.
    branches = branch_subsets(states).T.flatten().to(errors.device)
    cost = torch.full((2, half, 1, count), float("inf"), dtype=errors.dtype, device=errors.device)
    cost[0, 0] = 0.0
    choices = torch.empty(tokens, states, count, dtype=torch.bool, device=errors.device)
    for token, error in enumerate(errors.permute(2, 0, 1).contiguous().unbind()):
        low, high = (cost + error.index_select(0, branches).view(2, half, 2, count)).unbind()
        choices[token] = (high < low).view(states, count)
        cost = torch.minimum(low, high).view(2, half, 1, count)
    state = cost.view(states, 1, count).argmin(0)
    reached = torch.empty(tokens, 1, count, dtype=torch.int64, device=errors.device)
    for token in range(tokens - 1, -1, -1):
        reached[token] = state
        state = torch.add(state >> 1, choices[token].gather(0, state), alpha=half)
    return (reached[:, 0].T & 1).to(torch.uint8)


def search(
    values: Sequence[Tensor], weights: Sequence[Tensor], levels: Sequence[Tensor], states: int = STATES
) -> list[Path]:
    """The paths of least weighted squared error, of coefficients of several widths at once.

    Args:
        values: What is to be coded, in units of the codebook, ``[N, T]`` float32, by width.
        weights: Weight of each token's squared error, ``[N, T]`` float32, by width.
        levels: The union codebooks, ascending, ``[2^(k+1)]`` float32, by width.
        states: S.

    Returns:
        The paths by width; of equally good ones always the same.
    """
    if not values:
        return []
    near = [nearest_by_subset(*each) for each in zip(values, levels, strict=True)]
    found = zip(values, weights, near, strict=True)
    bits = best_path(torch.cat([(own - level).square() * weight for own, weight, (_, level) in found], dim=1), states)
    taken = subsets_of_path(bits, states)[None]
    counts = [len(own) for own in values]
    return [
        Path(path, index.gather(0, subsets)[0].to(torch.uint8), level.gather(0, subsets)[0])
        for path, subsets, (index, level) in zip(bits.split(counts), taken.split(counts, dim=1), near, strict=True)
    ]


def pack_path(path: Path, width: int) -> Tensor:
    """Pack the codes of whole blocks: the levels' k - 1 bits as scalar codes are packed, then the plane of path bits.

    Args:
        path: What :func:`search` found for blocks of 64 tokens.
        width: k.

    Returns:
        int32 words, ``[N, 2 * width]``.
    """
    return torch.cat((pack(path.inner, width - 1), pack(path.bits, 1)), dim=-1)


def unpack_path(words: Tensor, width: int) -> Tensor:
    """Places of the levels in the union codebook.

    Args:
        words: int32 words, ``[..., 2 * width]``.
        width: k.

    Returns:
        int32, ``[..., 64]``.
    """
    c1, c0 = (unpack(plane, 1) for plane in subset_words(words[..., -2:]))
    return 4 * unpack(words[..., :-2], width - 1) + 2 * c1 + c0
