// Paged attention, decode and prefill in one arithmetic. Reference: reference::attention.
//
// Rows are queries: (token, query head of one KV head), 16 to a tensor-core tile, so that a decode step's query heads
// share what is read. Whatever the kernel, a row's numbers come about like this, at absolute positions of its own
// sequence, and so do not depend on what else is in the tile, the chunk or the batch:
//
//   partition  of 256 tokens   0        256        512      ...   each from an empty state (max, sum, output)
//   tile       of  16 tokens   |16|16|..|            |16|16|      scores, running softmax, output += weights * values
//   merge      of partitions, ascending: ((p0 + p1) + p2) + ...
//
// A tile that a row may not see leaves its state as it is, bit for bit; so does merging an empty partition.
//
//   attend_split   one warp a job: 16 rows (or fewer) against one partition of one KV head; the partitions of a long
//                  context run side by side and leave their states to merge_partitions. For decode.
//   attend_shared  four warps a job: 64 rows of one KV head against their whole context; the warps share each tile of
//                  keys and values. For prefill.
//
// Keys and values of a tile are 2 * 16 * dim * 2 bytes, contiguous in the cache (rope.cu); cp.async brings the next
// two tiles to shared memory while one is computed on, ldmatrix takes them from there. Rows of shared memory are padded by
// 16 bytes: the 8 rows ldmatrix reads at once lie in different banks.
//
//   stage of shared memory [3][keys, values][16 tokens][dim + 8] bf16:  a warp (split) or a block (shared)
//   total, shared only     [4 warps][dim / 8][4][32 lanes] f32: the merged partitions
//
//   dim                     32     64     96    128    256
//   split, KiB a warp      7.5   13.5   19.5   25.5   49.5      x 4 warps a block (2 from 128)
//   shared, KiB a block   15.5   29.5   43.5   57.5  113.5 -> 2 stages at 256: 97
//
// Registers: the output of 16 rows is dim / 2 a thread, queries another dim / 4 (kept up to 128, read again from the
// first-level cache at 256). Shared memory decides: split at 128 dimensions is 4 blocks of 2 warps on an H100, 1 on an
// L4, whose 25 KiB a warp under way still cover its latency. check.py prints registers and occupancy.
#include "prims.cuh"

constexpr uint32_t PARTITION = 256;
constexpr uint32_t TILE = 16;
constexpr uint32_t WHOLE = 0xffffffffu;

// One job, as kernels/src/cuda/attention.rs lays it out.
struct Job {
    uint32_t table;         // first entry of the sequence's block table
    uint32_t first_row;     // batch row of the sequence's first query
    uint32_t base, rows;    // packed rows base..base + rows of the sequence: token * group + query head
    uint32_t begin, end;    // tokens to walk; begin is a multiple of 16
    uint32_t partial;       // first row of partial states, or WHOLE: the result is final
    uint32_t unused;
};

// What all jobs of a call share; `head_dim` is the width of a head's values, which is all that is written out.
struct Call {
    const uint16_t *queries, *keys, *values;
    const uint32_t *tables, *positions;
    float *out, *partial, *partial_state;
    uint32_t heads, kv_heads, head_dim, block_size, window;
    float scale, softcap;
};

template <int DIM>
struct State {
    float out[DIM / 8][4];
    // Rows g and g + 8 of the tile; sums are of this thread's own columns until a partition ends.
    float max[2], sum[2];
};

template <int DIM>
DEVICE void clear(State<DIM>& s) {
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s.out[d][i] = 0.0f;
        }
    }
    s.max[0] = s.max[1] = -INFINITE;
    s.sum[0] = s.sum[1] = 0.0f;
}

// Weights of two states that become one.
DEVICE void merge_weights(float a, float b, float& both, float& weight_a, float& weight_b) {
    both = fmaxf(a, b);
    weight_a = a == -INFINITE ? 0.0f : exp2_fast(a - both);
    weight_b = b == -INFINITE ? 0.0f : exp2_fast(b - both);
}
DEVICE float merged(float a, float weight_a, float b, float weight_b) { return fmaf(a, weight_a, b * weight_b); }

// Sends for a tile's keys and values; tokens from `end` on are zeros. `thread` of `threads` takes its share.
template <int DIM>
DEVICE void fetch(uint16_t* stage, const Call& c, const Job& job, uint32_t kv_head, uint32_t start, uint32_t thread,
                  uint32_t threads) {
    constexpr uint32_t CHUNKS = DIM / 8;
#ifdef PLANT_BLOCK_TABLE
    const uint32_t block = c.tables[job.table + start / c.block_size + 1];
#else
    const uint32_t block = c.tables[job.table + start / c.block_size];
#endif
#ifdef PLANT_STRIDE
    constexpr uint32_t ROW = DIM - 8;
#else
    constexpr uint32_t ROW = DIM;
#endif
    const size_t from = ((static_cast<size_t>(block) * c.kv_heads + kv_head) * c.block_size + start % c.block_size) * DIM;
    for (uint32_t i = thread; i < 2 * TILE * CHUNKS; i += threads) {
        const uint32_t part = i / (TILE * CHUNKS), token = i / CHUNKS % TILE, column = i % CHUNKS * 8;
        const uint16_t* source = (part == 0 ? c.keys : c.values) + from + token * ROW + column;
        copy_async(stage + (part * TILE + token) * (DIM + 8) + column, source, start + token < job.end);
    }
}

// Queries of the rows g and g + 8 for 16 dimensions, as mma's a.
template <int DIM>
DEVICE void load_queries(uint32_t (&a)[4], const uint16_t* const (&rows)[2], uint32_t dims, uint32_t t) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint16_t* row = rows[i % 2];
        a[i] = row == nullptr ? 0u : *reinterpret_cast<const uint32_t*>(row + dims + i / 2 * 8 + 2 * t);
    }
}

// One tile: `visible` is the range of tokens each of this thread's rows sees.
template <int DIM>
DEVICE void attend_tile(State<DIM>& s, const uint16_t* stage, const uint32_t (&kept)[DIM <= 128 ? DIM / 16 : 1][4],
                        const uint16_t* const (&rows)[2], const uint32_t (&visible)[2][2], uint32_t start, const Call& c) {
    const uint32_t lane = threadIdx.x % 32, t = lane % 4;
    float scores[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    // Lane l names row l % 8 of matrix l / 8: tokens 0-7 and 8-15, dimensions 0-7 and 8-15 of each.
    const uint16_t* keys = stage + (lane / 16 * 8 + lane % 8) * (DIM + 8) + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        uint32_t b[4];
        load_matrices(b, keys + k * 16);
        if (DIM <= 128) {
            mma_bf16(scores[0], kept[DIM <= 128 ? k : 0], b[0], b[1]);
            mma_bf16(scores[1], kept[DIM <= 128 ? k : 0], b[2], b[3]);
        } else {
            uint32_t a[4];
            load_queries<DIM>(a, rows, k * 16, t);
            mma_bf16(scores[0], a, b[0], b[1]);
            mma_bf16(scores[1], a, b[2], b[3]);
        }
    }
    constexpr float LOG2_E = 1.44269504f;
    float weight[2][4], shrink[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float score[4], most = -INFINITE;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t token = start + i / 2 * 8 + 2 * t + i % 2;
            float x = scores[i / 2][h * 2 + i % 2] * c.scale;
            if (c.softcap > 0.0f) {
                // cap * tanh(x / cap), tanh y = 1 - 2 / (e^2y + 1).
                const float power = fminf(x * (2.0f * LOG2_E / c.softcap), 126.0f);
                x = c.softcap - 2.0f * c.softcap / (exp2_fast(power) + 1.0f);
            }
            const bool seen = token >= visible[h][0] && token < visible[h][1];
            score[i] = seen ? x * LOG2_E : -INFINITE;
            most = fmaxf(most, score[i]);
        }
        most = fmaxf(most, shuffle_xor(most, 1));
        most = fmaxf(most, shuffle_xor(most, 2));
        most = fmaxf(most, s.max[h]);
        const float from = most == -INFINITE ? 0.0f : most;
        shrink[h] = exp2_fast(s.max[h] - from);
        s.max[h] = most;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            weight[h][i] = exp2_fast(score[i] - from);
        }
        s.sum[h] = fmaf(s.sum[h], shrink[h], (weight[h][0] + weight[h][1]) + (weight[h][2] + weight[h][3]));
    }
    // Times one changes nothing, and maxima seldom move.
    if (any_lane(shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s.out[d][i] = s.out[d][i] * shrink[i / 2];
            }
        }
    }
    const uint32_t a[4] = {bf16_pair(weight[0][0], weight[0][1]), bf16_pair(weight[1][0], weight[1][1]),
                           bf16_pair(weight[0][2], weight[0][3]), bf16_pair(weight[1][2], weight[1][3])};
    // Tokens 0-7 and 8-15, then the next 8 dimensions.
    const uint16_t* values = stage + (TILE + lane % 16) * (DIM + 8) + lane / 16 * 8;
#pragma unroll
    for (int d = 0; d < DIM / 16; d++) {
        uint32_t b[4];
        load_matrices_transposed(b, values + d * 16);
        mma_bf16(s.out[2 * d], a, b[0], b[1]);
        mma_bf16(s.out[2 * d + 1], a, b[2], b[3]);
    }
}

// A partition's sums are spread over the four lanes of a row.
template <int DIM>
DEVICE void end_partition(State<DIM>& s) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        s.sum[h] = s.sum[h] + shuffle_xor(s.sum[h], 1);
        s.sum[h] = s.sum[h] + shuffle_xor(s.sum[h], 2);
    }
}

// total += s, which is then empty. `total` is this lane's own column of shared memory.
template <int DIM>
DEVICE void merge_into(float* total, float (&total_max)[2], float (&total_sum)[2], State<DIM>& s) {
    end_partition(s);
    float weight[2], own[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float both;
        merge_weights(total_max[h], s.max[h], both, weight[h], own[h]);
        total_max[h] = both;
        total_sum[h] = merged(total_sum[h], weight[h], s.sum[h], own[h]);
    }
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float* place = total + (d * 4 + i) * 32;
            *place = merged(*place, weight[i / 2], s.out[d][i], own[i / 2]);
        }
    }
    clear(s);
}

// This thread's rows, g and g + 8 of the 16 from `base`: their queries, what they see, where they go.
struct Rows {
    const uint16_t* queries[2];
    uint32_t visible[2][2];
    uint32_t out[2];
};

template <int DIM>
DEVICE Rows find_rows(const Call& c, const Job& job, uint32_t tile, uint32_t kv_head) {
    const uint32_t group = c.heads / c.kv_heads, g = threadIdx.x % 32 / 4;
    Rows rows;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint32_t r = tile * TILE + g + h * 8;
        if (r < job.rows) {
            const uint32_t row = job.first_row + (job.base + r) / group;
            const uint32_t place = row * c.heads + kv_head * group + (job.base + r) % group;
            rows.queries[h] = c.queries + static_cast<size_t>(place) * DIM;
            rows.visible[h][1] = c.positions[row] + 1;
            rows.visible[h][0] = rows.visible[h][1] > c.window ? rows.visible[h][1] - c.window : 0;
            rows.out[h] = place;
        } else {
            rows.queries[h] = nullptr;
            rows.visible[h][0] = rows.visible[h][1] = 0;
            rows.out[h] = WHOLE;
        }
    }
    return rows;
}

template <int DIM>
DEVICE void write_out(const Call& c, const Rows& rows, const State<DIM>& s) {
    const uint32_t t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (rows.out[h] == WHOLE) {
            continue;
        }
        float* to = c.out + static_cast<size_t>(rows.out[h]) * c.head_dim;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t column = d * 8 + 2 * t + i;
                if (column < c.head_dim) {
                    to[column] = s.out[d][h * 2 + i] / s.sum[h];
                }
            }
        }
    }
}

// A partition's state, for merge_partitions: [partial row][kv head][dim], and its max and sum.
template <int DIM>
DEVICE void write_partial(const Call& c, const Job& job, uint32_t kv_head, const State<DIM>& s) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint32_t r = lane / 4 + h * 8;
        if (r >= job.rows) {
            continue;
        }
        const size_t place = static_cast<size_t>(job.partial + r) * c.kv_heads + kv_head;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
            float2 pair;
            pair.x = s.out[d][h * 2];
            pair.y = s.out[d][h * 2 + 1];
            *reinterpret_cast<float2*>(c.partial + place * DIM + d * 8 + lane % 4 * 2) = pair;
        }
        if (lane % 4 == 0) {
            c.partial_state[place * 2] = s.max[h];
            c.partial_state[place * 2 + 1] = s.sum[h];
        }
    }
}

// The 16 rows of one warp against tokens job.begin..job.end; SHARING warps share each tile.
template <int DIM, bool SHARING, int STAGES>
DEVICE void walk(const Call& c, const Job& job, uint32_t kv_head, uint16_t* stages, float* total) {
    constexpr uint32_t STAGE = 2 * TILE * (DIM + 8);
    const uint32_t thread = SHARING ? threadIdx.x : threadIdx.x % 32, threads = SHARING ? blockDim.x : 32;
    const uint32_t lane = threadIdx.x % 32;
    const Rows rows = find_rows<DIM>(c, job, SHARING ? threadIdx.x / 32 : 0, kv_head);
    uint32_t kept[DIM <= 128 ? DIM / 16 : 1][4];
    if (DIM <= 128) {
#pragma unroll
        for (int k = 0; k < (DIM <= 128 ? DIM / 16 : 1); k++) {
            load_queries<DIM>(kept[k], rows.queries, k * 16, lane % 4);
        }
    }
    State<DIM> state;
    clear(state);
    float total_max[2] = {-INFINITE, -INFINITE}, total_sum[2] = {0.0f, 0.0f};
    bool merging = false;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (job.begin + stage * TILE < job.end) {
            fetch<DIM>(stages + stage * STAGE, c, job, kv_head, job.begin + stage * TILE, thread, threads);
        }
        copy_commit();
    }
    uint32_t number = 0;
    for (uint32_t start = job.begin; start < job.end; start += TILE, number++) {
        copy_wait<STAGES - 2>();
        // This tile is there for everybody, and the one before it is done with.
#ifndef PLANT_MISSING_SYNC
        if (SHARING) {
            sync_block();
        } else {
            sync_warp();
        }
#endif
        const uint32_t ahead = start + (STAGES - 1) * TILE;
        if (ahead < job.end) {
            fetch<DIM>(stages + (number + STAGES - 1) % STAGES * STAGE, c, job, kv_head, ahead, thread, threads);
        }
        copy_commit();
        if (SHARING && start % PARTITION == 0 && start > job.begin) {
            if (!merging) {
                for (int i = 0; i < DIM / 2; i++) {
                    total[i * 32] = 0.0f;
                }
                merging = true;
            }
            merge_into<DIM>(total, total_max, total_sum, state);
        }
        attend_tile<DIM>(state, stages + number % STAGES * STAGE, kept, rows.queries, rows.visible, start, c);
    }
    if (SHARING && merging) {
        merge_into<DIM>(total, total_max, total_sum, state);
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state.out[d][i] = total[(d * 4 + i) * 32];
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            state.sum[h] = total_sum[h];
        }
    } else {
        end_partition(state);
    }
    if (SHARING || job.partial == WHOLE) {
        write_out<DIM>(c, rows, state);
    } else {
        write_partial<DIM>(c, job, kv_head, state);
    }
}

DEVICE Job load_job(const uint32_t* jobs, uint32_t number) {
    const uint32_t* j = jobs + static_cast<size_t>(number) * 8;
    return {j[0], j[1], j[2], j[3], j[4], j[5], j[6], j[7]};
}

#define ATTENTION_ARGS                                                                                               \
    const uint16_t *queries, const uint16_t *keys, const uint16_t *values, const uint32_t *tables,                   \
        const uint32_t *positions, float *out, float *partial, float *partial_state, uint32_t heads,                 \
        uint32_t kv_heads, uint32_t head_dim, uint32_t block_size, uint32_t window, float scale, float softcap,      \
        const uint32_t *jobs, uint32_t count
#define ATTENTION_CALL                                                                                              \
    {queries, keys, values, tables, positions, out, partial, partial_state, heads, kv_heads, head_dim, block_size, \
     window, scale, softcap}

// grid (jobs / warps a block, kv heads).
template <int DIM>
DEVICE void split(const Call& c, const uint32_t* jobs, uint32_t count) {
    DYNAMIC_SHARED(uint16_t, shared);
    const uint32_t number = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (number >= count) {
        return;
    }
    walk<DIM, false, 3>(c, load_job(jobs, number), blockIdx.y, shared + threadIdx.x / 32 * 3 * 2 * TILE * (DIM + 8),
                        nullptr);
}

// grid (jobs, kv heads).
template <int DIM, int STAGES>
DEVICE void shared_tiles(const Call& c, const uint32_t* jobs) {
    DYNAMIC_SHARED(uint16_t, shared);
    float* totals = reinterpret_cast<float*>(shared + STAGES * 2 * TILE * (DIM + 8));
    float* total = totals + threadIdx.x / 32 * DIM * 16 + threadIdx.x % 32;
    walk<DIM, true, STAGES>(c, load_job(jobs, blockIdx.x), blockIdx.y, shared, total);
}

#define ATTENTION(dim, warps, split_blocks, shared_blocks, stages)          \
    KERNEL((warps * 32, split_blocks), attend_split_##dim, ATTENTION_ARGS) { \
        const Call call = ATTENTION_CALL;                                    \
        split<dim>(call, jobs, count);                                       \
    }                                                                        \
    KERNEL((128, shared_blocks), attend_shared_##dim, ATTENTION_ARGS) {      \
        const Call call = ATTENTION_CALL;                                    \
        shared_tiles<dim, stages>(call, jobs);                               \
    }

ATTENTION(32, 4, 4, 4, 3)
ATTENTION(64, 4, 3, 3, 3)
ATTENTION(96, 4, 3, 3, 3)
ATTENTION(128, 2, 4, 2, 3)
ATTENTION(256, 2, 2, 1, 2)

// Puts the states of a row's partitions together, ascending. grid (rows, kv heads), 128 threads over the dimensions;
// row: [first partial row, rows between one partition's and the next, partitions, packed row's place in `out`].
KERNEL((128), merge_partitions, const float* partial, const float* partial_state, const uint32_t* merges,
       uint32_t kv_heads, uint32_t group, uint32_t heads, uint32_t head_dim, uint32_t dim, float* out) {
    const uint32_t* m = merges + static_cast<size_t>(blockIdx.x) * 4;
    const uint32_t first = m[0], step = m[1], count = m[2], row = m[3] / group, head = m[3] % group;
    const size_t to = (static_cast<size_t>(row) * heads + blockIdx.y * group + head) * head_dim;
    for (uint32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float max = -INFINITE, sum = 0.0f, value = 0.0f;
        for (uint32_t p = 0; p < count; p++) {
            const size_t place = static_cast<size_t>(first + p * step) * kv_heads + blockIdx.y;
            float both, weight, own;
            merge_weights(max, partial_state[place * 2], both, weight, own);
            sum = merged(sum, weight, partial_state[place * 2 + 1], own);
            value = merged(value, weight, partial[place * dim + d], own);
            max = both;
        }
        out[to + d] = value / sum;
    }
}
