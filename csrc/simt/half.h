// half.h - __half, __nv_bfloat16 and their intrinsics for the host build.
//
// Every operation rounds once, to nearest even, as the device's instructions do, subnormals included, and a
// NaN result is the device's canonical 0x7fff. Directed roundings and transcendental half functions are not
// here: kernels compute those in f32.
#pragma once
#include "runtime.h"
#include "intrinsics.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace simt {

// p + c rounded to odd at 53 bits, so that rounding the result again is as good as rounding once.
inline double add_to_odd(double p, double c) {
    double sum = p + c;
    double rest = sum - p;
    double error = (p - (sum - rest)) + (c - rest);
    if (error == 0 || !std::isfinite(sum)) return sum;
    uint64_t u = simt_bits<uint64_t>(sum);
    if (!(u & 1)) u += (error > 0) == (sum > 0) ? 1 : -1;
    return simt_bits<double>(u);
}

// A double to sign, EXPONENT bits, MANTISSA bits; nearest even.
template <int MANTISSA, int EXPONENT> inline uint16_t round16(double d) {
    constexpr int bias = (1 << (EXPONENT - 1)) - 1;
    constexpr uint16_t infinity = ((1 << EXPONENT) - 1) << MANTISSA;
    uint64_t u = simt_bits<uint64_t>(d);
    uint16_t sign = uint16_t(u >> 48 & 0x8000);
    u &= ~(1ull << 63);
    if (u > 0x7ff0000000000000ull) return 0x7fff;
    if (u == 0) return sign;
    int e = int(u >> 52) - 1023;
    if (e > bias) return sign | infinity;
    uint64_t m = (u & 0xfffffffffffffull) | (e > -1023 ? 1ull << 52 : 0);
    bool subnormal = e < 1 - bias;
    int shift = 52 - MANTISSA + (subnormal ? 1 - bias - e : 0);
    if (shift > 63) return sign;
    uint64_t q = m >> shift;
    uint64_t rest = m & ((1ull << shift) - 1), half = 1ull << (shift - 1);
    if (rest > half || (rest == half && (q & 1))) q++;
    if (subnormal) return sign | uint16_t(q);
    q += uint64_t(e + bias - 1) << MANTISSA; // q carries the implicit bit
    return q >= infinity ? sign | infinity : sign | uint16_t(q);
}

inline float f16_to_float_bits(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return __uint_as_float(sign | 0x7f800000 | m << 13);
    if (e == 0) return __uint_as_float(sign | __float_as_uint(float(m) * 0x1p-24f));
    return __uint_as_float(sign | (e + 112) << 23 | m << 13);
}
inline float f16_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    return f16_to_float_bits(h);
#endif
}
inline uint16_t float_to_f16(float f) {
#if defined(__F16C__)
    if (f != f) return 0x7fff;
    return _cvtss_sh(f, 0);
#else
    return round16<10, 5>(f);
#endif
}
inline float bf16_to_float(uint16_t h) { return __uint_as_float(uint32_t(h) << 16); }
inline uint16_t float_to_bf16(float f) {
    if (f != f) return 0x7fff;
    uint32_t u = __float_as_uint(f);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

} // namespace simt

struct __half_raw {
    unsigned short x;
};
struct __nv_bfloat16_raw {
    unsigned short x;
};

// The two formats share one definition: H the type, H2 its pair, RAW its bits, TO and FROM the conversions.
#define SIMT_HALF_TYPE(H, H2, RAW, MANTISSA, EXPONENT, TO, FROM)                                             \
    struct H {                                                                                               \
        uint16_t bits_;                                                                                      \
        H() = default;                                                                                       \
        H(float f) : bits_(simt::FROM(f)) {}                                                                 \
        H(RAW r) : bits_(r.x) {}                                                                             \
        explicit H(double d) : bits_(simt::round16<MANTISSA, EXPONENT>(d)) {}                                \
        explicit H(int i) : bits_(simt::round16<MANTISSA, EXPONENT>(i)) {}                                   \
        explicit H(unsigned u) : bits_(simt::round16<MANTISSA, EXPONENT>(u)) {}                              \
        operator float() const { return simt::TO(bits_); }                                                   \
        operator RAW() const { return {bits_}; }                                                             \
    };                                                                                                       \
    struct alignas(4) H2 {                                                                                   \
        H x, y;                                                                                              \
        H2() = default;                                                                                      \
        H2(H a, H b) : x(a), y(b) {}                                                                         \
    };

SIMT_HALF_TYPE(__half, __half2, __half_raw, 10, 5, f16_to_float, float_to_f16)
SIMT_HALF_TYPE(__nv_bfloat16, __nv_bfloat162, __nv_bfloat16_raw, 7, 8, bf16_to_float, float_to_bf16)
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// f32 is wide enough that rounding a sum, product or quotient of two halves twice is rounding it once.
#define SIMT_HALF_BINARY(H, H2, name, name2, op, symbol)                                                     \
    inline H name(H a, H b) { return H(float(a) op float(b)); }                                              \
    inline H2 name2(H2 a, H2 b) { return {name(a.x, b.x), name(a.y, b.y)}; }                                 \
    inline H name##_rn(H a, H b) { return name(a, b); }                                                      \
    inline H2 name2##_rn(H2 a, H2 b) { return name2(a, b); }                                                 \
    inline H operator op(H a, H b) { return name(a, b); }                                                    \
    inline H& operator symbol(H & a, H b) { return a = name(a, b); }                                         \
    inline H2 operator op(H2 a, H2 b) { return name2(a, b); }

#define SIMT_HALF_COMPARE(H, name, op)                                                                       \
    inline bool name(H a, H b) { return float(a) op float(b); }                                              \
    inline bool operator op(H a, H b) { return float(a) op float(b); }

#define SIMT_HALF_OPS(H, H2)                                                                                 \
    SIMT_HALF_BINARY(H, H2, __hadd, __hadd2, +, +=)                                                          \
    SIMT_HALF_BINARY(H, H2, __hsub, __hsub2, -, -=)                                                          \
    SIMT_HALF_BINARY(H, H2, __hmul, __hmul2, *, *=)                                                          \
    SIMT_HALF_BINARY(H, H2, __hdiv, __h2div, /, /=)                                                          \
    SIMT_HALF_COMPARE(H, __heq, ==)                                                                          \
    SIMT_HALF_COMPARE(H, __hne, !=)                                                                          \
    SIMT_HALF_COMPARE(H, __hlt, <)                                                                           \
    SIMT_HALF_COMPARE(H, __hle, <=)                                                                          \
    SIMT_HALF_COMPARE(H, __hgt, >)                                                                           \
    SIMT_HALF_COMPARE(H, __hge, >=)                                                                          \
    inline H __hneg(H a) { return simt_bits<H>(uint16_t(a.bits_ ^ 0x8000)); }                                \
    inline H __habs(H a) { return simt_bits<H>(uint16_t(a.bits_ & 0x7fff)); }                                \
    inline H operator-(H a) { return __hneg(a); }                                                            \
    inline H2 __hneg2(H2 a) { return {__hneg(a.x), __hneg(a.y)}; }                                           \
    inline H2 __habs2(H2 a) { return {__habs(a.x), __habs(a.y)}; }                                           \
    inline bool __hisnan(H a) { return isnan(float(a)); }                                                    \
    inline int __hisinf(H a) { return !isinf(float(a)) ? 0 : float(a) > 0 ? 1 : -1; }                        \
    inline H __hfma(H a, H b, H c) {                                                                         \
        return H(simt::add_to_odd(double(float(a)) * double(float(b)), double(float(c))));                   \
    }                                                                                                        \
    inline H2 __hfma2(H2 a, H2 b, H2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }           \
    /* the number wins over NaN, +0 over -0 in max, -0 over +0 in min */                                     \
    inline H __hmax(H a, H b) {                                                                              \
        if (isnan(float(a))) return isnan(float(b)) ? simt_bits<H>(uint16_t(0x7fff)) : b;                    \
        if (isnan(float(b)) || float(a) > float(b)) return a;                                                \
        return float(a) < float(b) ? b : simt_bits<H>(uint16_t(a.bits_ & b.bits_));                          \
    }                                                                                                        \
    inline H __hmin(H a, H b) {                                                                              \
        if (isnan(float(a))) return isnan(float(b)) ? simt_bits<H>(uint16_t(0x7fff)) : b;                    \
        if (isnan(float(b)) || float(a) < float(b)) return a;                                                \
        return float(a) > float(b) ? b : simt_bits<H>(uint16_t(a.bits_ | b.bits_));                          \
    }                                                                                                        \
    inline H2 __hmax2(H2 a, H2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                           \
    inline H2 __hmin2(H2 a, H2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                           \
    inline float __low2float(H2 a) { return a.x; }                                                           \
    inline float __high2float(H2 a) { return a.y; }

SIMT_HALF_OPS(__half, __half2)
SIMT_HALF_OPS(__nv_bfloat16, __nv_bfloat162)
#undef SIMT_HALF_TYPE
#undef SIMT_HALF_BINARY
#undef SIMT_HALF_COMPARE
#undef SIMT_HALF_OPS

// ---- f16
inline __half __float2half(float f) { return __half(f); }
inline __half __float2half_rn(float f) { return __half(f); }
inline __half __double2half(double d) { return __half(d); }
inline float __half2float(__half h) { return h; }
inline __half __int2half_rn(int i) { return __half(i); }
inline __half __uint2half_rn(unsigned u) { return __half(u); }
inline __half __ushort2half_rn(unsigned short u) { return __half(unsigned(u)); }
inline int __half2int_rn(__half h) { return __float2int_rn(h); }
inline int __half2int_rz(__half h) { return __float2int_rz(h); }
inline unsigned __half2uint_rn(__half h) { return __float2uint_rn(h); }
inline unsigned __half2uint_rz(__half h) { return __float2uint_rz(h); }
inline unsigned short __half_as_ushort(__half h) { return h.bits_; }
inline short __half_as_short(__half h) { return short(h.bits_); }
inline __half __ushort_as_half(unsigned short u) { return simt_bits<__half>(u); }
inline __half __short_as_half(short s) { return simt_bits<__half>(s); }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half2 __float2half2_rn(float f) { return {__half(f), __half(f)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 f) { return {__half(f.x), __half(f.y)}; }
inline float2 __half22float2(__half2 h) { return {float(h.x), float(h.y)}; }
inline __half2 __half2half2(__half h) { return {h, h}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline __half2 __low2half2(__half2 h) { return {h.x, h.x}; }
inline __half2 __high2half2(__half2 h) { return {h.y, h.y}; }
inline __half2 __lows2half2(__half2 a, __half2 b) { return {a.x, b.x}; }
inline __half2 __highs2half2(__half2 a, __half2 b) { return {a.y, b.y}; }
inline __half2 __lowhigh2highlow(__half2 h) { return {h.y, h.x}; }

// ---- bf16
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline float __bfloat162float(__nv_bfloat16 h) { return h; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits_; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return simt_bits<__nv_bfloat16>(u); }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {__nv_bfloat16(f), __nv_bfloat16(f)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {__nv_bfloat16(f.x), __nv_bfloat16(f.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {float(h.x), float(h.y)}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 h) { return {h, h}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 h) { return h.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 h) { return h.y; }
