// Entry points: choice of the instruction set, memory, and the distribution of work over threads.

#include "abi.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace quantcache {
namespace {

const Level* const LEVELS[] = {
    &plain_level,
#ifdef QUANTCACHE_X86
    &avx2_level,
    &avx512_level,
#endif
};
constexpr int NUM_LEVELS = sizeof(LEVELS) / sizeof(LEVELS[0]);

bool supported(int level) {
#ifdef QUANTCACHE_X86
    if (level == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == 2) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
               && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && supported(1);
    }
#endif
    return level == 0;
}

// A buffer of each thread that only grows: fresh memory costs more than the work done in it.
class Buffer {
  public:
    char* at_least(size_t bytes) {
        if (bytes > size_) {
            memory_.reset(); // before the new memory comes, so that both need never be there at once
            size_ = 0;       // what follows may throw
            memory_.reset(new (std::align_val_t(64)) char[bytes]);
            size_ = bytes;
        }
        return memory_.get();
    }

  private:
    struct Delete {
        void operator()(char* p) const { operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<char[], Delete> memory_;
    size_t size_ = 0;
};

thread_local Buffer thread_scratch;
thread_local Buffer thread_partials;

// The library shares the OpenMP threads of torch, which spin between its own parallel regions: a second set of threads
// would compete with them for the cores. Found by name at run time, so that nothing has to be linked.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMpParallel find_parallel() { return reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

// An exception must not leave a thread or a parallel region, where nothing could catch it: it ends the work, and is
// thrown again here once all threads are done.
template <class Function> void run_tasks(int tasks, int threads, const Function& function) {
    struct Shared {
        std::atomic<int> next{0};
        std::atomic<bool> out_of_memory{false};
        int tasks;
        const Function* function;
    } shared;
    shared.tasks = tasks;
    shared.function = &function;
    const auto work = [](void* data) noexcept {
        Shared& shared = *static_cast<Shared*>(data);
        try {
            for (int task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;) {
                if (shared.out_of_memory.load(std::memory_order_relaxed)) return;
                (*shared.function)(task);
            }
        } catch (...) { // scratch that could not be had: nothing else here throws
            shared.out_of_memory.store(true, std::memory_order_relaxed);
        }
    };
    threads = threads < tasks ? threads : tasks;
    static const OpenMpParallel parallel = find_parallel();
    if (threads <= 1) {
        work(&shared);
    } else if (parallel) {
        parallel(work, &shared, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        others.reserve(static_cast<size_t>(threads) - 1);
        try {
            for (int i = 1; i < threads; ++i) others.emplace_back(work, &shared);
        } catch (const std::system_error&) { // no more threads to be had: those that there are do the work
        }
        work(&shared);
        for (std::thread& thread : others) thread.join();
    }
    if (shared.out_of_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

// Whether a block's tokens are near enough to its anchor for the tables of rotations.
bool near_anchor(const Side& side, const Place& place) {
    const int64_t offset = static_cast<int64_t>(place.first) - place.anchor;
    return !side.fast_pairs || (offset >= 0 && offset + BLOCK <= ANCHOR_LENGTH);
}

// Whether block table and left padding stay inside of what they index: the mask, and the tables of rotations.
bool well_placed(const Attend& a) {
    for (int block = 0; block < a.blocks; ++block) {
        const Place& place = a.block_table[block];
        if (place.first < 0 || place.length < 0 || place.length > BLOCK) return false;
        if (static_cast<int64_t>(place.first) + place.length > a.encoded_end) return false;
        if (!near_anchor(*a.key, place)) return false;
    }
    for (int row = 0; a.left_padding && row < a.batch; ++row) {
        if (a.left_padding[row] < 0) return false;
    }
    return a.left_padding || a.num_sinks <= a.encoded_end;
}

void encode_all(const Encode& e) {
    const Level& level = *LEVELS[e.level];
    const size_t bytes = level.encode_scratch(e);
    run_tasks(e.blocks * e.batch * e.heads, e.threads, [&](int task) {
        const int head = task % e.heads, row = task / e.heads % e.batch, block = task / e.heads / e.batch;
        level.encode(e, block, row, head, thread_scratch.at_least(bytes));
    });
}

bool well_placed(const Decode& d) {
    for (int block = 0; block < d.blocks; ++block) {
        if (!near_anchor(*d.side, d.block_table[block])) return false;
    }
    return true;
}

void decode_all(const Decode& d) {
    const Level& level = *LEVELS[d.level];
    const size_t bytes = level.decode_scratch(d);
    run_tasks(d.blocks * d.batch * d.heads, d.threads, [&](int task) { // neighbours in memory follow each other
        const int block = task % d.blocks, head = task / d.blocks % d.heads, row = task / d.blocks / d.heads;
        level.decode(d, block, row, head, thread_scratch.at_least(bytes));
    });
}

void attend_all(const Attend& a) {
    const Level& level = *LEVELS[a.level];
    const int splits = code_splits(a.blocks) + 1, heads = a.batch * a.heads;
    const size_t size = partial_size(a), bytes = level.attend_scratch(a);
    // In front of the partial results, the number of splits of each head that are still to come: whoever finishes the
    // last one merges them.
    const size_t counters = (heads * sizeof(std::atomic<int>) + 63) / 64 * 64;
    char* memory = thread_partials.at_least(counters + heads * splits * size * sizeof(float));
    std::atomic<int>* remaining = reinterpret_cast<std::atomic<int>*>(memory);
    float* partials = reinterpret_cast<float*>(memory + counters);
    for (int i = 0; i < heads; ++i) new (remaining + i) std::atomic<int>(splits);
    run_tasks(heads * splits, a.threads, [&](int task) {
        const int index = task / splits, split = task % splits, row = index / a.heads, head = index % a.heads;
        char* scratch = thread_scratch.at_least(bytes);
        float* own = partials + static_cast<size_t>(index) * splits * size;
        level.attend(a, row, head, split, own + split * size, scratch);
        if (remaining[index].fetch_sub(1, std::memory_order_acq_rel) == 1) level.merge(a, row, head, own, scratch);
    });
}

} // namespace
} // namespace quantcache

#define QUANTCACHE_EXPORT extern "C" __attribute__((visibility("default")))

// Status of a call.
enum Status { DONE = 0, OUT_OF_MEMORY = 1, MISPLACED = 2 };

QUANTCACHE_EXPORT int quantcache_abi() { return QUANTCACHE_ABI; }

QUANTCACHE_EXPORT int quantcache_num_levels() { return quantcache::NUM_LEVELS; }

QUANTCACHE_EXPORT const char* quantcache_level_name(int level) { return quantcache::LEVELS[level]->name; }

QUANTCACHE_EXPORT int quantcache_level_supported(int level) { return quantcache::supported(level); }

QUANTCACHE_EXPORT int quantcache_encode(const quantcache::Encode* call) {
    try {
        quantcache::encode_all(*call);
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    return DONE;
}

QUANTCACHE_EXPORT int quantcache_decode(const quantcache::Decode* call) {
    if (!quantcache::well_placed(*call)) return MISPLACED;
    try {
        quantcache::decode_all(*call);
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    return DONE;
}

QUANTCACHE_EXPORT int quantcache_attend(const quantcache::Past* past, const quantcache::Call* call) {
    const quantcache::Attend both{*past, *call};
    if (!quantcache::well_placed(both)) return MISPLACED;
    try {
        quantcache::attend_all(both);
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    return DONE;
}
