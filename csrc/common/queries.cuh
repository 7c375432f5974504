// queries.cuh - query rows as B fragments of m16n8k16, normalised so that scales and codes fold into them.
#pragma once
#include "codec.cuh"
#include "slab.cuh"
#include "softmax.cuh"

namespace kvw {

// Rows of queries in memory, f16 or bf16, one for column r = lane / 4 of each tile; null: a column of zeros.
// Called with a tile and j, gives this lane's channels 8 j + 2 t + {0, 1}.
template <int NT> struct QueryRows {
    const void* row[NT];
    bool bf16;

    PRIM float2 operator()(int n, int j) const {
        if (!row[n]) return make_float2(0.f, 0.f);
        uint32_t w = static_cast<const uint32_t*>(row[n])[4 * j + threadIdx.x % 4];
        float2 x = __half22float2(half2_of(w));
        return bf16 ? make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xFFFF0000u)) : x;
    }
};

// Query words of one column, x[j] times 2^-(e + 4), e = ceil(log2 of its largest element): then 16 |q| <= 1.
// Returns e + 4, at most 126 (a bf16 may be larger: then its words are).
template <int WORDS> PRIM int normalise(const float2 (&x)[WORDS], uint32_t (&w)[WORDS]) {
    float most = 0.f;
#pragma unroll
    for (int j = 0; j < WORDS; j++) most = fmaxf(most, fmaxf(fabsf(x[j].x), fabsf(x[j].y)));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    int e = most > 0.f ? min(((__float_as_int(most) + 0x7FFFFF) >> 23) - 127 + 4, 126) : 4;
    float down = power_of_two(-e);
#pragma unroll
    for (int j = 0; j < WORDS; j++) w[j] = half2_bits(__floats2half2_rn(x[j].x * down, x[j].y * down));
    return e;
}

// Query words of NT column tiles, normalised: times any finite f16 scale they do not overflow. `folded` is
// q * 2^(4 - 2 (j % 4)), the 2-bit fold; the 4-bit one is made from both. At 8 bits, where a scale is
// 131008 / 255 at most, the fold is q * 2^10. Scales that are bytes read as subnormals: with META U8 the folds
// of 2 and 4 bits are 2^15 times larger. Words live in registers, or in shared memory where they would not fit.
template <int D, int NT, int META = KVW_META_F16> struct Queries {
    static constexpr int WORDS = D / 8;
    static constexpr bool SHARED = NT * D > 128;
    static constexpr int SHARED_BYTES = SHARED ? NT * 2 * WORDS / 4 * UNIT_BYTES : 0;

    static constexpr uint32_t HALF2_16 = 0x4C004C00u, HALF2_4 = 0x44004400u, HALF2_QUARTER = 0x34003400u;
    static constexpr uint32_t HALF2_1024 = 0x64006400u, HALF2_32768 = 0x78007800u;

    // [column tile][plain, folded][j / 4]; a plain unit is in the order 0, 2, 1, 3 (`minima`).
    uint4 units[SHARED ? 1 : NT][2][SHARED ? 1 : WORDS / 4];
    uint4* shared;                            // this lane's; [column tile][2][j / 4][32 lanes]
    float sums[META == KVW_META_U8 ? NT : 1]; // of the plain words of column r

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
        if (FORMAT == KVW_SLAB_F16 || FORMAT == KVW_SLAB_FP8)
            return make_uint4(plain.x, plain.z, plain.y, plain.w);
        if (FORMAT == KVW_SLAB_Q8) {
            if (KVW_FAULT(116)) swap(plain.y, plain.z); // the order of the minima
            return make_uint4(mul2(plain.x, HALF2_1024), mul2(plain.z, HALF2_1024), mul2(plain.y, HALF2_1024),
                              mul2(plain.w, HALF2_1024));
        }
        uint4 f = unit(n, 1, i);
        if (META == KVW_META_U8)
            return make_uint4(f.x, mul2(f.y, HALF2_QUARTER), mul2(f.z, HALF2_16), mul2(f.w, HALF2_4));
        return make_uint4(f.x, plain.z, mul2(plain.y, HALF2_16), plain.w);
    }

    // Column r of tile n, of which pair(n, j) gives channels 8 j + 2 t + {0, 1}; returns the power of two that
    // it was divided by. `write` is false where another warp fills the shared words.
    template <class Pair> PRIM int load(int n, Pair pair, bool write) {
        float2 x[WORDS];
        uint32_t w[WORDS];
#pragma unroll
        for (int j = 0; j < WORDS; j++) x[j] = pair(n, j);
        int e = normalise(x, w);
        if (META == KVW_META_U8) {
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < WORDS; j++) {
                float2 y = __half22float2(half2_of(w[j]));
                sum += y.x + y.y;
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sums[META == KVW_META_U8 ? n : 0] = sum + __shfl_xor_sync(~0u, sum, 2);
        }
#pragma unroll
        for (int i = 0; i < WORDS / 4 && (write || !SHARED); i++) {
            uint4 u = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
            put(n, 0, i, make_uint4(u.x, u.z, u.y, u.w));
            if (META == KVW_META_U8) {
                u = make_uint4(mul2(u.x, HALF2_32768), mul2(u.y, HALF2_32768), mul2(u.z, HALF2_32768),
                               mul2(u.w, HALF2_32768));
            }
            put(n, 1, i, make_uint4(mul2(u.x, HALF2_16), mul2(u.y, HALF2_4), u.z, mul2(u.w, HALF2_QUARTER)));
        }
        return e;
    }
};

// R q for the columns of `pair`, R [D, D] f16 row major: f32 rows of D + ROW_EXTRA at `out`, by a CTA. Rows
// of R are the A fragments, straight from memory.
template <int D, int NT, class Pair> PRIM void rotate(const void* matrix, Pair pair, float* out) {
    constexpr int WORDS = D / 8;
    int lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    uint32_t w[NT][WORDS];
    float up[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float2 x[WORDS];
#pragma unroll
        for (int j = 0; j < WORDS; j++) x[j] = pair(n, j);
        float mine = power_of_two(normalise(x, w[n]));
        for (int c = 0; c < 2; c++) up[n][c] = __shfl_sync(~0u, mine, (2 * t + c) * 4);
    }
    for (int tile = threadIdx.x / 32; tile < D / 16; tile += blockDim.x / 32) {
        const uint32_t* rows = static_cast<const uint32_t*>(matrix) + (16 * tile + r) * (D / 2) + t;
        float c[NT][4] = {};
#pragma unroll
        for (int j = 0; j < WORDS; j += 2) {
            const uint32_t a[4] = {rows[4 * j], rows[4 * D + 4 * j], rows[4 * j + 4],
                                   rows[4 * D + 4 * j + 4]};
#pragma unroll
            for (int n = 0; n < NT; n++) prim::mma_16816<__half>(c[n], a, w[n][j], w[n][j + 1]);
        }
#pragma unroll
        for (int i = 0; i < NT * 4; i++) {
            int n = i / 4, column = 8 * n + 2 * t + i % 2, row = 16 * tile + r + i % 4 / 2 * 8;
            if (KVW_FAULT(139)) row ^= 8;
            out[column * (D + ROW_EXTRA) + row] = c[n][i % 4] * up[n][i % 2];
        }
    }
}

// The same rows, read back as a column's pairs.
template <int D> struct RotatedRows {
    const float* rows;

    PRIM float2 operator()(int n, int j) const {
        int lane = threadIdx.x % 32, column = 8 * n + lane / 4;
        return *reinterpret_cast<const float2*>(rows + column * (D + ROW_EXTRA) + 8 * j + 2 * (lane % 4));
    }
};

} // namespace kvw
