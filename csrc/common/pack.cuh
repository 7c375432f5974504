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

// One CTA, one slab. L: its layout; `from` the f16 slab, `to` the packed one, `meta` in shared memory.
template <class L, int D> struct Packer {
    using F16 = Slab<KVW_SLAB_F16, D, 32>;
    static constexpr int K_META_WORDS = L::K_GROUPS * D, V_META_WORDS = TOKENS * L::V_GROUPS;
    static constexpr int META_WORDS = K_META_WORDS + V_META_WORDS;
    static constexpr int PAIRS = D / 8; // of one side, a tile and lane

    unsigned char *from, *to;
    uint32_t* meta;
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, r = lane / 4, t = lane % 4;

    PRIM Packer(unsigned char* from_, unsigned char* to_, uint32_t* meta_)
        : from(from_), to(to_), meta(meta_) {}

    // Everything, K and V.
    PRIM void pack() const {
        Span all = {0, TOKENS};
        k_extremes(all);
        v_extremes();
        if (!KVW_FAULT(201)) __syncthreads();
        codes<true, false>(all);
        codes<false, false>(all);
        copy_meta(L::K_META, 0, K_META_WORDS);
        copy_meta(L::V_META, K_META_WORDS, V_META_WORDS);
    }

    // K of some groups; their f16 values become what the codes stand for.
    PRIM void pack_keys(Span tokens) const {
        k_extremes(tokens);
        __syncthreads();
        codes<true, true>(tokens);
        int words = L::K_GROUP_BYTES / 4;
        for (int g = 0; g < L::K_GROUPS; g++) {
            if (tokens.has(g * L::K_GROUP)) copy_meta(L::K_META + g * L::K_GROUP_BYTES, g * words, words);
        }
    }

private:
    // Unit u of a section of the f16 slab: pairs f = 2 u and 2 u + 1, each side 0 then side 1.
    PRIM uint4* unit(int section, int u) const {
        return reinterpret_cast<uint4*>(from + section + (u * 32 + lane) * 16);
    }

    // A warp takes two columns j of a group of tokens.
    PRIM void k_extremes(Span tokens) const {
        constexpr int COLUMNS = PAIRS / 2, TILES = L::K_GROUP / 16;
#pragma unroll 1
        for (int task = warp; task < L::K_GROUPS * COLUMNS; task += PACK_WARPS) {
            int group = task / COLUMNS, j = task % COLUMNS * 2;
            if (!tokens.has(group * L::K_GROUP)) continue;
            Extremes low = Extremes::none(), high = low;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                uint4 x = *unit(0, ((group * TILES + tile) * PAIRS + j) / 2);
                low.take(x.x), low.take(x.y);
                high.take(x.z), high.take(x.w);
            }
            low.over_rows();
            high.over_rows();
            if (r >= 2) continue; // row 0 has column j, row 1 column j + 1
            Meta m = Meta::of<L::BITS>(low.or_else(high, r == 1));
            int at = group * D + k_meta(j + r);
            meta[at] = m.scales;
            meta[at + D / 2] = m.minima;
        }
    }

    // A warp takes a group of channels of a tile of tokens.
    PRIM void v_extremes() const {
#pragma unroll 1
        for (int task = warp; task < TOKENS / 16 * L::V_GROUPS; task += PACK_WARPS) {
            int tile = task / L::V_GROUPS, group = task % L::V_GROUPS;
            int first = (tile * PAIRS + group * (L::V_GROUP / 8)) / 2;
            int channels = KVW_FAULT(203) ? L::V_GROUP : min(L::V_GROUP, D - group * L::V_GROUP);
            Extremes low = Extremes::none(), high = low;
            for (int i = 0; i < channels / 16; i++) {
                uint4 x = *unit(F16::V_CODES, first + i);
                low.take(x.x), low.take(x.z);
                high.take(x.y), high.take(x.w);
            }
            low.over_rows();
            high.over_rows();
            if (r >= 2) continue; // row 0 has side 0, row 1 side 1
            Meta m = Meta::of<L::BITS>(low.or_else(high, r == 1));
            int at = K_META_WORDS + v_meta(tile, group, r);
            meta[at] = m.scales;
            meta[at + V_META_WORDS / 2] = m.minima;
        }
    }

    PRIM int k_meta(int j) const { return (j / 4 * 4 + t) * 4 + j % 4; }
    PRIM int v_meta(int tile, int group, int side) const {
        return ((tile * 4 + t) * L::V_GROUPS + group) * 2 + side;
    }

    template <bool KEYS> PRIM Meta meta_of(int tile, int j, int side) const {
        int group = KEYS ? tile * 16 / L::K_GROUP : j * 8 / L::V_GROUP;
        int at = KEYS ? group * D + k_meta(j) : K_META_WORDS + v_meta(tile, group, side);
        return {meta[at], meta[at + (KEYS ? D / 2 : V_META_WORDS / 2)]};
    }

    // A warp takes word w of both sides: 2 * SLOTS pairs a lane. KEEP: leave the values in `from`.
    template <bool KEYS, bool KEEP> PRIM void codes(Span tokens) const {
        constexpr int WORDS = TOKENS / 16 * PAIRS / L::SLOTS, UNITS = L::SLOTS / 2;
#pragma unroll 1
        for (int w = warp; w < WORDS; w += PACK_WARPS) {
            if (!tokens.has(w * L::SLOTS / PAIRS * 16)) continue;
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
                    Meta m = meta_of<KEYS>(tile, j + n / 2, side);
                    uint32_t pair = m.template codes<L::BITS>(component(x, n));
                    out[KVW_FAULT(204) ? 1 - side : side] |= pair << (L::BITS * (2 * i + n / 2));
                    y[n] = KEEP ? m.values(pair) : 0;
                }
                if (KEEP) *at = make_uint4(y[0], y[1], y[2], y[3]);
            }
            unsigned char* section = to + (KEYS ? 0 : L::V_CODES);
            *reinterpret_cast<uint2*>(section + (w / 2 * 32 + lane) * 16 + w % 2 * 8) =
                make_uint2(out[0], out[1]);
        }
    }

    PRIM void copy_meta(int section, int first, int words) const {
        for (int i = int(threadIdx.x) * 4; i < words; i += PACK_THREADS * 4) {
            uint4 x =
                make_uint4(meta[first + i], meta[first + i + 1], meta[first + i + 2], meta[first + i + 3]);
            prim::stg128(to + section + i * 4, x);
        }
    }
};

} // namespace kvw
