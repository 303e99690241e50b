// Blocks brought from the portable layout into tiles (blocks.py), and back.
//
// For either, a warp takes a tile of one block and batch row, and has its codes as bytes in shared memory in between:
// those of a coefficient are 64 bytes, one for each token, and of a trellis the path bit is the highest.
#include "warp.h"

struct ConversionArguments {
    u32* portable;         // [blocks, portable_words]; blocks are those of all batch rows
    u32* tiles;            // [blocks, tile_words]
    const Words2* slots;   // [count, 16]: a coefficient's first word of `portable`; its width, and its map times 512
    const Words2* places;  // [count]: a tile's first word of `tiles`; kinds of its halves, four bits each
    const u8* maps;        // [maps, 2, 256]: what a code is stored as where levels are looked up, and the way back
    int portable_words, tile_words, count, trellis, values;  // count: tiles of all heads
};

constexpr int CONVERTED = 16 * 64;       // codes of a tile
constexpr int HIGHEST = 7, SIGNED = 12;  // place of a path bit; the least kind of scalar codes that have signs

// Codes of so many bits lie in fields of 4, 2 and 1 bits, the highest first.
DEVICE int field_of(int bits) { return bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

// ---------------------------------------------------------------------- portable

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

// ---------------------------------------------------------------------- tiles

// Where a lane's code of a half's register, and of that register's half, is among the tile's.
DEVICE int own_place(int values, u32 lane, int half, int reg, int side) {
    const int row = static_cast<int>(lane / 4), column = static_cast<int>(lane % 4);
    const int coefficient = values ? row : 2 * column + side;
    return 64 * (8 * half + coefficient) + (values ? 16 * column + 8 * side + reg : 8 * row + reg);
}

// Fields of a half's codes, in the order of their words: how long, and above which bit. Of a trellis of four bits, whose
// levels' highest is a sign, the lower two come first.
struct HalfField {
    int length, above;
};
DEVICE HalfField half_field(int trellis, int width, int left) {
    if (trellis && width == 4) return left == 3 ? HalfField{2, 0} : HalfField{1, 2};
    const int length = field_of(left);
    return {length, left - length};
}

// The register, of eight, whose code is the i-th of a lane's fields' words: words of 4-bit fields have four each.
DEVICE int register_of(int length, int i) { return length == 4 ? (i & 1) | (i & 2) << 1 | (i & 4) >> 1 : i; }
DEVICE int shift_of(int length, int i, int side) {
    return (length == 4 ? 4 * (i % 4) : 2 * i) + (length == 1 ? side : 16 * side);
}

// Of scalar codes with signs, the sign of register 1 is in 4's place, that of 3 in 6's, and the other way around.
DEVICE u32 exchanged_sign(int trellis, int kind) { return trellis || kind < SIGNED ? 0 : kind == SIGNED ? 8 : 1; }
DEVICE int exchanged(int reg) { return (reg & 2) | (reg & 1) << 2 | (reg & 4) >> 2; }

DEVICE int width_of(int kind) { return kind > 8 ? kind - 8 : kind; }

DEVICE u32 path_word(const u8* codes, int values, u32 lane) {
    u32 word = 0;
    for (int i = 0; i < 32; ++i) {  // half, register, and the register's half
        const int half = i % 2, reg = i / 2 % 8, side = i / 16;
        word |= static_cast<u32>(codes[own_place(values, lane, half, reg, side)] >> HIGHEST) << i;
    }
    return word;
}

DEVICE void write_half(const u8* codes, const ConversionArguments& a, int half, int kind, u32 lane, u32* out) {
    const int width = width_of(kind);
    const u32 sign = exchanged_sign(a.trellis, kind);
    for (int left = width - a.trellis; left > 0;) {
        const HalfField field = half_field(a.trellis, width, left);
        const u32 mask = (1u << field.length) - 1;
        u32 low = 0, high = 0;
        UNROLL for (int i = 0; i < 16; ++i) {
            const int side = i / 8, reg = register_of(field.length, i % 8);
            const u32 code = (codes[own_place(a.values, lane, half, reg, side)] & ~sign) |
                             (codes[own_place(a.values, lane, half, exchanged(reg), side)] & sign);
            const u32 bits = (code >> field.above & mask) << shift_of(field.length, i % 8, side);
            if (field.length == 4 && i % 8 > 3) high |= bits;
            else low |= bits;
        }
        if (field.length == 4) reinterpret_cast<Words2*>(out)[lane] = {low, high};
        else if (field.length == 2) out[lane] = low;
        else reinterpret_cast<u16*>(out)[lane] = static_cast<u16>(low);
        out += 16 * field.length, left -= field.length;
    }
}

DEVICE void read_half(const u32* words, const ConversionArguments& a, int half, int kind, u32 lane, u8* codes) {
    const int width = width_of(kind);
    const u32 sign = exchanged_sign(a.trellis, kind);
    for (int left = width - a.trellis; left > 0;) {
        const HalfField field = half_field(a.trellis, width, left);
        const u32 mask = (1u << field.length) - 1;
        UNROLL for (int i = 0; i < 16; ++i) {
            const int side = i / 8, reg = register_of(field.length, i % 8);
            const u32 word = field.length == 4   ? words[2 * lane + i % 8 / 4]
                             : field.length == 2 ? words[lane]
                                                 : reinterpret_cast<const u16*>(words)[lane];
            const u32 code = (word >> shift_of(field.length, i % 8, side) & mask) << field.above;
            codes[own_place(a.values, lane, half, reg, side)] |= static_cast<u8>(code & ~sign);
            codes[own_place(a.values, lane, half, exchanged(reg), side)] |= static_cast<u8>(code & sign);
        }
        words += 16 * field.length, left -= field.length;
    }
}

// ---------------------------------------------------------------------- both ways

KERNEL void BOUNDS(32) tiles_from_portable(GIVEN(ConversionArguments) a) {
    const u32 lane = thread_index();
    const u64 block = block_x();
    const Words2 place = a.places[block_y()];
    if (!place.y) return;
    u8* codes = shared_memory();
    for (int i = static_cast<int>(lane); i < CONVERTED; i += 32) {
        const Words2 slot = a.slots[16 * block_y() + static_cast<u32>(i / 64)];
        const int bits = static_cast<int>(slot.y & 255) - a.trellis, token = i % 64;
        u32 code = 0;
        if (slot.y & 255) {
            const u32* words = a.portable + block * static_cast<u64>(a.portable_words) + slot.x;
            code = a.maps[(slot.y & ~255u) + read_portable(words, bits, token)];
            if (a.trellis) code |= read_portable(words + 2 * bits, 1, token) << HIGHEST;
        }
        codes[i] = static_cast<u8>(code);
    }
    sync_warp();
    u32* out = a.tiles + block * static_cast<u64>(a.tile_words) + place.x;
    if (a.trellis) {
        out[lane] = path_word(codes, a.values, lane);
        out += 32;
    }
    const int first = static_cast<int>(place.y & 15), second = static_cast<int>(place.y >> 4);
    write_half(codes, a, 0, first, lane, out);
    if (second) write_half(codes, a, 1, second, lane, out + 16 * (width_of(first) - a.trellis));
}

KERNEL void BOUNDS(32) portable_from_tiles(GIVEN(ConversionArguments) a) {
    const u32 lane = thread_index();
    const u64 block = block_x();
    const Words2 place = a.places[block_y()];
    if (!place.y) return;
    u8* codes = shared_memory();
    const u32* words = a.tiles + block * static_cast<u64>(a.tile_words) + place.x;
    const u32 path = a.trellis ? words[lane] : 0;
    words += 32 * a.trellis;
    for (int i = 0; i < 32; ++i)  // a lane has its own codes' bytes alone
        codes[own_place(a.values, lane, i % 2, i / 2 % 8, i / 16)] = static_cast<u8>((path >> i & 1) << HIGHEST);
    const int first = static_cast<int>(place.y & 15), second = static_cast<int>(place.y >> 4);
    read_half(words, a, 0, first, lane, codes);
    if (second) read_half(words + 16 * (width_of(first) - a.trellis), a, 1, second, lane, codes);
    sync_warp();
    for (int i = static_cast<int>(lane); i < 16 * 16; i += 32) {
        const Words2 slot = a.slots[16 * block_y() + static_cast<u32>(i / 16)];
        const int width = static_cast<int>(slot.y & 255), index = i % 16, bits = width - a.trellis;
        if (index >= 2 * width) continue;
        const u8 *own = codes + 64 * (i / 16), *map = a.maps + (slot.y & ~255u) + 256;
        a.portable[block * static_cast<u64>(a.portable_words) + slot.x + static_cast<u32>(index)] =
            index < 2 * bits ? portable_word(own, map, bits, 0, index) : portable_word(own, map, 1, HIGHEST, index - 2 * bits);
    }
}
