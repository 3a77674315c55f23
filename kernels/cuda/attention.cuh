// Paged attention, decode and prefill in one arithmetic. Reference: reference::attend.
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
// Keys and values of a tile are contiguous in the cache (kv.cuh); cp.async brings the next two tiles to shared memory, as
// they are, while one is computed on; ldmatrix takes them from there. Rows of shared memory are padded by 16 bytes:
// the 8 rows ldmatrix reads at once lie in different banks.
//
//   stage of shared memory [3][keys, values][16 tokens][dim + 16 bytes]:  a warp (split) or a block (shared)
//   scales, int8 only      [3][keys, values][dim / 32][16 tokens] bf16, each after its stage
//   total, shared only     [4 warps][dim / 8][4][32 lanes] f32: the merged partitions
//
//   dim                              32     64     96    128    256
//   split, 16 bit, KiB a warp       7.5   13.5   19.5   25.5   49.5      x 4 warps a block (2 from 128)
//   split, int8 (fp8 a little less) 4.7    7.9   11.1   14.3   27.0
//   shared, 16 bit, KiB a block    15.5   29.5   43.5   57.5  113.5 -> 2 stages at 256: 97
//
// Registers: the output of 16 rows is dim / 2 a thread, queries another dim / 4 (kept up to 128, read again from the
// first-level cache at 256). Shared memory decides: split at 128 dimensions, 16 bit, is 4 blocks of 2 warps on an H100, 1 on
// an L4, whose 25 KiB a warp under way still cover its latency; bytes are twice as many blocks. Launch bounds ask for
// about the blocks that shared memory allows, which leaves the compiler 128 registers at 32 dimensions, 168 at 64 and
// 96, 255 from 128 on: more blocks would spill sums. attention_bf16.cu and its like say what each kernel takes.
#pragma once

#include "kv.cuh"

constexpr uint32_t PARTITION = 256;
constexpr uint32_t TILE = 16;
constexpr uint32_t WHOLE = 0xffffffffu;

// Bytes of a row of keys or values in shared memory, and of a stage.
template <class KV, int DIM>
DEVICE constexpr uint32_t row_bytes() {
    return DIM * KV::BYTES + 16;
}
template <class KV, int DIM>
DEVICE constexpr uint32_t stage_bytes() {
    return 2 * TILE * row_bytes<KV, DIM>() + (KV::SCALED ? 2 * DIM : 0);
}

// One job, as kernels/src/cuda/work_list.rs lays it out.
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
    const uint16_t* queries;
    const uint8_t *keys, *values;
    const uint16_t* scales;
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
template <class KV, int DIM>
DEVICE void fetch(uint8_t* stage, const Call& c, const Job& job, uint32_t kv_head, uint32_t start, uint32_t thread,
                  uint32_t threads) {
    constexpr uint32_t CHUNKS = DIM * KV::BYTES / 16;
#ifdef PLANT_BLOCK_TABLE
    const uint32_t block = c.tables[job.table + start / c.block_size + 1];
#else
    const uint32_t block = c.tables[job.table + start / c.block_size];
#endif
#ifdef PLANT_STRIDE
    constexpr uint32_t ROW = (DIM - 8) * KV::BYTES;
#else
    constexpr uint32_t ROW = DIM * KV::BYTES;
#endif
    const size_t head = static_cast<size_t>(block) * c.kv_heads + kv_head;
    const size_t from = (head * c.block_size + start % c.block_size) * DIM * KV::BYTES;
    for (uint32_t i = thread; i < 2 * TILE * CHUNKS; i += threads) {
        const uint32_t part = i / (TILE * CHUNKS), token = i / CHUNKS % TILE, column = i % CHUNKS * 16;
        const uint8_t* source = (part == 0 ? c.keys : c.values) + from + token * ROW + column;
        copy_async(stage + (part * TILE + token) * row_bytes<KV, DIM>() + column, source, start + token < job.end);
    }
    if (KV::SCALED) {
        // 8 tokens a copy: those beyond `end` may be anything, and meet weights that are zero.
        uint8_t* scales = stage + 2 * TILE * row_bytes<KV, DIM>();
        for (uint32_t i = thread; i < DIM / 8; i += threads) {
            const uint32_t group = i / 2, eight = i % 2 * 8;
            const uint16_t* source =
                c.scales + (head * 2 * (DIM / 32) + group) * c.block_size + start % c.block_size + eight;
            copy_async(scales + i * 16, source, start + eight < job.end);
        }
    }
}

// Scales of one group of 32 dimensions for this thread's four tokens of a tile: 2t, 2t + 1, 8 + 2t, 9 + 2t.
template <class KV, int DIM>
DEVICE void load_scales(float (&scale)[4], const uint8_t* stage, uint32_t part, uint32_t group) {
    const uint8_t* row = stage + 2 * TILE * row_bytes<KV, DIM>() + (part * (DIM / 32) + group) * 2 * TILE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(row + half * 16 + threadIdx.x % 4 * 4);
        scale[half * 2] = f32_of_bf16(static_cast<uint16_t>(pair & 0xffffu));
        scale[half * 2 + 1] = f32_of_bf16(static_cast<uint16_t>(pair >> 16));
    }
}

// Queries of the rows g and g + 8 for 16 dimensions, as mma's a. Bytes lie four to a word, and the dimensions of a step
// are numbered so that a thread's are one word of a key.
template <class KV, int DIM>
DEVICE void load_queries(uint32_t (&a)[4], const uint16_t* const (&rows)[2], uint32_t dims, uint32_t t) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint16_t* row = rows[i % 2];
        const uint32_t dim = KV::BYTES == 2 ? i / 2 * 8 + 2 * t : 4 * t + i / 2 * 2;
        a[i] = row == nullptr ? 0u : *reinterpret_cast<const uint32_t*>(row + dims + dim);
    }
}

// Which of 8 output columns a thread's value i of tile d is.
template <class KV>
DEVICE uint32_t column_of(uint32_t d, uint32_t i) {
    const uint32_t t = threadIdx.x % 4;
    // Bytes come in pairs of neighbouring dimensions: even ones are one tile, odd ones the next.
    return KV::BYTES == 2 ? d * 8 + 2 * t + i : d / 2 * 16 + 4 * t + 2 * i + d % 2;
}

// One tile: `visible` is the range of tokens each of this thread's rows sees.
template <class KV, int DIM>
DEVICE void attend_tile(State<DIM>& s, const uint8_t* stage, const uint32_t (&kept)[DIM <= 128 ? DIM / 16 : 1][4],
                        const uint16_t* const (&rows)[2], const uint32_t (&visible)[2][2], uint32_t start, const Call& c) {
    const uint32_t lane = threadIdx.x % 32, t = lane % 4;
    float scores[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    const auto query = [&](uint32_t (&a)[4], int k) {
        if (DIM <= 128) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = kept[DIM <= 128 ? k : 0][i];
            }
        } else {
            load_queries<KV, DIM>(a, rows, k * 16, t);
        }
    };
    if (KV::BYTES == 2) {
        // Lane l names row l % 8 of matrix l / 8: tokens 0-7 and 8-15, dimensions 0-7 and 8-15 of each.
        const uint8_t* keys = stage + (lane / 16 * 8 + lane % 8) * row_bytes<KV, DIM>() + lane / 8 % 2 * 16;
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            uint32_t a[4], b[4];
            load_matrices(b, keys + k * 32);
            query(a, k);
            KV::mma(scores[0], a, b[0], b[1]);
            KV::mma(scores[1], a, b[2], b[3]);
        }
    } else {
        // Tokens 0-7 and 8-15 of dimensions 0-15, then of 16-31.
        const uint8_t* keys = stage + lane % 16 * row_bytes<KV, DIM>() + lane / 16 * 16;
#pragma unroll
        for (int group = 0; group < DIM / 32; group++) {
            uint32_t words[4];
            load_matrices(words, keys + group * 32);
            float dots[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
            float(&to)[2][4] = KV::SCALED ? dots : scores;
#pragma unroll
            for (int k = 0; k < 2; k++) {
                uint32_t a[4];
                query(a, group * 2 + k);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint32_t word = words[k * 2 + n];
                    KV::mma(to[n], a, KV::expand(word, 0, 1), KV::expand(word, 2, 3));
                }
            }
            if (KV::SCALED) {
                float scale[4];
                load_scales<KV, DIM>(scale, stage, 0, group);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float& score = scores[i / 4][i % 4];
                    score = fmaf(dots[i / 4][i % 4], scale[i / 4 * 2 + i % 2], score);
                }
            }
        }
    }
    float weight[2][4], shrink[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float score[4], most = -INFINITE;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t token = start + i / 2 * 8 + 2 * t + i % 2;
            float x = scores[i / 2][h * 2 + i % 2] * (c.scale * KV::SHRUNK);
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
    const uint8_t* values = stage + (TILE + lane % 16) * row_bytes<KV, DIM>() + lane / 16 * 16;
    uint32_t a[4];
    if (!KV::SCALED) {
        a[0] = KV::pair(weight[0][0], weight[0][1]);
        a[1] = KV::pair(weight[1][0], weight[1][1]);
        a[2] = KV::pair(weight[0][2], weight[0][3]);
        a[3] = KV::pair(weight[1][2], weight[1][3]);
    }
    if (KV::BYTES == 2) {
        // Tokens 0-7 and 8-15, then the next 8 dimensions.
#pragma unroll
        for (int d = 0; d < DIM / 16; d++) {
            uint32_t b[4];
            load_matrices_transposed(b, values + d * 32);
            KV::mma(s.out[2 * d], a, b[0], b[1]);
            KV::mma(s.out[2 * d + 1], a, b[2], b[3]);
        }
    } else {
        // Tokens 0-7 and 8-15 of dimensions 0-15 in pairs, then of 16-31.
#pragma unroll
        for (int group = 0; group < DIM / 32; group++) {
            uint32_t words[4];
            load_matrices_transposed(words, values + group * 32);
            if (KV::SCALED) {
                float scale[4], product[2][4];
                load_scales<KV, DIM>(scale, stage, 1, group);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    // A token that is not seen may have any scale.
                    const float w = weight[i / 4][i % 4];
                    product[i / 4][i % 4] = w == 0.0f ? 0.0f : w * scale[i % 4];
                }
                a[0] = KV::pair(product[0][0], product[0][1]);
                a[1] = KV::pair(product[1][0], product[1][1]);
                a[2] = KV::pair(product[0][2], product[0][3]);
                a[3] = KV::pair(product[1][2], product[1][3]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t low = words[i / 2 * 2], high = words[i / 2 * 2 + 1];
                KV::mma(s.out[group * 4 + i], a, KV::expand(low, i % 2, i % 2 + 2), KV::expand(high, i % 2, i % 2 + 2));
            }
        }
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

template <class KV, int DIM>
DEVICE void write_out(const Call& c, const Rows& rows, const State<DIM>& s) {
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
                const uint32_t column = column_of<KV>(d, i);
                if (column < c.head_dim) {
                    to[column] = s.out[d][h * 2 + i] * KV::SHRUNK / s.sum[h];
                }
            }
        }
    }
}

// A partition's state, for merge_partitions: [partial row][kv head][dim], and its max and sum.
template <class KV, int DIM>
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
#pragma unroll
            for (int i = 0; i < 2; i++) {
                c.partial[place * DIM + column_of<KV>(d, i)] = s.out[d][h * 2 + i] * KV::SHRUNK;
            }
        }
        if (lane % 4 == 0) {
            c.partial_state[place * 2] = s.max[h];
            c.partial_state[place * 2 + 1] = s.sum[h];
        }
    }
}

// The 16 rows of one warp against tokens job.begin..job.end; SHARING warps share each tile.
template <class KV, int DIM, bool SHARING, int STAGES>
DEVICE void walk(const Call& c, const Job& job, uint32_t kv_head, uint8_t* stages, float* total) {
    constexpr uint32_t STAGE = stage_bytes<KV, DIM>();
    const uint32_t thread = SHARING ? threadIdx.x : threadIdx.x % 32, threads = SHARING ? blockDim.x : 32;
    const uint32_t lane = threadIdx.x % 32;
    const Rows rows = find_rows<DIM>(c, job, SHARING ? threadIdx.x / 32 : 0, kv_head);
    uint32_t kept[DIM <= 128 ? DIM / 16 : 1][4];
    if (DIM <= 128) {
#pragma unroll
        for (int k = 0; k < (DIM <= 128 ? DIM / 16 : 1); k++) {
            load_queries<KV, DIM>(kept[k], rows.queries, k * 16, lane % 4);
        }
    }
    State<DIM> state;
    clear(state);
    float total_max[2] = {-INFINITE, -INFINITE}, total_sum[2] = {0.0f, 0.0f};
    bool merging = false;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (job.begin + stage * TILE < job.end) {
            fetch<KV, DIM>(stages + stage * STAGE, c, job, kv_head, job.begin + stage * TILE, thread, threads);
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
            fetch<KV, DIM>(stages + (number + STAGES - 1) % STAGES * STAGE, c, job, kv_head, ahead, thread, threads);
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
        attend_tile<KV, DIM>(state, stages + number % STAGES * STAGE, kept, rows.queries, rows.visible, start, c);
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
        write_out<KV, DIM>(c, rows, state);
    } else {
        write_partial<KV, DIM>(c, job, kv_head, state);
    }
}

DEVICE Job load_job(const uint32_t* jobs, uint32_t number) {
    const uint32_t* j = jobs + static_cast<size_t>(number) * 8;
    return {j[0], j[1], j[2], j[3], j[4], j[5], j[6], j[7]};
}

#define ATTENTION_ARGS                                                                                          \
    const uint16_t *queries, const uint8_t *keys, const uint8_t *values, const uint16_t *scales,                \
        const uint32_t *tables,                                                                                 \
        const uint32_t *positions, float *out, float *partial, float *partial_state, uint32_t heads,            \
        uint32_t kv_heads, uint32_t head_dim, uint32_t block_size, uint32_t window, float scale, float softcap, \
        const uint32_t *jobs, uint32_t count
#define ATTENTION_CALL                                                                                                     \
    {queries, keys, values, scales, tables, positions, out, partial, partial_state, heads, kv_heads, head_dim, block_size, \
     window, scale, softcap}

// grid (jobs / warps a block, kv heads).
template <class KV, int DIM>
DEVICE void split(const Call& c, const uint32_t* jobs, uint32_t count) {
    DYNAMIC_SHARED(uint8_t, shared);
    const uint32_t number = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (number >= count) {
        return;
    }
    walk<KV, DIM, false, 3>(c, load_job(jobs, number), blockIdx.y,
                            shared + threadIdx.x / 32 * 3 * stage_bytes<KV, DIM>(), nullptr);
}

// grid (jobs, kv heads).
template <class KV, int DIM, int STAGES>
DEVICE void shared_tiles(const Call& c, const uint32_t* jobs) {
    DYNAMIC_SHARED(uint8_t, shared);
    float* totals = reinterpret_cast<float*>(shared + STAGES * stage_bytes<KV, DIM>());
    float* total = totals + threadIdx.x / 32 * DIM * 16 + threadIdx.x % 32;
    walk<KV, DIM, true, STAGES>(c, load_job(jobs, blockIdx.x), blockIdx.y, shared, total);
}

#define ATTENTION(KV, name, dim, warps, split_blocks, shared_blocks, stages)          \
    KERNEL((warps * 32, split_blocks), attend_split_##name##_##dim, ATTENTION_ARGS) { \
        const Call call = ATTENTION_CALL;                                             \
        split<KV, dim>(call, jobs, count);                                            \
    }                                                                                 \
    KERNEL((128, shared_blocks), attend_shared_##name##_##dim, ATTENTION_ARGS) {      \
        const Call call = ATTENTION_CALL;                                             \
        shared_tiles<KV, dim, stages>(call, jobs);                                    \
    }

#define ATTENTION_OF(KV, name)           \
    ATTENTION(KV, name, 32, 4, 4, 4, 3)  \
    ATTENTION(KV, name, 64, 4, 3, 3, 3)  \
    ATTENTION(KV, name, 96, 4, 3, 3, 3)  \
    ATTENTION(KV, name, 128, 2, 4, 2, 3) \
    ATTENTION(KV, name, 256, 2, 2, 1, 2)
