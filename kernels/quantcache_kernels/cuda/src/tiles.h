// A tile's codes as bytes in shared memory, and as the words that lanes read of it (blocks.py).
//
// The codes of a coefficient are 64 bytes, one for each token. Coefficients lie a little further apart, so that few lanes'
// codes share a bank of memory.
#pragma once
#include "warp.h"

constexpr int TILE_SLOTS = 16;
constexpr int CODE_PITCH = 66;  // bytes from a coefficient's codes to the next one's
constexpr int TILE_BYTES = TILE_SLOTS * CODE_PITCH;
constexpr int SIGNED = 12;  // the least kind of scalar codes that have signs

// Codes of so many bits lie in fields of 4, 2 and 1 bits, the highest first.
DEVICE int field_of(int bits) { return bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

// Where a lane has its first code, and how much further the code in a register's second half is.
struct LanePlaces {
    int first, side;
};
DEVICE LanePlaces places_of(int values, u32 lane) {
    const int row = static_cast<int>(lane / 4), column = static_cast<int>(lane % 4);
    return values ? LanePlaces{CODE_PITCH * row + 16 * column, 8} : LanePlaces{2 * CODE_PITCH * column + 8 * row, CODE_PITCH};
}
DEVICE int place_of(const LanePlaces& own, int half, int reg, int side) {
    return own.first + TILE_BYTES / 2 * half + own.side * side + reg;
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

// A field of a half's codes. Of scalar codes some registers' signs are in each other's place.
template <int LENGTH>
DEVICE void write_field(const u8* codes, const LanePlaces& own, int half, int above, u32 sign, u32 lane, u32* out) {
    constexpr u32 MASK = (1u << LENGTH) - 1;
    u32 low = 0, high = 0;
    UNROLL for (int i = 0; i < 16; ++i) {
        const int side = i / 8, reg = register_of(LENGTH, i % 8);
        u32 code = codes[place_of(own, half, reg, side)];
        if (sign) code = select(codes[place_of(own, half, exchanged(reg), side)], code, sign);
        const u32 bits = (code >> above & MASK) << shift_of(LENGTH, i % 8, side);
        if (LENGTH == 4 && i % 8 > 3) high |= bits;
        else low |= bits;
    }
    if (LENGTH == 4) reinterpret_cast<Words2*>(out)[lane] = {low, high};
    else if (LENGTH == 2) out[lane] = low;
    else reinterpret_cast<u16*>(out)[lane] = static_cast<u16>(low);
}

DEVICE void write_half(const u8* codes, const LanePlaces& own, int trellis, int half, int kind, u32 lane, u32* out) {
    const int width = width_of(kind);
    const u32 sign = exchanged_sign(trellis, kind);
    ROLLED for (int left = width - trellis; left > 0;) {
        const HalfField field = half_field(trellis, width, left);
        if (field.length == 4) write_field<4>(codes, own, half, field.above, sign, lane, out);
        else if (field.length == 2) write_field<2>(codes, own, half, field.above, sign, lane, out);
        else write_field<1>(codes, own, half, field.above, sign, lane, out);
        out += 16 * field.length, left -= field.length;
    }
}

DEVICE void read_half(const u32* words, const LanePlaces& own, int trellis, int half, int kind, u32 lane, u8* codes) {
    const int width = width_of(kind);
    const u32 sign = exchanged_sign(trellis, kind);
    for (int left = width - trellis; left > 0;) {
        const HalfField field = half_field(trellis, width, left);
        const u32 mask = (1u << field.length) - 1;
        UNROLL for (int i = 0; i < 16; ++i) {
            const int side = i / 8, reg = register_of(field.length, i % 8);
            const u32 word = field.length == 4   ? words[2 * lane + i % 8 / 4]
                             : field.length == 2 ? words[lane]
                                                 : reinterpret_cast<const u16*>(words)[lane];
            const u32 code = (word >> shift_of(field.length, i % 8, side) & mask) << field.above;
            codes[place_of(own, half, reg, side)] |= static_cast<u8>(code & ~sign);
            codes[place_of(own, half, exchanged(reg), side)] |= static_cast<u8>(code & sign);
        }
        words += 16 * field.length, left -= field.length;
    }
}

// The levels' codes of a tile of these kinds of halves, by one warp.
DEVICE void write_halves(const u8* codes, const LanePlaces& own, int trellis, u32 kinds, u32 lane, u32* out) {
    const int first = static_cast<int>(kinds & 15), second = static_cast<int>(kinds >> 4);
    write_half(codes, own, trellis, 0, first, lane, out);
    if (second) write_half(codes, own, trellis, 1, second, lane, out + 16 * (width_of(first) - trellis));
}

// The way back.
DEVICE void read_halves(const u32* words, const LanePlaces& own, int trellis, u32 kinds, u32 lane, u8* codes) {
    const int first = static_cast<int>(kinds & 15), second = static_cast<int>(kinds >> 4);
    read_half(words, own, trellis, 0, first, lane, codes);
    if (second) read_half(words + 16 * (width_of(first) - trellis), own, trellis, 1, second, lane, codes);
}
