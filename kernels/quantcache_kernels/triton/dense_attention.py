"""Attention on the tokens that are not encoded: sinks and the recent ones. One more split for the merge.

Shapes: B batch, H key/value heads, R = G Tq rows of queries with the query index running fastest, D and Dv dimensions.
"""

from __future__ import annotations

from quantcache_kernels.triton.codes import LOG2_E, NOTHING_SEEN, tanh
from quantcache_kernels.triton.runtime import kernel, tl


@kernel(
    "q_batch", "q_head", "q_query", "mask_batch", "mask_query", "mask_length", "R", "count", "batch", "sinks", "tail",
    "encoded_end",
)  # fmt: skip
def dense_kernel(
    query,  # [B, Hq, Tq, D]
    key_sinks, value_sinks,  # [B, H, sinks, D or Dv]
    key_tail, value_tail,  # [B, H, tail, D or Dv]
    left_padding, mask,
    out,  # [B, H, R, Dv] float32: weighted sum of values
    out_stats,  # [B, H, 2, R] float32: peak (base 2) and sum
    q_batch, q_head, q_query, q_dim,
    ks_batch, ks_head, ks_token, ks_dim, vs_batch, vs_head, vs_token, vs_dim,
    kt_batch, kt_head, kt_token, kt_dim, vt_batch, vt_head, vt_token, vt_dim,
    mask_batch, mask_query, mask_length, R, count, batch, sinks, tail, encoded_end, scaling, softcap,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All dense tokens of one head of one row of the batch."""
    head, b = tl.program_id(0), tl.program_id(1) % batch
    row = (tl.program_id(1) // batch) * ROWS + tl.arange(0, ROWS)
    valid_row = row < R
    dim, value_dim, token = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, 64)
    wide_b, wide_head = b.to(tl.int64), head.to(tl.int64)
    source = query + wide_b * q_batch + wide_head * (R // count) * q_head
    source += ((row // count) * q_head + (row % count) * q_query)[:, None]
    own = tl.load(source + dim[None, :] * q_dim, mask=valid_row[:, None] & (dim < D)[None, :], other=0.0)
    first_sink = 0
    if HAS_STARTS:
        first_sink = tl.load(left_padding + b).to(tl.int32)
    own_slot = encoded_end + tail - count + row % count

    sums = tl.zeros((ROWS, DVP), tl.float32)
    peak = tl.full((ROWS,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sink_chunks = (sinks + 63) // 64
    for chunk in range(0, sink_chunks + (tail + 63) // 64):
        is_sink = chunk < sink_chunks
        if is_sink:
            index = chunk * 64 + token
            slot = first_sink + index
            present = (index < sinks) & (slot < encoded_end)  # later ones are still in the tail
            key = key_sinks + wide_b * ks_batch + wide_head * ks_head
            key += index[None, :] * ks_token + dim[:, None] * ks_dim
            value = value_sinks + wide_b * vs_batch + wide_head * vs_head
            value += index[:, None] * vs_token + value_dim[None, :] * vs_dim
        else:
            index = (chunk - sink_chunks) * 64 + token
            slot = encoded_end + index
            present = index < tail
            key = key_tail + wide_b * kt_batch + wide_head * kt_head
            key += index[None, :] * kt_token + dim[:, None] * kt_dim
            value = value_tail + wide_b * vt_batch + wide_head * vt_head
            value += index[:, None] * vt_token + value_dim[None, :] * vt_dim
        keys = tl.load(key, mask=present[None, :] & (dim < D)[:, None], other=0.0)
        scores = tl.dot(own.to(OPERAND), keys.to(OPERAND), input_precision=PRECISION) * scaling
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        allowed = present[None, :] & valid_row[:, None]
        if CAUSAL:
            allowed &= slot[None, :] <= own_slot[:, None]
        if HAS_MASK:
            allowed &= (slot < mask_length)[None, :]
            entry = mask + wide_b * mask_batch + (row % count)[:, None] * mask_query + slot[None, :]
            allowed = tl.load(entry, mask=allowed, other=0) != 0
        scores = tl.where(allowed, scores * LOG2_E, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, axis=1)
        peak = new_peak
        values = tl.load(value, mask=present[:, None] & (value_dim < DV)[None, :], other=0.0)
        sums = tl.dot(weights.to(OPERAND), values.to(OPERAND), sums * decay[:, None], input_precision=PRECISION)

    line = wide_b * tl.num_programs(0) + head
    target = out + (line * R + row)[:, None] * DV + value_dim[None, :]
    tl.store(target, sums, mask=valid_row[:, None] & (value_dim < DV)[None, :])
    tl.store(out_stats + line * 2 * R + row, peak, mask=valid_row)
    tl.store(out_stats + line * 2 * R + R + row, total, mask=valid_row)
