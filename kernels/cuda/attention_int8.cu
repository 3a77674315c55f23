// Paged attention over keys and values kept as scaled bytes. attention.cuh has all there is to say.
//
// check.py records and checks: registers, then blocks an SM, on sm_80, sm_86, sm_89 and sm_90a; bytes of dynamic
// shared memory a block; threads.
//   attend_split_int8_32     83  84  84  91    5  5  5  5   19200  128
//   attend_shared_int8_32    79  80  80  80    6  6  6  6   12992  128
//   attend_split_int8_64    117 116 116 126    4  3  3  4   32256  128
//   attend_shared_int8_64   112 112 112 125    4  4  4  4   24448  128
//   attend_split_int8_96    160 160 160 160    3  2  2  3   45312  128
//   attend_shared_int8_96   154 154 154 158    3  2  2  3   35904  128
//   attend_split_int8_128   171 171 171 175    5  3  3  5   29184   64
//   attend_shared_int8_128  177 175 175 179    2  2  2  2   47360  128
//   attend_split_int8_256   238 239 239 233    2  1  1  4   55296   64
//   attend_shared_int8_256  255 254 254 254    1  1  1  2   83968  128
#include "attention.cuh"

ATTENTION_OF(Int8, int8)
