// random.cuh - random bits that a seed and a number fix.
#pragma once
#include "prim.cuh"

namespace kvw {

// Output `step` + 1 of SplitMix64 started at `seed`: src/sample/mod.rs::draw.
PRIM uint64_t random_bits(uint64_t seed, int32_t step) {
    uint64_t z = seed + (uint64_t(int64_t(step)) + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

} // namespace kvw
