// pack.cuh - a CTA turns an f16 slab into a packed one, both in mma-ready order.
//
// A pair (tile, j, side) belongs to the same lane in every format, so each lane owns whole words of the
// packed slab: it reads its own f16 words, and what it needs from others are only the group's scale and
// minimum. Those come first, into shared memory, in the slab's own order: `measure`, a barrier, then
// `codes`. The format is a run-time number: one body serves all of them.
#pragma once
#include "rope.cuh"
#include "rounding.cuh"

namespace kvw {

constexpr int PACK_WARPS = 4, PACK_THREADS = 32 * PACK_WARPS;

// Scales and minima of K and V as f16 pairs in the smallest groups, and steps: a packer's `meta`.
template <int D> constexpr int META_WORDS = 2 * D + TOKENS * (D / 32) + STEPS_BYTES / 4;

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

// Scales and minima of two groups, as half pairs.
struct Meta {
    uint32_t scales, minima;

    PRIM static Meta of(const Scale& low, const Scale& high) {
        return {half2_bits(low.scale, high.scale), half2_bits(low.minimum, high.minimum)};
    }

    // Codes of a pair in the low bits of each half.
    PRIM uint32_t codes(uint32_t pair, int max_code) const {
        float2 x = __half22float2(half2_of(pair)), s = __half22float2(half2_of(scales));
        float2 min = __half22float2(half2_of(minima));
        return uint32_t(code_of(x.x, min.x, s.x, max_code)) |
               uint32_t(code_of(x.y, min.y, s.y, max_code)) << 16;
    }

    // What the codes stand for, rounded to f16.
    PRIM uint32_t values(uint32_t codes) const {
        float2 s = __half22float2(half2_of(scales)), min = __half22float2(half2_of(minima));
        return half2_bits(half_saturated(fmaf(float(codes & 0xFFFF), s.x, min.x)),
                          half_saturated(fmaf(float(codes >> 16), s.y, min.y)));
    }
};

// One CTA, one slab of `format`, laid out as `l` says; `from` the f16 slab, `to` the packed one, `meta` in shared
// memory.
template <int D> struct Packer {
    using F16 = Slab<KVW_SLAB_F16, D, 32>;
    static constexpr int PAIRS = D / 8; // of one side, a tile and lane

    const int format, bits;
    const Layout l;
    const bool two_level;
    const Rounding rounding;
    unsigned char *from, *to;
    uint32_t* meta;
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, r = lane / 4, t = lane % 4;

    PRIM Packer(const kvw_cache& c, int format_, float range, unsigned char* from_, unsigned char* to_,
                uint32_t* meta_)
        : format(format_),
          bits(code_bits(format_)),
          l(layout_of(format_, D, c.group, c.meta)),
          two_level(has_meta(format_) && c.meta == KVW_META_U8),
          rounding(bits, range),
          from(from_),
          to(to_),
          meta(meta_) {}

    // Scales and minima of V, and of K if `keys`; if not, its steps alone where metadata is two-level.
    PRIM void measure(bool keys) const {
        if (!has_meta(format)) return;
        if (keys || two_level) k_extremes({0, TOKENS});
        v_extremes();
        if (!KVW_FAULT(201)) __syncthreads();
        if (!two_level) return;
        if (warp == 0) fit(0, 0, k_words(), D, keys);
        if (warp == 1) fit(1, k_words(), v_words(), v_words(), true);
        if (!KVW_FAULT(208)) __syncthreads();
    }

    PRIM void put_meta() const {
        if (!has_meta(format)) return;
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

    // A warp takes four units of the f16 section: whole words of both sides in every format. KEEP: leave the
    // values in `from`.
    template <bool KEYS, bool KEEP> PRIM void codes(Span tokens) const {
        constexpr int UNITS = 4;
#pragma unroll 1
        for (int first = warp * UNITS; first < TOKENS / 32 * PAIRS; first += PACK_WARPS * UNITS) {
            if (!tokens.has(first * 2 / PAIRS * 16)) continue;
            uint4 x[UNITS];
            uint32_t out[2] = {};
#pragma unroll
            for (int i = 0; i < UNITS; i++) x[i] = *unit(KEYS ? 0 : F16::V_CODES, first + i);
#pragma unroll
            for (int i = 0; i < UNITS; i++) {
                int f = 2 * (first + i), tile = f / PAIRS, j = f % PAIRS;
                uint32_t y[4];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    int side = n % 2;
                    Meta m = has_meta(format) ? meta_of<KEYS>(tile, j + n / 2, side) : Meta{};
                    uint32_t pair = has_meta(format) ? m.codes(component(x[i], n), rounding.max_code)
                                                     : e4m3_codes(component(x[i], n));
                    out[KVW_FAULT(204) ? 1 - side : side] |= pair << ((f + n / 2) * bits & 15);
                    y[n] = KEEP ? m.values(pair) : 0;
                }
                if (KEEP) *unit(0, first + i) = make_uint4(y[0], y[1], y[2], y[3]);
                if (((f + 2) * bits & 15) != 0) continue;
                put_words(KEYS ? 0 : l.v_codes, f * bits / 16, out);
                out[0] = out[1] = 0;
            }
        }
    }

    // Word w of both sides.
    PRIM void put_words(int section, int w, const uint32_t (&words)[2]) const {
        *reinterpret_cast<uint2*>(to + section + (w / 2 * 32 + lane) * 16 + w % 2 * 8) =
            make_uint2(words[0], words[1]);
    }

    // Scale and minimum of a group of K, of extremes of any size.
    PRIM Scale k_scale(const Interval& x) const {
        return two_level ? grid(0).of(x, rounding) : Scale::of(x, rounding);
    }

    PRIM void put_k_scale(int group, int channel, const Scale& s) const {
        __half* at = reinterpret_cast<__half*>(meta + group * D + k_meta(channel / 8, channel % 8 / 2));
        at[channel % 2] = s.scale;
        at[D + channel % 2] = s.minimum;
    }

private:
    // Words of metadata in shared memory: f16 pairs, for K D a group, scales then minima; for V scales, then
    // minima. Until `fit` largest, then smallest, where metadata is two-level.
    PRIM int k_words() const { return l.k_groups * D; }
    PRIM int v_words() const { return TOKENS * l.v_groups; }

    PRIM void put_extremes(const Extremes& x, int at, int minima) const {
        float2 low = __half22float2(half2_of(x.min)), high = __half22float2(half2_of(x.max));
        Meta m = Meta::of(Scale::of({low.x, high.x}, rounding), Scale::of({low.y, high.y}, rounding));
        meta[at] = two_level ? x.max : m.scales;
        meta[at + minima] = two_level ? x.min : m.minima;
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
            if (r < 2) put_extremes(low.or_else(high, r == 1), group * D + k_meta(j + r, t), D / 2);
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
            int at = k_words() + v_meta(tile, group, r);
            if (r < 2) put_extremes(low.or_else(high, r == 1), at, v_words() / 2);
        }
    }

    PRIM static int k_meta(int j, int t) { return (j / 4 * 4 + t) * 4 + j % 4; }
    PRIM int v_meta(int tile, int group, int side) const {
        return ((tile * 4 + t) * l.v_groups + group) * 2 + side;
    }

    template <bool KEYS> PRIM Meta meta_of(int tile, int j, int side) const {
        int group = KEYS ? tile * 16 / l.k_group : j * 8 / l.v_group;
        int at = KEYS ? group * D + k_meta(j, t) : k_words() + v_meta(tile, group, side);
        return {meta[at], meta[at + (KEYS ? D / 2 : v_words() / 2)]};
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

    // Of K (0) or V (1), once `fit` has run.
    PRIM MetaGrid grid(int which) const {
        const float* s = steps(which);
        return {s[0], s[1], s[2] * inverse_power(s[1])};
    }

    // Half `e` of words of largest and smallest.
    PRIM static Interval extremes(uint32_t largest, uint32_t smallest, int e) {
        float2 high = __half22float2(half2_of(largest)), low = __half22float2(half2_of(smallest));
        return e ? Interval{low.y, high.y} : Interval{low.x, high.x};
    }

    // By one warp, for K (0) or V (1): steps for `words` from `first` on, blocks of `block` whose first half is the
    // largest and the other the smallest; if `all`, these become scales and minima.
    PRIM void fit(int which, int first, int words, int block, bool all) const {
        int half = block / 2;
        auto at = [&](int i) { return first + i / half * block + i % half; };
        float low = INFINITY, high = -INFINITY;
        for (int i = lane; i < words; i += 32) { // i / 2 is a pair, i % 2 its half
            Interval x = extremes(meta[at(i / 2)], meta[at(i / 2) + half], i % 2).finite();
            low = fminf(low, x.low), high = fmaxf(high, rounding.highest_minimum(x));
        }
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            low = fminf(low, __shfl_xor_sync(~0u, low, lanes));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, lanes));
        }
        MetaGrid grid = MetaGrid::over(low, high);
        int e = SMALLEST_STEP;
        double most = 255.0 * rounding.max_code * power_of_two(e);
        for (int i = lane; i < words; i += 32) {
            Interval x = extremes(meta[at(i / 2)], meta[at(i / 2) + half], i % 2).finite();
            for (double width = double(x.high) - grid.minimum(x.low); width > most; most *= 2) e++;
        }
        for (int lanes = 1; lanes < 32; lanes *= 2) e = max(e, __shfl_xor_sync(~0u, e, lanes));
        grid.scale = power_of_two(e);
        __syncwarp();
        for (int i = lane; i < words / 2 && all; i += 32) {
            uint32_t &largest = meta[at(i)], &smallest = meta[at(i) + half];
            Meta m = Meta::of(grid.of(extremes(largest, smallest, 0), rounding),
                              grid.of(extremes(largest, smallest, 1), rounding));
            largest = m.scales;
            smallest = m.minima;
        }
        float* to = steps(which);
        if (lane == 0)
            to[0] = grid.scale, to[1] = grid.step, to[2] = grid.first * grid.step + 0.f, to[3] = 0.f;
    }

    // `words` of f16 pairs from `first` on as bytes, and their steps.
    PRIM void copy_bytes(int section, int first, int words) const {
        const bool keys = first == 0;
        const float* s = steps(keys ? 0 : 1);
        int block = keys ? D : words;
        for (int i = int(threadIdx.x); i < words / 2; i += PACK_THREADS) {
            bool scale = 2 * i % block < block / 2;
            float base = scale ? 0.f : s[2], inverse = inverse_power(scale ? s[0] : s[1]);
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
