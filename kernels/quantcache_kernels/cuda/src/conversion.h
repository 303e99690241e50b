// Blocks brought from the portable layout into tiles (blocks.py), and back.
//
// For either, a warp takes a tile of one block and batch row, and has its codes as bytes in shared memory in between; of a
// trellis the path bit is the highest.
#include "tiles.h"

struct ConversionArguments {
    u32* portable;         // [blocks, portable_words]; blocks are those of all batch rows
    u32* tiles;            // [blocks, tile_words]
    const Words2* slots;   // [count, 16]: a coefficient's first word of `portable`; its width, and its map times 512
    const Words2* places;  // [count]: a tile's first word of `tiles`; kinds of its halves, four bits each
    const u8* maps;        // [maps, 2, 256]: what a code is stored as where levels are looked up, and the way back
    int portable_words, tile_words, count, trellis, values;  // count: tiles of all heads
};

constexpr int HIGHEST = 7;  // place of a path bit

// A token's code: it is in every 2 f-th word of a field of f bits.
DEVICE u32 read_portable(const u32* words, int bits, int token) {
    u32 code = 0;
    while (bits > 0) {
        const int field = field_of(bits), step = 2 * field, above = field * (token >> (1 + field / 2));
        code = code << field | (words[token & (step - 1)] >> above & ((1u << field) - 1));
        words += step, bits -= field;
    }
    return code;
}

// Word `index` of a coefficient's fields, of path bits where these are `above` its levels' bits.
DEVICE u32 portable_word(const u8* codes, const u8* map, int bits, int above, int index) {
    int field = field_of(bits);
    while (index >= 2 * field) index -= 2 * field, bits -= field, field = field_of(bits);
    u32 word = 0;
    for (int shift = 0, token = index; shift < 32; shift += field, token += 2 * field) {
        const u32 byte = codes[token], code = above ? byte >> above : map[byte];
        word |= (code >> (bits - field) & ((1u << field) - 1)) << shift;
    }
    return word;
}

DEVICE u32 path_word(const u8* codes, const LanePlaces& own) {
    u32 word = 0;
    for (int i = 0; i < 32; ++i)  // half, register, and the register's half
        word |= static_cast<u32>(codes[place_of(own, i % 2, i / 2 % 8, i / 16)] >> HIGHEST) << i;
    return word;
}

KERNEL void BOUNDS(32) tiles_from_portable(GIVEN(ConversionArguments) a) {
    const u32 lane = thread_index();
    const u64 block = block_x();
    const Words2 place = a.places[block_y()];
    if (!place.y) return;
    u8* codes = shared_memory();
    for (int i = static_cast<int>(lane); i < 64 * TILE_SLOTS; i += 32) {
        const Words2 slot = a.slots[16 * block_y() + static_cast<u32>(i / 64)];
        const int bits = static_cast<int>(slot.y & 255) - a.trellis, token = i % 64;
        u32 code = 0;
        if (slot.y & 255) {
            const u32* words = a.portable + block * static_cast<u64>(a.portable_words) + slot.x;
            code = a.maps[(slot.y & ~255u) + read_portable(words, bits, token)];
            if (a.trellis) code |= read_portable(words + 2 * bits, 1, token) << HIGHEST;
        }
        codes[CODE_PITCH * (i / 64) + token] = static_cast<u8>(code);
    }
    sync_warp();
    u32* out = a.tiles + block * static_cast<u64>(a.tile_words) + place.x;
    const LanePlaces own = places_of(a.values, lane);
    if (a.trellis) {
        out[lane] = path_word(codes, own);
        out += 32;
    }
    write_halves(codes, own, a.trellis, place.y, lane, out);
}

KERNEL void BOUNDS(32) portable_from_tiles(GIVEN(ConversionArguments) a) {
    const u32 lane = thread_index();
    const u64 block = block_x();
    const Words2 place = a.places[block_y()];
    if (!place.y) return;
    u8* codes = shared_memory();
    const u32* words = a.tiles + block * static_cast<u64>(a.tile_words) + place.x;
    const LanePlaces mine = places_of(a.values, lane);
    const u32 path = a.trellis ? words[lane] : 0;
    for (int i = 0; i < 32; ++i)  // a lane has its own codes' bytes alone
        codes[place_of(mine, i % 2, i / 2 % 8, i / 16)] = static_cast<u8>((path >> i & 1) << HIGHEST);
    read_halves(words + 32 * a.trellis, mine, a.trellis, place.y, lane, codes);
    sync_warp();
    for (int i = static_cast<int>(lane); i < 16 * 16; i += 32) {
        const Words2 slot = a.slots[16 * block_y() + static_cast<u32>(i / 16)];
        const int width = static_cast<int>(slot.y & 255), index = i % 16, bits = width - a.trellis;
        if (index >= 2 * width) continue;
        const u8 *own = codes + CODE_PITCH * (i / 16), *map = a.maps + (slot.y & ~255u) + 256;
        a.portable[block * static_cast<u64>(a.portable_words) + slot.x + static_cast<u32>(index)] =
            index < 2 * bits ? portable_word(own, map, bits, 0, index) : portable_word(own, map, 1, HIGHEST, index - 2 * bits);
    }
}
