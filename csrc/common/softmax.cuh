// softmax.cuh - partial results of attention and how they merge.
//
// A partial row is D + 4 floats: the D sums of p * v, then m and l: l the sum of p, p = 2^(score - m), scores
// in base 2. m is the largest score rounded up to a whole number, so p rounds to f16 alike whatever m is, and
// partial results differ by exact powers of two: how tokens are divided among warps and splits leaves no
// trace but f32's.
#pragma once
#include "prim.cuh"

namespace kvw {

constexpr int ROW_EXTRA = 4;       // m, l and padding that spreads rows over shared memory banks
constexpr float NO_SCORE = -1e30f; // below every score, and finite: no inf - inf

struct Merged {
    float o, m, l;
};

// Channel c of `n` partial rows `stride` floats apart, added in index order.
template <int D> PRIM Merged merge_rows(const float* rows, int n, int stride, int c) {
    Merged out{0.f, NO_SCORE, 0.f};
    for (int i = 0; i < n; i++) out.m = fmaxf(out.m, rows[size_t(i) * stride + D]);
    for (int i = 0; i < n; i++) {
        const float* row = rows + size_t(i) * stride;
        float w = prim::exp2_approx(row[D] - out.m);
        out.o = fmaf(w, row[c], out.o);
        out.l = fmaf(w, row[D + 1], out.l);
    }
    return out;
}

// Attention output: zero where no token was seen.
PRIM __half normalised(const Merged& x) { return __float2half_rn(x.l > 0.f ? x.o / x.l : 0.f); }

// Natural log of the sum of exponentials.
PRIM float log_sum_exp(const Merged& x) {
    constexpr float LN_2 = 0.6931471805599453f;
    return x.l > 0.f ? (x.m + log2f(x.l)) * LN_2 : -INFINITY;
}

} // namespace kvw
