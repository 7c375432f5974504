// sim_lag.cuh - LagKV's scores and key norms: the part of sim_evict that reads slabs.
#pragma once
#include "sim_evict.h"
#include "common/elements.cuh"
#include "common/softmax.cuh"

namespace kvw {

constexpr int LAG_WARPS = 4, LAG_THREADS = 32 * LAG_WARPS, MAX_LAG = 1024;

// Slots of a head, [from, until).
struct Slots {
    int from, until;
    PRIM bool has(int slot) const { return from <= slot && slot < until; }
};

// fn(slab, tile, slot) for tiles of `slots` whose slabs exist: `tile` of the slab, whose first token is in `slot`. Of
// every `warps` tiles one is for this call, the one whose number in the head is `warp` more than a multiple.
template <int D, class Fn>
PRIM void each_tile(const Head<D, 0>& head, const Slots& slots, int warp, int warps, Fn fn) {
    for (int i = slots.from / TOKENS; i * TOKENS < slots.until; i++) {
        SlabAddress at = head.slab(i);
        if (at == 0) continue;
        SlabElements<D> slab(head.cache, at);
        for (int tile = 0; tile < TOKENS / 16; tile++) {
            int slot = i * TOKENS + tile * 16;
            if (slot + 16 > slots.from && slot < slots.until && slot / 16 % warps == warp) fn(slab, tile, slot);
        }
    }
}

// How a reference scales a channel: (x - low) * inverse; both 0 where it takes no part. K, then V.
template <int D> struct Channels {
    float low[2][D], inverse[2][D];

    PRIM void put(int which, int channel, float least, float most) {
        float range = most - least;
        bool live = range > 0.f && range < INFINITY;
        low[which][channel] = live || KVW_FAULT(701) ? least : 0.f;
        inverse[which][channel] = live || KVW_FAULT(701) ? 1.f / range : 0.f;
    }
};

template <int LANES, int FIRST> PRIM void over_lanes(float& least, float& most) {
#pragma unroll
    for (int lanes = FIRST; lanes < FIRST * LANES; lanes *= 2) {
        least = fminf(least, __shfl_xor_sync(~0u, least, lanes));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
    }
}

// Extremes of pairs j and j + 1 of K in the reference, by one warp. NaN takes no part.
template <int D>
PRIM void key_extremes(const Head<D, 0>& head, const Slots& reference, bool from_meta, int j, Channels<D>& to) {
    float least[2][2] = {{INFINITY, INFINITY}, {INFINITY, INFINITY}}; // [i][e]
    float most[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
    auto take = [&](int i, int e, float low, float high) {
        least[i][e] = fminf(least[i][e], low), most[i][e] = fmaxf(most[i][e], high);
    };
    each_tile(head, reference, 0, 1, [&](const SlabElements<D>& slab, int tile, int slot) {
        int group = slab.l.k_group, first = slot - tile * 16 % group; // the group's first slot
        if (from_meta && has_meta(slab.format) && reference.has(first) && reference.has(first + group - 1)) {
            if (slot != first) return;
            Factors scale, low;
            slab.k_meta(tile * 16 / group, j, scale, low);
            float codes = float((1 << slab.bits) - 1);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float x = low.x[n / 2][n % 2];
                take(n / 2, n % 2, x, fmaf(codes, scale.x[n / 2][n % 2], KVW_FAULT(702) ? 0.f : x));
            }
            return;
        }
        Elements k = slab.keys(tile, j);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float x = k.x[n / 4][n / 2 % 2][n % 2];
            if (reference.has(slot + slab.r + n / 2 % 2 * 8) || KVW_FAULT(703)) take(n / 4, n % 2, x, x);
        }
    });
    int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        over_lanes<8, 4>(least[n / 2][n % 2], most[n / 2][n % 2]);
        if (lane < 4) to.put(0, 8 * (j + n / 2) + 2 * lane + n % 2, least[n / 2][n % 2], most[n / 2][n % 2]);
    }
}

// The same of V.
template <int D>
PRIM void value_extremes(const Head<D, 0>& head, const Slots& reference, int j, Channels<D>& to) {
    float least[2] = {INFINITY, INFINITY}, most[2] = {-INFINITY, -INFINITY};
    each_tile(head, reference, 0, 1, [&](const SlabElements<D>& slab, int tile, int slot) {
        Elements v = slab.values(tile, j);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float x = v.x[n / 4][n / 2 % 2][n % 2];
            if (!reference.has(slot + 2 * slab.t + n % 2 + n / 2 % 2 * 8)) continue;
            least[n / 4] = fminf(least[n / 4], x), most[n / 4] = fmaxf(most[n / 4], x);
        }
    });
    int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        over_lanes<4, 1>(least[i], most[i]);
        if (lane % 4 == 0) to.put(1, 8 * (j + i) + lane / 4, least[i], most[i]);
    }
}

// Mean and squared distances from it of some numbers of a token. Sums are of distances from the first number: what
// cancels is bounded by their count.
struct Moments {
    float origin = 0.f, sum = 0.f, squares = 0.f;

    // Number n of this lane, if it is one.
    PRIM void take(float x, bool live, int n) {
        if (live && n == 0 && !KVW_FAULT(704)) origin = x;
        float d = live ? x - origin : 0.f;
        sum += d;
        squares = fmaf(d, d, squares);
    }
};

// The unbiased standard deviation of the numbers of LANES lanes, FIRST apart, `n` of this one; Chan, Golub and LeVeque's
// merge of means (Am. Stat. 37, 1983). `all` is the count of all.
template <int LANES, int FIRST> PRIM float deviation(const Moments& m, int n, int all) {
    float count = float(n), inverse = n > 0 ? 1.f / count : 0.f;
    float mean = fmaf(m.sum, inverse, m.origin), squares = m.squares - m.sum * m.sum * inverse;
#pragma unroll
    for (int lanes = FIRST; lanes < FIRST * LANES; lanes *= 2) {
        float other = __shfl_xor_sync(~0u, count, lanes);
        float d = __shfl_xor_sync(~0u, mean, lanes) - mean, both = count + other;
        float share = both > 0.f ? other / both : 0.f;
        squares += __shfl_xor_sync(~0u, squares, lanes);
        if (share > 0.f && share < 1.f) squares = fmaf(d * d, count * share, squares);
        mean = share == 1.f ? mean + d : fmaf(d, share, mean);
        count = both;
    }
    if (all < 2) return 0.f;
    float variance = squares / float(KVW_FAULT(705) ? all : all - 1);
    return variance < 0.f ? 0.f : sqrtf(variance);
}

// Deviations of the tokens of one tile: of K by their sides, of V by [side][e], into `to` of `target`.
template <int D>
PRIM void tile_deviations(const SlabElements<D>& slab, int tile, int slot, const Slots& target,
                          const Channels<D>& by, const int (&all)[2], float* const (&to)[2]) {
    Moments key[2], value[4];
    int keys = 0, values = 0; // live numbers of this lane
    auto put = [&](int which, int token, float x) {
        if (target.has(slot + token)) to[which][slot + token - target.from] = x;
    };
#pragma unroll 1
    for (int j = 0; j < D / 8; j += 2) {
        Elements k = slab.keys(tile, j), v = slab.values(tile, j);
#pragma unroll
        for (int n = 0; n < 4; n++) { // pair n / 2, of K half n % 2, of V side n % 2
            int channel = 8 * (j + n / 2) + 2 * slab.t + n % 2;
            float low = by.low[0][channel], inverse = by.inverse[0][channel];
            bool live = inverse > 0.f || KVW_FAULT(701);
#pragma unroll
            for (int side = 0; side < 2; side++)
                key[side].take((k.x[n / 2][side][n % 2] - low) * inverse, live, keys);
            keys += live;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int channel = 8 * (j + i) + slab.r;
            float low = by.low[1][channel], inverse = by.inverse[1][channel];
            bool live = inverse > 0.f || KVW_FAULT(701);
#pragma unroll
            for (int n = 0; n < 4; n++) value[n].take((v.x[i][n / 2][n % 2] - low) * inverse, live, values);
            values += live;
        }
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
        float x = deviation<4, 1>(key[side], keys, all[0]);
        if (slab.t == 0) put(0, slab.r + side * 8, x);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        float x = deviation<8, 4>(value[n], values, all[1]);
        if (slab.r == 0) put(1, 2 * slab.t + n % 2 + n / 2 * 8, x);
    }
}

// max or sum of two numbers over the CTA, the same for every thread; `room` is written, a barrier before its next use.
template <class Both> PRIM float2 over_block(float2 x, float2* room, Both both) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x.x = both(x.x, __shfl_xor_sync(~0u, x.x, lanes));
        x.y = both(x.y, __shfl_xor_sync(~0u, x.y, lanes));
    }
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    x = room[0];
    for (int w = 1; w < LAG_WARPS; w++) x = make_float2(both(x.x, room[w].x), both(x.y, room[w].y));
    return x;
}

// The sum of the softmaxes of deviations, `v_weight` of V's. NaN takes no part and stays.
PRIM void put_scores(const float* k, const float* v, int lag, float v_weight, float2* room, float* out) {
    float2 top = make_float2(-INFINITY, -INFINITY), sum = make_float2(0.f, 0.f);
    for (int i = int(threadIdx.x); i < lag; i += LAG_THREADS)
        top = make_float2(fmaxf(top.x, k[i]), fmaxf(top.y, v[i]));
    top = over_block(top, room, [](float a, float b) { return fmaxf(a, b); });
    auto weight = [&](int i) {
        return make_float2(prim::exp2_approx((k[i] - top.x) * LOG2_E),
                           prim::exp2_approx((v[i] - top.y) * LOG2_E));
    };
    for (int i = int(threadIdx.x); i < lag; i += LAG_THREADS) {
        float2 w = weight(i);
        sum = make_float2(sum.x + (w.x == w.x ? w.x : 0.f), sum.y + (w.y == w.y ? w.y : 0.f));
    }
    sum = over_block(sum, room + LAG_WARPS, [](float a, float b) { return a + b; });
    for (int i = int(threadIdx.x); i < lag; i += LAG_THREADS) {
        float2 w = weight(i);
        out[i] = fmaf(v_weight, w.y / sum.y, w.x / sum.x);
    }
}

template <int D>
__global__ void __launch_bounds__(LAG_THREADS, 4) lag(const __grid_constant__ kvw_sim_evict_params p) {
    KVW_SHARED(Channels<D>, channels, 1);
    KVW_SHARED(float, keys, MAX_LAG);
    KVW_SHARED(float, values, MAX_LAG);
    KVW_SHARED(float2, room, 2 * LAG_WARPS);
    Channels<D>& by = channels[0];
    int s = int(blockIdx.z), h = int(blockIdx.y), lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    Head<D, 0> head(p.cache, s, h);
    int at = p.cache.lens_heads == 1 ? s : s * p.cache.kv_heads + h, first = p.first ? p.first[at] : 0;
    int begin = first + int(blockIdx.x) * p.lag, end = begin + p.lag;
    if (first < 0 || end + p.lag > head.len) return;
    const Slots target = {begin, end}, reference = {end, end + p.lag - KVW_FAULT(706)};
    for (int j = 2 * warp; j < D / 8; j += 2 * LAG_WARPS) {
        key_extremes(head, reference, p.reference == KVW_LAG_META, j, by);
        value_extremes(head, reference, j, by);
    }
    for (int i = int(threadIdx.x); i < p.lag; i += LAG_THREADS) // of tokens in holes
        keys[i] = values[i] = __uint_as_float(0x7FC00000u);
    if (!KVW_FAULT(707)) __syncthreads();
    int all[2] = {0, 0}; // channels that take part
#pragma unroll
    for (int c = 0; c < D; c += 32) {
        all[0] += __popc(__ballot_sync(~0u, by.inverse[0][c + lane] > 0.f));
        all[1] += __popc(__ballot_sync(~0u, by.inverse[1][c + lane] > 0.f));
    }
    float* const to[2] = {keys, values};
    each_tile(head, target, warp, LAG_WARPS, [&](const SlabElements<D>& slab, int tile, int slot) {
        tile_deviations(slab, tile, slot, target, by, all, to);
    });
    if (!KVW_FAULT(708)) __syncthreads();
    size_t row = (size_t(s) * p.cache.kv_heads + h) * p.partitions + blockIdx.x;
    put_scores(keys, values, p.lag, p.v_weight, room, p.scores + row * p.lag);
}

// A CTA a slab, a warp a tile.
template <int D>
__global__ void __launch_bounds__(LAG_THREADS, 8) norms(const __grid_constant__ kvw_sim_evict_params p) {
    int s = int(blockIdx.z), h = int(blockIdx.y), warp = int(threadIdx.x) / 32;
    Head<D, 0> head(p.cache, s, h);
    int at = p.cache.lens_heads == 1 ? s : s * p.cache.kv_heads + h, first = p.first ? p.first[at] : 0;
    const Slots wanted = {first, min(first + p.columns, head.len)};
    int i = first / TOKENS + int(blockIdx.x), slot = i * TOKENS + warp * 16;
    if (first < 0 || i >= head.slabs()) return;
    SlabAddress address = head.slab(i);
    float* to = p.scores + (size_t(s) * p.cache.kv_heads + h) * p.columns;
    int lane = int(threadIdx.x) % 32;
    float sum[2] = {0.f, 0.f};
    if (address == 0) {
        sum[0] = sum[1] = __uint_as_float(0x7FC00000u);
    } else {
        SlabElements<D> slab(p.cache, address);
#pragma unroll 2
        for (int j = 0; j < D / 8; j += 2) {
            Elements k = slab.keys(warp, j);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float x = k.x[n / 4][n / 2 % 2][n % 2];
                sum[n / 2 % 2] = fmaf(x, x, sum[n / 2 % 2]);
            }
        }
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
        sum[side] += __shfl_xor_sync(~0u, sum[side], 1);
        if (!KVW_FAULT(709)) sum[side] += __shfl_xor_sync(~0u, sum[side], 2);
        int token = slot + lane / 4 + side * 8;
        if (lane % 4 == 0 && wanted.has(token)) to[token - first] = sqrtf(sum[side]);
    }
}

} // namespace kvw
