"""Encoding by a trellis: of every coefficient the path of least error through a block, then the gain that fits it.

It goes on where encode.py has found coefficients and steps. The first kernel is Viterbi's algorithm with every
coefficient in a lane of its own: the costs of the eight states and the paths that lead to them are in registers. A
path is a bit for each token, two words in all, so that no way back is needed: whoever survives takes its path along,
and the winner's two words are what a block stores. The second kernel finds the levels of the paths, the corrected gain
and the packed fields. See quantcache/coding/trellis.py.

The levels near a coefficient are found with a grid of bins, finer than the levels: of the four levels on either side of
a bin those four places apart belong to one subset, and the nearer of the two is the nearest of that subset, even if the
coefficient is on the other side of one level inside its bin.

Shapes: H key/value heads, S slots, n blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantcache_kernels.interface import MAX_WIDTH
from quantcache_kernels.triton.codes import convolve
from quantcache_kernels.triton.packing import CHUNK_WARPS, chunk_of, load_slots, store_codes, store_gains
from quantcache_kernels.triton.runtime import jit, kernel, power_of_two, tl

TABLES = 3
"""Tensors of :func:`make_union_search`, the last of the encoder's tables."""

FAR = 1e30
"""Stands for the levels that a codebook does not have, four on either side."""


@jit
def bin_of(u, width, scale, origin, bins):
    """About how many levels of the union codebook lie below u: at most one too many or too few."""
    index = tl.minimum(tl.maximum(tl.floor(u * scale + origin), 0.0), ((8 << width) - 1).to(tl.float32))
    return tl.load(bins + ((8 << width) - 16) + index.to(tl.int32))


@jit
def first_level(width):
    """Place of a width's union codebook among all of them, less the four levels that come before it."""
    return (2 << width) - 4 + 8 * (width - 1)


@jit
def subset_errors(u, weight, width, scale, origin, union, bins):
    """Weighted squared error of the nearest level of each subset: four tensors."""
    below = bin_of(u, width, scale, origin, bins)
    levels = union + first_level(width) + below
    error = ()
    for r in tl.static_range(4):
        low, high = tl.load(levels + r), tl.load(levels + 4 + r)
        distance = u - tl.where(u <= (low + high) * 0.5, low, high)
        error += (distance * distance * weight,)
    # That was subset (below + r) % 4: turn them round to subset r.
    odd, upper = (below & 1) != 0, (below & 2) != 0
    turned = ()
    for r in tl.static_range(4):
        turned += (tl.where(odd, error[(r + 3) % 4], error[r]),)
    error = ()
    for r in tl.static_range(4):
        error += (tl.where(upper, turned[(r + 2) % 4], turned[r]),)
    return error


@jit
def start(slot):
    """Costs of the eight states before the first token, and empty words of their paths: it starts in state zero."""
    none = tl.zeros_like(slot)
    costs, evens, odds = (none.to(tl.float32),), (none.to(tl.uint32),), (none.to(tl.uint32),)
    for _ in tl.static_range(7):
        costs += (none.to(tl.float32) + float("inf"),)
        evens += (none.to(tl.uint32),)
        odds += (none.to(tl.uint32),)
    return costs, evens, odds


@jit
def advance(cost, own, other, error):
    """One token further: costs of the eight states and words of their paths, the token's bits in the words ``own``.

    State s, the last three bits with the newest lowest, is reached from s >> 1 and from that plus 4.
    """
    costs, owns, others = (), (), ()
    for s in tl.static_range(8):
        low = cost[s >> 1] + error[2 * ((s ^ (s >> 1)) & 1) + (s >> 2)]
        high = cost[(s >> 1) + 4] + error[2 * ((1 ^ s ^ (s >> 1)) & 1) + (s >> 2)]
        taken = high < low
        bits = tl.where(taken, own[(s >> 1) + 4], own[s >> 1]) >> 1
        costs += (tl.where(taken, high, low),)
        owns += (bits | 0x80000000 if s & 1 else bits,)
        others += (tl.where(taken, other[(s >> 1) + 4], other[s >> 1]),)
    return costs, owns, others


@kernel("batch", "W")
def path_kernel(
    coefficients,  # [n, B, H, 64, S] float32
    steps,  # [n, B, H, 64] float32
    widths, offsets,  # [H, S] int32
    search,  # [H, 2, S] float32: bins per unit, and the first bin's place
    union, bins,  # all union codebooks, width 1 to 8
    codes,  # [n, B, W]: filled with the planes of path bits
    batch, W,
    S: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The best paths of some slots of one head of one block."""
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2) % batch
    slot = (tl.program_id(2) // batch) * SLOTS + tl.arange(0, SLOTS)
    real = slot < S
    coded_width = tl.load(widths + head * S + slot, mask=real, other=0)
    width = tl.maximum(coded_width, 1)
    scale = tl.load(search + head * 2 * S + slot, mask=real, other=0.0)
    origin = tl.load(search + head * 2 * S + S + slot, mask=real, other=0.0)
    line = block.to(tl.int64) * batch + b
    steps += (line * tl.num_programs(1) + head) * 64
    coefficients += (line * tl.num_programs(1) + head) * 64 * S + slot

    cost, even, odd = start(slot)
    for pair in range(32):
        step = tl.load(steps + 2 * pair)
        u = tl.where(step > 0, tl.load(coefficients + 2 * pair * S, mask=real, other=0.0) / step, 0.0)
        error = subset_errors(u, step * step, width, scale, origin, union, bins)
        cost, even, odd = advance(cost, even, odd, error)
        step = tl.load(steps + 2 * pair + 1)
        u = tl.where(step > 0, tl.load(coefficients + (2 * pair + 1) * S, mask=real, other=0.0) / step, 0.0)
        error = subset_errors(u, step * step, width, scale, origin, union, bins)
        cost, odd, even = advance(cost, odd, even, error)

    least, best_even, best_odd = cost[0], even[0], odd[0]
    for s in tl.static_range(1, 8):
        better = cost[s] < least
        least = tl.where(better, cost[s], least)
        best_even = tl.where(better, even[s], best_even)
        best_odd = tl.where(better, odd[s], best_odd)
    plane = codes + line * W + tl.load(offsets + head * S + slot, mask=real, other=0) + 2 * (width - 1)
    tl.store(plane, best_even.to(tl.int32, bitcast=True), mask=coded_width > 0)
    tl.store(plane + 1, best_odd.to(tl.int32, bitcast=True), mask=coded_width > 0)


@kernel("batch", "W")
def level_kernel(
    coefficients,  # [n, B, H, 64, S] float32
    steps,  # [n, B, H, 64] float32; gets the gain, for another pass
    weights,  # [H, S] float32
    widths, offsets,  # [H, S] int32
    search,  # [H, 2, S] float32: bins per unit, and the first bin's place
    union, bins,  # all union codebooks, width 1 to 8
    codes,  # [n, B, W] int32: has the planes of path bits, gets the other fields
    gains,  # [n, B, H, 64] uint8
    batch, W,
    S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Levels, gains and packed fields of one head of one block."""
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.arange(0, 64)
    line = block.to(tl.int64) * batch + b
    row = (line * tl.num_programs(1) + head) * 64
    coefficients += row * S
    words = codes + line * W
    is_even, bit = ((token & 1) == 0)[:, None], (token >> 1).to(tl.uint32)[:, None]
    step = tl.load(steps + row + token)[:, None]
    crosses, energies = tl.zeros((64, CHUNK), tl.float32), tl.zeros((64, CHUNK), tl.float32)
    for first in range(0, S, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        real = slot < S
        coded_width = tl.load(widths + head * S + slot, mask=real, other=0)
        coded, width = coded_width > 0, tl.maximum(coded_width, 1)
        offset = tl.load(offsets + head * S + slot, mask=real, other=0)
        path = words + offset + 2 * (width - 1)
        even = tl.load(path, mask=coded, other=0).to(tl.uint32, bitcast=True)
        odd = tl.load(path + 1, mask=coded, other=0).to(tl.uint32, bitcast=True)
        c1 = (tl.where(is_even, convolve(even, odd, 1)[None, :], convolve(odd, even, 0)[None, :]) >> bit) & 1
        c0 = ((tl.where(is_even, even[None, :], odd[None, :]) << 1) >> bit) & 1
        subset = (2 * c1 + c0).to(tl.int32)

        y = load_slots(coefficients, slot, S)
        u = tl.where(step > 0, y / step, 0.0)
        scale = tl.load(search + head * 2 * S + slot, mask=real, other=0.0)[None, :]
        origin = tl.load(search + head * 2 * S + S + slot, mask=real, other=0.0)[None, :]
        below = bin_of(u, width[None, :], scale, origin, bins)
        index = below + ((subset - below) & 3)  # of the level above; the one below comes four before
        levels = union + (first_level(width)[None, :] + index)
        low, high = tl.load(levels), tl.load(levels + 4)
        is_low = u <= (low + high) * 0.5
        level = tl.where(is_low, low, high)
        weighted = level * tl.load(weights + head * S + slot, mask=real, other=0.0)[None, :]
        crosses += weighted * y
        energies += weighted * level
        code = tl.where(is_low, index - 4, index) >> 2
        store_codes(words, tl.trans(code).to(tl.uint32), offset, width - 1, CHUNK)
    cross, energy = tl.sum(crosses, axis=1), tl.sum(energies, axis=1)
    gain = tl.maximum(tl.where(energy > 0, cross / energy, 0.0), 0.0)
    tl.store(steps + row + token, gain)
    store_gains(gains + row + token, gain)


def make_union_search(unions: Sequence[Sequence[float]]) -> tuple[list[Tensor], Tensor]:
    """Tables that find the levels near a coefficient without a search.

    Args:
        unions: Union codebook of every width from 0 to 8.

    Returns:
        Levels of width 1 to 8, one codebook after the other with four levels that are :data:`FAR` on either side, and
        how many levels lie below every bin, likewise, int32; and bins per unit and place of zero by width, ``[9, 2]``.
    """
    levels: list[Tensor] = []
    below: list[Tensor] = []
    grid = torch.zeros(MAX_WIDTH + 1, 2, dtype=torch.float64, device="cpu")
    for width in range(1, MAX_WIDTH + 1):
        book = torch.tensor(unions[width], dtype=torch.float64, device="cpu")
        far = torch.full((4,), FAR, dtype=torch.float64, device="cpu")
        levels.append(torch.cat((-far, book, far)))
        count = 4 * len(book)
        scale = float((count - 2) / (book[-1] - book[0]))
        assert bool((book.diff() * scale >= 1).all())
        grid[width] = torch.tensor((scale, 1 - float(book[0]) * scale), dtype=torch.float64, device="cpu")
        centers = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5 - grid[width, 1]) / scale
        below.append(torch.searchsorted(book, centers))
    return [torch.cat(levels).float(), torch.cat(below).to(torch.int32)], grid.float()


def launch(
    coefficients: Tensor,
    steps: Tensor,
    tables: list[Tensor],
    search: list[Tensor],
    passes: int,
    codes: Tensor,
    gains: Tensor,
) -> None:
    """Launch the kernels; see ``ops.encode_blocks``.

    Args:
        coefficients: ``[n, B, H, 64, S]`` float32, or more, flat.
        steps: ``[n, B, H, 64]`` float32, likewise; left with the gains.
        tables: ``weights``, ``widths`` and ``offsets``.
        search: ``search``, ``union`` and ``bins``.
        passes: How often the best paths are sought.
        codes: Filled with codes.
        gains: Filled with gains.
    """
    weights, widths, offsets = tables
    n, batch, heads, _ = gains.shape
    slots = widths.shape[1]
    lanes = min(power_of_two(slots), 128)
    for _ in range(passes):
        path_kernel[(n, heads, batch * -(-slots // lanes))](
            coefficients, steps, widths, offsets, *search, codes, batch, codes.shape[2],
            S=slots, SLOTS=lanes, num_warps=max(1, lanes // 32),
        )  # fmt: skip
        level_kernel[(n, heads, batch)](
            coefficients, steps, weights, widths, offsets, *search, codes, gains, batch, codes.shape[2],
            S=slots, CHUNK=chunk_of(slots), num_warps=CHUNK_WARPS,
        )  # fmt: skip
