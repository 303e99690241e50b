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
    u32 share;                 // 2^16 / rows, rounded up
    float base;                // of the scores: log2(e), or 1 where a soft cap comes in between
};

constexpr int TURNED_ROWS = 32;  // rows of queries, units times rows, that a block of threads works on
constexpr int TURN_WARPS = 8, TURN_THREADS = 32 * TURN_WARPS;
constexpr u32 NOWHERE = 0xFFFFFFFF;
constexpr int STEP = 36;         // of turned queries in shared memory: 32 lanes' 16 bytes, and 4 so that stores spread over banks

struct TurnRoom {
    Words4* turned;  // [2, slow / 16, STEP]: sixteen rows each, in fragment order
    Words4* query;   // [rows, dim / 4]
    float* scales;   // [8]: what a row has been divided by
    int* anchors;    // [32]: positions of the units' anchors
};

DEVICE TurnRoom lay_out_turn_room(const QueryArguments& a) {
    TurnRoom room;
    room.turned = reinterpret_cast<Words4*>(shared_memory());
    room.query = room.turned + a.slow / 8 * STEP;
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
                x[i] = row.there ? load_number(a.queries.data, first + places[i], a.queries.is_half) * a.queries.scaling : 0.0f;
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
DEVICE void turn_to_unit(const QueryArguments& a, const TurnRoom& room, int head, int anchor, int first_row, u8* out) {
    const int lane = static_cast<int>(thread_index()) % 32, rows = a.queries.place.rows;
    const int quads = a.dim / 4, slow_quads = a.slow / 4, steps = a.slow / 16;
    const float fast_unit = a.units[2 * head + 1];
    float sums[MAX_ROWS];
    UNROLL for (int r = 0; r < MAX_ROWS; ++r) sums[r] = 0.0f;
    ROLLED for (int quad = lane; quad < quads; quad += 32) {
        hold(first_row);
        const bool is_slow = quad < slow_quads;
        float cosine[2], sine[2], mean[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        UNROLL for (int i = 0; i < 2; ++i) {
            const u64 turned = static_cast<u64>(static_cast<long long>(anchor)) * a.frame[quad].turns[i];
            turn(static_cast<u32>(turned >> 32), cosine[i], sine[i]);
        }
        if (is_slow) floats_of(a.mean[head * slow_quads + quad], mean);
        UNROLL for (int r = 0; r < MAX_ROWS; ++r) {
            if (r >= rows) break;
            float x[4], y[4];
            floats_of(room.query[r * quads + quad], x);
            UNROLL for (int i = 0; i < 2; ++i) {
                y[i] = multiply_add(x[i], cosine[i], x[2 + i] * sine[i]);
                y[2 + i] = multiply_add(x[2 + i], cosine[i], x[i] * -sine[i]);
            }
            if (is_slow) {
                UNROLL for (int i = 0; i < 4; ++i) sums[r] = multiply_add(y[i], mean[i], sums[r]);
                const int row = first_row + r;
                Words4* place = room.turned + (row / 16 * steps + quad / 4) * STEP + 4 * (row % 8) + quad % 4;
                u32* words = reinterpret_cast<u32*>(place) + row / 8 % 2;
                words[0] = pack_halves(y[0], y[1]), words[2] = pack_halves(y[2], y[3]);
            } else {
                const int fast = quad - slow_quads;
                u8* place = out + 32 * rows * (a.slow_tiles + fast / 4) + 32 * r + 8 * (fast % 4);
                UNROLL for (int i = 0; i < 4; ++i) y[i] *= fast_unit;
                *reinterpret_cast<Words2*>(place) = {pack_halves(y[0], y[1]), pack_halves(y[2], y[3])};
            }
        }
    }
    // Lanes halve the rows that they have between them, until four have a row's sum.
    UNROLL for (int half = MAX_ROWS / 2, mask = 16; half > 0; half /= 2, mask /= 2)
        UNROLL for (int i = 0; i < half; ++i) {
            const bool is_later = lane & mask;
            const float kept = is_later ? sums[half + i] : sums[i], given = is_later ? sums[i] : sums[half + i];
            sums[i] = add(kept, shuffle_xor(given, mask));
        }
    UNROLL for (int mask = 2; mask > 0; mask /= 2) sums[0] = add(sums[0], shuffle_xor(sums[0], mask));
    if (lane % 4 == 0 && lane / 4 < rows) {
        const float scale = room.scales[lane / 4] * a.base;
        float* extra = reinterpret_cast<float*>(out + 32 * rows * (a.slow_tiles + a.fast / 16));
        extra[lane / 4] = scale * a.units[2 * head], extra[8 + lane / 4] = sums[0] * scale;
    }
}

// A line's queries brought to some units' anchors and into coded coordinates, in fragment order.
DEVICE void turn_queries(const QueryArguments& a, int group, int line) {
    const int thread = static_cast<int>(thread_index()), lane = thread % 32, warp = thread / 32;
    const int head = line % a.queries.place.heads, rows = a.queries.place.rows, steps = a.slow / 16;
    const Places& places = places_of(a);
    const int units = static_cast<int>(TURNED_ROWS * a.share >> 16), first = group * units, left = places.units - first;
    if (left <= 0) return;  // there is room for more blocks
    const int held = left < units ? left : units;
    u8* out = a.out + (static_cast<u64>(first) * a.lines + line) * a.query_bytes;
    const u64 unit_stride = static_cast<u64>(a.lines) * a.query_bytes;
    const TurnRoom room = lay_out_turn_room(a);

    if (thread < held) {
        const int origin = places.origins ? places.origins[find_row(a.queries.place, line, 0).batch] : 0;
        const int unit = first + thread;
        room.anchors[thread] = places.block_table[3 * (a.paired ? 2 * unit : unit) + 2] - origin;
    }
    frame_queries(a, line, head, room);
    sync_block();
    ROLLED for (int u = warp; u < held; u += TURN_WARPS)
        turn_to_unit(a, room, head, room.anchors[u], u * rows, out + u * unit_stride);
    sync_block();

    u32 targets[4];  // of a lane's four rows, in units of eight bytes, for which 32 bits are enough
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 row = static_cast<u32>(8 * i + lane / 4), unit = row * a.share >> 16;
        targets[i] = unit * static_cast<u32>(unit_stride / 8) + 4 * (row - unit * static_cast<u32>(rows)) + lane % 4;
        if (static_cast<int>(unit) >= held) targets[i] = NOWHERE;
    }
    ROLLED for (int tile = warp; tile < a.slow_tiles; tile += TURN_WARPS) {
        const Words4* matrix = a.matrix + (head * a.slow_tiles + tile) * steps * 32 + lane;
        const Words4* turned = room.turned + lane;
        float sums[2][2][4];
        UNROLL for (int i = 0; i < 16; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
        UNROLL_BY(3) for (int step = 0; step < steps; ++step) {
            const Words4 m = matrix[32 * step];
            UNROLL for (int part = 0; part < 2; ++part) {
                const Words4 q = turned[(part * steps + step) * STEP];
                mma_half(sums[part][0], q.x, q.y, q.z, q.w, m.x, m.y);
                mma_half(sums[part][1], q.x, q.y, q.z, q.w, m.z, m.w);
            }
        }
        Words2* own = reinterpret_cast<Words2*>(out) + 4 * rows * tile;
        UNROLL for (int i = 0; i < 4; ++i) {
            const float *one = sums[i / 2][0] + i % 2 * 2, *two = sums[i / 2][1] + i % 2 * 2;
            if (targets[i] != NOWHERE) own[targets[i]] = {pack_halves(one[0], one[1]), pack_halves(two[0], two[1])};
        }
    }
}
