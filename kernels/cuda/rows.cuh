// Rows in the form a linear layer reads, as a block writes them: f32, groups of 32 in 8 bits, or both.
//
//   values  [row][padded]        f32, zeros from `cols` to `padded` (a multiple of 32)
//   q       [row][padded]        i8
//   scale   [row][padded / 32]   f32: x = scale * q, scale = amax / 127
//   sum     [row][padded / 32]   f32: scale * sum of q, for weights with a minimum
//
// Rounding is that of kernels/src/cpu/rows.rs, bit for bit: reference::quantize_row.
#pragma once

#include "prims.cuh"

struct RowsOut {
    float* values;
    int8_t* q;
    float* scale;
    float* sum;
};

// A warp writes values of one group: `x` is lane's, zero beyond the row's end.
DEVICE void put_group(const RowsOut& out, uint32_t row, uint32_t group, uint32_t groups, uint32_t lane, float x) {
    const size_t place = static_cast<size_t>(row) * groups + group;
    if (out.values != nullptr) {
        out.values[place * 32 + lane] = x;
    }
    if (out.q != nullptr) {
        float amax = warp_max(fabsf(x));
        amax = amax < 1e-30f ? 0.0f : amax;
        const float inverse = amax == 0.0f ? 0.0f : 127.0f / amax;
        const float rounded = rintf(x * inverse);
        out.q[place * 32 + lane] = static_cast<int8_t>(rounded);
        // Whole numbers below 2^12: exact in any order.
        const float sum = warp_sum(rounded);
        if (lane == 0) {
            out.scale[place] = amax / 127.0f;
            out.sum[place] = amax / 127.0f * sum;
        }
    }
}

// Sum of one value a thread over the block's 8 warps, in an order of its own; `shared` holds 8 values.
DEVICE float block_sum(float x, float* shared) {
    x = warp_sum(x);
    sync_block();
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x;
    }
    sync_block();
    float sum = shared[0];
    for (uint32_t warp = 1; warp < blockDim.x / 32; warp++) {
        sum = sum + shared[warp];
    }
    return sum;
}
