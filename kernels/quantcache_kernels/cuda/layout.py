"""How codes lie in memory for the CUDA kernels: in the order in which the tensor cores take them.

A row holds 128 tokens (an anchor, two blocks) of all heads of one batch row. A head's part is keys, then values::

    keys    128 gains (half precision), tiles of 16 coefficients
    values  128 gains, the largest gain of either block (float32, and 8 bytes of padding), tiles

Coefficients are sorted by width, the widest first, and a tile has one width w: every one of 32 lanes has w words for
either block, the two blocks side by side. These 32 w bits are 32 codes, in registers of four:

    keys    register r of lane 4 g + j: token 8 g + r, coefficients 4 j to 4 j + 3
    values  register 2 r + h of lane 4 g + j: coefficient g + 8 h, tokens 16 j + 2 r + (0, 1, 8, 9)

Widths above 4 are stored as the level itself, one signed byte.

Shapes: B batch, H key/value heads, S coefficients of a head, N anchors, T = 128 N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

TILE = 16
"""Coefficients that share a width."""

ANCHOR = 128
"""Tokens in a row."""

CLASSES = (8, 4, 3, 2, 1)
"""Stored widths in the order in which a head's tiles lie."""

MAGIC = 0x4B400000
"""What integer sums start from; see attention.h."""

GAIN_BYTES = 2 * ANCHOR
"""Gains of an anchor, in half precision."""

PEAK_BYTES = 16
"""The largest value gain of either block, float32, and padding."""

QUERY_EXTRA = 128
"""Bytes of a column tile after its fragments: 8 integers, 8 units, 8 offsets, padding."""


def stored_width(width: int) -> int:
    """Bits that a code takes."""
    return width if width <= 4 else 8


def largest_level(width: int) -> int:
    """The largest integer level of a width: codebooks of 16 levels are stored as 1 to 127, around 64."""
    return 63 if width == 4 else 127


def integer_levels(levels: Sequence[float]) -> list[int]:
    """A codebook as integers around zero; a single zero for the one without bits."""
    width = (len(levels) - 1).bit_length()
    return [round(x * largest_level(width) / max(levels)) for x in levels] if width else [0]


def steps(levels: Sequence[Sequence[float]]) -> Tensor:
    """What one unit of an integer level stands for, by width; 0 for width 0. ``[9]`` float64."""
    return torch.tensor(
        [0.0] + [max(book) / largest_level(w) for w, book in enumerate(levels) if w],
        dtype=torch.float64,
        device="cpu",
    )


def make_tables(levels: Sequence[Sequence[float]]) -> list[int]:
    """The tables of ``Tables`` in attention.h, as 14 words.

    Args:
        levels: Codebooks of every width from 0 to 8.

    Returns:
        Unsigned words.
    """
    one, two, three, four = (integer_levels(levels[w]) for w in (1, 2, 3, 4))
    eights = [
        [one[i & 1] for i in range(8)],
        [one[i >> 1 & 1] for i in range(8)],
        [one[i >> 2] for i in range(8)],
        [two[i & 3] for i in range(8)],
        [two[i >> 1] for i in range(8)],
        three,
        [64 + x for x in four[:8]],
        [64 + x for x in four[8:]],
    ]
    words = [sum((x & 255) << 8 * i for i, x in enumerate(eight[h : h + 4])) for eight in eights for h in (0, 4)]
    del words[3], words[1]  # the first two tables have equal halves
    return words


@cache
def _bit_places(width: int) -> Tensor:
    """Word and bit of every bit of every code of a lane: ``[8 registers, 4 bytes, width, 2]``."""
    places = torch.zeros(8, 4, width, 2, dtype=torch.int64, device="cpu")
    for register in range(8):
        for byte in range(4):
            for bit in range(width):
                nibble = 4 * (byte + 4 * (register % 2))
                if width == 8:
                    place = (register, 8 * byte + bit)
                elif width == 4 or (width == 3 and register < 6):
                    place = (register // 2, nibble + bit)
                elif width == 3:
                    place = (bit, nibble + 3)
                elif width == 2:
                    place = (register // 4, nibble + bit + 2 * (register // 2 % 2))
                else:
                    place = (0, nibble + register // 2)
                places[register, byte, bit] = torch.tensor(place, dtype=torch.int64, device="cpu")
    return places


@cache
def _code_places(values: bool) -> tuple[Tensor, Tensor]:
    """Token of the block and coefficient of the tile of every code, two ``[32 lanes, 8 registers, 4 bytes]``."""
    sizes = (torch.arange(size, dtype=torch.int64, device="cpu") for size in (32, 8, 4))
    lane, register, byte = torch.meshgrid(*sizes, indexing="ij")
    row, column = lane // 4, lane % 4
    if values:
        return 16 * column + 2 * (register // 2) + byte % 2 + 8 * (byte // 2), row + 8 * (register % 2)
    return 8 * row + register, 4 * column + byte


def _lane_pieces(width: int) -> list[tuple[int, int]]:
    """A lane reads its words 16 bytes at a time, then 8: first word and number of every piece."""
    return [(i, min(4, 2 * width - i)) for i in range(0, 2 * width, 4)]


def pack_tiles(codes: Tensor, width: int, values: bool) -> Tensor:
    """Pack tiles of one width.

    Args:
        codes: Codes (or, of 8 bits, levels) ``[..., 128, 16 n]``, any integer type.
        width: Stored width.
        values: Whether they are values.

    Returns:
        int32 words, ``[..., n, 64 width]``.
    """
    token, coefficient = (x.to(codes.device) for x in _code_places(values))
    tiles = codes.long().unflatten(-1, (-1, TILE)).unflatten(-3, (2, 64))  # [..., 2, 64, n, 16]
    own = tiles[..., token, :, coefficient]  # [32, 8, 4, ..., 2, n]
    own = own.movedim((0, 1, 2), (-3, -2, -1)).movedim(-5, -3)  # [..., n, 32, 2, 8, 4]
    places = _bit_places(width)
    words = torch.zeros(*own.shape[:-2], width, dtype=torch.int64, device=codes.device)
    for register in range(8):
        for byte in range(4):
            for bit in range(width):
                word, place = places[register, byte, bit].tolist()
                words[..., word] |= (own[..., register, byte] >> bit & 1) << place
    flat = words.flatten(-2)  # [..., n, 32, 2 width]
    joined = torch.cat([flat[..., i : i + size].flatten(-2) for i, size in _lane_pieces(width)], dim=-1)
    return torch.where(joined >= 1 << 31, joined - (1 << 32), joined).to(torch.int32)


def unpack_tiles(words: Tensor, width: int, values: bool) -> Tensor:
    """Invert :func:`pack_tiles`; levels of 8 bits come back signed.

    Args:
        words: int32, ``[..., n, 64 width]``.
        width: Stored width.
        values: Whether they are values.

    Returns:
        int64 codes, ``[..., 128, 16 n]``.
    """
    pieces = [words[..., 32 * i : 32 * (i + size)].unflatten(-1, (32, size)) for i, size in _lane_pieces(width)]
    own = torch.cat(pieces, dim=-1).long().unflatten(-1, (2, width))  # [..., n, 32, 2, width]
    places = _bit_places(width).to(words.device)
    codes = torch.zeros(*own.shape[:-1], 8, 4, dtype=torch.int64, device=words.device)
    for bit in range(width):
        word, place = places[..., bit, 0], places[..., bit, 1]
        codes |= (own[..., word] >> place & 1) << bit
    if width == 8:
        codes = torch.where(codes > 127, codes - 256, codes)
    token, coefficient = (x.to(words.device) for x in _code_places(values))
    codes = codes.movedim(-3, -5).movedim(-4, 0)  # [n, ..., 2, 32, 8, 4]
    out = codes.new_zeros(*codes.shape[:-3], 64, TILE)
    out[..., token, coefficient] = codes
    return out.movedim(0, -2).flatten(-4, -3).flatten(-2)


@dataclass(frozen=True)
class Layout:
    """Where everything of a layer lies.

    Attributes:
        key_widths: Widths of the tiles of keys, descending, ``[H, S / 16]``.
        value_widths: Widths of the tiles of values.
    """

    key_widths: tuple[tuple[int, ...], ...]
    value_widths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for name, sides in (("key", self.key_widths), ("value", self.value_widths)):
            for head, widths in enumerate(sides):
                if list(widths) != sorted(widths, reverse=True) or min(widths) < 0 or max(widths) > 8:
                    raise ValueError(
                        f"{name} widths of head {head} must fall from at most 8 to at least 0, got {widths}"
                    )

    @property
    def heads(self) -> int:
        """H."""
        return len(self.key_widths)

    @property
    def coefficients(self) -> int:
        """S."""
        return TILE * len(self.key_widths[0])

    def table(self) -> Tensor:
        """``HeadLayout`` of every head (attention.h), ``[H, 16]`` int32."""
        rows, offset = [], 0
        for keys, values in zip(self.key_widths, self.value_widths, strict=True):
            sizes = [sum(256 * stored_width(w) for w in side) for side in (keys, values)]
            key_bytes, value_bytes = sizes[0] + GAIN_BYTES, sizes[1] + GAIN_BYTES + PEAK_BYTES
            counts = [sum(stored_width(w) == c for w in side if w) for side in (keys, values) for c in CLASSES]
            rows.append([offset, key_bytes, offset + key_bytes, value_bytes, *counts, 0, 0])
            offset += key_bytes + value_bytes
        return torch.tensor(rows, dtype=torch.int32, device="cpu")

    def row_bytes(self) -> int:
        """Bytes of one row."""
        last = self.table()[-1]
        return int(last[2] + last[3])

    def bits(self) -> float:
        """Stored bits per element, gains included."""
        return 8 * self.row_bytes() / (2 * self.heads * ANCHOR * self.coefficients)

    def pack(self, keys: Tensor, key_gains: Tensor, values: Tensor, value_gains: Tensor) -> Tensor:
        """Pack codes in sorted order.

        Args:
            keys: ``[B, H, T, S]`` codes (integer levels where the width is above 4), T a multiple of 128.
            key_gains: ``[B, H, T]``.
            values: Like ``keys``.
            value_gains: Like ``key_gains``.

        Returns:
            ``[N, B, row_bytes]`` uint8.
        """
        batch, _, tokens, _ = keys.shape
        out = torch.zeros(tokens // ANCHOR, batch, self.row_bytes(), dtype=torch.uint8, device=keys.device)
        for head, row in enumerate(self.table().tolist()):
            for side, codes, gains in ((0, keys, key_gains), (1, values, value_gains)):
                own = codes[:, head].unflatten(1, (-1, ANCHOR)).transpose(0, 1)  # [N, B, 128, S]
                gain = gains[:, head].unflatten(1, (-1, ANCHOR)).transpose(0, 1).half().contiguous()
                place = row[2 * side]
                out[..., place : place + GAIN_BYTES] = gain.view(torch.uint8)
                place += GAIN_BYTES
                if side:
                    peaks = gain.unflatten(-1, (2, 64)).amax(-1).float()
                    out[..., place : place + 8] = peaks.view(torch.uint8)
                    place += PEAK_BYTES
                first = 0
                for width in (self.key_widths, self.value_widths)[side][head]:
                    if width:
                        words = pack_tiles(own[..., first : first + TILE], stored_width(width), bool(side)).flatten(-2)
                        out[..., place : place + 256 * stored_width(width)] = words.contiguous().view(torch.uint8)
                        place += 256 * stored_width(width)
                    first += TILE
        return out

    def unpack(self, rows: Tensor, levels: Sequence[Sequence[float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode rows to coefficients times gains: what the kernel attends on, in plain torch.

        Args:
            rows: ``[N, B, row_bytes]`` uint8.
            levels: Codebooks of every width from 0 to 8, which integer levels stand for.
            dtype: Of the result.

        Returns:
            Keys and values in sorted order, ``[B, H, T, S]``.
        """
        scale = steps(levels)
        sides = []
        for side, all_widths in enumerate((self.key_widths, self.value_widths)):
            heads = []
            for row, widths in zip(self.table().tolist(), all_widths, strict=True):
                place = row[2 * side]
                gains = rows[..., place : place + GAIN_BYTES].contiguous().view(torch.float16).to(dtype)  # [N, B, 128]
                place += GAIN_BYTES + side * PEAK_BYTES
                tiles = []
                for width in widths:
                    if not width:
                        tiles.append(gains.new_zeros(*gains.shape, TILE))
                        continue
                    size = 256 * stored_width(width)
                    words = rows[..., place : place + size].contiguous().view(torch.int32).unsqueeze(-2)
                    codes = unpack_tiles(words, stored_width(width), bool(side))
                    if width <= 4:
                        codes = torch.tensor(integer_levels(levels[width]), dtype=torch.int64, device=rows.device)[
                            codes
                        ]
                    tiles.append(codes.to(dtype) * float(scale[width]))
                    place += size
                heads.append((torch.cat(tiles, dim=-1) * gains.unsqueeze(-1)).transpose(0, 1).flatten(1, 2))
            sides.append(torch.stack(heads, dim=1))
        return sides[0], sides[1]

    def scaled_decoder(self, decoder: Tensor, levels: Sequence[Sequence[float]]) -> Tensor:
        """What sums of integer levels of values are multiplied by.

        Args:
            decoder: What sums of levels are multiplied by, ``[H, S (sorted), D]``.
            levels: Codebooks of every width from 0 to 8.

        Returns:
            float32, the same shape.
        """
        widths = torch.tensor(self.value_widths, dtype=torch.int64, device=decoder.device).repeat_interleave(
            TILE, dim=1
        )
        return (decoder * steps(levels).to(decoder.device)[widths].unsqueeze(-1)).float().contiguous()

    def query_bytes(self, group: int, precise: bool = True) -> int:
        """Bytes of the queries of one anchor, batch row and head."""
        return column_tiles(group, precise) * (8 * self.coefficients + QUERY_EXTRA)

    def pack_queries(
        self, queries: Tensor, offsets: Tensor, levels: Sequence[Sequence[float]], precise: bool = True
    ) -> Tensor:
        """Queries in twice eight bits (or in eight) in fragment order.

        A column tile holds eight columns: high and low bytes of four queries, or eight queries. First come the tiles of
        coefficients, of each all column tiles; then of every column tile where its columns' sums start, and the
        queries' units and offsets.

        Args:
            queries: In coded coordinates, sorted, times log2(e) and the softmax scale: a score in base 2 is the gain
                times the sum of queries times levels, plus the offset. ``[N, B, H, G, S]``, float.
            offsets: ``[N, B, H, G]``.
            levels: Codebooks of every width from 0 to 8.
            precise: Twice eight bits.

        Returns:
            ``[N, B, H, query_bytes]`` uint8.
        """
        group, coefficients = queries.shape[-2:]
        parts = column_tiles(group, precise)
        widths = torch.tensor(self.key_widths, dtype=torch.int64, device=queries.device).repeat_interleave(
            TILE, dim=1
        )  # [H, S]
        scaled = queries.float() * steps(levels).float().to(queries.device)[widths].unsqueeze(-2)
        largest = 127 * 128 if precise else 127
        unit = (scaled.abs().amax(-1) / largest).clamp_min(1e-30)  # [N, B, H, G]
        whole = (scaled / unit.unsqueeze(-1)).round().long()
        columns = torch.zeros(*queries.shape[:-2], 8 * parts, coefficients, dtype=torch.int64, device=queries.device)
        extra = torch.zeros(*queries.shape[:-2], parts, QUERY_EXTRA // 4, dtype=torch.int32, device=queries.device)
        stride = 2 if precise else 1
        where = range(0, stride * group, stride)
        if precise:
            columns[..., 0 : 2 * group : 2, :] = (whole + 64) >> 7
            columns[..., 1 : 2 * group : 2, :] = whole - ((whole + 64) >> 7 << 7)
        else:
            columns[..., :group, :] = whole
        centered = torch.where((widths == 4).unsqueeze(-2), columns, 0).sum(-1)
        extra[..., :8] = (MAGIC - 64 * centered).to(torch.int32).unflatten(-1, (parts, 8))
        for query, column in enumerate(where):
            extra[..., column // 8, 8 + column % 8] = unit[..., query].contiguous().view(torch.int32)
            extra[..., column // 8, 16 + column % 8] = offsets[..., query].float().contiguous().view(torch.int32)
        # Lane 4 g + j of a tile: column g, coefficients 4 j to 4 j + 3.
        fragments = (
            columns.unflatten(-2, (parts, 8)).unflatten(-1, (-1, 4, 4)).movedim(-3, -5).to(torch.int8).flatten(-5)
        )
        return torch.cat((fragments.contiguous().view(torch.uint8), extra.flatten(-2).view(torch.uint8)), dim=-1)


def column_tiles(group: int, precise: bool = True) -> int:
    """Tiles of eight columns that a group's queries take."""
    return -(-group // (4 if precise else 8))
