// The best paths through a trellis: Viterbi's algorithm with a coefficient in every lane. See coding/trellis.py.

constexpr int STATES = 8;

// The subset of a token by the state reached, whose newest bit is the lowest, and the bit that the state before it forgot.
DEVICE constexpr int subset_of(int state, int forgotten) {
    return 2 * ((state ^ state >> 1 ^ forgotten) & 1) + (state >> 2);
}

// The less of two costs; that it is the second one is the next bit of `survivors`.
DEVICE float survivor(float low, float high, u32& survivors) {
    survivors = funnel_left(bits_of(high - low), survivors, 1);  // the sign; a GPU gives NaN none: the first survives
    return smaller(high, low);
}

// Costs of the states behind the block, and who survived on the way to them.
DEVICE void advance(const EncodeRoom& room, const Book& book, const u8* tables, int slot, int slots, float (&cost)[STATES]) {
    const float* y = room.y + PITCH * slot;
    ROLLED for (int four = 0; four < BLOCK / 4; ++four) {
        u32 survivors = 0;  // whether states were reached from one whose oldest bit is 1: of the first token the highest byte
        UNROLL for (int i = 0; i < 4; ++i) {
            const Words2 given = room.steps[4 * four + i];
            const float own = y[4 * four + i], step = float_of(given.x);
            const u32 at = row_of(book, tables, own * float_of(given.y));
            float row[4], off[4], reached[STATES];
            floats_of(*reinterpret_cast<const Words4*>(tables + at), row);
            UNROLL for (int subset = 0; subset < 4; ++subset) off[subset] = multiply_add(-step, row[subset], own);
            UNROLL for (int s = STATES - 1; s >= 0; --s) {
                const float even = off[subset_of(s, 0)], odd = off[subset_of(s, 1)];
                reached[s] = survivor(multiply_add(even, even, cost[s / 2]), multiply_add(odd, odd, cost[s / 2 + STATES / 2]),
                                      survivors);
            }
            UNROLL for (int s = 0; s < STATES; ++s) cost[s] = reached[s];
        }
        room.survivors[four * slots + slot] = survivors;
    }
}

// Paths of a coefficient through the block, and what they are convolved to.
DEVICE void search_paths(const EncodeArguments& a, const EncodeRoom& room) {
    const int slot = static_cast<int>(thread_index()), slots = TILE_SLOTS * a.tiles;
    const int width = slot < slots ? static_cast<int>(room.slots[slot].y & 255) : 0;
    const bool is_near = !any_lane(width > a.near_width);
    if (!width) {  // nothing reads their bits, but blocks that are alike have words that are alike
        if (slot < slots) room.paths[slot] = room.paths[slots + slot] = 0;
        return;
    }
    const Book book = a.books[width];
    float cost[STATES] = {0.0f};
    UNROLL for (int s = 1; s < STATES; ++s) cost[s] = 1e38f;  // paths start in state zero
    with_tables(a, room, is_near, [&](const u8* tables) { advance(room, book, tables, slot, slots, cost); });
    u32 state = 0;
    float least = cost[0];
    UNROLL for (u32 s = 1; s < STATES; ++s) {
        if (cost[s] < least) least = cost[s], state = s;
    }
    u64 path = 0;  // a bit for every token
    ROLLED for (int four = BLOCK / 4 - 1; four >= 0; --four) {
        const u32 survivors = room.survivors[four * slots + slot];
        UNROLL for (int i = 0; i < 4; ++i) {  // the last token first
            path = path << 1 | (state & 1);
            state = state >> 1 | (survivors >> (8 * i + state) & 1) << 2;
        }
    }
    const u64 c1 = path ^ path << 1 ^ path << 3, c0 = path << 2;
    UNROLL for (int half = 0; half < 2; ++half) {
        room.words[half * slots + slot] = {static_cast<u32>(c1 >> 32 * half), static_cast<u32>(c0 >> 32 * half)};
        room.paths[half * slots + slot] = static_cast<u32>(path >> 32 * half);
    }
}
