// What a warp has in shared memory, and the copies that fill it.

struct Room {  // of both blocks of a unit
    u64 *key_barrier, *value_barrier;
    const u8** sides;  // the head's codes and gains of the first block and batch row, of keys, then of values; lane 0's own
    u8 *key_gains, *value_gains;  // codes of gains
    u8* scratch;                  // scores of a block's fast dimensions, later gains of all tokens
    u8 *keys, *values, *query;
    Words4* softmax;  // of every lane
    Words4* sums;     // [value tiles, 32 lanes]
};

DEVICE Room lay_out_room(const CodesArguments& a) {
    u8* shared = shared_memory();
    Room room;
    room.key_barrier = reinterpret_cast<u64*>(shared), room.value_barrier = room.key_barrier + 1;
    room.sides = reinterpret_cast<const u8**>(shared + 16);
    room.key_gains = shared + 128, room.value_gains = shared + 256;
    room.scratch = shared + 384;
    room.softmax = reinterpret_cast<Words4*>(shared + 2432);
    room.keys = shared + 2944;
    room.values = room.keys + 2 * a.key_room;
    room.query = room.values + 2 * a.value_room;
    room.sums = reinterpret_cast<Words4*>(room.query + a.query_bytes);
    return room;
}

// One side of a head's blocks: where they lie, and where they go.
struct Side {
    const u8* const* from;    // codes and gains of the first block and batch row, which would take registers
    u32 bytes, stride;        // of codes, and from one batch row's to the next one's
    u64* barrier;
    u8 *code_room, *gain_room;
    int apart;  // from the first block to the second one in code_room
};

DEVICE Side keys_of(const CodesArguments& a, const Room& room, int head) {
    const HeadTiles& keys = a.key_heads[head];
    return {room.sides, static_cast<u32>(keys.bytes), static_cast<u32>(a.key_bytes), room.key_barrier,
            room.keys, room.key_gains, a.key_room};
}
DEVICE Side values_of(const CodesArguments& a, const Room& room, int head) {
    const HeadTiles& values = a.value_heads[head];
    return {room.sides + 2, static_cast<u32>(values.bytes), static_cast<u32>(a.value_bytes), room.value_barrier,
            room.values, room.value_gains, a.value_room};
}

// Brings one or two blocks of a side; the barrier waits for `more` bytes too. For one lane.
DEVICE void fetch(const CodesArguments& a, const Side& side, int first, int b, bool two, u32 more) {
    barrier_expect(side.barrier, (side.bytes + 64) * (two ? 2 : 1) + more);
    UNROLL for (int block = 0; block < 2; ++block) {
        if (block && !two) break;
        MARK(14);
        const u64 row = static_cast<u64>(first + block) * a.batch + b;
        bulk_copy(side.gain_room + 64 * block, side.from[1] + row * a.heads * 64, 64, side.barrier);
        u8* place = side.code_room + side.apart * block;
        if (side.bytes) bulk_copy(place, side.from[0] + row * side.stride, side.bytes, side.barrier);
    }
}
