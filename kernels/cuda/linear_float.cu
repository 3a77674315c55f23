// Linear layers with bf16, f16 and f32 weights on tensor cores. linear.cuh has tiles, slices and the order of sums.
// Reference: reference::linear, to the precision of the products.
//
//   bf16  mma m16n8k16, activations rounded to bf16
//   f16   2 × mma m16n8k8 in tf32: f16 weights are exact in it, activations keep 11 bits and the range of f32
//   f32   3 × as many in tf32: weight and activation each as the sum of two tf32 values, the smallest product left out
//         (Ootomo & Yokota 2022, arXiv:2203.03341)
//
// Weights lie as the tensor core takes them: [tile of 16 outputs][step of 16 columns][lane 4 g + t], then
//
//   bf16  4 words: outputs g and g + 8 of columns 2t, 2t + 1; the same of columns 8 + 2t, 9 + 2t
//   f16   8 values: for each half of the step, output g and g + 8 of column t; the same of column 4 + t
//   f32   8 values, as f16
//
// Columns are filled up with zeros to a multiple of 16, rows of activations with zeros to a multiple of 32.
//
// 256 threads; 1 × 1 for up to 8 rows, 2 × 4 above: 32 sums a thread, 128 registers or fewer, 2 blocks an SM.
// linear_staged.cuh is for rows and outputs enough to fill the GPU with blocks of 128 × 64.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   linear_brain_1x1       32  33  33  34    8  6  6  6     512  256
//   linear_brain_2x4       85  85  85  92    2  2  2  2    4096  256
//   linear_half_1x1        32  34  34  35    8  6  6  6     512  256
//   linear_half_2x4        86  86  86  92    2  2  2  2    4096  256
//   linear_single_1x1      45  45  45  45    5  5  5  5     512  256
//   linear_single_2x4     107 107 107 110    2  2  2  2    4096  256
//   linear_brain_staged   142 142 142 140    1  1  1  1   40960  256
//   linear_half_staged    141 141 141 140    1  1  1  1   40960  256
//   linear_single_staged  147 147 147 145    1  1  1  1   57344  256
#include "linear_staged.cuh"

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

template <int KIND, int MT, int NT>
DEVICE void multiply_floats(const void* weights, uint32_t steps, uint32_t tiles, const float* x, uint32_t x_stride,
                            const LinearOut& o) {
    DYNAMIC_SHARED(float, shared);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float acc[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                acc[m][n][i] = 0.0f;
            }
        }
    }
    const auto place = [&](int m, uint32_t step) {
        const uint32_t tile = blockIdx.x * MT + m;
        return static_cast<size_t>(tile < tiles ? tile : tiles - 1) * steps + step;
    };
    Step<KIND> next[MT];
    if (warp < steps) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            load_step<KIND>(next[m], weights, place(m, warp), lane);
        }
    }
    for (uint32_t step = warp; step < steps; step += SLICES) {
        Step<KIND> now[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            now[m] = next[m];
            if (step + SLICES < steps) {
                load_step<KIND>(next[m], weights, place(m, step + SLICES), lane);
            }
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const size_t row = blockIdx.y * NT * 8 + n * 8 + lane / 4;
            const float* values = x + row * x_stride + step * 16;
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply_step(acc[m][n], now[m], values, lane % 4);
            }
        }
    }
    finish_tile<MT, NT>(acc, shared, o);
}

// A stage of linear_staged.cuh: words of weights; rows of 16 f32, 96 bytes apart: the float2s that half a warp reads lie
// in different banks.
template <int KIND>
struct FloatSource {
    const uint8_t* weights;
    uint32_t steps, tiles;
    const float* x;
    uint32_t x_stride;

    static constexpr uint32_t WORDS = KIND == SINGLE ? 2 : 1, TILE_BYTES = WORDS * 512, ROW = 96;
    static constexpr uint32_t AT_X = STAGED_TILES * TILE_BYTES, STAGE = AT_X + STAGED_ROWS * ROW;

    DEVICE_METHOD void fetch(uint8_t* stage, uint32_t step) const {
        each_piece(AT_X / 16, [&](uint32_t i) {
            const uint32_t tile = i / (TILE_BYTES / 16), piece = i % (TILE_BYTES / 16) * 16;
            // A tile beyond the last repeats it: its results are not written.
            const uint32_t at = blockIdx.x * STAGED_TILES + tile;
            const size_t place = static_cast<size_t>(at < tiles ? at : tiles - 1) * steps + step;
            copy_async(stage + i * 16, weights + place * TILE_BYTES + piece, true);
        });
        each_piece(STAGED_ROWS * 4, [&](uint32_t i) {
            const float* row = x + static_cast<size_t>(blockIdx.y * STAGED_ROWS + i / 4) * x_stride;
            copy_async(stage + AT_X + i / 4 * ROW + i % 4 * 16, row + step * 16 + i % 4 * 4, true);
        });
    }

    DEVICE_METHOD void multiply(float (&acc)[2][4][4], const uint8_t* stage, uint32_t tile, uint32_t row) const {
        const uint32_t lane = threadIdx.x % 32;
        Step<KIND> of_tile[2];
#pragma unroll
        for (uint32_t m = 0; m < 2; m++) {
#pragma unroll
            for (uint32_t i = 0; i < WORDS; i++) {
                of_tile[m].words[i] =
                    reinterpret_cast<const uint4*>(stage + (tile + m) * TILE_BYTES)[lane * WORDS + i];
            }
        }
#pragma unroll
        for (uint32_t n = 0; n < 4; n++) {
            const float* values = reinterpret_cast<const float*>(stage + AT_X + (row + n * 8 + lane / 4) * ROW);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply_step(acc[m][n], of_tile[m], values, lane % 4);
            }
        }
    }
};

#define STAGED_FLOATS(name, kind)                                                                                     \
    KERNEL((256, 1), name, const uint8_t* weights, uint32_t steps, uint32_t tiles, const float* x, uint32_t x_stride, \
           float* out, uint32_t rows, uint32_t outputs, uint32_t stride, uint32_t first, uint32_t add) {              \
        const FloatSource<kind> source = {weights, steps, tiles, x, x_stride};                                        \
        multiply_staged(source, steps, {out, rows, outputs, stride, first, add});                                     \
    }

STAGED_FLOATS(linear_brain_staged, BRAIN)
STAGED_FLOATS(linear_half_staged, HALF)
STAGED_FLOATS(linear_single_staged, SINGLE)

#define FLOATS(name, bounds, kind, mt, nt)                                                                           \
    KERNEL(bounds, name, const void* weights, uint32_t steps, uint32_t tiles, const float* x, uint32_t x_stride,     \
           float* out, uint32_t rows, uint32_t outputs, uint32_t stride, uint32_t first, uint32_t add) {             \
        multiply_floats<kind, mt, nt>(weights, steps, tiles, x, x_stride, {out, rows, outputs, stride, first, add}); \
    }

FLOATS(linear_brain_1x1, (256, 4), BRAIN, 1, 1)
FLOATS(linear_brain_2x4, (256, 2), BRAIN, 2, 4)
FLOATS(linear_half_1x1, (256, 4), HALF, 1, 1)
FLOATS(linear_half_2x4, (256, 2), HALF, 2, 4)
FLOATS(linear_single_1x1, (256, 2), SINGLE, 1, 1)
FLOATS(linear_single_2x4, (256, 2), SINGLE, 2, 4)
