// What sampling needs of a row of logits: bias, scale and cap; its largest values, ranked as engine/src/sampler.rs
// ranks them, the larger logit first, then the lower id; and its mass at a temperature, the sum of
// e^((logit - largest) * rate). Minus infinity is no candidate; NaN and plus infinity spoil a row.
// References: `finish`, `sorted` and `mass` of kernels/shim/tests/cuda/sampling.rs.
//
//   rank           u64: the value's bits, turned so that they order as the value does, above the complement of the id
//   candidates     [row][chunk][count + 1] u64: a chunk's best, best first, zeros when there are no more; then whether
//                  the chunk spoils the row and, above it, the bits of its mass, relative to its own best. rank_chunks
//                  writes them, merge_chunks makes one list of a row's.
//
//   finish_logits, rank_chunks: grid (chunks of 4,096 logits, rows), 256 threads with 16 logits each; a logit is read
//   once, which is the bound: 0.5 MB a row of 128 k tokens. merge_chunks: grid (rows), up to 4,096 candidates. Each
//   candidate costs one reduction over the block and one barrier. Ranks are 32 registers; the bounds ask for 3 blocks
//   an SM, so 80 at most, which cost no spill: 24 warps hide what a barrier costs.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   finish_logits   19  20  20  23    8  6  6  8       0  256
//   rank_chunks     72  72  72  72    3  3  3  3     128  256
//   merge_chunks    62  62  62  58    4  4  4  4     128  256
#include "rows.cuh"

constexpr int HELD = 16;

DEVICE uint64_t rank_of(float value, uint32_t id) {
    // Adding zero makes the two zeros one.
    const uint32_t bits = bits_of(value + 0.0f);
    const uint32_t ordered = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~id);
}

DEVICE uint64_t warp_best(uint64_t x) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t low = shuffle_xor(static_cast<uint32_t>(x), mask);
        const uint32_t high = shuffle_xor(static_cast<uint32_t>(x >> 32), mask);
        const uint64_t other = static_cast<uint64_t>(high) << 32 | low;
        x = other > x ? other : x;
    }
    return x;
}

DEVICE uint64_t best_of(const uint64_t (&held)[HELD]) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        best = held[i] > best ? held[i] : best;
    }
    return best;
}

// Writes the block's best `count` ranks, best first. Ranks are all different, zeros apart. `shared`: 2 * 8 values.
DEVICE void take_best(uint64_t (&held)[HELD], uint32_t count, uint64_t* shared, uint64_t* out) {
    const uint32_t warp = threadIdx.x / 32;
    uint64_t best = best_of(held);
    for (uint32_t n = 0; n < count; n++) {
        const uint64_t of_warp = warp_best(best);
        // Halves take turns: what the last round left is read before the round after this one writes it.
        uint64_t* slots = shared + n % 2 * 8;
        if (threadIdx.x % 32 == 0) {
            slots[warp] = of_warp;
        }
        sync_block();
        uint64_t of_block = 0;
        for (int i = 0; i < 8; i++) {
            of_block = slots[i] > of_block ? slots[i] : of_block;
        }
        if (threadIdx.x == 0) {
            out[n] = of_block;
        }
        if (best == of_block) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                held[i] = held[i] == of_block ? 0 : held[i];
            }
            best = best_of(held);
        }
    }
}

// Whether any thread of the block says so. `shared`: 8 values nobody else uses.
DEVICE bool any_thread(bool x, uint64_t* shared) {
    x = any_lane(x);
    sync_block();
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x ? 1 : 0;
    }
    sync_block();
    uint64_t any = 0;
    for (int i = 0; i < 8; i++) {
        any |= shared[i];
    }
    sync_block();
    return any != 0;
}

// Plus a bias, times `scale`, and where there is a cap, cap * tanh(x / cap): in place.
KERNEL((256), finish_logits, float* logits, const float* bias, uint32_t vocab, float scale, float cap) {
    const uint32_t first = blockIdx.x * (HELD * 256) + threadIdx.x;
    float* row = logits + static_cast<size_t>(blockIdx.y) * vocab;
    for (uint32_t i = 0; i < HELD; i++) {
        const uint32_t id = first + i * 256;
        if (id < vocab) {
            const float x = (row[id] + (bias == nullptr ? 0.0f : bias[id])) * scale;
            row[id] = cap > 0.0f ? cap * tanhf(x / cap) : x;
        }
    }
}

DEVICE float value_of(uint64_t rank) {
    const uint32_t ordered = static_cast<uint32_t>(rank >> 32);
    return float_of(ordered >> 31 != 0 ? ordered & 0x7fffffffu : ~ordered);
}

// Largest value a thread over the block's 8 warps. `shared` holds 8 values.
DEVICE float block_max(float x, float* shared) {
    x = warp_max(x);
    sync_block();
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x;
    }
    sync_block();
    float most = shared[0];
    for (uint32_t warp = 1; warp < 8; warp++) {
        most = fmaxf(most, shared[warp]);
    }
    return most;
}

// e^((value - most) * rate).
DEVICE float weight_of(float value, float most, float rate) {
    return value == -INFINITE ? 0.0f : exp2_fast((value - most) * (rate * LOG2_E));
}

// A row's last word: its mass, where one was asked for, and whether it is spoilt.
DEVICE uint64_t last_word(float mass, bool spoilt) {
    return static_cast<uint64_t>(bits_of(mass)) << 32 | (spoilt ? 1u : 0u);
}

KERNEL((256, 3), rank_chunks, const float* logits, uint32_t vocab, const float* rates, uint32_t count,
       uint64_t* candidates) {
    DYNAMIC_SHARED(uint64_t, shared);
    const uint32_t first = blockIdx.x * (HELD * 256) + threadIdx.x;
    const float* row = logits + static_cast<size_t>(blockIdx.y) * vocab;
    const float rate = rates == nullptr ? 0.0f : rates[blockIdx.y];
    uint64_t held[HELD];
    bool spoilt = false;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const uint32_t id = first + i * 256;
        const float x = id < vocab ? row[id] : -INFINITE;
        spoilt = spoilt || x != x || x == INFINITE;
        held[i] = x > -INFINITE ? rank_of(x, id) : 0;
    }
    uint64_t* out = candidates + (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * (count + 1);
    spoilt = any_thread(spoilt, shared);
    float mass = 0.0f;
    // One row a block: all threads or none.
    if (rate > 0.0f) {
        float* values = reinterpret_cast<float*>(shared);
        float most = -INFINITE;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            most = held[i] != 0 ? fmaxf(most, value_of(held[i])) : most;
        }
        most = block_max(most, values);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            mass = held[i] != 0 ? mass + weight_of(value_of(held[i]), most, rate) : mass;
        }
        mass = block_sum(mass, values);
        sync_block();
    }
    if (threadIdx.x == 0) {
        out[count] = last_word(mass, spoilt);
    }
    take_best(held, count, shared, out);
}

KERNEL((256, 3), merge_chunks, const uint64_t* candidates, uint32_t chunks, const float* rates, uint32_t count,
       uint64_t* best) {
    DYNAMIC_SHARED(uint64_t, shared);
    const float rate = rates == nullptr ? 0.0f : rates[blockIdx.x];
    const uint64_t* of_row = candidates + static_cast<size_t>(blockIdx.x) * chunks * (count + 1);
    uint64_t held[HELD];
    bool spoilt = false;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const uint32_t at = i * 256 + threadIdx.x;
        held[i] = at < chunks * count ? of_row[at / count * (count + 1) + at % count] : 0;
    }
    for (uint32_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        spoilt = spoilt || static_cast<uint32_t>(of_row[chunk * (count + 1) + count]) != 0;
    }
    uint64_t* out = best + static_cast<size_t>(blockIdx.x) * (count + 1);
    spoilt = any_thread(spoilt, shared);
    float mass = 0.0f;
    if (rate > 0.0f) {
        float* values = reinterpret_cast<float*>(shared);
        // A chunk's largest value is its first candidate.
        float most = -INFINITE;
        for (uint32_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
            const uint64_t first = of_row[chunk * (count + 1)];
            most = first != 0 ? fmaxf(most, value_of(first)) : most;
        }
        most = block_max(most, values);
        for (uint32_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
            const uint64_t* of_chunk = of_row + chunk * (count + 1);
            if (of_chunk[0] != 0) {
                const float own = float_of(static_cast<uint32_t>(of_chunk[count] >> 32));
                mass = fmaf(own, weight_of(value_of(of_chunk[0]), most, rate), mass);
            }
        }
        mass = block_sum(mass, values);
        sync_block();
    }
    if (threadIdx.x == 0) {
        out[count] = last_word(mass, spoilt);
    }
    take_best(held, count, shared, out);
}
