// Codes of a tile of 16 coefficients to levels in half precision, two in a register.
//
// A lane's words hold its own codes (blocks.py): those of a register are 16 bits apart. Under the exponent of 1.0 they are
// two half-precision numbers, which a polynomial of each coefficient's own turns into levels.
//
// Of a trellis the subsets of all the lane's codes come first, from one word of path bits: a delay by a token is a shift
// by two. They are two bits of each code, and the level's are put above them while they are still eight in a word. Then
// eight codes are nibbles that choose bytes: half a tile of few bits looks its levels up where it can, upper and lower bytes
// each in a table of its own.
#include "warp.h"

#ifdef MARKED
#define MARK(place) asm volatile("pmevent %0;" ::"n"(place))  // benchmarks/sass.py finds places in machine code by it
#else
#define MARK(place)
#endif

constexpr u32 ONE_HALVES = 0x3C003C00;  // 1.0 twice
constexpr int TABLED = 8;  // added to the width of half a tile whose levels are looked up
constexpr int TERMS = 8;  // words of a lane's polynomial or table of half a tile

DEVICE constexpr u32 twice(u32 half) { return half * 0x10001u; }
DEVICE u32 shifted(u32 word, int left) { return left < 0 ? word >> -left : word << left; }

// Bits of register r of a field of F bits, moved so that the lowest is at bit `at` of either half.
template <int F>
DEVICE u32 field(const u32* words, int r, int at) {
    return shifted(words[r / (16 / F)], at - F * (r % (16 / F))) & twice(((1u << F) - 1) << at);
}
// The lowest `bits` of a nibble of either half, likewise.
DEVICE u32 nibble(u32 word, int place, int bits, int at) {
    return shifted(word, at - 4 * place) & twice(((1u << bits) - 1) << at);
}
// The bit of register r, two bits from register to register.
DEVICE u32 single(u32 word, int r, int at) { return shifted(word, at - 2 * r) & twice(1u << at); }

// The fields of a lane's registers: two words for four bits, one for two, and half a word for one, whose bits are brought
// to where those of two have their lower one; the other bits there mean nothing.
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

// Two fields as nibbles: those of even registers, then those of odd ones. `low` has the lower bits.
DEVICE void join(u32 low, u32 high, int low_bits, u32 (&nibbles)[2]) {
    const u32 mask = ((1u << low_bits) - 1) * 0x11111111u;
    nibbles[0] = select(low, high << low_bits, mask);
    nibbles[1] = select(low >> 2, shifted(high, low_bits - 2), mask);
}

// Register r's codes of W bits under the exponent of 1.0, the highest bit at bit 9. Of a trellis, `subsets` has two bits
// for every code. `nibbles` joins fields when register 0 is asked for.
template <int W, bool TRELLIS>
DEVICE u32 assemble(const Fields& fields, u32 subsets, u32 one, int r, u32 (&nibbles)[2]) {
    constexpr int B = TRELLIS ? W - 1 : W, LAST = TRELLIS ? 9 - W : 10 - W;
    u32 x = one;
    if constexpr (B >= 4) x |= field<4>(fields.four, r, 6);
    if constexpr (TRELLIS) {
        if constexpr (B == 3) x |= single(fields.one, r, 9);
        if constexpr (B == 7) x |= field<2>(&fields.two, r, 4);
        if constexpr (B % 4 == 0) return x | field<2>(&subsets, r, LAST);
        constexpr bool TWO = B == 2 || B == 3 || B == 6;
        if (r == 0) join(subsets, TWO ? fields.two : fields.one, 2, nibbles);
        return x | nibble(nibbles[r % 2], r / 2, TWO ? 4 : 3, LAST);
    }
    if constexpr (B == 8) x |= field<4>(fields.four + 2, r, 2);
    if constexpr (B % 4 == 1) x |= single(fields.one, r, LAST);
    if constexpr (B % 4 == 2) x |= field<2>(&fields.two, r, LAST);
    if constexpr (B % 4 == 3) {
        if (r == 0) join(fields.one, fields.two, 1, nibbles);
        x |= nibble(nibbles[r % 2], r / 2, 3, LAST);
    }
    return x;
}

// The level of a code that assemble() has laid out, in units of its coefficient. Terms that a width lacks are zero in
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
DEVICE void compute(const u8* place, int apart, const u32* terms, const u32 (&subsets)[BLOCKS][2], int half, u32 one,
                    u32 lane, u32 (&levels)[BLOCKS][16]) {
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
        u32 nibbles[2];
        UNROLL for (int r = 0; r < 8; ++r)
            levels[block][8 * half + r] =
                polynomial<W, TRELLIS>(assemble<W, TRELLIS>(fields, subsets[block][half], one, r, nibbles), t);
    }
}

// Bytes of a table's other half where a selector's highest bit is set, as tables.py prepares them for it: the selected
// byte comes with the sign of the byte that the first half has there.
DEVICE u32 either(u32 first, u32 second) { return first ^ (second & 0x7F7F7F7F); }

// Two registers of levels from four nibbles: a register's codes are two nibbles apart.
template <bool SIXTEEN>
DEVICE void look_up_two(u32 codes, const Words4& first, const Words4& second, u32& one, u32& other) {
    u32 upper = byte_permute(first.x, first.y, codes), lower = byte_permute(first.z, first.w, codes);
    if constexpr (SIXTEEN) {
        upper = either(upper, byte_permute(second.x, second.y, codes ^ 0x8888));
        lower = either(lower, byte_permute(second.z, second.w, codes ^ 0x8888));
    }
    one = byte_permute(lower, upper, 0x6240);
    other = byte_permute(lower, upper, 0x7351);
}

// Levels of the codes of one block from tables: upper bytes of eight levels, then lower ones; of sixteen levels both
// again. Of 32 levels they are those without sign: one bit says that the sign is negative, and the place is that of the
// magnitude.
template <int W, bool TRELLIS>
DEVICE void look_up_block(const Fields& fields, const Words4& first, const Words4& second, u32 subsets, u32* levels) {
    constexpr int PLACES = TRELLIS ? W + 1 : W;  // bits
    if constexpr (!TRELLIS && PLACES > 3) {
        UNROLL for (int r = 0; r < 8; r += 2) {
            const u32 codes = byte_permute(fields.four[r / 4], 0, r % 4 ? 0x4431 : 0x4420);
            look_up_two<true>(codes, first, second, levels[r], levels[r + 1]);
        }
    } else {
        u32 nibbles[2];
        if constexpr (TRELLIS && PLACES > 3) {
            if constexpr (PLACES == 5) subsets ^= (fields.one & 0x55555555) * 3;
            join(subsets, fields.two, 2, nibbles);
        } else {
            constexpr u32 MASK = ((1u << PLACES) - 1) * 0x11111111u;
            if constexpr (PLACES == 3) {
                if constexpr (TRELLIS) join(subsets, fields.one, 2, nibbles);
                else join(fields.one, fields.two, 1, nibbles);
            } else {
                nibbles[0] = TRELLIS ? subsets : PLACES == 2 ? fields.two : fields.one;
                nibbles[1] = nibbles[0] >> 2;
            }
            nibbles[0] &= MASK, nibbles[1] &= MASK;
        }
        UNROLL for (int odd = 0; odd < 2; ++odd)
            UNROLL for (int r = odd; r < 8; r += 4) {
                const u32 codes = byte_permute(nibbles[odd], 0, r < 4 ? 0x4420 : 0x4431);
                look_up_two<(PLACES > 3)>(codes, first, second, levels[r], levels[r + 2]);
            }
    }
    if constexpr (PLACES == 5) UNROLL for (int r = 0; r < 8; ++r) levels[r] ^= single(fields.one, r, 15);
}

// The same as compute() from tables.
template <int W, bool TRELLIS, int BLOCKS>
DEVICE void look_up(const u8* place, int apart, const u32* tables, const u32 (&subsets)[BLOCKS][2], int half, u32 lane,
                    u32 (&levels)[BLOCKS][16]) {
    MARK(TABLED + W);
    const Words4 first = reinterpret_cast<const Words4*>(tables)[0];
    Words4 second = {0, 0, 0, 0};
    if constexpr (W + TRELLIS > 3) second = reinterpret_cast<const Words4*>(tables)[1];
    UNROLL for (int block = 0; block < BLOCKS; ++block) {
        Fields fields;
        load_fields<TRELLIS ? W - 1 : W>(place + block * apart, lane, fields);
        look_up_block<W, TRELLIS>(fields, first, second, subsets[block][half], levels[block] + 8 * half);
    }
}

// Levels of half a tile of a kind, and how many bytes its codes take in a block.
template <bool TRELLIS, int BLOCKS>
DEVICE int decode_half(u32 kind, const u8* place, int apart, const u32* terms, const u32 (&subsets)[BLOCKS][2], int half,
                       u32 one, u32 lane, u32 (&levels)[BLOCKS][16]) {
#define COMPUTE(W) return compute<W, TRELLIS, BLOCKS>(place, apart, terms, subsets, half, one, lane, levels), 64 * (W - TRELLIS)
#define LOOK_UP(W) return look_up<W, TRELLIS, BLOCKS>(place, apart, terms, subsets, half, lane, levels), 64 * (W - TRELLIS)
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
        if (kind == 1) COMPUTE(1);
        MARK(0);
        UNROLL for (int block = 0; block < BLOCKS; ++block)
            UNROLL for (int r = 0; r < 8; ++r) levels[block][8 * half + r] = 0;
        return 0;
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
DEVICE void find_subsets(u32 path, u32 (&subsets)[2]) {
    u32 c1, c0;
    if constexpr (KEYS) {  // the tokens before are in the row above
        const u32 before = shuffle_up<4, 32>(path);
        c1 = path ^ delayed<1>(path, before) ^ delayed<3>(path, before), c0 = delayed<2>(path, before);
    } else {  // a word's tokens follow each other; those before are in the lane to the left
        const u32 before = shuffle_up<1, 4>(path);
        c1 = path ^ funnel_left(before, path, 2) ^ funnel_left(before, path, 6), c0 = funnel_left(before, path, 4);
    }
    subsets[0] = select(c0, c1 << 1, 0x55555555);
    subsets[1] = select(c0 >> 1, c1, 0x55555555);
}

// Levels of either half of a tile, of as many blocks. Codes are at the lane's own words, and the pointer goes past the
// tile; the terms are the lane's own.
template <bool TRELLIS, bool KEYS, int BLOCKS>
DEVICE void decode_tile(u32 tile, const u8*& codes, int apart, const u32* terms, u32 one, u32 lane,
                        u32 (&levels)[BLOCKS][16]) {
    u32 subsets[BLOCKS][2] = {};
    if constexpr (TRELLIS) {
        UNROLL for (int block = 0; block < BLOCKS; ++block)
            find_subsets<KEYS>(*reinterpret_cast<const u32*>(codes + block * apart), subsets[block]);
        codes += 128;
    }
    codes += decode_half<TRELLIS>(tile & 15, codes, apart, terms, subsets, 0, one, lane, levels);
    codes += decode_half<TRELLIS>(tile >> 4, codes, apart, terms + TERMS, subsets, 1, one, lane, levels);
}
