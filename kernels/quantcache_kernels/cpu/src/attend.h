// Attention of the queries of one key/value head over a split of the context, and the merge of the splits.
//
// Scores against encoded keys: the slow part is a product of levels with the query in the frame of the anchor times
// the decoder; the fast part is decoded, centred and turned by the offset from the anchor. A token's gain multiplies
// its score before, and its probability after, the softmax. Values are summed as levels; the decoder and the mean are
// applied once, in the merge. Sinks and tail are tokens in the model's dtype and go through the same products.

#pragma once

#include "codes.h"
#include "task.h"

namespace quantcache {
namespace {

// Decode the fast part of a block's keys and turn it by the offsets from the anchor: [fast][BLOCK].
inline void decode_fast(const Task& task, int count, int offset, const float* gains) {
    constexpr int WIDE = MANY_REGISTERS ? VECTORS : 2;
    const Side& key = *task.a.key;
    const int half = key.fast_pairs, dims = 2 * half;
    const float* map = key.fast_map + static_cast<size_t>(task.head) * dims * dims;
    const float* mean = key.mean + static_cast<size_t>(task.head) * key.dim + key.slow;
    const float *cosines = key.offset_cos + offset, *sines = key.offset_sin + offset;
    const float* levels = task.scratch.levels;
    float* out = task.scratch.fast;
    for (int at = 0; at < BLOCK; at += WIDE * LANES) {
        for (int pair = 0; pair < half; pair += 2) { // outputs pair, pair + 1, half + pair, half + pair + 1
            const float *four = map + pair * 2 * dims, *column = levels + at;
            vfloat acc[4][WIDE] = {};
            for (int c = 0; c < count; ++c, four += 4, column += BLOCK) {
                vfloat tokens[WIDE];
#pragma GCC unroll 4
                for (int v = 0; v < WIDE; ++v) tokens[v] = load(column + v * LANES);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const vfloat weight = splat(four[i]);
#pragma GCC unroll 4
                    for (int v = 0; v < WIDE; ++v) acc[i][v] += weight * tokens[v];
                }
            }
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const int first = pair + i, second = half + pair + i;
#pragma GCC unroll 4
                for (int v = 0; v < WIDE; ++v) {
                    const int t = at + v * LANES;
                    const vfloat gain = load(gains + t);
                    const vfloat a = acc[i][v] * gain + mean[first], b = acc[i + 2][v] * gain + mean[second];
                    const vfloat c = load(cosines + first * ANCHOR_LENGTH + t);
                    const vfloat d = load(sines + first * ANCHOR_LENGTH + t);
                    store(out + first * BLOCK + t, a * c - b * d);
                    store(out + second * BLOCK + t, b * c + a * d);
                }
            }
        }
    }
}

inline void attend_block(Task& task, int index, const Place& place, bool biased) {
    const Side &key = *task.a.key, &value = *task.a.value;
    const AttendScratch& s = task.scratch;
    const CodedBlock block(task, index);
    const Coded* coded = key.coded + static_cast<size_t>(task.head) * key.dim;
    const int slow = key.counts[task.head * 2], fast = key.counts[task.head * 2 + 1];
    const int columns = padded(slow);
    memset(s.scores, 0, static_cast<size_t>(task.tiles) * 4 * BLOCK * sizeof(float));
    for (int first = 0; first < slow; first += LEVEL_CHUNK) {
        const int count = at_most(LEVEL_CHUNK, slow - first);
        decode_levels(key, coded + first, count, block.key_words, block.key_ahead, s.levels);
        for (int tile = 0; tile < task.tiles; ++tile) {
            const float* q = s.coded + (static_cast<size_t>(tile) * columns + first) * 4;
            dot_rows(task.rows_of(tile), s.levels, count, q, s.scores + static_cast<size_t>(tile) * 4 * BLOCK);
        }
    }
    for (int r = 0; r < task.num_rows; ++r) {
        float* row = s.scores + static_cast<size_t>(r) * BLOCK;
        for (int v = 0; v < VECTORS; ++v) {
            store(row + v * LANES, load(row + v * LANES) * load(block.key_gains + v * LANES) + s.mean_scores[r]);
        }
    }
    if (key.fast_pairs) {
        decode_levels(key, coded + slow, fast, block.key_words, block.key_ahead, s.levels);
        decode_fast(task, fast, place.first - place.anchor, block.key_gains);
        for (int tile = 0; tile < task.tiles; ++tile) {
            const float* q = s.framed + (static_cast<size_t>(tile) * key.dim + key.slow) * 4;
            dot_rows(task.rows_of(tile), s.fast, 2 * key.fast_pairs, q,
                     s.scores + static_cast<size_t>(tile) * 4 * BLOCK);
        }
    }

    for (int tile = 0; tile < task.tiles; ++tile) {
        update_softmax(task, tile, biased);
        float* weights = s.scores + static_cast<size_t>(tile) * 4 * BLOCK;
        for (int r = 0; r < task.rows_of(tile); ++r) {
            for (int v = 0; v < VECTORS; ++v) {
                float* p = weights + r * BLOCK + v * LANES;
                store(p, load(p) * load(block.value_gains + v * LANES));
            }
        }
    }
    coded = value.coded + static_cast<size_t>(task.head) * value.dim;
    const int num_coded = value.counts[task.head * 2] + value.counts[task.head * 2 + 1];
    for (int first = 0; first < num_coded; first += LEVEL_CHUNK) {
        const int count = at_most(LEVEL_CHUNK, num_coded - first);
        decode_levels(value, coded + first, count, block.value_words, block.value_ahead, s.levels);
        for (int tile = 0; tile < task.tiles; ++tile) {
            weigh_rows(task.rows_of(tile), s.levels, count, s.scores + static_cast<size_t>(tile) * 4 * BLOCK,
                       task.partial.sums + (static_cast<size_t>(tile) * value.dim + first) * 4);
        }
    }
}

inline void attend_codes(Task& task, int first, int last) {
    const Attend& a = task.a;
    const int64_t start = a.left_padding ? a.left_padding[task.row] : 0;
    const int64_t first_valid = a.left_padding ? start + a.num_sinks : INT64_MIN;
    const bool turns = a.key->slow_pairs + a.key->fast_pairs > 0;
    int64_t anchor = INT64_MIN;
    for (int block = first; block < last; ++block) {
        const Place& place = a.block_table[block];
        const int low = static_cast<int>(first_valid <= place.first ? 0 : at_most(BLOCK, first_valid - place.first));
        bool biased = a.mask || low > 0 || place.length < BLOCK;
        if (biased) {
            const int visible = mark_visible(task, 0, BLOCK, place.first, low, place.length, NOT_CAUSAL);
            if (visible == 0 && task.finite) continue;
            biased = visible < a.queries * BLOCK;
        }
        if (anchor == INT64_MIN || (turns && anchor != place.anchor)) {
            anchor = place.anchor;
            enter_frame(task, anchor - start);
        }
        attend_block(task, block, place, biased);
    }
}

// Sinks and tail: tokens in the model's dtype, one sequence of both.
inline void attend_dense(Task& task) {
    const Attend& a = task.a;
    const AttendScratch& s = task.scratch;
    const int dim = a.key->dim, value_dim = a.value->dim, stride = padded(dim), value_stride = padded(value_dim);
    const int64_t start = a.left_padding ? a.left_padding[task.row] : 0;
    // A row whose padding reaches behind the encoded tokens has its first tokens in the tail.
    const int sinks = a.left_padding ? at_least(0, at_most(a.num_sinks, a.encoded_end - start)) : a.num_sinks;
    const int64_t own = a.causal ? a.encoded_end + a.num_tail - a.queries : NOT_CAUSAL;
    for (int first = 0; first < sinks + a.num_tail; first += BLOCK) {
        const int count = at_most(BLOCK, sinks + a.num_tail - first);
        const int from_sinks = at_least(0, at_most(count, sinks - first)), from_tail = count - from_sinks;
        const int tail = first + from_sinks - sinks;
        const bool biased = a.mask || a.causal || count < BLOCK;
        if (biased) {
            for (int i = 0; i < a.queries * BLOCK; ++i) s.bias[i] = MINUS_INFINITY;
            // Tokens that no query sees count all the same: where they are NaN, so is the sum over all tokens.
            mark_visible(task, 0, from_sinks, start + first, 0, from_sinks, NOT_CAUSAL);
            mark_visible(task, from_sinks, from_tail, a.encoded_end + tail, 0, from_tail, own);
        }
        const auto read_side = [&](int side, int size, int step) -> Tokens {
            if (from_sinks == 0 && a.dense_dtype == FLOAT32 && size == step) { // read where they lie
                const void* token = token_at(a.tail[side], FLOAT32, task.row, task.head, tail);
                return {static_cast<const float*>(token), a.tail[side].token_stride};
            }
            read_tokens(a.sinks[side], a.dense_dtype, task.row, task.head, first, from_sinks, size, step, s.levels);
            read_tokens(a.tail[side], a.dense_dtype, task.row, task.head, tail, from_tail, size, step,
                        s.levels + from_sinks * step);
            return {s.levels, step};
        };
        const Tokens keys = read_side(0, dim, stride);
        memset(s.scores, 0, static_cast<size_t>(task.tiles) * 4 * BLOCK * sizeof(float));
        for (int tile = 0; tile < task.tiles; ++tile) {
            float* scores = s.scores + static_cast<size_t>(tile) * 4 * BLOCK;
            dot_tokens(keys, count, stride, s.rows + static_cast<size_t>(tile) * stride * 4, scores);
            update_softmax(task, tile, biased);
        }
        const Tokens values = read_side(1, value_dim, value_stride);
        for (int tile = 0; tile < task.tiles; ++tile) {
            const float* weights = s.scores + static_cast<size_t>(tile) * 4 * BLOCK;
            float* interleaved = s.framed; // [token][4]
            for (int t = 0; t < BLOCK; t += LANES) {
                store_columns(interleaved + t * 4, load(weights + t), load(weights + BLOCK + t),
                              load(weights + 2 * BLOCK + t), load(weights + 3 * BLOCK + t));
            }
            map_tile(interleaved, count, values.data, values.stride, value_dim, s.coded);
            float* sums = task.partial.sums + static_cast<size_t>(tile) * value_dim * 4;
            for (int d = 0; d < value_dim; ++d) store4(sums + d * 4, load4(sums + d * 4) + load4(s.coded + d * 4));
        }
    }
}

inline size_t attend_scratch(const Attend& a) { return AttendScratch(a, nullptr).arena.used(); }

// Attend on one split: of blocks or, the last one, of sinks and tail.
inline void attend(const Attend& a, int row, int head, int split, float* partial, char* scratch) {
    Task task(a, row, head, partial, scratch);
    memset(partial, 0, partial_size(a) * sizeof(float));
    for (int r = 0; r < task.tiles * 4; ++r) task.partial.largest[r] = MINUS_INFINITY;
    const bool on_codes = split < code_splits(a.blocks);
    read_queries(task, on_codes);
    if (!on_codes) {
        attend_dense(task);
    } else {
        const int per_split = blocks_per_split(a.blocks);
        attend_codes(task, split * per_split, at_most(a.blocks, (split + 1) * per_split));
    }
}

// Merge the splits of one head by their log-sum-exp, decode the sum of the encoded values, and write the output.
inline void merge(const Attend& a, int row, int head, const float* partials, char* base) {
    const AttendScratch s(a, base);
    const Side& value = *a.value;
    const int tiles = row_tiles(a), num_rows = a.groups * a.queries, dim = value.dim;
    const int splits = code_splits(a.blocks);
    const size_t size = partial_size(a);
    const int num_coded = value.counts[head * 2] + value.counts[head * 2 + 1];
    const float* mean = value.mean + static_cast<size_t>(head) * dim;
    const float* map = value.map + static_cast<size_t>(head) * dim * value.map_columns;
    for (int tile = 0; tile < tiles; ++tile) {
        float4 peak = {MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY}, logit = peak, total = {};
        const int rows = at_most(4, num_rows - tile * 4);
        if (a.sink_logits) {
            for (int r = 0; r < rows; ++r) logit[r] = a.sink_logits[head * a.groups + (tile * 4 + r) / a.queries];
            peak = logit;
        }
        for (int split = 0; split <= splits; ++split) {
            const Partial part(a, const_cast<float*>(partials) + split * size);
            const float4 largest = load4(part.largest + tile * 4);
            peak = largest > peak ? largest : peak;
        }
        const auto weigh = [&](float4 largest) {
            float4 weight;
            for (int r = 0; r < 4; ++r) weight[r] = largest[r] == MINUS_INFINITY ? 0.0f : expf(largest[r] - peak[r]);
            return weight;
        };
        if (a.sink_logits) total = weigh(logit);
        float* sums = s.levels; // [coded][4], then those of sinks and tail [Dv][4]
        float* direct = s.levels + static_cast<size_t>(dim) * 4;
        memset(sums, 0, static_cast<size_t>(dim) * 8 * sizeof(float));
        float4 mass = {};
        for (int split = 0; split <= splits; ++split) {
            const Partial part(a, const_cast<float*>(partials) + split * size);
            const float4 weight = weigh(load4(part.largest + tile * 4));
            const float4 own = weight * load4(part.totals + tile * 4);
            const float* from = part.sums + static_cast<size_t>(tile) * dim * 4;
            float* to = split == splits ? direct : sums;
            const int count = split == splits ? dim : num_coded;
            total += own;
            if (split < splits) mass += own;
            for (int i = 0; i < count; ++i) store4(to + i * 4, load4(to + i * 4) + weight * load4(from + i * 4));
        }
        map_tile(sums, num_coded, map, value.map_columns, dim, s.coded);
        for (int r = 0; r < rows; ++r) {
            const int index = tile * 4 + r;
            const int64_t query = static_cast<int64_t>(row) * a.queries + index % a.queries;
            const int64_t at = (query * a.heads * a.groups + head * a.groups + index / a.queries) * dim;
            const float scale = total[r] == 0.0f ? 0.0f : 1.0f / total[r]; // NaN stays
            for (int d = 0; d < dim; ++d) {
                const float x = s.coded[d * 4 + r] + mass[r] * mean[d] + direct[d * 4 + r];
                write(a.output, a.query_dtype, at + d, x * scale);
            }
        }
    }
}

} // namespace
} // namespace quantcache
