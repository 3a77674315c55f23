// Token embeddings: rows of a table that lies as a linear layer's weights do (linear_quantised.cu, linear_float.cu),
// so that tied tables are kept once. Reference: reference::weights.
//
//   grid (rows), 256 threads over the columns. A row is spread over its tile: each 32-byte sector read holds one or two
//   words of it, so a row costs 4 to 16 times its bytes; at thousands of columns and one row a token that is nothing
//   beside the layers. 32 registers or fewer.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   embed   17  17  17  19    8  6  6  8       0  256
#include "prims.cuh"

// `layout` numbers rill_kernels::cuda's weight layouts: 4 and 8 bits, bf16, f16, f32. `steps`: groups of 32 or 16.
KERNEL((256), embed, const void* codes, const void* scales, uint32_t layout, uint32_t steps, const uint32_t* ids,
       float scale, uint32_t cols, float* out) {
    const uint32_t id = ids[blockIdx.x], tile = id / 16, r = id % 16, g = r % 8, h = r / 8;
    float* to = out + static_cast<size_t>(blockIdx.x) * cols;
    for (uint32_t col = threadIdx.x; col < cols; col += blockDim.x) {
        float x;
        if (layout < 2) {
            const size_t place = static_cast<size_t>(tile) * steps + col / 32;
            const uint32_t k = col % 32, t = k % 16 / 4, b = k % 4;
            const uint8_t* bytes = static_cast<const uint8_t*>(codes);
            if (layout == 0) {
                const uint8_t byte = bytes[((place * 32 + g * 4 + t) * 2 + h) * 4 + b];
                const uint32_t pair = static_cast<const uint32_t*>(scales)[place * 16 + r];
                x = fmaf(static_cast<float>(k < 16 ? byte & 15 : byte >> 4),
                         f32_of_f16(static_cast<uint16_t>(pair & 0xffffu)),
                         f32_of_f16(static_cast<uint16_t>(pair >> 16)));
            } else {
                const int8_t code = static_cast<int8_t>(bytes[((place * 32 + g * 4 + t) * 4 + k / 16 * 2 + h) * 4 + b]);
                x = static_cast<float>(code) * f32_of_f16(static_cast<const uint16_t*>(scales)[place * 16 + r]);
            }
        } else {
            const size_t place = static_cast<size_t>(tile) * steps + col / 16;
            const uint32_t k = col % 16, half = k / 8;
            if (layout == 2) {
                const size_t lane = place * 32 + g * 4 + k % 8 / 2;
                x = f32_of_bf16(static_cast<const uint16_t*>(codes)[(lane * 4 + half * 2 + h) * 2 + k % 2]);
            } else {
                const size_t at = (place * 32 + g * 4 + k % 4) * 8 + half * 4 + k % 8 / 4 * 2 + h;
                x = layout == 3 ? f32_of_f16(static_cast<const uint16_t*>(codes)[at])
                                : static_cast<const float*>(codes)[at];
            }
        }
        to[col] = scale == 1.0f ? x : x * scale;
    }
}
