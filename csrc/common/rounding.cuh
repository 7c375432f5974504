// rounding.cuh - scale and minimum of a group from its extremes, bit for bit src/slab/codec.rs and steps.rs.
#pragma once
#include "codec.cuh"
#include "slab.cuh"

namespace kvw {

constexpr float F16_MAX = 65504.f;

// Within the range of f16; NaN stays.
PRIM float saturated(float x) { return x > F16_MAX ? F16_MAX : x < -F16_MAX ? -F16_MAX : x; }

// From the lower to the upper end.
struct Interval {
    float low, high;

    // What two-level metadata can say of a group: zeros where all is NaN.
    PRIM Interval finite() const {
        return low <= high ? Interval{saturated(low), saturated(high)} : Interval{0.f, 0.f};
    }
};

// What the codes of a group span, `range` of kvw_kv_pack_params.
struct Rounding {
    int max_code;
    float reach; // half the share of a group's range; 0: all of it

    PRIM Rounding(int bits, float range)
        : max_code((1 << bits) - 1), reach(bits == 2 && range < 1.f ? 0.5f * range : 0.f) {}

    // Where a group's minimum may lie at most, for the grid of minima.
    PRIM float highest_minimum(const Interval& x) const {
        float headroom = reach == 0.f || KVW_FAULT(216) ? 0.f : 0.2f;
        return fmaf(__fsub_rn(x.high, x.low), headroom, x.low);
    }

    PRIM Interval span(const Interval& x) const {
        if (reach == 0.f || x.low > x.high) return x; // all NaN: inf to -inf
        float middle = __fmul_rn(0.5f, __fadd_rn(x.low, x.high));
        float width = __fsub_rn(x.high, x.low);
        return {fmaf(-width, reach, middle), fmaf(KVW_FAULT(212) ? 2.f * width : width, reach, middle)};
    }
};

// f16 numbers. Adding 0 turns -0 into 0, as every executor does.
struct Scale {
    __half scale, minimum;

    PRIM static Scale of(const Interval& x, const Rounding& rounding) {
        Interval span = rounding.span(x);
        return {group_scale(span.low, span.high, rounding.max_code), __float2half_rn(span.low + 0.f)};
    }
};

constexpr int SMALLEST_STEP = -24; // log2; f16 has no finer one

// What bytes of two-level metadata stand for: `scale` and `step` are powers of two.
struct MetaGrid {
    float scale;       // scale 1 as a byte
    float step, first; // of minima; byte 0 is the minimum first * step

    PRIM float in_steps(float x) const {
        float inverse = inverse_power(step);
        return fmaxf(floorf(__fmul_rn(x, inverse)), ceilf(-F16_MAX * inverse));
    }

    // The finest grid that has all minima from `low` to `high`, rounded down, within 255 steps of one below 1024.
    // Nothing on it lies below the smallest f16.
    PRIM static MetaGrid over(float low, float high) {
        MetaGrid g{};
        float last;
        int e = SMALLEST_STEP;
        do {
            g.step = power_of_two(e++);
            g.first = g.in_steps(low), last = g.in_steps(high);
        } while (last - g.first > 255.f || fabsf(g.first) > 1023.f);
        return g;
    }

    // The minimum on the grid, at or below x where its bytes reach that far.
    PRIM float minimum(float x) const {
        float byte = in_steps(x) - first;
        if (!KVW_FAULT(213)) byte = fminf(fmaxf(byte, 0.f), 255.f);
        return (first + byte) * step;
    }

    // The smallest scale whose codes reach from the minimum to the upper end, or the largest there is.
    PRIM Scale of(const Interval& x, const Rounding& rounding) const {
        Interval span = rounding.span(x.finite());
        float low = minimum(span.low);
        double steps = fmax(double(span.high) - low, 0.0) * inverse_power(scale);
        double bytes = quotient(steps, double(rounding.max_code), reciprocal<double>(rounding.max_code));
        bytes = fmin(KVW_FAULT(210) ? floor(bytes) : ceil(bytes), 255.0);
        return {__float2half_rn(float(bytes) * scale), __float2half_rn(low)};
    }
};

} // namespace kvw
