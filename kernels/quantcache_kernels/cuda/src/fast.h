// What the fast dimensions of keys, which turn too far within an anchor for one query to serve it, add to scores.
//
// Levels times their decoder are columns of pairs: eight pairs are a step, their first halves a tile of columns, their
// second halves the next. Sums are in half precision, as they leave the tensor cores: two pairs of a token in two
// registers turn by its offset from the anchor in four instructions, and are what the product with the query takes. Gains
// come behind it, once for all scores of a token. Means do not have gains: they are turned by every offset beforehand,
// and their products are added at the end.
constexpr int FAST_COLUMNS = 6;  // tiles of eight columns that are decoded at once
constexpr int TURNS = 128 * 4;   // of a step: offsets times a row's lanes

// Where a row's lanes have what belongs to an offset and the next one; two offsets further is the next row of lanes. A
// block needs every second offset: the others are apart, so that they take no room in the cache.
DEVICE int turn_of(int offset) { return 4 * (64 * (offset & 1) + (offset >> 1)); }

// Rotations and turned means are on their way to where they are quick to read; by all threads.
DEVICE void prefetch_turns(const CodesArguments& a, int head) {
    const int words = TURNS * a.fast_steps;
    prefetch_all(reinterpret_cast<const Words4*>(a.rotation), 16 * words);
    prefetch_all(reinterpret_cast<const Words4*>(a.fast_mean) + words * head, 16 * words);
}

// Sums of a head's fast dimensions from tile `first` of columns on, of every one of a lane's eight tokens.
template <bool TRELLIS>
DEVICE void decode_fast(const CodesArguments& a, const u32* decoder, int first, int tiles, u32 own_tiles,
                        const u8* codes, const u32* terms, u32 lane, u32 (&sums)[FAST_COLUMNS][4][2]) {
    UNROLL for (int n = 0; n < FAST_COLUMNS; ++n)
        UNROLL for (int m = 0; m < 4; ++m) sums[n][m][0] = sums[n][m][1] = 0;
    const int columns = 2 * a.fast_steps, left = columns - first;
    decoder += 32 * first + static_cast<int>(lane);
    ROLLED for (int tile = 0; tile < tiles; ++tile) {
        decode_tile<TRELLIS, true, 1>(
            shuffle(own_tiles, a.slow_tiles + tile), codes, 0, terms, a.one, lane, [&](int half, const u32(&levels)[1][8]) {
                const u32* own = decoder + 32 * columns * half;
                UNROLL for (int n = 0; n < FAST_COLUMNS; ++n) {
                    if (n && n % 2 == 0 && n >= left) break;
                    if (n == 4) MARK(15);
                    const u32 w = own[32 * n];
                    UNROLL for (int m = 0; m < 4; ++m) mma_half(sums[n][m], levels[0][2 * m], levels[0][2 * m + 1], w);
                }
            });
        terms += KEY_WORDS;
        decoder += 64 * columns;
    }
}

// Products of the fast dimensions without their means, before their gains.
template <bool TRELLIS>
DEVICE void score_fast(const CodesArguments& a, const u32* decoder, int tiles, u32 own_tiles, const u8* codes,
                       const u32* terms, const u8* query, int first_token, u32 lane, float (&scores)[4][4]) {
    UNROLL for (int m = 0; m < 4; ++m)
        UNROLL for (int i = 0; i < 4; ++i) scores[m][i] = 0.0f;
    const int steps = a.fast_steps;
    const Words4* turns = reinterpret_cast<const Words4*>(a.rotation) + turn_of(first_token) + static_cast<int>(lane % 4);
    ROLLED for (int first = 0; first < 2 * steps; first += FAST_COLUMNS) {
        u32 sums[FAST_COLUMNS][4][2];
        decode_fast<TRELLIS>(a, decoder, first, tiles, own_tiles, codes, terms, lane, sums);
        UNROLL for (int i = 0; i < FAST_COLUMNS / 2; ++i) {
            if (i && first / 2 + i >= steps) break;
            if (i == 2) MARK(15);
            const Words2 q = *reinterpret_cast<const Words2*>(query);
            query += 32 * a.rows;
            UNROLL for (int m = 0; m < 4; ++m) {
                const Words4 w = turns[TURNS * i + 4 * m];
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
                          static_cast<int>(16 * (lane / 4) + lane % 4);
    const Words4* own[2] = {means + turn_of(tokens.start[0] - tokens.anchor),
                            means + turn_of(tokens.start[1] - tokens.anchor)};
    ROLLED for (int step = 0; step < steps; ++step) {
        const Words2 q = *reinterpret_cast<const Words2*>(query);
        UNROLL for (int block = 0; block < 2; ++block) {
            UNROLL for (int m = 0; m < 4; ++m) {
                const Words4 w = own[block][4 * m];
                mma_half(scores[block][m], w.x, w.y, w.z, w.w, q.x, q.y);
            }
            own[block] += TURNS;
        }
        query += 32 * a.rows;
    }
}
