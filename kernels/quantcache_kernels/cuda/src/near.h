// Attention on the tokens that are not encoded: every row's sinks, and the tail behind the last block. How long the tail
// is, is read from the GPU's memory, so that a CUDA graph may be replayed while it grows; so is the place to which new
// tokens go, and what a new block changes.
//
// Included by codes.h, whose soft cap it takes.

struct NearArguments {
    Queries queries;
    Places places;
    const Places* there;      // where they are in memory, or null
    const int* tail_tokens;   // [1]: how many tokens the tail has, or null for `tail` of them
    const u8* mask;           // [batch or 1, count or 1, mask_length], or null
    const u8* sink_logits;    // [query heads], float32 or bfloat16, or null
    float* out;               // [splits, lines, rows, value_dim]
    float* lse;               // [splits, lines, rows], base 2
    int dim, value_dim, sinks, tail, causal;
    int lines, splits;
    int mask_batch, mask_query, mask_length, logits_are_bfloat16;
    float softcap;
};

constexpr int NEAR_THREADS = 256;
constexpr int NEAR_TOKENS = 64;  // that a block works on at once
constexpr int KEY_LOADS = 4;     // of 16 bytes that a thread has on their way: four threads share a token's key
constexpr int ROWS_AT_ONCE = 4;  // of queries that a thread has sums of
constexpr int VALUE_LOADS = 8;   // of 8 bytes, likewise: four columns of a value

struct NearRoom {
    float* query;    // [rows, dim]
    float* weights;  // [NEAR_TOKENS, MAX_ROWS]
    float *peaks, *totals, *decays;  // [rows]
    float* sums;     // [groups of threads, rows, value_dim]
};

DEVICE NearRoom lay_out_near_room(const NearArguments& a) {
    NearRoom room;
    room.query = reinterpret_cast<float*>(shared_memory());
    room.weights = room.query + a.queries.place.rows * a.dim;
    room.peaks = room.weights + NEAR_TOKENS * MAX_ROWS;
    room.totals = room.peaks + MAX_ROWS, room.decays = room.totals + MAX_ROWS, room.sums = room.decays + MAX_ROWS;
    return room;
}

// Keys (0) or values (1) of a line's sinks and tail.
struct NearSide {
    const u8* first[2];
    long long stride[2];
    int sinks;
};
DEVICE NearSide near_side(const NearArguments& a, const Places& places, int batch, int head, int side) {
    NearSide found;
    UNROLL for (int i = 0; i < 2; ++i) {
        const long long* strides = places.strides[2 * i + side];
        found.first[i] = places.near[2 * i + side] + 2 * (batch * strides[0] + head * strides[1]);
        found.stride[i] = 2 * strides[2];
    }
    found.sinks = a.sinks;
    return found;
}
DEVICE const u8* find_token(const NearSide& side, int token) {
    return token < side.sinks ? side.first[0] + token * side.stride[0] : side.first[1] + (token - side.sinks) * side.stride[1];
}

// Values of a thread's four columns, from one of NEAR_TOKENS on.
DEVICE void load_values(const NearSide& side, int first, int from, int step, int tokens, int column, Words2 (&found)[VALUE_LOADS]) {
    UNROLL for (int i = 0; i < VALUE_LOADS; ++i) {
        const int t = from + step * i;
        if (t < NEAR_TOKENS && first + t < tokens)
            found[i] = *reinterpret_cast<const Words2*>(find_token(side, first + t) + 8 * column);
    }
}

// Adds a thread's share of a key's products with some rows, from one of them on.
DEVICE void add_products(const NearArguments& a, const NearRoom& room, const Words4 (&keys)[KEY_LOADS], int from, int row,
                         float (&sums)[ROWS_AT_ONCE]) {
    UNROLL for (int i = 0; i < KEY_LOADS; ++i) {
        const int d = from + 32 * i;
        if (d >= a.dim) break;
        const u32 pairs[4] = {keys[i].x, keys[i].y, keys[i].z, keys[i].w};
        float x[8];
        UNROLL for (int j = 0; j < 4; ++j) x[2 * j] = from_bfloat16(pairs[j]), x[2 * j + 1] = float_of(pairs[j] & 0xFFFF0000u);
        UNROLL for (int r = 0; r < ROWS_AT_ONCE; ++r) {
            if (row + r >= a.queries.place.rows) break;
            UNROLL for (int half = 0; half < 2; ++half) {
                float q[4];
                floats_of(reinterpret_cast<const Words4*>(room.query + (row + r) * a.dim + d)[half], q);
                UNROLL for (int j = 0; j < 4; ++j) sums[r] = multiply_add(x[4 * half + j], q[j], sums[r]);
            }
        }
    }
}

// A row's weights of NEAR_TOKENS tokens, by a warp, from their products. What the row does not see has one below zero, so
// that nothing comes of its value, whatever that is.
DEVICE void weigh_row(const NearArguments& a, const NearRoom& room, const Places& places, const Row& row, int r, int first,
                      int tail, int lane) {
    const int first_sink = places.origins ? places.origins[row.batch] : 0, end = places.encoded_end;
    const u64 mask_row = static_cast<u64>(row.batch) * a.mask_batch + static_cast<u64>(row.query) * a.mask_query;
    float x[2], before = room.peaks[r], peak = before, total = 0.0f;
    UNROLL for (int i = 0; i < 2; ++i) {
        const int token = first + lane + 32 * i, slot = token < a.sinks ? first_sink + token : end + token - a.sinks;
        // A row's later sinks may still be in the tail.
        bool seen = token < a.sinks + tail && (token >= a.sinks || slot < end);
        if (a.causal) seen = seen && slot <= end + tail - a.queries.place.count + row.query;
        if (a.mask) seen = seen && slot < a.mask_length && a.mask[mask_row + slot];
        x[i] = room.weights[MAX_ROWS * (lane + 32 * i) + r];
        if (a.softcap > 0.0f) x[i] = capped(x[i], a.softcap);
        x[i] *= LOG2_E;
        x[i] = seen ? (x[i] < LEAST_SEEN ? LEAST_SEEN : x[i]) : HIDDEN;  // NaN stays
        peak = larger(peak, x[i]);
    }
    UNROLL for (int mask = 1; mask < 32; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
    UNROLL for (int i = 0; i < 2; ++i) {
        const float weight = x[i] <= LEAST_PEAK ? -1.0f : power_of_two(add(x[i], -peak));
        room.weights[MAX_ROWS * (lane + 32 * i) + r] = weight;
        total = add(total, weight < 0.0f ? 0.0f : weight);
    }
    UNROLL for (int mask = 1; mask < 32; mask *= 2) total = add(total, shuffle_xor(total, mask));
    if (lane == 0) {
        const float decay = power_of_two(before - peak);
        room.peaks[r] = peak, room.decays[r] = decay, room.totals[r] = multiply_add(room.totals[r], decay, total);
    }
}

// A block of threads has one line and every splits-th stretch of tokens.
DEVICE void attend_near(const NearArguments& a, int split, int line) {
    const int thread = static_cast<int>(thread_index()), lane = thread % 32;
    const Rows& place = a.queries.place;
    const int rows = place.rows;
    Row row = find_row(place, line, thread / 32 < rows ? thread / 32 : 0);  // a warp's
    const Places& places = places_of(a);
    const int tail = a.tail_tokens ? *a.tail_tokens : a.tail, tokens = a.sinks + tail;
    const NearRoom room = lay_out_near_room(a);
    const int columns = a.value_dim / 4, groups = NEAR_THREADS / columns, group = thread / columns, column = thread % columns;
    Words4* sums = reinterpret_cast<Words4*>(room.sums);
    const int own_sum = group * rows * columns + column;
    if (lane == 0 && thread / 32 < rows) {
        const bool has_logit = a.sink_logits && split == 0 && row.there;
        const float logit = has_logit ? load_number(a.sink_logits, row.query_head, a.logits_are_bfloat16) : 0.0f;
        room.peaks[thread / 32] = has_logit ? logit * LOG2_E : HIDDEN;
        room.totals[thread / 32] = has_logit ? 1.0f : 0.0f;
    }
    const int own_token = split * NEAR_TOKENS + thread / 4;
    if (own_token < tokens)  // keys and values come while queries do
        UNROLL for (int side = 0; side < 2; ++side) {
            const int quarter = (side ? a.value_dim : a.dim) / 2 * (thread % 4);
            prefetch(find_token(near_side(a, places, row.batch, row.head, side), own_token) + quarter);
        }
    load_queries(a.queries, line, a.dim, room.query);
    if (group < groups)
        ROLLED for (int r = 0; r < rows; ++r) sums[own_sum + r * columns] = {0, 0, 0, 0};
    sync_block();

    ROLLED for (int first = split * NEAR_TOKENS; first < tokens; first += a.splits * NEAR_TOKENS) {
        hold(row.batch);
        const int token = first + thread / 4, part = thread % 4;
        const u8* key = find_token(near_side(a, places, row.batch, row.head, 0), token);
        ROLLED for (int r = 0; r < rows; r += ROWS_AT_ONCE) {
            float scores[ROWS_AT_ONCE] = {0.0f, 0.0f, 0.0f, 0.0f};
            ROLLED for (int block = 0; block < a.dim; block += 32 * KEY_LOADS) {
                const int from = block + 8 * part;
                Words4 keys[KEY_LOADS];
                UNROLL for (int i = 0; i < KEY_LOADS; ++i) {
                    keys[i] = {0, 0, 0, 0};
                    if (token < tokens && from + 32 * i < a.dim)
                        keys[i] = *reinterpret_cast<const Words4*>(key + 2 * (from + 32 * i));
                }
                add_products(a, room, keys, from, r, scores);
            }
            UNROLL for (int i = 0; i < ROWS_AT_ONCE; ++i) {
                UNROLL for (int mask = 1; mask < 4; mask *= 2) scores[i] = add(scores[i], shuffle_xor(scores[i], mask));
                if (i == part) room.weights[MAX_ROWS * (thread / 4) + r + i] = scores[i];
            }
        }
        sync_block();
        int warp = thread / 32;
        hold(warp);
        if (warp < rows) weigh_row(a, room, places, row, warp, first, tail, lane);
        sync_block();
        hold(row.batch);
        const NearSide value_side = near_side(a, places, row.batch, row.head, 1);
        ROLLED for (int r = 0; r < rows && group < groups; r += ROWS_AT_ONCE) {
            float sum[ROWS_AT_ONCE][4];
            UNROLL for (int i = 0; i < 4 * ROWS_AT_ONCE; ++i) sum[i / 4][i % 4] = 0.0f;
            ROLLED for (int from = group; from < NEAR_TOKENS; from += groups * VALUE_LOADS) {
                Words2 values[VALUE_LOADS];
                load_values(value_side, first, from, groups, tokens, column, values);
                UNROLL for (int i = 0; i < VALUE_LOADS; ++i) {
                    const int t = from + groups * i;
                    if (t >= NEAR_TOKENS || first + t >= tokens) break;
                    const float x[4] = {from_bfloat16(values[i].x), float_of(values[i].x & 0xFFFF0000u),
                                        from_bfloat16(values[i].y), float_of(values[i].y & 0xFFFF0000u)};
                    float w[ROWS_AT_ONCE];
                    floats_of(*reinterpret_cast<const Words4*>(room.weights + MAX_ROWS * t + r), w);
                    UNROLL for (int j = 0; j < ROWS_AT_ONCE; ++j)
                        if (!(w[j] < 0.0f))
                            UNROLL for (int c = 0; c < 4; ++c) sum[j][c] = multiply_add(w[j], x[c], sum[j][c]);
                }
            }
            UNROLL for (int j = 0; j < ROWS_AT_ONCE; ++j) {
                if (r + j >= rows) break;
                float own[4];
                floats_of(sums[own_sum + (r + j) * columns], own);
                UNROLL for (int c = 0; c < 4; ++c) own[c] = multiply_add(own[c], room.decays[r + j], sum[j][c]);
                sums[own_sum + (r + j) * columns] = words_of(own);
            }
        }
        sync_block();
    }

    int block = static_cast<int>(block_x());
    hold(block);  // what follows from it is computed again: it was more than there are registers for
    const u64 out = (static_cast<u64>(block % a.splits) * a.lines + block / a.splits) * rows;
    ROLLED for (int i = thread; i < rows * columns; i += NEAR_THREADS) {
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f}, y[4];
        UNROLL_BY(4) for (int g = 0; g < groups; ++g) {
            floats_of(sums[g * rows * columns + i], y);
            UNROLL for (int c = 0; c < 4; ++c) x[c] = add(x[c], y[c]);
        }
        const float total = room.totals[i / columns];
        UNROLL for (int c = 0; c < 4; ++c) x[c] = total == 0.0f ? 0.0f : x[c] / total;
        reinterpret_cast<Words4*>(a.out)[out * columns + i] = words_of(x);
    }
    // Where nothing is seen: above a split of the blocks that has seen nothing, so that zero wins.
    if (thread < rows)
        a.lse[out + thread] = room.totals[thread] == 0.0f ? LEAST_SEEN : room.peaks[thread] + logarithm_of_two(room.totals[thread]);
}

struct TakeArguments {
    NearArguments near;
    QueryArguments turned;
    int near_blocks, turn_blocks;  // of threads: all that attend, and those that turn a line's queries
};

// What follows from a call's queries alone. Blocks of threads that attend come first: they wait for memory while others turn.
KERNEL void BOUNDS(NEAR_THREADS, 3) take_queries(GIVEN(TakeArguments) a) {
    static_assert(NEAR_THREADS == TURN_THREADS, "one launch");
    let_next_launch_begin();
    const int block = static_cast<int>(block_x()), other = block - a.near_blocks;
    if (other < 0)
        attend_near(a.near, block % a.near.splits, block / a.near.splits);
    else
        turn_queries(a.turned, other % a.turn_blocks, a.turn_blocks, other / a.turn_blocks);
}

struct AppendArguments {
    const u8* key;           // [batch, heads, count, dim], bfloat16; strides below
    const u8* value;
    const Places* there;     // where in memory it is said where the tail lies
    const int* tail_tokens;  // [1]: how many tokens the tail has, the new ones included
    long long strides[2][3]; // of both, in elements: batch, head, token
    int heads, count, vectors, dim, value_dim, tail;  // vectors: batch times heads times count
};

// One vector of new keys or values into the tail: a warp for each.
KERNEL void BOUNDS(32) append_tail(GIVEN(AppendArguments) a) {
    const int lane = static_cast<int>(thread_index()), vector = static_cast<int>(block_x());
    const int side = static_cast<int>(block_y()), token = vector % a.count;
    const u64 head = static_cast<u64>(vector / a.count % a.heads), b = static_cast<u64>(vector / (a.count * a.heads));
    const int at = *a.tail_tokens - a.count + token, dim = side ? a.value_dim : a.dim;
    if (at < 0 || at >= a.tail) return;
    const long long *from = a.strides[side], *to = a.there->strides[2 + side];
    const u8* source = (side ? a.value : a.key) + 2 * (b * from[0] + head * from[1] + token * from[2]);
    u8* target = a.there->near[2 + side] + 2 * (b * to[0] + head * to[1] + at * to[2]);
    for (int i = lane; i < dim / 8; i += 32) reinterpret_cast<Words4*>(target)[i] = reinterpret_cast<const Words4*>(source)[i];
}

struct PlacesArguments {
    Places places;
    Places* there;
    int* tail_tokens;  // or null
    int tokens;        // that the tail has
};

// A new block: for launches that find their places in memory.
KERNEL void BOUNDS(32) set_places(GIVEN(PlacesArguments) a) {
    const u32* from = reinterpret_cast<const u32*>(&a.places);
    u32* to = reinterpret_cast<u32*>(a.there);
    for (u32 i = thread_index(); i < sizeof(Places) / 4; i += 32) to[i] = from[i];
    if (thread_index() == 0 && a.tail_tokens) *a.tail_tokens = a.tokens;
}
