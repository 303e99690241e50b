// Gains and levels, with tokens in the lanes: sums over coefficients need no other lane, and what a coefficient's codebook
// needs is the same for a whole warp.

// Of a thread where tokens are in the lanes: its token, and every how many slots it has which.
struct Token {
    int place, group, groups;
};
DEVICE Token own_token() {
    return {static_cast<int>(thread_index() % BLOCK), static_cast<int>(thread_index()) / BLOCK,
            static_cast<int>(block_threads()) / BLOCK};
}

DEVICE float inverse_of(float step) { return step > 0.0f ? 1.0f / step : 0.0f; }

// Sums of all groups, of COUNT numbers; `room` has COUNT times groups times 64 floats, and is free again.
template <int COUNT>
DEVICE void add_groups(const Token& t, float (&sums)[COUNT], float* room) {
    UNROLL for (int i = 0; i < COUNT; ++i) room[(i * t.groups + t.group) * BLOCK + t.place] = sums[i];
    sync_block();
    UNROLL for (int i = 0; i < COUNT; ++i) {
        sums[i] = 0.0f;
        ROLLED for (int group = 0; group < t.groups; ++group) sums[i] += room[(i * t.groups + group) * BLOCK + t.place];
    }
    sync_block();
}

// The slots of a thread from this one on that have the same width: use(slot, weight and kind, y). The first other one.
template <typename Use>
DEVICE int for_alike(const EncodeRoom& room, const Token& t, int slots, int slot, const Use& use) {
    Words2 own = room.slots[slot];
    const u32 width = own.y & 255;
    const float* y = room.y + PITCH * slot + t.place;
    ROLLED do {
        use(slot, own, *y);
        slot += t.groups, y += PITCH * t.groups;
        if (slot >= slots) break;
        own = room.slots[slot];
    } while ((own.y & 255) == width);
    return slot;
}

// What the gain search adds up for every factor: the levels' products with y and with themselves, as they weigh. Of narrow
// codebooks that is only what levels have beyond the least magnitude, whose share is the same for all factors.
struct Sums {
    float inverses[FACTORS], cross[FACTORS], energy[FACTORS], least_cross, least_energy;
};

// A narrow codebook in registers: else every step loads it anew.
DEVICE Ladder held(Ladder ladder) {
    hold(ladder.level);
    UNROLL for (int i = 0; i < LADDER; ++i) hold(ladder.at[i]), hold(ladder.adds[i]), hold(ladder.squares[i]);
    return ladder;
}

DEVICE void step_up(const Ladder& ladder, int step, float y, float weighted, float weight, int f, Sums& sums) {
    if (y * sums.inverses[f] > ladder.at[step]) {
        sums.cross[f] = multiply_add(weighted, ladder.adds[step], sums.cross[f]);
        sums.energy[f] = multiply_add(weight, ladder.squares[step], sums.energy[f]);
    }
}

DEVICE void climb(const Ladder& ladder, int width, float y, float weight, Sums& sums) {
    const float weighted = weight * y;
    sums.least_cross = multiply_add(weighted, ladder.level, sums.least_cross);
    sums.least_energy = multiply_add(weight, ladder.level * ladder.level, sums.least_energy);
    if (width == 1) return;
    UNROLL for (int f = 0; f < FACTORS; ++f) step_up(ladder, 0, y, weighted, weight, f, sums);
    if (width == 2) return;
    UNROLL for (int f = 0; f < FACTORS; ++f) {
        step_up(ladder, 1, y, weighted, weight, f, sums);
        step_up(ladder, 2, y, weighted, weight, f, sums);
    }
}

DEVICE void look_up(const Book& book, const u8* tables, float y, float weight, Sums& sums) {
    UNROLL for (int f = 0; f < FACTORS; ++f) {
        const float u = y * sums.inverses[f];
        // Where u is NaN, `smaller` gives the other: a bin that is there.
        const u32 bin = bits_of(smaller(multiply_add(u, book.search_scale, MAGIC), book.search_last));
        const Gap gap = *reinterpret_cast<const Gap*>(tables + (8 * bin + book.search));
        const float level = gap.at + with_sign_of(gap.half, u - gap.at), weighted = weight * level;
        sums.cross[f] = multiply_add(weighted, y, sums.cross[f]);
        sums.energy[f] = multiply_add(weighted, level, sums.energy[f]);
    }
}

// The step of a token: its root mean square times the factor that explains most of its energy.
DEVICE float search_gain(const EncodeArguments& a, int head, const EncodeRoom& room) {
    const Token t = own_token();
    const int slots = TILE_SLOTS * a.tiles;
    float power[1] = {0.0f};
    for (int slot = t.group; slot < slots; slot += t.groups) {
        const float y = room.y[PITCH * slot + t.place];
        power[0] = multiply_add(y, y, power[0]);
    }
    float* search = reinterpret_cast<float*>(room.survivors);
    add_groups(t, power, search);
    const float rms = root(power[0] / a.counts[head]);

    float most = -1.0f, step = rms * a.factors[0];
    ROLLED for (int round = 0; round < a.rounds; ++round) {
        Sums sums = {};
        UNROLL for (int f = 0; f < FACTORS; ++f) sums.inverses[f] = inverse_of(rms * a.factors[FACTORS * round + f]);
        ROLLED for (int slot = t.group; slot < slots;) {
            const int width = static_cast<int>(room.slots[slot].y & 255);
            if (width > NARROW) {
                const Book book = a.books[width];
                with_tables(a, room, width <= a.near_width, [&](const u8* tables) {
                    slot = for_alike(room, t, slots, slot, [&](int, Words2 own, float y) {
                        look_up(book, tables, magnitude(y), float_of(own.x), sums);
                    });
                });
            } else if (width) {
                const Ladder ladder = held(a.ladders[width]);
                slot = for_alike(room, t, slots, slot, [&](int, Words2 own, float y) {
                    climb(ladder, width, magnitude(y), float_of(own.x), sums);
                });
            } else {
                slot += t.groups;
            }
        }
        float all[2 * FACTORS];
        UNROLL for (int f = 0; f < FACTORS; ++f)
            all[2 * f] = sums.cross[f] + sums.least_cross, all[2 * f + 1] = sums.energy[f] + sums.least_energy;
        add_groups(t, all, search);
        UNROLL for (int f = 0; f < FACTORS; ++f) {
            const float cross = all[2 * f], energy = all[2 * f + 1];
            const float gain = larger(energy > 0.0f ? cross / energy : 0.0f, 0.0f);
            if (gain * cross > most) most = gain * cross, step = rms * a.factors[FACTORS * round + f];
        }
    }
    return step;
}

// The nearest level, or that of the path; its code's byte is written. The gain that fits them all.
DEVICE float code_levels(const EncodeArguments& a, const EncodeRoom& room) {
    const Token t = own_token();
    const float inverse = float_of(room.steps[t.place].y);
    const int lane = t.place % 32, slots = TILE_SLOTS * a.tiles;
    const Words2* words = room.words + t.place / 32 * slots;
    u8* codes = room.codes + t.place;
    float sums[2] = {0.0f, 0.0f};  // <y, u> and <u, u>
    ROLLED for (int slot = t.group; slot < slots;) {
        const int width = static_cast<int>(room.slots[slot].y & 255);
        const Book book = a.books[width];
        if (!width) {
            codes[CODE_PITCH * slot] = 0, slot += t.groups;
            continue;
        }
        const auto code_level = [&](const u8* tables, int at, Words2 own, float y) {
            u32 place = row_of(book, tables, y * inverse), code = (place - book.rows) / ROW;
            if (TRELLIS) {
                const Words2 bits = words[at];
                const u32 subset = (bits.x >> lane & 1) << 1 | (bits.y >> lane & 1);
                place += 4 * subset;
                code = (code + ((subset - code) & 3)) >> 2;
            }
            const float level = *reinterpret_cast<const float*>(tables + place), weighted = float_of(own.x) * level;
            sums[0] = multiply_add(weighted, y, sums[0]);
            sums[1] = multiply_add(weighted, level, sums[1]);
            if (own.y & ~255u) code = a.maps[(own.y & ~255u) + code];
            codes[CODE_PITCH * at] = static_cast<u8>(code);
        };
        with_tables(a, room, width <= a.near_width, [&](const u8* tables) {
            slot = for_alike(room, t, slots, slot, [&](int at, Words2 own, float y) { code_level(tables, at, own, y); });
        });
    }
    add_groups(t, sums, room.sums);
    return larger(sums[1] > 0.0f ? sums[0] / sums[1] : 0.0f, 0.0f);
}

DEVICE u8 gain_code(float gain) {  // see quantcache/coding/gains.py
    const float code = multiply_add(logarithm_of_two(larger(gain, 1e-30f)), 32.0f, 128.0f);
    return static_cast<u8>(smaller(larger(round_down(code + 0.5f), 0.0f), 255.0f));
}
