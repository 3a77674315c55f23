// Low-rank updates of linear layers (LoRA): out[row] += scale * B (A x[row]) for the rows of all adapters of a step, in
// two launches a layer, grouped as Punica's SGMV does it (Chen et al. 2023, arXiv:2310.18547). Reference:
// reference::low_rank.
//
// A job is up to 8 rows of the batch that run with one adapter; kernels/src/cuda/low_rank.rs lists them. A row's update
// is in one job alone, and no two updates share a row and an output, so nothing is atomic.
//
//   job    19 words: addresses of A and of B, 2 words each; whether both are f32, else bf16; tiles of 16 ranks; scale;
//          outputs; column of the first of them; rows; the job's place in `inner`; 8 rows
//   A      [tile of 16 ranks][step of 16 inputs][lane], B [tile of 16 outputs][step of 16 ranks][lane]: float_steps.cuh
//   x      [row of the batch][stride] f32, as rows.cuh writes it
//   inner  [row of the job][slice of 512 inputs][rank, up to a multiple of 16] f32
//
//   low_rank_shrink  grid (jobs, slices, most tiles of ranks), 256 threads: inner = A x over one slice, 16 ranks of 8
//                    rows. Warp w takes steps 4 w .. 4 w + 3 of the slice, all of A's on their way before the first
//                    product: 16 KiB of bf16 a block, so a block waits for its job and once for memory. 64 registers or
//                    fewer, 4 KiB of shared memory: 4 blocks an SM.
//   low_rank_grow    grid (jobs, blocks of 256 outputs), 256 threads, a warp two tiles of 16 outputs. The block adds the
//                    slices' sums, 64 ranks at a time, in shared memory (2.1 KiB). 64 registers or fewer, 4
//                    blocks an SM.
//
// Order of a row's sums, whatever else the step holds: inputs within a warp's 64, the 8 warps, slices, ranks, each
// ascending; slices begin at multiples of 512 whatever the number of rows. Products: x and inner in bf16 are the sum of two
// bf16 values, 16 bits of mantissa, which costs what one tf32 product would; in f32 as float_steps.cuh has it.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   low_rank_shrink   60  60  60  60    4  4  4  4    4096  256
//   low_rank_grow     62  62  62  62    4  4  4  4    2176  256
#include "float_steps.cuh"

constexpr uint32_t JOB_WORDS = 19, JOB_ROWS = 8;
constexpr uint32_t SLICE_STEPS = 32, WARP_STEPS = SLICE_STEPS / 8;
// Ranks in shared memory at once, and floats between its rows: those that a warp reads lie in different banks.
constexpr uint32_t RANKS_AT_ONCE = 64, RANKS_STRIDE = RANKS_AT_ONCE + 4;
// Tiles of outputs a warp.
constexpr int GROW_TILES = 2;

struct UpdateJob {
    const void *a, *b;
    uint32_t single, tiles;
    float scale;
    uint32_t outputs, first, rows, place;
    const uint32_t* row;
};

DEVICE const void* address_of(uint32_t low, uint32_t high) {
    return reinterpret_cast<const void*>(static_cast<uintptr_t>(high) << 32 | low);
}

// This block's job.
DEVICE UpdateJob update_job(const uint32_t* jobs) {
    const uint32_t* w = jobs + static_cast<size_t>(blockIdx.x) * JOB_WORDS;
    return {address_of(w[0], w[1]), address_of(w[2], w[3]), w[4], w[5], float_of(w[6]), w[7], w[8], w[9], w[10], w + 11};
}

// acc += weights * x as multiply_step, with more of x where weights are bf16.
DEVICE void multiply_closely(float (&acc)[4], const Step<BRAIN>& step, const float* x, uint32_t t) {
    const uint32_t a[4] = {step.words[0].x, step.words[0].y, step.words[0].z, step.words[0].w};
    uint32_t near[2], rest[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float2 pair = *reinterpret_cast<const float2*>(x + half * 8 + 2 * t);
        near[half] = bf16_pair(pair.x, pair.y);
        rest[half] = bf16_pair(pair.x - float_of(near[half] << 16), pair.y - float_of(near[half] & 0xffff0000u));
    }
    mma_bf16(acc, a, rest[0], rest[1]);
    mma_bf16(acc, a, near[0], near[1]);
}
DEVICE void multiply_closely(float (&acc)[4], const Step<SINGLE>& step, const float* x, uint32_t t) {
    multiply_step(acc, step, x, t);
}

// acc += a warp's steps from `first` on; WHOLE: none of them is beyond the last, so nothing stands between the loads.
template <int KIND, bool WHOLE>
DEVICE void multiply_steps(float (&acc)[4], const void* a, size_t place, const float* x, uint32_t first, uint32_t steps,
                           uint32_t lane) {
    Step<KIND> step[WARP_STEPS];
#pragma unroll
    for (uint32_t i = 0; i < WARP_STEPS; i++) {
        if (WHOLE || first + i < steps) {
            load_step<KIND>(step[i], a, place + first + i, lane);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < WARP_STEPS; i++) {
        if (WHOLE || first + i < steps) {
            multiply_closely(acc, step[i], x + (first + i) * 16, lane % 4);
        }
    }
}

template <int KIND>
DEVICE void shrink(const UpdateJob& job, const float* x, uint32_t stride, uint32_t steps, float* inner) {
    DYNAMIC_SHARED(float, shared);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.z;
    const uint32_t first = blockIdx.y * SLICE_STEPS + warp * WARP_STEPS;
    // Places beyond the job's rows repeat its last: their results are not written.
    const uint32_t own = lane / 4 < job.rows ? lane / 4 : job.rows - 1;
    const float* row = x + static_cast<size_t>(job.row[own]) * stride;
    const size_t place = static_cast<size_t>(tile) * steps;
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first + WARP_STEPS <= steps) {
        multiply_steps<KIND, true>(acc, job.a, place, row, first, steps, lane);
    } else {
        multiply_steps<KIND, false>(acc, job.a, place, row, first, steps, lane);
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        shared[(warp * 4 + i) * 32 + lane] = acc[i];
    }
    sync_block();
    // Neighbouring threads write neighbouring ranks.
    const uint32_t rank = threadIdx.x % 16, column = threadIdx.x / 16;
    if (column < job.rows) {
        const uint32_t at = (rank / 8 * 2 + column % 2) * 32 + rank % 8 * 4 + column / 2;
        float sum = shared[at];
#pragma unroll
        for (uint32_t w = 1; w < 8; w++) {
            sum = sum + shared[w * 128 + at];
        }
        const size_t place = (static_cast<size_t>(column) * gridDim.y + blockIdx.y) * job.tiles + tile;
        inner[job.place + place * 16 + rank] = sum;
    }
}

KERNEL((256, 4), low_rank_shrink, const uint32_t* jobs, const float* x, uint32_t stride, uint32_t steps, float* inner) {
    const UpdateJob job = update_job(jobs);
    if (blockIdx.z >= job.tiles) {
        return;
    }
    if (job.single != 0) {
        shrink<SINGLE>(job, x, stride, steps, inner);
    } else {
        shrink<BRAIN>(job, x, stride, steps, inner);
    }
}

template <int KIND>
DEVICE void grow(const UpdateJob& job, const float* inner, uint32_t slices, float* out, uint32_t stride) {
    DYNAMIC_SHARED(float, shared);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, ranks = job.tiles * 16;
    const uint32_t first = (blockIdx.y * 8 + warp) * GROW_TILES, tiles = (job.outputs + 15) / 16;
    float acc[GROW_TILES][4];
#pragma unroll
    for (int m = 0; m < GROW_TILES; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            acc[m][i] = 0.0f;
        }
    }
    for (uint32_t base = 0; base < ranks; base += RANKS_AT_ONCE) {
        const uint32_t width = ranks - base < RANKS_AT_ONCE ? ranks - base : RANKS_AT_ONCE;
        if (base > 0) {
            sync_block();
        }
        for (uint32_t at = threadIdx.x; at < JOB_ROWS * RANKS_AT_ONCE; at += blockDim.x) {
            const uint32_t column = at / RANKS_AT_ONCE, rank = at % RANKS_AT_ONCE;
            float sum = 0.0f;
            if (column < job.rows && rank < width) {
                const float* from = inner + job.place + static_cast<size_t>(column) * slices * ranks + base + rank;
                sum = from[0];
                for (uint32_t slice = 1; slice < slices; slice++) {
                    sum = sum + from[slice * ranks];
                }
                sum = sum * job.scale;
            }
            shared[column * RANKS_STRIDE + rank] = sum;
        }
        sync_block();
        for (uint32_t k = 0; k < width / 16; k++) {
            Step<KIND> step[GROW_TILES];
#pragma unroll
            for (uint32_t m = 0; m < GROW_TILES; m++) {
                // A tile beyond the last repeats it: its results are not written.
                const size_t tile = first + m < tiles ? first + m : tiles - 1;
                load_step<KIND>(step[m], job.b, tile * job.tiles + base / 16 + k, lane);
            }
#pragma unroll
            for (uint32_t m = 0; m < GROW_TILES; m++) {
                multiply_closely(acc[m], step[m], shared + lane / 4 * RANKS_STRIDE + k * 16, lane % 4);
            }
        }
    }
    // This lane's two rows: eight lanes have eight neighbouring outputs of one. All is read before anything is written, so
    // that it is waited for once.
    float* to[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t column = lane % 4 * 2 + i;
        const size_t row = column < job.rows ? job.row[column] : 0;
        to[i] = column < job.rows ? out + row * stride + job.first : nullptr;
    }
    const auto output = [&](int m, uint32_t i) { return (first + m) * 16 + i / 2 * 8 + lane / 4; };
#pragma unroll
    for (int m = 0; m < GROW_TILES; m++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (to[i % 2] != nullptr && output(m, i) < job.outputs) {
                acc[m][i] = to[i % 2][output(m, i)] + acc[m][i];
            }
        }
    }
#pragma unroll
    for (int m = 0; m < GROW_TILES; m++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (to[i % 2] != nullptr && output(m, i) < job.outputs) {
                to[i % 2][output(m, i)] = acc[m][i];
            }
        }
    }
}

KERNEL((256, 4), low_rank_grow, const uint32_t* jobs, const float* inner, uint32_t slices, float* out, uint32_t stride) {
    const UpdateJob job = update_job(jobs);
    if (blockIdx.y * 8 * GROW_TILES * 16 >= job.outputs) {
        return;
    }
    if (job.single != 0) {
        grow<SINGLE>(job, inner, slices, out, stride);
    } else {
        grow<BRAIN>(job, inner, slices, out, stride);
    }
}
