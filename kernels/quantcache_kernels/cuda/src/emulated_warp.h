// The operations of warp.h on a CPU: fibers in the place of lanes.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>

#define KERNEL static
#define BOUNDS(...)
#define GIVEN(arguments) const arguments&
#define DEVICE static inline
#define UNROLL
#define ROLLED
#define UNROLL_BY(times)

// The emulated block: fibers, what they wait for, and the operands they brought.
struct Block {
    struct Copy {
        void* to;
        const void* from;
        u32 bytes;
        u64* barrier;
    };
    struct Fiber {
        ucontext_t start;
        jmp_buf place;  // where it waits
        bool begun, done, at_barrier;
        u32 operands[8];
        std::vector<std::vector<Copy>> groups;  // on their way; the last one is open
    };
    jmp_buf scheduler;
    std::vector<Fiber> fibers;
    std::vector<u8> shared;
    std::vector<Copy> bulk;  // on their way
    u32 x, y, running;
    std::function<void()> body;
};
static Block* emulated_;
static bool backwards_ = false;  // whether the last warp and its last lane go first: what waits for nobody then differs
static bool copies_in_bulk_ = true, land_late_ = false;  // whose copies; whether they land when somebody waits for them
#define COPIES_IN_BULK copies_in_bulk_

constexpr size_t STACK_BYTES_ = 64 << 10;
static char* stack_(size_t fiber) {  // kept from block to block: making thousands of them takes longer than the kernels
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= fiber) stacks.emplace_back(new char[STACK_BYTES_]);
    return stacks[fiber].get();
}

static void fiber_main_() {
    emulated_->body();
    emulated_->fibers[emulated_->running].done = true;
    _longjmp(emulated_->scheduler, 1);
}

// Fibers change by jumps: swapcontext() asks the system for the mask of signals every time, which took two thirds of all.
// In functions of their own, for what they return to must not have kept in registers what has changed since.
__attribute__((noinline)) static void run_(Block::Fiber& fiber) {
    if (_setjmp(emulated_->scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
}
__attribute__((noinline)) static void wait_(Block::Fiber& fiber) {
    if (!_setjmp(fiber.place)) _longjmp(emulated_->scheduler, 1);
}

DEVICE u32 thread_index() { return emulated_->running; }
DEVICE u32 block_x() { return emulated_->x; }
DEVICE u32 block_y() { return emulated_->y; }
DEVICE u32 block_threads() { return static_cast<u32>(emulated_->fibers.size()); }
DEVICE u8* shared_memory() {
    return reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(emulated_->shared.data()) + 127) & ~uintptr_t(127));
}

// Wait until every lane of the warp is here. All of a warp's operations run through it, so a lane that strays stops the block.
DEVICE void meet_() { wait_(emulated_->fibers[emulated_->running]); }
DEVICE Block::Fiber& own_() { return emulated_->fibers[emulated_->running]; }
DEVICE Block::Fiber& lane_(u32 lane) { return emulated_->fibers[(emulated_->running & ~31u) + lane]; }

static bool run_block_(u32 threads, u32 x, u32 y, size_t shared_bytes, std::function<void()> body) {
    Block block;
    block.x = x;
    block.y = y;
    block.body = std::move(body);
    block.shared.assign(shared_bytes + 256, 0xA5);
    block.fibers.resize(threads);
    emulated_ = &block;
    for (u32 i = 0; i < threads; ++i) {
        Block::Fiber& fiber = block.fibers[i];
        fiber.begun = fiber.done = false;
        fiber.groups.resize(1);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stack_(i);
        fiber.start.uc_stack.ss_size = STACK_BYTES_;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main_, 0);
    }
    for (u32 done = 0; done < threads;) {  // from one meeting of the block to the next
        for (u32 turn = 0; turn < threads; turn += 32) {
            const u32 first = backwards_ ? (threads - 1) / 32 * 32 - turn : turn;
            const u32 lanes = threads - first < 32 ? threads - first : 32;
            for (u32 gone = 0, waiting = 0; gone + waiting < lanes;) {
                gone = waiting = 0;
                for (u32 lane = 0; lane < lanes; ++lane) {
                    const u32 i = first + (backwards_ ? lanes - 1 - lane : lane);
                    Block::Fiber& fiber = block.fibers[i];
                    fiber.at_barrier = false;
                    block.running = i;
                    run_(fiber);
                    gone += fiber.done, waiting += fiber.at_barrier;
                }
                // Some lanes left, or wait for the block, while others wait for them: a GPU would hang.
                if (gone % lanes || waiting % lanes) return false;
            }
            done += block.fibers[first].done ? lanes : 0;
        }
        if (done % threads) return false;
    }
    const u8* behind = shared_memory() + shared_bytes;
    for (const u8* place = behind; place < behind + 128; ++place)
        if (*place != 0xA5) return false;  // somebody wrote behind the shared memory
    return true;
}

DEVICE u32 bits_of(float x) {
    u32 y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE float float_of(u32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) {
    u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) {
        u32 nibble = selector >> 4 * i & 15, byte = static_cast<u32>(bytes >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << 8 * i;
    }
    return out;
}
DEVICE u32 select(u32 a, u32 b, u32 mask) { return (a & mask) | (b & ~mask); }
DEVICE u32 funnel_left(u32 low, u32 high, u32 shift) {
    return static_cast<u32>(((static_cast<u64>(high) << 32 | low) << (shift & 31)) >> 32);
}
DEVICE float half_of_(u32 h) {
    u32 exponent = h >> 10 & 31, mantissa = h & 1023;
    float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                     : std::ldexp(static_cast<float>(exponent ? mantissa | 1024 : mantissa),
                                                  static_cast<int>(exponent ? exponent : 1) - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}
// Every half-precision number as a float, made once: products of matrices read millions of them.
static const float* halves_() {
    static const std::vector<float> table = [] {
        std::vector<float> made(1 << 16);
        for (u32 h = 0; h < 1 << 16; ++h) made[h] = half_of_(h);
        return made;
    }();
    return table.data();
}
DEVICE float half_low(u32 x) { return halves_()[x & 0xFFFF]; }
DEVICE float half_high(u32 x) { return halves_()[x >> 16]; }
DEVICE u32 half_bits_(float x) {  // to nearest, ties to even
    u32 bits;
    memcpy(&bits, &x, 4);
    const u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return sign | 0x7E00;
    if (magnitude >= 0x477FF000) return sign | 0x7C00;
    if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves its mantissa in place, rounded
        float shifted;
        memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return sign | (bits - 0x3F000000);
    }
    return sign | ((magnitude + 0xC8000FFF + (magnitude >> 13 & 1)) >> 13);
}
DEVICE u32 pack_halves(float low, float high) { return half_bits_(low) | half_bits_(high) << 16; }
DEVICE u32 halves_multiply(u32 a, u32 b) {
    return pack_halves(half_low(a) * half_low(b), half_high(a) * half_high(b));
}
DEVICE u32 halves_multiply_add(u32 a, u32 b, u32 c) {
    return pack_halves(half_low(a) * half_low(b) + half_low(c), half_high(a) * half_high(b) + half_high(c));
}
DEVICE u32 halves_negate(u32 a) { return a ^ 0x80008000; }
DEVICE float approximate_cosine(float angle) { return std::cos(angle); }
DEVICE float approximate_sine(float angle) { return std::sin(angle); }
DEVICE float power_of_two(float x) { return std::exp2(x); }
DEVICE float logarithm_of_two(float x) { return std::log2(x); }
template <typename T>
DEVICE void hold(T&) {}
DEVICE float root(float x) { return std::sqrt(x); }
DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float add(float a, float b) { return a + b; }
DEVICE float multiply_add_within_one(float a, float b, float c) { return std::fmin(std::fmax(std::fma(a, b, c), 0.0f), 1.0f); }
DEVICE float larger(float a, float b) { return std::fmax(a, b); }
DEVICE float smaller(float a, float b) { return std::fmin(a, b); }
DEVICE float magnitude(float x) { return std::fabs(x); }
DEVICE float round_down(float x) { return std::floor(x); }

DEVICE void prefetch(const void*) {}
DEVICE void await_launch_before() {}
DEVICE void let_next_launch_begin() {}

DEVICE void sync_warp() { meet_(); }
DEVICE void sync_block() {
    own_().at_barrier = true;
    meet_();
}
DEVICE float shuffle_xor(float x, int mask) {
    own_().operands[0] = bits_of(x);
    meet_();
    float y = float_of(lane_((emulated_->running & 31) ^ static_cast<u32>(mask)).operands[0]);
    meet_();
    return y;
}
DEVICE u32 shuffle(u32 x, int lane) {
    own_().operands[0] = x;
    meet_();
    u32 y = lane_(static_cast<u32>(lane) & 31).operands[0];
    meet_();
    return y;
}
template <int DELTA, int WIDTH>
DEVICE u32 shuffle_up(u32 x) {
    const u32 lane = emulated_->running & 31;
    const u32 y = shuffle(x, static_cast<int>(lane) - DELTA);
    return lane % WIDTH < DELTA ? 0 : y;
}
DEVICE bool any_lane(bool x) {
    own_().operands[0] = x;
    meet_();
    bool any = false;
    for (u32 i = 0; i < 32; ++i) any |= lane_(i).operands[0] != 0;
    meet_();
    return any;
}
DEVICE u32 transpose(u32 x) {
    own_().operands[0] = x;
    meet_();
    u32 row = (emulated_->running & 31) / 4, column = 2 * (emulated_->running & 3), y = 0;
    for (u32 i = 0; i < 2; ++i) {
        u32 pair = lane_(4 * (column + i) + row / 2).operands[0];
        y |= (row & 1 ? pair >> 16 : pair & 0xFFFF) << 16 * i;
    }
    meet_();
    return y;
}
DEVICE void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    u32* own = own_().operands;
    own[0] = a0, own[1] = a1, own[2] = a2, own[3] = a3, own[4] = b0, own[5] = b1;
    meet_();
    const float* halves = halves_();
    u32 row = (emulated_->running & 31) / 4, column = 2 * (emulated_->running & 3);
    for (u32 k = 0; k < 16; ++k) {
        const u32 left = k % 8 / 2, shift = 16 * (k % 2);
        const u32* as = lane_(4 * row + left).operands + 2 * (k / 8);
        for (u32 i = 0; i < 4; ++i) {
            const u32 b = lane_(4 * (column + (i & 1)) + left).operands[4 + k / 8];
            c[i] += halves[as[i / 2] >> shift & 0xFFFF] * halves[b >> shift & 0xFFFF];
        }
    }
    meet_();
}
DEVICE void mma_bfloat(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    u32* own = own_().operands;
    own[0] = a0, own[1] = a1, own[2] = a2, own[3] = a3, own[4] = b0, own[5] = b1;
    meet_();
    u32 row = (emulated_->running & 31) / 4, column = 2 * (emulated_->running & 3);
    for (u32 k = 0; k < 16; ++k) {
        const u32 left = k % 8 / 2, shift = 16 * (k % 2);
        const u32* as = lane_(4 * row + left).operands + 2 * (k / 8);
        for (u32 i = 0; i < 4; ++i) {
            const u32 b = lane_(4 * (column + (i & 1)) + left).operands[4 + k / 8];
            c[i] += float_of(as[i / 2] >> shift << 16) * float_of(b >> shift << 16);
        }
    }
    meet_();
}
DEVICE void mma_half(u32 (&c)[2], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    float sums[4] = {half_low(c[0]), half_high(c[0]), half_low(c[1]), half_high(c[1])};
    mma_half(sums, a0, a1, a2, a3, b0, b1);
    c[0] = pack_halves(sums[0], sums[1]), c[1] = pack_halves(sums[2], sums[3]);
}
DEVICE void mma_half(float (&c)[4], u32 a0, u32 a1, u32 b) { mma_half(c, a0, a1, 0, 0, b, 0); }
DEVICE void mma_half(u32 (&c)[2], u32 a0, u32 a1, u32 b) { mma_half(c, a0, a1, 0, 0, b, 0); }

DEVICE void land_(const Block::Copy& copy) { memcpy(copy.to, copy.from, copy.bytes); }
DEVICE bool is_copying() { return !COPIES_IN_BULK || thread_index() % 32 == 0; }
DEVICE void barrier_init(u64* barrier) { *barrier = 0; }
DEVICE void barriers_ready() {}
DEVICE void barrier_expect(u64*, u32) {}
DEVICE void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier) {
    const u32 step = COPIES_IN_BULK ? bytes : 16, first = COPIES_IN_BULK ? 0 : step * (thread_index() % 32);
    for (u32 i = first; i < bytes; i += COPIES_IN_BULK ? step : 32 * step) {
        const Block::Copy copy = {static_cast<u8*>(shared) + i, static_cast<const u8*>(global) + i, step, barrier};
        if (!land_late_)
            land_(copy);
        else if (COPIES_IN_BULK)
            emulated_->bulk.push_back(copy);
        else
            own_().groups.back().push_back(copy);
    }
}
DEVICE void close_group() { own_().groups.emplace_back(); }
DEVICE void sync_copying() {
    if (!COPIES_IN_BULK) meet_();
}
DEVICE void await_groups() {
    auto& groups = own_().groups;
    for (size_t i = 0; i + 2 < groups.size(); ++i)
        for (const Block::Copy& copy : groups[i]) land_(copy);
    if (groups.size() > 2) groups.erase(groups.begin(), groups.end() - 2);
}
DEVICE void barrier_wait(u64* barrier, u32) {
    await_groups();
    std::vector<Block::Copy> others;
    for (const Block::Copy& copy : emulated_->bulk) copy.barrier == barrier ? land_(copy) : others.push_back(copy);
    emulated_->bulk.swap(others);
    meet_();
}
