// What encoding is given, and what a block of threads has of it in shared memory.
#include "tiles.h"

#ifndef TRELLIS
#define TRELLIS 0  // whether codes are paths through a trellis
#endif

constexpr int BLOCK = 64;
constexpr int PITCH = BLOCK + 1;               // floats from a coefficient to the next: lanes find either way free of conflicts
constexpr int FACTORS = 5;                     // of the gain search, tried at once
constexpr int PIECES = 3;                      // bfloat16 in a float32
constexpr int WIDTHS = 9;
constexpr int NARROW = 3;                      // bits up to which a codebook is a `Ladder` to the gain search
constexpr int LADDER = (1 << (NARROW - 1)) - 1;  // steps of it at most
constexpr int ROW = TRELLIS ? 16 : 4;          // bytes of levels: of a trellis one of every subset
constexpr float MAGIC = 8388608.0f;            // 2^23: a float behind it is rounded to an integer, which its lowest bits are

struct Pair {  // that rotates: cached dimensions, revolutions in units of 2^-64 a token
    u32 first, second, turns_low, turns_high;
};
struct alignas(8) Threshold {  // of a codebook: the only one that may lie in a bin, and the row of levels in front of it
    float at;
    u32 row;
};
struct alignas(8) Gap {  // between two magnitudes of scalar levels: its middle, and half of it
    float at, half;
};
// The codebooks of a width. Places are in bytes of the tables; those of bins are less what the bits of MAGIC come to.
struct Book {
    float scale, last;  // a number's bin is `last` times what scale u + 1/2 comes to between 0 and 1, rounded
    u32 bins, rows;     // `Threshold`s, and the first row of levels
    float search_scale, search_last;
    u32 search, reserved;  // `Gap`s of a wide scalar codebook
};
struct Ladder {  // a narrow scalar codebook: its least magnitude, and what every step up adds to it and to its square
    float level, at[LADDER], adds[LADDER], squares[LADDER];
};

struct EncodeArguments {
    const u16* x;            // bfloat16
    const int* block_table;  // [blocks, 3]
    const int* origins;      // [batch], or null
    const Pair* pairs;       // [dim / 2], slow ones first
    const float* mean;       // [heads, dim], in the order of pairs
    const Words4* matrix;    // [heads, tiles, dim / 16, PIECES, 32]: fragments of both halves of a tile
    const Words2* slots;     // [heads, 16 tiles]: weight; width, and 512 times its map
    const float* counts;     // [heads]: coded coefficients
    const Words2* places;    // [heads, tiles]: a tile's first word, and kinds of its halves
    const u8* maps;          // as of conversion.h
    const u32* tables;
    const float* factors;    // [FACTORS rounds]
    u32* out;                // [blocks, batch, tile_words]
    u8* gains;               // [blocks, batch, heads, 64]
    long long strides[4];    // of x: row, head, token and dimension
    int batch, heads, dim, slow, tiles, slow_tiles, tile_words, rounds, passes, values;
    int near_width, near_words;  // codebooks of so many bits are in shared memory, and so many words of the tables
    Book books[WIDTHS];
    Ladder ladders[NARROW + 1];
};

struct EncodeRoom {  // shared memory: at first of the vectors, then of everything else
    u32* fragments;  // [PIECES, 4, dim / 16, 32, 4]
    u8* tables;
    Words2* slots;
    Words2* steps;  // of every token, and its inverse
    float* y;       // coefficients [slots, PITCH]
    Words2* words;  // [2, slots]: c1 and c0 of half a block, the convolved path
    u32* paths;     // [2, slots]: its bits
    float* sums;    // [2, groups, 64]
    u32* survivors;  // [16, slots], for the search of paths, then codes; sums of the gain search before
    u8* codes;
};
DEVICE EncodeRoom encode_room(const EncodeArguments& a) {
    EncodeRoom room;
    const int slots = TILE_SLOTS * a.tiles, groups = static_cast<int>(block_threads()) / BLOCK;
    u8* next = shared_memory();
    room.fragments = reinterpret_cast<u32*>(next);
    room.tables = next, next += 4 * a.near_words;
    room.slots = reinterpret_cast<Words2*>(next), next += 8 * slots;
    room.steps = reinterpret_cast<Words2*>(next), next += 8 * BLOCK;
    room.y = reinterpret_cast<float*>(next), next += 4 * PITCH * slots;
    room.words = reinterpret_cast<Words2*>(next), next += TRELLIS ? 16 * slots : 0;
    room.paths = reinterpret_cast<u32*>(next), next += TRELLIS ? 8 * slots : 0;
    room.sums = reinterpret_cast<float*>(next), next += 8 * BLOCK * groups;
    room.survivors = reinterpret_cast<u32*>(next), room.codes = next;
    return room;
}

// The tables, where those of wide codebooks are; either way the compiler knows in which memory they lie.
template <typename Use>
DEVICE void with_tables(const EncodeArguments& a, const EncodeRoom& room, bool is_near, const Use& use) {
    if (is_near) use(static_cast<const u8*>(room.tables));
    else use(reinterpret_cast<const u8*>(a.tables));
}

// The row of a codebook's levels that a number belongs to; of NaN the first bin's.
DEVICE u32 row_of(const Book& book, const u8* tables, float u) {
    const float bin = multiply_add(multiply_add_within_one(u, book.scale, 0.5f), book.last, MAGIC);
    const Threshold found = *reinterpret_cast<const Threshold*>(tables + (8 * bits_of(bin) + book.bins));
    return u > found.at ? found.row + ROW : found.row;
}
