// Rows of queries: where they are read, and where their results go.
#include "warp.h"

// A line is a row of the batch, a chunk of the rows of queries that share a key/value head, and that head, which runs
// fastest. Such rows are the query heads of a group times the queries, the queries running fastest; there are `total` of
// them, `rows` in a chunk, the last of which may have room left.
constexpr int MAX_ROWS = 8;  // of a chunk

struct Rows {
    int heads, chunks, rows, count, total;
};

struct Row {
    int batch, head, query_head, query;
    bool there;
};
DEVICE Row find_row(const Rows& a, int line, int row) {
    const int head = line % a.heads, batch = line / (a.heads * a.chunks);
    const int own = line / a.heads % a.chunks * a.rows + row;
    return {batch, head, head * (a.total / a.count) + own / a.count, own % a.count, own < a.total};
}

struct Queries {
    const u8* data;  // [batch, query heads, count, dim], float32 or bfloat16; every vector begins at a multiple of 16 bytes
    long long batch_stride, head_stride, query_stride;  // in elements
    Rows place;
    int is_bfloat16;
    float scaling;
};

DEVICE float from_bfloat16(u32 bits) { return float_of(bits << 16); }
DEVICE u32 to_bfloat16(float x) {  // to nearest, ties to even
    const u32 bits = bits_of(x);
    return x == x ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0;
}
DEVICE float load_number(const u8* place, u64 index, int is_bfloat16) {
    return is_bfloat16 ? from_bfloat16(reinterpret_cast<const u16*>(place)[index]) : reinterpret_cast<const float*>(place)[index];
}

// The queries of a line, times the scaling, [rows, dim]; zero where there is none. Eight numbers at once.
DEVICE void load_queries(const Queries& a, int line, int dim, float* out) {
    const int threads = static_cast<int>(block_threads()), eights = dim / 8;
    ROLLED for (int i = static_cast<int>(thread_index()); i < a.place.rows * eights; i += threads) {
        const Row row = find_row(a.place, line, i / eights);
        const u64 index = static_cast<u64>(row.batch * a.batch_stride + row.query_head * a.head_stride +
                                           row.query * a.query_stride + i % eights * 8);
        float x[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
        if (row.there && a.is_bfloat16) {
            const Words4 w = *reinterpret_cast<const Words4*>(a.data + 2 * index);
            const u32 pairs[4] = {w.x, w.y, w.z, w.w};
            UNROLL for (int j = 0; j < 8; ++j)
                x[j / 4][j % 4] = j % 2 ? float_of(pairs[j / 2] & 0xFFFF0000u) : from_bfloat16(pairs[j / 2]);
        }
        if (row.there && !a.is_bfloat16)
            UNROLL for (int j = 0; j < 2; ++j) floats_of(reinterpret_cast<const Words4*>(a.data + 4 * index)[j], x[j]);
        UNROLL for (int j = 0; j < 8; ++j) x[j / 4][j % 4] *= a.scaling;
        UNROLL for (int j = 0; j < 2; ++j) reinterpret_cast<Words4*>(out)[2 * i + j] = words_of(x[j]);
    }
}
