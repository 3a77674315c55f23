// Paged attention over keys and values kept as f16. attention.cuh has all there is to say.
#include "attention.cuh"

ATTENTION_OF(F16, f16)
