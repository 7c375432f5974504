// warpgroup.cuh - attention of a warpgroup: 64 query rows against steps of 64 tokens in tiles (tiles.cuh).
//
// S = Q K^T and O += P V by wgmma; Q, and P as it is made from S, are A operands in registers. With w = warp
// % 4, r = lane / 4, t = lane % 4 a lane owns rows 16 w + r and + 8 ("sides" 0 and 1), of these
//   queries  channels 16 k + 2 t + {0, 1} and + 8        A fragment k
//   scores   tokens 8 i + 2 t + {0, 1}                   s[4 i + 2 side + {0, 1}]
//   outputs  channels 8 i + 2 t + {0, 1}                 o[4 i + 2 side + {0, 1}]
#pragma once
#include "queries.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

namespace kvw {

// Two numbers as two elements of an output row.
PRIM uint32_t output_pair(float a, float b, bool bf16) {
    if (!bf16) return half2_bits(__floats2half2_rn(a, b));
    return __bfloat16_as_ushort(__float2bfloat16_rn(a)) |
           uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
}

template <int D> struct Rows {
    static constexpr int K_STEPS = D / 16;

    uint32_t q[K_STEPS][4];
    uint32_t p[TOKENS / 16][4]; // probabilities of the step at hand
    float o[D / 2];             // sums of p * v
    float l[2];                 // sums of p of this lane's tokens
    float m[2];                 // largest score, base 2, rounded up to a whole number
    float k[2];                 // base-2 score of a raw score of 1

    // The rows of both sides.
    PRIM void load(const QueryRows<2>& rows, float scale) {
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float2 x[D / 8];
            uint32_t w[D / 8];
#pragma unroll
            for (int j = 0; j < D / 8; j++) x[j] = rows(side, j);
            k[side] = scale * LOG2_E * power_of_two(normalise(x, w));
#pragma unroll
            for (int j = 0; j < D / 8; j++) q[j / 2][j % 2 * 2 + side] = w[j];
            m[side] = NO_SCORE;
            l[side] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0.f;
    }

    // Raw scores; in flight until waited for.
    PRIM void scores(float (&s)[TOKENS / 2], uint64_t k_tiles) const {
#pragma unroll
        for (int i = 0; i < K_STEPS; i++)
            prim::wgmma<__half, TOKENS>(s, q[i], k_tiles + i / 4 * (Tiles<D>::K_TILE / 16) + i % 4 * 2,
                                        i > 0);
        prim::wgmma_commit();
    }

    // Adds p V; in flight until waited for.
    PRIM void values(uint64_t v_tile) {
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) prim::wgmma<__half, D>(o, p[i], v_tile + i * 2, true);
        prim::wgmma_commit();
    }

    // Only tokens from[side] .. to[side] - 1 of the step are seen.
    PRIM static void mask(float (&s)[TOKENS / 2], const int (&from)[2], const int (&to)[2]) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) {
            int token = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, side = i / 2 % 2;
            if (token < from[side] || token >= to[side]) s[i] = -INFINITY;
        }
    }

    // Raw scores to probabilities; true where a maximum has grown by log2 of 1 / shrink.
    PRIM bool softmax(float (&s)[TOKENS / 2], float (&shrink)[2]) {
        bool grows = false;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float most = s[2 * side];
#pragma unroll
            for (int i = 0; i < TOKENS / 4; i++) most = fmaxf(most, s[i / 2 * 4 + 2 * side + i % 2]);
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            float top = fmaxf(m[side], ceilf(most * k[side]));
            shrink[side] = prim::exp2_approx(m[side] - top);
            grows |= top > m[side];
            m[side] = top;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < TOKENS / 4; i++) {
                float& x = s[i / 2 * 4 + 2 * side + i % 2];
                x = prim::exp2_approx(fmaf(x, k[side], -top));
                sum += x;
            }
            l[side] = fmaf(l[side], shrink[side], sum);
        }
        return __any_sync(~0u, grows);
    }

    PRIM void rescale(const float (&shrink)[2]) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] *= shrink[i / 2 % 2];
    }

    PRIM void take(const float (&s)[TOKENS / 2]) {
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++)
            p[i / 4][KVW_FAULT(147) ? i % 4 ^ 1 : i % 4] =
                half2_bits(__floats2half2_rn(s[2 * i], s[2 * i + 1]));
    }

    // Sums over all tokens of the row; every lane of the row gets them.
    PRIM float total(int side) const {
        float sum = l[side] + __shfl_xor_sync(~0u, l[side], 1);
        return sum + __shfl_xor_sync(~0u, sum, 2);
    }
};

} // namespace kvw
