// intrinsics.h - CUDA's scalar intrinsics and math names for the host build.
//
// Approximate device functions (__expf, __logf, rsqrtf, __fdividef, ...) are the exact ones here: a result
// that depends on their last bits differs on the device. Rounding of everything else is the device's.
#pragma once
#include <math.h>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

using std::isfinite;
using std::isinf;
using std::isnan;

template <class To, class From> inline To simt_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline unsigned __float_as_uint(float f) { return simt_bits<unsigned>(f); }
inline int __float_as_int(float f) { return simt_bits<int>(f); }
inline float __uint_as_float(unsigned u) { return simt_bits<float>(u); }
inline float __int_as_float(int i) { return simt_bits<float>(i); }
inline long long __double_as_longlong(double d) { return simt_bits<long long>(d); }
inline double __longlong_as_double(long long i) { return simt_bits<double>(i); }

// ---- bits
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
    return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        unsigned nibble = selector >> (4 * i) & 15;
        unsigned byte = unsigned(bytes >> (8 * (nibble & 7))) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0; // replicate the sign
        r |= byte << (8 * i);
    }
    return r;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
    return unsigned((uint64_t(hi) << 32 | lo) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
    return unsigned((uint64_t(hi) << 32 | lo) >> (shift & 31));
}

// ---- integers
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __mul24(int a, int b) { return int(unsigned(a << 8 >> 8) * unsigned(b << 8 >> 8)); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += uint8_t(a >> 8 * i) * uint8_t(b >> 8 * i);
    return c;
}

template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
constexpr unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
constexpr unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
constexpr unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
constexpr unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }

// ---- f32 with a stated rounding; the build forbids contraction, so a * b + c is two roundings here
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

// ---- approximate on the device, exact here
inline float rsqrtf(float a) { return float(1.0 / sqrt(double(a))); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return float(pow(10.0, double(x))); }
inline float exp10f(float x) { return float(pow(10.0, double(x))); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x != x ? 0.f : fminf(fmaxf(x, 0.f), 1.f); }

// ---- conversions saturate, NaN becomes 0 (the host's cast of such values is undefined)
template <class To> inline To simt_saturate(double x) {
    if (x != x) return 0;
    if (sizeof(To) == 4 && !(To(-1) < To(0))) return x <= 0 ? 0 : x >= 4294967295.0 ? To(UINT_MAX) : To(x);
    return x <= -2147483648.0 ? To(INT_MIN) : x >= 2147483647.0 ? To(INT_MAX) : To(x);
}
inline int __float2int_rn(float x) { return simt_saturate<int>(nearbyint(double(x))); }
inline int __float2int_rz(float x) { return simt_saturate<int>(trunc(double(x))); }
inline int __float2int_rd(float x) { return simt_saturate<int>(floor(double(x))); }
inline int __float2int_ru(float x) { return simt_saturate<int>(ceil(double(x))); }
inline unsigned __float2uint_rn(float x) { return simt_saturate<unsigned>(nearbyint(double(x))); }
inline unsigned __float2uint_rz(float x) { return simt_saturate<unsigned>(trunc(double(x))); }
inline unsigned __float2uint_rd(float x) { return simt_saturate<unsigned>(floor(double(x))); }
inline unsigned __float2uint_ru(float x) { return simt_saturate<unsigned>(ceil(double(x))); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

// ---- loads and stores with cache hints; the data is the same
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldlu(const T* p) { return *p; }
template <class T> void __stcg(T* p, T v) { *p = v; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stwb(T* p, T v) { *p = v; }
