"""Bit-exact packing of one block of codes into word-aligned bit fields.

A block holds :data:`BLOCK` = 64 tokens. The codes of one dimension of one block are stored together in ``2 * width``
32-bit words, split into 4-, 2- and 1-bit fields (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1, 8 = 4+4, high bits first), so
that no code ever straddles a word. Within a field of ``f`` bits the 64 tokens lie in ``2f`` words: token ``t`` is in
word ``t % 2f`` at bit ``f * (t // 2f)``. A vector unit unpacks such a field with one broadcast and one variable shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache_kernels.interface import BLOCK as BLOCK
from quantcache_kernels.interface import FIELDS as FIELDS
from quantcache_kernels.interface import MAX_WIDTH as MAX_WIDTH


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack the codes of whole blocks into 32-bit words.

    Args:
        codes: Integer codes in ``[0, 2**width)``, shape ``[..., 64]`` (tokens last).
        width: Code width in bits, 0 to 8.

    Returns:
        int32 words, shape ``[..., 2 * width]``.
    """
    codes = codes.to(torch.int64)
    parts = []
    shift = width
    for field in FIELDS[width]:
        shift -= field
        bits = (codes >> shift) & ((1 << field) - 1)
        per_word = bits.unflatten(-1, (32 // field, 2 * field))  # [..., shift step, word]
        steps = torch.arange(0, 32, field, dtype=torch.int64, device=codes.device).unsqueeze(-1)
        parts.append((per_word << steps).sum(-2))
    if not parts:
        return codes.new_zeros((*codes.shape[:-1], 0), dtype=torch.int32)
    words = torch.cat(parts, dim=-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)  # to the signed range, without relying on overflow


def unpack(words: Tensor, width: int) -> Tensor:
    """Invert :func:`pack`.

    Args:
        words: int32 words, shape ``[..., 2 * width]``.
        width: Code width in bits, 0 to 8.

    Returns:
        int32 codes, shape ``[..., 64]``.
    """
    codes = None
    offset = 0
    for field in FIELDS[width]:
        steps = torch.arange(0, 32, field, device=words.device, dtype=torch.int32).unsqueeze(-1)
        part = words[..., None, offset : offset + 2 * field] >> steps
        part = (part & ((1 << field) - 1)).flatten(-2)
        codes = part if codes is None else (codes << field) | part
        offset += 2 * field
    if codes is None:
        return words.new_zeros((*words.shape[:-1], BLOCK))
    return codes
