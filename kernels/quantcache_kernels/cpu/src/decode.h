// Decoding of one block of one key/value head to the vectors the model cached: levels, transform, mean, frame.

#pragma once

#include "abi.h"
#include "attend.h" // Arena, decode_gains
#include "codes.h"

namespace quantcache {
namespace {

struct DecodeScratch {
    DecodeScratch(const Side& side, char* base) : arena(base) {
        levels = arena.floats(static_cast<size_t>(side.dim) * BLOCK);
        x = arena.floats(static_cast<size_t>(side.dim) * BLOCK);
    }
    Arena arena;
    float* levels; // of the coded coefficients [C][BLOCK]
    float* x;      // the vectors, by dimension of the cached vector [D][BLOCK]
};

// Places `low` to `high` of the frame: decoder times levels times gains, and the mean.
inline void synthesize(const Side& side, int head, const Coded* coded, int count, int low, int high,
                       const float* levels, const float* gains, float* x) {
    constexpr int WIDE = MANY_REGISTERS ? VECTORS : 2;
    const float* decoder = side.decoder + static_cast<size_t>(head) * side.dim * side.dim;
    const float* mean = side.mean + static_cast<size_t>(head) * side.dim;
    for (int four = low; four < high; four += 4) {
        int places[4]; // a last, incomplete four does its last place again
        const float* rows[4];
        for (int i = 0; i < 4; ++i) {
            places[i] = static_cast<int>(at_most(four + i, high - 1));
            rows[i] = decoder + static_cast<size_t>(places[i]) * side.dim;
        }
        for (int at = 0; at < BLOCK; at += WIDE * LANES) {
            vfloat acc[4][WIDE] = {};
            for (int c = 0; c < count; ++c) {
                const int index = coded[c].index;
                vfloat tokens[WIDE];
#pragma GCC unroll 4
                for (int v = 0; v < WIDE; ++v) tokens[v] = load(levels + c * BLOCK + at + v * LANES);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const vfloat weight = splat(rows[i][index]);
#pragma GCC unroll 4
                    for (int v = 0; v < WIDE; ++v) acc[i][v] += weight * tokens[v];
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                float* out = x + side.order[places[i]] * BLOCK + at;
#pragma GCC unroll 4
                for (int v = 0; v < WIDE; ++v) {
                    store(out + v * LANES, acc[i][v] * load(gains + at + v * LANES) + mean[places[i]]);
                }
            }
        }
    }
}

// Turn the rotary pairs: slow ones by the anchor's position, fast ones by that and each token's offset from it.
inline void leave_frame(const Side& side, double anchor, int offset, float* x) {
    const auto turn = [&](int first, int second, const auto& rotation) {
        float *a = x + side.order[first] * BLOCK, *b = x + side.order[second] * BLOCK;
        for (int t = 0; t < BLOCK; t += LANES) {
            vfloat c, s;
            rotation(t, c, s);
            const vfloat p = load(a + t), q = load(b + t);
            store(a + t, p * c - q * s);
            store(b + t, q * c + p * s);
        }
    };
    for (int i = 0; i < side.slow_pairs; ++i) {
        float cosine, sine;
        cosine_and_sine(anchor * side.frequencies[i], cosine, sine);
        turn(i, side.slow_pairs + i, [&](int, vfloat& c, vfloat& s) { c = splat(cosine), s = splat(sine); });
    }
    for (int i = 0; i < side.fast_pairs; ++i) {
        float cosine, sine;
        cosine_and_sine(anchor * side.frequencies[side.slow_pairs + i], cosine, sine);
        const float* cosines = side.offset_cos + i * ANCHOR_LENGTH + offset;
        const float* sines = side.offset_sin + i * ANCHOR_LENGTH + offset;
        turn(side.slow + i, side.slow + side.fast_pairs + i, [&](int t, vfloat& c, vfloat& s) {
            const vfloat by = load(cosines + t), height = load(sines + t);
            c = cosine * by - sine * height;
            s = sine * by + cosine * height;
        });
    }
}

// [D][BLOCK] to [BLOCK][D].
inline void write_tokens(const float* x, int dim, float* out) {
    int d = 0;
#if defined(QC_AVX512) || defined(QC_AVX2)
    for (; d + 4 <= dim; d += 4) {
        for (int t = 0; t < BLOCK; t += 4) {
            __m128 rows[4];
            for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_ps(x + (d + i) * BLOCK + t);
            _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
            for (int i = 0; i < 4; ++i) _mm_storeu_ps(out + (t + i) * dim + d, rows[i]);
        }
    }
#endif
    for (int t = 0; t < BLOCK; ++t) {
        for (int i = d; i < dim; ++i) out[t * dim + i] = x[i * BLOCK + t];
    }
}

inline size_t decode_scratch(const Decode& d) { return DecodeScratch(*d.side, nullptr).arena.used(); }

inline void decode(const Decode& d, int block, int row, int head, char* scratch) {
    const Side& side = *d.side;
    const DecodeScratch s(side, scratch);
    const int64_t at = static_cast<int64_t>(block) * d.batch + row;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(d.codes + at * side.words);
    const int64_t ahead = block + 1 < d.blocks ? static_cast<int64_t>(d.batch) * side.words : 0;
    const Coded* coded = side.coded + static_cast<size_t>(head) * side.dim;
    const int slow = side.counts[head * 2], fast = side.counts[head * 2 + 1];
    float gains[BLOCK];
    decode_gains(d.gains + (at * d.heads + head) * BLOCK, side.gains, gains);
    decode_levels(side, coded, slow + fast, words, ahead, s.levels);
    synthesize(side, head, coded, slow, 0, side.slow, s.levels, gains, s.x);
    synthesize(side, head, coded + slow, fast, side.slow, side.dim, s.levels + slow * BLOCK, gains, s.x);
    const Place& place = d.block_table[block];
    const int64_t start = d.left_padding ? d.left_padding[row] : 0;
    const int offset = side.fast_pairs ? place.first - place.anchor : 0; // within the tables of rotations
    leave_frame(side, static_cast<double>(place.anchor - start), offset, s.x);
    const int64_t first = (static_cast<int64_t>(row) * d.heads + head) * d.blocks + block;
    write_tokens(s.x, side.dim, d.out + first * BLOCK * side.dim);
}

} // namespace
} // namespace quantcache
