// The kernels on an emulated GPU, behind a C interface: for tests. Every pair of codings is a variant.
#include "warp.h"
#include "tiles.h"

extern "C" void emulate_backwards(int is_so) { backwards_ = is_so; }
extern "C" void emulate_copies(int in_bulk, int late) { copies_in_bulk_ = in_bulk, land_late_ = late; }

#define MERGE(name)                                                                                                   \
    extern "C" int emulate_merge_##name(const name::MergeArguments* a, int shared_bytes) {                            \
        for (int line = 0; line < a->lines; ++line)                                                                   \
            for (int query = 0; query < a->place.rows; ++query)                                                            \
                if (!run_block_(static_cast<u32>(4 * a->dim), static_cast<u32>(query), static_cast<u32>(line),        \
                                static_cast<size_t>(shared_bytes), [a] { name::merge(*a); }))                         \
                    return 1;                                                                                         \
        return 0;                                                                                                     \
    }

#define CODES(name)                                                                                                   \
    extern "C" int emulate_attend_codes_##name(const name::CodesArguments* a, int groups, int threads, int shared_bytes) { \
        for (int line = 0; line < a->batch * a->chunks * a->heads; ++line)                                            \
            for (int group = 0; group < groups; ++group)                                                              \
                if (!run_block_(static_cast<u32>(threads), static_cast<u32>(group), static_cast<u32>(line),           \
                                static_cast<size_t>(shared_bytes), [a] { name::attend_codes(*a); }))                  \
                    return 1;                                                                                         \
        return 0;                                                                                                     \
    }                                                                                                                 \
    extern "C" int emulate_take_queries_##name(const name::TakeArguments* a, int blocks, int shared_bytes) {          \
        for (int block = 0; block < blocks; ++block)                                                                  \
            if (!run_block_(name::NEAR_THREADS, static_cast<u32>(block), 0, static_cast<size_t>(shared_bytes),        \
                            [a] { name::take_queries(*a); }))                                                         \
                return 1;                                                                                             \
        return 0;                                                                                                     \
    }                                                                                                                 \
    extern "C" int emulate_set_places_##name(const name::PlacesArguments* a, int, int shared_bytes) {                 \
        return !run_block_(32, 0, 0, static_cast<size_t>(shared_bytes), [a] { name::set_places(*a); });               \
    }                                                                                                                 \
    extern "C" int emulate_append_tail_##name(const name::AppendArguments* a, int vectors, int shared_bytes) {        \
        for (u32 side = 0; side < 2; ++side)                                                                          \
            for (int vector = 0; vector < vectors; ++vector)                                                          \
                if (!run_block_(32, static_cast<u32>(vector), side, static_cast<size_t>(shared_bytes),                \
                                [a] { name::append_tail(*a); }))                                                      \
                    return 1;                                                                                         \
        return 0;                                                                                                     \
    }                                                                                                                 \
    MERGE(name)

namespace scalar_scalar {
#include "codes.h"
}
CODES(scalar_scalar)

namespace trellis_scalar {
#undef KEY_TRELLIS
#define KEY_TRELLIS 1
#include "codes.h"
}
CODES(trellis_scalar)

namespace trellis_trellis {
#undef VALUE_TRELLIS
#define VALUE_TRELLIS 1
#include "codes.h"
}
CODES(trellis_trellis)

namespace scalar_trellis {
#undef KEY_TRELLIS
#define KEY_TRELLIS 0
#include "codes.h"
}
CODES(scalar_trellis)

#include "conversion.h"
#define CONVERSION(name)                                                                                              \
    extern "C" int emulate_##name(const ConversionArguments* a, int blocks, int shared_bytes) {                       \
        for (u32 tile = 0; tile < static_cast<u32>(a->count); ++tile)                                                 \
            for (int block = 0; block < blocks; ++block)                                                              \
                if (!run_block_(32, static_cast<u32>(block), tile, static_cast<size_t>(shared_bytes), [a] { name(*a); })) \
                    return 1;                                                                                         \
        return 0;                                                                                                     \
    }
CONVERSION(tiles_from_portable)
CONVERSION(portable_from_tiles)

#define ENCODE(name)                                                                                                  \
    extern "C" int emulate_encode_##name(const name::EncodeArguments* a, int blocks, int threads, int shared_bytes) { \
        for (int head = 0; head < a->heads; ++head)                                                                   \
            for (int block = 0; block < blocks; ++block)                                                              \
                if (!run_block_(static_cast<u32>(threads), static_cast<u32>(block), static_cast<u32>(head),           \
                                static_cast<size_t>(shared_bytes), [a] { name::encode(*a); }))                        \
                    return 1;                                                                                         \
        return 0;                                                                                                     \
    }

namespace scalar {
#include "encode.h"
}
ENCODE(scalar)

namespace trellis {
#undef TRELLIS
#define TRELLIS 1
#include "encode.h"
}
ENCODE(trellis)
