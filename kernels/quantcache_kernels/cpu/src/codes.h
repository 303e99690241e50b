// Packed codes: unpacking to levels, and packing. See quantcache/coding/packing.py for the layout.
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

// Apply a function template of the width to a run-time width.
#define QC_FOR_WIDTH(width, CALL) \
    switch (width) {              \
        case 1: CALL(1); break;   \
        case 2: CALL(2); break;   \
        case 3: CALL(3); break;   \
        case 4: CALL(4); break;   \
        case 5: CALL(5); break;   \
        case 6: CALL(6); break;   \
        case 7: CALL(7); break;   \
        case 8: CALL(8); break;   \
        default: break;           \
    }

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

#if defined(QC_AVX2)
// Tables of 16 levels and more do not fit a register of 8 floats. A byte shuffle looks up 32 codes in 16 entries at
// once: do so for each of the four bytes of a float, in tables of the high 4 bits of the code, choose among them by the
// low bits, and interleave the bytes. `planes` is [low bits][byte of the float][high bits].
template <int LOW_BITS>
QC_INLINE __m256i plane_of(const uint8_t* planes, int low, int byte, __m256i high, const __m256i* low_bits) {
    if constexpr (LOW_BITS == 0) {
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes + (low * 4 + byte) * 16));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), high);
    } else {
        constexpr int BIT = LOW_BITS - 1;
        return _mm256_blendv_epi8(plane_of<BIT>(planes, low, byte, high, low_bits),
                                  plane_of<BIT>(planes, low | 1 << BIT, byte, high, low_bits), low_bits[BIT]);
    }
}

template <int WIDTH> QC_INLINE void levels_by_bytes(const uint32_t* words, const uint8_t* planes, float* out) {
    constexpr int LOW_BITS = WIDTH - 4;
    // Of each four lanes, bring the first bytes together, then the second bytes, and so on.
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i high = _mm256_shuffle_epi8(bit_cast<__m256i>(repeat<8>(words)), order);
    __m256i low = high;
    if constexpr (LOW_BITS > 0) low = _mm256_shuffle_epi8(bit_cast<__m256i>(spread<LOW_BITS>(words + 8)), order);
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) { // low and high nibbles of the bytes: every other 8 tokens
        const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi32(high, 4) : high, nibble);
        __m256i low_bits[4]; // a blend looks at the highest bit of a byte
        for (int bit = 0; bit < LOW_BITS; ++bit) low_bits[bit] = _mm256_slli_epi32(low, (half ? 3 : 7) - bit);
        const auto plane = [&](int byte) { return plane_of<LOW_BITS>(planes, 0, byte, index, low_bits); };
        const __m256i b0 = plane(0), b1 = plane(1), b2 = plane(2), b3 = plane(3);
        const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
        const __m256i low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
        float* to = out + half * LANES;
        store(to, bit_cast<vfloat>(_mm256_unpacklo_epi16(low01, low23)));
        store(to + 16, bit_cast<vfloat>(_mm256_unpackhi_epi16(low01, low23)));
        store(to + 32, bit_cast<vfloat>(_mm256_unpacklo_epi16(high01, high23)));
        store(to + 48, bit_cast<vfloat>(_mm256_unpackhi_epi16(high01, high23)));
    }
}
#endif

// The levels of one dimension's 64 tokens.
template <int WIDTH>
QC_INLINE void levels_of(const uint32_t* words, const float* table, const uint8_t* planes, float* out) {
    (void)planes;
    if constexpr (WIDTH < 4) {
        const vuint codes = spread<WIDTH>(words);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(out + v * LANES, lookup<WIDTH>(table, codes >> (STEP * v)));
    } else {
#if defined(QC_AVX2)
        if constexpr (WIDTH < 8) return levels_by_bytes<WIDTH>(words, planes, out);
#endif
        const vuint high = spread_field<4>(words);
        vuint low = {};
        if constexpr (WIDTH > 4) low = spread<WIDTH - 4>(words + 8);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            const vuint code = ((high >> (STEP * v)) & 15u) << (WIDTH - 4) | ((low >> (STEP * v)) & 15u);
            store(out + v * LANES, lookup<WIDTH>(table, code));
        }
    }
}

// The levels of coefficients of one width; see decode_levels.
template <int WIDTH>
QC_INLINE void decode_run(const Side& side, const Coded* coded, int count, const uint32_t* words, int64_t ahead,
                          float* out) {
    const float* table = side.levels + WIDTH * TABLE;
    const uint8_t* planes = side.planes + WIDTH * TABLE * sizeof(float);
    for (int i = 0; i < count; ++i) {
        const uint32_t* own = words + coded[i].offset;
        __builtin_prefetch(own + ahead);
        levels_of<WIDTH>(own, table, planes, out + i * BLOCK);
    }
}

// The levels of some coded coefficients, [count][64]. `words` are those of the block and batch row; the same words of
// the next block are `ahead` further on. A block's words are too few for the hardware to see a stream in them.
inline void decode_levels(const Side& side, const Coded* coded, int count, const uint32_t* words, int64_t ahead,
                          float* out) {
    for (int done = 0; done < count;) {
        const Coded* first = coded + done;
        const int run = first->run < count - done ? first->run : count - done;
        float* to = out + done * BLOCK;
#define QC_RUN(W) decode_run<W>(side, first, run, words, ahead, to)
        QC_FOR_WIDTH(first->width, QC_RUN)
#undef QC_RUN
        done += run;
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
