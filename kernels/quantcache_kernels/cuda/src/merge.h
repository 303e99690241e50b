// The splits of a context merged, and with them the tokens that are not encoded.
#include "places.h"
#include "rows.h"

struct MergeArguments {
    const float* partial;    // what attend left
    const float* stats;
    const float* dense;      // [dense_splits, lines, rows, dim]: attention over the tokens that are not encoded
    const float* dense_lse;  // [dense_splits, lines, rows], base 2
    const float* decoder;    // [heads, coefficients, dim]
    const float* mean;       // [heads, dim]
    u8* out;                 // [batch, count, query heads, dim], float32 or bfloat16
    const Places* there;     // where in memory the number of splits is, or null
    Rows place;
    int lines, dim, coefficients, splits, dense_splits, is_bfloat16;
};

// Exponents are finite throughout, so that differences of them are numbers: what a query does not see has the first, the
// peak of a split that has seen nothing is at least the second, and what is seen has the third or more.
constexpr float HIDDEN = -1e30f, LEAST_PEAK = 0.5f * HIDDEN, LEAST_SEEN = -1e29f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int EARLY = 2;  // rows of the decoder that are on their way while splits are merged

struct Four {
    float x[4];
};
DEVICE Four load_four(const float* place) {
    const Words4 w = *reinterpret_cast<const Words4*>(place);
    return {{float_of(w.x), float_of(w.y), float_of(w.z), float_of(w.w)}};
}
DEVICE void store_four(float* place, const Four& v) {
    *reinterpret_cast<Words4*>(place) = {bits_of(v.x[0]), bits_of(v.x[1]), bits_of(v.x[2]), bits_of(v.x[3])};
}
DEVICE void add_scaled(Four& sum, float factor, const Four& v) {
    UNROLL for (int i = 0; i < 4; ++i) sum.x[i] = multiply_add(factor, v.x[i], sum.x[i]);
}

// One query: merge the splits, turn sums of levels into a vector, add the tokens that are not encoded.
// A block has 4 dim threads. In either product a thread has four columns of one row in so many.
KERNEL void BOUNDS(1024) merge(GIVEN(MergeArguments) a) {
    const int dim = a.dim, coefficients = a.coefficients, threads = 4 * dim, thread = static_cast<int>(thread_index());
    const int query = static_cast<int>(block_x()), line = static_cast<int>(block_y()), head = line % a.place.heads;
    const int place = line * a.place.rows + query;
    const int splits = a.there ? a.there->splits : a.splits;
    const u64 stride = static_cast<u64>(a.lines) * a.place.rows;  // from split to split
    float* rows = reinterpret_cast<float*>(shared_memory());  // what is to be added up: 16 dim
    float* weights = rows + 16 * dim;                         // 4 dim
    float* vector = weights + 4 * dim;                        // coefficients
    float* warps = vector + coefficients;                     // 32
    int* target = reinterpret_cast<int*>(warps + 32);         // the vector that is written, -1 for none: kept out of registers
    if (thread == 0) {
        const Row own = find_row(a.place, line, query);
        const int query_heads = a.place.heads * (a.place.total / a.place.count);
        *target = own.there ? (own.batch * a.place.count + own.query) * query_heads + own.query_head : -1;
    }

    const int out_row = thread / (dim / 4), out_column = 4 * (thread % (dim / 4));  // of the decoder: 16 rows at a time
    const float* own_decoder = a.decoder + static_cast<u64>(head) * coefficients * dim;
    const float* decoder = own_decoder + out_row * dim + out_column;
    const int steps = coefficients / 16;
    Four early[EARLY];
    UNROLL for (int i = 0; i < EARLY; ++i)
        if (i < steps) early[i] = load_four(decoder + 16 * i * dim);

    prefetch_all(own_decoder, 4 * coefficients * dim);
    await_launch_before();
    const float* stats = a.stats + 2 * place;
    float peak = HIDDEN;
    for (int s = thread; s < splits; s += threads) peak = larger(peak, stats[2 * s * stride]);
    UNROLL for (int mask = 1; mask < 32; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
    if (thread % 32 == 0) warps[thread / 32] = peak;
    sync_block();
    for (int w = 0; w < threads / 32; ++w) peak = larger(peak, warps[w]);

    const int columns = coefficients / 4, height = threads / columns;
    const int row = thread / columns, column = 4 * (thread % columns);
    const float* partial = a.partial + static_cast<u64>(place) * coefficients + column;
    float total = 0.0f;
    Four sum = {{0.0f, 0.0f, 0.0f, 0.0f}};
    for (int first = 0; first < splits; first += threads) {
        float weight = 0.0f;
        if (first + thread < splits) {
            const float* own = stats + 2 * (first + thread) * stride;
            weight = power_of_two(own[0] - peak);
            total = multiply_add(weight, own[1], total);
        }
        weights[thread] = weight;
        sync_block();
        const int count = splits - first < threads ? splits - first : threads;
        if (row < height) {
#ifdef __CUDACC__
#pragma unroll 4
#endif
            for (int s = row; s < count; s += height)
                add_scaled(sum, weights[s], load_four(partial + (first + s) * stride * coefficients));
        }
        sync_block();
    }
    UNROLL for (int mask = 1; mask < 32; mask *= 2) total = add(total, shuffle_xor(total, mask));
    if (thread % 32 == 0) warps[thread / 32] = total;
    if (row < height) store_four(rows + row * coefficients + column, sum);
    sync_block();
    total = 0.0f;
    for (int w = 0; w < threads / 32; ++w) total = add(total, warps[w]);
    for (int c = thread; c < coefficients; c += threads) {
        float x = 0.0f;
        for (int r = 0; r < height; ++r) x += rows[r * coefficients + c];
        vector[c] = total > 0.0f ? x / total : 0.0f;
    }
    sync_block();

    sum = {{0.0f, 0.0f, 0.0f, 0.0f}};
    UNROLL for (int i = 0; i < EARLY; ++i)
        if (i < steps) add_scaled(sum, vector[16 * i + out_row], early[i]);
    for (int i = EARLY; i < steps; ++i)
        add_scaled(sum, vector[16 * i + out_row], load_four(decoder + 16 * i * dim));
    store_four(rows + out_row * dim + out_column, sum);
    sync_block();
    if (thread < dim) {
        float x = a.mean[head * dim + thread];
        UNROLL for (int r = 0; r < 16; ++r) x += rows[r * dim + thread];
        float lse = total > 0.0f ? peak + logarithm_of_two(total) : HIDDEN;
        ROLLED for (int s = 0; s < a.dense_splits; ++s) {
            const u32 at = static_cast<u32>((s * a.lines + line) * a.place.rows + query);
            const float other = a.dense_lse[at], top = larger(lse, other);
            const float own_share = power_of_two(lse - top), other_share = power_of_two(other - top);
            const float dense = a.dense[at * static_cast<u32>(dim) + static_cast<u32>(thread)];
            const float share = own_share + other_share;
            x = (x * own_share + dense * other_share) / share;
            lse = top + logarithm_of_two(share);
        }
        const int vector_out = *target;
        const u64 at = static_cast<u64>(vector_out) * dim + thread;
        if (vector_out >= 0 && a.is_bfloat16) reinterpret_cast<u16*>(a.out)[at] = static_cast<u16>(to_bfloat16(x));
        if (vector_out >= 0 && !a.is_bfloat16) reinterpret_cast<float*>(a.out)[at] = x;
    }
}
