// A CUDA block on one CPU thread: every CUDA thread is a fiber that runs until it has to wait for others.
//
// Fibers switch at block and warp barriers, collectives, tensor-core products and waits for asynchronous copies, and
// go on in an order drawn from a seed, so a result that depends on an order shows under some seed. Asynchronous copies
// land at their wait and not before. Shared memory starts as NaN. It preempts nowhere else: it is no race detector.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define DEVICE static inline
#define DEVICE_METHOD inline
#define INFINITE __builtin_inff()

struct Dim3 {
    unsigned x, y, z;
};
struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};

namespace simt {

extern thread_local Dim3 thread_index, block_index, block_size, grid_size;

enum class Op { Sync, Shuffle, Any, MmaBf16, MmaF16, MmaTf32, MmaS8, Matrices, MatricesTransposed };

// What a lane brings to a collective, and takes from it.
struct Lane {
    uint32_t in[8];
    const void* address;
    uint32_t out[4];
};

void barrier_block();
// Gives `lane` to the warp's collective `op` and returns when all 32 lanes have; `out` is then filled in.
void collective(Op op, Lane& lane);
void copy_async(void* to, const void* from, unsigned bytes, bool there);
void copy_commit();
void copy_wait(int pending);
unsigned char* dynamic_shared();

using Entry = void (*)(void** args);
struct Registration {
    Registration(const char* name, Entry entry);
};

template <class... A, size_t... I>
void call(void (*f)(A...), void** args, std::index_sequence<I...>) {
    f(*static_cast<std::remove_reference_t<A>*>(args[I])...);
}
template <class... A>
void call(void (*f)(A...), void** args) {
    call(f, args, std::index_sequence_for<A...>());
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

#define KERNEL(bounds, name, ...)                                                                  \
    static void name(__VA_ARGS__);                                                                 \
    static simt::Registration register_##name(#name, [](void** args) { simt::call(name, args); }); \
    static void name(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(simt::dynamic_shared())

DEVICE void sync_block() { simt::barrier_block(); }
DEVICE void sync_warp() {
    simt::Lane lane;
    simt::collective(simt::Op::Sync, lane);
}
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) {
    simt::Lane lane;
    lane.in[0] = x;
    lane.in[1] = mask;
    simt::collective(simt::Op::Shuffle, lane);
    return lane.out[0];
}
DEVICE uint32_t bits_of(float x) {
    uint32_t y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE float float_of(uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE float shuffle_xor(float x, int mask) { return float_of(shuffle_xor(bits_of(x), mask)); }
DEVICE bool any_lane(bool x) {
    simt::Lane lane;
    lane.in[0] = x;
    simt::collective(simt::Op::Any, lane);
    return lane.out[0] != 0;
}

DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float f32_of_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
DEVICE float f32_of_f16(uint16_t x) {
    uint32_t exponent = (x >> 10) & 31, mantissa = x & 1023;
    float size = exponent == 31 ? (mantissa ? __builtin_nanf("") : INFINITE)
                 : exponent == 0 ? ldexpf(static_cast<float>(mantissa), -24)
                                 : float_of(((exponent + 112) << 23) | (mantissa << 13));
    return x >> 15 ? -size : size;
}
DEVICE uint32_t bf16_bits(float x) {
    uint32_t bits = bits_of(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
DEVICE uint32_t bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
DEVICE uint32_t f16_bits(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) {
        return 0x7fffu;
    }
    if (size >= 0x477ff000u) {
        return sign | 0x7c00u;
    }
    if (size < 0x38800000u) {
        // Subnormal: multiples of 2^-24.
        return sign | static_cast<uint32_t>(rintf(float_of(size) * 16777216.0f));
    }
    return sign | (((size + 0xfffu + (size >> 13 & 1u)) >> 13) - (112u << 10));
}
DEVICE uint32_t f16_pair(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
// Ties away from zero, as cvt.rna does.
DEVICE uint32_t tf32_bits(float x) {
    uint32_t bits = bits_of(x);
    return x != x || (bits & 0x7fffffffu) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

template <class C>
static inline void mma(simt::Op op, C (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::Lane lane;
    memcpy(lane.in, a, 16);
    lane.in[4] = b0;
    lane.in[5] = b1;
    memcpy(lane.out, c, 16);
    simt::collective(op, lane);
    memcpy(c, lane.out, 16);
}
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma(simt::Op::MmaBf16, c, a, b0, b1);
}
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma(simt::Op::MmaF16, c, a, b0, b1);
}
DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma(simt::Op::MmaTf32, c, a, b0, b1);
}
DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma(simt::Op::MmaS8, c, a, b0, b1);
}
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    simt::Lane lane;
    lane.address = row;
    simt::collective(simt::Op::Matrices, lane);
    memcpy(r, lane.out, 16);
}
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    simt::Lane lane;
    lane.address = row;
    simt::collective(simt::Op::MatricesTransposed, lane);
    memcpy(r, lane.out, 16);
}

DEVICE void copy_async(void* shared, const void* global, bool there) { simt::copy_async(shared, global, 16, there); }
DEVICE void copy_async_word(void* shared, const void* global) { simt::copy_async(shared, global, 4, true); }
DEVICE void copy_commit() { simt::copy_commit(); }
template <int PENDING>
DEVICE void copy_wait() {
    simt::copy_wait(PENDING);
}
DEVICE uint2 load_once(const uint2* p) { return *p; }
DEVICE uint4 load_once(const uint4* p) { return *p; }
