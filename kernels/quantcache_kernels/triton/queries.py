"""Queries in coded coordinates: brought into the frame of an anchor and multiplied by the keys' decoder.

Shapes: B batch, H key/value heads, R = G Tq rows of queries with the query index running fastest, Ss slots of the slow
part of a key, P half of its fast part (padded to a multiple of 16).
"""

from __future__ import annotations

from quantcache_kernels.triton.codes import angle
from quantcache_kernels.triton.runtime import kernel, tl


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
    D: tl.constexpr, DP: tl.constexpr, DS: tl.constexpr, SS: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
    TOP: tl.constexpr, PAIRED: tl.constexpr, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, ANCHORS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Queries in coded coordinates, for some anchors: slow slots, then the two halves of the fast part.

    The decoder is read once for all rows of all anchors of a program.
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

    dim = tl.arange(0, DP)
    own = tl.load(order + dim, mask=dim < D, other=0)
    other = tl.load(order + tl.load(partner + dim, mask=dim < D, other=0), mask=dim < D, other=0)
    turned = angle(position[:, None], tl.load(turns + dim, mask=dim < D, other=0)[None, :])
    ahead = tl.load(sign + dim, mask=dim < D, other=0.0)[None, :] * tl.sin(turned)
    there = (row < R)[:, None] & (dim < D)[None, :]
    first = tl.load(source + own[None, :] * q_dim, mask=there, other=0.0).to(tl.float32) * scaling
    second = tl.load(source + other[None, :] * q_dim, mask=there, other=0.0).to(tl.float32) * scaling
    framed = first[None, :, :] * tl.cos(turned)[:, None, :] + second[None, :, :] * ahead[:, None, :]
    framed = framed.reshape(ANCHORS * ROWS, DP)
    line = ((anchor.to(tl.int64) * batch + b) * heads + head)[:, None]
    valid = ((anchor < anchors)[:, None] & (row < R)[None, :]).reshape(ANCHORS * ROWS)

    # A power of two brings every row below TOP, so that half precision neither overflows nor loses small entries.
    length = tl.sqrt(tl.sum(framed * framed, axis=1))
    fast_unit = tl.load(norms + head * 2 + 1)
    bound = length * tl.maximum(tl.load(norms + head * 2), fast_unit) * (1.0 / TOP)
    unit = tl.where(bound > 0, tl.exp2(tl.ceil(tl.log2(tl.maximum(bound, 1e-30)))), 1.0)
    slow_mean = tl.load(mean + head * D + dim, mask=dim < DS, other=0.0)
    offset = tl.sum(framed * slow_mean[None, :], axis=1)
    place = (line * 2 * R + row[None, :]).reshape(ANCHORS * ROWS)
    tl.store(out_scale + place, unit * base, mask=valid)
    tl.store(out_scale + place + R, offset * base, mask=valid)

    target = out + ((line * R + row[None, :]) * (SS + 2 * P)).reshape(ANCHORS * ROWS)[:, None]
    framed = framed / unit[:, None]
    for start in range(0, SS, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        matrix = tl.load(
            decoder + (head * D + dim)[:, None] * SS + column[None, :],
            mask=(dim < DS)[:, None] & (column < SS)[None, :],
            other=0.0,
        )
        part = tl.dot(framed, matrix, input_precision=PRECISION)
        tl.store(target + column[None, :], part.to(out.dtype.element_ty), mask=valid[:, None] & (column < SS)[None, :])
    if P > 0:
        # The fast part turns with its offset from the anchor; its query is stored as it is, in the fast unit.
        fast = framed * fast_unit
        fast_dim = dim - DS
        column = SS + fast_dim + tl.where(fast_dim >= HALF, P - HALF, 0)
        there = valid[:, None] & ((dim >= DS) & (dim < D))[None, :]
        tl.store(target + column[None, :], fast.to(out.dtype.element_ty), mask=there)
