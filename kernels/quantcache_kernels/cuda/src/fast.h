// What the fast dimensions of keys, which turn too far within an anchor for one query to serve it, add to scores.
//
// Levels times their decoder are columns of pairs: eight pairs are a step, their first halves a tile of columns, their
// second halves the next. Sums are in half precision, as they leave the tensor cores: two pairs of a token in two
// registers turn by its offset from the anchor in four instructions, and are what the product with the query takes. Gains
// come behind it, once for all scores of a token. Means do not have gains: they are turned by every offset beforehand,
// and their products are added at the end.
constexpr int FAST_COLUMNS = 6;  // tiles of eight columns that are decoded at once
constexpr int TURNS = 128 * 4;   // of a step: offsets times a row's lanes

// Sums of a head's fast dimensions from tile `first` of columns on, of every one of a lane's eight tokens.
template <bool TRELLIS>
DEVICE void decode_fast(const CodesArguments& a, int head, int first, int tiles, u32 own_tiles, const u8* codes,
                        const u32* terms, u32 lane, u32 (&sums)[FAST_COLUMNS][4][2]) {
    UNROLL for (int n = 0; n < FAST_COLUMNS; ++n)
        UNROLL for (int m = 0; m < 4; ++m) sums[n][m][0] = sums[n][m][1] = 0;
    const int columns = 2 * a.fast_steps, left = columns - first;
    const Words2* decoder = reinterpret_cast<const Words2*>(a.fast_decoder) + (head * a.fast_tiles * columns + first) * 32;
    ROLLED for (int tile = 0; tile < tiles; ++tile) {
        u32 levels[1][16];
        decode_tile<TRELLIS, true>(shuffle(own_tiles, a.slow_tiles + tile), codes, 0, terms, a.one, lane, levels);
        const u32* l = levels[0];
        terms += KEY_WORDS;
        UNROLL for (int n = 0; n < FAST_COLUMNS; ++n) {
            if (n && n % 2 == 0 && n >= left) break;
            if (n == 4) MARK(15);
            const Words2 w = decoder[32 * n + static_cast<int>(lane)];
            UNROLL for (int m = 0; m < 4; ++m)
                mma_half(sums[n][m], l[2 * m], l[2 * m + 1], l[8 + 2 * m], l[9 + 2 * m], w.x, w.y);
        }
        decoder += 32 * columns;
    }
}

// Products of the fast dimensions without their means, before their gains.
template <bool TRELLIS>
DEVICE void score_fast(const CodesArguments& a, int head, int tiles, u32 own_tiles, const u8* codes, const u32* terms,
                       const u8* query, int first_token, u32 lane, float (&scores)[4][4]) {
    UNROLL for (int m = 0; m < 4; ++m)
        UNROLL for (int i = 0; i < 4; ++i) scores[m][i] = 0.0f;
    const int steps = a.fast_steps;
    const Words4* turns = reinterpret_cast<const Words4*>(a.rotation) + 4 * first_token + static_cast<int>(lane % 4);
    ROLLED for (int first = 0; first < 2 * steps; first += FAST_COLUMNS) {
        u32 sums[FAST_COLUMNS][4][2];
        decode_fast<TRELLIS>(a, head, first, tiles, own_tiles, codes, terms, lane, sums);
        UNROLL for (int i = 0; i < FAST_COLUMNS / 2; ++i) {
            if (i && first / 2 + i >= steps) break;
            if (i == 2) MARK(15);
            const Words2 q = *reinterpret_cast<const Words2*>(query);
            query += 32 * a.rows;
            UNROLL for (int m = 0; m < 4; ++m) {
                const Words4 w = turns[TURNS * i + 8 * m];
                const u32 cosines[2] = {w.x, w.y}, sines[2] = {w.z, w.w};
                u32 turned[4];
                UNROLL for (int e = 0; e < 2; ++e) {
                    const u32 one = sums[2 * i][m][e], two = sums[2 * i + 1][m][e];
                    turned[e] = halves_multiply_add(one, cosines[e], halves_negate(halves_multiply(two, sines[e])));
                    turned[2 + e] = halves_multiply_add(two, cosines[e], halves_multiply(one, sines[e]));
                }
                mma_half(scores[m], turned[0], turned[1], turned[2], turned[3], q.x, q.y);
            }
        }
        turns += TURNS * (FAST_COLUMNS / 2);
    }
}

// Products of the fast dimensions' means, of both blocks of a unit.
DEVICE void score_means(const CodesArguments& a, int head, const u8* query, const Tokens& tokens, u32 lane,
                        float (&scores)[2][4][4]) {
    const int steps = a.fast_steps;
    const Words4* means = reinterpret_cast<const Words4*>(a.fast_mean) + TURNS * head * steps +
                          static_cast<int>(32 * (lane / 4) + lane % 4);
    const Words4* own[2] = {means + 4 * tokens.offset[0], means + 4 * tokens.offset[1]};
    ROLLED for (int step = 0; step < steps; ++step) {
        const Words2 q = *reinterpret_cast<const Words2*>(query);
        UNROLL for (int block = 0; block < 2; ++block) {
            UNROLL for (int m = 0; m < 4; ++m) {
                const Words4 w = own[block][8 * m];
                mma_half(scores[block][m], w.x, w.y, w.z, w.w, q.x, q.y);
            }
            own[block] += TURNS;
        }
        query += 32 * a.rows;
    }
}
