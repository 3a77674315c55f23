// Rotary positions and the write to the cache: a row's queries, turned, as bf16 or f16; its keys, turned, and its values
// to the row's slot, as kv.cuh draws them. References: reference::rotate,
// reference::round_bf16, round_f16, round_e4m3, round_int8.
//
//   rope_table: grid (rows), 128 threads, one frequency each. rope_write_*: grid (rows), 256 threads, a warp for 32
//   dimensions of a head: it reads 128 bytes (twice that where pairs turn, the second time from the first-level cache)
//   and writes 64, or 32 and a scale. 40 registers or fewer, no shared memory: bandwidth.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   rope_table        22  22  22  28   16 12 12 16       0  128
//   rope_write_bf16   31  33  33  32    8  6  6  8       0  256
//   rope_write_f16    31  31  31  32    8  6  6  8       0  256
//   rope_write_fp8    31  33  33  32    8  6  6  8       0  256
//   rope_write_int8   31  29  29  30    8  6  6  8       0  256
#include "kv.cuh"

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

// The nearest number of the product's type. f16 ends at 65504, where NaN stays NaN.
template <class KV>
DEVICE uint16_t half_of(float x) {
    const float held = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    return static_cast<uint16_t>(KV::pair(KV::WIDE ? x : held, 0.0f) & 0xffffu);
}

// The slot of a row that belongs to no sequence.
constexpr uint32_t NOWHERE = 0xffffffffu;

// Where a row's keys and values go.
template <class KV>
struct Cache {
    uint8_t *keys, *values;
    uint16_t* scales;
    uint32_t kv_heads, block_size, dim;

    // A warp writes 32 dimensions of one head: `x` is lane's. `head` counts keys, then values.
    DEVICE void put(const Cache& c, uint32_t slot, uint32_t head, uint32_t group, uint32_t lane, float x) {
        const uint32_t block = slot / c.block_size, token = slot % c.block_size;
        const uint32_t part = head / c.kv_heads, kv_head = head % c.kv_heads;
        const size_t of_head = static_cast<size_t>(block) * c.kv_heads + kv_head;
        const size_t place = (of_head * c.block_size + token) * c.dim + group * 32 + lane;
        uint8_t* to = (part == 0 ? c.keys : c.values) + place * KV::BYTES;
        if (KV::BYTES == 2) {
            *reinterpret_cast<uint16_t*>(to) = half_of<KV>(x);
        } else if (!KV::SCALED) {
            *to = e4m3_of(x);
        } else {
            const uint32_t scale = bf16_pair(warp_max(fabsf(x)) / 127.0f, 0.0f) & 0xffffu;
            const float size = f32_of_bf16(static_cast<uint16_t>(scale));
            const float inverse = size > 0.0f ? 1.0f / size : 0.0f;
            // Rounded down, the scale lets the largest pass 127.
            const float code = fminf(fmaxf(rintf(x * inverse), -127.0f), 127.0f);
            *to = static_cast<uint8_t>(static_cast<int32_t>(code) + 128);
            if (lane == 0) {
                c.scales[((of_head * 2 + part) * (c.dim / 32) + group) * c.block_size + token] =
                    static_cast<uint16_t>(scale);
            }
        }
    }
};

template <class KV>
DEVICE void write_row(const float* qkv, const float* table, uint32_t count, const uint32_t* slots, uint32_t heads,
                      uint32_t head_dim, uint32_t value_dim, uint16_t* queries, const Cache<KV>& cache) {
    const uint32_t row = blockIdx.x, all = heads + 2 * cache.kv_heads, groups = cache.dim / 32;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t keys_end = heads + cache.kv_heads;
    const float* in = qkv + static_cast<size_t>(row) * (keys_end * head_dim + cache.kv_heads * value_dim);
    const float* turns = table + static_cast<size_t>(row) * 2 * count;
    for (uint32_t at = threadIdx.x / 32; at < all * groups; at += blockDim.x / 32) {
        const uint32_t head = at / groups, group = at % groups, d = group * 32 + lane;
        // Values come last, and may be narrower.
        const bool value = head >= keys_end;
        const float* from = in + head * head_dim - (value ? (head - keys_end) * (head_dim - value_dim) : 0);
        const float x = d >= (value ? value_dim : head_dim) ? 0.0f
                        : value                             ? from[d]
                                                            : turned(from, turns, count, d);
        if (head < heads) {
            queries[(static_cast<size_t>(row) * heads + head) * cache.dim + d] = half_of<KV>(x);
        } else if (slots[row] != NOWHERE) {
            Cache<KV>::put(cache, slots[row], head - heads, group, lane, x);
        }
    }
}

#define ROPE_WRITE(KV, name)                                                                                      \
    KERNEL((256), rope_write_##name, const float* qkv, const float* table, uint32_t count, const uint32_t* slots, \
           uint32_t heads, uint32_t kv_heads, uint32_t head_dim, uint32_t value_dim, uint32_t dim,                \
           uint32_t block_size, uint16_t* queries, uint8_t* keys, uint8_t* values, uint16_t* scales) {            \
        const Cache<KV> cache = {keys, values, scales, kv_heads, block_size, dim};                                \
        write_row<KV>(qkv, table, count, slots, heads, head_dim, value_dim, queries, cache);                      \
    }

ROPE_WRITE(Bf16, bf16)
ROPE_WRITE(F16, f16)
ROPE_WRITE(Fp8, fp8)
ROPE_WRITE(Int8, int8)
