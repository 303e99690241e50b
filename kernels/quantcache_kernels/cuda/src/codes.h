// Attention of a few queries on a cache's blocks.
//
// A warp goes over a split of the context, a unit at a time: two blocks of 64 tokens that share an anchor. Warps of a block
// of threads have splits of one line, and share the constants of its head; else each is by itself. Levels
// (decoding.h) are what the tensor cores take: tokens are rows of every tile of scores, queries its columns, and weights,
// turned around by movmatrix, are the left operand of the products with values. Only the fast dimensions of a key are
// decoded (fast.h).
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
    int slow_bytes;  // of its slow tiles
};

struct CodesArguments {
    Places places;
    const Places* there;      // where places are in memory, or null
    const u8* queries;        // [units, lines, query_bytes], from turn_queries
    const HeadTiles* key_heads;
    const HeadTiles* value_heads;
    const u32* key_terms;     // [heads, key_tiles, 4 lanes of a row, 2 halves, terms]: polynomials or tables
    const u32* value_terms;   // [heads, value_tiles, 8 rows, 2 halves, terms]
    const u32* fast_decoder;  // [heads, fast_tiles, 2 halves, 2 fast_steps, 32 lanes]
    const u32* fast_mean;     // [heads, fast_steps, 128, 4, 2, 2]: turned by every offset from the anchor and by the next,
                              // even offsets before odd ones
    const u32* rotation;      // [fast_steps, 128, 4, 2, 2]: cosines of two pairs likewise, then sines
    const u8* mask;           // [batch or 1, count or 1, mask_length], or null
    float* partial;           // [splits, lines, rows, 16 value_tiles]
    float* stats;             // [splits, lines, rows, 2]: peak (base 2) and sum
    long long key_step, value_step, gain_step, query_step;  // bytes from a block's codes and gains, and a unit's queries, to the next
    int batch, heads, chunks, rows, count;  // lines: batch, chunks of rows, heads
    int paired;
    int key_bytes, value_bytes, query_bytes, key_room, value_room, constant_room, warp_room;
    int slow_tiles, fast_tiles, fast_steps, value_tiles;  // a step: eight pairs of fast dimensions
    int mask_batch, mask_query, mask_length;
    float softcap;
    u32 one;  // ONE_HALVES, as something that the compiler does not know: an instruction takes a single constant
};

constexpr int KEY_WORDS = 8 * TERMS, VALUE_WORDS = 16 * TERMS;  // of a tile's polynomials or tables
// Warps of a block of threads: as many as shared memory has room for, and where that is little, each has more registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int MAX_WARPS = 8;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int MAX_WARPS = 12;
#else
constexpr int MAX_WARPS = 16;
#endif

#include "room.h"
#include "scores.h"
#include "fast.h"

// What a lane knows of the tile that is its number, and how many there are.
struct OwnTiles {
    u32 kinds;
    int slow, fast, slow_bytes;
};
DEVICE OwnTiles own_tiles(const HeadTiles& side, u32 lane) {
    const auto in_all = [](int x) { return static_cast<int>(shuffle(static_cast<u32>(x), 0)); };
    return {side.tiles[lane], in_all(side.slow), in_all(side.fast), in_all(side.slow_bytes)};
}

// Scores of a unit's tokens before their gains, without the means of the fast dimensions.
DEVICE void score_keys(const CodesArguments& a, const Constants& constants, const OwnTiles& keys, const Room& room,
                       const u8* query, const Tokens& tokens, bool two, u32 lane, float (&scores)[2][4][4]) {
    const u8* codes = room.keys + 4 * lane;
    const int apart = two ? a.key_room : 0;
    const u32* terms = constants.key_terms + 2 * TERMS * (lane % 4);
    const int stride = 32 * a.rows;
    // The fast dimensions take many registers: one block after the other.
    ROLLED for (int block = 1; block >= 0; --block) {
        score_fast<KEY_TRELLIS>(a, constants.fast_decoder, keys.fast, keys.kinds, codes + block * apart + keys.slow_bytes,
                                terms + a.slow_tiles * KEY_WORDS, query + stride * a.slow_tiles,
                                (block ? tokens.start[1] : tokens.start[0]) - tokens.anchor + 8 * static_cast<int>(lane / 4), lane,
                                scores[0]);
        if (block)
            UNROLL for (int i = 0; i < 16; ++i) scores[1][i / 4][i % 4] = scores[0][i / 4][i % 4];
    }
    u32 kind = shuffle(keys.kinds, 0);
    ROLLED for (int tile = 0; tile < keys.slow; ++tile) {
        const u32 next = shuffle(keys.kinds, tile + 1);
        decode_tile<KEY_TRELLIS, true, 2>(kind, codes, apart, terms, a.one, lane, [&](int half, const u32(&levels)[2][8]) {
            const u32 q = reinterpret_cast<const u32*>(query)[half];
            UNROLL for (int block = 0; block < 2; ++block)
                UNROLL for (int m = 0; m < 4; ++m)
                    mma_half(scores[block][m], levels[block][2 * m], levels[block][2 * m + 1], q);
        });
        kind = next;
        terms += KEY_WORDS;
        query += stride;
    }
}

// Adds a unit's weighted values. Weights are the left operand: eight rows of them are of the first block and eight of the
// second. Levels are the right one, of either block in turn: a product's other eight rows mean nothing.
DEVICE void add_values(const CodesArguments& a, const Constants& constants, const OwnTiles& values, const Room& room,
                       bool two, const u32 (&weights)[2][4][2], u32 lane) {
    const u8* codes = room.values + 4 * lane;
    const int apart = two ? a.value_room : 0;
    const u32* terms = constants.value_terms + 2 * TERMS * (lane / 4);
    Words2* sums = room.sums + lane;
    const bool is_row = has_row(a, lane);
    u32 kind = shuffle(values.kinds, 0);
    ROLLED for (int tile = 0; tile < values.slow; ++tile) {
        const u32 next = shuffle(values.kinds, tile + 1);
        decode_tile<VALUE_TRELLIS, false, 2>(kind, codes, apart, terms, a.one, lane, [&](int, const u32(&levels)[2][8]) {
            float c[2][2][4] = {};  // no product waits for more than one other
            if (is_row) c[0][0][0] = float_of(sums->x), c[0][0][1] = float_of(sums->y);
            UNROLL for (int m = 0; m < 4; ++m)
                UNROLL for (int block = 0; block < 2; ++block)
                    mma_half(c[block][m % 2], weights[0][m][0], weights[1][m][0], weights[0][m][1], weights[1][m][1],
                             levels[block][2 * m], levels[block][2 * m + 1]);
            const u32 first = bits_of(c[0][0][0] + c[0][1][0] + (c[1][0][2] + c[1][1][2]));
            const u32 second = bits_of(c[0][0][1] + c[0][1][1] + (c[1][0][3] + c[1][1][3]));
            if (is_row) *sums = {first, second};
            sums += 4 * a.rows;
        });
        kind = next;
        terms += VALUE_WORDS;
    }
}

// What a split leaves for the merge kernel.
DEVICE void store_split(const CodesArguments& a, u64 place, const Room& room, u32 lane) {
    float softmax[4];
    floats_of(room.softmax[lane], softmax);
    float* stats = a.stats + place * 2;
    UNROLL for (int q = 0; q < 2; ++q) {
        UNROLL for (int mask = 4; mask < 32; mask *= 2)
            softmax[2 + q] = add(softmax[2 + q], shuffle_xor(softmax[2 + q], mask));
        const int own = 2 * static_cast<int>(lane % 4) + q;
        if (lane < 4 && own < a.rows) stats[2 * own] = softmax[q], stats[2 * own + 1] = softmax[2 + q];
    }
    const int row = static_cast<int>(lane / 4);
    if (row >= a.rows) return;
    Words2* out = reinterpret_cast<Words2*>(a.partial + (place + row) * 16 * a.value_tiles) + lane % 4;
    for (int half = 0; half < 2 * a.value_tiles; ++half) out[4 * half] = room.sums[4 * a.rows * half + lane];
}

KERNEL void BOUNDS(32 * MAX_WARPS, 1) attend_codes(GIVEN(CodesArguments) a) {
    const u32 lane = thread_index() % 32, warps = block_threads() / 32;
    const u32 warp = shuffle(thread_index() / 32, 0);  // so that the compiler knows it to be the same in all lanes
    const int split = static_cast<int>(block_x() * warps + warp), line = static_cast<int>(block_y());
    const int head = line % a.heads, b = line / (a.heads * a.chunks), lines = a.batch * a.chunks * a.heads;
    const HeadTiles &keys = a.key_heads[head], &values = a.value_heads[head];
    const Places& places = places_of(a);
    let_next_launch_begin();
    if (static_cast<int>(block_x() * warps) * places.per_split >= places.units) {  // there is room for more blocks
        await_launch_before();
        return;
    }
    const Constants constants = fetch_constants(a, head);
    const int begin = split * places.per_split;
    const int end = begin + places.per_split < places.units ? begin + places.per_split : places.units;
    const Room room = lay_out_room(a, warp);

    const int of_a_unit = a.paired ? 2 : 1;
    const int* block_table = places.block_table;
    const Side key_side = keys_of(a, room, head), value_side = values_of(a, room, head);
    const int last_block = a.paired ? places.blocks - 1 : -1;
    const auto has_two = [&](int unit) { return 2 * unit < last_block; };
    const auto fetch_values = [&](int unit) { fetch(a, value_side, has_two(unit), 0); };
    const auto fetch_keys = [&](int unit) { fetch(a, key_side, has_two(unit), static_cast<u32>(a.query_bytes)); };
    const auto fetch_query = [&]() {
        const u8* queries = room.next[4];
        bulk_copy(room.query, queries, static_cast<u32>(a.query_bytes), room.key_barrier);
        sync_copying();
        room.next[4] = queries + a.query_step;
    };
    // All that does not follow from the queries, before they are there.
    if (begin < end && is_copying()) {
        const int first = of_a_unit * begin;
        begin_side(a, key_side, places.keys, places.key_gains, first, b, head, keys.offset, a.key_bytes);
        begin_side(a, value_side, places.values, places.value_gains, first, b, head, values.offset, a.value_bytes);
        room.next[4] = a.queries + (static_cast<u64>(begin) * lines + line) * a.query_bytes;
        barrier_init(room.key_barrier);
        barrier_init(room.value_barrier);
        barriers_ready();
        fetch_keys(begin);
        if (!COPIES_IN_BULK) fetch_query();  // in the keys' group
        close_group();
        fetch_values(begin);
        close_group();
    }
    prefetch_turns(a, head);
    for (int i = static_cast<int>(lane); i < 8 * a.rows * a.value_tiles; i += 32) room.sums[i] = {0, 0};
    room.softmax[lane] = {bits_of(HIDDEN), bits_of(HIDDEN), 0, 0};

    const OwnTiles key_tiles = own_tiles(keys, lane), value_tiles = own_tiles(values, lane);
    const int first_seen = places.first_seen ? places.first_seen[b] : 0;
    const int row = static_cast<int>(lane / 4), query_row = row < a.rows ? row : a.rows - 1;
    const u8* own_query = room.query + 32 * query_row + 8 * (lane % 4);
    const int first_unit = begin < end ? begin : 0;
    Tokens tokens = find_tokens(block_table, first_unit * of_a_unit, has_two(first_unit));
    await_launch_before();
    if (COPIES_IN_BULK && begin < end && is_copying()) fetch_query();
    await_groups();  // the constants are in the first
    sync_block();
    if (begin >= end) return;  // the last block of threads may have more warps than splits
    barrier_wait(constants_barrier(), 0);

    for (int unit = begin; unit < end; ++unit) {
        const u32 parity = static_cast<u32>(unit - begin) & 1;
        const bool more = unit + 1 < end, two = has_two(unit);
        barrier_wait(room.key_barrier, parity);
        float scores[2][4][4], gains[2][8];
        score_keys(a, constants, key_tiles, room, own_query, tokens, two, lane, scores);
        sync_warp();
        load_gains(room.key_gains, room.scratch, lane, gains);
        UNROLL for (int i = 0; i < 32; ++i) scores[i / 16][i % 16 / 4][i % 4] *= gains[i / 16][i % 16 / 2];
        score_means(a, head, own_query + 32 * a.rows * a.slow_tiles, tokens, lane, scores);
        Exponents e;
        const u8* extra = room.query + 32 * a.rows * (a.slow_tiles + a.fast_steps);
        find_exponents(a, scores, reinterpret_cast<const float*>(extra), tokens, b, line, first_seen, lane, e);
        sync_warp();
        if (more && is_copying()) fetch_keys(unit + 1), fetch_query();
        close_group();
        float softmax[4];
        floats_of(room.softmax[lane], softmax);
        raise_peaks(a, e, softmax, room.sums, lane);

        barrier_wait(room.value_barrier, parity);
        u32 weights[2][4][2];
        load_gains(room.value_gains, room.scratch, lane, gains);
        weigh(e, gains, softmax, weights);
        room.softmax[lane] = words_of(softmax);
        if (more)  // what the next unit's scores begin with is on its way
            tokens = find_tokens(block_table, (unit + 1) * of_a_unit, has_two(unit + 1));
        add_values(a, constants, value_tiles, room, two, weights, lane);
        sync_warp();
        if (more && is_copying()) fetch_values(unit + 1);
        close_group();
    }
    store_split(a, static_cast<u64>(split * lines + line) * a.rows, room, lane);
}

#include "near.h"
