// What is done to f32 activations value by value: biases, sums, copied columns, scattered rows. Their definition is
// their reference.
//
//   grid (rows), 256 threads over the columns; no two blocks write one row, so nothing is atomic. 20 registers or
//   fewer: bandwidth is the limit.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   add_bias       12  12  12  16    8  6  6  8       0  256
//   add_scaled     12  12  12  12    8  6  6  8       0  256
//   copy_columns   12  12  12  12    8  6  6  8       0  256
//   scatter_add    16  16  16  16    8  6  6  8       0  256
#include "prims.cuh"

KERNEL((256), add_bias, float* x, const float* bias, uint32_t cols) {
    float* row = x + static_cast<size_t>(blockIdx.x) * cols;
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) {
        row[i] = row[i] + bias[i];
    }
}

KERNEL((256), add_scaled, float* out, const float* x, float scale, uint32_t cols) {
    const size_t first = static_cast<size_t>(blockIdx.x) * cols;
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) {
        out[first + i] = out[first + i] + scale * x[first + i];
    }
}

// Run i of `count` runs of `width` columns goes from column from + i * from_step of x to to + i * to_step of out.
KERNEL((256), copy_columns, float* out, const float* x, uint32_t out_cols, uint32_t cols, uint32_t count,
       uint32_t width, uint32_t to, uint32_t to_step, uint32_t from, uint32_t from_step) {
    float* target = out + static_cast<size_t>(blockIdx.x) * out_cols + to;
    const float* source = x + static_cast<size_t>(blockIdx.x) * cols + from;
    for (uint32_t i = threadIdx.x; i < count * width; i += blockDim.x) {
        const uint32_t run = i / width, column = i % width;
        target[run * to_step + column] = source[run * from_step + column];
    }
}

// Row rows[r] of out += scales[r] * row r of x; no two of `rows` are the same.
KERNEL((256), scatter_add, float* out, const float* x, const uint32_t* rows, const float* scales, uint32_t cols) {
    const uint32_t row = blockIdx.x;
    float* to = out + static_cast<size_t>(rows[row]) * cols;
    const float* from = x + static_cast<size_t>(row) * cols;
    const float scale = scales[row];
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) {
        to[i] = to[i] + scale * from[i];
    }
}
