// The end of a split context: attention.cuh says what is merged and in which order. Reference: reference::attend. 128 threads over the dimensions, 40
// registers or fewer, no shared memory; the states read are 1/64 to 1/16 of the bytes of the keys and values.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   merge_partitions   32  40  40  32   16 12 12 16       0  128
#include "attention.cuh"

// Puts the states of a row's partitions together, ascending. grid (rows, kv heads), 128 threads over the dimensions;
// row: [first partial row, rows between one partition's and the next, partitions, packed row's place in `out`].
KERNEL((128), merge_partitions, const float* partial, const float* partial_state, const uint32_t* merges,
       uint32_t kv_heads, uint32_t group, uint32_t heads, uint32_t head_dim, uint32_t dim, float* out) {
    const uint32_t* m = merges + static_cast<size_t>(blockIdx.x) * 4;
    const uint32_t first = m[0], step = m[1], count = m[2], row = m[3] / group, head = m[3] % group;
    // A row that fills up the list.
    if (count == 0) {
        return;
    }
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
