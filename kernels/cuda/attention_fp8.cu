// Paged attention over keys and values kept as 8-bit floats (e4m3). attention.cuh has all there is to say.
#include "attention.cuh"

ATTENTION_OF(Fp8, fp8)
