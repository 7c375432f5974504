// rope.cuh - sines of RoPE angles and the rounding of what they turn.
#pragma once
#include "prim.cuh"

namespace kvw {

constexpr int ROPE_MAX_D = 256;

// sin and cos of an f32 angle, each within 1e-7 for any |angle| < 2^31. sincosf keeps a table in local memory
// for angles beyond 105615; here the nearest multiple k of pi / 2 is taken off with fused multiply-adds, in
// f32 where k is small enough for three parts of pi / 2, and in f64 beyond. Every executor rounds the same
// way.
PRIM void sin_cos(float angle, float& sin, float& cos) {
    float r;
    int quarter;
    if (fabsf(angle) < 65536.f) {
        float k = rintf(__fmul_rn(angle, 0.636619747f));
        r = fmaf(-k, 7.54979013e-8f, fmaf(-k, 1.57079625f, angle));
        r = fmaf(-k, -1.71512451e-15f, r);
        quarter = int(k) & 3;
    } else {
        double k = rint(double(angle) * 0.63661977236758134308);
        r = float(fma(-k, 6.12323399573676603587e-17, fma(-k, 1.57079632679489655800, double(angle))));
        quarter = int((long long)k & 3);
    }
    float z = __fmul_rn(r, r);
    float s = fmaf(z, fmaf(z, fmaf(z, fmaf(z, 1.f / 362880, -1.f / 5040), 1.f / 120), -1.f / 6), 1.f);
    float c = fmaf(z, fmaf(z, fmaf(z, fmaf(z, 1.f / 40320, -1.f / 720), 1.f / 24), -.5f), 1.f);
    s = __fmul_rn(s, r);
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
