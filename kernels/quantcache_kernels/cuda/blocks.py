"""How a cache's blocks lie in memory for the CUDA kernels: tiles of 16 coefficients in the order of the tensor cores.

A block holds 64 tokens of all heads of one batch row and one side. A head's coefficients are sorted by width, the
widest first, those of fast dimensions behind the others. Sixteen are a tile. Eight are half of one, and all their codes
take as many bits as the widest's. Every one of 32 lanes has 16 codes of each half, in registers of two; lane 4 g + j::

    keys    tokens 8 g to 8 g + 7 of coefficients 2 j and 2 j + 1 of the half
            register t: token 8 g + t, the coefficients are its halves
    values  tokens 16 j to 16 j + 15 of coefficient g of the half
            register t: tokens 16 j + t and 16 j + 8 + t

Codes are cut into fields of 4, 2 and 1 bits. A lane has two words of each 4-bit field, one of a 2-bit field and half a
word of a 1-bit field; a field's words lie side by side for all lanes. Register t is 2 t bits up in a field of 2 bits,
its halves 16 bits apart, so that registers t and t + 4 are in all four bytes alike; in a 1-bit field the halves are
side by side. A 4-bit field has registers 0, 1, 4 and 5 in its first word, 4 bits from each other, and the others in its
second. Of scalar codes that are looked up by magnitude, the signs of registers 1 and 4, and of 3 and 6, are in each
other's place: then those of four levels that are looked up at once are in all four bytes alike.

A trellis has fields for its levels' k - 1 bits. Its path bits come first, in one word of a lane for both halves of a
tile: those of register t are 2 t bits up, and the second half of the tile is a bit above the first.

Shapes: B batch, H key/value heads, D dimension, S slots (16 times the tiles), n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from quantcache_kernels.cuda.tables import PLACES, stored_codes, swapped
from quantcache_kernels.interface import BLOCK, FIELDS, SideConstants

TILE, HALF = 16, 8
"""Coefficients of a tile, and those that share a width."""

LANES = 32

WORDS = 16
"""Of a bit of the codes of half a tile."""

TABLED = 8
"""Added to the width of half a tile whose levels are looked up."""

BYTE_PLACES = 7
"""Bits of a place up to which codes are bytes on their way to a polynomial."""

PATH_BIT = 7
"""Where a byte has a trellis' path bit, above its level's."""


@dataclass(frozen=True)
class BlockLayout:
    """Where the codes of one side of a layer lie.

    Attributes:
        dims: Coefficient of every slot, -1 for none, ``[H, S]`` int64 on the CPU.
        widths: Bits of the codes of every half of a tile, 0 where a head has none, ``[H, S / 8]`` int64 on the CPU.
        own_widths: Bits of every slot's coefficient, 0 for none, ``[H, S]`` int64 on the CPU.
        slow_tiles: Tiles of slow dimensions; they come first.
        dim: D.
        is_trellis: Whether codes are paths through a trellis.
    """

    dims: Tensor
    widths: Tensor
    own_widths: Tensor
    slow_tiles: int
    dim: int
    is_trellis: bool
    _groups: dict[torch.device, tuple[tuple[int, Tensor, Tensor], ...]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, constants: SideConstants) -> BlockLayout:
        """Lay a side out.

        Args:
            constants: The side, on the CPU.

        Returns:
            The layout.
        """
        parts, widths = [], constants.widths.to(torch.int64)
        for first, last in ((0, constants.num_slow), (constants.num_slow, constants.dim)):
            own = widths[:, first:last]
            tiles = -(-int((own > 0).sum(1).max()) // TILE) if own.numel() else 0
            if not first:
                tiles = max(tiles, 1)  # one of nothing where a side has no codes
            order = own.argsort(dim=1, descending=True, stable=True)[:, : TILE * tiles]
            coded = own.gather(1, order) > 0
            dims = torch.where(coded, order + first, -1)
            parts.append(torch.nn.functional.pad(dims, (0, TILE * tiles - dims.shape[1]), value=-1))
        dims = torch.cat(parts, dim=1)
        own = torch.where(dims < 0, 0, widths.gather(1, dims.clamp_min(0)))
        return cls(
            dims,
            own.unflatten(1, (-1, HALF)).amax(-1),
            own,
            parts[0].shape[1] // TILE,
            constants.dim,
            constants.coding == "trellis",
        )

    @property
    def heads(self) -> int:
        """H."""
        return self.dims.shape[0]

    @property
    def tiles(self) -> int:
        """Tiles that every head has room for."""
        return self.dims.shape[1] // TILE

    @cached_property
    def words(self) -> int:
        """Words of a block and batch row."""
        return int(self.tile_words.sum())

    @cached_property
    def tile_words(self) -> Tensor:
        """Words of every tile, ``[H, tiles]`` int64: a lane's word of path bits is there for half a tile too."""
        words = WORDS * self.widths
        if self.is_trellis:
            words[:, 1::2] = torch.where(self.widths[:, 0::2] > 0, words[:, 1::2].clamp_min(WORDS), 0)
        return words.unflatten(1, (-1, 2)).sum(-1)

    @cached_property
    def tabled(self) -> Tensor:
        """Whether levels of half a tile are looked up, ``[H, S / 8]`` bool.

        They are of few bits, where the two coefficients of any lane have one width.
        """
        pairs = self.own_widths.view(self.heads, -1, HALF // 2, 2)
        alike = ((pairs[..., 0] == pairs[..., 1]) | (pairs[..., 1] == 0)).all(-1)
        return alike & (self.widths > 0) & (self.widths + self.is_trellis <= PLACES)

    @cached_property
    def kinds(self) -> Tensor:
        """How the halves of every tile are decoded, ``[H, tiles]`` int64: four bits each, the second half's above."""
        halves = self.widths + TABLED * self.tabled
        return torch.where(self.widths[:, 0::2] > 0, halves[:, 0::2] | halves[:, 1::2] << 4, 0)

    def recoded(self) -> list[tuple[Tensor, Tensor]]:
        """Coefficients whose codes are stored as others, and what each byte becomes and came from, ``[2, 256]``."""
        stored = torch.where(self.tabled, self.widths, 0).repeat_interleave(HALF, dim=1)
        found = []
        for width in range(1, PLACES + 1):
            for own in range(1, width + 1):
                slots = (stored == width) & (self.own_widths == own)
                codes = torch.arange(1 << own - self.is_trellis, dtype=torch.int64, device="cpu")
                became = stored_codes(codes, width, own, self.is_trellis)
                if bool(slots.any()) and not torch.equal(codes, became):
                    maps = torch.arange(1 << PATH_BIT, dtype=torch.int64, device="cpu").repeat(2, 1)
                    maps[0, codes], maps[1, became] = became, codes
                    found.append((self.coefficients()[slots], torch.cat((maps, maps + (1 << PATH_BIT)), dim=1)))
        return found

    def coefficients(self) -> Tensor:
        """Of every slot among those of all heads, H D for none, ``[H, S]`` int64."""
        first = self.dim * torch.arange(self.heads, dtype=torch.int64, device="cpu")[:, None]
        return torch.where(self.dims < 0, self.heads * self.dim, first + self.dims)

    def gather(self, values: Tensor, dim: int) -> Tensor:
        """Bring per-coefficient values into slot order.

        Args:
            values: ``[H, ..., D, ...]`` on the CPU.
            dim: Which dimension is D.

        Returns:
            The same with S in place of D, zero in slots without a coefficient.
        """
        shape = [1] * values.dim()
        shape[0], shape[dim] = self.dims.shape
        index = self.dims.view(shape)
        index = index.expand(*[size if i != dim else -1 for i, size in enumerate(values.shape)])
        return values.gather(dim, index.clamp_min(0)).masked_fill(index < 0, 0)

    def table(self) -> Tensor:
        """``HeadTiles`` of every head (codes.h), ``[H, 37]`` int32."""
        rows, offset = torch.zeros(self.heads, 37, dtype=torch.int32, device="cpu"), 0
        rows[:, 2] = (self.kinds[:, : self.slow_tiles] > 0).sum(1)
        rows[:, 3] = (self.kinds[:, self.slow_tiles :] > 0).sum(1)
        rows[:, 4 : 4 + self.tiles] = self.kinds
        rows[:, 36] = 4 * self.tile_words[:, : self.slow_tiles].sum(1)
        for head, words in enumerate(self.tile_words.sum(1).tolist()):
            rows[head, 0], rows[head, 1] = offset, 4 * words
            offset += 4 * words
        return rows

    def groups(self, device: torch.device) -> tuple[tuple[int, Tensor, Tensor], ...]:
        """By width, half tiles of all heads, made once for a device: copying them there would make the CPU wait.

        Args:
            device: Where codes are.

        Returns:
            Width, coefficients ``[8 m]`` (H D for none) and words of fields ``[16 W m]`` (of a trellis 16 (W - 1) m).
            ``TABLED`` is added to the width of scalar codes with signs. Of a trellis, width 0 stands for whole tiles,
            ``[16 m]``, and their words of path bits ``[32 m]``. -1 stands for coefficients whose codes are stored as
            something else: what each byte becomes and came from, ``[512]``.
        """
        found = self._groups.get(device)
        if found is None:
            made = tuple(
                (w, dims.flatten().to(device), words.flatten().to(device)) for w, dims, words in self._by_width()
            )
            found = self._groups.setdefault(device, made)
        return found

    def held(self) -> list[Tensor]:
        """Every tensor on a device."""
        return [tensor for groups in self._groups.values() for group in groups for tensor in group[1:]]

    def _by_width(self) -> list[tuple[int, Tensor, Tensor]]:
        coefficient = self.coefficients().view(-1, HALF)
        widths, paths = self.widths.view(-1, 2), int(self.is_trellis)
        tiles = self.tile_words.flatten()
        tiles = tiles.cumsum(0) - tiles  # first word
        fields = (widths - paths).clamp_min(0)  # bits
        first = tiles[:, None] + WORDS * torch.stack((0 * tiles, fields[:, 0]), dim=1) + 2 * WORDS * paths
        found = []
        signed = self.tabled & (self.widths >= PLACES - 1) & (not self.is_trellis)
        kinds = (self.widths + TABLED * signed).flatten()
        for kind in sorted(set(kinds.tolist())):
            width = kind & (TABLED - 1) or kind
            if width > paths:
                own = (kinds == kind).nonzero().flatten()
                inside = torch.arange(WORDS * (width - paths), dtype=torch.int64, device="cpu")
                found.append((kind, coefficient[own], first.flatten()[own][:, None] + inside))
        if self.is_trellis and bool(widths.any()):
            own = widths[:, 0].nonzero().flatten()
            inside = torch.arange(LANES, dtype=torch.int64, device="cpu")
            found.append((0, coefficient.view(-1, TILE)[own], tiles[own][:, None] + inside))
        return [(-1, *recoded) for recoded in self.recoded()] + found

    def pack(self, codes: Tensor, values: bool) -> Tensor:
        """Pack codes.

        Args:
            codes: A byte for each code, ``[n, B, H D, 64]`` uint8; of a trellis the level in its subset, and the path
                bit above it (:data:`PATH_BIT`).
            values: Whether they are values.

        Returns:
            int32 words, ``[n, B, words]``.
        """
        lead, device = codes.shape[:2], codes.device
        place = _places(values, device)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, 1))
        out = torch.zeros(*lead, self.words, dtype=torch.int32, device=device)
        for width, dims, words in self.groups(device):
            if width < 0:
                codes[:, :, dims] = words[:256].to(torch.uint8)[codes[:, :, dims].long()]
                continue
            halves = codes[:, :, dims].unflatten(2, (-1, HALF)).flatten(3)  # [n, B, m, 8 64]
            own = halves[..., place]  # [n, B, m, 32, 8, 2]
            packed = self._pack_fields(own, width) if width else _pack_paths(own)
            out[:, :, words] = (packed - (packed >> 31 << 32)).to(torch.int32).flatten(2)
        return out

    def _pack_fields(self, own: Tensor, width: int) -> Tensor:
        """Words of lanes' codes ``[..., 32, 8, 2]``, ``[..., 16 W]`` int64."""
        parts = []
        if width > TABLED:
            width -= TABLED
            own = _change_signs(own, width)
        for length, above in self._fields(width):
            bits = (own >> above & ((1 << length) - 1)).to(torch.int64)
            if length == 4:  # two words
                bits = bits[..., _registers(1, 2, own.device), :].unflatten(-2, (2, 4))
            words = (bits << _shifts(length, own.device)).sum((-1, -2)).flatten(3)
            parts.append(words[..., 0::2] | words[..., 1::2] << 16 if length == 1 else words)
        return torch.cat(parts, dim=-1)

    def unpack(self, words: Tensor, values: bool) -> Tensor:
        """Invert :meth:`pack`.

        Args:
            words: int32, ``[n, B, words]``.
            values: Whether they are values.

        Returns:
            ``[n, B, H D, 64]`` uint8; zero where a coefficient has no codes.
        """
        lead, device = words.shape[:2], words.device
        place = _places(values, device)
        codes = torch.zeros(*lead, self.heads * self.dim + 1, BLOCK, dtype=torch.uint8, device=device)
        for width, dims, words_of in reversed(self.groups(device)):
            if width < 0:
                codes[:, :, dims] = words_of[256:].to(torch.uint8)[codes[:, :, dims].long()]
                continue
            own = words[:, :, words_of]
            lanes = self._unpack_fields(own, width) if width else _unpack_paths(own)  # [n, B, m, 32, 8, 2]
            halves = lanes.new_zeros(*lanes.shape[:3], HALF * BLOCK)
            halves[..., place] = lanes
            found = halves.unflatten(3, (HALF, BLOCK)).flatten(2, 3)
            codes[:, :, dims] |= found
        return codes[:, :, :-1]

    def _unpack_fields(self, words: Tensor, width: int) -> Tensor:
        if width > TABLED:
            return _change_signs(self._unpack_fields(words, width - TABLED), width - TABLED)
        size = WORDS * (width - self.is_trellis)
        words = words.unflatten(2, (-1, size))
        codes, first = words.new_zeros(*words.shape[:-1], LANES, 8, 2, dtype=torch.uint8), 0
        for length, above in self._fields(width):
            own = words[..., first : first + WORDS * length]
            if length == 1:
                own = torch.stack((own & 0xFFFF, own >> 16), dim=-1).flatten(-2)
            own = own.unflatten(-1, (LANES, -1))[..., None, None]  # [..., 32, 1 or 2, 1, 1]
            bits = (own >> _shifts(length, words.device) & ((1 << length) - 1)).to(torch.uint8).flatten(-3, -2)
            codes |= (bits[..., _registers(1, 2, words.device), :] if length == 4 else bits) << above
            first += WORDS * length
        return codes

    def _fields(self, width: int) -> list[tuple[int, int]]:
        """Fields of a width in the order of their words: length, and which bit of a byte is its lowest."""
        if self.is_trellis and width == 4:
            return [(2, 0), (1, 2)]  # two bits join the subset's
        fields, above = [], width - self.is_trellis
        for length in FIELDS[above]:
            above -= length
            fields.append((length, above))
        return fields


@cache
def _registers(one: int, other: int, device: torch.device) -> Tensor:
    """Registers of a lane in another order: two bits of their number are in each other's place, ``[8]`` int64."""
    return swapped(torch.arange(8, dtype=torch.int64, device=device), one, other)


def _change_signs(own: Tensor, width: int) -> Tensor:
    """Lanes' scalar codes ``[..., 32, 8, 2]`` with signs in the order of look-ups, or back from it."""
    sign = 1 << 3 if width == PLACES - 1 else 1
    return own & (255 - sign) | own[..., _registers(0, 2, own.device), :] & sign


def _path_shifts(device: torch.device) -> Tensor:
    """Where a lane's word has the path bits of either half of a tile, ``[2, 1, 8, 2]`` int32."""
    half, register, side = (torch.arange(size, dtype=torch.int32, device=device) for size in (2, 8, 2))
    return half[:, None, None, None] + 2 * register[:, None] + 16 * side


def _pack_paths(own: Tensor) -> Tensor:
    """Words of path bits of lanes' codes ``[n, B, 2 m, 32, 8, 2]``, ``[n, B, m, 32]`` int64."""
    bits = (own >> PATH_BIT).to(torch.int64).unflatten(2, (-1, 2))
    return (bits << _path_shifts(own.device)).sum((-1, -2, 3))


def _unpack_paths(words: Tensor) -> Tensor:
    """Invert :func:`_pack_paths`; words ``[n, B, 32 m]``."""
    own = words.unflatten(2, (-1, 1, LANES))[..., None, None]
    return ((own >> _path_shifts(words.device) & 1) << PATH_BIT).to(torch.uint8).flatten(2, 3)


def _shifts(length: int, device: torch.device) -> Tensor:
    """Where a word of a field has the codes of its registers' halves, ``[registers, 2]`` int32."""
    step = max(2, length) * torch.arange(min(8, 16 // length), dtype=torch.int32, device=device)
    half = 1 if length == 1 else 16  # half a word for a single bit
    return step[:, None] + half * torch.arange(2, dtype=torch.int32, device=device)


@cache
def _places(values: bool, device: torch.device) -> Tensor:
    """Place of every lane's code among a half's coefficients times tokens, ``[32 lanes, 8 registers, 2 halves]``."""
    sizes = (torch.arange(size, dtype=torch.int64, device=device) for size in (LANES, 8, 2))
    lane, register, half = torch.meshgrid(*sizes, indexing="ij")
    row, column = lane // 4, lane % 4
    if values:
        return row * BLOCK + 16 * column + 8 * half + register
    return (2 * column + half) * BLOCK + 8 * row + register
