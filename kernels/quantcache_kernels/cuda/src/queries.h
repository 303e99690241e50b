// Queries brought to every anchor and into coded coordinates, in the order in which attend_codes takes them.
#include "warp.h"

struct QueryArguments {
    Queries queries;
    const int* order;          // [dim]: cached dimension of every framed one
    const int* partner;        // [dim]: framed dimension it turns with
    const float* sign;         // [dim]
    const u64* turns;          // [dim]: revolutions per token in units of 2^-64
    const float* matrix;       // [heads, slow, 16 slow_tiles + 1]: decoder, and the mean
    const float* norms;        // [heads, 2]: largest column norm of the decoder, unit of the fast part
    Places places;             // where a row begins is position 0
    const Places* there;       // where they are in memory, or null
    u8* out;                   // [units, lines, query_bytes]: see attend_codes
    int paired, lines, dim, slow, slow_tiles, fast;
    int query_bytes;
    float base;                // of the scores: log2(e), or 1 where a soft cap comes in between
};

constexpr int TURNED_ROWS = 32;  // rows of queries, units times rows, that a block of threads works on
constexpr int TURN_THREADS = 128;

DEVICE void store_half(u8* place, float x) {
    *reinterpret_cast<u16*>(place) = static_cast<u16>(pack_halves(x, 0.0f));
}

// Queries brought to every anchor and into coded coordinates, in fragment order.
KERNEL void BOUNDS(TURN_THREADS) turn_queries(GIVEN(QueryArguments) a) {
    const int thread = static_cast<int>(thread_index()), line = static_cast<int>(block_y()), head = line % a.queries.place.heads;
    const int rows = a.queries.place.rows;
    const Places& places = places_of(a);
    const int all_units = places.units;
    const int units = TURNED_ROWS / rows, first = static_cast<int>(block_x()) * units, held = units * rows;
    if (first >= all_units) return;  // there is room for more blocks
    float* framed = reinterpret_cast<float*>(shared_memory());  // [dim, TURNED_ROWS]
    float* scales = framed + a.dim * TURNED_ROWS;               // [8]: what a row is divided by
    float* query = scales + 8;                                  // [rows, dim]
    load_queries(a.queries, line, a.dim, query);
    sync_block();

    // A power of two brings every row below 4096, so that half precision neither overflows nor loses small entries.
    const float fast_unit = a.norms[2 * head + 1], norm = larger(a.norms[2 * head], fast_unit);
    for (int step = 0; step < rows; step += TURN_THREADS / 32) {  // all warps take as many steps
        const int warp = step + thread / 32, r = warp < rows ? warp : rows - 1;
        float sum = 0.0f;
        for (int d = thread % 32; d < a.dim; d += 32) sum = multiply_add(query[r * a.dim + d], query[r * a.dim + d], sum);
        UNROLL for (int mask = 1; mask < 32; mask *= 2) sum = add(sum, shuffle_xor(sum, mask));
        const float bound = root(sum) * norm * (1.0f / 4096.0f);
        if (thread % 32 == 0 && warp < rows) {
            scales[r] = bound > 0.0f ? power_of_two(round_up(logarithm_of_two(bound))) : 1.0f;
            if (!(bound == bound)) scales[r] = bound;
        }
    }
    sync_block();
    const int origin = places.origins ? places.origins[find_row(a.queries.place, line, 0).batch] : 0;
    for (int i = thread; i < a.dim * units; i += TURN_THREADS) {
        const int d = i % a.dim, u = i / a.dim, unit = first + u < all_units ? first + u : all_units - 1;
        const int anchor = places.block_table[3 * (a.paired ? 2 * unit : unit) + 2] - origin;
        const u64 turned = static_cast<u64>(static_cast<long long>(anchor)) * a.turns[d];
        float cosine, sine;
        turn(static_cast<float>(static_cast<int>(turned >> 32)) * (1.0f / 4294967296.0f), cosine, sine);
        sine *= a.sign[d];
        const int own = a.order[d], other = a.order[a.partner[d]];
        for (int r = 0; r < rows; ++r)
            framed[d * TURNED_ROWS + u * rows + r] =
                (query[r * a.dim + own] * cosine + query[r * a.dim + other] * sine) / scales[r];
    }
    for (int i = thread; i < a.dim * (TURNED_ROWS - held); i += TURN_THREADS)
        framed[i / (TURNED_ROWS - held) * TURNED_ROWS + held + i % (TURNED_ROWS - held)] = 0.0f;
    sync_block();

    const int columns = 16 * a.slow_tiles + 1, stride = 32 * rows;
    const int last = all_units - first < units ? all_units - first : units;
    u8* out = a.out + (static_cast<u64>(first) * a.lines + line) * a.query_bytes;
    const u64 unit_stride = static_cast<u64>(a.lines) * a.query_bytes;
    for (int c = thread; c < columns; c += TURN_THREADS) {
        float sums[TURNED_ROWS];
        UNROLL for (int i = 0; i < TURNED_ROWS; ++i) sums[i] = 0.0f;
        const float* matrix = a.matrix + static_cast<u64>(head) * a.slow * columns + c;
        for (int d = 0; d < a.slow; ++d) {
            const float x = matrix[d * columns];
            UNROLL for (int i = 0; i < TURNED_ROWS; i += 4) {
                const Words4 w = *reinterpret_cast<const Words4*>(framed + d * TURNED_ROWS + i);
                sums[i] = multiply_add(x, float_of(w.x), sums[i]), sums[i + 1] = multiply_add(x, float_of(w.y), sums[i + 1]);
                sums[i + 2] = multiply_add(x, float_of(w.z), sums[i + 2]);
                sums[i + 3] = multiply_add(x, float_of(w.w), sums[i + 3]);
            }
        }
        const bool is_mean = c == columns - 1;
        UNROLL for (int i = 0; i < TURNED_ROWS; ++i) {
            const int u = i / rows, r = i % rows;
            if (u >= last) continue;
            u8* place = out + u * unit_stride;
            if (is_mean) {
                float* extra = reinterpret_cast<float*>(place + stride * (a.slow_tiles + a.fast / 16));
                extra[r] = scales[r] * a.base, extra[8 + r] = sums[i] * scales[r] * a.base;
            } else {
                store_half(place + stride * (c / 16) + 8 * (4 * r + c % 8 / 2) + 4 * (c % 16 / 8) + 2 * (c % 2), sums[i]);
            }
        }
    }
    // The fast part turns with its offset from the anchor; its query is stored as it is, in the fast unit.
    for (int i = thread; i < a.fast * held; i += TURN_THREADS) {
        const int d = i / held, u = i % held / rows, r = i % rows;
        if (u >= last) continue;
        const int second = d >= a.fast / 2, pair = second ? d - a.fast / 2 : d;
        u8* place = out + u * unit_stride + stride * (a.slow_tiles + pair / 8) + 8 * (4 * r + pair % 8 / 2);
        store_half(place + 4 * second + 2 * (pair % 2), framed[(a.slow + d) * TURNED_ROWS + i % held] * fast_unit);
    }
}
