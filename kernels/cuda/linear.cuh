// What the linear kernels share: how a product is cut into blocks and slices, and in which order it is summed.
//
// A block computes 16 MT outputs for 8 NT rows of activations. Its 8 warps all compute that same tile, each over its
// own slice of the columns: warp w takes steps w, w + 8, ... (a step: 32 columns quantised, 16 columns otherwise), in
// ascending order, and the 8 partial sums are added in the order of warps. An output's bits depend on its own weights
// and its own row alone: MT and NT, which the number of rows decides, change nothing. So the kernel for one row and
// the kernel for thousands are one template, and tensor cores compute both: at one row 7 of 8 columns are idle, which
// costs nothing where memory is the limit.
#pragma once

#include "prims.cuh"

constexpr uint32_t SLICES = 8;

// Where results go. `outputs` is how many the matrix has: the last tile may hold fewer than 16.
struct LinearOut {
    float* out;
    uint32_t rows, outputs, stride, first, add;
};

// Adds the slices' sums in their order and writes the tile. `shared`: MT * NT * 128 values.
template <int MT, int NT>
DEVICE void finish_tile(float (&acc)[MT][NT][4], float* shared, const LinearOut& o) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t turn = 0; turn < SLICES; turn++) {
        if (warp == turn) {
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int n = 0; n < NT; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float* place = shared + ((m * NT + n) * 4 + i) * 32 + lane;
                        *place = turn == 0 ? acc[m][n][i] : *place + acc[m][n][i];
                    }
                }
            }
        }
        sync_block();
    }
    // Neighbouring threads write neighbouring outputs.
    const uint32_t tile = blockIdx.x * MT * 16, row_tile = blockIdx.y * NT * 8;
    for (uint32_t at = threadIdx.x; at < MT * NT * 128; at += blockDim.x) {
        const uint32_t output = at % (MT * 16), column = at / (MT * 16);
        const uint32_t m = output / 16, n = column / 8;
        const uint32_t i = output % 16 / 8 * 2 + column % 2, l = output % 8 * 4 + column % 8 / 2;
        const float sum = shared[((m * NT + n) * 4 + i) * 32 + l];
        if (tile + output < o.outputs && row_tile + column < o.rows) {
            float* place = o.out + static_cast<size_t>(row_tile + column) * o.stride + o.first + tile + output;
            *place = o.add != 0 ? *place + sum : sum;
        }
    }
}
