// turn.cuh - one head of queries or keys by a warp: RoPE, and the Hadamard matrix of D. Lane l has channels 32 i + l.
#pragma once
#include "rope.cuh"

namespace kvw {

// Sums and differences of the lanes' values, neighbours first.
PRIM float across_lanes(float x, int lane) {
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
        float other = __shfl_xor_sync(~0u, x, apart);
        x = lane & apart ? __fsub_rn(other, x) : __fadd_rn(x, other);
    }
    return x;
}

// The same between blocks of 32 channels, then the factor 1 / sqrt(32 N).
template <int N> PRIM void across_blocks(float (&x)[N]) {
    constexpr float FACTOR = N == 2 ? 0.125f : N == 4 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int apart = 1; apart < N; apart *= 2) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (i & apart) continue;
            float a = x[i], b = x[i + apart];
            x[i] = __fadd_rn(a, b);
            x[i + apart] = __fsub_rn(a, b);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = __fmul_rn(x[i], FACTOR);
}

template <> PRIM void across_blocks<3>(float (&x)[3]) {
    constexpr float FACTOR = 0.17677669529663687f; // 1 / sqrt(32)
    float sum = __fadd_rn(__fadd_rn(x[0], x[1]), x[2]), share = KVW_FAULT(303) ? -1.f : -2.f / 3;
#pragma unroll
    for (int i = 0; i < 3; i++) x[i] = __fmul_rn(fmaf(sum, share, x[i]), FACTOR);
}

// A head times the orthonormal Hadamard matrix of 32 N channels, additions in the order of src/hadamard.rs::keys;
// N = 3: three of 32 mixed by the reflection 1 - 2/3.
template <int N> PRIM void times_hadamard(float (&x)[N], int lane) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = across_lanes(x[i], lane);
    across_blocks(x);
}

// RoPE of a head: in(c) is channel c, sines(pair, sin, cos) gives those of a pair. A channel's partner is loaded as
// well: it is in L1, and D = 96 has it in another lane.
template <int N, typename In, typename Sines>
PRIM void rotate_head(float (&x)[N], int lane, bool half, In in, Sines sines) {
    constexpr int D = 32 * N;
#pragma unroll
    for (int i = 0; i < N; i++) {
        int c = 32 * i + lane, pair = half ? c % (D / 2) : c / 2;
        bool first = half ? c < D / 2 : c % 2 == 0;
        int partner = half ? first ? c + D / 2 : c - D / 2 : c ^ 1;
        float sin, cos;
        sines(pair, sin, cos);
        float b = __fmul_rn(in(partner), sin);
        x[i] = __fadd_rn(__fmul_rn(in(c), cos), first ? -b : b);
    }
}

} // namespace kvw
