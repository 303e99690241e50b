"""A codec's constants in the form that the CPU kernels read.

Shapes: H key/value heads, D dimension, C coded coefficients of a head (those of more than zero bits).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from quantcache_kernels.cpu.structures import Side
from quantcache_kernels.interface import ANCHOR_LENGTH, MAX_WIDTH, SideConstants

Role = Literal["encode", "key", "value"]

PAD = 16
TABLE = 256

Books = dict[int, Tensor]
"""Codebooks by width."""

_TENSORS = (
    "counts",
    "coded",
    "order",
    "frequencies",
    "mean",
    "fast_map",
    "offset_cos",
    "offset_sin",
    "levels",
    "planes",
    "gains",
    "encoder",
    "weights",
    "trees",
    "factors",
    "unions",
    "subsets",
)


def in_memory(name: str, x: Tensor) -> Tensor:
    """The same values where C may read them.

    Args:
        name: What it is, for messages.
        x: Any tensor.

    Returns:
        A plain strided tensor: a copy where ``x`` is lazily negated.

    Raises:
        ValueError: The values are not in the CPU's memory.
    """
    if x.is_neg():
        x = x.resolve_neg()
    if not x.is_cpu or x.layout != torch.strided or (type(x) is not Tensor and x.numel() and not x.data_ptr()):
        raise ValueError(f"expected {name} in the CPU's memory, got a {type(x).__name__} on {x.device} ({x.layout})")
    return x


def require(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Refuse what a kernel would read wrongly.

    Args:
        name: What it is, for messages.
        x: The tensor.
        dtype: What its dtype must be.
        shape: What its shape must be.

    Returns:
        The tensor.

    Raises:
        ValueError: The tensor has another shape or dtype, is not contiguous, or is not in the CPU's memory.
    """
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"expected {name} as a contiguous tensor {list(shape)} of {dtype}, got {list(x.shape)} of {x.dtype}"
        )
    return in_memory(name, x)


@dataclass
class Constants:
    """The constants of one side of a layer. Any number of threads may use them at once.

    Attributes:
        sizes: H, D, dimensions of the slow part, slow pairs, fast pairs, words, gain factors, passes of a trellis.
        tensors: The arrays of :class:`Side`, by name.
        decoder: ``[H, D, D]``; decoding reads all of it, attention takes the part it needs.
        structures: The C structures made so far, with the tensor that each one's ``map`` points to. An entry is never
            replaced: a call into C may be reading it.
    """

    sizes: tuple[int, ...]
    tensors: dict[str, Tensor]
    decoder: Tensor
    structures: dict[Role, tuple[Side, Tensor | None]] = field(default_factory=dict)

    @property
    def num_heads(self) -> int:
        """H."""
        return self.sizes[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.sizes[1]

    @property
    def words(self) -> int:
        """Words of a block and batch row."""
        return self.sizes[5]

    def structure(self, role: Role) -> Side:
        """The C structure; the pointers in it are good as long as these constants live.

        Args:
            role: What it is for: encoding and decoding need no map, attention different ones for keys and values.

        Returns:
            The structure.
        """
        found = self.structures.get(role)
        if found is None:
            self._check()
            table = None if role == "encode" else _map(self, role)
            _, dim, slow, slow_pairs, fast_pairs, words, num_factors, trellis = self.sizes
            side = Side(dim, slow, slow_pairs, fast_pairs, words, 0, num_factors, trellis)
            for name, tensor in self.tensors.items():
                setattr(side, name, tensor.data_ptr())
            side.decoder = self.decoder.data_ptr()
            if table is not None:
                side.map, side.map_columns = table.data_ptr(), table.shape[-1]
            # Where another thread was faster, everybody takes what it made: one call into C, so one of them is first.
            found = self.structures.setdefault(role, (side, table))
        return found[0]

    def _check(self) -> None:
        """Refuse arrays of other sizes than ``sizes`` says."""
        heads, dim, slow, slow_pairs, fast_pairs, _, num_factors, trellis = self.sizes
        fast, pairs = dim - slow, slow_pairs + fast_pairs
        if fast != 2 * fast_pairs or fast % 4 or not 0 <= 2 * slow_pairs <= slow <= dim:
            raise ValueError(
                f"{slow} slow of {dim} dimensions do not fit {slow_pairs} slow and {fast_pairs} fast pairs"
            )
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "counts": (torch.int32, (heads, 2)),
            "coded": (torch.int32, (heads, dim, 4)),
            "order": (torch.int32, (dim,)),
            "frequencies": (torch.float64, (pairs,)),
            "mean": (torch.float32, (heads, dim)),
            "fast_map": (torch.float32, (heads, fast // 4, fast, 4)),
            "offset_cos": (torch.float32, (fast_pairs, ANCHOR_LENGTH)),
            "offset_sin": (torch.float32, (fast_pairs, ANCHOR_LENGTH)),
            "levels": (torch.float32, (MAX_WIDTH + 1, TABLE)),
            "planes": (torch.uint8, (MAX_WIDTH + 1, 4 * TABLE)),
            "gains": (torch.float32, (TABLE,)),
            "encoder": (torch.float32, (heads, dim, dim)),
            "weights": (torch.float32, (heads, dim)),
            "trees": (torch.float32, (MAX_WIDTH + 1, TABLE)),
            "factors": (torch.float32, (num_factors,)),
            "unions": (torch.float32, ((MAX_WIDTH + 1) * bool(trellis), 2 * TABLE)),
            "subsets": (torch.float32, ((MAX_WIDTH + 1) * bool(trellis), 4, 2, TABLE // 2)),
        }
        for name, (dtype, shape) in shapes.items():
            require(name, self.tensors[name], dtype, *shape)
        require("decoder", self.decoder, torch.float32, heads, dim, dim)

    def held(self) -> list[Tensor]:
        """Every tensor that these constants keep alive."""
        maps = [table for _, table in list(self.structures.values()) if table is not None]
        return [*self.tensors.values(), self.decoder, *maps]

    def flatten(self) -> tuple[list[Tensor], list[int]]:
        """The constants as arguments of an operator.

        Returns:
            Tensors and sizes, for :meth:`unflatten`.
        """
        return [*(self.tensors[name] for name in _TENSORS), self.decoder], list(self.sizes)

    @staticmethod
    def unflatten(tensors: list[Tensor], sizes: list[int]) -> Constants:
        """Invert :meth:`flatten`.

        Args:
            tensors: The tensors.
            sizes: The sizes.

        Returns:
            The constants.
        """
        return Constants(tuple(sizes), dict(zip(_TENSORS, tensors[:-1], strict=True)), tensors[-1])


def prepare(source: SideConstants) -> Constants:
    """Lay a side's constants out for the kernels.

    Args:
        source: The side, on the CPU.

    Returns:
        The constants; they share memory with ``source`` where they can.
    """
    heads, dim = source.mean.shape
    slow, frame = source.num_slow, source.frame
    coded = torch.zeros(heads, dim, 4, dtype=torch.int32, device="cpu")
    counts = torch.zeros(heads, 2, dtype=torch.int32, device="cpu")
    fast = dim - slow
    fast_map = torch.zeros(heads, fast // 4, fast, 4, dtype=torch.float32, device="cpu")
    for head in range(heads):
        widths = source.widths[head].tolist()
        order = sorted((i for i in range(dim) if widths[i]), key=lambda i: (i >= slow, widths[i], i))
        listed = torch.tensor(order, dtype=torch.int64, device="cpu")
        num_slow = sum(i < slow for i in order)
        coded[head, : len(order)] = torch.stack(
            (
                source.offsets[head][listed],
                source.widths[head][listed],
                listed,
                torch.tensor(_runs([(i >= slow, widths[i]) for i in order]), dtype=torch.int64, device="cpu"),
            ),
            dim=-1,
        ).to(torch.int32)
        counts[head, 0], counts[head, 1] = num_slow, len(order) - num_slow
        columns = source.decoder[head, slow:][:, listed[num_slow:]]  # [fast, coded]
        fast_map[head, :, : columns.shape[1]] = columns[_in_fours(frame.fast_pairs)].transpose(1, 2)
    offsets = torch.arange(ANCHOR_LENGTH, dtype=torch.float64, device="cpu")
    angles = frame.frequencies[frame.slow_pairs :, None] * offsets  # [pairs, offsets]
    levels, trees = (torch.zeros(MAX_WIDTH + 1, TABLE, dtype=torch.float32, device="cpu") for _ in range(2))
    planes = torch.zeros(MAX_WIDTH + 1, 4 * TABLE, dtype=torch.uint8, device="cpu")
    used, trellis = sorted({*source.widths.flatten().tolist()} - {0}), source.coding == "trellis"
    books = {width: torch.tensor(source.levels[width], dtype=torch.float32, device="cpu") for width in used}
    joint = {width: torch.tensor(source.unions[width], dtype=torch.float32, device="cpu") for width in used}
    for width, book in books.items():
        levels[width, : 1 << width] = book
        boundaries = torch.tensor(source.boundaries[width], dtype=torch.float32, device="cpu")
        trees[width, 1 : 1 << width] = boundaries[_tree_order(1 << width)]
    for width, book in (_halves(joint) if trellis else books).items():
        if 16 <= book.numel() < TABLE:
            by_bytes = book.contiguous().view(torch.uint8).view(16, -1, 4)  # [high bits, low bits, byte]
            planes[width, : 4 * book.numel()] = by_bytes.permute(1, 2, 0).flatten()
    unions, subsets = _unions(joint if trellis else None)
    tensors = {
        "counts": counts,
        "coded": coded,
        "order": frame.order.to(torch.int32),
        "frequencies": frame.frequencies,
        "mean": source.mean,
        "fast_map": fast_map,
        "offset_cos": angles.cos().float(),
        "offset_sin": angles.sin().float(),
        "levels": levels,
        "planes": planes,
        "gains": source.gains,
        "encoder": source.encoder,
        "weights": source.weights,
        "trees": trees,
        "factors": torch.tensor(source.gain_search, dtype=torch.float32, device="cpu"),
        "unions": unions,
        "subsets": subsets,
    }
    pairs = (frame.slow_pairs, frame.fast_pairs)
    sizes = (heads, dim, slow, *pairs, source.words, len(source.gain_search), int(trellis) * source.passes)
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return Constants(sizes, held, source.decoder.contiguous())


def _runs(keys: list[tuple[bool, int]]) -> list[int]:
    """How many keys from each one on are equal to it."""
    runs: list[int] = []
    for key, following in zip(reversed(keys), [None, *reversed(keys)], strict=False):
        runs.append(runs[-1] + 1 if key == following else 1)
    return runs[::-1]


def _in_fours(pairs: int) -> Tensor:
    """The fast dimensions in fours, ``[pairs / 2, 4]``: two first halves of pairs, then their second halves."""
    first = torch.arange(pairs, dtype=torch.int64, device="cpu").view(-1, 2)
    return torch.cat((first, first + pairs), dim=1)


def _unions(books: Books | None) -> tuple[Tensor, Tensor]:
    """Union codebooks by width, and their subsets as levels and search trees; empty without a trellis."""
    widths = 0 if books is None else MAX_WIDTH + 1
    unions = torch.zeros(widths, 2 * TABLE, dtype=torch.float32, device="cpu")
    subsets = torch.zeros(widths, 4, 2, TABLE // 2, dtype=torch.float32, device="cpu")
    for width, book in (books or {}).items():
        own = book.view(-1, 4).T  # every fourth level
        count = own.shape[1]
        unions[width, : 2 << width] = book
        subsets[width, :, 0, :count] = own
        subsets[width, :, 1, 1:count] = ((own[:, 1:] + own[:, :-1]) / 2)[:, _tree_order(count)]
    return unions, subsets


def _halves(books: Books) -> dict[int, Tensor]:
    """The upper halves of union codebooks, from which kernels know the lower ones; the whole one of 3 bits."""
    for width, book in books.items():
        if not torch.equal(book, -book.flip(0)):
            raise ValueError(f"the union codebook of {width} bits is not symmetric about zero")
    return {width: book if width == 3 else book[1 << width :] for width, book in books.items()}


@functools.cache
def _tree_order(count: int) -> list[int]:
    """Boundaries between ``count`` values in breadth-first order of their balanced search tree."""
    order, half = list[int](), count // 2
    while half:
        order += range(half - 1, count - 1, 2 * half)
        half //= 2
    return order


def _map(constants: Constants, role: Role) -> Tensor:
    """The part of the decoder that attention uses: ``[H, slow, C]`` for keys, ``[H, C, D]`` for values; rows padded."""
    heads, dim, slow = constants.sizes[:3]
    rows, columns = (slow, dim) if role == "key" else (dim, dim)
    table = torch.zeros(heads, rows, -(-columns // PAD) * PAD, dtype=torch.float32, device="cpu")
    for head in range(heads):
        count = int(constants.tensors["counts"][head, 0])
        listed = constants.tensors["coded"][head, :count, 2].long()
        part = constants.decoder[head, :slow][:, listed]
        if role == "key":
            table[head, :, :count] = part
        else:
            table[head, :count, :dim] = part.T
    return table
