// Linear layers with bf16, f16 and f32 weights on tensor cores. linear.cuh has tiles, slices and the order of sums.
// Reference: reference::linear, to the precision of the products.
//
// Weights lie, and are multiplied, as float_steps.cuh says. Rows of activations are filled up with zeros to a multiple of
// 32.
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
#include "float_steps.cuh"
#include "linear_staged.cuh"

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
