// What the kernels need of the machine: lanes, shuffles, tensor cores, bulk copies.
//
// Under nvcc and NVRTC these are the instructions themselves. Under a C++ compiler a block of threads is emulated:
// every lane is a fiber that runs until it meets an operation in which its warp takes part as a whole, and the last
// lane to arrive carries the operation out for all. Kernels are the same source in both, so their values can be tested
// where there is no GPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) Words2 {
    u32 x, y;
};
struct alignas(16) Words4 {
    u32 x, y, z, w;
};

#ifdef __CUDACC__

#define KERNEL extern "C" __global__
#define BOUNDS(...) __launch_bounds__(__VA_ARGS__)  // threads of a block, and how many blocks fit at once
#define GIVEN(arguments) const __grid_constant__ arguments  // read where the launch has put them
#define DEVICE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define PRAGMA_(text) _Pragma(#text)
#define UNROLL_BY(times) PRAGMA_(unroll times)

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE u32 block_x() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 block_threads() { return blockDim.x; }
extern __shared__ uint4 shared_memory_[];
DEVICE u8* shared_memory() { return reinterpret_cast<u8*>(shared_memory_); }

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 x) { return __uint_as_float(x); }
DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}
// Bits of a where the mask has ones, else of b.
DEVICE u32 select(u32 a, u32 b, u32 mask) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(y) : "r"(a), "r"(b), "r"(mask));
    return y;
}
DEVICE u32 funnel_left(u32 low, u32 high, u32 shift) { return __funnelshift_l(low, high, shift); }
// Two half-precision numbers in a register.
DEVICE u32 pack_halves(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE u32 halves_multiply(u32 a, u32 b) {
    u32 y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
DEVICE u32 halves_multiply_add(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
DEVICE u32 halves_negate(u32 a) {
    u32 y;
    asm("neg.f16x2 %0, %1;" : "=r"(y) : "r"(a));
    return y;
}
// 2^-20 off where an angle is at most pi.
DEVICE float approximate_cosine(float angle) {
    float y;
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(angle));
    return y;
}
DEVICE float approximate_sine(float angle) {
    float y;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(angle));
    return y;
}
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float logarithm_of_two(float x) { return __log2f(x); }
// Nothing, but the compiler must think that x changes here: what follows from it is not computed ahead and held in registers.
template <typename T>
DEVICE void hold(T& x) { asm volatile("" : "+r"(x)); }
DEVICE void hold(float& x) { asm volatile("" : "+f"(x)); }
DEVICE float root(float x) { return sqrtf(x); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
// a b + c, or 0 or 1 where it lies beyond them; 0 where it is NaN, so that tables can be indexed by it.
DEVICE float multiply_add_within_one(float a, float b, float c) {
    float y;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
    return y;
}
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE float round_down(float x) { return floorf(x); }

// Memory is on its way to where it is quick to read.
DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global))); }

// A launch that may begin before the one in front of it has ended waits for what that one writes; and lets the next begin.
// Before Hopper none may.
#if __CUDA_ARCH__ >= 900
DEVICE void await_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DEVICE void await_launch_before() {}
DEVICE void let_next_launch_begin() {}
#endif

DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
DEVICE u32 shuffle(u32 x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
// What the lane DELTA below has, of every WIDTH; 0 where there is none.
template <int DELTA, int WIDTH>
DEVICE u32 shuffle_up(u32 x) {
    u32 y;
    asm volatile("{.reg .pred there; shfl.sync.up.b32 %0|there, %1, %2, %3, 0xFFFFFFFF; @!there mov.b32 %0, 0;}"
                 : "=r"(y)
                 : "r"(x), "n"(DELTA), "n"((32 - WIDTH) << 8));
    return y;
}
DEVICE bool any_lane(bool x) { return __any_sync(0xFFFFFFFFu, x); }

// An 8x8 matrix of 16-bit elements, lane 4 r + c holding elements 2 c and 2 c + 1 of row r: its transpose.
DEVICE u32 transpose(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// c + a b, a 16 x 16, b 16 x 8, both in half precision, in the operand order of mma.m16n8k16.
DEVICE void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same of bfloat16.
DEVICE void mma_bfloat(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same of half precision, with sums in it.
DEVICE void mma_half(u32 (&c)[2], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// c + a b, a 16 x 8, b 8 x 8, in the operand order of mma.m16n8k8.
DEVICE void mma_half(float (&c)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}
DEVICE void mma_half(u32 (&c)[2], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a0), "r"(a1), "r"(b));
}

// Copies into shared memory that a warp goes on without. From Hopper on one lane has them made in bulk, and a barrier counts
// the bytes that have landed. Before, every lane copies sixteen bytes at a time, in groups, and waits for all of its own but
// the latest group: groups are closed, empty ones too, wherever the other side's bytes were to come meanwhile.
DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
#if __CUDA_ARCH__ >= 900
constexpr bool COPIES_IN_BULK = true;
// True in the lane of a whole warp that has copies made; of what it does the compiler knows that no other lane does it.
DEVICE bool is_copying() {
    u32 y;
    asm volatile("{.reg .pred own; elect.sync _|own, 0xFFFFFFFF; selp.u32 %0, 1, 0, own;}" : "=r"(y));
    return y != 0;
}
DEVICE void barrier_init(u64* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
DEVICE void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}
DEVICE void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
        ::"r"(shared_address(barrier)), "r"(parity)
        : "memory");
}
DEVICE void close_group() {}
DEVICE void sync_copying() {}
DEVICE void await_groups() {}
#else
constexpr bool COPIES_IN_BULK = false;
DEVICE bool is_copying() { return true; }
DEVICE void barrier_init(u64*) {}
DEVICE void barriers_ready() {}
DEVICE void barrier_expect(u64*, u32) {}
DEVICE void bulk_copy(void* shared, const void* global, u32 bytes, u64*) {
    const u32 to = shared_address(shared);
    ROLLED for (u32 i = 16 * (thread_index() % 32); i < bytes; i += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i),
                     "l"(__cvta_generic_to_global(static_cast<const u8*>(global) + i))
                     : "memory");
}
DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE void sync_copying() { __syncwarp(); }  // of lanes that copy
DEVICE void await_groups() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
DEVICE void barrier_wait(u64*, u32) {
    await_groups();
    __syncwarp();
}
#endif

#else
#include "emulated_warp.h"
#endif

// The same of some bytes, by all threads of a block.
DEVICE void prefetch_all(const void* global, int bytes) {
    const int step = 128 * static_cast<int>(block_threads());
    ROLLED for (int i = 128 * static_cast<int>(thread_index()); i < bytes; i += step)
        prefetch(static_cast<const u8*>(global) + i);
}

DEVICE float with_sign_of(float x, float sign) { return float_of(select(bits_of(sign), bits_of(x), 0x80000000)); }
DEVICE Words4 words_of(const float (&x)[4]) { return {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}; }
DEVICE void floats_of(const Words4& w, float (&x)[4]) {
    x[0] = float_of(w.x), x[1] = float_of(w.y), x[2] = float_of(w.z), x[3] = float_of(w.w);
}
// An angle in units of 2^-32 revolutions. Behind a leading one its upper bits are a number from 1 to 2, or from -1/2 to 1/2.
DEVICE void turn(u32 revolutions, float& cosine, float& sine) {
    const float angle = 6.283185307179586f * add(float_of((revolutions >> 9) ^ 0x3FC00000), -1.5f);
    cosine = approximate_cosine(angle), sine = approximate_sine(angle);
}
