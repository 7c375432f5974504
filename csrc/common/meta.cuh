// meta.cuh - scales and minima of a step in shared memory, as attention's fragments want them.
#pragma once
#include "codec.cuh"
#include "slab.cuh"

namespace kvw {

// Token of word i, low half, of the f16 V codes or of the V scales or minima of a step.
template <int FORMAT, int D, int GROUP> PRIM int v_token(int i) {
    constexpr int V_GROUPS = Slab<FORMAT, D, GROUP>::V_GROUPS;
    if (FORMAT == KVW_SLAB_F16) return i / (32 * 4 * (D / 16)) * 16 + i / 4 % 4 * 2 + i % 2 * 8;
    return i / (8 * V_GROUPS) * 16 + i / (2 * V_GROUPS) % 4 * 2 + i % 2 * 8;
}

// Bytes past the newest token may be anything, NaN too, and 0 * NaN is NaN: clears the V values (f16) or V
// metadata of tokens >= live of a step of TILES tiles. `v` is the step's V section; threads thread, thread +
// threads, ...
template <int FORMAT, int D, int GROUP, int TILES>
PRIM void clear_past(unsigned char* v, int live, int thread, int threads) {
    using S = Slab<FORMAT, D, GROUP>;
    if (FORMAT == KVW_SLAB_FP8 || S::TWO_LEVEL) return; // whatever the bytes are, they are finite
    constexpr int WORDS = S::QUANTISED ? S::V_MINIMA / 4 : TILES * D * 8;
    uint32_t* words = reinterpret_cast<uint32_t*>(v + (S::QUANTISED ? S::CODE_BYTES : 0));
    for (int i = thread; i < WORDS; i += threads) {
        int held = live - v_token<FORMAT, D, GROUP>(i);
        uint32_t keep = held >= 2 ? ~0u : held == 1 ? 0xFFFFu : 0u;
        words[i] &= keep;
        if (S::QUANTISED) words[WORDS + i] &= keep;
    }
}

// Words 4 i .. 4 i + 3 of a K group's scales or minima for lane t; bytes below the byte HIGH: 0 makes subnormals,
// 0x64 adds 1024.
template <class S, uint32_t HIGH = 0> PRIM uint4 k_meta(const unsigned char* at, int i, int t) {
    if constexpr (S::TWO_LEVEL) {
        uint2 u = reinterpret_cast<const uint2*>(at)[i * 4 + t];
        return make_uint4(spread<HIGH>(u.x, 0), spread<HIGH>(u.x, 1), spread<HIGH>(u.y, 0),
                          spread<HIGH>(u.y, 1));
    } else {
        return reinterpret_cast<const uint4*>(at)[i * 4 + t];
    }
}

// Scales or minima of a V group, of both sides; bytes as above.
template <class S, uint32_t HIGH = 0> PRIM uint2 v_meta(const unsigned char* at) {
    if constexpr (S::TWO_LEVEL) {
        uint32_t word = *reinterpret_cast<const uint32_t*>(at);
        return make_uint2(spread<HIGH>(word, 0), spread<HIGH>(word, 1));
    } else {
        return *reinterpret_cast<const uint2*>(at);
    }
}

// Scales of a V group into scale[group % 4], as many groups a load as 16 bytes hold; bytes plus 1024.
template <class S> PRIM void v_scales(const unsigned char* scales, int group, uint2 (&scale)[4]) {
    constexpr int WORDS = S::V_MINIMA / TOKENS; // a lane t and tile
    constexpr int LOAD = WORDS % 4 == 0 ? 4 : WORDS % 2 == 0 ? 2 : 1, GROUPS = S::TWO_LEVEL ? LOAD : LOAD / 2;
    if (group % GROUPS != 0) return;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(scales) + group * (LOAD / GROUPS);
    uint32_t word[4];
    if (LOAD == 4) {
        uint4 x = *reinterpret_cast<const uint4*>(from);
        word[0] = x.x, word[1] = x.y, word[2] = x.z, word[3] = x.w;
    } else if (LOAD == 2) {
        uint2 x = *reinterpret_cast<const uint2*>(from);
        word[0] = x.x, word[1] = x.y;
    } else {
        word[0] = *from;
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        scale[(group + i) % 4] = S::TWO_LEVEL ? make_uint2(spread<0x64>(word[i], 0), spread<0x64>(word[i], 1))
                                              : make_uint2(word[2 * i], word[2 * i + 1]);
    }
}

} // namespace kvw
