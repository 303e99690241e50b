// Attention of one token's queries on packed codes: one warp goes over a split of the context, 128 tokens at a time.
//
// Codes lie in the order in which the tensor cores want them (layout.py): a lane's words hold its own codes, four of
// them go to a register as signed bytes by one PRMT through a table of levels, and mma.m16n8k16 / m16n8k32 take them
// from there. Neither scales nor transforms touch a code: queries come in coded coordinates, in two times eight bits
// (PRECISE) or in eight; gains multiply scores and weights of a token; the merge kernel turns sums of levels into
// vectors.
//
// Tokens are rows of every tile of scores, queries its columns. A tile of weights, turned around by movmatrix, is the
// right operand of the products with values.
#include "warp.h"
#include "merge.h"

#ifndef PRECISE
#define PRECISE 1  // a query takes two columns, high and low byte, else one
#endif
#ifndef PARTS
#define PARTS 1  // tiles of eight columns
#endif

constexpr int QUERIES = PRECISE ? PARTS : 2 * PARTS;  // of a lane
constexpr u32 MAGIC = 0x4B400000;         // as a float 1.5 * 2^23: adding an integer below 2^22 adds it to both
#define MAGIC_FLOAT 12582912.0f
constexpr int CLASSES = 5;  // widths 8, 4, 3, 2, 1 in the order in which a head's tiles lie

struct HeadLayout {
    int key_offset, key_bytes, value_offset, value_bytes;  // of the head's parts in a row, multiples of 16
    int key_tiles[CLASSES], value_tiles[CLASSES];
    int reserved[2];
};

struct Tables {  // of levels, eight bytes each; see make_tables in layout.py
    u32 one[4], two[4], three[2], four[4];
};

struct AttentionArguments {
    const u8* rows;           // [anchors, batch, row_bytes]
    const u8* queries;        // [anchors, batch, heads, query_bytes]: see pack_queries in layout.py
    const HeadLayout* heads;  // [heads]
    const int* starts;        // [batch]: first visible token, or null
    float* partial;           // [splits, batch * heads, group, dim]
    float* stats;             // [splits, batch * heads, group, 2]: peak (base 2) and sum
    Tables tables;
    int batch, num_heads, group, dim;  // dim: coefficients of a head
    int tokens, anchors, per_split;
    int row_bytes, query_bytes;
    int key_room, value_room;  // the largest part of any head
};

constexpr int GAIN_BYTES = 256;   // 128 gains in half precision
constexpr int PEAK_BYTES = 16;    // the largest value gain of either half, two floats and padding

template <int WORDS>
DEVICE void load_words(const u8* place, u32 lane, u32 (&words)[WORDS]) {
    if (WORDS >= 4) {
        UNROLL for (int i = 0; i < WORDS / 4; ++i) {
            Words4 w = reinterpret_cast<const Words4*>(place + 512 * i)[lane];
            words[4 * i] = w.x, words[4 * i + 1] = w.y, words[4 * i + 2] = w.z, words[4 * i + 3] = w.w;
        }
    }
    if (WORDS % 4) {
        Words2 w = reinterpret_cast<const Words2*>(place + 512 * (WORDS / 4))[lane];
        words[WORDS / 4 * 4] = w.x, words[WORDS / 4 * 4 + 1] = w.y;
    }
}

// 32 codes of one width to levels: eight registers of four signed bytes.
template <int WIDTH>
struct Levels;

template <>
struct Levels<8> {
    DEVICE void decode(const u32* w, const Tables&, u32 (&out)[8]) {
        UNROLL for (int i = 0; i < 8; ++i) out[i] = w[i];
    }
};
template <>
struct Levels<4> {  // 1 to 127 around 64: each half of the codebook by its own table, zero from the other's
    DEVICE void decode(const u32* w, const Tables& t, u32 (&out)[8]) {
        UNROLL for (int i = 0; i < 4; ++i) {
            u32 low = w[i], high = w[i] ^ 0x88888888u;
            out[2 * i] = byte_permute(t.four[0], t.four[1], low) | byte_permute(t.four[2], t.four[3], high);
            low >>= 16, high >>= 16;
            out[2 * i + 1] = byte_permute(t.four[0], t.four[1], low) | byte_permute(t.four[2], t.four[3], high);
        }
    }
};
template <>
struct Levels<3> {  // 24 codes in the lower three bits of nibbles, eight in the fourth bits
    DEVICE void decode(const u32* w, const Tables& t, u32 (&out)[8]) {
        u32 last = (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & ~0x11111111u);
        last = (last & 0x33333333u) | (w[2] >> 1 & ~0x33333333u);
        UNROLL for (int i = 0; i < 4; ++i) {
            u32 selector = (i < 3 ? w[i] : last) & 0x77777777u;
            out[2 * i] = byte_permute(t.three[0], t.three[1], selector);
            out[2 * i + 1] = byte_permute(t.three[0], t.three[1], selector >> 16);
        }
    }
};
template <>
struct Levels<2> {  // bits 0 and 1 of a nibble, and 2 and 3
    DEVICE void decode(const u32* w, const Tables& t, u32 (&out)[8]) {
        UNROLL for (int i = 0; i < 2; ++i) {
            u32 selector = w[i] & 0x77777777u;
            out[4 * i] = byte_permute(t.two[0], t.two[1], selector);
            out[4 * i + 1] = byte_permute(t.two[0], t.two[1], selector >> 16);
            selector = w[i] >> 1 & 0x77777777u;
            out[4 * i + 2] = byte_permute(t.two[2], t.two[3], selector);
            out[4 * i + 3] = byte_permute(t.two[2], t.two[3], selector >> 16);
        }
    }
};
template <>
struct Levels<1> {  // every bit of a nibble, by a table of its own
    DEVICE void decode(const u32* w, const Tables& t, u32 (&out)[8]) {
        u32 selector = w[0] & 0x77777777u;
        UNROLL for (int half = 0; half < 2; ++half) {
            out[half] = byte_permute(t.one[0], t.one[0], selector);
            out[2 + half] = byte_permute(t.one[1], t.one[1], selector);
            out[4 + half] = byte_permute(t.one[2], t.one[3], selector);
            selector >>= 16;
        }
        selector = w[0] >> 1 & 0x77777777u;
        out[6] = byte_permute(t.one[2], t.one[3], selector);
        out[7] = byte_permute(t.one[2], t.one[3], selector >> 16);
    }
};

// Scores of 128 tokens: tiles of 16 coefficients of one width. Row r of tile m is token 8 (r % 8) + 2 m + r / 8.
template <int WIDTH>
DEVICE void score_tiles(int count, const u8*& codes, const u8*& queries, u32 lane, const Tables& tables,
                        int (&scores)[PARTS][2][4][4]) {
    ROLLED for (int tile = 0; tile < count; ++tile) {
        u32 words[2 * WIDTH], levels[8], query[PARTS];
        UNROLL for (int part = 0; part < PARTS; ++part)
            query[part] = reinterpret_cast<const u32*>(queries + 128 * part)[lane];
        load_words(codes, lane, words);
        UNROLL for (int half = 0; half < 2; ++half) {
            Levels<WIDTH>::decode(words + half * WIDTH, tables, levels);
            UNROLL for (int m = 0; m < 4; ++m)
                UNROLL for (int part = 0; part < PARTS; ++part)
                    mma_k16(scores[part][half][m], levels[2 * m], levels[2 * m + 1], query[part]);
        }
        codes += 256 * WIDTH;
        queries += 128 * PARTS;
    }
}

// Weighted sums of the levels of tiles of 16 coefficients of one width, added to the accumulators of the warp.
template <int WIDTH>
DEVICE void sum_tiles(int count, const u8*& codes, float*& sums, u32 lane, const Tables& tables,
                      const u32 (&weights)[PARTS][2][4], const int (&first)[PARTS][2],
                      const float (&scale)[QUERIES]) {
    ROLLED for (int tile = 0; tile < count; ++tile) {
        u32 words[2 * WIDTH], levels[8];
        load_words(codes, lane, words);
        int c[PARTS][4];
        UNROLL for (int part = 0; part < PARTS; ++part)
            UNROLL for (int i = 0; i < 4; ++i) c[part][i] = first[part][i % 2];
        UNROLL for (int half = 0; half < 2; ++half) {
            Levels<WIDTH>::decode(words + half * WIDTH, tables, levels);
            UNROLL for (int k = 0; k < 2; ++k)
                UNROLL for (int part = 0; part < PARTS; ++part)
                    mma_k32(c[part], levels[4 * k], levels[4 * k + 1], levels[4 * k + 2], levels[4 * k + 3],
                            weights[part][half][2 * k], weights[part][half][2 * k + 1]);
        }
        float* place = sums + lane * 2 * QUERIES;  // coefficient row / 8, query
        UNROLL for (int i = 0; i < 2; ++i)
            UNROLL for (int part = 0; part < PARTS; ++part) {
                const float x0 = add(float_of(static_cast<u32>(c[part][2 * i])), -MAGIC_FLOAT);
                const float x1 = add(float_of(static_cast<u32>(c[part][2 * i + 1])), -MAGIC_FLOAT);
#if PRECISE
                float& sum = place[QUERIES * i + part];
                sum = multiply_add(multiply_add(x0, 256.0f, x1), scale[part], sum);
#else
                float* sum = place + QUERIES * i + 2 * part;
                sum[0] = multiply_add(x0, scale[2 * part], sum[0]);
                sum[1] = multiply_add(x1, scale[2 * part + 1], sum[1]);
#endif
            }
        codes += 256 * WIDTH;
        sums += 64 * QUERIES;
    }
}

// Gains of a lane's eight tokens of a half.
DEVICE void load_gains(const u8* place, u32 row, float (&gains)[8]) {
    Words4 w = reinterpret_cast<const Words4*>(place)[row];
    gains[0] = half_low(w.x), gains[1] = half_high(w.x), gains[2] = half_low(w.y), gains[3] = half_high(w.y);
    gains[4] = half_low(w.z), gains[5] = half_high(w.z), gains[6] = half_low(w.w), gains[7] = half_high(w.w);
}

KERNEL void
#ifdef __CUDACC__
    __launch_bounds__(32, 12)
#endif
        attend(GIVEN(AttentionArguments) a) {
    const u32 lane = thread_index(), row = lane / 4, column = lane % 4;
    const int split = static_cast<int>(block_x()), line = static_cast<int>(block_y());
    const int b = line / a.num_heads, head = line % a.num_heads;
    const HeadLayout& layout = a.heads[head];
    const Tables& tables = a.tables;
    const int begin = split * a.per_split;
    const int end = begin + a.per_split < a.anchors ? begin + a.per_split : a.anchors;

    u8* shared = shared_memory();
    u64* key_barrier = reinterpret_cast<u64*>(shared);
    u64* value_barrier = key_barrier + 1;
    u8* key_part = shared + 128;
    u8* query_part = key_part + a.key_room;
    u8* value_part = query_part + a.query_bytes;
    float* sums = reinterpret_cast<float*>(value_part + a.value_room);
    const int tiles = a.dim / 16;

    const u8* rows = a.rows + static_cast<u64>(b) * a.row_bytes;
    const u64 row_stride = static_cast<u64>(a.batch) * a.row_bytes;
    const u8* queries = a.queries + static_cast<u64>(line) * a.query_bytes;
    const u64 query_stride = static_cast<u64>(a.batch) * a.num_heads * a.query_bytes;
    const int key_bytes = layout.key_bytes, value_bytes = layout.value_bytes;
    const u8* next_keys = rows + layout.key_offset + begin * row_stride;
    const u8* next_values = rows + layout.value_offset + begin * row_stride;
    const u8* next_queries = queries + begin * query_stride;

    if (lane == 0) {
        barrier_init(key_barrier);
        barrier_init(value_barrier);
        barriers_ready();
        if (begin < end) {
            barrier_expect(key_barrier, static_cast<u32>(key_bytes + a.query_bytes));
            bulk_copy(key_part, next_keys, static_cast<u32>(key_bytes), key_barrier);
            bulk_copy(query_part, next_queries, static_cast<u32>(a.query_bytes), key_barrier);
            barrier_expect(value_barrier, static_cast<u32>(value_bytes));
            bulk_copy(value_part, next_values, static_cast<u32>(value_bytes), value_barrier);
        }
    }
    for (int i = static_cast<int>(lane); i < tiles * 64 * QUERIES; i += 32) sums[i] = 0.0f;
    sync_warp();

    float peak[QUERIES], total[QUERIES];
    UNROLL for (int q = 0; q < QUERIES; ++q) peak[q] = -1e30f, total[q] = 0.0f;
    const int first_token = a.starts ? a.starts[b] : 0;

    for (int anchor = begin; anchor < end; ++anchor) {
        const u32 parity = static_cast<u32>(anchor - begin) & 1;
        const bool more = anchor + 1 < end;
        // ---------------------------------------------------------------- scores
        barrier_wait(key_barrier, parity);
        const int* extra = reinterpret_cast<const int*>(query_part + 128 * PARTS * tiles);
        float unit[QUERIES], offset[QUERIES];
        int scores[PARTS][2][4][4];
        UNROLL for (int part = 0; part < PARTS; ++part) {
            const int* own = extra + 32 * part + 2 * column;
            UNROLL for (int half = 0; half < 2; ++half)
                UNROLL for (int m = 0; m < 4; ++m)
                    UNROLL for (int i = 0; i < 4; ++i) scores[part][half][m][i] = own[i % 2];
            UNROLL for (int i = 0; i < QUERIES / PARTS; ++i) {
                unit[part * (QUERIES / PARTS) + i] = float_of(static_cast<u32>(own[8 + i]));
                offset[part * (QUERIES / PARTS) + i] = float_of(static_cast<u32>(own[16 + i]));
            }
        }
        {
            const u8* codes = key_part + GAIN_BYTES;
            const u8* query = query_part;
            score_tiles<8>(layout.key_tiles[0], codes, query, lane, tables, scores);
            score_tiles<4>(layout.key_tiles[1], codes, query, lane, tables, scores);
            score_tiles<3>(layout.key_tiles[2], codes, query, lane, tables, scores);
            score_tiles<2>(layout.key_tiles[3], codes, query, lane, tables, scores);
            score_tiles<1>(layout.key_tiles[4], codes, query, lane, tables, scores);
        }
        float y[QUERIES][2][8];
        UNROLL for (int half = 0; half < 2; ++half) {
            float gains[8];
            load_gains(key_part + 128 * half, row, gains);
            UNROLL for (int part = 0; part < PARTS; ++part)
                UNROLL for (int r = 0; r < 8; ++r) {
                    const int* c = scores[part][half][r / 2] + 2 * (r % 2);
                    const float x0 = add(float_of(static_cast<u32>(c[0])), -MAGIC_FLOAT);
                    const float x1 = add(float_of(static_cast<u32>(c[1])), -MAGIC_FLOAT);
#if PRECISE
                    y[part][half][r] = multiply_add(x0, 128.0f, x1) * (gains[r] * unit[part]);
#else
                    y[2 * part][half][r] = x0 * (gains[r] * unit[2 * part]);
                    y[2 * part + 1][half][r] = x1 * (gains[r] * unit[2 * part + 1]);
#endif
                }
        }
        const int token = 128 * anchor;
        if (token + 128 > a.tokens || token < first_token) {
            UNROLL for (int half = 0; half < 2; ++half)
                UNROLL for (int r = 0; r < 8; ++r) {
                    const int t = token + 64 * half + 8 * static_cast<int>(row) + r;
                    if (t < first_token || t >= a.tokens)
                        UNROLL for (int q = 0; q < QUERIES; ++q) y[q][half][r] = -1e30f;
                }
        }
        sync_warp();
        if (more && lane == 0) {
            next_keys += row_stride, next_queries += query_stride;
            barrier_expect(key_barrier, static_cast<u32>(key_bytes + a.query_bytes));
            bulk_copy(key_part, next_keys, static_cast<u32>(key_bytes), key_barrier);
            bulk_copy(query_part, next_queries, static_cast<u32>(a.query_bytes), key_barrier);
        }
        // ---------------------------------------------------------------- weights
        float tile_peak[QUERIES];
        UNROLL for (int q = 0; q < QUERIES; ++q) {
            float m = -1e30f;
            UNROLL for (int half = 0; half < 2; ++half)
                UNROLL for (int r = 0; r < 8; ++r) m = larger(m, y[q][half][r]);
            UNROLL for (int mask = 4; mask < 32; mask *= 2) m = larger(m, shuffle_xor(m, mask));
            tile_peak[q] = m;
        }
        barrier_wait(value_barrier, parity);
        const float* gain_peaks = reinterpret_cast<const float*>(value_part + GAIN_BYTES);
        const float gain_peak = larger(larger(gain_peaks[0], gain_peaks[1]), 1e-10f);
        const float steps = PRECISE ? 65535.0f : 255.0f;
        const float inverse = steps / gain_peak, step = gain_peak / steps;
        u32 weights[PARTS][2][4];
        float part[QUERIES];
        UNROLL for (int q = 0; q < QUERIES; ++q) part[q] = 0.0f;
        UNROLL for (int half = 0; half < 2; ++half) {
            float gains[8];
            u32 w[QUERIES][8];
            load_gains(value_part + 128 * half, row, gains);
            UNROLL for (int r = 0; r < 8; ++r) {
                const float gain = gains[r] * inverse;
                UNROLL for (int q = 0; q < QUERIES; ++q) {
                    const float x = y[q][half][r];
                    const float p = x > -5e29f ? power_of_two(add(x, -tile_peak[q])) : 0.0f;
                    part[q] += p;
                    w[q][r] = bits_of(multiply_add(p, gain, 8388608.0f));  // the integer in the low bits
                }
            }
            UNROLL for (int part = 0; part < PARTS; ++part)
                UNROLL for (int i = 0; i < 4; ++i) {
#if PRECISE
                    const u32 pair = byte_permute(w[part][2 * i], w[part][2 * i + 1], 0x4051);
#else
                    const u32 low = byte_permute(w[2 * part][2 * i], w[2 * part][2 * i + 1], 0x0040);
                    const u32 high = byte_permute(w[2 * part + 1][2 * i], w[2 * part + 1][2 * i + 1], 0x0040);
                    const u32 pair = byte_permute(low, high, 0x5410);
#endif
                    weights[part][half][i] = transpose(pair);
                }
        }
        // Sums are kept in units of an earlier peak, and that is raised only when they could grow too large.
        float scale[QUERIES];
        bool raise = false;
        UNROLL for (int q = 0; q < QUERIES; ++q) {
            tile_peak[q] = add(tile_peak[q], offset[q]);
            raise |= tile_peak[q] > peak[q] + 10.0f;
        }
        if (any_lane(raise)) {
            float decay[QUERIES];
            UNROLL for (int q = 0; q < QUERIES; ++q) {
                const float higher = tile_peak[q] > peak[q] + 10.0f ? tile_peak[q] : peak[q];
                decay[q] = power_of_two(peak[q] - higher);
                peak[q] = higher;
                total[q] *= decay[q];
            }
            for (int tile = 0; tile < tiles; ++tile)
                UNROLL for (int i = 0; i < 2 * QUERIES; ++i)
                    sums[(tile * 32 + static_cast<int>(lane)) * 2 * QUERIES + i] *= decay[i % QUERIES];
        }
        UNROLL for (int q = 0; q < QUERIES; ++q) {
            const float factor = power_of_two(tile_peak[q] - peak[q]);
            total[q] = multiply_add(part[q], factor, total[q]);
            scale[q] = factor * step;
        }
        // ---------------------------------------------------------------- values
        {
            const u8* codes = value_part + GAIN_BYTES + PEAK_BYTES;
            float* sum = sums;
            int zero[PARTS][2];
            UNROLL for (int part = 0; part < PARTS; ++part) zero[part][0] = zero[part][1] = static_cast<int>(MAGIC);
            sum_tiles<8>(layout.value_tiles[0], codes, sum, lane, tables, weights, zero, scale);
            if (layout.value_tiles[1]) {
                int first[PARTS][2];
                const u32 center = 0xC0C0C0C0u;  // -64
                UNROLL for (int part = 0; part < PARTS; ++part) {
                    int c[4] = {zero[part][0], zero[part][0], zero[part][0], zero[part][0]};
                    UNROLL for (int half = 0; half < 2; ++half)
                        UNROLL for (int k = 0; k < 2; ++k)
                            mma_k32(c, center, center, center, center, weights[part][half][2 * k],
                                    weights[part][half][2 * k + 1]);
                    first[part][0] = c[0], first[part][1] = c[1];
                }
                sum_tiles<4>(layout.value_tiles[1], codes, sum, lane, tables, weights, first, scale);
            }
            sum_tiles<3>(layout.value_tiles[2], codes, sum, lane, tables, weights, zero, scale);
            sum_tiles<2>(layout.value_tiles[3], codes, sum, lane, tables, weights, zero, scale);
            sum_tiles<1>(layout.value_tiles[4], codes, sum, lane, tables, weights, zero, scale);
        }
        sync_warp();
        if (more && lane == 0) {
            next_values += row_stride;
            barrier_expect(value_barrier, static_cast<u32>(value_bytes));
            bulk_copy(value_part, next_values, static_cast<u32>(value_bytes), value_barrier);
        }
    }

    const int lines = a.batch * a.num_heads;
    float* out = a.partial + static_cast<u64>(split * lines + line) * a.group * a.dim;
    float* stats = a.stats + static_cast<u64>(split * lines + line) * a.group * 2;
    UNROLL for (int q = 0; q < QUERIES; ++q) {
        UNROLL for (int mask = 4; mask < 32; mask *= 2) total[q] = add(total[q], shuffle_xor(total[q], mask));
        const int query = PRECISE ? 4 * q + static_cast<int>(column)
                                  : 8 * (q / 2) + 2 * static_cast<int>(column) + q % 2;
        if (query < a.group) {
            for (int tile = 0; tile < tiles; ++tile)
                UNROLL for (int i = 0; i < 2; ++i)
                    out[query * a.dim + 16 * tile + 8 * i + static_cast<int>(row)] =
                        sums[(tile * 32 + static_cast<int>(lane)) * 2 * QUERIES + QUERIES * i + q];
            if (row == 0) stats[2 * query] = peak[q], stats[2 * query + 1] = total[q];
        }
    }
}
