// Encoding with a trellis: of all paths through a block's 64 tokens the one of least weighted squared error, by
// Viterbi's algorithm. See quantcache/coding/trellis.py for the code.
//
// Every token's error in each subset is found with tokens in the lanes, because the codebook is that of a coefficient's
// width; the search then has coefficients in the lanes, of whatever widths.

#pragma once

#include "abi.h"
#include "codes.h"

#include <math.h>

namespace quantcache {
namespace {

constexpr int STATES = 8;
constexpr int SUBSETS = 4;
constexpr uint32_t C1 = 013, C0 = 04; // bit i multiplies the path bit of i tokens ago; as spread_subsets has it

constexpr int parity(uint32_t bits) { return bits ? static_cast<int>(bits & 1) ^ parity(bits >> 1) : 0; }

// The subset of a token by the path bits it sees, the newest lowest: the state reached and, highest, the bit forgotten.
constexpr int subset_of(int bits) { return 2 * parity(bits & C1) + parity(bits & C0); }

// What the search of LANES coefficients needs.
struct Paths {
    float* errors;       // [SUBSETS][LANES][BLOCK]
    uint32_t* inner;     // codes in each subset, a byte each [LANES][BLOCK]
    uint32_t* survivors; // whether each state was reached from a state whose oldest bit is 1, a bit each [BLOCK][LANES]
};

#if defined(QC_AVX512) || defined(QC_AVX2)
// Transpose 8 rows of 8 floats.
QC_INLINE void transpose_eight(const float* from, int from_stride, float* to, int to_stride) {
    __m256 rows[8], pairs[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(from + i * from_stride);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) { // columns i and i + 4 of rows 0 to 3, and of rows 4 to 7
        const int from_pair = i / 2;
        const __m256 a = pairs[from_pair], b = pairs[from_pair + 2], c = pairs[from_pair + 4], d = pairs[from_pair + 6];
        const __m256 upper = i % 2 ? _mm256_shuffle_ps(a, b, 0xee) : _mm256_shuffle_ps(a, b, 0x44);
        const __m256 lower = i % 2 ? _mm256_shuffle_ps(c, d, 0xee) : _mm256_shuffle_ps(c, d, 0x44);
        _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(upper, lower, 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(upper, lower, 0x31));
    }
}
#endif

// Transpose LANES rows of LANES floats, which are BLOCK apart, to [LANES][LANES].
QC_INLINE void transpose(const float* from, float* to) {
#if defined(QC_AVX512) || defined(QC_AVX2)
    for (int i = 0; i < LANES; i += 8) {
        for (int j = 0; j < LANES; j += 8) transpose_eight(from + i * BLOCK + j, BLOCK, to + j * LANES + i, LANES);
    }
#else
    for (int j = 0; j < LANES; ++j) {
        for (int i = 0; i < LANES; ++i) to[j * LANES + i] = from[i * BLOCK + j];
    }
#endif
}

// The nearest level of each subset to every token of one coefficient: its code, and its error as it weighs.
template <int WIDTH>
QC_INLINE void subset_errors(const Side& side, const float* y, const float* inverses, const float* weights,
                             float* errors, uint32_t* inner) {
    const float* books = side.subsets + WIDTH * SUBSETS * TABLE;
    for (int subset = 0; subset < SUBSETS; ++subset) {
        const Table<WIDTH - 1> levels(books + subset * TABLE);
        const float* tree = books + subset * TABLE + TABLE / 2;
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            const vfloat u = load(y + v * LANES) * load(inverses + v * LANES);
            const vuint code = nearest<WIDTH - 1>(u, tree);
            const vfloat off = u - levels[code];
            store(errors + subset * LANES * BLOCK + v * LANES, off * off * load(weights + v * LANES));
            const vuint before = subset ? load(inner + v * LANES) : vuint{};
            store(inner + v * LANES, before | code << (8 * subset));
        }
    }
}

// The best paths' bits as packed fields of 1 bit: those of even tokens, and those of odd ones.
inline void search_paths(const Paths& paths, vuint& even, vuint& odd) {
    vfloat cost[STATES];
    cost[0] = vfloat{};
    for (int state = 1; state < STATES; ++state) cost[state] = splat(INFINITY);
    for (int first = 0; first < BLOCK; first += LANES) {
        alignas(64) float errors[SUBSETS][LANES * LANES];
        for (int subset = 0; subset < SUBSETS; ++subset) {
            transpose(paths.errors + subset * LANES * BLOCK + first, errors[subset]);
        }
        for (int t = 0; t < LANES; ++t) {
            vfloat error[SUBSETS], reached[STATES];
#pragma GCC unroll 4
            for (int subset = 0; subset < SUBSETS; ++subset) error[subset] = load(errors[subset] + t * LANES);
            vuint survivors = {};
#pragma GCC unroll 8
            for (int state = 0; state < STATES; ++state) {
                const vfloat low = cost[state / 2] + error[subset_of(state)];
                const vfloat high = cost[state / 2 + STATES / 2] + error[subset_of(state + STATES)];
                const auto better = high < low;
                reached[state] = better ? high : low;
                survivors |= bit_cast<vuint>(better) & (1u << state);
            }
#pragma GCC unroll 8
            for (int state = 0; state < STATES; ++state) cost[state] = reached[state];
            store(paths.survivors + (first + t) * LANES, survivors);
        }
    }
    vuint state = {};
    vfloat least = cost[0];
    for (int i = 1; i < STATES; ++i) {
        const auto better = cost[i] < least;
        least = better ? cost[i] : least;
        state = better ? splat(static_cast<uint32_t>(i)) : state;
    }
    even = odd = vuint{};
    for (int t = BLOCK - 2; t >= 0; t -= 2) {
        const auto step = [&](int token, vuint& bits) {
            const vuint older = (load(paths.survivors + token * LANES) >> state) & 1u;
            bits = bits << 1 | (state & 1u);
            state = state >> 1 | older << 2;
        };
        step(t + 1, odd);
        step(t, even);
    }
}

// Pack one coefficient's path and codes, and add what its levels correlate with, <y, û> and <û, û>.
template <int WIDTH>
QC_INLINE void pack_path(const Side& side, uint32_t even, uint32_t odd, const uint32_t* inner, const float* y,
                         float weight, uint32_t* words, float* cross, float* energy) {
    uint32_t* path = words + 2 * (WIDTH - 1);
    path[0] = even;
    path[1] = odd;
    if constexpr (WIDTH > 1) {
        const vuint subsets = spread_subsets(path);
        pack<WIDTH - 1>(
            [&](int v) {
                const vuint subset = (subsets >> (STEP * v)) & 3u;
                return (load(inner + v * LANES) >> (subset * 8)) & 255u;
            },
            words);
    }
    alignas(64) float levels[BLOCK];
    path_levels<WIDTH>(words, union_table<WIDTH>(side), side.planes + WIDTH * TABLE * sizeof(float), levels);
    for (int v = 0; v < VECTORS; ++v) {
        const vfloat level = load(levels + v * LANES), weighted = level * weight;
        store(cross + v * LANES, load(cross + v * LANES) + weighted * load(y + v * LANES));
        store(energy + v * LANES, load(energy + v * LANES) + weighted * level);
    }
}

// Code all coefficients of a head's block with the steps given, and correct the gains for it.
inline void encode_paths(const Side& side, int head, int count, const float* y, const float* inverses,
                         const float* steps, const Paths& paths, uint32_t* words, float* gains) {
    const Coded* coded = side.coded + static_cast<size_t>(head) * side.dim;
    const float* weights = side.weights + static_cast<size_t>(head) * side.dim;
    alignas(64) float cross[BLOCK] = {}, energy[BLOCK] = {}, squares[BLOCK];
    for (int t = 0; t < BLOCK; ++t) squares[t] = steps[t] * steps[t];
    for (int first = 0; first < count; first += LANES) {
        const int some = count - first < LANES ? count - first : LANES;
        for (int i = 0; i < some; ++i) {
#define QC_ERRORS(W)                                                                                       \
    subset_errors<W>(side, y + (first + i) * BLOCK, inverses, squares, paths.errors + i * BLOCK, \
                     paths.inner + i * BLOCK)
            QC_FOR_WIDTH(coded[first + i].width, QC_ERRORS)
#undef QC_ERRORS
        }
        for (int subset = 0; subset < SUBSETS; ++subset) { // lanes without a coefficient
            float* rest = paths.errors + (subset * LANES + some) * BLOCK;
            memset(rest, 0, static_cast<size_t>(LANES - some) * BLOCK * sizeof(float));
        }
        vuint even, odd;
        search_paths(paths, even, odd);
        for (int i = 0; i < some; ++i) {
            const Coded& own = coded[first + i];
#define QC_PACK(W)                                                                                            \
    pack_path<W>(side, even[i], odd[i], paths.inner + i * BLOCK, y + (first + i) * BLOCK, weights[own.index], \
                 words + own.offset, cross, energy)
            QC_FOR_WIDTH(own.width, QC_PACK)
#undef QC_PACK
        }
    }
    for (int v = 0; v < VECTORS; ++v) {
        const vfloat explained = load(energy + v * LANES);
        const vfloat gain = explained > 0.0f ? load(cross + v * LANES) / explained : vfloat{};
        store(gains + v * LANES, maximum(gain, vfloat{}));
    }
}

} // namespace
} // namespace quantcache
