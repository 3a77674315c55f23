// How keys and values are kept in the cache, and what a tensor core makes of them.
//
//   keys, values  [block][kv head][token of the block][dim]   Bf16, F16: 2 bytes; Fp8 (e4m3), Int8 (code + 128): 1 byte;
//                                                             zeros from head_dim, or value_dim, to dim
//   scales        [block][kv head][keys, values][dim / 32][token of the block] bf16, Int8 alone:
//                 a number is scale * code, scale = amax / 127 of its 32, as on the CPU
//
// Bytes become 16-bit numbers on their way from shared memory to the tensor core, each exactly: Int8's codes as bf16,
// whose range the weights times scales need; e4m3 shifted into f16, which makes it smaller by 2^8 and no less exact
// (HMMA takes subnormals): scores and outputs are scaled back. Queries and weights are rounded to the type of the
// product. NaN is lost in e4m3's shift; a model that makes it has it in its residual stream too.
#pragma once

#include "prims.cuh"

DEVICE uint32_t byte_of(uint32_t word, int i) { return word >> (8 * i) & 0xffu; }

// To the nearest e4m3 (even at ties), at most 448 in size.
DEVICE uint8_t e4m3_of(float x) {
    const float size = fminf(fabsf(x), 448.0f);
    const uint32_t sign = x < 0.0f ? 0x80u : 0u;
    if (x != x) {
        return 0x7f;
    }
    if (size < 0.015625f) {
        // Subnormal: multiples of 2^-9; eight of them are the smallest normal number, and its code.
        return static_cast<uint8_t>(sign | static_cast<uint32_t>(rintf(size * 512.0f)));
    }
    const uint32_t bits = bits_of(size);
    return static_cast<uint8_t>(sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - ((127 - 7) << 3)));
}

struct Bf16 {
    // Of a number in the cache.
    static constexpr int BYTES = 2;
    // The product's type has the range of f32.
    static constexpr bool WIDE = true;
    static constexpr bool SCALED = false;
    // What the product takes is smaller by it.
    static constexpr float SHRUNK = 1.0f;
    DEVICE uint32_t pair(float low, float high) { return bf16_pair(low, high); }
    DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_bf16(c, a, b0, b1);
    }
    DEVICE uint32_t expand(uint32_t, int, int) { return 0; }
};

struct F16 {
    static constexpr int BYTES = 2;
    static constexpr bool WIDE = false;
    static constexpr bool SCALED = false;
    static constexpr float SHRUNK = 1.0f;
    DEVICE uint32_t pair(float low, float high) { return f16_pair(low, high); }
    DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_f16(c, a, b0, b1);
    }
    DEVICE uint32_t expand(uint32_t, int, int) { return 0; }
};

struct Fp8 {
    static constexpr int BYTES = 1;
    static constexpr bool WIDE = false;
    static constexpr bool SCALED = false;
    static constexpr float SHRUNK = 256.0f;
    DEVICE uint32_t pair(float low, float high) { return f16_pair(low, high); }
    DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_f16(c, a, b0, b1);
    }
    // Bytes i and j of a word as two numbers the product takes.
    DEVICE uint32_t expand(uint32_t word, int i, int j) {
        const uint32_t high = byte_of(word, i) << 8 | byte_of(word, j) << 24;
        return (high & 0x80008000u) | (high >> 1 & 0x3f803f80u);
    }
};

struct Int8 {
    static constexpr int BYTES = 1;
    static constexpr bool WIDE = true;
    static constexpr bool SCALED = true;
    static constexpr float SHRUNK = 1.0f;
    DEVICE uint32_t pair(float low, float high) { return bf16_pair(low, high); }
    DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_bf16(c, a, b0, b1);
    }
    DEVICE uint32_t expand(uint32_t word, int i, int j) {
        // 2^23 + byte as an f32, less 2^23 + 128: eight bits at most, so bf16 holds it.
        return bf16_pair(float_of(0x4b000000u | byte_of(word, i)) - 8388736.0f,
                         float_of(0x4b000000u | byte_of(word, j)) - 8388736.0f);
    }
};
