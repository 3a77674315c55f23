// Paged attention over keys and values kept as bf16. attention.cuh has all there is to say.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   attend_split_bf16_32     77  79  79  78    5  3  3  6   30720  128
//   attend_shared_bf16_32    80  79  79  78    6  6  6  6   15872  128
//   attend_split_bf16_64    107 106 106 107    2  1  1  4   55296  128
//   attend_shared_bf16_64   104 103 103 103    4  3  3  4   30208  128
//   attend_split_bf16_96    133 133 133 131    2  1  1  2   79872  128
//   attend_shared_bf16_96   145 148 148 148    3  2  2  3   44544  128
//   attend_split_bf16_128   165 165 165 163    3  1  1  4   52224   64
//   attend_shared_bf16_128  167 168 168 168    2  1  1  3   58880  128
//   attend_split_bf16_256   237 237 237 235    1  1  1  2  101376   64
//   attend_shared_bf16_256  254 255 255 255    1  1  1  2   99328  128
#include "attention.cuh"

ATTENTION_OF(Bf16, bf16)
