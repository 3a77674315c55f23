// Linear layers for many rows: weights and activations come to shared memory through cp.async, in a pipeline, and each
// is read from there by several warps. The sums are those of linear.cuh, in its order.
//
//   block   128 outputs x 64 rows, 8 warps of 32 x 32: 4 x 2 of them
//   stage   one step (32 columns quantised, 16 otherwise): [8 tiles] weights, [64 rows] activations; 4 stages
//
// linear.cuh's slice w is the steps w, w + 8, ..., and its warps hold a slice each. Here a warp walks slice after slice
// for its own outputs and adds each to a total, which is the same sum: (s0 + s1) + s2 + ... So the walk over k goes in
// strides of 8 steps; each step's bytes are whole 32-byte sectors, read once a block.
//
//   intensity: a step brings 128 x 32 weights and 64 x 32 activations for 128 x 64 x 32 products: at 4 bits 43, at 8 bits
//   33 products a byte from the second-level cache, against 21 and 15 of the tile of 32 x 32; bf16 (activations f32) 13
//   against 5.
//   shared memory, KiB a block: 24 (4 bits), 31 (8), 40 (bf16, f16), 56 (f32); registers: two sums an output, 64,
//   and 140 to 157 in all: 1 block of 8 warps an SM. At 128, for two blocks, sums went to local memory.
#pragma once

#include "linear.cuh"

constexpr uint32_t STAGED_TILES = 8;
constexpr uint32_t STAGED_ROWS = 64;
constexpr uint32_t STAGES = 4;

// This thread's copies of `count` pieces of 16 bytes.
template <class F>
DEVICE void each_piece(uint32_t count, F copy) {
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        copy(i);
    }
}

// The step after `step` in the order of slices.
DEVICE uint32_t next_step(uint32_t step, uint32_t steps) {
    return step + SLICES < steps ? step + SLICES : step % SLICES + 1;
}

DEVICE void fold(float (&total)[2][4][4], float (&acc)[2][4][4], bool first) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[m][n][i] = first ? acc[m][n][i] : total[m][n][i] + acc[m][n][i];
                acc[m][n][i] = 0.0f;
            }
        }
    }
}

// `source` says what a stage holds: fetch(stage, step) sends for it, multiply(acc, stage, tile, row) takes 2 tiles from
// `tile` and 32 rows from `row` of it.
template <class S>
DEVICE void multiply_staged(const S& source, uint32_t steps, const LinearOut& o) {
    DYNAMIC_SHARED(uint8_t, shared);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t tile = warp % 4 * 2, row = warp / 4 * 32;
    float acc[2][4][4], total[2][4][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                acc[m][n][i] = total[m][n][i] = 0.0f;
            }
        }
    }
    uint32_t ahead = 0, sent = 0;
    for (; sent < STAGES - 1; sent++) {
        if (sent < steps) {
            source.fetch(shared + sent * S::STAGE, ahead);
            ahead = next_step(ahead, steps);
        }
        copy_commit();
    }
    uint32_t step = 0;
    for (uint32_t n = 0; n < steps; n++, sent++) {
        copy_wait<STAGES - 2>();
        // This stage is there for everybody, and the one before it is done with.
#ifndef PLANT_MISSING_SYNC
        sync_block();
#endif
        if (sent < steps) {
            source.fetch(shared + sent % STAGES * S::STAGE, ahead);
            ahead = next_step(ahead, steps);
        }
        copy_commit();
        source.multiply(acc, shared + n % STAGES * S::STAGE, tile, row);
        const uint32_t next = next_step(step, steps);
        if (next % SLICES != step % SLICES) {
            fold(total, acc, step % SLICES == 0);
        }
        step = next;
    }
    if (steps < SLICES) {
        // The slices that have no steps.
        fold(total, acc, false);
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t output = (blockIdx.x * STAGED_TILES + tile + m) * 16 + lane / 4 + i / 2 * 8;
                const uint32_t at = blockIdx.y * STAGED_ROWS + row + n * 8 + lane % 4 * 2 + i % 2;
                if (output < o.outputs && at < o.rows) {
                    float* place = o.out + static_cast<size_t>(at) * o.stride + o.first + output;
                    *place = o.add != 0 ? *place + total[m][n][i] : total[m][n][i];
                }
            }
        }
    }
}
