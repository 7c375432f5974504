// queries.cuh - query rows as B fragments of m16n8k16, normalised so that scales and codes fold into them.
#pragma once
#include "codec.cuh"
#include "slab.cuh"

namespace kvw {

constexpr float LOG2_E = 1.4426950408889634f;

// 2^n for -126 <= n <= 127.
PRIM float power_of_two(int n) { return __int_as_float((n + 127) << 23); }

// Query words of NT column tiles, each column scaled by 2^-(e + 4), e = ceil(log2 of its largest element):
// then 16 |q| <= 1, and times any finite f16 scale it does not overflow. `folded` is q * 2^(4 - 2 (j % 4)),
// the 2-bit fold; the 4-bit one is made from both. At 8 bits, where a scale is 131008 / 255 at most, the fold
// is q * 2^10. Words live in registers, or in shared memory where they would not fit.
template <int D, int NT> struct Queries {
    static constexpr int WORDS = D / 8;
    static constexpr bool SHARED = NT * D > 128;
    static constexpr int SHARED_BYTES = SHARED ? NT * 2 * WORDS / 4 * UNIT_BYTES : 0;

    static constexpr uint32_t HALF2_16 = 0x4C004C00u, HALF2_1024 = 0x64006400u;

    // [column tile][plain, folded][j / 4]; a plain unit is in the order 0, 2, 1, 3 (`minima`).
    uint4 units[SHARED ? 1 : NT][2][SHARED ? 1 : WORDS / 4];
    uint4* shared; // this lane's; [column tile][2][j / 4][32 lanes]

    PRIM uint4 unit(int n, int kind, int i) const {
        return SHARED ? shared[((n * 2 + kind) * (WORDS / 4) + i) * 32]
                      : units[SHARED ? 0 : n][kind][SHARED ? 0 : i];
    }

    PRIM void put(int n, int kind, int i, uint4 u) {
        if (SHARED)
            shared[((n * 2 + kind) * (WORDS / 4) + i) * 32] = u;
        else
            units[SHARED ? 0 : n][kind][SHARED ? 0 : i] = u;
    }

    // Query words 4 i .. 4 i + 3 as the codes of FORMAT want them.
    template <int FORMAT> PRIM uint4 folded(int n, int i) const {
        if (FORMAT == KVW_SLAB_Q2) return unit(n, 1, i);
        uint4 plain = unit(n, 0, i);
        if (FORMAT == KVW_SLAB_F16) return make_uint4(plain.x, plain.z, plain.y, plain.w);
        if (FORMAT == KVW_SLAB_Q8) {
            if (KVW_FAULT(116)) swap(plain.y, plain.z); // the order of the minima
            return make_uint4(mul2(plain.x, HALF2_1024), mul2(plain.z, HALF2_1024), mul2(plain.y, HALF2_1024),
                              mul2(plain.w, HALF2_1024));
        }
        return make_uint4(unit(n, 1, i).x, plain.z, mul2(plain.y, HALF2_16), plain.w);
    }

    // Column r of tile n from `row` [D] (null: zeros); returns e + 4. `write` is false where another warp
    // fills the shared words.
    PRIM int load(int n, const __half* row, bool write) {
        int t = threadIdx.x % 4;
        uint32_t w[WORDS];
        float most = 0.f;
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            w[j] = row ? *reinterpret_cast<const uint32_t*>(row + 8 * j + 2 * t) : 0u;
            float2 x = __half22float2(half2_of(w[j]));
            most = fmaxf(most, fmaxf(fabsf(x.x), fabsf(x.y)));
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        int e = most > 0.f ? ((__float_as_int(most) + 0x7FFFFF) >> 23) - 127 : 0;
        float down = power_of_two(-(e + 4));
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            float2 x = __half22float2(half2_of(w[j]));
            w[j] = half2_bits(__floats2half2_rn(x.x * down, x.y * down));
        }
        constexpr uint32_t HALF2_4 = 0x44004400u, HALF2_QUARTER = 0x34003400u;
#pragma unroll
        for (int i = 0; i < WORDS / 4 && (write || !SHARED); i++) {
            uint4 u = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
            put(n, 0, i, make_uint4(u.x, u.z, u.y, u.w));
            put(n, 1, i, make_uint4(mul2(u.x, HALF2_16), mul2(u.y, HALF2_4), u.z, mul2(u.w, HALF2_QUARTER)));
        }
        return e + 4;
    }
};

} // namespace kvw
