// Rotary positions and the write to the cache: a row's queries, turned, as bf16; its keys, turned, and its values, as
// bf16, to the row's slot. References: reference::rope, and the cache's layout:
//
//   keys, values  [block][kv head][token of the block][dim] bf16, zeros from head_dim, or value_dim, to dim
//
//   rope_table: grid (rows), 128 threads, one frequency each. rope_write: grid (rows), 256 threads over (head, pair of
//   dimensions): writes of a head are contiguous, 2 dim bytes. 40 registers or fewer, no shared memory: bandwidth.
#include "prims.cuh"

// Cosines then sines of each row: table [row][2][count].
KERNEL((128), rope_table, const uint32_t* positions, const float* frequencies, uint32_t count, float factor,
       float* table) {
    float* row = table + static_cast<size_t>(blockIdx.x) * 2 * count;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        const float angle = static_cast<float>(positions[blockIdx.x]) * frequencies[i];
        row[i] = cosf(angle) * factor;
        row[count + i] = sinf(angle) * factor;
    }
}

// Dimension `d` of a head after turning the pairs (i, i + count).
DEVICE float turned(const float* head, const float* table, uint32_t count, uint32_t d) {
    if (d >= 2 * count) {
        return head[d];
    }
    const uint32_t i = d < count ? d : d - count;
    const float cosine = table[i], sine = table[count + i], x = head[i], y = head[count + i];
    return d < count ? fmaf(x, cosine, -(y * sine)) : fmaf(y, cosine, x * sine);
}

KERNEL((256), rope_write, const float* qkv, const float* table, uint32_t count, const uint32_t* slots, uint32_t heads,
       uint32_t kv_heads, uint32_t head_dim, uint32_t value_dim, uint32_t dim, uint32_t block_size,
       uint16_t* queries, uint16_t* keys, uint16_t* values) {
    const uint32_t row = blockIdx.x, all = heads + 2 * kv_heads, pairs = dim / 2;
    const float* in = qkv + static_cast<size_t>(row) * ((heads + kv_heads) * head_dim + kv_heads * value_dim);
    const float* turns = table + static_cast<size_t>(row) * 2 * count;
    const uint32_t slot = slots[row], block = slot / block_size, token = slot % block_size;
    for (uint32_t at = threadIdx.x; at < all * pairs; at += blockDim.x) {
        const uint32_t head = at / pairs, d = at % pairs * 2;
        // Values come last, and may be narrower.
        const bool value = head >= heads + kv_heads;
        const float* from = in + head * head_dim - (value ? (head - heads - kv_heads) * (head_dim - value_dim) : 0);
        float pair[2];
        for (uint32_t i = 0; i < 2; i++) {
            pair[i] = d + i >= (value ? value_dim : head_dim) ? 0.0f
                      : value                                 ? from[d + i]
                                                              : turned(from, turns, count, d + i);
        }
        uint16_t* to;
        if (head < heads) {
            to = queries + (static_cast<size_t>(row) * heads + head) * dim;
        } else {
            const uint32_t kv_head = (head - heads) % kv_heads;
            to = (value ? values : keys) +
                 ((static_cast<size_t>(block) * kv_heads + kv_head) * block_size + token) * dim;
        }
        *reinterpret_cast<uint32_t*>(to + d) = bf16_pair(pair[0], pair[1]);
    }
}
