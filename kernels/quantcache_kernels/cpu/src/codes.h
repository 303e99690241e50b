// Packed codes: unpacking to levels, and packing. See quantcache/packing.py for the layout.
//
// A field of f bits of one dimension of a block is 2f words; token t is in word t % 2f at bit f * (t // 2f). Laid out
// in the lanes of a vector (word l % 2f in lane l, shifted down by f * (l // 2f)), the field of token v * LANES + l is
// therefore in lane l at bit STEP * v, whatever f: one variable shift for a whole field, then one shift by a constant
// for each vector of tokens.

#pragma once

#include "abi.h"
#include "simd.h"

namespace quantcache {
namespace {

constexpr int STEP = LANES / 2;                            // bits between neighbouring vectors of tokens
constexpr uint32_t ONES = STEP == 4 ? 0x11111111u : 0x01010101u; // the lowest bit of every step

// By how much each lane of a field is shifted down.
template <int FIELD> struct Shifts {
    constexpr Shifts() : lanes() {
        for (int i = 0; i < LANES; ++i) lanes[i] = FIELD * (i / (2 * FIELD));
    }
    alignas(64) uint32_t lanes[LANES];
};

template <int FIELD> QC_INLINE vuint spread_field(const uint32_t* words) {
    static constexpr Shifts<FIELD> shifts;
    return (repeat<2 * FIELD>(words) >> load(shifts.lanes)) & (ONES * ((1u << FIELD) - 1));
}

// The codes of a dimension of WIDTH up to 4 bits, STEP bits apart.
template <int WIDTH> QC_INLINE vuint spread(const uint32_t* words) {
    if constexpr (WIDTH == 4) return spread_field<4>(words);
    if constexpr (WIDTH == 3) return spread_field<2>(words) << 1 | spread_field<1>(words + 4);
    if constexpr (WIDTH == 2) return spread_field<2>(words);
    return spread_field<1>(words);
}

// The levels of one dimension's 64 tokens.
template <int WIDTH> QC_INLINE void levels_of(const uint32_t* words, const float* table, float* out) {
    if constexpr (WIDTH <= 4) {
        const vuint codes = spread<WIDTH>(words);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(out + v * LANES, lookup<WIDTH>(table, codes >> (STEP * v)));
    } else {
        const vuint high = spread_field<4>(words), low = spread<WIDTH - 4>(words + 8);
        if constexpr (WIDTH == 5 && FOLDED) {
            // Codebooks are symmetric: the upper half of the table and a sign cost less than the whole of it.
            const vuint below = ~high & (ONES << 3); // lower half: mirror the code
            const vuint size = ((high & (ONES * 7)) << 1 | low) ^ ((below << 1) - (below >> 3));
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                const vuint sign = (below << (28 - STEP * v)) & 0x80000000u;
                const vfloat level = lookup<4>(table + 16, size >> (STEP * v));
                store(out + v * LANES, bit_cast<vfloat>(bit_cast<vuint>(level) ^ sign));
            }
        } else {
            uint32_t codes[BLOCK];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) {
                const vuint code = ((high >> (STEP * v)) & 15u) << (WIDTH - 4) | ((low >> (STEP * v)) & 15u);
                if constexpr (WIDTH <= REGISTER_BITS) {
                    store(out + v * LANES, lookup<WIDTH>(table, code));
                } else {
                    store(codes + v * LANES, code);
                }
            }
            if constexpr (WIDTH > REGISTER_BITS) {
#pragma GCC unroll 8
                for (int t = 0; t < BLOCK; ++t) memcpy(out + t, table + codes[t], sizeof(float)); // as integers
            }
        }
    }
}

// The levels of some coded coefficients, [count][64]. `words` are those of the block and batch row; the same words of
// the next block are `ahead` further on. A block's words are too few for the hardware to see a stream in them.
inline void decode_levels(const Coded* coded, int count, const uint32_t* words, int64_t ahead, const float* tables,
                          float* out) {
    for (int i = 0; i < count; ++i, out += BLOCK) {
        const int width = coded[i].width; // ascending, so the branch is predictable
        const uint32_t* own = words + coded[i].offset;
        const float* table = tables + width * TABLE;
        __builtin_prefetch(own + ahead);
        switch (width) {
            case 1: levels_of<1>(own, table, out); break;
            case 2: levels_of<2>(own, table, out); break;
            case 3: levels_of<3>(own, table, out); break;
            case 4: levels_of<4>(own, table, out); break;
            case 5: levels_of<5>(own, table, out); break;
            case 6: levels_of<6>(own, table, out); break;
            case 7: levels_of<7>(own, table, out); break;
            case 8: levels_of<8>(own, table, out); break;
            default: break;
        }
    }
}

// Collapse a spread field into its words: the inverse of spread_field.
template <int FIELD> QC_INLINE void gather_field(vuint codes, uint32_t* words) {
    uint32_t lanes[LANES];
    memcpy(lanes, &codes, sizeof(lanes));
    for (int word = 0; word < 2 * FIELD; ++word) {
        uint32_t bits = 0;
        for (int i = word; i < LANES; i += 2 * FIELD) bits |= lanes[i] << (FIELD * (i / (2 * FIELD)));
        words[word] = bits;
    }
}

// Pack the spread codes of a dimension of WIDTH up to 4 bits.
template <int WIDTH> QC_INLINE void gather_words(vuint codes, uint32_t* words) {
    if constexpr (WIDTH == 4) gather_field<4>(codes, words);
    if constexpr (WIDTH == 3) {
        gather_field<2>((codes >> 1) & (ONES * 3), words);
        gather_field<1>(codes & ONES, words + 4);
    }
    if constexpr (WIDTH == 2) gather_field<2>(codes, words);
    if constexpr (WIDTH == 1) gather_field<1>(codes, words);
}

} // namespace
} // namespace quantcache
