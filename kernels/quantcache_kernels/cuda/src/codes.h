// Attention of a few queries on a cache's blocks.
//
// A warp goes over a split of the context, a block of 64 tokens at a time. Levels (decoding.h) are what mma.m16n8k16
// takes: tokens are rows of every tile of scores, queries its columns, and a tile of weights, turned around by movmatrix,
// is the right operand of the products with values. Only the fast dimensions of a key are decoded (fast.h).
#include "warp.h"
#include "merge.h"
#include "decoding.h"
#include "queries.h"

#ifndef KEY_TRELLIS
#define KEY_TRELLIS 0  // whether codes are paths through a trellis
#endif
#ifndef VALUE_TRELLIS
#define VALUE_TRELLIS 0
#endif

struct HeadTiles {  // of one side
    int offset, bytes;  // of the head's tiles in a block, multiples of 64
    int slow, fast;     // its tiles that hold anything; all of values' are slow
    // Kinds of the two halves of a tile, four bits each: width, and TABLED where levels are looked up.
    u32 tiles[32];
};

struct CodesArguments {
    const u8* keys;           // [blocks, batch, key_bytes]
    const u8* key_gains;      // [blocks, batch, heads, 64]
    const u8* values;         // [blocks, batch, value_bytes]
    const u8* value_gains;    // [blocks, batch, heads, 64]
    const u8* queries;        // [units, lines, query_bytes], from turn_queries
    const HeadTiles* key_heads;
    const HeadTiles* value_heads;
    const u32* key_terms;     // [heads, key_tiles, 4 lanes of a row, 2 halves, terms]: polynomials or tables
    const u32* value_terms;   // [heads, value_tiles, 8 rows, 2 halves, terms]
    const u32* fast_decoder;  // [heads, fast_tiles, fast / 8, 32 lanes, 2]
    const u32* fast_mean;     // [heads, fast / 16, 128, 4, 2, 2]: turned by every offset from the anchor and by the next
    const u32* rotation;      // [fast / 16, 128, 4, 2, 2]: cosines of two pairs likewise, then sines
    const int* block_table;   // [blocks, 3]: first slot, valid tokens, slot of the anchor
    const int* first_seen;    // [batch]: first slot that is read here, or null
    const u8* mask;           // [batch or 1, count or 1, mask_length], or null
    float* partial;           // [splits, lines, rows, 16 value_tiles]
    float* stats;             // [splits, lines, rows, 2]: peak (base 2) and sum
    int blocks, batch, heads, chunks, rows, count;  // lines: batch, chunks of rows, heads
    int per_split, paired;    // paired: two blocks share an anchor
    int key_bytes, value_bytes, query_bytes, key_room, value_room;
    int slow_tiles, fast_tiles, fast, value_tiles;
    int mask_batch, mask_query, mask_length;
    float softcap;
    u32 one;  // ONE_HALVES, as something that the compiler does not know: an instruction takes a single constant
};

constexpr int KEY_WORDS = 8 * TERMS, VALUE_WORDS = 16 * TERMS;  // of a tile's polynomials or tables

#include "fast.h"

// Gains of a lane's eight tokens: codes 1 to 255 are powers of two in steps of a 32nd, 128 is 1. A row's lanes have the
// same eight: each brings two of them into the room for all 64.
DEVICE void load_gains(const u8* place, float* room, u32 lane, float (&gains)[8]) {
    const u32 codes = reinterpret_cast<const u16*>(place)[lane];
    float own[2];
    UNROLL for (int i = 0; i < 2; ++i) {
        // A code in the lowest byte of 2^23 is a number: 2^23 + code.
        const float code = float_of(byte_permute(codes, 0x4B000000, i ? 0x7651 : 0x7650));
        const float power = power_of_two(multiply_add(code, 0.03125f, -262148.0f));
        own[i] = code > 8388608.0f ? power : 0.0f;
    }
    reinterpret_cast<Words2*>(room)[lane] = {bits_of(own[0]), bits_of(own[1])};
    sync_warp();
    UNROLL for (int i = 0; i < 2; ++i) {
        const Words4 w = reinterpret_cast<const Words4*>(room)[2 * (lane / 4) + i];
        gains[4 * i] = float_of(w.x), gains[4 * i + 1] = float_of(w.y);
        gains[4 * i + 2] = float_of(w.z), gains[4 * i + 3] = float_of(w.w);
    }
}

DEVICE float capped(float x, float cap) {
    const float y = x / cap, far = y < 0.0f ? -y : y;
    const float decayed = power_of_two(far * -2.8853900817779268f), square = y * y;
    float series = 0.05396825396825397f - square * 0.021869488536155202f;
    series = 1.0f - square * (0.3333333333333333f - square * (0.13333333333333333f - square * series));
    const float value = far < 0.3f ? far * series : (1.0f - decayed) / (1.0f + decayed);
    return (y < 0.0f ? -value : value) * cap;
}

// Puts scores of tokens that a query does not see far below all others: a lane's eight of a block, `first` and behind.
DEVICE void hide_tokens(const CodesArguments& a, int b, int query, int start, int first, int length, int first_seen,
                        float (&y)[8]) {
    UNROLL for (int r = 0; r < 8; ++r) {
        const int token = first + r, slot = start + token;
        bool seen = token < length && slot >= first_seen;
        if (a.mask) {
            const u64 entry = static_cast<u64>(b) * a.mask_batch + static_cast<u64>(query) * a.mask_query + slot;
            seen = seen && slot < a.mask_length && a.mask[entry];
        }
        if (!seen) y[r] = -1e30f;
    }
}

// A query's largest exponent in a block. Exponents are y times a unit, which is positive, plus an offset, from which the
// largest is taken.
DEVICE float find_peak(const float (&y)[8], float unit, float& offset) {
    float peak = y[0];
    UNROLL for (int r = 1; r < 8; ++r) peak = larger(peak, y[r]);
    UNROLL for (int mask = 4; mask < 32; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
    // What is not seen is far below the least peak and weighs nothing.
    peak = larger(multiply_add(peak, unit, offset), -5e29f);
    offset -= peak;
    return peak;
}

KERNEL void
#ifdef __CUDACC__
    __launch_bounds__(32, 16)
#endif
        attend_codes(
#ifdef __CUDACC__
            const __grid_constant__ CodesArguments a
#else
            const CodesArguments& a
#endif
        ) {
    const u32 lane = thread_index(), row = lane / 4, column = lane % 4;
    const int split = static_cast<int>(block_x()), line = static_cast<int>(block_y());
    const int head = line % a.heads, chunk = line / a.heads % a.chunks, b = line / (a.heads * a.chunks);
    const int lines = a.batch * a.chunks * a.heads;
    const HeadTiles& keys = a.key_heads[head];
    const HeadTiles& values = a.value_heads[head];
    const int begin = split * a.per_split;
    const int end = begin + a.per_split < a.blocks ? begin + a.per_split : a.blocks;

    u8* shared = shared_memory();
    u64* key_barrier = reinterpret_cast<u64*>(shared);
    u64* value_barrier = key_barrier + 1;
    u8* key_gains = shared + 128;
    u8* value_gains = key_gains + 64;
    float* gain_room = reinterpret_cast<float*>(value_gains + 64);
    u8* key_part = value_gains + 64 + 256;
    u8* value_part = key_part + a.key_room;
    u8* query_part = value_part + a.value_room;
    float* all_sums = reinterpret_cast<float*>(query_part + a.query_bytes);

    const u64 place = static_cast<u64>(begin) * a.batch + b;  // of a row of a block
    const u8* next_keys = a.keys + place * a.key_bytes + keys.offset;
    const u8* next_values = a.values + place * a.value_bytes + values.offset;
    const u8* next_key_gains = a.key_gains + (place * a.heads + head) * 64;
    const u8* next_value_gains = a.value_gains + (place * a.heads + head) * 64;
    const u64 gain_stride = static_cast<u64>(a.batch) * a.heads * 64;
    const u32 key_bytes = static_cast<u32>(keys.bytes), value_bytes = static_cast<u32>(values.bytes);

    const auto fetch_keys = [&](int block, bool with_query) {
        const u32 query_bytes = with_query ? static_cast<u32>(a.query_bytes) : 0;
        barrier_expect(key_barrier, key_bytes + 64 + query_bytes);
        bulk_copy(key_gains, next_key_gains, 64, key_barrier);
        if (key_bytes) bulk_copy(key_part, next_keys, key_bytes, key_barrier);
        if (with_query) {
            const u64 unit = static_cast<u64>(a.paired ? block / 2 : block);
            bulk_copy(query_part, a.queries + (unit * lines + line) * a.query_bytes, query_bytes, key_barrier);
        }
    };
    const auto fetch_values = [&] {
        barrier_expect(value_barrier, value_bytes + 64);
        bulk_copy(value_gains, next_value_gains, 64, value_barrier);
        if (value_bytes) bulk_copy(value_part, next_values, value_bytes, value_barrier);
    };

    if (lane == 0) {
        barrier_init(key_barrier);
        barrier_init(value_barrier);
        barriers_ready();
        if (begin < end) {
            fetch_keys(begin, true);
            fetch_values();
        }
    }
    for (int i = static_cast<int>(lane); i < a.value_tiles * 128; i += 32) all_sums[i] = 0.0f;
    sync_warp();

    float peak[2] = {-1e30f, -1e30f}, total[2] = {0.0f, 0.0f};
    const int first_seen = a.first_seen ? a.first_seen[b] : 0;
    const int query_row = static_cast<int>(row) < a.rows ? static_cast<int>(row) : a.rows - 1;
    const u8* own_query = query_part + 32 * query_row + 8 * static_cast<int>(column);
    const int query_stride = 32 * a.rows;
    const int key_tiles = a.slow_tiles + a.fast_tiles;
    const int slow_tiles = keys.slow, fast_tiles = keys.fast, value_tiles = values.slow;
    const u32 own_keys = keys.tiles[lane], own_values = values.tiles[lane];  // of the tile that is a lane's number
    const u32* key_terms = a.key_terms + head * key_tiles * KEY_WORDS + 2 * TERMS * column;
    const u32* value_terms = a.value_terms + head * a.value_tiles * VALUE_WORDS + 2 * TERMS * row;

    for (int block = begin; block < end; ++block) {
        const u32 parity = static_cast<u32>(block - begin) & 1;
        const bool more = block + 1 < end;
        const int start = a.block_table[3 * block], length = a.block_table[3 * block + 1];
        const int offset_of_block = start - a.block_table[3 * block + 2];
        // ---------------------------------------------------------------- scores
        barrier_wait(key_barrier, parity);
        float scores[4][4], gains[8];
        UNROLL for (int m = 0; m < 4; ++m)
            UNROLL for (int i = 0; i < 4; ++i) scores[m][i] = 0.0f;
        const u8 *codes = key_part + 4 * lane, *query = own_query;
        const u32* terms = key_terms;
        ROLLED for (int tile = 0; tile < slow_tiles; ++tile) {
            u32 levels[16];
            decode_tile<KEY_TRELLIS, true>(shuffle(own_keys, tile), codes, terms, a.one, lane, levels);
            terms += KEY_WORDS;
            const Words2 q = *reinterpret_cast<const Words2*>(query);
            query += query_stride;
            UNROLL for (int m = 0; m < 4; ++m)
                mma_half(scores[m], levels[2 * m], levels[2 * m + 1], levels[8 + 2 * m], levels[9 + 2 * m], q.x, q.y);
        }
        const u8* fast_query = own_query + query_stride * a.slow_tiles;
        const int first_token = offset_of_block + 8 * static_cast<int>(row);
        score_fast<KEY_TRELLIS>(a, head, fast_tiles, own_keys, codes, key_terms + a.slow_tiles * KEY_WORDS, fast_query,
                                first_token, lane, scores);
        load_gains(key_gains, gain_room, lane, gains);
        UNROLL for (int m = 0; m < 4; ++m)
            UNROLL for (int i = 0; i < 4; ++i) scores[m][i] *= gains[2 * m + i / 2];
        score_means(a, head, fast_query, first_token, lane, scores);
        const float* extra = reinterpret_cast<const float*>(query_part + query_stride * (a.slow_tiles + a.fast / 16));
        float y[2][8], unit[2], offset[2], tile_peak[2];
        const bool all_seen = length == 64 && start >= first_seen && !a.mask;
        UNROLL for (int q = 0; q < 2; ++q) {
            const int own = 2 * static_cast<int>(column) + q, safe = own < a.rows ? own : a.rows - 1;
            unit[q] = extra[safe], offset[q] = extra[8 + safe];
            UNROLL for (int r = 0; r < 8; ++r) y[q][r] = scores[r / 2][2 * (r % 2) + q];
            if (!all_seen || a.softcap > 0.0f) {
                UNROLL for (int r = 0; r < 8; ++r) y[q][r] = multiply_add(y[q][r], unit[q], offset[q]);
                unit[q] = 1.0f, offset[q] = 0.0f;
            }
            if (a.softcap > 0.0f)
                UNROLL for (int r = 0; r < 8; ++r) y[q][r] = capped(y[q][r], a.softcap) * 1.4426950408889634f;
            if (!all_seen)
                hide_tokens(a, b, (chunk * a.rows + safe) % a.count, start, 8 * static_cast<int>(row), length, first_seen,
                            y[q]);
            tile_peak[q] = find_peak(y[q], unit[q], offset[q]);
        }
        sync_warp();
        if (more && lane == 0) {
            MARK(14);
            next_keys += static_cast<u64>(a.batch) * a.key_bytes, next_key_gains += gain_stride;
            fetch_keys(block + 1, !a.paired || (block + 1) % 2 == 0);
        }
        // ---------------------------------------------------------------- weights
        barrier_wait(value_barrier, parity);
        u32 weights[4][2];
        float part[2] = {0.0f, 0.0f};
        load_gains(value_gains, gain_room, lane, gains);
        UNROLL for (int r = 0; r < 8; ++r) {
            float w[2];
            UNROLL for (int q = 0; q < 2; ++q) {
                const float p = power_of_two(multiply_add(y[q][r], unit[q], offset[q]));
                part[q] += p;
                w[q] = p * gains[r];
            }
            weights[r / 2][r % 2] = transpose(pack_halves(w[0], w[1]));
        }
        // Sums are kept in units of an earlier peak, and that is raised only when they could grow too large.
        float scale[2];
        bool raise = false;
        UNROLL for (int q = 0; q < 2; ++q) raise |= tile_peak[q] > peak[q] + 10.0f;
        if (any_lane(raise)) {
            float decay[2];
            UNROLL for (int q = 0; q < 2; ++q) {
                const float higher = tile_peak[q] > peak[q] + 10.0f ? tile_peak[q] : peak[q];
                decay[q] = power_of_two(peak[q] - higher);
                peak[q] = higher;
                total[q] *= decay[q];
            }
            ROLLED for (int tile = 0; tile < a.value_tiles; ++tile)
                UNROLL for (int i = 0; i < 4; ++i)
                    all_sums[128 * tile + 4 * static_cast<int>(lane) + i] *= decay[i % 2];
        }
        UNROLL for (int q = 0; q < 2; ++q) {
            scale[q] = power_of_two(tile_peak[q] - peak[q]);
            total[q] = multiply_add(part[q], scale[q], total[q]);
        }
        // ---------------------------------------------------------------- values
        const u8* value_codes = value_part + 4 * lane;
        Words4* sums = reinterpret_cast<Words4*>(all_sums) + lane;
        terms = value_terms;
        ROLLED for (int tile = 0; tile < value_tiles; ++tile) {
            u32 levels[16];
            decode_tile<VALUE_TRELLIS, false>(shuffle(own_values, tile), value_codes, terms, a.one, lane, levels);
            terms += VALUE_WORDS;
            float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            UNROLL for (int m = 0; m < 4; ++m)
                mma_half(c, levels[2 * m], levels[8 + 2 * m], levels[2 * m + 1], levels[9 + 2 * m], weights[m][0],
                         weights[m][1]);
            const Words4 w = *sums;
            *sums = {bits_of(multiply_add(c[0], scale[0], float_of(w.x))), bits_of(multiply_add(c[1], scale[1], float_of(w.y))),
                   bits_of(multiply_add(c[2], scale[0], float_of(w.z))), bits_of(multiply_add(c[3], scale[1], float_of(w.w)))};
            sums += 32;
        }
        sync_warp();
        if (more && lane == 0) {
            MARK(14);
            next_values += static_cast<u64>(a.batch) * a.value_bytes, next_value_gains += gain_stride;
            fetch_values();
        }
    }

    const u64 place_out = static_cast<u64>(split * lines + line) * a.rows;
    float* out = a.partial + place_out * 16 * a.value_tiles;
    float* stats = a.stats + place_out * 2;
    UNROLL for (int q = 0; q < 2; ++q) {
        UNROLL for (int mask = 4; mask < 32; mask *= 2) total[q] = add(total[q], shuffle_xor(total[q], mask));
        const int own = 2 * static_cast<int>(column) + q;
        if (own < a.rows) {
            for (int tile = 0; tile < a.value_tiles; ++tile)
                UNROLL for (int i = 0; i < 2; ++i)
                    out[own * 16 * a.value_tiles + 16 * tile + 8 * i + static_cast<int>(row)] =
                        all_sums[128 * tile + 4 * static_cast<int>(lane) + 2 * i + q];
            if (row == 0) stats[2 * own] = peak[q], stats[2 * own + 1] = total[q];
        }
    }
}

#include "near.h"
