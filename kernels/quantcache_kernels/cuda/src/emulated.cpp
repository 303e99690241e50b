// The kernels on an emulated GPU, behind a C interface: for tests. Every way of placing queries in columns is a variant.
#include "warp.h"

#define VARIANT(name)                                                                                                 \
    extern "C" int emulate_attend_##name(const name::AttentionArguments* a, int splits, int shared_bytes) {           \
        for (int line = 0; line < a->batch * a->num_heads; ++line)                                                    \
            for (int split = 0; split < splits; ++split)                                                              \
                if (!run_block_(32, static_cast<u32>(split), static_cast<u32>(line),                                  \
                                static_cast<size_t>(shared_bytes), [a] { name::attend(*a); }))                        \
                    return 1;                                                                                         \
        return 0;                                                                                                     \
    }                                                                                                                 \
    extern "C" int emulate_merge_##name(const name::MergeArguments* a, int shared_bytes) {                            \
        for (int line = 0; line < a->lines; ++line)                                                                   \
            for (int query = 0; query < a->group; ++query)                                                            \
                if (!run_block_(static_cast<u32>(4 * a->dim), static_cast<u32>(query), static_cast<u32>(line),        \
                                static_cast<size_t>(shared_bytes), [a] { name::merge(*a); }))                         \
                    return 1;                                                                                         \
        return 0;                                                                                                     \
    }

namespace precise_1 {
#define PRECISE 1
#define PARTS 1
#include "attention.h"
}
VARIANT(precise_1)

namespace precise_2 {
#undef PARTS
#define PARTS 2
#include "attention.h"
}
VARIANT(precise_2)

namespace eight_1 {
#undef PRECISE
#undef PARTS
#define PRECISE 0
#define PARTS 1
#include "attention.h"
}
VARIANT(eight_1)
