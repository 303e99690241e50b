"""Encoding: from keys or values as the model caches them to tiles of codes and gains, in one launch.

Levels near a coefficient are found with a grid of bins, of which each holds at most one threshold of a codebook: the
number of thresholds below is that of the bin, or one more. A trellis has a threshold wherever the nearest level of
some subset changes, and between two of them one level of each subset. Sums of the gain search need no codes: a narrow
codebook is a few steps up from its least magnitude, and a wide one a grid of the gaps between its magnitudes.

Shapes: n blocks, B batch, H key/value heads, D dimension, S slots.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quantcache_kernels.cuda.blocks import TILE
from quantcache_kernels.cuda.constants import PreparedCodes, paired_frame
from quantcache_kernels.cuda.conversion import CODE_PITCH
from quantcache_kernels.cuda.driver import load
from quantcache_kernels.cuda.launching import Launched, on_device, stream_of
from quantcache_kernels.cuda.structures import Book, EncodeArguments, Ladder, pointer
from quantcache_kernels.interface import BLOCK, MAX_WIDTH, SideConstants

FACTORS = 5
"""As in encoding.h: of the gain search, tried at once."""

PIECES = 3
"""bfloat16 in a float32."""

NARROW = 3
"""Up to this many bits a codebook is a ladder to the gain search."""

LADDER = (1 << NARROW - 1) - 1
"""Steps of such a ladder at most."""

MAGIC = float(1 << 23)
"""A float behind it is rounded to an integer, which its lowest bits are."""

MAGIC_BITS = 0x4B000000

SPARE = 0.98
"""Of the least gap between two thresholds, what a bin is wide."""

NEAR_WORDS = 2048
"""Of the tables in shared memory at most: codebooks of up to 6 bits, 7 of scalar codes. Few coefficients have more;
theirs are read from where all tables are."""

MOST_SLOTS = 256
"""Of a head: a thread has a coefficient while paths are sought, and eight warps have registers for their sums."""


def _on_cuda(device: torch.device, is_trellis: bool) -> Mapping[str, Launched]:
    return load(device.index or 0, "encode.h", f"TRELLIS={int(is_trellis)}")


LOADERS: dict[str, Callable[[torch.device, bool], Mapping[str, Launched]]] = {"cuda": _on_cuda}
"""By type of device, who finds the kernel for a coding; tests add an emulation."""


@dataclass
class PreparedEncoder:
    """A side's constants for the encoder.

    Attributes:
        codes: Those of its blocks.
        tensors: What :class:`EncodeArguments` points to, by name.
        numbers: Its other fields, likewise.
    """

    codes: PreparedCodes
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    def held(self) -> list[Tensor]:
        """Every tensor on the device."""
        return list(self.tensors.values())

    @property
    def slots(self) -> int:
        """S."""
        return TILE * self.codes.layout.tiles

    @property
    def warps(self) -> int:
        """Warps of a block of threads: an even number, of 32 coefficients each."""
        return 2 * -(-self.codes.layout.tiles // 4)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of threads (encoding.h)."""
        slots, groups = self.slots, self.warps // 2
        fragments = 4 * PIECES * BLOCK * self.codes.layout.dim // 2
        search = max(CODE_PITCH * slots, 4 * 2 * FACTORS * BLOCK * groups)  # codes take more than survivors
        paths = 24 * slots if self.codes.is_trellis else 0
        coefficients = 4 * (BLOCK + 1) * slots + paths + 8 * BLOCK * groups + search
        return max(fragments, 4 * self.numbers["near_words"] + 8 * slots + 8 * BLOCK + coefficients)

    def encode(self, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode whole blocks.

        Args:
            x: ``[B, H, n * 64, D]`` bfloat16, any strides.
            block_table: Where the blocks lie, ``[n, 3]``.
            left_padding: Left padding of every row, ``[B]``, or None.

        Returns:
            Words of tiles ``[n, B, words]`` int32 and codes of gains ``[n, B, H, 64]`` uint8.
        """
        layout, device = self.codes.layout, x.device
        batch, heads, tokens, _ = x.shape
        blocks = tokens // BLOCK
        out = torch.empty(blocks, batch, layout.words, dtype=torch.int32, device=device)
        gains = torch.empty(blocks, batch, heads, BLOCK, dtype=torch.uint8, device=device)
        if not gains.numel():
            return out, gains
        origins = None if left_padding is None else left_padding.int().contiguous()
        block_table = block_table.int().contiguous()
        arguments = EncodeArguments(
            x=x.data_ptr(),
            **{name: pointer(tensor) for name, tensor in self.tensors.items()},
            **self.numbers,
            out=pointer(out),
            gains=pointer(gains),
            block_table=pointer(block_table),
            origins=pointer(origins),
            strides=x.stride(),
            batch=batch,
        )
        with on_device(device):
            kernel = LOADERS[device.type](device, self.codes.is_trellis)["encode"]
            kernel.launch((blocks * batch, heads), 32 * self.warps, self.shared_bytes, arguments, stream_of(device))
        return out, gains


def prepare_encoder(constants: SideConstants, codes: PreparedCodes, device: torch.device) -> PreparedEncoder:
    """Lay a side's constants out for the encoder.

    Args:
        constants: The side, on the CPU.
        codes: Those of its blocks.
        device: Where they go.

    Returns:
        The constants.
    """
    layout, is_trellis = codes.layout, codes.is_trellis
    frame, pairs = paired_frame(constants.frame)
    order = pairs.flatten()
    matrix = layout.gather(constants.encoder, 1)[:, :, order]
    weights = layout.gather(constants.weights, 1).float().contiguous().view(torch.int32)
    kinds = codes.conversion.slots[..., 1].cpu().view(weights.shape)
    tables, books, ends = _books(constants, int(layout.own_widths.max()))
    near_width = bisect_right(ends, NEAR_WORDS) - 1
    factors = constants.gain_search + constants.gain_search[-1:] * (-len(constants.gain_search) % FACTORS)
    made = {
        "pairs": frame,
        "mean": constants.mean[:, order],
        "matrix": _fragments(matrix),
        "slots": torch.stack((weights, kinds), dim=-1),
        "counts": (layout.own_widths > 0).sum(1).clamp_min(1).float(),
        "tables": tables,
        "factors": torch.tensor(factors, dtype=torch.float32, device="cpu"),
    }
    tensors = {name: tensor.contiguous().to(device) for name, tensor in made.items()}
    numbers: dict[str, Any] = {
        "heads": layout.heads,
        "dim": layout.dim,
        "slow": constants.num_slow,
        "tiles": layout.tiles,
        "slow_tiles": layout.slow_tiles,
        "near_width": near_width,
        "near_words": ends[near_width],
        "tile_words": layout.words,
        "rounds": len(factors) // FACTORS,
        "passes": constants.passes if is_trellis else 1,
        "values": int(codes.conversion.holds_values),
        "books": (Book * (MAX_WIDTH + 1))(*books),
        "ladders": (Ladder * (NARROW + 1))(*(_ladder(constants.levels[w]) for w in range(NARROW + 1))),
    }
    shared = {"places": codes.conversion.places, "maps": codes.conversion.maps}
    return PreparedEncoder(codes, tensors | shared, numbers)


def _fragments(matrix: Tensor) -> Tensor:
    """A transform ``[H, S, D]`` as three bfloat16 in the order of the products' right operand.

    Returns:
        ``[H, S / 16, D / 16, 3, 32, 4]`` int32: lane 4 g + j has, of slots g and 8 + g, dimensions 2 j and 2 j + 1,
        then those 8 further on.
    """
    pieces, rest = [], matrix.float().contiguous()
    for _ in range(PIECES):
        piece = rest.view(torch.int32) & -65536
        rest = rest - piece.view(torch.float32)
        pieces.append(piece >> 16 & 65535)
    halves = torch.stack(pieces)  # [3, H, S, D]
    own = halves.unflatten(3, (-1, 2, 4, 2)).unflatten(2, (-1, 2, 8))  # [3, H, tiles, 2, 8, steps, 2, 4, 2]
    own = own.permute(1, 2, 5, 0, 4, 7, 3, 6, 8).flatten(4, 5)  # [H, tiles, steps, 3, 32, 2, 2, 2]
    return (own[..., 0] | own[..., 1] << 16).flatten(5)


def _ladder(levels: Sequence[float]) -> Ladder:
    """``Ladder`` of a scalar codebook."""
    magnitudes = levels[len(levels) // 2 :]
    steps = [((a + b) / 2, b - a, b * b - a * a) for a, b in pairwise(magnitudes)]
    steps += [(0.0, 0.0, 0.0)] * (LADDER - len(steps))
    return Ladder(magnitudes[0], *zip(*steps, strict=True))


def _books(constants: SideConstants, widest: int) -> tuple[Tensor, list[Book], list[int]]:
    """The tables of all codebooks up to a width, in words; where each is in them, and where each width's end."""
    ends = [0]
    words: list[Tensor] = []
    books = [Book() for _ in range(MAX_WIDTH + 1)]

    def place(part: Tensor) -> int:
        start = 4 * sum(each.numel() for each in words)
        words.append(torch.nn.functional.pad(part.flatten(), (0, -part.numel() % 4)))  # rows of four are read at once
        return start

    for width in range(1, widest + 1):
        if constants.coding == "trellis":
            levels = torch.tensor(constants.unions[width], dtype=torch.float32, device="cpu")
            thresholds = (levels[4:] + levels[:-4]) / 2
            row = torch.arange(len(thresholds) + 1, dtype=torch.int64, device="cpu")[:, None]
            rows = levels[row + (torch.arange(4, dtype=torch.int64, device="cpu") - row) % 4]
        else:
            rows = torch.tensor(constants.levels[width], dtype=torch.float32, device="cpu")[:, None]
            thresholds = torch.tensor(constants.boundaries[width], dtype=torch.float32, device="cpu")
        first = place(rows.view(torch.int32))
        at, below, scale = _bins(thresholds)
        bins = torch.stack((at.view(torch.int32), first + 4 * rows.shape[1] * below), dim=-1)
        own = Book(scale=scale, last=len(bins) - 1, bins=place(bins) - 8 * MAGIC_BITS, rows=first)
        if width > NARROW:
            gaps, own.search_scale = _gaps(constants.levels[width])
            own.search_last, own.search = MAGIC + len(gaps) - 1, place(gaps.view(torch.int32)) - 8 * MAGIC_BITS
        books[width] = own
        ends.append(sum(each.numel() for each in words))
    return torch.cat([torch.zeros(0, dtype=torch.int32, device="cpu"), *words]), books, ends


def _bins(thresholds: Tensor) -> tuple[Tensor, Tensor, float]:
    """Bins of a codebook, of which zero has the middle one.

    Returns:
        The threshold in every bin or else the next one, ``[count]``; how many lie below the bin, int32; and the scale
        of ``Book`` (encoding.h).
    """
    exact = thresholds.double()
    each = SPARE * float(exact.diff().min()) if len(exact) > 1 else 1.0
    aside = math.ceil(float(exact.abs().max()) / each + 1) if len(exact) else 0
    edges = (torch.arange(2 * aside + 1, dtype=torch.float64, device="cpu") - aside - 0.5) * each
    below = torch.searchsorted(exact, edges)
    at = torch.nn.functional.pad(thresholds, (0, 1), value=math.inf)[below]
    return at, below.int(), 1 / (2 * max(aside, 1) * each)


def _gaps(levels: Sequence[float]) -> tuple[Tensor, float]:
    """Bins of a scalar codebook's magnitudes: ``Gap`` of each (encoding.h), ``[count, 2]``, and how many are a unit."""
    magnitudes = torch.tensor(levels[len(levels) // 2 :], dtype=torch.float64, device="cpu")
    middles, halves = (magnitudes[1:] + magnitudes[:-1]) / 2, magnitudes.diff() / 2
    scale = 1 / (SPARE * float(middles.diff().min()))
    edges = (torch.arange(math.ceil(float(middles[-1]) * scale + 1), dtype=torch.float64, device="cpu") - 0.5) / scale
    own = torch.searchsorted(middles, edges).clamp_max(len(middles) - 1)
    return torch.stack((middles[own], halves[own]), dim=-1).float(), scale
