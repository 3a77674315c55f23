// Paged attention over keys and values kept as bf16. attention.cuh has all there is to say.
#include "attention.cuh"

ATTENTION_OF(Bf16, bf16)
