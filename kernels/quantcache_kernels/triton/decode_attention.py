"""Attention of few queries on packed codes: split over the context, one pass over the codes, nothing decoded to memory.

The first kernel reads every packed word once for all rows of queries that share a key/value head, and leaves weighted
sums of levels for each of several splits of the context. The second merges the splits with the tokens that are not
encoded and applies the values' decoder, once. Queries come in coded coordinates (queries.py), where a score is a sum
over slots of query times level; only the fast part of a key is decoded, and turned by its offset from the anchor.

A program of the first kernel is one warp: tiles of 16 slots keep the unpacked codes in tensor-core order, and a second
warp would have to unpack them again.

Shapes: B batch, H key/value heads, R = G Tq rows of queries with the query index running fastest, n blocks, S slots.
"""

from __future__ import annotations

from quantcache_kernels.triton.codes import (
    LN_2,
    LOG2_E,
    NOTHING_SEEN,
    arrange_tile,
    gain_of,
    key_levels,
    load_tile,
    second_nibble,
    tanh,
    unpack,
    value_levels,
)
from quantcache_kernels.triton.runtime import kernel, tl


@kernel(
    "R", "n", "batch", "queries_per_row", "per_split", "key_stride", "value_stride", "mask_batch", "mask_query",
    "mask_length", "sink_length", "one_half", "zero",
)  # fmt: skip
def attend_kernel(
    queries, scales,
    key_codes, key_gains, key_words, key_factors, key_flags, key_meaning, key_levels_,
    value_codes, value_gains, value_words, value_factors, value_flags, value_meaning, value_levels_,
    fast_decoder,  # [H, 16 * fast tiles, 2, P]
    fast_mean,  # [H, 2, P] float32
    rotation,  # [128, 2, P] float32: cosines and sines of every offset from an anchor
    block_table, left_padding, mask,
    out,  # [splits, B, H, R, Sv] float32
    out_stats,  # [splits, B, H, 2, R] float32: peak (base 2) and sum
    R, n, batch, queries_per_row, per_split, key_stride, value_stride, mask_batch, mask_query, mask_length,
    sink_length, softcap, one_half, zero,
    SLOW: tl.constexpr, FAST: tl.constexpr, VALUE: tl.constexpr, P: tl.constexpr,
    WIDE: tl.constexpr,  # whether some tile has 8-bit codes
    KEY_POLYNOMIAL: tl.constexpr, VALUE_POLYNOMIAL: tl.constexpr,
    KEY_TRELLIS: tl.constexpr, VALUE_TRELLIS: tl.constexpr, PRECISION: tl.constexpr, PAIRED: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALL_VISIBLE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Weighted sums of value levels over one split of the blocks."""
    split, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2) % batch
    heads = tl.num_programs(1)
    row = (tl.program_id(2) // batch) * ROWS + tl.arange(0, ROWS)
    valid_row = row < R
    dtype: tl.constexpr = queries.dtype.element_ty
    KS: tl.constexpr = 16 * (SLOW + FAST)
    VS: tl.constexpr = 16 * VALUE
    Q: tl.constexpr = 16 * SLOW + 2 * P
    TIGHT: tl.constexpr = VALUE > 8  # sums leave few registers: nothing is loaded ahead for the keys
    slot = tl.arange(0, 16)
    token = tl.arange(0, 64)

    key_words += head * 4 * KS
    key_factors += head * 4 * KS
    key_flags += head * (SLOW + FAST)
    key_meaning += head * ((5 if KEY_TRELLIS else 3) if KEY_POLYNOMIAL else 2) * KS
    value_words += head * 4 * VS
    value_factors += head * 4 * VS
    value_flags += head * VALUE
    value_meaning += head * ((5 if VALUE_TRELLIS else 3) if VALUE_POLYNOMIAL else 2) * VS
    rows_of_blocks = tl.zeros((), tl.int64) + batch
    first_valid = 0
    if HAS_STARTS:
        first_valid = tl.load(left_padding + b).to(tl.int32) + sink_length

    sums = ()
    for _ in tl.static_range(VALUE):
        sums += (tl.zeros((16, ROWS), tl.float32),)
    peak = tl.full((ROWS,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)

    for block in range(split * per_split, tl.minimum(n, (split + 1) * per_split)):
        # Zero, but the compiler cannot know: it would move all loads from the tables out of the loop, into registers
        # that it does not have.
        tables = block * zero
        key_slot = slot
        if TIGHT:
            key_slot += tl.multiple_of(tables, 16)
        line = block * rows_of_blocks + b
        keys = key_codes + tl.multiple_of(line * key_stride, 2)  # fields are 2, 4 or 8 words long
        values = value_codes + tl.multiple_of(line * value_stride, 2)
        key_gain = gain_of(tl.load(key_gains + (line * heads + head) * 64 + token))
        if not TIGHT:
            value_gain = gain_of(tl.load(value_gains + (line * heads + head) * 64 + token))
        anchor = block // 2 if PAIRED else block
        query_line = (anchor * rows_of_blocks + b) * heads + head
        query = queries + query_line * R * Q
        start = tl.load(block_table + block * 3)
        turning = tl.zeros((64, ROWS), tl.float32)
        if SLOW > 0 and not TIGHT:
            coming = load_tile(keys, key_words, slot, KS, KEY_TRELLIS)  # the first slow tile: on its way all the while
        for c in range(P // 16):
            # The fast part is decoded, few dimensions as it is, and turned by the offset from the anchor: 16 pairs at a
            # time, since more would not fit in registers.
            pair = 16 * c + key_slot
            first = tl.zeros((64, 16), tl.float32)
            second = tl.zeros((64, 16), tl.float32)
            for f in range(FAST):
                flags = tl.load(key_flags + SLOW + f)
                place = 16 * (SLOW + f) + key_slot
                if flags != 0:
                    fields = arrange_tile(load_tile(keys, key_words, place, KS, KEY_TRELLIS), True, KEY_TRELLIS)
                    x = unpack(fields, flags, key_factors, place, one_half, KS, KEY_TRELLIS)
                    if WIDE and not KEY_TRELLIS:
                        x += second_nibble(keys, key_words, key_factors, place, flags, True, KS)
                    tile = key_levels(x, key_meaning, key_levels_, place, KS, KEY_POLYNOMIAL, KEY_TRELLIS)
                    matrix = fast_decoder + ((head * FAST + f) * 16 + key_slot)[:, None] * (2 * P) + pair[None, :]
                    first = tl.dot(tile, tl.load(matrix), first, input_precision=PRECISION)
                    second = tl.dot(tile, tl.load(matrix + P), second, input_precision=PRECISION)
            first = first * key_gain[:, None] + tl.load(fast_mean + head * 2 * P + pair)[None, :]
            second = second * key_gain[:, None] + tl.load(fast_mean + head * 2 * P + P + pair)[None, :]
            turn = rotation + (start - tl.load(block_table + block * 3 + 2) + token)[:, None] * (2 * P) + pair[None, :]
            cos, sin = tl.load(turn), tl.load(turn + P)
            fast = query + row[None, :] * Q + (16 * SLOW + pair)[:, None]
            turned = (first * cos - second * sin).to(dtype)
            fast_of_row = tl.load(fast, mask=valid_row[None, :], other=0.0)
            turning = tl.dot(turned, fast_of_row, turning, input_precision=PRECISION)
            turned = (second * cos + first * sin).to(dtype)
            fast_of_row = tl.load(fast + P, mask=valid_row[None, :], other=0.0)
            turning = tl.dot(turned, fast_of_row, turning, input_precision=PRECISION)
        scores = tl.zeros((64, ROWS), tl.float32)
        if SLOW > 0:
            if TIGHT:
                coming = load_tile(keys, key_words, key_slot, KS, KEY_TRELLIS)
            for t in range(SLOW):
                place = 16 * t + key_slot
                flags = tl.load(key_flags + t)
                now = arrange_tile(coming, True, KEY_TRELLIS)
                if t + 1 < SLOW:
                    coming = load_tile(keys, key_words, place + 16, KS, KEY_TRELLIS)
                if flags != 0:
                    x = unpack(now, flags, key_factors, place, one_half, KS, KEY_TRELLIS)
                    if WIDE and not KEY_TRELLIS:
                        x += second_nibble(keys, key_words, key_factors, place, flags, True, KS)
                    tile = key_levels(x, key_meaning, key_levels_, place, KS, KEY_POLYNOMIAL, KEY_TRELLIS)
                    part = query + row[None, :] * Q + place[:, None]
                    part_of_row = tl.load(part, mask=valid_row[None, :], other=0.0)
                    scores = tl.dot(tile, part_of_row, scores, input_precision=PRECISION)
        ahead = load_tile(values, value_words + tables, slot, VS, VALUE_TRELLIS)
        unit = tl.load(scales + query_line * 2 * R + row, mask=valid_row, other=0.0)
        offset = tl.load(scales + query_line * 2 * R + R + row, mask=valid_row, other=0.0)
        scores = (scores * key_gain[:, None] + turning) * unit[None, :] + offset[None, :]
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
            scores *= LOG2_E  # else the query has it already
        if not ALL_VISIBLE:
            visible = (token < tl.load(block_table + block * 3 + 1)) & (start + token >= first_valid)
            allowed = tl.broadcast_to(visible[:, None], (64, ROWS))
            if HAS_MASK:
                entry = mask + b.to(tl.int64) * mask_batch + (row % queries_per_row)[None, :] * mask_query
                allowed &= (start + token < mask_length)[:, None] & valid_row[None, :]
                allowed = tl.load(entry + (start + token)[:, None], mask=allowed, other=0) != 0
            scores = tl.where(allowed, scores, -float("inf"))

        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_peak[None, :])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, axis=0)
        if TIGHT:
            value_gain = gain_of(tl.load(value_gains + (line * heads + head) * 64 + token))
        peak = new_peak
        # Tokens in the order of value_levels: t and t + 32 side by side.
        weights = (weights * value_gain[:, None]).to(dtype).reshape(2, 32, ROWS).permute(1, 0, 2).reshape(64, ROWS)
        updated = ()
        for t in tl.static_range(VALUE):
            place = 16 * t + slot
            flags = tl.load(value_flags + t)
            now = arrange_tile(ahead, False, VALUE_TRELLIS)
            if t + 1 < VALUE:
                ahead = load_tile(values, value_words + tables, place + 16, VS, VALUE_TRELLIS)
            sum_ = sums[t] * decay[None, :]
            if flags != 0:
                x = unpack(now, flags, value_factors + tables, place, one_half, VS, VALUE_TRELLIS)
                if WIDE and not VALUE_TRELLIS:
                    x += second_nibble(values, value_words + tables, value_factors + tables, place, flags, False, VS)
                tile = value_levels(
                    x, value_meaning + tables, value_levels_, place, VS, VALUE_POLYNOMIAL, VALUE_TRELLIS
                )
                sum_ = tl.dot(tile, weights, sum_, input_precision=PRECISION)
            updated += (sum_,)
        sums = updated

    line = (split * batch + b).to(tl.int64) * heads + head
    for t in tl.static_range(VALUE):
        target = out + (line * R + row)[None, :] * VS + (16 * t + slot)[:, None]
        tl.store(target, sums[t], mask=valid_row[None, :])
    tl.store(out_stats + line * 2 * R + row, peak, mask=valid_row)
    tl.store(out_stats + line * 2 * R + R + row, total, mask=valid_row)


@kernel("splits", "batch", "count")
def merge_kernel(
    partial, stats,  # what attend_kernel left
    dense, dense_stats,  # [B, H, R, Dv] and [B, H, 2, R]: weighted sums of values, with peak and sum
    sink_logits,  # [Hq]: join the softmax and carry no value
    decoder,  # [H, Sv, Dv] float32
    mean,  # [H, Dv] float32
    out,  # [B, Tq, Hq, Dv]
    out_lse,  # [B, H, R] float32
    splits, batch, count,
    VS: tl.constexpr, VP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """One row of queries: merge the splits, apply the values' decoder, add their mean and the dense tokens."""
    row, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    R, heads = tl.num_programs(0), tl.num_programs(1)
    query_head = head * (R // count) + row // count
    place = (b * heads + head).to(tl.int64)
    dense_peak = tl.load(dense_stats + place * 2 * R + row)
    peaks = tl.full((CHUNK,), NOTHING_SEEN, tl.float32)
    for first in range(0, splits, CHUNK):
        part = first + tl.arange(0, CHUNK)
        line = (part.to(tl.int64) * batch + b) * heads + head
        seen = tl.load(stats + line * 2 * R + R + row, mask=part < splits, other=0.0) > 0
        peaks = tl.maximum(peaks, tl.load(stats + line * 2 * R + row, mask=seen, other=NOTHING_SEEN))
    peak = tl.maximum(tl.max(peaks, axis=0), dense_peak)
    if HAS_SINK_LOGITS:
        logit = tl.load(sink_logits + query_head).to(tl.float32) * LOG2_E
        peak = tl.maximum(peak, logit)

    slot = tl.arange(0, VP)
    sums, masses = tl.zeros((VP,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for first in range(0, splits, CHUNK):
        part = first + tl.arange(0, CHUNK)
        part_line = (part.to(tl.int64) * batch + b) * heads + head
        found = tl.load(stats + part_line * 2 * R + R + row, mask=part < splits, other=0.0)
        seen = found > 0
        own = tl.load(stats + part_line * 2 * R + row, mask=seen, other=NOTHING_SEEN)
        weight = tl.where(seen, tl.exp2(own - peak), 0.0)
        masses += weight * found
        values = tl.load(
            partial + (part_line * R + row)[:, None] * VS + slot[None, :],
            mask=seen[:, None] & (slot < VS)[None, :],
            other=0.0,
        )
        sums += tl.sum(values * weight[:, None], axis=0)

    mass = tl.sum(masses, axis=0)
    dense_weight = tl.exp2(dense_peak - peak)
    total = mass + tl.load(dense_stats + place * 2 * R + R + row) * dense_weight
    if HAS_SINK_LOGITS:
        total += tl.exp2(logit - peak)
    share = 1.0 / tl.where(total > 0, total, 1.0)
    target = out + ((b * count + row % count).to(tl.int64) * heads * (R // count) + query_head) * D
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < D
        matrix = tl.load(
            decoder + (head * VS + slot)[:, None] * D + column[None, :], mask=(slot < VS)[:, None] & inside[None, :],
            other=0.0,
        )  # fmt: skip
        result = tl.sum(matrix * sums[:, None], axis=0)
        result += mass * tl.load(mean + head * D + column, mask=inside, other=0.0)
        result += dense_weight * tl.load(dense + (place * R + row) * D + column, mask=inside, other=0.0)
        tl.store(target + column, (result * share).to(out.dtype.element_ty), mask=inside)
    lse = tl.where(total > 0, (peak + tl.log2(tl.maximum(total, 1e-38))) * LN_2, -float("inf"))
    tl.store(out_lse + place * R + row, lse)
