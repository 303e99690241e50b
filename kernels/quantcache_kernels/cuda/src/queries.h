// Queries brought to every anchor and into coded coordinates, in the order in which attend_codes takes them.
//
// The dimensions of a frame are taken by fours, which a lane has: two pairs that turn, their first halves before their
// second ones. Four such quads are a step of the products with the matrix, turned queries on the left: a lane's results are
// then two coefficients of a query's, as attend_codes wants them.
#include "warp.h"

struct Quad {
    Words4 order;  // cached dimension of every framed one
    u64 turns[2];  // revolutions per token in units of 2^-64
};

struct QueryArguments {
    Queries queries;
    const Quad* frame;         // [dim / 4], slow ones first
    const Words4* matrix;      // [heads, slow_tiles, slow / 16, 32 lanes]: decoder in half precision
    const Words4* mean;        // [heads, slow / 4], floats
    const float* units;        // [heads, 2], powers of two: that of the matrix, and in it that of the fast part
    Places places;             // where a row begins is position 0
    const Places* there;       // where they are in memory, or null
    u8* out;                   // [units, lines, query_bytes]: see attend_codes
    int paired, lines, dim, slow, slow_tiles, fast;
    int query_bytes;
    int unit_bits;             // of a unit's rows, with room up to a power of two
    float base;                // of the scores: log2(e), or 1 where a soft cap comes in between
};

constexpr int TURNED_ROWS = 32;  // rows of queries, units times rows, that a block of threads works on
constexpr int TURN_WARPS = 8, TURN_THREADS = 32 * TURN_WARPS;
constexpr u32 STEP = 36;         // of turned queries in shared memory: 32 lanes' 16 bytes, and 4 so that stores spread over banks

struct TurnRoom {
    Words4* turned;  // [2 groups, 2, slow / 16, STEP]: sixteen rows each, in fragment order, a row's two words side by side
    Words4* query;   // [rows, dim / 4]
    float* scales;   // [8]: what a row has been divided by
    int* anchors;    // [2 groups, 32]: positions of the units' anchors
};

DEVICE TurnRoom lay_out_turn_room(const QueryArguments& a) {
    TurnRoom room;
    room.turned = reinterpret_cast<Words4*>(shared_memory());
    room.query = room.turned + a.slow / 4 * STEP;
    room.scales = reinterpret_cast<float*>(room.query + a.queries.place.rows * (a.dim / 4));
    room.anchors = reinterpret_cast<int*>(room.scales + MAX_ROWS);
    return room;
}

// The queries of a line, framed and scaled. A power of two brings every row to a norm of 32 to 64, and another one did so
// with the matrix' largest column: no product is above 4096, and half precision loses small entries of neither.
DEVICE void frame_queries(const QueryArguments& a, int line, int head, const TurnRoom& room) {
    const int lane = static_cast<int>(thread_index()) % 32, warp = static_cast<int>(thread_index()) / 32;
    const int quads = a.dim / 4;
    ROLLED for (int r = warp; r < a.queries.place.rows; r += TURN_WARPS) {
        const Row row = find_row(a.queries.place, line, r);
        const u64 first = static_cast<u64>(row.batch * a.queries.batch_stride + row.query_head * a.queries.head_stride +
                                           row.query * a.queries.query_stride);
        Words4* own = room.query + r * quads;
        float sum = 0.0f;
        ROLLED for (int quad = lane; quad < quads; quad += 32) {
            const Words4 from = a.frame[quad].order;
            const u32 places[4] = {from.x, from.y, from.z, from.w};
            float x[4];
            UNROLL for (int i = 0; i < 4; ++i) {
                x[i] = row.there ? load_number(a.queries.data, first + places[i], a.queries.is_bfloat16) * a.queries.scaling : 0.0f;
                sum = multiply_add(x[i], x[i], sum);
            }
            own[quad] = words_of(x);
        }
        UNROLL for (int mask = 1; mask < 32; mask *= 2) sum = add(sum, shuffle_xor(sum, mask));
        // The power of two above a norm of 64 times this, and its reciprocal.
        const u32 above = (bits_of(root(sum) * (1.0f / 64.0f)) & 0x7F800000) + 0x00800000;
        const bool is_small = sum < 1e-30f, is_finite = sum < 1e30f;
        const float scale = is_small ? 1.0f : is_finite ? float_of(above) : sum * 0.0f + float_of(0x7FC00000);
        const float reciprocal = is_small || !is_finite ? scale : float_of(0x7F000000 - above);
        ROLLED for (int quad = lane; quad < quads; quad += 32) {
            float x[4];
            floats_of(own[quad], x);
            UNROLL for (int i = 0; i < 4; ++i) x[i] *= reciprocal;
            own[quad] = words_of(x);
        }
        if (lane == 0) room.scales[r] = scale;
    }
}

// The queries turned to a unit's anchor by one warp: slow dimensions go into shared memory as left operands, fast ones to
// where attend_codes finds them, and so do the products with the mean, which stay in single precision.
DEVICE void turn_to_unit(const QueryArguments& a, const TurnRoom& room, Words4* turned, int head, int anchor, u32 first_row,
                         u8* out) {
    const u32 lane = thread_index() % 32, rows = static_cast<u32>(a.queries.place.rows);
    const u32 quads = static_cast<u32>(a.dim) / 4, slow_quads = static_cast<u32>(a.slow) / 4, steps = slow_quads / 4;
    const float fast_unit = a.units[2 * head + 1];
    float sums[MAX_ROWS];
    UNROLL for (int r = 0; r < MAX_ROWS; ++r) sums[r] = 0.0f;
    ROLLED for (u32 quad = lane; quad < quads; quad += 32) {
        hold(first_row);
        const bool is_slow = quad < slow_quads;
        const u32 fast = quad - slow_quads;
        float cosine[2], sine[2], mean[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        UNROLL for (int i = 0; i < 2; ++i) {
            const u64 revolutions = static_cast<u64>(static_cast<long long>(anchor)) * a.frame[quad].turns[i];
            turn(static_cast<u32>(revolutions >> 32), cosine[i], sine[i]);
            if (!is_slow) cosine[i] *= fast_unit, sine[i] *= fast_unit;
        }
        if (is_slow) floats_of(a.mean[static_cast<u32>(head) * slow_quads + quad], mean);
        // A unit's rows are among eight of a tile's sixteen, so the next one is four lanes further.
        Words4* tile = turned + (first_row / 16 * steps + quad / 4) * STEP + 4 * (first_row % 8) + quad % 4;
        Words2* slow_place = reinterpret_cast<Words2*>(tile) + first_row / 8 % 2;
        u8* fast_place = out + 32 * rows * (static_cast<u32>(a.slow_tiles) + fast / 4) + 8 * (fast % 4);
        const Words4* query = room.query + quad;
        UNROLL for (int r = 0; r < MAX_ROWS; ++r) {
            if (r >= static_cast<int>(rows)) break;
            float x[4], y[4];
            floats_of(*query, x);
            query += quads;
            UNROLL for (int i = 0; i < 2; ++i) {
                y[i] = multiply_add(x[i], cosine[i], x[2 + i] * sine[i]);
                y[2 + i] = multiply_add(x[2 + i], cosine[i], x[i] * -sine[i]);
            }
            UNROLL for (int i = 0; i < 4; ++i) sums[r] = multiply_add(y[i], mean[i], sums[r]);
            const Words2 packed = {pack_halves(y[0], y[1]), pack_halves(y[2], y[3])};
            if (is_slow) slow_place[8 * r] = packed;
            else *reinterpret_cast<Words2*>(fast_place + 32 * r) = packed;
        }
    }
    // Lanes halve the rows that they have between them, until four have a row's sum.
    UNROLL for (int half = MAX_ROWS / 2, mask = 16; half > 0; half /= 2, mask /= 2)
        UNROLL for (int i = 0; i < half; ++i) {
            const bool is_later = lane & static_cast<u32>(mask);
            const float kept = is_later ? sums[half + i] : sums[i], given = is_later ? sums[i] : sums[half + i];
            sums[i] = add(kept, shuffle_xor(given, mask));
        }
    UNROLL for (int mask = 2; mask > 0; mask /= 2) sums[0] = add(sums[0], shuffle_xor(sums[0], mask));
    if (lane % 4 == 0 && lane / 4 < rows) {
        const float scale = room.scales[lane / 4] * a.base;
        float* extra = reinterpret_cast<float*>(out + 32 * rows * static_cast<u32>(a.slow_tiles + a.fast / 16));
        extra[lane / 4] = scale * a.units[2 * head], extra[8 + lane / 4] = sums[0] * scale;
    }
}

// A unit's position of its anchor.
DEVICE int find_anchor(const QueryArguments& a, const Places& places, int unit, int origin) {
    return places.block_table[3 * (a.paired ? 2 * unit : unit) + 2] - origin;
}

// Turned queries in coded coordinates, to where attend_codes finds them: sixteen rows by sixteen coefficients for a warp.
DEVICE void code_queries(const QueryArguments& a, const Words4* turned, int head, int held, u8* out, u64 unit_stride) {
    const u32 lane = thread_index() % 32, warp = thread_index() / 32;
    const u32 rows = static_cast<u32>(a.queries.place.rows), steps = static_cast<u32>(a.slow) / 16;
    const u32 tiles = static_cast<u32>(a.slow_tiles), unit_bits = static_cast<u32>(a.unit_bits);
    ROLLED for (u32 item = warp; item < 2 * tiles; item += TURN_WARPS) {
        const u32 tile = item / 2, part = item % 2;
        const Words4* matrix = a.matrix + (static_cast<u32>(head) * tiles + tile) * steps * 32 + lane;
        const Words4* own_turned = turned + part * steps * STEP + lane;
        float sums[2][4];
        UNROLL for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0.0f;
        UNROLL_BY(2) for (u32 step = 0; step < steps; ++step) {
            const Words4 m = matrix[32 * step], q = own_turned[step * STEP];
            mma_half(sums[0], q.x, q.z, q.y, q.w, m.x, m.y);
            mma_half(sums[1], q.x, q.z, q.y, q.w, m.z, m.w);
        }
        UNROLL for (int i = 0; i < 2; ++i) {
            const u32 row = 16 * part + 8 * static_cast<u32>(i) + lane / 4, unit = row >> unit_bits;
            const u32 own_row = row - (unit << unit_bits);
            if (unit >= static_cast<u32>(held) || own_row >= rows) continue;
            u8* place = out + unit * unit_stride + 32 * own_row + 8 * (lane % 4);
            const float *one = sums[0] + 2 * i, *two = sums[1] + 2 * i;
            *reinterpret_cast<Words2*>(place + 32 * rows * tile) = {pack_halves(one[0], one[1]), pack_halves(two[0], two[1])};
        }
    }
}

// A line's queries brought to units' anchors and into coded coordinates, in fragment order: a group of units, then the one
// so many `groups` behind it. What the next one begins with is in the other half of the room.
DEVICE void turn_queries(const QueryArguments& a, int group, int groups, int line) {
    const int thread = static_cast<int>(thread_index()), warp = thread / 32;
    const int head = line % a.queries.place.heads;
    const Places& places = places_of(a);
    const int units = TURNED_ROWS >> a.unit_bits;
    int first = group * units;
    if (first >= places.units) return;  // there is room for more blocks
    const u64 unit_stride = static_cast<u64>(a.lines) * a.query_bytes;
    const TurnRoom room = lay_out_turn_room(a);
    const int origin = places.origins ? places.origins[find_row(a.queries.place, line, 0).batch] : 0;
    prefetch_all(a.matrix + head * a.slow_tiles * (a.slow / 16) * 32, a.slow_tiles * a.slow * 32);
    if (thread < units && first + thread < places.units)
        room.anchors[thread] = find_anchor(a, places, first + thread, origin);
    frame_queries(a, line, head, room);
    sync_block();
    ROLLED for (int half = 0; first < places.units; half ^= 1) {
        const int left = places.units - first, held = left < units ? left : units, next = first + groups * units + thread;
        const bool is_next = thread < units && next < places.units;
        const int anchor = is_next ? find_anchor(a, places, next, origin) : 0;
        u8* out = a.out + (static_cast<u64>(first) * a.lines + line) * a.query_bytes;
        Words4* turned = room.turned + half * (a.slow / 8 * STEP);
        ROLLED for (int u = warp; u < held; u += TURN_WARPS)
            turn_to_unit(a, room, turned, head, room.anchors[TURNED_ROWS * half + u],
                         static_cast<u32>(u) << a.unit_bits, out + u * unit_stride);
        if (is_next) room.anchors[TURNED_ROWS * (half ^ 1) + thread] = anchor;
        sync_block();
        code_queries(a, turned, head, held, out, unit_stride);
        first += groups * units;
    }
}
