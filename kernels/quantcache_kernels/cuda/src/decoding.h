// Codes of a tile of 16 coefficients to levels in half precision, two in a register.
//
// A lane's words hold its own codes (blocks.py) in such an order that four of them, of two registers, are one shift away
// from being bytes, or nibbles of half a word. Bytes go behind the exponent of 1024: then they are half-precision numbers,
// which a polynomial of each coefficient's own turns into levels. Nibbles choose bytes: half a tile of few bits looks its
// levels up where it can, upper and lower bytes each in a table of its own.
//
// Of a trellis the subsets of all the lane's codes come first, from one word of path bits: a delay by a token is a shift
// by two. They are two bits of each code, below the level's.
#include "warp.h"

#ifdef MARKED
#define MARK(place) asm volatile("pmevent %0;" ::"n"(place))  // benchmarks/sass.py finds places in machine code by it
#else
#define MARK(place)
#endif

constexpr u32 ONE_HALVES = 0x3C003C00;  // 1.0 twice
constexpr int TABLED = 8;  // added to the width of half a tile whose levels are looked up
constexpr int TERMS = 8;  // words of a lane's polynomial or table of half a tile
constexpr int BYTE_PLACES = 7;  // bits of a place in a codebook up to which codes are bytes on their way to levels

DEVICE constexpr u32 twice(u32 half) { return half * 0x10001u; }
DEVICE constexpr u32 four_times(u32 byte) { return byte * 0x01010101u; }
DEVICE u32 shifted(u32 word, int left) { return left < 0 ? word >> -left : word << left; }

// The fields of a lane's codes: two words for four bits, one for two, and half a word for one, whose bits are brought to
// where those of two have their lower one; the other bits there mean nothing.
//
// Register r is at bits 2 r and 2 r + 16 of a field of two bits: those of registers r and r + 4 are in all four bytes alike.
// Nibbles have the same order of bytes, two registers to a byte, and the second word has those of registers 2, 3, 6 and 7.
struct Fields {
    u32 four[4], two, one;
};
// `place` is where a lane's own word would be in a field of two bits.
template <int B>
DEVICE void load_fields(const u8* place, u32 lane, Fields& fields) {
    UNROLL for (int i = 0; i < B / 4; ++i) {
        const Words2 w = *reinterpret_cast<const Words2*>(place + 4 * lane + 256 * i);
        fields.four[2 * i] = w.x, fields.four[2 * i + 1] = w.y;
    }
    if constexpr (B % 4 >= 2) fields.two = *reinterpret_cast<const u32*>(place + 256 * (B / 4));
    if constexpr (B % 2) {
        const u32 word = *reinterpret_cast<const u16*>(place - 2 * lane + 64 * (B - 1));
        fields.one = select(word, word << 15, 0xFFFF);
    }
}

// ---------------------------------------------------------------------- polynomials

// Codes of registers r and r + 4, r below 4, as bytes with their highest bit at bit 7: the first halves of both registers,
// then the second ones. Of a trellis, `subsets` has two bits for every code.
template <int W, bool TRELLIS>
DEVICE u32 bytes_of_codes(const Fields& fields, u32 subsets, int r) {
    constexpr int B = TRELLIS ? W - 1 : W;
    constexpr bool ONE_FIRST = TRELLIS && B == 3;  // it is the sign where levels are looked up
    constexpr int TWO = B >= 4 ? 2 : ONE_FIRST ? 5 : 6, ONE = ONE_FIRST ? 7 : 8 - B, SUBSET = 7 - W;  // lowest bits
    u32 x = 0;
    if constexpr (B >= 4) x |= shifted(fields.four[r / 2], r % 2 ? 0 : 4) & four_times(0xF0);
    if constexpr (B % 4 >= 2) x |= shifted(fields.two, TWO - 2 * r) & four_times(3 << TWO);
    if constexpr (B % 2) x |= shifted(fields.one, ONE - 2 * r) & four_times(1 << ONE);
    if constexpr (TRELLIS) x |= shifted(subsets, SUBSET - 2 * r) & four_times(3 << SUBSET);
    return x;
}

// Bits of register r of a field, moved so that the lowest is at bit `at` of either half.
DEVICE u32 nibble_of(const u32* words, int r, int at) {
    return shifted(words[r / 2 % 2], at - 4 * (r % 2) - 8 * (r / 4)) & twice(0xFu << at);
}
DEVICE u32 bits_at(u32 word, int bits, int r, int at) { return shifted(word, at - 2 * r) & twice(((1u << bits) - 1) << at); }

// Register r's codes of more bits than a byte has, under the exponent of 1.0 and with their highest bit at bit 9.
template <int W, bool TRELLIS>
DEVICE u32 wide_codes(const Fields& fields, u32 subsets, u32 one, int r) {
    u32 x = one | nibble_of(fields.four, r, 6);
    if constexpr (!TRELLIS) return x | nibble_of(fields.four + 2, r, 2);
    x |= bits_at(fields.two, 2, r, 4);
    if constexpr (W == 8) x |= bits_at(fields.one, 1, r, 3);
    return x | bits_at(subsets, 2, r, 9 - W);
}

// Levels of two codes as they come from above, in units of their coefficient. Terms that a width lacks are zero in
// narrower ones of its half too.
template <int W, bool TRELLIS>
DEVICE u32 polynomial(u32 x, const u32 (&t)[6]) {
    x = halves_multiply_add(x, t[0], t[1]);
    if constexpr (!TRELLIS && W == 1) return x;
    const u32 square = halves_multiply(x, x);
    if constexpr (TRELLIS) {
        u32 p = t[2];
        if constexpr (W > 1) {
            p = W > 2 ? halves_multiply_add(square, t[5], t[4]) : t[4];
            p = halves_multiply_add(square, p, t[3]);
            p = halves_multiply_add(square, p, t[2]);
        }
        return halves_multiply_add(x, halves_multiply(square, p), x);  // x + x p rounds once
    } else {
        const u32 p = W > 2 ? halves_multiply_add(square, t[3], t[2]) : t[2];
        return halves_multiply(x, halves_multiply_add(square, p, ONE_HALVES));
    }
}

// Levels of the eight registers of half a tile, of W bits, by polynomials. The codes of a block are `apart` bytes behind
// those of the one before it.
template <int W, bool TRELLIS, int BLOCKS>
DEVICE void compute(const u8* place, int apart, const u32* terms, const u32 (&subsets)[BLOCKS], u32 one, u32 lane,
                    u32 (&levels)[BLOCKS][8]) {
    MARK(W);
    const Words4 first_terms = *reinterpret_cast<const Words4*>(terms);
    u32 t[6] = {first_terms.x, first_terms.y, first_terms.z, first_terms.w, 0, 0};
    if constexpr (TRELLIS && W > 1) {
        const Words2 last_terms = *reinterpret_cast<const Words2*>(terms + 4);
        t[4] = last_terms.x, t[5] = last_terms.y;
    }
    UNROLL for (int block = 0; block < BLOCKS; ++block) {
        Fields fields;
        load_fields<TRELLIS ? W - 1 : W>(place + block * apart, lane, fields);
        u32 x[8];
        UNROLL for (int r = 0; r < 4; ++r) {
            if constexpr (W + TRELLIS <= BYTE_PLACES) {  // 0x64 is the exponent of 1024
                const u32 bytes = bytes_of_codes<W, TRELLIS>(fields, subsets[block], r);
                x[r] = byte_permute(bytes, four_times(0x64), 0x4240);
                x[r + 4] = byte_permute(bytes, four_times(0x64), 0x4341);
            } else {
                x[r] = wide_codes<W, TRELLIS>(fields, subsets[block], one, r);
                x[r + 4] = wide_codes<W, TRELLIS>(fields, subsets[block], one, r + 4);
            }
        }
        UNROLL for (int r = 0; r < 8; ++r) levels[block][r] = polynomial<W, TRELLIS>(x[r], t);
    }
}

// ---------------------------------------------------------------------- tables

// Upper bytes of eight levels, then lower ones; of sixteen levels both again.
struct LevelTables {
    Words4 first, second;
};

// Bytes of a table's other half where a selector's highest bit is set, as tables.py prepares them for it: the selected
// byte comes with the sign of the byte that the first half has there.
DEVICE u32 either(u32 first, u32 second) { return first ^ (second & 0x7F7F7F7F); }

// Two registers of levels from four nibbles: the first halves of both registers, then the second ones. The levels' signs
// are turned around where `signs` has the highest bits of bytes.
template <bool SIXTEEN>
DEVICE void look_up_two(u32 codes, const LevelTables& t, u32 signs, u32& one, u32& other) {
    u32 upper = byte_permute(t.first.x, t.first.y, codes), lower = byte_permute(t.first.z, t.first.w, codes);
    if constexpr (SIXTEEN) {
        upper = either(upper, byte_permute(t.second.x, t.second.y, codes ^ 0x8888));
        lower = either(lower, byte_permute(t.second.z, t.second.w, codes ^ 0x8888));
    }
    upper ^= signs & four_times(0x80);
    one = byte_permute(lower, upper, 0x6240);
    other = byte_permute(lower, upper, 0x7351);
}

// Two fields as nibbles: those of even registers, then those of odd ones. `low` has the lower bits.
DEVICE void join(u32 low, u32 high, int low_bits, u32 (&nibbles)[2]) {
    const u32 mask = four_times(((1u << low_bits) - 1) * 0x11);
    nibbles[0] = select(low, high << low_bits, mask);
    nibbles[1] = select(low >> 2, shifted(high, low_bits - 2), mask);
}

// Levels of a trellis' codes. 32 levels are those without sign: the highest bit says that the sign is negative, and then
// the place is counted from the other end.
template <int W>
DEVICE void look_up_trellis(const Fields& fields, const LevelTables& tables, u32 subsets, u32* levels) {
    u32 nibbles[2], signs = 0;
    if constexpr (W == 4) {
        subsets ^= (fields.one & four_times(0x55)) * 3;
        // The signs of registers 2, 3 and 4, 5 change places: then those of four codes are in all four bytes alike.
        const u32 differ = (fields.one ^ fields.one >> 4) & twice(0x00F0);
        signs = fields.one ^ differ ^ differ << 4;
    }
    if constexpr (W == 1) nibbles[0] = subsets, nibbles[1] = subsets >> 2;
    else join(subsets, W == 2 ? fields.one : fields.two, 2, nibbles);
    if constexpr (W < 3) {
        constexpr u32 MASK = four_times(W == 1 ? 0x33 : 0x77);
        nibbles[0] &= MASK, nibbles[1] &= MASK;
    }
    UNROLL for (int odd = 0; odd < 2; ++odd)
        UNROLL for (int r = odd; r < 8; r += 4) {
            const u32 codes = byte_permute(nibbles[odd], 0, r < 4 ? 0x4420 : 0x4431);
            look_up_two<(W > 2)>(codes, tables, W == 4 ? signs << (7 - r / 4 * 4 - odd * 2) : 0, levels[r], levels[r + 2]);
        }
}

// Levels of scalar codes. Of 16 and 32 levels too the tables have those without sign; the highest bits of nibbles, or else
// a field of their own, have the signs of four codes in all four bytes alike.
template <int W>
DEVICE void look_up_scalar(const Fields& fields, const LevelTables& tables, u32* levels) {
    if constexpr (W > 3) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const u32 word = fields.four[i / 2], places = W == 4 ? word & four_times(0x77) : word;
            const u32 codes = byte_permute(places, 0, i % 2 ? 0x4431 : 0x4420);
            const u32 signs = W == 5 ? fields.one << (7 - 2 * i) : i % 2 ? word : word << 4;
            const int r = 2 * (i / 2) + 4 * (i % 2);
            look_up_two<(W > 4)>(codes, tables, signs, levels[r], levels[r + 1]);
        }
        return;
    }
    constexpr u32 MASK = four_times(((1u << W) - 1) * 0x11);
    u32 nibbles[2] = {W == 2 ? fields.two : fields.one, 0};
    nibbles[1] = nibbles[0] >> 2;
    if constexpr (W == 3) join(fields.one, fields.two, 1, nibbles);
    UNROLL for (int odd = 0; odd < 2; ++odd)
        UNROLL for (int r = odd; r < 8; r += 4) {
            const u32 codes = byte_permute(nibbles[odd] & MASK, 0, r < 4 ? 0x4420 : 0x4431);
            look_up_two<false>(codes, tables, 0, levels[r], levels[r + 2]);
        }
}

// The same as compute() from tables.
template <int W, bool TRELLIS, int BLOCKS>
DEVICE void look_up(const u8* place, int apart, const u32* terms, const u32 (&subsets)[BLOCKS], u32 lane,
                    u32 (&levels)[BLOCKS][8]) {
    MARK(TABLED + W);
    LevelTables tables = {reinterpret_cast<const Words4*>(terms)[0], {0, 0, 0, 0}};
    if constexpr (W > (TRELLIS ? 2 : 4)) tables.second = reinterpret_cast<const Words4*>(terms)[1];
    UNROLL for (int block = 0; block < BLOCKS; ++block) {
        Fields fields;
        load_fields<TRELLIS ? W - 1 : W>(place + block * apart, lane, fields);
        if constexpr (TRELLIS) look_up_trellis<W>(fields, tables, subsets[block], levels[block]);
        else look_up_scalar<W>(fields, tables, levels[block]);
    }
}

// ---------------------------------------------------------------------- tiles

// Levels of half a tile of a kind, which `use` is given; how many bytes the half's codes take in a block. Every kind has
// the use in its own code: where ways come together, levels would be moved to the same registers.
template <bool TRELLIS, int BLOCKS, typename Use>
DEVICE int decode_half(u32 kind, const u8* place, int apart, const u32* terms, const u32 (&subsets)[BLOCKS], u32 one,
                       u32 lane, Use use) {
    u32 levels[BLOCKS][8];
#define COMPUTE(W) \
    return compute<W, TRELLIS>(place, apart, terms, subsets, one, lane, levels), use(levels), 64 * (W - TRELLIS)
#define LOOK_UP(W) return look_up<W, TRELLIS>(place, apart, terms, subsets, lane, levels), use(levels), 64 * (W - TRELLIS)
    // The same in all lanes; a jump table would wait for memory.
    if (kind > TABLED) {
        if (kind == TABLED + 3) LOOK_UP(3);
        if (kind == TABLED + 4) LOOK_UP(4);
        if (kind == TABLED + 2) LOOK_UP(2);
        if constexpr (!TRELLIS)
            if (kind == TABLED + 5) LOOK_UP(5);
        LOOK_UP(1);
    }
    if (kind <= 4) {
        if (kind == 4) COMPUTE(4);
        if (kind == 3) COMPUTE(3);
        if (kind == 2) COMPUTE(2);
        COMPUTE(1);
    }
    if (kind == 5) COMPUTE(5);
    if (kind == 6) COMPUTE(6);
    if (kind == 7) COMPUTE(7);
    COMPUTE(8);
#undef COMPUTE
#undef LOOK_UP
}

// Path bits of some tokens ago; `before` has those of the eight tokens before a lane's.
template <int TOKENS>
DEVICE u32 delayed(u32 path, u32 before) {
    return select(path << 2 * TOKENS, before >> (16 - 2 * TOKENS), twice(0xFFFFu << 2 * TOKENS & 0xFFFF));
}

// Subsets of a lane's codes in either half of a tile, two bits each: register r at 2 r, and 16 bits above that.
template <bool KEYS>
DEVICE void find_subsets(u32 path, u32& first, u32& second) {
    u32 c1, c0;
    if constexpr (KEYS) {  // the tokens before are in the row above
        const u32 before = shuffle_up<4, 32>(path);
        c1 = path ^ delayed<1>(path, before) ^ delayed<3>(path, before), c0 = delayed<2>(path, before);
    } else {  // a word's tokens follow each other; those before are in the lane to the left
        const u32 before = shuffle_up<1, 4>(path);
        c1 = path ^ funnel_left(before, path, 2) ^ funnel_left(before, path, 6), c0 = funnel_left(before, path, 4);
    }
    first = select(c0, c1 << 1, 0x55555555);
    second = select(c0 >> 1, c1, 0x55555555);
}

// Decodes a tile, half after half: `use` is given which half it is and its levels, of as many blocks. One variant of the
// code serves both halves: two would be twice the code, which is fetched as data is. Codes are at the lane's own words,
// and the pointer goes past the tile; the terms are the lane's own.
template <bool TRELLIS, bool KEYS, int BLOCKS, typename Use>
DEVICE void decode_tile(u32 tile, const u8*& codes, int apart, const u32* terms, u32 one, u32 lane, Use use) {
    u32 own[BLOCKS] = {}, other[BLOCKS] = {};  // subsets of this half, and of the next one
    if constexpr (TRELLIS) {
        UNROLL for (int block = 0; block < BLOCKS; ++block)
            find_subsets<KEYS>(*reinterpret_cast<const u32*>(codes + block * apart), own[block], other[block]);
        codes += 128;
    }
    ROLLED for (int half = 0; half < 2; ++half) {
        if (!(tile & 15)) break;  // the second half of a head's last tile may have nothing
        codes += decode_half<TRELLIS>(tile & 15, codes, apart, terms, own, one, lane,
                                      [&](const u32(&levels)[BLOCKS][8]) { use(half, levels); });
        UNROLL for (int block = 0; block < BLOCKS; ++block) own[block] = other[block];
        tile >>= 4, terms += TERMS;
    }
}
