// Paged attention over keys and values kept as 8-bit floats (e4m3). attention.cuh has all there is to say.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   attend_split_fp8_32     81  81  81  82    5  5  5  5   18432  128
//   attend_shared_fp8_32    79  78  78  78    6  6  6  6   12800  128
//   attend_split_fp8_64    104 103 103 106    4  3  3  4   30720  128
//   attend_shared_fp8_64   107 100 100  99    4  4  4  4   24064  128
//   attend_split_fp8_96    135 135 135 134    3  2  2  3   43008  128
//   attend_shared_fp8_96   128 127 127 128    4  2  2  4   35328  128
//   attend_split_fp8_128   153 153 153 155    5  3  3  6   27648   64
//   attend_shared_fp8_128  158 167 167 167    3  2  2  3   46592  128
//   attend_split_fp8_256   235 235 235 233    3  1  1  4   52224   64
//   attend_shared_fp8_256  255 254 254 254    2  1  1  2   82944  128
#include "attention.cuh"

ATTENTION_OF(Fp8, fp8)
