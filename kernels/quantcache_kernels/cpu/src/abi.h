// What Python and the library tell each other: plain C structures of pointers, mirrored by ../structures.py.
// Change QUANTCACHE_ABI with any change here, so that a library left over from an older build is refused.
//
// Shapes: B batch, H key/value heads, G query heads per key/value head, Tq queries, n blocks of 64 tokens, D dimension
// of a key, Dv of a value, S sinks, t tokens behind the last block, C coded coefficients of a head.

#pragma once

#include <cstddef>
#include <cstdint>

#define QUANTCACHE_ABI 8

namespace quantcache {

constexpr int BLOCK = 64;          // tokens of a block
constexpr int ANCHOR_LENGTH = 128; // tokens that share an anchor
constexpr int TABLE = 256;         // floats between the tables of neighbouring widths
constexpr int PAD = 16;            // rows that are read as vectors are padded to a multiple of this

constexpr float GAIN_STEPS = 32.0f;   // gain codes in an octave
constexpr float GAIN_CENTER = 128.0f; // gain code of 1.0

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// One coded coefficient.
struct Coded {
    int32_t offset; // of its words in those of its batch row of a block
    int32_t width;
    int32_t index;  // among the coefficients of its head
    int32_t run;    // how many coefficients from here on have the same width
};

// The constants of the keys or of the values of one layer. Coefficients that are coded come slow part first, then fast
// part, by ascending width in each; a side without a rotation has no fast part.
struct Side {
    int32_t dim;                // D
    int32_t slow;               // dimensions of the slow part; D where nothing rotates
    int32_t slow_pairs;         // rotary pairs among them
    int32_t fast_pairs;         // rotary pairs of the fast part, which is all pairs
    int32_t words;              // words of a block and batch row
    int32_t map_columns;        // stride of `map`, a multiple of PAD
    int32_t num_factors;        // gain factors that encoding tries
    int32_t trellis;            // how often encoding seeks the best paths through a trellis; 0 without one
    const int32_t* counts;      // coded coefficients of the slow and of the fast part [H][2]
    const Coded* coded;         // [H][D]
    const int32_t* order;       // dimension of the cached vector at each place of the frame [D]
    const double* frequencies;  // radians per token, slow pairs first [pairs]
    const float* mean;          // [H][D]
    const float* map;           // keys: slow dimension to slow coded coefficient [H][slow][map_columns]
                                // values: coded coefficient to dimension [H][D][map_columns]
    const float* fast_map;      // keys: fast coded coefficient to fast dimension, four dimensions at a time: two of
                                // first halves of pairs and their second halves [H][fast / 4][fast][4]
    const float* offset_cos;    // rotation by the offset from the anchor [fast_pairs][ANCHOR_LENGTH]
    const float* offset_sin;
    const float* levels;        // codebook of each width [9][TABLE]
    const uint8_t* planes;      // what codes stand for, byte by byte: [9] of [low bits][4 bytes][high 4 bits]; with a
                                // trellis and more than 3 bits the union codebook's upper half
    const float* gains;         // value of every gain code [256]
    const float* encoder;       // [H][D][D]
    const float* weights;       // error weight of each coefficient [H][D]
    const float* trees;         // decision boundaries of each width as a search tree, root at 1 [9][TABLE]
    const float* factors;       // [num_factors]
    const float* unions;        // with a trellis: union codebook of each width [9][2 * TABLE]
    const float* subsets;       // with a trellis: the four subsets of each union codebook, each as its levels and the
                                // search tree of the boundaries between them [9][4][2][TABLE / 2]
    const float* decoder;       // [H][D][D]
};

// Where a block lies: its first slot, how many of its tokens are valid, and the slot of its anchor.
struct Place {
    int32_t first;
    int32_t length;
    int32_t anchor;
};

// [B][H][tokens][dimension] with a dense last dimension; strides in elements.
struct Dense {
    const void* data;
    int64_t batch_stride;
    int64_t head_stride;
    int64_t token_stride;
};

struct Encode {
    const Side* side;
    int32_t batch;
    int32_t heads;
    int32_t blocks;
    int32_t dtype;
    Dense x;                // [B][H][n * 64][D]
    const Place* block_table;     // [n]
    const int64_t* left_padding;  // of each row [B], or null
    int32_t* codes;         // out: [n][B][W]
    uint8_t* gains;         // out: [n][B][H][64]
    int32_t threads;
    int32_t level;
};

struct Decode {
    const Side* side;
    int32_t batch;
    int32_t heads;
    int32_t blocks;
    const int32_t* codes;   // [n][B][W]
    const uint8_t* gains;   // [n][B][H][64]
    const Place* block_table;     // [n]
    const int64_t* left_padding;  // what is taken from a row's slots for their positions [B], or null
    float* out;             // out: [B][H][n * 64][D]
    int32_t threads;
    int32_t level;
};

// What many calls of attention have in common: blocks and sinks.
struct Past {
    const Side* key;
    const Side* value;
    int32_t batch;
    int32_t heads;
    int32_t blocks;
    int32_t num_sinks;
    int32_t dense_dtype;      // of sinks and tail
    Dense sinks[2];           // keys and values
    const int32_t* key_codes; // [n][B][W]
    const int32_t* value_codes;
    const uint8_t* key_gains; // [n][B][H][64]
    const uint8_t* value_gains;
    const Place* block_table;     // [n]
    const int64_t* left_padding;  // of each row [B], or null
    int64_t encoded_end;          // slot behind the last encoded token
};

// What is another at every call.
struct Call {
    int32_t groups;
    int32_t queries;
    int32_t num_tail;
    int32_t query_dtype;
    int32_t causal;           // whether a query may not see the tokens behind its own
    int32_t threads;
    int32_t level;
    float scaling;
    float softcap;            // 0: none
    Dense query;              // [B][H * G][Tq][D]
    Dense tail[2];            // keys and values
    void* output;             // out: [B][Tq][H * G][Dv] in the query's dtype
    const uint8_t* mask;      // whether a query may look at a slot [B][Tq][slots], or null
    int64_t mask_batch_stride;
    int64_t mask_query_stride;
    const float* sink_logits; // one logit per query head that joins the softmax without a value [H * G], or null
};

struct Attend : Past, Call {};

// Attention on one key/value head is split over the context, into whole blocks; sinks and tail are the last split. Where
// splits end depends on the number of blocks alone, so the result does not depend on the number of threads.
constexpr int MOST_SPLITS = 64;
constexpr int LEAST_SPLIT = 8; // blocks

inline int blocks_per_split(int blocks) {
    const int share = (blocks + MOST_SPLITS - 1) / MOST_SPLITS;
    const int per_split = share > LEAST_SPLIT ? share : LEAST_SPLIT;
    return per_split + per_split % 2; // two blocks to an anchor
}

inline int code_splits(int blocks) {
    const int per_split = blocks_per_split(blocks);
    return (blocks + per_split - 1) / per_split;
}

inline int row_tiles(const Attend& a) { return (a.groups * a.queries + 3) / 4; }

// One instruction set's kernels. Partial results are laid out [split][tile of 4 rows]: an accumulator of
// [columns][4 rows], the largest score and the sum of the weights of 4 rows each.
struct Level {
    const char* name;
    size_t (*encode_scratch)(const Encode&);                                  // bytes
    void (*encode)(const Encode&, int block, int row, int head, char* scratch);
    size_t (*attend_scratch)(const Attend&);
    void (*attend)(const Attend&, int row, int head, int split, float* partial, char* scratch);
    void (*merge)(const Attend&, int row, int head, const float* partials, char* scratch);
    size_t (*decode_scratch)(const Decode&);
    void (*decode)(const Decode&, int block, int row, int head, char* scratch);
};

// Floats of a partial result.
inline size_t partial_size(const Attend& a) {
    const int columns = a.value->dim;
    return static_cast<size_t>(row_tiles(a)) * (columns + 2) * 4;
}

extern const Level plain_level;
extern const Level avx2_level;
extern const Level avx512_level;

} // namespace quantcache
