// Encoding of one block of one key/value head: frame, transform, gain search, nearest codewords or best paths, packing.

#pragma once

#include "abi.h"
#include "attend.h" // Arena
#include "codes.h"
#include "dense.h"
#include "viterbi.h"

#include <math.h>

namespace quantcache {
namespace {

struct EncodeScratch {
    EncodeScratch(const Side& side, char* base) : arena(base) {
        x = arena.floats(static_cast<size_t>(side.dim) * BLOCK);
        y = arena.floats(static_cast<size_t>(side.dim + 3) * BLOCK);
        const size_t group = static_cast<size_t>(side.trellis ? LANES : 0) * BLOCK;
        paths.errors = arena.floats(SUBSETS * group);
        paths.inner = reinterpret_cast<uint32_t*>(arena.floats(group));
        paths.survivors = reinterpret_cast<uint32_t*>(arena.floats(group));
    }
    Arena arena;
    float* x; // centred vectors in the frame [D][BLOCK]
    float* y; // coded coefficients [C][BLOCK]
    Paths paths;
};

// Turn `count` rotary pairs back: rows `first` + i and `first` + count + i of x, by each token's own position or by
// one position for all.
inline void turn_back(float* x, int first, int count, const double* frequencies, const double* positions, bool one) {
    for (int i = 0; i < count; ++i) {
        float cosines[BLOCK], sines[BLOCK];
        if (one) {
            cosine_and_sine(positions[0] * frequencies[i], cosines[0], sines[0]);
            for (int t = 1; t < BLOCK; ++t) cosines[t] = cosines[0], sines[t] = sines[0];
        } else {
            for (int t = 0; t < BLOCK; ++t) cosine_and_sine(positions[t] * frequencies[i], cosines[t], sines[t]);
        }
        float *a = x + (first + i) * BLOCK, *b = x + (first + count + i) * BLOCK;
        for (int t = 0; t < BLOCK; ++t) {
            const float p = a[t], q = b[t];
            a[t] = p * cosines[t] + q * sines[t];
            b[t] = q * cosines[t] - p * sines[t];
        }
    }
}

// y[c] = encoder row of coefficient c times x, over dimensions `low` to `high`, for 4 coefficients.
inline void transform(const float* const* encoder, const float* x, int low, int high, float* y) {
    constexpr int WIDE = MANY_REGISTERS ? VECTORS : 2;
    for (int first = 0; first < VECTORS; first += WIDE) {
        vfloat acc[4][WIDE] = {};
        for (int k = low; k < high; ++k) {
            vfloat tokens[WIDE];
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; ++v) tokens[v] = load(x + k * BLOCK + (first + v) * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const vfloat weight = splat(encoder[i][k]);
#pragma GCC unroll 4
                for (int v = 0; v < WIDE; ++v) acc[i][v] += weight * tokens[v];
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; ++v) store(y + i * BLOCK + (first + v) * LANES, acc[i][v]);
        }
    }
}

// <y, û> and <û, û> in the metric of the error, over coefficients of one width.
template <int WIDTH>
QC_INLINE void correlate(const Side& side, const Coded* coded, const float* weights, const float* y, vfloat inverse,
                         vfloat& cross, vfloat& energy) {
    const float* tree = side.trees + WIDTH * TABLE;
    const Table<WIDTH> levels(side.levels + WIDTH * TABLE);
    const int count = coded->run;
    for (int c = 0; c < count; ++c) {
        const vfloat value = load(y + c * BLOCK);
        const vfloat level = levels[nearest<WIDTH>(value * inverse, tree)];
        const vfloat weighted = level * weights[coded[c].index];
        cross += weighted * value;
        energy += weighted * level;
    }
}

// The codes of one coefficient with the chosen steps, packed.
template <int WIDTH>
QC_INLINE void pack_nearest(const Side& side, const float* y, const float* inverses, uint32_t* words) {
    const float* tree = side.trees + WIDTH * TABLE;
    pack<WIDTH>([&](int v) { return nearest<WIDTH>(load(y + v * LANES) * load(inverses + v * LANES), tree); }, words);
}

inline uint8_t quantize_gain(float gain) {
    const float exponent = log2f(gain > 1e-30f ? gain : 1e-30f) * GAIN_STEPS + GAIN_CENTER;
    const float code = nearbyintf(exponent);
    return static_cast<uint8_t>(code < 0.0f ? 0.0f : code > 255.0f ? 255.0f : code);
}

// Choose every token's gain among the factors: the steps, their inverses, and the gains corrected for quantization.
inline void search_gains(const Side& side, int head, int count, const float* y, float* steps, float* inverses,
                         float* gains) {
    const Coded* coded = side.coded + static_cast<size_t>(head) * side.dim;
    const float* weights = side.weights + static_cast<size_t>(head) * side.dim;
    for (int v = 0; v < VECTORS; ++v) {
        const float* column = y + v * LANES;
        vfloat power = {};
        for (int c = 0; c < count; ++c) power += load(column + c * BLOCK) * load(column + c * BLOCK);
        power /= static_cast<float>(count > 1 ? count : 1);
        vfloat rms;
        for (int lane = 0; lane < LANES; ++lane) rms[lane] = sqrtf(power[lane]);
        vfloat best_saved = splat(-1.0f), best_gain = {}, best_step = {}, best_inverse = {};
        for (int f = 0; f < side.num_factors; ++f) {
            const vfloat step = rms * side.factors[f];
            const vfloat inverse = step > 0.0f ? 1.0f / step : vfloat{};
            vfloat cross = {}, energy = {};
            for (int c = 0; c < count; c += coded[c].run) {
#define QC_CORRELATE(W) correlate<W>(side, coded + c, weights, column + c * BLOCK, inverse, cross, energy)
                QC_FOR_WIDTH(coded[c].width, QC_CORRELATE)
#undef QC_CORRELATE
            }
            vfloat gain = energy > 0.0f ? cross / energy : vfloat{};
            gain = maximum(gain, vfloat{});
            const vfloat saved = gain * cross;
            const auto better = saved > best_saved;
            best_saved = better ? saved : best_saved;
            best_gain = better ? gain : best_gain;
            best_step = better ? step : best_step;
            best_inverse = better ? inverse : best_inverse;
        }
        store(gains + v * LANES, best_gain);
        store(steps + v * LANES, best_step);
        store(inverses + v * LANES, best_inverse);
    }
}

inline size_t encode_scratch(const Encode& e) { return EncodeScratch(*e.side, nullptr).arena.used(); }

inline void encode(const Encode& e, int block, int row, int head, char* scratch) {
    const Side& side = *e.side;
    const EncodeScratch s(side, scratch);
    read_transposed(e.x, e.dtype, row, head, block * BLOCK, side.order, side.dim, s.x);

    const Place& place = e.block_table[block];
    const double start = e.left_padding ? static_cast<double>(e.left_padding[row]) : 0.0;
    double positions[BLOCK];
    for (int t = 0; t < BLOCK; ++t) positions[t] = place.first + (t - start);
    const double anchor = place.anchor - start;
    turn_back(s.x, 0, side.slow_pairs, side.frequencies, &anchor, true);
    turn_back(s.x, side.slow, side.fast_pairs, side.frequencies + side.slow_pairs, positions, false);
    const float* mean = side.mean + static_cast<size_t>(head) * side.dim;
    for (int d = 0; d < side.dim; ++d) {
        for (int t = 0; t < BLOCK; ++t) s.x[d * BLOCK + t] -= mean[d];
    }

    const Coded* coded = side.coded + static_cast<size_t>(head) * side.dim;
    const float* encoder = side.encoder + static_cast<size_t>(head) * side.dim * side.dim;
    const int slow = side.counts[head * 2], count = slow + side.counts[head * 2 + 1];
    for (int part = 0; part < 2; ++part) {
        const int last = part ? count : slow;
        for (int c = part ? slow : 0; c < last; c += 4) { // what a last, incomplete four adds is overwritten or unused
            const float* rows[4];
            for (int i = 0; i < 4; ++i) rows[i] = encoder + coded[at_most(c + i, last - 1)].index * side.dim;
            transform(rows, s.x, part ? side.slow : 0, part ? side.dim : side.slow, s.y + c * BLOCK);
        }
    }

    float steps[BLOCK], inverses[BLOCK], gains[BLOCK];
    search_gains(side, head, count, s.y, steps, inverses, gains);
    const int64_t at = static_cast<int64_t>(block) * e.batch + row;
    uint32_t* words = reinterpret_cast<uint32_t*>(e.codes + at * side.words);
    if (side.trellis) {
        encode_paths(side, head, count, s.y, inverses, steps, s.paths, words, gains);
        for (int pass = 1; pass < side.trellis; ++pass) { // with the gains that fit the last paths
            for (int t = 0; t < BLOCK; ++t) {
                steps[t] = gains[t];
                inverses[t] = gains[t] > 0.0f ? 1.0f / gains[t] : 0.0f;
            }
            encode_paths(side, head, count, s.y, inverses, steps, s.paths, words, gains);
        }
    } else {
        for (int c = 0; c < count; ++c) {
#define QC_PACK(W) pack_nearest<W>(side, s.y + c * BLOCK, inverses, words + coded[c].offset)
            QC_FOR_WIDTH(coded[c].width, QC_PACK)
#undef QC_PACK
        }
    }
    uint8_t* codes = e.gains + (at * e.heads + head) * BLOCK;
    for (int t = 0; t < BLOCK; ++t) codes[t] = quantize_gain(gains[t]);
}

} // namespace
} // namespace quantcache
