// rank.cuh - the one order of scores and logits: larger first, NaN last. src/rank.rs has the same keys.
#pragma once
#include "prim.cuh"

namespace kvw {

// Greater is better. NaN is below minus infinity, the zeros are equal.
PRIM uint32_t rank_key(float x) {
    uint32_t bits = __float_as_uint(x + 0.f);
    return x != x ? 0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// What has this key.
PRIM float rank_value(uint32_t key) {
    return key == 0 ? __uint_as_float(0x7FC00000u) : __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

} // namespace kvw
