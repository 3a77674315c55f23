// Row norms. rms_norm (+ selection of rows) and layer_norm write rows for a linear layer; rms_norm_in_place norms
// parts of a row where they are. References: reference::rms_norm, reference::layer_norm.
//
//   grid (rows) or (rows, parts), 256 threads: warp w takes groups w, w + 8, ... of 32 columns. A row is read twice
//   and lies in the first-level cache the second time (16 KiB at 4,096 columns). 40 registers or fewer, 32 bytes of
//   shared memory: the 2,048 threads of an SM are the limit, and bandwidth long before.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   rms_norm            27  30  30  27    8  6  6  8      32  256
//   layer_norm          28  31  31  27    8  6  6  8      32  256
//   rms_norm_in_place   24  26  26  24    8  6  6  8      32  256
#include "rows.cuh"

KERNEL((256), rms_norm, const float* x, const uint32_t* select, const float* weight, uint32_t cols, float eps,
       float* values, int8_t* q, float* scale, float* sum) {
    DYNAMIC_SHARED(float, shared);
    const uint32_t row = blockIdx.x, lane = threadIdx.x % 32, groups = (cols + 31) / 32;
    const float* in = x + static_cast<size_t>(select == nullptr ? row : select[row]) * cols;
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) {
        squares = fmaf(in[i], in[i], squares);
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, shared) / static_cast<float>(cols) + eps);
    for (uint32_t group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        const uint32_t i = group * 32 + lane;
        const float y = i < cols ? in[i] * factor * weight[i] : 0.0f;
        put_group({values, q, scale, sum}, row, group, groups, lane, y);
    }
}

KERNEL((256), layer_norm, const float* x, const uint32_t* select, const float* weight, const float* bias,
       uint32_t cols, float eps, float* values, int8_t* q, float* scale, float* sum) {
    DYNAMIC_SHARED(float, shared);
    const uint32_t row = blockIdx.x, lane = threadIdx.x % 32, groups = (cols + 31) / 32;
    const float* in = x + static_cast<size_t>(select == nullptr ? row : select[row]) * cols;
    float total = 0.0f;
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) {
        total = total + in[i];
    }
    const float mean = block_sum(total, shared) / static_cast<float>(cols);
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x; i < cols; i += blockDim.x) {
        squares = fmaf(in[i] - mean, in[i] - mean, squares);
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, shared) / static_cast<float>(cols) + eps);
    for (uint32_t group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        const uint32_t i = group * 32 + lane;
        float y = 0.0f;
        if (i < cols) {
            y = (in[i] - mean) * factor * weight[i] + (bias == nullptr ? 0.0f : bias[i]);
        }
        put_group({values, q, scale, sum}, row, group, groups, lane, y);
    }
}

// Columns first + part * width .. of each row, `width` being the weight's.
KERNEL((256), rms_norm_in_place, float* x, const float* weight, uint32_t stride, uint32_t first, uint32_t width,
       float eps) {
    DYNAMIC_SHARED(float, shared);
    float* in = x + static_cast<size_t>(blockIdx.x) * stride + first + blockIdx.y * width;
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        squares = fmaf(in[i], in[i], squares);
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, shared) / static_cast<float>(width) + eps);
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
        in[i] = in[i] * factor * weight[i];
    }
}
