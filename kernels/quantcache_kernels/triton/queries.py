"""Queries in coded coordinates: brought into the frame of an anchor and multiplied by the keys' decoder.

Shapes: B batch, H key/value heads, R = G Tq rows of queries with the query index running fastest, Ss slots of the slow
part of a key, P half of its fast part (padded to a multiple of 16).
"""

from __future__ import annotations

from quantcache_kernels.triton.codes import rotation
from quantcache_kernels.triton.runtime import jit, kernel, tl


@kernel("q_batch", "q_head", "q_query", "R", "count", "batch", "anchors")
def query_kernel(
    query,  # [B, Hq, Tq, D]
    order, partner, sign, turns,  # the keys' frame
    decoder,  # [H, D, Ss] float32, slow rows by slow slots
    mean,  # [H, D] float32
    norms,  # [H, 2] float32: largest column norm of the decoder, unit of the fast part
    block_table, left_padding,
    scaling,
    base,  # log2(e), or 1 where a soft cap comes in between
    out,  # [anchors, B, H, R, Ss + 2 P]
    out_scale,  # [anchors, B, H, 2, R] float32: unit of the row, and its score against the slow mean
    q_batch, q_head, q_query, q_dim, R, count, batch, anchors,
    D: tl.constexpr, DS: tl.constexpr, SS: tl.constexpr, SP: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
    TOP: tl.constexpr, PAIRED: tl.constexpr, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, ANCHORS: tl.constexpr,
):  # fmt: skip
    """Queries in coded coordinates, for some anchors: slow slots, then the two halves of the fast part.

    The decoder is read once for all rows of all anchors of a program, 16 dimensions at a time.
    """
    anchor, head, b = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS), tl.program_id(1), tl.program_id(2) % batch
    row = (tl.program_id(2) // batch) * ROWS + tl.arange(0, ROWS)
    heads = tl.num_programs(1)
    source = query + b.to(tl.int64) * q_batch + head.to(tl.int64) * (R // count) * q_head
    source += ((row // count) * q_head + (row % count) * q_query)[:, None]
    block = anchor * 2 if PAIRED else anchor
    position = tl.load(block_table + block * 3 + 2, mask=anchor < anchors, other=0).to(tl.int64)
    if HAS_STARTS:
        position -= tl.load(left_padding + b)

    slot = tl.arange(0, SP)
    y = tl.zeros((ANCHORS * ROWS, SP), tl.float32)
    squares = tl.zeros((ANCHORS * ROWS,), tl.float32)
    offset = tl.zeros((ANCHORS * ROWS,), tl.float32)
    for first in range(0, DS, 16):
        dim = first + tl.arange(0, 16)
        inside = dim < DS
        framed = in_frame(
            source, order, partner, sign, turns, position, row < R, dim, inside, q_dim, scaling, ANCHORS * ROWS
        )
        squares += tl.sum(framed * framed, axis=1)
        offset += tl.sum(framed * tl.load(mean + head * D + dim, mask=inside, other=0.0)[None, :], axis=1)
        if SS > 0:
            matrix = tl.load(
                decoder + (head * D + dim)[:, None] * SS + slot[None, :],
                mask=inside[:, None] & (slot < SS)[None, :],
                other=0.0,
            )
            y = tl.dot(framed, matrix, y, input_precision=PRECISION)
    for first in range(DS, D, 16):
        dim = first + tl.arange(0, 16)
        framed = in_frame(
            source, order, partner, sign, turns, position, row < R, dim, dim < D, q_dim, scaling, ANCHORS * ROWS
        )
        squares += tl.sum(framed * framed, axis=1)
    line = ((anchor.to(tl.int64) * batch + b) * heads + head)[:, None]
    valid = ((anchor < anchors)[:, None] & (row < R)[None, :]).reshape(ANCHORS * ROWS)

    fast_unit = tl.load(norms + head * 2 + 1)
    bound = tl.sqrt(squares) * tl.maximum(tl.load(norms + head * 2), fast_unit) * (1.0 / TOP)
    unit = tl.where(bound > 0, tl.exp2(tl.ceil(tl.log2(tl.maximum(bound, 1e-30)))), 1.0)
    place = (line * 2 * R + row[None, :]).reshape(ANCHORS * ROWS)
    tl.store(out_scale + place, unit * base, mask=valid)
    tl.store(out_scale + place + R, offset * base, mask=valid)

    target = out + ((line * R + row[None, :]) * (SS + 2 * P)).reshape(ANCHORS * ROWS)[:, None]
    if SS > 0:
        y = y / unit[:, None]
        tl.store(target + slot[None, :], y.to(out.dtype.element_ty), mask=valid[:, None] & (slot < SS)[None, :])
    # The fast part turns with its offset from the anchor; its query is stored as it is, in the fast unit.
    for first in range(DS, D, 16):
        dim = first + tl.arange(0, 16)
        framed = in_frame(
            source, order, partner, sign, turns, position, row < R, dim, dim < D, q_dim, scaling, ANCHORS * ROWS
        )
        fast = framed / unit[:, None] * fast_unit
        column = SS + dim - DS + tl.where(dim - DS >= HALF, P - HALF, 0)
        tl.store(target + column[None, :], fast.to(out.dtype.element_ty), mask=valid[:, None] & (dim < D)[None, :])


@jit
def in_frame(
    source, order, partner, sign, turns, position, valid_row, dim, inside, q_dim, scaling, LINES: tl.constexpr
):  # fmt: skip
    """Some dimensions of rows of queries, scaled, in the frame of every anchor: ``[anchors * rows, dimensions]``."""
    own = tl.load(order + dim, mask=inside, other=0)
    other = tl.load(order + tl.load(partner + dim, mask=inside, other=0), mask=inside, other=0)
    cos, sin = rotation(position[:, None], tl.load(turns + dim, mask=inside, other=0)[None, :])
    sin *= tl.load(sign + dim, mask=inside, other=0.0)[None, :]
    there = valid_row[:, None] & inside[None, :]
    first = tl.load(source + own[None, :] * q_dim, mask=there, other=0.0).to(tl.float32) * scaling
    second = tl.load(source + other[None, :] * q_dim, mask=there, other=0.0).to(tl.float32) * scaling
    framed = first[None, :, :] * cos[:, None, :] + second[None, :, :] * sin[:, None, :]
    return framed.reshape(LINES, dim.shape[0])
