// The kernels on an emulated GPU, behind a C interface: for tests.
#include "attention.h"

extern "C" int emulate_attend(const AttentionArguments* a, int splits, int shared_bytes) {
    for (int line = 0; line < a->batch * a->num_heads; ++line)
        for (int split = 0; split < splits; ++split)
            if (!run_block_(32, static_cast<u32>(split), static_cast<u32>(line), static_cast<size_t>(shared_bytes),
                            [a] { attend(*a); }))
                return 1;
    return 0;
}

extern "C" int emulate_merge(const MergeArguments* a, int shared_bytes) {
    for (int line = 0; line < a->lines; ++line)
        for (int query = 0; query < a->group; ++query)
            if (!run_block_(static_cast<u32>(4 * a->dim), static_cast<u32>(query), static_cast<u32>(line),
                            static_cast<size_t>(shared_bytes), [a] { merge(*a); }))
                return 1;
    return 0;
}
