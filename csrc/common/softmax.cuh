// softmax.cuh - partial results of attention and how they merge.
//
// A partial row is D + 4 floats: the D sums of p * v, then m and l: l the sum of p, p = 2^(score - m), scores
// in base 2. m is the largest score rounded up to a whole number, so p rounds to f16 alike whatever m is, and
// partial results differ by exact powers of two: how tokens are divided among warps and CTAs leaves no trace
// but f32's.
#pragma once
#include "prim.cuh"

namespace kvw {

constexpr int ROW_EXTRA = 4;       // m, l and padding that spreads rows over shared memory banks
constexpr float NO_SCORE = -1e30f; // below every score, and finite: no inf - inf
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Four neighbouring channels of a row.
struct Merged {
    float4 o;
    float m, l;
};

PRIM float4 scaled(float4 a, float x) { return make_float4(a.x * x, a.y * x, a.z * x, a.w * x); }

// Channels c .. c + 3 of `n` partial rows, row(0) .. row(n - 1), added in this order. `row` may be called
// twice for each.
template <int D, class Row> PRIM Merged merge_rows(Row row, int n, int c) {
    Merged out{make_float4(0.f, 0.f, 0.f, 0.f), NO_SCORE, 0.f};
#pragma unroll 4
    for (int i = 0; i < n; i++) out.m = fmaxf(out.m, row(i)[D]);
#pragma unroll 4
    for (int i = 0; i < n; i++) {
        float4 o = *reinterpret_cast<const float4*>(row(i) + c);
        float2 ml = *reinterpret_cast<const float2*>(row(i) + D);
        float w = prim::exp2_approx(ml.x - out.m);
        out.o.x = fmaf(w, o.x, out.o.x), out.o.y = fmaf(w, o.y, out.o.y);
        out.o.z = fmaf(w, o.z, out.o.z), out.o.w = fmaf(w, o.w, out.o.w);
        out.l = fmaf(w, ml.y, out.l);
    }
    return out;
}

// With a token that has no value, only a score: `logit`, base e.
PRIM Merged with_sink(const Merged& x, float logit) {
    float score = logit * LOG2_E, m = fmaxf(x.m, score), w = prim::exp2_approx(x.m - m);
    return {scaled(x.o, w), m, fmaf(w, x.l, prim::exp2_approx(score - m))};
}

// Attention output: zero where no token was seen.
PRIM float4 normalised(const Merged& x) { return scaled(x.o, x.l > 0.f ? 1.f / x.l : 0.f); }

// Natural log of the sum of exponentials.
PRIM float log_sum_exp(const Merged& x) { return x.l > 0.f ? (x.m + log2f(x.l)) * LN_2 : -INFINITY; }

// Four elements of a row of f16, or of bf16; `to` is 8-byte aligned.
PRIM void put4(void* to, bool bf16, float4 x) {
    uint2 u;
    if (bf16) {
        __nv_bfloat162 a = __floats2bfloat162_rn(x.x, x.y), b = __floats2bfloat162_rn(x.z, x.w);
        memcpy(&u.x, &a, 4), memcpy(&u.y, &b, 4);
    } else {
        __half2 a = __floats2half2_rn(x.x, x.y), b = __floats2half2_rn(x.z, x.w);
        memcpy(&u.x, &a, 4), memcpy(&u.y, &b, 4);
    }
    *static_cast<uint2*>(to) = u;
}

} // namespace kvw
