// Coefficients of a block: centred vectors in their frame, times the transform.
//
// The products are made by the tensor cores. Every float32 is the sum of three bfloat16 without an error, and of the nine
// products of two such sums the six count that float32 would keep.

// Cosine and sine of an angle in units of 2^-32 revolutions, as float32 has them: series within an eighth of one.
DEVICE void turn_exactly(u32 revolutions, float& cosine, float& sine) {
    const u32 quarter = (revolutions + (1u << 29)) >> 30;
    const float angle = static_cast<float>(static_cast<int>(revolutions - (quarter << 30))) * 1.4629180792671596e-9f;
    const float square = angle * angle;
    const float s = angle + angle * square * (-1.6666654611e-1f + square * (8.3321608736e-3f - square * 1.9515295891e-4f));
    float c = square * square * (4.166664568298827e-2f + square * (2.443315711809948e-5f * square - 1.388731625493765e-3f));
    c = 1.0f - (0.5f * square - c);
    cosine = quarter & 1 ? s : c, sine = quarter & 1 ? c : s;
    if ((quarter + 1) & 2) cosine = -cosine;
    if (quarter & 2) sine = -sine;
}

// Revolutions at a position, in units of 2^-64: whole ones vanish.
DEVICE u64 revolutions_at(const Pair& pair, int position) {
    return (static_cast<u64>(pair.turns_high) << 32 | pair.turns_low) * static_cast<u64>(static_cast<long long>(position));
}

// Centred vectors in the frame, in the order of the products' left operand. A thread has eight tokens of a pair.
DEVICE void take_vectors(const EncodeArguments& a, int block, int row, int head, u32* fragments) {
    const int pairs = a.dim / 2, steps = a.dim / 16, start = a.origins ? a.origins[row] : 0;
    const int first = a.block_table[3 * block] - start, anchor = a.block_table[3 * block + 2] - start;
    const u16* x = a.x + row * a.strides[0] + head * a.strides[1] + static_cast<long long>(block) * BLOCK * a.strides[2];
    for (int i = static_cast<int>(thread_index()); i < 8 * pairs; i += static_cast<int>(block_threads())) {
        const int p = i % pairs, eight = i / pairs;
        const Pair pair = a.pairs[p];
        const float mean_first = a.mean[head * a.dim + 2 * p], mean_second = a.mean[head * a.dim + 2 * p + 1];
        const bool is_fast = 2 * p >= a.slow;
        float cosine = 1.0f, sine = 0.0f;
        u64 angle = revolutions_at(pair, is_fast ? first + 8 * eight : anchor);
        if (!is_fast) turn_exactly(static_cast<u32>(angle >> 32), cosine, sine);
        // Lanes of odd steps lie otherwise, so that those of neighbouring steps do not share banks of memory.
        const int step = p / 8, apart = 16 * (step & 1);
        u32* even = fragments + (eight / 2 * steps + step) * 128 + 4 * (p % 4) + p % 8 / 4 * 2 + eight % 2 + apart;
        u32* odd = even + 16 - 2 * apart;
        const u16* own_first = x + 8 * eight * a.strides[2] + pair.first * a.strides[3];
        const u16* own_second = x + 8 * eight * a.strides[2] + pair.second * a.strides[3];
        UNROLL for (int t = 0; t < 8; ++t) {
            const float u = float_of(static_cast<u32>(*own_first) << 16), v = float_of(static_cast<u32>(*own_second) << 16);
            own_first += a.strides[2], own_second += a.strides[2];
            if (is_fast) turn_exactly(static_cast<u32>(angle >> 32), cosine, sine), angle += revolutions_at(pair, 1);
            float back_first = u * cosine + v * sine - mean_first, back_second = v * cosine - u * sine - mean_second;
            u32* to = (t & 1 ? odd : even) + 32 * (t / 2);
            UNROLL for (int piece = 0; piece < PIECES; ++piece) {
                const u32 low = bits_of(back_first), high = bits_of(back_second);
                to[piece * 4 * steps * 128] = byte_permute(low, high, 0x7632);  // the upper halves
                back_first = add(back_first, -float_of(low & 0xFFFF0000)), back_second = add(back_second, -float_of(high & 0xFFFF0000));
            }
        }
    }
}

// c += a b where either is the sum of PIECES bfloat16, the largest first; small products first.
DEVICE void multiply_pieces(float (&c)[4], const Words4 (&a)[PIECES], const u32 (&b)[PIECES][2]) {
    UNROLL for (int sum = PIECES - 1; sum >= 0; --sum) {
        UNROLL for (int piece = sum; piece >= 0; --piece)
            mma_bfloat(c, a[piece].x, a[piece].y, a[piece].z, a[piece].w, b[sum - piece][0], b[sum - piece][1]);
    }
}

// Coefficients of a warp's two tiles, for 16 tokens each and half a tile each.
typedef float TileSums[2][4][2][4];

DEVICE void transform(const EncodeArguments& a, int head, const u32* fragments, TileSums& sums) {
    const int lane = static_cast<int>(thread_index() % 32), warp = static_cast<int>(thread_index() / 32), steps = a.dim / 16;
    UNROLL for (int i = 0; i < 2; ++i) {
        UNROLL for (int m = 0; m < 4; ++m) {
            UNROLL for (int k = 0; k < 8; ++k) sums[i][m][k / 4][k % 4] = 0.0f;
        }
        const int tile = 2 * warp + i;
        if (tile >= a.tiles) continue;
        const bool is_slow = tile < a.slow_tiles;
        const int last = is_slow ? a.slow / 16 : steps;
        int step = is_slow ? 0 : a.slow / 16;
        const Words4* matrix = a.matrix + ((head * a.tiles + tile) * static_cast<long long>(steps) + step) * 32 * PIECES + lane;
        Words4 next[PIECES];
        UNROLL for (int piece = 0; piece < PIECES; ++piece) next[piece] = step < last ? matrix[32 * piece] : Words4{0, 0, 0, 0};
        ROLLED for (; step < last; ++step) {
            u32 right[2][PIECES][2];
            UNROLL for (int piece = 0; piece < PIECES; ++piece) {
                right[0][piece][0] = next[piece].x, right[0][piece][1] = next[piece].y;
                right[1][piece][0] = next[piece].z, right[1][piece][1] = next[piece].w;
            }
            matrix += 32 * PIECES;
            if (step + 1 < last) {
                UNROLL for (int piece = 0; piece < PIECES; ++piece) next[piece] = matrix[32 * piece];
            }
            UNROLL for (int m = 0; m < 4; ++m) {
                Words4 left[PIECES];
                UNROLL for (int piece = 0; piece < PIECES; ++piece)
                    left[piece] = reinterpret_cast<const Words4*>(
                        fragments)[((piece * 4 + m) * steps + step) * 32 + (lane ^ 4 * (step & 1))];
                multiply_pieces(sums[i][m][0], left, right[0]);
                multiply_pieces(sums[i][m][1], left, right[1]);
            }
        }
    }
}

DEVICE void store_coefficients(const EncodeArguments& a, const TileSums& sums, float* y) {
    const int lane = static_cast<int>(thread_index() % 32), warp = static_cast<int>(thread_index() / 32);
    UNROLL for (int i = 0; i < 2; ++i) {
        const int tile = 2 * warp + i;
        if (tile >= a.tiles) continue;
        UNROLL for (int m = 0; m < 4; ++m) {
            UNROLL for (int k = 0; k < 8; ++k) {
                const int slot = TILE_SLOTS * tile + 8 * (k / 4) + 2 * (lane % 4) + k % 2;
                y[PITCH * slot + 16 * m + lane / 4 + 8 * (k % 4 / 2)] = sums[i][m][k / 4][k % 4];
            }
        }
    }
}
