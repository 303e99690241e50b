// The small matrix products that attention is made of. All work on tiles of up to 4 rows of queries; what belongs to
// a tile is interleaved, [index][4 rows], so that one cache line serves all rows of an index.
//
// Sizes of the register tiles: 16 vector registers hold 8 to 12 accumulators, 32 hold 16.

#pragma once

#include "abi.h"
#include "simd.h"

namespace quantcache {
namespace {

template <int ROWS> constexpr int token_vectors() { // of one register tile of a product whose lanes are tokens
    return MANY_REGISTERS ? VECTORS : ROWS == 4 ? 2 : ROWS == 1 ? VECTORS : 4;
}

// scores[row][token] += sum over i of q[i][row] * x[i][token].
template <int ROWS> QC_INLINE void dot_tile(const float* x, int count, const float* q, float* scores) {
    constexpr int WIDE = token_vectors<ROWS>();
    for (int first = 0; first < VECTORS; first += WIDE) {
        vfloat acc[ROWS][WIDE];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < WIDE; ++v) acc[r][v] = load(scores + r * BLOCK + (first + v) * LANES);
        }
        const float* column = x + first * LANES;
        for (int i = 0; i < count; ++i) {
            vfloat tokens[WIDE];
#pragma GCC unroll 8
            for (int v = 0; v < WIDE; ++v) tokens[v] = load(column + i * BLOCK + v * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const vfloat weight = splat(q[i * 4 + r]);
#pragma GCC unroll 8
                for (int v = 0; v < WIDE; ++v) acc[r][v] += weight * tokens[v];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < WIDE; ++v) store(scores + r * BLOCK + (first + v) * LANES, acc[r][v]);
        }
    }
}

// Vectors of tokens in float32, `stride` apart.
struct Tokens {
    const float* data;
    int64_t stride;
};

// scores[row][token] = sum over dimensions of q[row][d] * x[token][d], d below `dim`, a multiple of PAD.
template <int TOKENS>
QC_INLINE void dot_some_tokens(Tokens x, int first, int dim, const float* q, float* scores) {
    vfloat acc[TOKENS][4] = {};
    for (int d = 0; d < dim; d += LANES) {
        vfloat rows[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) rows[r] = load(q + r * dim + d);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
            const vfloat token = load(x.data + (first + t) * x.stride + d);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) acc[t][r] += rows[r] * token;
        }
    }
    for (int t = 0; t < TOKENS; ++t) {
        const float4 found = sums(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
        for (int r = 0; r < 4; ++r) scores[r * BLOCK + first + t] = found[r];
    }
}

inline void dot_tokens(Tokens x, int count, int dim, const float* q, float* scores) {
    constexpr int WIDE = MANY_REGISTERS ? 4 : 2;
    int t = 0;
    for (; t + WIDE <= count; t += WIDE) dot_some_tokens<WIDE>(x, t, dim, q, scores);
    for (; t < count; ++t) dot_some_tokens<1>(x, t, dim, q, scores);
}

// out[d][row] += sum over tokens of weights[row][token] * x[d][token], for DIMS dimensions at a time.
template <int ROWS, int DIMS> QC_INLINE void weigh_some(const float* x, const float* weights, float* out) {
    vfloat acc[DIMS][4] = {};
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
        vfloat p[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) p[r] = load(weights + r * BLOCK + v * LANES);
#pragma GCC unroll 8
        for (int d = 0; d < DIMS; ++d) {
            const vfloat tokens = load(x + d * BLOCK + v * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) acc[d][r] += p[r] * tokens;
        }
    }
#if defined(QC_AVX512)
    if constexpr (DIMS == 4) return store(out, load(out) + sums(acc));
#endif
#pragma GCC unroll 8
    for (int d = 0; d < DIMS; ++d) {
        store4(out + d * 4, load4(out + d * 4) + sums(acc[d][0], acc[d][1], acc[d][2], acc[d][3]));
    }
}

template <int ROWS> QC_INLINE void weigh_tile(const float* x, int count, const float* weights, float* out) {
    constexpr int DIMS = ROWS == 4 ? (MANY_REGISTERS ? 4 : 2) : ROWS == 1 ? 8 : 4;
    int d = 0;
    for (; d + DIMS <= count; d += DIMS) weigh_some<ROWS, DIMS>(x + d * BLOCK, weights, out + d * 4);
    for (; d < count; ++d) weigh_some<ROWS, 1>(x + d * BLOCK, weights, out + d * 4);
}

// out[c][row] = sum over i of x[i][row] * map[i][c], c below `columns`; `map` rows are `stride` apart.
template <int WIDE>
QC_INLINE void map_columns(const float* x, int count, const float* map, int64_t stride, float* out) {
    vfloat acc[4][WIDE] = {};
    for (int i = 0; i < count; ++i, x += 4, map += stride) {
        vfloat row[WIDE];
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; ++v) row[v] = load(map + v * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const vfloat weight = splat(x[r]);
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; ++v) acc[r][v] += weight * row[v];
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; ++v) store_columns(out + v * LANES * 4, acc[0][v], acc[1][v], acc[2][v], acc[3][v]);
}

// `out` must have room for `columns` rounded up to PAD. Columns are taken in parts of like size: of a small one the few
// sums would wait for each other.
inline void map_tile(const float* x, int count, const float* map, int64_t stride, int columns, float* out) {
    constexpr int MOST = MANY_REGISTERS ? 4 : 2; // vectors of columns at a time
    int left = (columns + LANES - 1) / LANES;
    for (int parts = (left + MOST - 1) / MOST; parts > 0; --parts) {
        const int wide = (left + parts - 1) / parts;
        switch (wide) {
            case 1: map_columns<1>(x, count, map, stride, out); break;
            case 2: map_columns<2>(x, count, map, stride, out); break;
            case 3: map_columns<MOST < 3 ? 1 : 3>(x, count, map, stride, out); break;
            default: map_columns<MOST < 4 ? 1 : 4>(x, count, map, stride, out); break;
        }
        left -= wide, map += wide * LANES, out += wide * LANES * 4;
    }
}

inline void dot_rows(int rows, const float* x, int count, const float* q, float* scores) {
    switch (rows) {
        case 1: dot_tile<1>(x, count, q, scores); break;
        case 2: dot_tile<2>(x, count, q, scores); break;
        case 3: dot_tile<3>(x, count, q, scores); break;
        default: dot_tile<4>(x, count, q, scores); break;
    }
}

inline void weigh_rows(int rows, const float* x, int count, const float* weights, float* out) {
    switch (rows) {
        case 1: weigh_tile<1>(x, count, weights, out); break;
        case 2: weigh_tile<2>(x, count, weights, out); break;
        case 3: weigh_tile<3>(x, count, weights, out); break;
        default: weigh_tile<4>(x, count, weights, out); break;
    }
}

} // namespace
} // namespace quantcache
