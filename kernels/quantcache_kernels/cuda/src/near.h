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
    int mask_batch, mask_query, mask_length, logits_are_half;
    float softcap;
};

constexpr int NEAR_THREADS = 128;
constexpr int NEAR_TOKENS = 64;  // that a block works on at once
constexpr float LOG2_E = 1.4426950408889634f;

// A block has one line and every splits-th stretch of tokens. What a row does not see has a weight below zero, so that
// nothing comes of its value, whatever that is.
KERNEL void BOUNDS(NEAR_THREADS) attend_near(GIVEN(NearArguments) a) {
    const int thread = static_cast<int>(thread_index()), lane = thread % 32;
    const int split = static_cast<int>(block_x()), line = static_cast<int>(block_y());
    const Rows& place = a.queries.place;
    const int rows = place.rows, count = place.count;
    const Row first_row = find_row(place, line, 0);
    const u64 b = static_cast<u64>(first_row.batch), head = static_cast<u64>(first_row.head);
    const Places& places = places_of(a);
    const int encoded_end = places.encoded_end;
    const int tail = a.tail_tokens ? *a.tail_tokens : a.tail, tokens = a.sinks + tail;
    const int first_sink = places.origins ? places.origins[b] : 0;
    const int words = a.value_dim / 2, groups = NEAR_THREADS / words;  // a thread has two columns of every groups-th token

    float* query = reinterpret_cast<float*>(shared_memory());  // [rows, dim]
    float* weights = query + rows * a.dim;                     // [rows, NEAR_TOKENS]
    float* peaks = weights + rows * NEAR_TOKENS;               // [rows]
    float* totals = peaks + MAX_ROWS;
    float* decays = totals + MAX_ROWS;
    float* sums = decays + MAX_ROWS;                           // [groups, rows, value_dim]

    load_queries(a.queries, line, a.dim, query);
    if (thread < rows) {
        const Row row = find_row(place, line, thread);
        const bool has_logit = a.sink_logits && split == 0 && row.there;
        peaks[thread] = has_logit ? load_number(a.sink_logits, row.query_head, a.logits_are_half) * LOG2_E : -1e30f;
        totals[thread] = has_logit ? 1.0f : 0.0f;
    }
    float sum[MAX_ROWS][2];
    UNROLL for (int r = 0; r < MAX_ROWS; ++r) sum[r][0] = sum[r][1] = 0.0f;
    sync_block();

    for (int first = split * NEAR_TOKENS; first < tokens; first += a.splits * NEAR_TOKENS) {
        // ---------------------------------------------------------------- scores: two threads share a token
        const int token = first + thread / 2, part = thread % 2;
        const int side = token < a.sinks ? 0 : 2, index = token < a.sinks ? token : token - a.sinks;
        const int slot = (token < a.sinks ? first_sink : encoded_end) + index;
        float score[MAX_ROWS];
        UNROLL for (int r = 0; r < MAX_ROWS; ++r) score[r] = 0.0f;
        if (token < tokens) {
            const long long* strides = places.strides[side];
            const u8* key = places.near[side] + 2 * (b * strides[0] + head * strides[1] + index * strides[2]);
            for (int d = 8 * part; d < a.dim; d += 16) {
                const Words4 w = *reinterpret_cast<const Words4*>(key + 2 * d);
                const u32 pairs[4] = {w.x, w.y, w.z, w.w};
                UNROLL for (int r = 0; r < MAX_ROWS; ++r) {
                    if (r < rows) {
                        UNROLL for (int i = 0; i < 4; ++i) {
                            const Words2 q = reinterpret_cast<const Words2*>(query + r * a.dim + d)[i];
                            score[r] = multiply_add(from_bfloat16(pairs[i]), float_of(q.x), score[r]);
                            score[r] = multiply_add(float_of(pairs[i] & 0xFFFF0000u), float_of(q.y), score[r]);
                        }
                    }
                }
            }
        }
        UNROLL for (int r = 0; r < MAX_ROWS; ++r) {
            if (r < rows) {  // the same in all threads
                float x = add(score[r], shuffle_xor(score[r], 1));
                const int own = find_row(place, line, r).query;
                // A row's later sinks may still be in the tail.
                bool seen = token < tokens && (side || slot < encoded_end);
                if (a.causal) seen = seen && slot <= encoded_end + tail - count + own;
                if (a.mask && seen && slot < a.mask_length)
                    seen = a.mask[b * a.mask_batch + static_cast<u64>(own) * a.mask_query + slot];
                else
                    seen = seen && !a.mask;
                if (a.softcap > 0.0f) x = capped(x, a.softcap);
                x *= LOG2_E;
                if (part == 0) weights[r * NEAR_TOKENS + thread / 2] = seen ? (x < -1e29f ? -1e29f : x) : -1e30f;
            }
        }
        sync_block();
        // ---------------------------------------------------------------- weights: a warp has every fourth row
        for (int step = 0; step < rows; step += NEAR_THREADS / 32) {  // all warps take as many steps
            const bool own = step + thread / 32 < rows;
            const int r = own ? step + thread / 32 : rows - 1;
            float* place_of_row = weights + r * NEAR_TOKENS;
            const float x0 = place_of_row[lane], x1 = place_of_row[32 + lane], before = peaks[r];
            float peak = larger(before, larger(x0, x1));
            UNROLL for (int mask = 1; mask < 32; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
            const float p0 = x0 <= -5e29f ? -1.0f : power_of_two(add(x0, -peak));
            const float p1 = x1 <= -5e29f ? -1.0f : power_of_two(add(x1, -peak));
            float total = (p0 < 0.0f ? 0.0f : p0) + (p1 < 0.0f ? 0.0f : p1);
            UNROLL for (int mask = 1; mask < 32; mask *= 2) total = add(total, shuffle_xor(total, mask));
            if (own) {
                place_of_row[lane] = p0, place_of_row[32 + lane] = p1;
                if (lane == 0) {
                    const float decay = power_of_two(before - peak);
                    peaks[r] = peak, decays[r] = decay, totals[r] = multiply_add(totals[r], decay, total);
                }
            }
        }
        sync_block();
        // ---------------------------------------------------------------- values
        const int word = thread % words;
        if (thread / words < groups) {
            UNROLL for (int r = 0; r < MAX_ROWS; ++r)
                if (r < rows) sum[r][0] *= decays[r], sum[r][1] *= decays[r];
            for (int t = thread / words; t < NEAR_TOKENS && first + t < tokens; t += groups) {
                const bool sink = first + t < a.sinks;
                const int part = sink ? 1 : 3;
                const long long* strides = places.strides[part];
                const int at = sink ? first + t : first + t - a.sinks;
                const u8* value = places.near[part] + 2 * (b * strides[0] + head * strides[1] + at * strides[2]);
                const u32 pair = reinterpret_cast<const u32*>(value)[word];
                const float x0 = from_bfloat16(pair), x1 = float_of(pair & 0xFFFF0000u);
                UNROLL for (int r = 0; r < MAX_ROWS; ++r) {
                    if (r < rows) {
                        const float w = weights[r * NEAR_TOKENS + t];
                        if (!(w < 0.0f)) sum[r][0] = multiply_add(w, x0, sum[r][0]), sum[r][1] = multiply_add(w, x1, sum[r][1]);
                    }
                }
            }
        }
        sync_block();
    }

    if (thread / words < groups) {
        float* own = sums + thread / words * rows * a.value_dim + 2 * (thread % words);
        UNROLL for (int r = 0; r < MAX_ROWS; ++r)
            if (r < rows) own[r * a.value_dim] = sum[r][0], own[r * a.value_dim + 1] = sum[r][1];
    }
    sync_block();
    const u64 place_out = (static_cast<u64>(split) * a.lines + line) * rows;
    for (int i = thread; i < rows * a.value_dim; i += NEAR_THREADS) {
        float x = 0.0f;
        for (int g = 0; g < groups; ++g) x += sums[g * rows * a.value_dim + i];
        const float total = totals[i / a.value_dim];
        a.out[place_out * a.value_dim + i] = total == 0.0f ? 0.0f : x / total;
    }
    // Where nothing is seen: above a split of the blocks that has seen nothing, so that zero wins.
    if (thread < rows)
        a.lse[place_out + thread] = totals[thread] == 0.0f ? -1e29f : peaks[thread] + logarithm_of_two(totals[thread]);
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
