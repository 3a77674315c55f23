// Float weights as tensor cores take them, a step of 16 columns at a time, and the products of a step.
//
// A matrix lies as [tile of 16 outputs][step of 16 columns][lane 4 g + t], filled up with zeros on both sides, then
//
//   bf16  4 words: outputs g and g + 8 of columns 2t, 2t + 1; the same of columns 8 + 2t, 9 + 2t
//   f16   8 values: for each half of the step, output g and g + 8 of column t; the same of column 4 + t
//   f32   8 values, as f16
//
// multiply_step adds 16 outputs of a tile for 8 rows of activations, `x` being the step's columns of row g:
//
//   bf16  mma m16n8k16, activations rounded to bf16
//   f16   2 × mma m16n8k8 in tf32: f16 weights are exact in it, activations keep 11 bits and the range of f32
//   f32   3 × as many in tf32: weight and activation each as the sum of two tf32 values, the smallest product left out
//         (Ootomo & Yokota 2022, arXiv:2203.03341)
#pragma once

#include "prims.cuh"

enum Kind { BRAIN, HALF, SINGLE };

template <int KIND>
struct Step {
    uint4 words[KIND == SINGLE ? 2 : 1];
};

template <int KIND>
DEVICE void load_step(Step<KIND>& step, const void* weights, size_t place, uint32_t lane) {
    constexpr int WORDS = KIND == SINGLE ? 2 : 1;
    const uint4* words = static_cast<const uint4*>(weights) + (place * 32 + lane) * WORDS;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        step.words[i] = load_once(words + i);
    }
}

DEVICE void multiply_step(float (&acc)[4], const Step<BRAIN>& step, const float* x, uint32_t t) {
    const float2 low = *reinterpret_cast<const float2*>(x + 2 * t);
    const float2 high = *reinterpret_cast<const float2*>(x + 8 + 2 * t);
    const uint32_t a[4] = {step.words[0].x, step.words[0].y, step.words[0].z, step.words[0].w};
    mma_bf16(acc, a, bf16_pair(low.x, low.y), bf16_pair(high.x, high.y));
}

DEVICE void multiply_step(float (&acc)[4], const Step<HALF>& step, const float* x, uint32_t t) {
    const uint32_t words[4] = {step.words[0].x, step.words[0].y, step.words[0].z, step.words[0].w};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t pair = words[half * 2 + i / 2];
            a[i] = tf32_bits(f32_of_f16(static_cast<uint16_t>(i % 2 == 0 ? pair & 0xffffu : pair >> 16)));
        }
        mma_tf32(acc, a, tf32_bits(x[half * 8 + t]), tf32_bits(x[half * 8 + 4 + t]));
    }
}

DEVICE void multiply_step(float (&acc)[4], const Step<SINGLE>& step, const float* x, uint32_t t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 words = step.words[half];
        const float w[4] = {float_of(words.x), float_of(words.y), float_of(words.z), float_of(words.w)};
        uint32_t a[4], a_rest[4], b[2], b_rest[2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] = tf32_bits(w[i]);
            a_rest[i] = tf32_bits(w[i] - float_of(a[i]));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float value = x[half * 8 + 4 * i + t];
            b[i] = tf32_bits(value);
            b_rest[i] = tf32_bits(value - float_of(b[i]));
        }
        mma_tf32(acc, a_rest, b[0], b[1]);
        mma_tf32(acc, a, b_rest[0], b_rest[1]);
        mma_tf32(acc, a, b[0], b[1]);
    }
}
