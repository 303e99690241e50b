// Vectors of LANES floats or ints: GCC's vector extension for arithmetic, intrinsics for the few operations it lacks.
// Included once by each instruction set's file. Everything is in an unnamed namespace, and nothing of the C++ library
// is used, so that the linker can never take one instruction set's copy of a function for another's.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define QC_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#define QC_AVX2 1
#include <immintrin.h>
#endif

#define QC_INLINE inline __attribute__((always_inline))

namespace quantcache {
namespace {

#if defined(QC_AVX512)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int VECTORS = 64 / LANES; // vectors that hold one value for each token of a block
#if defined(QC_AVX512)
constexpr bool MANY_REGISTERS = true; // 32, else 16
#else
constexpr bool MANY_REGISTERS = false;
#endif

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef uint32_t vuint __attribute__((vector_size(LANES * 4)));
typedef float vfloat_u __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vuint_u __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float float4 __attribute__((vector_size(16), aligned(4), may_alias));

QC_INLINE vfloat load(const float* p) { return *reinterpret_cast<const vfloat_u*>(p); }
QC_INLINE vuint load(const uint32_t* p) { return *reinterpret_cast<const vuint_u*>(p); }
QC_INLINE void store(float* p, vfloat v) { *reinterpret_cast<vfloat_u*>(p) = v; }
QC_INLINE void store(uint32_t* p, vuint v) { *reinterpret_cast<vuint_u*>(p) = v; }
QC_INLINE vfloat splat(float x) { return x - vfloat{}; } // not plus: that would be an addition, for the sake of -0
QC_INLINE vuint splat(uint32_t x) { return vuint{} + x; }
QC_INLINE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
QC_INLINE void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
QC_INLINE vfloat maximum(vfloat a, vfloat b) { return a > b ? a : b; } // b where either is NaN

template <class To, class From> QC_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes must agree");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

QC_INLINE float sum(vfloat v) {
    float total = 0.0f;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

QC_INLINE float largest(vfloat v) {
    float top = v[0];
    for (int i = 1; i < LANES; ++i) top = v[i] > top ? v[i] : top;
    return top;
}

// The sums of four vectors.
QC_INLINE float4 sums(vfloat a, vfloat b, vfloat c, vfloat d) {
#if defined(QC_AVX512) || defined(QC_AVX2)
#if defined(QC_AVX512)
    const auto half = [](vfloat v) {
        return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    };
    const __m256 a8 = half(a), b8 = half(b), c8 = half(c), d8 = half(d);
#else
    const __m256 a8 = a, b8 = b, c8 = c, d8 = d;
#endif
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a8, b8), _mm256_hadd_ps(c8, d8));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
    return float4{sum(a), sum(b), sum(c), sum(d)};
#endif
}

#if defined(QC_AVX512)
// The sums of sixteen vectors, v[i][j] in lane 4 i + j; each is added up as sums() does.
QC_INLINE vfloat sums(const vfloat (&v)[4][4]) {
    const auto pairs = [](__m512 a, __m512 b) { // of neighbours, those of a and b by turns in every four lanes
        return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    };
    __m512 fours[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        __m512 halves[4]; // of v[2 i][j], then of v[2 i + 1][j]
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512 a = v[2 * i][j], b = v[2 * i + 1][j];
            halves[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
        fours[i] = pairs(pairs(halves[0], halves[1]), pairs(halves[2], halves[3]));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                         _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
}
#endif

// Four rows of LANES floats as columns: out[4 i + r] is lane i of row r.
QC_INLINE void store_columns(float* out, vfloat a, vfloat b, vfloat c, vfloat d) {
#if defined(QC_AVX512)
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d AB = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)), CD = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    const __m512 i0 = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)); // of lanes 0, 4, 8 and 12
    const __m512 i1 = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    const __m512 i2 = _mm512_castpd_ps(_mm512_unpacklo_pd(AB, CD));
    const __m512 i3 = _mm512_castpd_ps(_mm512_unpackhi_pd(AB, CD));
    const __m512 low = _mm512_shuffle_f32x4(i0, i1, 0x44), high = _mm512_shuffle_f32x4(i0, i1, 0xee);
    const __m512 LOW = _mm512_shuffle_f32x4(i2, i3, 0x44), HIGH = _mm512_shuffle_f32x4(i2, i3, 0xee);
    store(out, _mm512_shuffle_f32x4(low, LOW, 0x88));
    store(out + 16, _mm512_shuffle_f32x4(low, LOW, 0xdd));
    store(out + 32, _mm512_shuffle_f32x4(high, HIGH, 0x88));
    store(out + 48, _mm512_shuffle_f32x4(high, HIGH, 0xdd));
#elif defined(QC_AVX2)
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d AB = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)), CD = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    const __m256 i0 = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)); // of lanes 0 and 4
    const __m256 i1 = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    const __m256 i2 = _mm256_castpd_ps(_mm256_unpacklo_pd(AB, CD));
    const __m256 i3 = _mm256_castpd_ps(_mm256_unpackhi_pd(AB, CD));
    store(out, _mm256_permute2f128_ps(i0, i1, 0x20));
    store(out + 8, _mm256_permute2f128_ps(i2, i3, 0x20));
    store(out + 16, _mm256_permute2f128_ps(i0, i1, 0x31));
    store(out + 24, _mm256_permute2f128_ps(i2, i3, 0x31));
#else
    for (int i = 0; i < LANES; ++i) store4(out + 4 * i, float4{a[i], b[i], c[i], d[i]});
#endif
}

// COUNT words, again and again.
template <int COUNT> QC_INLINE vuint repeat(const uint32_t* p) {
#if defined(QC_AVX512)
    if constexpr (COUNT == 8) {
        return bit_cast<vuint>(_mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    } else if constexpr (COUNT == 4) {
        return bit_cast<vuint>(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    } else {
        return bit_cast<vuint>(_mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
#elif defined(QC_AVX2)
    __m256i eight;
    if constexpr (COUNT == 8) {
        eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    } else if constexpr (COUNT == 4) {
        eight = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else {
        eight = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    return bit_cast<vuint>(eight);
#else
    vuint words;
    for (int i = 0; i < LANES; ++i) words[i] = p[i % COUNT];
    return words;
#endif
}

#if defined(QC_AVX512)
// Each lane rotated towards its low bits.
QC_INLINE vuint rotate_down(vuint v, vuint by) {
    return bit_cast<vuint>(_mm512_rorv_epi32(bit_cast<__m512i>(v), bit_cast<__m512i>(by)));
}
#endif

// Lanes 1 0 3 2 5 4 ...
QC_INLINE vuint swap_neighbours(vuint v) {
#if defined(QC_AVX512)
    return bit_cast<vuint>(_mm512_shuffle_epi32(bit_cast<__m512i>(v), _MM_PERM_CDAB));
#elif defined(QC_AVX2)
    return bit_cast<vuint>(_mm256_shuffle_epi32(bit_cast<__m256i>(v), 0xb1));
#else
    vuint swapped;
    for (int i = 0; i < LANES; ++i) swapped[i] = v[i ^ 1];
    return swapped;
#endif
}

// Up to how many bits of an index the bits above them do not count.
#if defined(QC_AVX512)
constexpr int FREE_LOOKUP = 7;
#else
constexpr int FREE_LOOKUP = 4;
#endif

// A table of 2**BITS floats (readable up to a multiple of LANES), in registers where the instructions can look it up
// there. For BITS up to 4 only the low 4 bits of an index count, and they must be below 2**BITS; beyond FREE_LOOKUP the
// whole index must be.
template <int BITS> class Table {
  public:
    QC_INLINE explicit Table(const float* table) : table_(table) {
        if constexpr (HELD) {
#pragma GCC unroll 8
            for (int i = 0; i < SIZE; ++i) held_[i] = load(table + LANES * i);
        }
    }

    QC_INLINE vfloat operator[](vuint index) const {
        if constexpr (BITS == 0) return splat(table_[0]);
#if defined(QC_AVX512)
        const __m512i bits = bit_cast<__m512i>(index);
        if constexpr (BITS <= 4) return _mm512_permutexvar_ps(bits, held_[0]);
        if constexpr (BITS == 5) return _mm512_permutex2var_ps(held_[0], bits, held_[1]);
        const auto sixty_four = [&](int i) {
            return _mm512_mask_blend_ps(_mm512_test_epi32_mask(bits, _mm512_set1_epi32(32)),
                                        _mm512_permutex2var_ps(held_[i], bits, held_[i + 1]),
                                        _mm512_permutex2var_ps(held_[i + 2], bits, held_[i + 3]));
        };
        if constexpr (BITS == 6) return sixty_four(0);
        if constexpr (BITS == 7) {
            return _mm512_mask_blend_ps(
                _mm512_test_epi32_mask(bits, _mm512_set1_epi32(64)), sixty_four(0), sixty_four(4));
        }
        return _mm512_i32gather_ps(bits, table_, 4);
#else
#if defined(QC_AVX2)
        const __m256i bits = bit_cast<__m256i>(index);
        if constexpr (BITS <= 3) return _mm256_permutevar8x32_ps(held_[0], bits);
        const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 28)); // a blend looks at the sign bit
        const auto sixteen = [&](int i) {
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(held_[i], bits),
                                    _mm256_permutevar8x32_ps(held_[i + 1], bits), bit3);
        };
        if constexpr (BITS == 4) return sixteen(0);
        if constexpr (BITS == 5) {
            return _mm256_blendv_ps(sixteen(0), sixteen(2), _mm256_castsi256_ps(_mm256_slli_epi32(bits, 27)));
        }
#endif
        if constexpr (BITS <= 4) index &= 15;
        vfloat found;
        for (int i = 0; i < LANES; ++i) found[i] = table_[index[i]]; // as fast as a gather, or faster
        return found;
#endif
    }

  private:
#if defined(QC_AVX512)
    static constexpr bool HELD = BITS > 0 && BITS <= 7;
#elif defined(QC_AVX2)
    static constexpr bool HELD = BITS > 0 && BITS <= 5;
#else
    static constexpr bool HELD = false;
#endif
    static constexpr int SIZE = HELD && (1 << BITS) > LANES ? (1 << BITS) / LANES : 1;
    const float* table_;
    vfloat held_[SIZE];
};

template <int BITS> QC_INLINE vfloat lookup(const float* table, vuint index) { return Table<BITS>(table)[index]; }

// e**x to about one unit in the last place; 0 below -87, for minus infinity too, and NaN for NaN. x must not exceed 88.
QC_INLINE vfloat exponential(vfloat x) {
    const vfloat floor_of_x = splat(-87.0f);
    const vfloat clamped = maximum(floor_of_x, x); // in this order: NaN stays
    // Adding 1.5 * 2**23 leaves the nearest integer in the low bits.
    const vfloat shifted = clamped * 1.44269504f + 12582912.0f;
    const vfloat n = shifted - 12582912.0f;
    const vfloat r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    vfloat p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vuint exponent = (bit_cast<vuint>(shifted) + 127u) << 23;
    const vfloat result = p * bit_cast<vfloat>(exponent);
    return x < floor_of_x ? vfloat{} : result;
}

// Hyperbolic tangent; a polynomial near zero, where the exponential form would cancel.
QC_INLINE vfloat hyperbolic_tangent(vfloat x) {
    const vfloat size = x < 0.0f ? -x : x;
    const vfloat square = x * x;
    vfloat p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const vfloat small = p * square * x + x;
    const vfloat limited = size > 9.1f ? splat(9.1f) : size;
    const vfloat large = 1.0f - 2.0f / (exponential(limited + limited) + 1.0f);
    const vfloat signed_large = x < 0.0f ? -large : large;
    return size < 0.625f ? small : signed_large;
}

// Cosine and sine of an angle in radians up to 1e6, formed in float64. Without branches: loops over it vectorise.
QC_INLINE void cosine_and_sine(double angle, float& cosine, float& sine) {
    constexpr double TO_INTEGER = 6755399441055744.0; // 1.5 * 2**52
    const double n = (angle * 0.63661977236758138 + TO_INTEGER) - TO_INTEGER;
    // pi / 2 in three parts, the first two of 33 bits: products with n are exact.
    const double r = ((angle - n * 1.57079632673412561417) - n * 6.07710050630396597660e-11)
                     - n * 2.02226624879595063154e-21;
    const double s = r * r;
    const double sin_r =
        r + r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880 - s / 39916800))));
    const double cos_r =
        1.0 - 0.5 * s + s * s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 + s * (-1.0 / 3628800 + s / 479001600))));
    const double quarter = n * 0.25;
    const double down = (quarter - 0.375 + TO_INTEGER) - TO_INTEGER; // floor of a multiple of a quarter
    const double quadrant = n - 4.0 * down;
    const bool odd = quadrant == 1.0 || quadrant == 3.0;
    const double c = odd ? sin_r : cos_r;
    const double d = odd ? cos_r : sin_r;
    cosine = static_cast<float>(quadrant == 1.0 || quadrant == 2.0 ? -c : c);
    sine = static_cast<float>(quadrant >= 2.0 ? -d : d);
}

} // namespace
} // namespace quantcache
