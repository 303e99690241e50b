// What is in shared memory: a head's constants, which all warps of a block of threads read, and room for each warp's units.

struct Room {  // of a warp, for both blocks of a unit
    u64 *key_barrier, *value_barrier;
    const u8** next;  // codes and gains of the next unit, of keys, then of values, then its queries; for lanes that copy
    u8 *key_gains, *value_gains;  // codes of gains
    u8* scratch;                  // gains of all tokens
    u8 *keys, *values, *query;
    Words4* softmax;  // of every lane
    Words2* sums;     // [halves of value tiles, 4 lanes of every row]
};

// Whether a lane has sums of a row of queries.
DEVICE bool has_row(const CodesArguments& a, u32 lane) { return static_cast<int>(lane) < 4 * a.rows; }

DEVICE Room lay_out_room(const CodesArguments& a, u32 warp) {
    u8* shared = shared_memory() + a.constant_room + warp * static_cast<u32>(a.warp_room);
    Room room;
    room.key_barrier = reinterpret_cast<u64*>(shared), room.value_barrier = room.key_barrier + 1;
    room.next = reinterpret_cast<const u8**>(shared + 16);
    room.key_gains = shared + 128, room.value_gains = shared + 256;
    room.scratch = shared + 384;
    room.softmax = reinterpret_cast<Words4*>(shared + 896);
    room.keys = shared + 1408;
    room.values = room.keys + 2 * a.key_room;
    room.query = room.values + 2 * a.value_room;
    room.sums = reinterpret_cast<Words2*>(room.query + a.query_bytes);
    return room;
}

struct Constants {  // of a head
    const u32 *key_terms, *value_terms, *fast_decoder;
};

// Where they will be once the barrier in front of them has let everybody pass; the first thread or warp has them brought. A warp
// alone would wait for each of them, tile after tile, where it reads them from global memory.
DEVICE u64* constants_barrier() { return reinterpret_cast<u64*>(shared_memory()); }
DEVICE Constants fetch_constants(const CodesArguments& a, int head) {
    const u32 key_words = static_cast<u32>(KEY_WORDS * (a.slow_tiles + a.fast_tiles));
    const u32 value_words = static_cast<u32>(VALUE_WORDS * a.value_tiles);
    const u32 fast_words = static_cast<u32>(128 * a.fast_tiles * a.fast_steps);
    u32* place = reinterpret_cast<u32*>(shared_memory() + 128);
    if (COPIES_IN_BULK ? thread_index() == 0 : thread_index() < 32) {
        u64* barrier = constants_barrier();
        barrier_init(barrier);
        barriers_ready();
        barrier_expect(barrier, 4 * (key_words + value_words + fast_words));
        const u32 own = static_cast<u32>(head);
        bulk_copy(place, a.key_terms + own * key_words, 4 * key_words, barrier);
        bulk_copy(place + key_words, a.value_terms + own * value_words, 4 * value_words, barrier);
        if (fast_words)
            bulk_copy(place + key_words + value_words, a.fast_decoder + own * fast_words, 4 * fast_words, barrier);
    }
    return {place, place + key_words, place + key_words + value_words};
}

// One side of a head's blocks: where the next unit lies, and where it goes.
struct Side {
    const u8** next;  // its codes and gains, in shared memory: they would take registers
    long long step;   // bytes from a block's codes to the next one's
    u32 bytes;        // of a block's codes
    u64* barrier;
    u8 *code_room, *gain_room;
    int apart;  // from the first block to the second one in code_room
};

DEVICE Side keys_of(const CodesArguments& a, const Room& room, int head) {
    const u32 bytes = static_cast<u32>(a.key_heads[head].bytes);
    return {room.next, a.key_step, bytes, room.key_barrier, room.keys, room.key_gains, a.key_room};
}
DEVICE Side values_of(const CodesArguments& a, const Room& room, int head) {
    const u32 bytes = static_cast<u32>(a.value_heads[head].bytes);
    return {room.next + 2, a.value_step, bytes, room.value_barrier, room.values, room.value_gains, a.value_room};
}

// Where a side's first unit lies: `first` is its first block.
DEVICE void begin_side(const CodesArguments& a, const Side& side, const u8* codes, const u8* gains, int first, int b, int head,
                       int offset, int stride) {
    const u64 row = static_cast<u64>(first) * a.batch + b;
    side.next[0] = codes + row * static_cast<u32>(stride) + offset;
    side.next[1] = gains + (row * a.heads + head) * 64;
}

// Brings the next unit, of one block or two; the barrier waits for `more` bytes too. For lanes that copy.
DEVICE void fetch(const CodesArguments& a, const Side& side, bool two, u32 more) {
    barrier_expect(side.barrier, (side.bytes + 64) * (two ? 2 : 1) + more);
    const u8 *codes = side.next[0], *gains = side.next[1];
    UNROLL for (int block = 0; block < 2; ++block) {
        if (block && !two) break;
        MARK(14);
        bulk_copy(side.gain_room + 64 * block, gains, 64, side.barrier);
        if (side.bytes) bulk_copy(side.code_room + side.apart * block, codes, side.bytes, side.barrier);
        codes += side.step, gains += a.gain_step;
    }
    sync_copying();
    side.next[0] = codes, side.next[1] = gains;
}
