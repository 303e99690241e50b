"""Train the union codebooks of the trellis on a unit Gaussian, and say what they lose.

Lloyd's iteration with the trellis in place of a nearest-level search: encode samples, then fit the levels to what was
coded with them. Levels are an odd polynomial of their index, fitted by least squares, so that a codebook is a few
numbers; free levels are trained beside it to see what the polynomial costs. Running this file prints the constants of
``quantcache/coding/trellis.py``; it takes some ten minutes.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from quantcache.coding.codebook import lloyd_max
from quantcache.coding.packing import BLOCK, MAX_WIDTH
from quantcache.coding.trellis import CODES, STATES, search, subsets_of_path

TERMS = 5


def samples(blocks: int, generator: torch.Generator) -> Tensor:
    """Blocks of unit Gaussian values, ``[blocks, 64]``."""
    return torch.randn(blocks, BLOCK, generator=generator)


def coded(values: Tensor, levels: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """How many values every level was taken for, and their sum, by level."""
    (path,) = search([values], [torch.ones_like(values)], [levels], states)
    index = (4 * path.inner.long() + subsets_of_path(path.bits, states)).flatten()
    count = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, index, torch.ones(len(index)).double())
    return count, torch.zeros(len(levels), dtype=torch.float64).index_add_(0, index, values.flatten().double())


def distortion(levels: Tensor, states: int, blocks: int) -> float:
    """Mean squared error on fresh samples, the same for every codebook."""
    values = samples(blocks, torch.Generator().manual_seed(1))
    (path,) = search([values], [torch.ones_like(values)], [levels], states)
    return float((values - path.quantized).double().square().mean())


def train(width: int, states: int, blocks: int, iterations: int, polynomial: bool) -> tuple[Tensor, list[float]]:
    """Levels of one width, and the coefficients of x, x³, ... that give them (none for free levels)."""
    generator = torch.Generator().manual_seed(0)
    size = 2 << width
    x = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    powers = torch.stack([x ** (2 * i + 1) for i in range(min(TERMS, size // 2))], dim=1)
    book = torch.tensor(lloyd_max(min(width + 1, MAX_WIDTH)).levels, dtype=torch.float32)
    levels = torch.nn.functional.interpolate(book[None, None], size, mode="linear")[0, 0]  # the same if it has as many
    terms: Tensor = torch.zeros(0)
    for _ in range(iterations):
        count, total = coded(samples(blocks, generator), levels, states)
        if polynomial:
            normal = powers.T @ (count[:, None] * powers)
            terms = torch.from_numpy(np.linalg.solve(normal.numpy(), (powers.T @ total).numpy()))
            levels = (powers @ terms).float()
        else:
            means = torch.where(count > 0, total / count.clamp_min(1), levels.double())
            levels = ((means - means.flip(0)) / 2).sort().values.float()
    return levels, terms.tolist()


def main() -> None:
    """Train every width and print the constants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=STATES, choices=sorted(CODES))
    parser.add_argument("--blocks", type=int, default=8192)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--widths", type=int, nargs="+", default=list(range(1, MAX_WIDTH + 1)))
    options = parser.parse_args()
    for width in options.widths:
        levels, terms = train(width, options.states, options.blocks, options.iterations, True)
        error = distortion(levels, options.states, 4 * options.blocks)
        free, _ = train(width, options.states, options.blocks, options.iterations, False)
        loss = error / distortion(free, options.states, 4 * options.blocks) - 1
        shown = ", ".join(f"{term:.6g}" for term in terms)
        print(
            f"    (({shown},), {error:.6g}),  # width {width}: {error / lloyd_max(width).distortion:.4f} of Lloyd-Max"
        )
        print(f"#   against free levels {loss:+.4%}", flush=True)


if __name__ == "__main__":
    main()
