// From scores of a unit's tokens to weights: gains, soft caps, masks and the running maximum.
//
// A lane has eight tokens of either block, and two queries: entry 8 block + r of what it has of a query. The base is 2.

// Gains of a lane's eight tokens of either block: codes 1 to 255 are powers of two in steps of a 32nd, 128 is 1. A row's
// lanes have the same ones: each brings four into the room for all 128.
DEVICE void load_gains(const u8* codes, u8* scratch, u32 lane, float (&gains)[2][8]) {
    const u32 own = reinterpret_cast<const u32*>(codes)[lane];
    u32 made[4];
    UNROLL for (int i = 0; i < 4; ++i) {
        // A code in the lowest byte of 2^23 is a number: 2^23 + code.
        const float code = float_of(byte_permute(own, 0x4B000000, 0x7650 + i));
        const float power = power_of_two(multiply_add(code, 0.03125f, -262148.0f));
        made[i] = bits_of(code > 8388608.0f ? power : 0.0f);
    }
    Words4* room = reinterpret_cast<Words4*>(scratch);
    room[lane] = {made[0], made[1], made[2], made[3]};
    sync_warp();
    UNROLL for (int block = 0; block < 2; ++block)
        UNROLL for (int i = 0; i < 2; ++i) {
            const Words4 w = room[16 * block + 2 * (lane / 4) + i];
            float* found = gains[block] + 4 * i;
            found[0] = float_of(w.x), found[1] = float_of(w.y), found[2] = float_of(w.z), found[3] = float_of(w.w);
        }
}

DEVICE float capped(float x, float cap) {
    const float y = x / cap, far = y < 0.0f ? -y : y;
    const float decayed = power_of_two(far * -2.8853900817779268f), square = y * y;
    float series = 0.05396825396825397f - square * 0.021869488536155202f;
    series = 1.0f - square * (0.3333333333333333f - square * (0.13333333333333333f - square * series));
    const float value = far < 0.3f ? far * series : (1.0f - decayed) / (1.0f + decayed);
    return (y < 0.0f ? -value : value) * cap;
}

// The tokens of a unit: those of a block begin at a slot, and the first ones of it are valid.
// A unit of one block takes it twice, and the second time nobody sees it.
struct Tokens {
    int start[2], length[2], anchor;
};

DEVICE Tokens find_tokens(const int* block_table, int first, bool two) {
    const int* row = block_table + 3 * first;
    Tokens t = {{row[0], row[0]}, {row[1], 0}, row[2]};
    if (two) t.start[1] = row[3], t.length[1] = row[4];
    return t;
}

// Puts scores of tokens that a query does not see far below all others.
DEVICE void hide_tokens(const CodesArguments& a, const Tokens& tokens, int b, int query, int row, int first_seen,
                        float (&y)[16]) {
    UNROLL for (int i = 0; i < 16; ++i) {
        const int token = 8 * row + i % 8, slot = tokens.start[i / 8] + token;
        bool seen = token < tokens.length[i / 8] && slot >= first_seen;
        if (a.mask) {
            const u64 entry = static_cast<u64>(b) * a.mask_batch + static_cast<u64>(query) * a.mask_query + slot;
            seen = seen && slot < a.mask_length && a.mask[entry];
        }
        if (!seen) y[i] = HIDDEN;
    }
}

// Exponents of either query of a lane: y times a unit, which is positive, plus an offset.
struct Exponents {
    float y[2][16], unit[2], offset[2];
};

// Exponents of a unit's tokens from their scores; `extra` is behind the queries.
DEVICE void find_exponents(const CodesArguments& a, const float (&scores)[2][4][4], const float* extra,
                           const Tokens& tokens, int b, int line, int first_seen, u32 lane, Exponents& e) {
    const bool all_seen = tokens.length[0] + tokens.length[1] == 128 && tokens.start[0] >= first_seen && !a.mask;
    UNROLL for (int q = 0; q < 2; ++q) {
        const int own = 2 * static_cast<int>(lane % 4) + q, row = own < a.rows ? own : a.rows - 1;
        e.unit[q] = extra[row], e.offset[q] = extra[8 + row];
        UNROLL for (int i = 0; i < 16; ++i) e.y[q][i] = scores[i / 8][i % 8 / 2][2 * (i % 2) + q];
        if (all_seen && !(a.softcap > 0.0f)) continue;
        UNROLL for (int i = 0; i < 16; ++i) e.y[q][i] = multiply_add(e.y[q][i], e.unit[q], e.offset[q]);
        e.unit[q] = 1.0f, e.offset[q] = 0.0f;
        if (a.softcap > 0.0f)
            UNROLL for (int i = 0; i < 16; ++i) e.y[q][i] = capped(e.y[q][i], a.softcap) * LOG2_E;
        if (all_seen) continue;
        const int chunk = line / a.heads % a.chunks;
        hide_tokens(a, tokens, b, (chunk * a.rows + row) % a.count, static_cast<int>(lane / 4), first_seen, e.y[q]);
    }
}

// The largest exponent of a query.
DEVICE float find_peak(const float (&y)[16], float unit, float offset) {
    float peak = y[0];
    UNROLL for (int i = 1; i < 16; ++i) peak = larger(peak, y[i]);
    UNROLL for (int mask = 4; mask < 32; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
    // What is not seen is far below the least peak and weighs nothing.
    return larger(multiply_add(peak, unit, offset), LEAST_PEAK);
}

// Sums are in units of an earlier peak of their query, which is raised only when they could grow too large: a weight
// stays below 2^10, and its product with a gain within half precision. `softmax` is the peaks of a lane's queries, then
// the sums of their weights.
DEVICE void raise_peaks(const CodesArguments& a, const Exponents& e, float (&softmax)[4], Words2* sums, u32 lane) {
    float found[2];
    bool raise[2];
    UNROLL for (int q = 0; q < 2; ++q) {
        found[q] = find_peak(e.y[q], e.unit[q], e.offset[q]);
        raise[q] = found[q] > softmax[q] + 10.0f;
    }
    if (!any_lane(raise[0] || raise[1])) return;
    float decay[2];
    UNROLL for (int q = 0; q < 2; ++q) {
        const float higher = raise[q] ? found[q] : softmax[q];
        decay[q] = power_of_two(softmax[q] - higher);
        softmax[q] = higher;
        softmax[2 + q] *= decay[q];
    }
    // Sums have a query in each row of lanes, and peaks two in each column.
    const int row = static_cast<int>(lane / 4);
    const u32 even = shuffle(bits_of(decay[0]), row / 2), odd = shuffle(bits_of(decay[1]), row / 2);
    const float own_decay = float_of(row % 2 ? odd : even);
    if (!has_row(a, lane)) return;
    ROLLED for (int half = 0; half < 2 * a.value_tiles; ++half) {
        Words2& own = sums[4 * a.rows * half + static_cast<int>(lane)];
        own = {bits_of(float_of(own.x) * own_decay), bits_of(float_of(own.y) * own_decay)};
    }
}

// Exponents become weights, times the gains of values: left operands of the products with values.
DEVICE void weigh(const Exponents& e, const float (&gains)[2][8], float (&softmax)[4], u32 (&weights)[2][4][2]) {
    float offset[2];
    UNROLL for (int q = 0; q < 2; ++q) offset[q] = e.offset[q] - softmax[q];
    UNROLL for (int i = 0; i < 16; ++i) {
        float w[2];
        UNROLL for (int q = 0; q < 2; ++q) {
            const float p = power_of_two(multiply_add(e.y[q][i], e.unit[q], offset[q]));
            softmax[2 + q] += p;
            w[q] = p * gains[i / 8][i % 8];
        }
        weights[i / 8][i % 8 / 2][i % 2] = transpose(pack_halves(w[0], w[1]));
    }
}
