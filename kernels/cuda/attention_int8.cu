// Paged attention over keys and values kept as scaled bytes. attention.cuh has all there is to say.
#include "attention.cuh"

ATTENTION_OF(Int8, int8)
