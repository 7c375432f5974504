// rope.cuh - sines of RoPE angles and the rounding of what they turn.
#pragma once
#include "prim.cuh"

namespace kvw {

constexpr int ROPE_MAX_D = 256;

// sin and cos of an f32 angle, each within 1e-7 for any |angle| < 2^31. sincosf keeps a table in local memory
// for angles beyond 105615; here the nearest multiple of pi / 2 is taken off in f64, twice, and short series
// do the rest, so that every executor rounds the same way.
PRIM void sin_cos(float angle, float& sin, float& cos) {
    constexpr double TWO_OVER_PI = 0.63661977236758134308, PI_2 = 1.57079632679489655800,
                     PI_2_REST = 6.12323399573676603587e-17;
    double k = rint(double(angle) * TWO_OVER_PI);
    float r = float(fma(-k, PI_2_REST, fma(-k, PI_2, double(angle))));
    float z = __fmul_rn(r, r);
    float s = fmaf(z, fmaf(z, fmaf(z, fmaf(z, 1.f / 362880, -1.f / 5040), 1.f / 120), -1.f / 6), 1.f);
    float c = fmaf(z, fmaf(z, fmaf(z, fmaf(z, 1.f / 40320, -1.f / 720), 1.f / 24), -.5f), 1.f);
    s = __fmul_rn(s, r);
    int quarter = int((long long)k & 3);
    sin = quarter & 1 ? c : s;
    cos = quarter & 1 ? s : c;
    if (quarter & 2) sin = -sin;
    if (quarter == 1 || quarter == 2) cos = -cos;
}

// (a, b) turned: a cos - b sin, a sin + b cos, each product and sum rounded.
PRIM void rotate(float& a, float& b, float sin, float cos) {
    float x = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
    b = __fadd_rn(__fmul_rn(a, sin), __fmul_rn(b, cos));
    a = x;
}

// To f16; beyond its range, +-65504. NaN stays NaN.
PRIM __half half_saturated(float x) {
    return __float2half_rn(x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x);
}

} // namespace kvw
