// codec.cuh - the numbers in a slab: codes out of their words, and codes from numbers.
//
// A code c masked in place in a half whose exponent bits are zero is the subnormal c * 2^(BITS * (slot %
// LOW)) * 2^-24, exact: unpacking a pair is one AND, and the power of two is folded into another factor. A
// word is shifted once, by 8, so the power depends on j % LOW only (D / 8 is a multiple of LOW): LOW = 4
// slots at 2 bits, 2 at 4, 1 at 8.
#pragma once
#include "prim.cuh"

namespace kvw {

// Pairs that a word gives up before it must be shifted.
template <int BITS> constexpr int LOW = BITS == 16 ? 1 : 8 / BITS;

// Pair `slot` of a word as two halves: the value itself at 16 bits, else the subnormal code.
template <int BITS> PRIM uint32_t unpack(uint32_t word, int slot) {
    if constexpr (BITS == 16) {
        return word;
    } else {
        constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x00010001u;
        int low = slot % LOW<BITS>;
        return (slot == low ? word : word >> 8) & (MASK << (BITS * low));
    }
}

// log2 of what code 1 of pair j reads as; 0 at 16 bits, where the value is itself.
template <int BITS> __host__ __device__ constexpr int code_exponent(int j) {
    return BITS == 16 ? 0 : BITS * (j % LOW<BITS>)-24;
}

template <class T> PRIM void swap(T& a, T& b) {
    T c = a;
    a = b;
    b = c;
}

// 2^n for -126 <= n <= 127.
PRIM float power_of_two(int n) { return __int_as_float((n + 127) << 23); }

// 1 / x of such a power.
PRIM float inverse_power(float x) { return __uint_as_float((254u << 23) - __float_as_uint(x)); }

constexpr uint32_t HALF2_ONES = 0x3C003C00u, HALF2_MINUS_1024 = 0xE400E400u;

PRIM uint32_t half2_bits(__half2 x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

PRIM __half2 half2_of(uint32_t u) {
    __half2 x;
    memcpy(&x, &u, sizeof x);
    return x;
}

// Both halves of a, times those of b, rounded to f16.
PRIM uint32_t mul2(uint32_t a, uint32_t b) { return half2_bits(__hmul2(half2_of(a), half2_of(b))); }

// Both halves of a * b + c, rounded to f16 once.
PRIM uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return half2_bits(__hfma2(half2_of(a), half2_of(b), half2_of(c)));
}

// Pair `slot` (0, 1) of the bytes of a word, each below the byte `high` of its half.
template <uint32_t HIGH = 0> PRIM uint32_t spread(uint32_t word, int slot) {
    if (HIGH == 0 && slot == 0) return word & 0x00FF00FFu;
    return prim::prmt(word, HIGH * 0x01010101u, slot == 0 ? 0x4240 : 0x4341);
}

// Pair `slot` of a word of e4m3, times 2^-8: exponent and mantissa in their places in a half, whose exponent
// is 8 larger for the same bits, subnormals included. No byte gives a NaN; 0x7F and 0xFF are +-480.
PRIM uint32_t e4m3_pair(uint32_t word, int slot) {
    uint32_t digits = slot == 0 ? word << 7 : word >> 1, sign = slot == 0 ? word << 8 : word;
    return (digits & 0x3F803F80u) | (sign & 0x80008000u);
}

// The nearest e4m3, ties to even, beyond +-448 that; 0 for NaN.
PRIM uint32_t e4m3_of(float x) {
    float y = fminf(fabsf(x), 448.f);
    uint32_t bits = __float_as_uint(y),
             normal = ((bits + 0x7FFFFu + (KVW_FAULT(209) ? 1 : bits >> 20 & 1)) >> 20) - (120u << 3);
    uint32_t code = y < 0.015625f ? uint32_t(rintf(y * 512.f)) : normal;
    return x == x ? code | (__float_as_uint(x) >> 31) << 7 : 0u;
}

// A 16-byte vector as an array; i is known at compile time.
PRIM uint32_t component(const uint4& u, int i) { return i == 0 ? u.x : i == 1 ? u.y : i == 2 ? u.z : u.w; }

// a / b correctly rounded, for b > 0 of at most 12 significant bits (any f16), y within 2 ulp of 1 / b, and a of
// which nothing here overflows. A division that may meet any number ends in a call; this is three
// instructions. The first quotient is within a few ulp, so its remainder is exact; as b is short, a / b stays
// 2^-37 of itself away from a rounding boundary, and what is rounded last is off by 2^-45.
PRIM float quotient(float a, float b, float y) {
    float q = __fmul_rn(a, y);
    return fmaf(fmaf(-q, b, a), y, q);
}

// The same in f64, for b of few bits and y its reciprocal, rounded: q is within 1 ulp, so that the last step rounds
// the exact quotient (Markstein, IBM J. Res. Dev. 34, 1990).
PRIM double quotient(double a, double b, double y) {
    double q = __dmul_rn(a, y);
    return fma(fma(-q, b, a), y, q);
}

// 1 / max_code without a division.
template <class T> PRIM T reciprocal(int max_code) {
    return max_code == 3 ? T(1) / 3 : max_code == 15 ? T(1) / 15 : T(1) / 255;
}

// Quantiser of a group, f32 rounded once a step so that every side gives the same bits:
// scale = f16((max - min) / max_code), code = round_half_even((x - min) / scale) clamped; scale 0 gives code
// 0. NaN must not take part in min and max (fminf, fmaxf) and gets code 0.
PRIM __half group_scale(float min, float max, int max_code) {
    float range = __fsub_rn(max, min), q = quotient(range, float(max_code), reciprocal<float>(max_code));
    return __float2half_rn((range > 0.f ? q : range) + 0.f); // -inf where all is NaN
}

PRIM float code_of(float x, float min, float scale, int max_code) {
    float q = scale > 0.f ? rintf(quotient(__fsub_rn(x, min), scale, prim::rcp_approx(scale))) : 0.f;
    return fminf(fmaxf(q, 0.f), float(max_code));
}

} // namespace kvw
