// pack.cuh - a CTA turns an f16 slab into a packed one, both in mma-ready order.
//
// A pair (tile, j, side) belongs to the same lane in every format, so each lane owns whole words of the
// packed slab: it reads its own f16 words, and what it needs from others are only the group's scale and
// minimum. Those come first, into shared memory, in the slab's own order: `extremes`, a barrier, then
// `codes`.
#pragma once
#include "codec.cuh"
#include "rope.cuh"
#include "slab.cuh"

namespace kvw {

constexpr int PACK_WARPS = 4, PACK_THREADS = 32 * PACK_WARPS;

// Some tokens of a slab, [from, until).
struct Span {
    int from, until;
    PRIM bool has(int token) const { return from <= token && token < until; }
};

// Where a pair's word lies in an f16 section, in bytes. K: token and an even channel. V: token pair, channel;
// the halves of a V word are an even token and the next.
template <int D> PRIM int k_word(int token, int channel) {
    int f = token / 16 * (D / 8) + channel / 8, lane = token % 8 * 4 + channel % 8 / 2;
    return (f / 2 * 32 + lane) * 16 + f % 2 * 8 + token % 16 / 8 * 4;
}

template <int D> PRIM int v_word(int token, int channel) {
    int f = token / 16 * (D / 8) + channel / 8, lane = channel % 8 * 4 + token % 8 / 2;
    return (f / 2 * 32 + lane) * 16 + f % 2 * 8 + token % 16 / 8 * 4;
}

PRIM uint32_t half2_bits(__half low, __half high) {
    return uint32_t(__half_as_ushort(high)) << 16 | __half_as_ushort(low);
}

// Smallest and largest of a pair of columns; NaN takes no part.
struct Extremes {
    uint32_t min, max;

    PRIM static Extremes none() { return {0x7C007C00u, 0xFC00FC00u}; } // inf, -inf

    PRIM void take(uint32_t pair) {
        min = half2_bits(__hmin2(half2_of(min), half2_of(pair)));
        max = half2_bits(__hmax2(half2_of(max), half2_of(pair)));
    }

    // The other where `other` is true; by value, so that neither lands in local memory.
    PRIM Extremes or_else(const Extremes& x, bool other) const {
        return {other ? x.min : min, other ? x.max : max};
    }

    // Of the lanes whose lane % 4 is the same: the rows r.
    PRIM void over_rows() {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
            uint32_t low = __shfl_xor_sync(~0u, min, lanes), high = __shfl_xor_sync(~0u, max, lanes);
            min = half2_bits(__hmin2(half2_of(min), half2_of(low)));
            max = half2_bits(__hmax2(half2_of(max), half2_of(high)));
        }
    }
};

// Scales and minima of two groups, as half pairs. Adding 0 turns -0 into 0, as every executor does.
struct Meta {
    uint32_t scales, minima;

    template <int BITS> PRIM static Meta of(const Extremes& x) {
        constexpr int MAX_CODE = (1 << BITS) - 1;
        float2 min = __half22float2(half2_of(x.min)), max = __half22float2(half2_of(x.max));
        Meta m;
        m.scales = half2_bits(group_scale(min.x, max.x, MAX_CODE), group_scale(min.y, max.y, MAX_CODE));
        m.minima = half2_bits(__float2half_rn(min.x + 0.f), __float2half_rn(min.y + 0.f));
        return m;
    }

    // Codes of a pair in the low bits of each half.
    template <int BITS> PRIM uint32_t codes(uint32_t pair) const {
        constexpr int MAX_CODE = (1 << BITS) - 1;
        float2 x = __half22float2(half2_of(pair)), s = __half22float2(half2_of(scales));
        float2 min = __half22float2(half2_of(minima));
        return code_of(x.x, min.x, s.x, MAX_CODE) | code_of(x.y, min.y, s.y, MAX_CODE) << 16;
    }

    // What the codes stand for, rounded to f16.
    PRIM uint32_t values(uint32_t codes) const {
        float2 s = __half22float2(half2_of(scales)), min = __half22float2(half2_of(minima));
        return half2_bits(half_saturated(fmaf(float(codes & 0xFFFF), s.x, min.x)),
                          half_saturated(fmaf(float(codes >> 16), s.y, min.y)));
    }
};

constexpr int SMALLEST_STEP = -24; // log2; f16 has no finer one

// The grid of two-level minima: the finest that has all of them, rounded down, within 255 steps of one below
// 1024. Nothing on it lies below the smallest f16.
struct MinimaGrid {
    float step, first; // first in steps

    PRIM float in_steps(float x) const {
        return fmaxf(floorf(x * (1.f / step)), ceilf(-65504.f * (1.f / step)));
    }

    PRIM static MinimaGrid over(float low, float high) {
        MinimaGrid g{};
        float last;
        int e = SMALLEST_STEP;
        do {
            g.step = power_of_two(e++);
            g.first = g.in_steps(low), last = g.in_steps(high);
        } while (last - g.first > 255.f || fabsf(g.first) > 1023.f);
        return g;
    }

    PRIM float below(float x) const { return in_steps(x) * step; }
};

// One CTA, one slab of FORMAT, laid out as `l` says; `from` the f16 slab, `to` the packed one, `meta` in shared
// memory.
template <int FORMAT, int D> struct Packer {
    using F16 = Slab<KVW_SLAB_F16, D, 32>;
    static constexpr int BITS = code_bits(FORMAT), SLOTS = 16 / BITS, MAX_CODE = (1 << BITS) - 1;
    static constexpr int PAIRS = D / 8; // of one side, a tile and lane

    const Layout l;
    const bool two_level;
    unsigned char *from, *to;
    uint32_t* meta;
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, r = lane / 4, t = lane % 4;

    PRIM Packer(const kvw_cache& c, unsigned char* from_, unsigned char* to_, uint32_t* meta_)
        : l(layout_of(FORMAT, D, c.group, c.meta)),
          two_level(has_meta(FORMAT) && c.meta == KVW_META_U8),
          from(from_),
          to(to_),
          meta(meta_) {}

    // Everything, K and V.
    PRIM void pack() const {
        Span all = {0, TOKENS};
        if (has_meta(FORMAT)) {
            k_extremes(all);
            v_extremes();
            if (!KVW_FAULT(201)) __syncthreads();
            if (two_level) {
                if (warp == 0) fit(0, 0, k_words(), D);
                if (warp == 1) fit(1, k_words(), v_words(), v_words());
                if (!KVW_FAULT(208)) __syncthreads();
            }
        }
        codes<true, false>(all);
        codes<false, false>(all);
        if (!has_meta(FORMAT)) return;
        copy_meta(l.k_meta, 0, k_words());
        copy_meta(l.v_meta, k_words(), v_words());
    }

    // K of some groups; their f16 values become what the codes stand for.
    PRIM void pack_keys(Span tokens) const {
        k_extremes(tokens);
        __syncthreads();
        codes<true, true>(tokens);
        for (int g = 0; g < l.k_groups; g++) {
            if (tokens.has(g * l.k_group)) copy_meta(l.k_meta + g * l.k_group_bytes, g * D, D);
        }
    }

private:
    // Words of metadata in shared memory: f16 pairs, for K D a group, scales then minima; for V scales, then
    // minima. Until `fit` largest, then smallest, where metadata is two-level.
    PRIM int k_words() const { return l.k_groups * D; }
    PRIM int v_words() const { return TOKENS * l.v_groups; }

    PRIM void put_meta(const Extremes& x, int at, int minima) const {
        Meta m = two_level ? Meta{x.max, x.min} : Meta::of<BITS>(x);
        meta[at] = m.scales;
        meta[at + minima] = m.minima;
    }

    // Unit u of a section of the f16 slab: pairs f = 2 u and 2 u + 1, each side 0 then side 1.
    PRIM uint4* unit(int section, int u) const {
        return reinterpret_cast<uint4*>(from + section + (u * 32 + lane) * 16);
    }

    // A warp takes two columns j of a group of tokens.
    PRIM void k_extremes(Span tokens) const {
        constexpr int COLUMNS = PAIRS / 2;
        int tiles = l.k_group / 16;
#pragma unroll 1
        for (int task = warp; task < l.k_groups * COLUMNS; task += PACK_WARPS) {
            int group = task / COLUMNS, j = task % COLUMNS * 2;
            if (!tokens.has(group * l.k_group)) continue;
            Extremes low = Extremes::none(), high = low;
#pragma unroll 2
            for (int tile = 0; tile < tiles; tile++) {
                uint4 x = *unit(0, ((group * tiles + tile) * PAIRS + j) / 2);
                low.take(x.x), low.take(x.y);
                high.take(x.z), high.take(x.w);
            }
            low.over_rows();
            high.over_rows();
            // Row 0 has column j, row 1 column j + 1.
            if (r < 2) put_meta(low.or_else(high, r == 1), group * D + k_meta(j + r), D / 2);
        }
    }

    // A warp takes a group of channels of a tile of tokens.
    PRIM void v_extremes() const {
#pragma unroll 1
        for (int task = warp; task < TOKENS / 16 * l.v_groups; task += PACK_WARPS) {
            int tile = task / l.v_groups, group = task % l.v_groups;
            int first = (tile * PAIRS + group * (l.v_group / 8)) / 2;
            int channels = KVW_FAULT(203) ? l.v_group : min(l.v_group, D - group * l.v_group);
            Extremes low = Extremes::none(), high = low;
            for (int i = 0; i < channels / 16; i++) {
                uint4 x = *unit(F16::V_CODES, first + i);
                low.take(x.x), low.take(x.z);
                high.take(x.y), high.take(x.w);
            }
            low.over_rows();
            high.over_rows();
            // Row 0 has side 0, row 1 side 1.
            if (r < 2) put_meta(low.or_else(high, r == 1), k_words() + v_meta(tile, group, r), v_words() / 2);
        }
    }

    PRIM int k_meta(int j) const { return (j / 4 * 4 + t) * 4 + j % 4; }
    PRIM int v_meta(int tile, int group, int side) const {
        return ((tile * 4 + t) * l.v_groups + group) * 2 + side;
    }

    template <bool KEYS> PRIM Meta meta_of(int tile, int j, int side) const {
        int group = KEYS ? tile * 16 / l.k_group : j * 8 / l.v_group;
        int at = KEYS ? group * D + k_meta(j) : k_words() + v_meta(tile, group, side);
        return {meta[at], meta[at + (KEYS ? D / 2 : v_words() / 2)]};
    }

    // A warp takes word w of both sides: 2 * SLOTS pairs a lane. KEEP: leave the values in `from`.
    template <bool KEYS, bool KEEP> PRIM void codes(Span tokens) const {
        constexpr int WORDS = TOKENS / 16 * PAIRS / SLOTS, UNITS = SLOTS / 2;
#pragma unroll 1
        for (int w = warp; w < WORDS; w += PACK_WARPS) {
            if (!tokens.has(w * SLOTS / PAIRS * 16)) continue;
            uint32_t out[2] = {};
#pragma unroll
            for (int i = 0; i < UNITS; i++) {
                int u = w * UNITS + i, tile = 2 * u / PAIRS, j = 2 * u % PAIRS;
                uint4* at = unit(KEYS ? 0 : F16::V_CODES, u);
                uint4 x = *at;
                uint32_t y[4];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    int side = n % 2;
                    Meta m = has_meta(FORMAT) ? meta_of<KEYS>(tile, j + n / 2, side) : Meta{};
                    uint32_t pair = has_meta(FORMAT) ? m.template codes<BITS>(component(x, n))
                                                     : e4m3_codes(component(x, n));
                    out[KVW_FAULT(204) ? 1 - side : side] |= pair << (BITS * (2 * i + n / 2));
                    y[n] = KEEP ? m.values(pair) : 0;
                }
                if (KEEP) *at = make_uint4(y[0], y[1], y[2], y[3]);
            }
            unsigned char* section = to + (KEYS ? 0 : l.v_codes);
            *reinterpret_cast<uint2*>(section + (w / 2 * 32 + lane) * 16 + w % 2 * 8) =
                make_uint2(out[0], out[1]);
        }
    }

    PRIM static uint32_t e4m3_codes(uint32_t pair) {
        float2 x = __half22float2(half2_of(pair));
        return e4m3_of(x.x) | e4m3_of(x.y) << 16;
    }

    PRIM void copy_meta(int section, int first, int words) const {
        if (two_level) return copy_bytes(section, first, words);
        for (int i = int(threadIdx.x) * 4; i < words; i += PACK_THREADS * 4) {
            uint4 x =
                make_uint4(meta[first + i], meta[first + i + 1], meta[first + i + 2], meta[first + i + 3]);
            prim::stg128(to + section + i * 4, x);
        }
    }

    // ---- two-level metadata, bit for bit src/slab/steps.rs

    PRIM float* steps(int which) const {
        return reinterpret_cast<float*>(meta + k_words() + v_words()) + 4 * which;
    }

    // Smallest and largest of a group, half `e` of words of largest and smallest; zeros for none.
    PRIM static float2 range(uint32_t largest, uint32_t smallest, int e) {
        float2 high = __half22float2(half2_of(largest)), low = __half22float2(half2_of(smallest));
        float a = e ? low.y : low.x, b = e ? high.y : high.x;
        if (!(a <= b)) a = b = 0.f;
        return make_float2(fminf(fmaxf(a, -65504.f), 65504.f), fminf(fmaxf(b, -65504.f), 65504.f));
    }

    // By one warp, for K (0) or V (1): `words` from `first` on, blocks of `block` whose first half is the
    // largest and the other the smallest, become scales and minima on grids that cover them all.
    PRIM void fit(int which, int first, int words, int block) const {
        int half = block / 2;
        auto at = [&](int i) { return first + i / half * block + i % half; };
        float low = INFINITY, high = -INFINITY;
        for (int i = lane; i < words; i += 32) { // i / 2 is a pair, i % 2 its half
            float x = range(meta[at(i / 2)], meta[at(i / 2) + half], i % 2).x;
            low = fminf(low, x), high = fmaxf(high, x);
        }
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            low = fminf(low, __shfl_xor_sync(~0u, low, lanes));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, lanes));
        }
        const MinimaGrid grid = MinimaGrid::over(low, high);
        int e = SMALLEST_STEP;
        double most = 255.0 * MAX_CODE * power_of_two(e);
        for (int i = lane; i < words; i += 32) {
            float2 x = range(meta[at(i / 2)], meta[at(i / 2) + half], i % 2);
            for (double span = double(x.y) - grid.below(x.x); span > most; most *= 2) e++;
        }
        for (int lanes = 1; lanes < 32; lanes *= 2) e = max(e, __shfl_xor_sync(~0u, e, lanes));
        float step = power_of_two(e);
        __syncwarp();
        for (int i = lane; i < words / 2; i += 32) {
            uint32_t &largest = meta[at(i)], &smallest = meta[at(i) + half];
            float scale[2], minimum[2];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float2 x = range(largest, smallest, n);
                minimum[n] = grid.below(x.x);
                double span = fmax(double(x.y) - minimum[n], 0.0);
                double steps = span / (double(MAX_CODE) * step);
                scale[n] = float(KVW_FAULT(210) ? floor(steps) : ceil(steps)) * step;
            }
            largest = half2_bits(__float2half_rn(scale[0]), __float2half_rn(scale[1]));
            smallest = half2_bits(__float2half_rn(minimum[0]), __float2half_rn(minimum[1]));
        }
        float* to = steps(which);
        if (lane == 0) to[0] = step, to[1] = grid.step, to[2] = grid.first * grid.step + 0.f, to[3] = 0.f;
    }

    // `words` of f16 pairs from `first` on as bytes, and their steps.
    PRIM void copy_bytes(int section, int first, int words) const {
        const bool keys = first == 0;
        const float* s = steps(keys ? 0 : 1);
        int block = keys ? D : words;
        for (int i = int(threadIdx.x); i < words / 2; i += PACK_THREADS) {
            bool scale = 2 * i % block < block / 2;
            float base = scale ? 0.f : s[2], inverse = 1.f / (scale ? s[0] : s[1]);
            float2 a = __half22float2(half2_of(meta[first + 2 * i]));
            float2 b = __half22float2(half2_of(meta[first + 2 * i + 1]));
            auto byte = [&](float x) { return uint32_t((x - base) * inverse); };
            *reinterpret_cast<uint32_t*>(to + section + 4 * i) =
                byte(a.x) | byte(b.x) << 8 | byte(a.y) << 16 | byte(b.y) << 24;
        }
        if (threadIdx.x < 4) {
            float* tail = reinterpret_cast<float*>(to + l.steps + (keys ? 0 : STEPS_BYTES / 2));
            tail[threadIdx.x] = s[threadIdx.x];
        }
    }
};

} // namespace kvw
