// Packed codes: unpacking to levels, and packing. See quantcache/coding/packing.py for the layout, and
// quantcache/coding/trellis.py for codes that are paths through a trellis.
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

// By how much each lane of a field is shifted down, or turned so that it comes to lie at bit AT.
template <int FIELD, int AT = 0> struct Shifts {
    constexpr Shifts() : lanes() {
        for (int i = 0; i < LANES; ++i) lanes[i] = (FIELD * (i / (2 * FIELD)) + 32 - AT) % 32;
    }
    alignas(64) uint32_t lanes[LANES];
};

// A field of a dimension's 64 tokens, at bit AT of every step.
template <int FIELD, int AT = 0> QC_INLINE vuint spread_field(const uint32_t* words) {
    constexpr uint32_t MASK = ONES * ((1u << FIELD) - 1);
#if defined(QC_AVX512)
    static constexpr Shifts<FIELD, AT> turns;
    return rotate_down(repeat<2 * FIELD>(words), load(turns.lanes)) & (MASK << AT);
#else
    static constexpr Shifts<FIELD> shifts;
    return ((repeat<2 * FIELD>(words) >> load(shifts.lanes)) & MASK) << AT;
#endif
}

// The codes of a dimension of WIDTH up to 4 bits, STEP bits apart, at bit AT of every step.
template <int WIDTH, int AT = 0> QC_INLINE vuint spread(const uint32_t* words) {
    if constexpr (WIDTH == 4) return spread_field<4, AT>(words);
    if constexpr (WIDTH == 3) return spread_field<2, AT + 1>(words) | spread_field<1, AT>(words + 4);
    if constexpr (WIDTH == 2) return spread_field<2, AT>(words);
    return spread_field<1, AT>(words);
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

// The levels of codes of 4 high bits and LOW_BITS low bits, each STEP bits apart; with SIGNED, negative where the
// lowest bit of a step of `negative` is set.
template <int LOW_BITS, bool SIGNED = false>
QC_INLINE void levels_by_bytes(vuint highs, vuint lows, const uint8_t* planes, float* out, vuint negative = vuint{}) {
    // Of each four lanes, bring the first bytes together, then the second bytes, and so on.
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i high = _mm256_shuffle_epi8(bit_cast<__m256i>(highs), order);
    __m256i low = high;
    if constexpr (LOW_BITS > 0) low = _mm256_shuffle_epi8(bit_cast<__m256i>(lows), order);
    __m256i signs = high;
    if constexpr (SIGNED) signs = _mm256_shuffle_epi8(bit_cast<__m256i>(negative), order);
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) { // low and high nibbles of the bytes: every other 8 tokens
        const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi32(high, 4) : high, nibble);
        __m256i low_bits[4]; // a blend looks at the highest bit of a byte
        for (int bit = 0; bit < LOW_BITS; ++bit) low_bits[bit] = _mm256_slli_epi32(low, (half ? 3 : 7) - bit);
        const auto plane = [&](int byte) { return plane_of<LOW_BITS>(planes, 0, byte, index, low_bits); };
        const __m256i b0 = plane(0), b1 = plane(1), b2 = plane(2);
        __m256i b3 = plane(3);
        if constexpr (SIGNED) {
            const __m256i sign = _mm256_slli_epi32(signs, half ? 3 : 7);
            b3 = _mm256_xor_si256(b3, _mm256_and_si256(sign, _mm256_set1_epi8(-128)));
        }
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
QC_INLINE void levels_of(const uint32_t* words, const Table<WIDTH>& table, const uint8_t* planes, float* out) {
    (void)planes;
    if constexpr (WIDTH < 4) {
        const vuint codes = spread<WIDTH>(words);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(out + v * LANES, table[codes >> (STEP * v)]);
    } else {
        const vuint high = spread_field<4>(words);
        vuint low = {};
        if constexpr (WIDTH > 4) low = spread<WIDTH - 4>(words + 8);
#if defined(QC_AVX2)
        if constexpr (WIDTH < 8) return levels_by_bytes<WIDTH - 4>(high, low, planes, out);
#endif
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            const vuint code = ((high >> (STEP * v)) & 15u) << (WIDTH - 4) | ((low >> (STEP * v)) & 15u);
            store(out + v * LANES, table[code]);
        }
    }
}

// The subsets 2 c1 + c0 of a block's tokens, from its path bits p: c1 of token t is p(t) + p(t - 1) + p(t - 3) over
// GF(2), c0 is p(t - 2), and what lies before the block is zero. Spread like a field of 2 bits.
#if defined(QC_AVX512)
// The path bits of DELAY tokens ago at bit AT of every step: turned there, but for what would come from behind the end.
template <int DELAY, int AT> struct Delayed {
    constexpr Delayed() : turns(), mask() {
        for (int i = 0; i < LANES; ++i) {
            turns[i] = ((i + 64 - DELAY) / 2 - AT) % 32;
            mask[i] = (i < DELAY ? ONES & ~1u : ONES) << AT;
        }
    }
    alignas(64) uint32_t turns[LANES];
    alignas(64) uint32_t mask[LANES];
};

QC_INLINE vuint spread_subsets(const uint32_t* path) {
    static constexpr Delayed<0, 1> now;
    static constexpr Delayed<1, 1> one;
    static constexpr Delayed<2, 0> two; // turned as far as `now`
    const vuint same = repeat<2>(path), other = swap_neighbours(same ^ (same << 1)); // of one and three tokens ago
    return (rotate_down(same, load(now.turns)) & (load(now.mask) | load(two.mask)))
           ^ (rotate_down(other, load(one.turns)) & load(one.mask));
}
#else
// Even lanes take the tokens of an odd delay one step further back.
struct EvenLanes {
    constexpr EvenLanes() : lanes() {
        for (int i = 0; i < LANES; ++i) lanes[i] = i % 2 == 0;
    }
    alignas(64) uint32_t lanes[LANES];
};

QC_INLINE vuint spread_subsets(const uint32_t* path) {
    static constexpr Shifts<1> shifts;
    static constexpr EvenLanes even;
    const vuint same = repeat<2>(path), other = swap_neighbours(same ^ (same << 1)); // of one and three tokens ago
    const vuint c1 = same ^ (other << load(even.lanes)), c0 = same << 1;
    return ((c1 >> load(shifts.lanes)) & ONES) << 1 | ((c0 >> load(shifts.lanes)) & ONES);
}
#endif

#if defined(QC_AVX2)
// path_levels for WIDTH 4 to 7: union codebooks are odd, so half of one, looked up byte by byte, and a sign will do.
template <int WIDTH> QC_INLINE void path_levels_by_bytes(const uint32_t* words, const uint8_t* planes, float* out) {
    constexpr int LOW_BITS = WIDTH - 4; // of a place in the upper half
    const vuint subsets = spread_subsets(words + 2 * (WIDTH - 1));
    vuint negative, high, low = {};
    if constexpr (WIDTH == 4) {
        const vuint code = spread<3>(words);
        negative = ~(code >> 2) & ONES;
        high = (code & (ONES * 3)) << 2 | subsets;
    } else {
        const vuint code = spread_field<4>(words);
        vuint rest = subsets; // the place's lower WIDTH - 3 bits
        if constexpr (WIDTH > 5) rest |= spread<WIDTH - 5>(words + 8) << 2;
        negative = ~(code >> 3) & ONES;
        high = (code & (ONES * 7)) << 1 | ((rest >> LOW_BITS) & ONES);
        low = (rest & (ONES * ((1u << LOW_BITS) - 1))) ^ ((negative << LOW_BITS) - negative);
    }
    levels_by_bytes<LOW_BITS, true>(high ^ ((negative << 4) - negative), low, planes, out, negative);
}
#endif

// Whether a union codebook is looked up as its upper half, with a sign.
constexpr bool in_halves(int width) { return width > 5 && width <= FREE_LOOKUP && width < STEP; }

template <int WIDTH> using UnionTable = Table<in_halves(WIDTH) ? WIDTH : WIDTH + 1>;

template <int WIDTH> QC_INLINE UnionTable<WIDTH> union_table(const Side& side) {
    return UnionTable<WIDTH>(side.unions + WIDTH * 2 * TABLE + (in_halves(WIDTH) ? 1 << WIDTH : 0));
}

// The levels of one dimension's 64 tokens, of paths through a trellis: places in the union codebook are the code of
// WIDTH - 1 bits and, lowest, the subset.
template <int WIDTH>
QC_INLINE void path_levels(const uint32_t* words, const UnionTable<WIDTH>& table, const uint8_t* planes, float* out) {
    (void)planes;
#if defined(QC_AVX2)
    if constexpr (WIDTH >= 4 && WIDTH <= 7) return path_levels_by_bytes<WIDTH>(words, planes, out);
#endif
    const vuint subsets = spread_subsets(words + 2 * (WIDTH - 1));
    // The code's high 4 bits, or all there are, and the rest; put together at once where a step has room for a place.
    constexpr int REST = WIDTH > 5 ? WIDTH - 5 : 0;
    constexpr bool TOGETHER = WIDTH < STEP;
    vuint high = {}, low = {};
    if constexpr (WIDTH > 1) high = spread<WIDTH < 5 ? WIDTH - 1 : 4, TOGETHER ? REST + 2 : 0>(words);
    if constexpr (REST > 0) low = spread<REST, TOGETHER ? 2 : 0>(words + 8);
    if constexpr (TOGETHER) {
        vuint places = high | low | subsets;
#if defined(QC_AVX2)
        if constexpr (WIDTH == 3) return levels_by_bytes<0>(places, low, planes, out);
#endif
        if constexpr (in_halves(WIDTH)) { // their lower bits, as places in the upper half
            const vuint negative = ~(places >> WIDTH) & ONES;
            places ^= (negative << WIDTH) - negative;
        }
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            vuint place = places >> (STEP * v);
            if constexpr (in_halves(WIDTH)) {
                const vuint sign = ~place << (31 - WIDTH) & 0x80000000u;
                store(out + v * LANES, bit_cast<vfloat>(bit_cast<vuint>(table[place]) ^ sign));
            } else {
                if constexpr (WIDTH >= FREE_LOOKUP) place &= (2u << WIDTH) - 1;
                store(out + v * LANES, table[place]);
            }
        }
    } else {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            const vuint code = ((high >> (STEP * v)) & 15u) << REST | ((low >> (STEP * v)) & 15u);
            store(out + v * LANES, table[code << 2 | ((subsets >> (STEP * v)) & 3u)]);
        }
    }
}

// The levels of coefficients of one width; see decode_levels.
template <int WIDTH, bool TRELLIS>
QC_INLINE void decode_run(const Side& side, const Coded* coded, int count, const uint32_t* words, int64_t ahead,
                          float* out) {
    const uint8_t* planes = side.planes + WIDTH * TABLE * sizeof(float);
    const auto decode_all = [&](const auto& decode) {
        for (int i = 0; i < count; ++i) {
            const uint32_t* own = words + coded[i].offset;
            __builtin_prefetch(own + ahead);
            decode(own, out + i * BLOCK);
        }
    };
    if constexpr (TRELLIS) {
        const UnionTable<WIDTH> table = union_table<WIDTH>(side);
        decode_all([&](const uint32_t* own, float* to) { path_levels<WIDTH>(own, table, planes, to); });
    } else {
        const Table<WIDTH> table(side.levels + WIDTH * TABLE);
        decode_all([&](const uint32_t* own, float* to) { levels_of<WIDTH>(own, table, planes, to); });
    }
}

template <bool TRELLIS>
inline void decode_runs(const Side& side, const Coded* coded, int count, const uint32_t* words, int64_t ahead,
                        float* out) {
    for (int done = 0; done < count;) {
        const Coded* first = coded + done;
        const int run = first->run < count - done ? first->run : count - done;
        float* to = out + done * BLOCK;
#define QC_RUN(W) decode_run<W, TRELLIS>(side, first, run, words, ahead, to)
        QC_FOR_WIDTH(first->width, QC_RUN)
#undef QC_RUN
        done += run;
    }
}

// The levels of some coded coefficients, [count][64]. `words` are those of the block and batch row; the same words of
// the next block are `ahead` further on. A block's words are too few for the hardware to see a stream in them.
inline void decode_levels(const Side& side, const Coded* coded, int count, const uint32_t* words, int64_t ahead,
                          float* out) {
    if (side.trellis) {
        decode_runs<true>(side, coded, count, words, ahead, out);
    } else {
        decode_runs<false>(side, coded, count, words, ahead, out);
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

// The number of boundaries below u, by descent through their search tree: a value on a boundary takes the lower code.
template <int WIDTH, int LEVEL = 0> QC_INLINE vuint nearest(vfloat u, const float* tree, vuint code = vuint{}) {
    if constexpr (LEVEL == WIDTH) {
        return code;
    } else {
        const vfloat boundary = lookup<LEVEL>(tree + (1 << LEVEL), code);
        const vuint above = bit_cast<vuint>(u > boundary); // all ones where true
        return nearest<WIDTH, LEVEL + 1>(u, tree, code + code - above);
    }
}

// Pack the codes of one dimension of a block; `code_of` gives those of a vector of tokens.
template <int WIDTH, class CodeOf> QC_INLINE void pack(const CodeOf& code_of, uint32_t* words) {
    vuint high = {}, low = {};
    for (int v = 0; v < VECTORS; ++v) {
        const vuint code = code_of(v);
        if constexpr (WIDTH <= 4) {
            low |= code << (STEP * v);
        } else {
            high |= (code >> (WIDTH - 4)) << (STEP * v);
            low |= (code & ((1u << (WIDTH - 4)) - 1)) << (STEP * v);
        }
    }
    if constexpr (WIDTH <= 4) {
        gather_words<WIDTH>(low, words);
    } else {
        gather_words<4>(high, words);
        gather_words<WIDTH - 4>(low, words + 8);
    }
}

} // namespace
} // namespace quantcache
