// What changes when a block is encoded: where blocks, sinks and tail lie, and how much there is of them.
//
// A call brings it along. In a CUDA graph the arguments of a launch stay what they were, and say where in memory this is.
#include "warp.h"

struct Places {
    const u8* keys;           // [blocks, batch, key_bytes]
    const u8* key_gains;      // [blocks, batch, heads, 64]
    const u8* values;         // [blocks, batch, value_bytes]
    const u8* value_gains;    // [blocks, batch, heads, 64]
    const int* block_table;   // [blocks, 3]: first slot, valid tokens, slot of the anchor
    const int* origins;       // [batch]: slot of a row's first token, where its sinks begin, or null
    const int* first_seen;    // [batch]: first slot that is read from blocks, or null
    u8* near[4];              // keys and values of the sinks, then of the tail, [batch, heads, tokens, dim], bfloat16
    long long strides[4][3];  // of those four, in elements: batch, head, token
    int blocks, units, per_split, splits;  // a unit: two blocks that share an anchor, or one where they are not paired
    int encoded_end;          // slot behind the last block
};

template <typename A>
DEVICE const Places& places_of(const A& a) {
    return a.there ? *a.there : a.places;
}
