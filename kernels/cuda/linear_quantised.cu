// Linear layers with 4- and 8-bit weights: an exact integer product a group of 32 columns (mma m16n8k32, one a group),
// scaled and added in f32. linear.cuh has tiles, slices and the order of sums. Reference: reference::linear.
//
// Weights lie as the tensor core takes them, lane by lane (4 g + t), tile by tile of 16 outputs, group by group:
//
//   four   codes   [tile][group][lane] 2 words: outputs g and g + 8; a byte's low nibble is column 4t + b of the group,
//                                      its high nibble column 16 + 4t + b           (256 B a group: one line pair)
//          scales  [tile][group][16] f16 d, f16 m                                   weight = d * code + m
//   eight  codes   [tile][group][lane] 4 words: outputs g, g + 8 of columns 4t + b, then of columns 16 + 4t + b
//          scales  [tile][group][16] f16 d                                          weight = d * code (signed)
//
// Rows of activations: rows.cuh. Those up to the next multiple of 64 exist and may hold anything.
//
// 256 threads. The small tile (1 × 1) is for up to 8 rows: its bounds ask for 4 blocks an SM, 64 registers, and it takes
// fewer, for 6, each with 8 slices × 2 groups (320 B) on their way. The large tile (2 × 4) keeps 32 sums a thread: 128 registers or
// fewer, 2 blocks. linear_staged.cuh is for rows and outputs enough to fill the GPU with blocks of 128 × 64.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   linear_four_1x1       39  39  39  40    6  6  6  6     512  256
//   linear_four_2x4      116 106 106 114    2  2  2  2    4096  256
//   linear_eight_1x1      39  39  39  39    6  6  6  6     512  256
//   linear_eight_2x4     128 115 115 127    2  2  2  2    4096  256
//   linear_four_staged   157 150 150 152    1  1  1  1   24576  256
//   linear_eight_staged  154 148 148 149    1  1  1  1   31744  256
#include "linear_staged.cuh"

struct Activations {
    const int8_t* q;
    const float* scale;
    const float* sum;
};

// One group of 16 outputs, as loaded.
template <int BITS>
struct Group;
template <>
struct Group<4> {
    uint2 codes;
    uint32_t scales[2];
};
template <>
struct Group<8> {
    uint4 codes;
    uint16_t scales[2];
};

DEVICE void load_group(Group<4>& group, const void* codes, const void* scales, size_t place, uint32_t lane) {
    group.codes = load_once(static_cast<const uint2*>(codes) + place * 32 + lane);
    const uint32_t* pairs = static_cast<const uint32_t*>(scales) + place * 16;
    group.scales[0] = pairs[lane / 4];
    group.scales[1] = pairs[lane / 4 + 8];
}
DEVICE void load_group(Group<8>& group, const void* codes, const void* scales, size_t place, uint32_t lane) {
    group.codes = load_once(static_cast<const uint4*>(codes) + place * 32 + lane);
    const uint16_t* values = static_cast<const uint16_t*>(scales) + place * 16;
    group.scales[0] = values[lane / 4];
    group.scales[1] = values[lane / 4 + 8];
}
// The same from a stage.
DEVICE void read_group(Group<4>& group, const uint8_t* codes, const uint8_t* scales, uint32_t lane) {
    group.codes = reinterpret_cast<const uint2*>(codes)[lane];
    group.scales[0] = reinterpret_cast<const uint32_t*>(scales)[lane / 4];
    group.scales[1] = reinterpret_cast<const uint32_t*>(scales)[lane / 4 + 8];
}
DEVICE void read_group(Group<8>& group, const uint8_t* codes, const uint8_t* scales, uint32_t lane) {
    group.codes = reinterpret_cast<const uint4*>(codes)[lane];
    group.scales[0] = reinterpret_cast<const uint16_t*>(scales)[lane / 4];
    group.scales[1] = reinterpret_cast<const uint16_t*>(scales)[lane / 4 + 8];
}
DEVICE void fragments(const Group<4>& group, uint32_t (&a)[4]) {
    a[0] = group.codes.x & 0x0f0f0f0fu;
    a[1] = group.codes.y & 0x0f0f0f0fu;
    a[2] = group.codes.x >> 4 & 0x0f0f0f0fu;
    a[3] = group.codes.y >> 4 & 0x0f0f0f0fu;
}
DEVICE void fragments(const Group<8>& group, uint32_t (&a)[4]) {
    a[0] = group.codes.x;
    a[1] = group.codes.y;
    a[2] = group.codes.z;
    a[3] = group.codes.w;
}
DEVICE float scale_of(const Group<4>& group, int half) {
    return f32_of_f16(static_cast<uint16_t>(group.scales[half] & 0xffffu));
}
DEVICE float scale_of(const Group<8>& group, int half) { return f32_of_f16(group.scales[half]); }
DEVICE float minimum_of(const Group<4>& group, int half) {
    return f32_of_f16(static_cast<uint16_t>(group.scales[half] >> 16));
}
DEVICE float minimum_of(const Group<8>&, int) { return 0.0f; }

// 16 outputs, 8 rows, 32 columns.
template <int BITS>
DEVICE void multiply_group(float (&acc)[4], const Group<BITS>& group, uint32_t b0, uint32_t b1, const float (&scale)[2],
                           const float (&sum)[2]) {
    uint32_t a[4];
    fragments(group, a);
    int32_t dot[4] = {0, 0, 0, 0};
    mma_s8(dot, a, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        acc[i] = fmaf(static_cast<float>(dot[i]), scale_of(group, i / 2) * scale[i % 2], acc[i]);
        if (BITS == 4) {
            acc[i] = fmaf(minimum_of(group, i / 2), sum[i % 2], acc[i]);
        }
    }
}

template <int BITS, int MT, int NT>
DEVICE void multiply(const void* codes, const void* scales, uint32_t groups, uint32_t tiles, const Activations& x,
                     const LinearOut& o) {
    DYNAMIC_SHARED(float, shared);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t row_tile = blockIdx.y * NT * 8;
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
    // The next group's weights are on their way while this one's are multiplied.
    Group<BITS> next[MT];
    // A tile beyond the last repeats it: its results are not written.
    const auto place = [&](int m, uint32_t group) {
        const uint32_t tile = blockIdx.x * MT + m;
        return static_cast<size_t>(tile < tiles ? tile : tiles - 1) * groups + group;
    };
    if (warp < groups) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            load_group(next[m], codes, scales, place(m, warp), lane);
        }
    }
    for (uint32_t group = warp; group < groups; group += SLICES) {
        Group<BITS> now[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            now[m] = next[m];
            if (group + SLICES < groups) {
                load_group(next[m], codes, scales, place(m, group + SLICES), lane);
            }
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const size_t row = row_tile + n * 8 + g;
            const uint32_t* q = reinterpret_cast<const uint32_t*>(x.q + (row * groups + group) * 32);
            const uint32_t b0 = q[t], b1 = q[t + 4];
            float scale[2], sum[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const size_t at = static_cast<size_t>(row_tile + n * 8 + 2 * t + i) * groups + group;
                scale[i] = x.scale[at];
                sum[i] = BITS == 4 ? x.sum[at] : 0.0f;
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply_group<BITS>(acc[m][n], now[m], b0, b1, scale, sum);
            }
        }
    }
    finish_tile<MT, NT>(acc, shared, o);
}

// A stage of linear_staged.cuh: codes, their scales, rows of activations (48 bytes apart: the 8 rows a fragment reads
// lie in different banks), their scales and sums.
template <int BITS>
struct QuantisedSource {
    const uint8_t *codes, *scales;
    uint32_t groups, tiles;
    Activations x;

    static constexpr uint32_t CODES = BITS * 64, SCALES = BITS == 4 ? 64 : 32, ROW = 48;
    static constexpr uint32_t AT_SCALES = STAGED_TILES * CODES, AT_Q = AT_SCALES + STAGED_TILES * SCALES;
    static constexpr uint32_t AT_SCALE = AT_Q + STAGED_ROWS * ROW, AT_SUM = AT_SCALE + STAGED_ROWS * 4;
    static constexpr uint32_t STAGE = AT_SUM + STAGED_ROWS * 4;

    DEVICE_METHOD void fetch(uint8_t* stage, uint32_t group) const {
        // A tile beyond the last repeats it: its results are not written.
        const auto place = [&](uint32_t tile) {
            const uint32_t at = blockIdx.x * STAGED_TILES + tile;
            return static_cast<size_t>(at < tiles ? at : tiles - 1) * groups + group;
        };
        each_piece(STAGED_TILES * CODES / 16, [&](uint32_t i) {
            const uint32_t tile = i / (CODES / 16), piece = i % (CODES / 16) * 16;
            copy_async(stage + tile * CODES + piece, codes + place(tile) * CODES + piece, true);
        });
        each_piece(STAGED_TILES * SCALES / 16, [&](uint32_t i) {
            const uint32_t tile = i / (SCALES / 16), piece = i % (SCALES / 16) * 16;
            copy_async(stage + AT_SCALES + tile * SCALES + piece, scales + place(tile) * SCALES + piece, true);
        });
        const size_t first = blockIdx.y * STAGED_ROWS;
        each_piece(STAGED_ROWS * 2, [&](uint32_t i) {
            const int8_t* from = x.q + ((first + i / 2) * groups + group) * 32 + i % 2 * 16;
            copy_async(stage + AT_Q + i / 2 * ROW + i % 2 * 16, from, true);
        });
        each_piece(STAGED_ROWS, [&](uint32_t i) {
            const size_t at = (first + i) * groups + group;
            copy_async_word(stage + AT_SCALE + i * 4, x.scale + at);
            if (BITS == 4) {
                copy_async_word(stage + AT_SUM + i * 4, x.sum + at);
            }
        });
    }

    DEVICE_METHOD void multiply(float (&acc)[2][4][4], const uint8_t* stage, uint32_t tile, uint32_t row) const {
        const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        Group<BITS> weights[2];
#pragma unroll
        for (uint32_t m = 0; m < 2; m++) {
            read_group(weights[m], stage + (tile + m) * CODES, stage + AT_SCALES + (tile + m) * SCALES, lane);
        }
#pragma unroll
        for (uint32_t n = 0; n < 4; n++) {
            const uint32_t* q = reinterpret_cast<const uint32_t*>(stage + AT_Q + (row + n * 8 + g) * ROW);
            const float* scales_of = reinterpret_cast<const float*>(stage + AT_SCALE) + row + n * 8 + 2 * t;
            const float* sums_of = reinterpret_cast<const float*>(stage + AT_SUM) + row + n * 8 + 2 * t;
            const float scale[2] = {scales_of[0], scales_of[1]};
            const float sum[2] = {BITS == 4 ? sums_of[0] : 0.0f, BITS == 4 ? sums_of[1] : 0.0f};
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply_group<BITS>(acc[m][n], weights[m], q[t], q[t + 4], scale, sum);
            }
        }
    }
};

#define STAGED_QUANTISED(name, bits)                                                                           \
    KERNEL((256, 1), name, const uint8_t* codes, const uint8_t* scales, uint32_t groups, uint32_t tiles,       \
           const int8_t* q, const float* scale, const float* sum, float* out, uint32_t rows, uint32_t outputs, \
           uint32_t stride, uint32_t first, uint32_t add) {                                                    \
        const QuantisedSource<bits> source = {codes, scales, groups, tiles, {q, scale, sum}};                  \
        multiply_staged(source, groups, {out, rows, outputs, stride, first, add});                             \
    }

STAGED_QUANTISED(linear_four_staged, 4)
STAGED_QUANTISED(linear_eight_staged, 8)

#define QUANTISED(name, bounds, bits, mt, nt)                                                                     \
    KERNEL(bounds, name, const void* codes, const void* scales, uint32_t groups, uint32_t tiles, const int8_t* q, \
           const float* scale, const float* sum, float* out, uint32_t rows, uint32_t outputs, uint32_t stride,    \
           uint32_t first, uint32_t add) {                                                                        \
        const LinearOut to = {out, rows, outputs, stride, first, add};                                            \
        multiply<bits, mt, nt>(codes, scales, groups, tiles, {q, scale, sum}, to);                                \
    }

QUANTISED(linear_four_1x1, (256, 4), 4, 1, 1)
QUANTISED(linear_four_2x4, (256, 2), 4, 2, 4)
QUANTISED(linear_eight_1x1, (256, 4), 8, 1, 1)
QUANTISED(linear_eight_2x4, (256, 2), 8, 2, 4)
