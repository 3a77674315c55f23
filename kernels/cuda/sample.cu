// What sampling needs of a row of logits: its largest values, ranked as engine/src/sampler.rs ranks them: the larger logit
// first, then the lower id. Minus infinity is no candidate; NaN and plus infinity spoil a row. Reference: a sort.
//
//   rank           u64: the value's bits, turned so that they order as the value does, above the complement of the id
//   candidates     [row][chunk][count + 1] u64: a chunk's best, best first, zeros when there are no more; then whether
//                  the chunk spoils the row. rank_chunks writes them, merge_chunks makes one list of a row's.
//
//   rank_chunks: grid (chunks of 4,096 logits, rows), 256 threads with 16 ranks each; a logit is read once, which is the
//   bound: 0.5 MB a row of 128 k tokens. merge_chunks: grid (rows), up to 4,096 candidates. Each candidate costs one
//   reduction over the block and one barrier. Ranks are 32 registers, 56 and 62 in all on sm_80: 4 blocks an SM; 128
//   bytes of shared memory.
#include "prims.cuh"

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

KERNEL((256, 3), rank_chunks, const float* logits, uint32_t vocab, float scale, uint32_t count, uint64_t* candidates) {
    DYNAMIC_SHARED(uint64_t, shared);
    const uint32_t first = blockIdx.x * (HELD * 256) + threadIdx.x;
    const float* row = logits + static_cast<size_t>(blockIdx.y) * vocab;
    uint64_t held[HELD];
    bool spoilt = false;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const uint32_t id = first + i * 256;
        float x = id < vocab ? row[id] : -INFINITE;
        x = scale == 1.0f ? x : x * scale;
        spoilt = spoilt || x != x || x == INFINITE;
        held[i] = x > -INFINITE ? rank_of(x, id) : 0;
    }
    uint64_t* out = candidates + (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * (count + 1);
    spoilt = any_thread(spoilt, shared);
    if (threadIdx.x == 0) {
        out[count] = spoilt ? 1 : 0;
    }
    take_best(held, count, shared, out);
}

KERNEL((256, 3), merge_chunks, const uint64_t* candidates, uint32_t chunks, uint32_t count, uint64_t* best) {
    DYNAMIC_SHARED(uint64_t, shared);
    const uint64_t* of_row = candidates + static_cast<size_t>(blockIdx.x) * chunks * (count + 1);
    uint64_t held[HELD];
    bool spoilt = false;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const uint32_t at = i * 256 + threadIdx.x;
        held[i] = at < chunks * count ? of_row[at / count * (count + 1) + at % count] : 0;
    }
    for (uint32_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        spoilt = spoilt || of_row[chunk * (count + 1) + count] != 0;
    }
    uint64_t* out = best + static_cast<size_t>(blockIdx.x) * (count + 1);
    spoilt = any_thread(spoilt, shared);
    if (threadIdx.x == 0) {
        out[count] = spoilt ? 1 : 0;
    }
    take_best(held, count, shared, out);
}
