// Feed-forward nonlinearities, fused with putting the result into the form the next linear layer reads.
// References: reference::activate, reference::gated.
//
//   grid (rows), 256 threads: warp w takes groups w, w + 8, ... of 32 columns; the gate's and up's values of a group
//   are one 128-byte line each. 32 registers or fewer, no shared memory: bandwidth is the limit.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   activate   24  27  27  25    8  6  6  8       0  256
//   to_rows    26  27  27  26    8  6  6  8       0  256
#include "rows.cuh"

// x / (1 + 2^power); past 2^126 the quotient is zero.
DEVICE float over_one_plus(float x, float power) { return x / (1.0f + exp2_fast(fminf(power, 126.0f))); }

// `kind` numbers rill_kernels::Activation.
DEVICE float activation(uint32_t kind, float x) {
    switch (kind) {
        case 0:
            return over_one_plus(x, x * -LOG2_E);
        case 1: {
            // Abramowitz & Stegun 7.1.26, as on the CPU.
            const float z = fabsf(x) * 0.70710678f;
            const float t = 1.0f / fmaf(z, 0.3275911f, 1.0f);
            float p = 1.0614054f;
            p = fmaf(p, t, -1.453152f);
            p = fmaf(p, t, 1.4214137f);
            p = fmaf(p, t, -0.2844967f);
            p = fmaf(p, t, 0.2548296f);
            const float tail = p * t * exp2_fast(z * z * -LOG2_E);
            return fmaxf(x, 0.0f) + fabsf(x) * -0.5f * tail;
        }
        case 2: {
            const float inner = fmaf(x * x, 0.044715f, 1.0f);
            return over_one_plus(x, x * inner * (-2.0f * 0.7978846f * LOG2_E));
        }
        // Comparisons that keep a NaN.
        case 3:
            return x < 0.0f ? 0.0f : x;
        default:
            return x < 0.0f ? 0.0f : x * x;
    }
}

// Rows of `stride` values: `cols` to apply the function to, then, where `gated`, as many to multiply with.
KERNEL((256), activate, const float* x, uint32_t stride, uint32_t cols, uint32_t kind, uint32_t gated, float* values,
       int8_t* q, float* scale, float* sum) {
    const uint32_t row = blockIdx.x, lane = threadIdx.x % 32, groups = (cols + 31) / 32;
    const float* in = x + static_cast<size_t>(row) * stride;
    for (uint32_t group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        const uint32_t i = group * 32 + lane;
        float y = 0.0f;
        if (i < cols) {
            y = activation(kind, in[i]);
            if (gated != 0) {
                y = y * in[cols + i];
            }
        }
        put_group({values, q, scale, sum}, row, group, groups, lane, y);
    }
}

// Rows as they are, or those `select` names.
KERNEL((256), to_rows, const float* x, const uint32_t* select, uint32_t cols, float* values, int8_t* q, float* scale,
       float* sum) {
    const uint32_t row = blockIdx.x, lane = threadIdx.x % 32, groups = (cols + 31) / 32;
    const float* in = x + static_cast<size_t>(select == nullptr ? row : select[row]) * cols;
    for (uint32_t group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        const uint32_t i = group * 32 + lane;
        put_group({values, q, scale, sum}, row, group, groups, lane, i < cols ? in[i] : 0.0f);
    }
}
