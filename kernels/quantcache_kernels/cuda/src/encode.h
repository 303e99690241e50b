// Encoding: from keys or values as the model caches them to tiles of codes, and gains.
//
// A block of threads has one head of one block of tokens, and its coefficients stay in shared memory from the transform to
// the last code.
#include "encoding.h"
#include "coefficients.h"
#include "gains.h"
#include "paths.h"

// Eight bits, each followed by a zero.
DEVICE u32 spread_byte(u32 x) {
    x = (x | x << 4) & 0x0F0F;
    x = (x | x << 2) & 0x3333;
    return (x | x << 1) & 0x5555;
}

// A lane's path bits of a tile (path_word of conversion.h): of either half of it, and of registers, eight tokens each.
DEVICE u32 path_word_of(const u32* paths, int slots, int values, u32 lane) {
    const int row = static_cast<int>(lane / 4), column = static_cast<int>(lane % 4);
    u32 word = 0;
    UNROLL for (int i = 0; i < 4; ++i) {
        const int half = i % 2, side = i / 2;
        const int slot = 8 * half + (values ? row : 2 * column + side), eight = values ? 2 * column + side : row;
        word |= spread_byte(paths[eight / 4 * slots + slot] >> 8 * (eight % 4) & 255) << (half + 16 * side);
    }
    return word;
}

KERNEL void BOUNDS(256, 2) encode(GIVEN(EncodeArguments) a) {
    const EncodeRoom room = encode_room(a);
    const int threads = static_cast<int>(block_threads()), thread = static_cast<int>(thread_index());
    const int head = static_cast<int>(block_y()), slots = TILE_SLOTS * a.tiles;
    const int block = static_cast<int>(block_x()) / a.batch, row = static_cast<int>(block_x()) % a.batch;
    take_vectors(a, block, row, head, room.fragments);
    sync_block();
    TileSums sums;
    transform(a, head, room.fragments, sums);
    sync_block();
    store_coefficients(a, sums, room.y);
    for (int i = thread; i < a.near_words; i += threads) reinterpret_cast<u32*>(room.tables)[i] = a.tables[i];
    for (int i = thread; i < slots; i += threads) room.slots[i] = a.slots[head * slots + i];
    sync_block();

    float step = search_gain(a, head, room);
    for (int pass = 0; pass < a.passes; ++pass) {
        if (thread < BLOCK) room.steps[thread] = {bits_of(step), bits_of(inverse_of(step))};
        sync_block();
        if (TRELLIS) {
            search_paths(a, room);
            sync_block();
        }
        step = code_levels(a, room);
    }
    if (thread < BLOCK) a.gains[(static_cast<u64>(block_x()) * a.heads + head) * BLOCK + thread] = gain_code(step);

    u32* out = a.out + static_cast<u64>(block_x()) * a.tile_words;
    for (int tile = thread / 32; tile < a.tiles; tile += threads / 32) {
        const Words2 place = a.places[head * a.tiles + tile];
        if (!place.y) continue;
        const u32 lane = static_cast<u32>(thread % 32);
        u32* to = out + place.x;
        if (TRELLIS) {
            to[lane] = path_word_of(room.paths + TILE_SLOTS * tile, slots, a.values, lane);
            to += 32;
        }
        write_halves(room.codes + TILE_BYTES * tile, places_of(a.values, lane), TRELLIS, place.y, lane, to);
    }
}
