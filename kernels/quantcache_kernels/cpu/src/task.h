// What attending to a split of one head has to begin with and hands on: memory, queries, visibility and the softmax.

#pragma once

#include "abi.h"
#include "dense.h"
#include "tiles.h"

#include <math.h>

namespace quantcache {
namespace {

constexpr int LEVEL_CHUNK = 64; // coefficients decoded at once: 16 KB, half of a first-level cache
constexpr float MINUS_INFINITY = -INFINITY;
constexpr int64_t NOT_CAUSAL = INT64_MIN;

inline int padded(int n) { return (n + PAD - 1) / PAD * PAD; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// A scratch buffer handed out in parts; without a base it only counts.
class Arena {
  public:
    explicit Arena(char* base) : base_(base), used_(0) {}
    float* floats(size_t count) {
        float* part = base_ ? reinterpret_cast<float*>(base_ + used_) : nullptr;
        used_ += (count * sizeof(float) + 63) / 64 * 64;
        return part;
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_;
};

struct AttendScratch {
    AttendScratch(const Attend& a, char* base) : arena(base) {
        const int dim = at_least(a.key->dim, a.value->dim);
        rows = arena.floats(static_cast<size_t>(row_tiles(a)) * padded(a.key->dim) * 4);
        framed = arena.floats(at_least(static_cast<size_t>(row_tiles(a)) * a.key->dim, BLOCK) * 4);
        coded = arena.floats(static_cast<size_t>(row_tiles(a)) * padded(dim) * 4);
        scores = arena.floats(static_cast<size_t>(row_tiles(a)) * 4 * BLOCK);
        bias = arena.floats(static_cast<size_t>(a.queries) * BLOCK);
        levels = arena.floats(static_cast<size_t>(at_least(padded(dim), LEVEL_CHUNK)) * BLOCK);
        fast = arena.floats(static_cast<size_t>(dim) * BLOCK);
        cosines = arena.floats(dim);
        sines = arena.floats(dim);
        mean_scores = arena.floats(static_cast<size_t>(row_tiles(a)) * 4);
    }
    Arena arena;
    float* rows;        // scaled queries [tile][D][4], or [tile][4][D] for plain tokens
    float* framed;      // the same in the frame of the anchor
    float* coded;       // ... times the decoder of the slow part [tile][C][4]
    float* scores;      // then weights [tile][4][BLOCK]
    float* bias;        // 0, or minus infinity where a query may not look [Tq][BLOCK]
    float* levels;      // [C][BLOCK], or plain tokens [BLOCK][D]
    float* fast;        // fast dimensions of the keys [fast][BLOCK]
    float* cosines;     // of the anchor's position [pairs]
    float* sines;
    float* mean_scores; // of the slow part's mean [tile][4]
};

// A partial result: see partial_size.
struct Partial {
    Partial(const Attend& a, float* base) : sums(base) {
        largest = base + static_cast<size_t>(row_tiles(a)) * a.value->dim * 4;
        totals = largest + row_tiles(a) * 4;
    }
    float* sums;    // weighted values, or their levels [tile][Dv][4]
    float* largest; // [tile][4]
    float* totals;  // [tile][4]
};

// What is the same for all blocks of a split.
struct Task {
    Task(const Attend& a, int row, int head, float* partial, char* base)
        : a(a), row(row), head(head), tiles(row_tiles(a)), num_rows(a.groups * a.queries), scratch(a, base),
          partial(a, partial) {}
    int rows_of(int tile) const { return at_most(4, num_rows - tile * 4); }

    const Attend& a;
    const int row, head, tiles, num_rows;
    bool finite = true; // whether the scaled queries are
    AttendScratch scratch;
    Partial partial;
};

// The scaled queries, tile by tile: [D][4 rows] to attend on codes, [4 rows][D] to attend on plain tokens.
inline void read_queries(Task& task, bool interleaved) {
    const Attend& a = task.a;
    const int dim = a.key->dim, stride = padded(dim);
    memset(task.scratch.rows, 0, static_cast<size_t>(task.tiles) * stride * 4 * sizeof(float));
    float* query = task.scratch.levels;
    vfloat check = {}; // a product of zero with NaN or infinity is NaN
    for (int r = 0; r < task.num_rows; ++r) {
        read_tokens(a.query, a.query_dtype, task.row, task.head * a.groups + r / a.queries, r % a.queries, 1, dim, stride,
                    query);
        for (int d = 0; d < stride; d += LANES) {
            const vfloat scaled = load(query + d) * a.scaling;
            check += scaled * 0.0f;
            store(query + d, scaled);
        }
        float* tile = task.scratch.rows + static_cast<size_t>(r / 4) * (interleaved ? dim : stride) * 4;
        float* out = tile + (interleaved ? r % 4 : r % 4 * stride);
        const int step = interleaved ? 4 : 1;
        for (int d = 0; d < dim; ++d) out[d * step] = query[d];
    }
    const float total = sum(check);
    task.finite = total == total;
}

// Bring the queries into the frame of an anchor, and through the decoder of the slow part.
inline void enter_frame(Task& task, int64_t position) {
    const Side& key = *task.a.key;
    const AttendScratch& s = task.scratch;
    const int pairs = key.slow_pairs + key.fast_pairs;
    for (int i = 0; i < pairs; ++i) {
        cosine_and_sine(static_cast<double>(position) * key.frequencies[i], s.cosines[i], s.sines[i]);
    }
    const float* mean = key.mean + static_cast<size_t>(task.head) * key.dim;
    const float* map = key.map + static_cast<size_t>(task.head) * key.slow * key.map_columns;
    const int columns = padded(key.counts[task.head * 2]);
    const auto turn = [&](const float* rows, float* framed, int first, int pair, int count) {
        for (int i = 0; i < count; ++i) {
            const float4 a = load4(rows + key.order[first + i] * 4);
            const float4 b = load4(rows + key.order[first + count + i] * 4);
            const float c = s.cosines[pair + i], d = s.sines[pair + i];
            store4(framed + (first + i) * 4, a * c + b * d);
            store4(framed + (first + count + i) * 4, b * c - a * d);
        }
    };
    for (int tile = 0; tile < task.tiles; ++tile) {
        const float* rows = s.rows + static_cast<size_t>(tile) * key.dim * 4;
        float* framed = s.framed + static_cast<size_t>(tile) * key.dim * 4;
        turn(rows, framed, 0, 0, key.slow_pairs);
        for (int i = 2 * key.slow_pairs; i < key.slow; ++i) store4(framed + i * 4, load4(rows + key.order[i] * 4));
        turn(rows, framed, key.slow, key.slow_pairs, key.fast_pairs);
        float4 mean_score = {};
        for (int i = 0; i < key.slow; ++i) mean_score += load4(framed + i * 4) * mean[i];
        store4(s.mean_scores + tile * 4, mean_score);
        map_tile(framed, key.slow, map, key.map_columns, columns, s.coded + static_cast<size_t>(tile) * columns * 4);
    }
}

inline void decode_gains(const uint8_t* codes, const float* table, float* gains) {
    for (int t = 0; t < BLOCK; ++t) gains[t] = table[codes[t]];
}

// A block's codes and gains, of one batch row and head. The same words of the next block are `ahead` further on.
struct CodedBlock {
    CodedBlock(const Task& task, int block) {
        const Attend& a = task.a;
        const int64_t at = static_cast<int64_t>(block) * a.batch + task.row;
        const bool more = block + 1 < a.blocks;
        key_words = reinterpret_cast<const uint32_t*>(a.key_codes + at * a.key->words);
        value_words = reinterpret_cast<const uint32_t*>(a.value_codes + at * a.value->words);
        key_ahead = more ? static_cast<int64_t>(a.batch) * a.key->words : 0;
        value_ahead = more ? static_cast<int64_t>(a.batch) * a.value->words : 0;
        decode_gains(a.key_gains + (at * a.heads + task.head) * BLOCK, a.key->gains, key_gains);
        decode_gains(a.value_gains + (at * a.heads + task.head) * BLOCK, a.value->gains, value_gains);
    }
    const uint32_t *key_words, *value_words;
    int64_t key_ahead, value_ahead;
    float key_gains[BLOCK], value_gains[BLOCK];
};

// Say which of `count` tokens, in slots from `slot` on, the queries may see: those from `low` to `high` that the mask
// allows and, unless `own` is NOT_CAUSAL, that are not behind the query itself (`own` is the first query's slot).
// Writes the bias from token `at` of the block on, and returns how many pairs of query and token are visible.
inline int mark_visible(const Task& task, int at, int count, int64_t slot, int low, int high, int64_t own) {
    const Attend& a = task.a;
    int seen = 0;
    for (int query = 0; query < a.queries; ++query) {
        float* bias = task.scratch.bias + query * BLOCK + at;
        const int64_t past = own == NOT_CAUSAL ? high : own + query - slot + 1;
        const uint8_t* mask = nullptr;
        if (a.mask) mask = a.mask + task.row * a.mask_batch_stride + query * a.mask_query_stride + slot;
        for (int t = 0; t < count; ++t) {
            const bool visible = t >= low && t < high && t < past && (!mask || mask[t]);
            bias[t] = visible ? 0.0f : MINUS_INFINITY;
            seen += visible;
        }
    }
    return seen;
}

// Turn the scores of a tile into weights, and rescale what has been summed if a larger score came. A score that is NaN
// is passed over by the search for the largest, and makes the weights, their total and so the output NaN.
inline void update_softmax(Task& task, int tile, bool biased) {
    const Attend& a = task.a;
    const int rows = task.rows_of(tile);
    float* scores = task.scratch.scores + static_cast<size_t>(tile) * 4 * BLOCK;
    float4 decay = {1.0f, 1.0f, 1.0f, 1.0f};
    bool rescale = false;
    for (int r = 0; r < rows; ++r) {
        float* row = scores + r * BLOCK;
        const float* bias = task.scratch.bias + ((tile * 4 + r) % a.queries) * BLOCK;
        vfloat top = splat(MINUS_INFINITY);
        for (int v = 0; v < VECTORS; ++v) {
            vfloat score = load(row + v * LANES);
            if (a.softcap > 0.0f) score = a.softcap * hyperbolic_tangent(score / a.softcap);
            if (biased) score += load(bias + v * LANES);
            store(row + v * LANES, score);
            top = maximum(score, top);
        }
        float& peak = task.partial.largest[tile * 4 + r];
        float& total = task.partial.totals[tile * 4 + r];
        const float found = largest(top);
        if (found > peak) {
            decay[r] = expf(peak - found);
            total *= decay[r];
            peak = found;
            rescale = true;
        }
        const float safe = peak == MINUS_INFINITY ? 0.0f : peak;
        vfloat mass = {};
        for (int v = 0; v < VECTORS; ++v) {
            const vfloat weight = exponential(load(row + v * LANES) - safe);
            mass += weight;
            store(row + v * LANES, weight);
        }
        total += sum(mass);
    }
    if (!rescale) return;
    float* sums = task.partial.sums + static_cast<size_t>(tile) * a.value->dim * 4;
    for (int d = 0; d < a.value->dim; ++d) store4(sums + d * 4, load4(sums + d * 4) * decay);
}

} // namespace
} // namespace quantcache
