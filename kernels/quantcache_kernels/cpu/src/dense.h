// Tensors in the model's dtype: reading and writing float32, bfloat16 and float16.

#pragma once

#include "abi.h"
#include "simd.h"

namespace quantcache {
namespace {

QC_INLINE float from_bfloat16(uint16_t x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }

QC_INLINE uint16_t to_bfloat16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16; // to nearest, ties to even
    return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

QC_INLINE float from_float16(uint16_t x) {
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    // Scaling by 2**112 moves the exponent's bias and makes subnormal numbers normal; infinities and NaNs are theirs.
    const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 5.192296858534828e33f);
    return bit_cast<float>((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled) | sign);
}

QC_INLINE uint16_t to_float16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x47800000u) { // 65536 and more, infinities, NaNs
        return static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
    }
    if (magnitude < 0x38800000u) { // below the smallest normal number: adding 0.5 rounds to its last place
        return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return static_cast<uint16_t>(sign | (rounded >> 13));
}

QC_INLINE float read(const void* data, int32_t dtype, int64_t index) {
    if (dtype == FLOAT32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return dtype == BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}

QC_INLINE void write(void* data, int32_t dtype, int64_t index, float x) {
    if (dtype == FLOAT32) {
        static_cast<float*>(data)[index] = x;
    } else {
        static_cast<uint16_t*>(data)[index] = dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
    }
}

// Where a token's vector begins.
QC_INLINE const void* token_at(const Dense& x, int32_t dtype, int row, int head, int token) {
    const int64_t index = row * x.batch_stride + head * x.head_stride + token * x.token_stride;
    return static_cast<const char*>(x.data) + index * (dtype == FLOAT32 ? 4 : 2);
}

// The vectors of `count` tokens from `first` on in float32, `stride` apart; what lies between their end and `stride`
// becomes zero.
inline void read_tokens(const Dense& x, int32_t dtype, int row, int head, int first, int count, int dim, int stride,
                        float* out) {
    for (int t = 0; t < count; ++t, out += stride) {
        const void* token = token_at(x, dtype, row, head, first + t);
        const uint16_t* halves = static_cast<const uint16_t*>(token);
        if (dtype == FLOAT32) {
            memcpy(out, token, dim * sizeof(float));
        } else if (dtype == BFLOAT16) {
            for (int d = 0; d < dim; ++d) out[d] = from_bfloat16(halves[d]);
        } else {
            for (int d = 0; d < dim; ++d) out[d] = from_float16(halves[d]);
        }
        for (int d = dim; d < stride; ++d) out[d] = 0.0f;
    }
}

// The vectors of BLOCK tokens from `first` on, transposed to [D][BLOCK] in float32: dimension `order[i]` in row i.
inline void read_transposed(const Dense& x, int32_t dtype, int row, int head, int first, const int32_t* order, int dim,
                            float* out) {
    constexpr int CHUNK = 16; // a cache line of float32
    for (int d = 0; d < dim; d += CHUNK) {
        const int last = d + CHUNK < dim ? d + CHUNK : dim;
        for (int t = 0; t < BLOCK; ++t) {
            const void* token = token_at(x, dtype, row, head, first + t);
            for (int i = d; i < last; ++i) out[i * BLOCK + t] = read(token, dtype, order[i]);
        }
    }
}

} // namespace
} // namespace quantcache
