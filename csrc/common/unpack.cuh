// unpack.cuh - the numbers of a slab in f16, whatever its format, group and metadata, which are told apart at run time:
// codes become exact halves first, then scale and minimum in one rounding.
#pragma once
#include "meta.cuh"

namespace kvw {

// What a slab is made of.
template <int FORMAT_, int META_ = KVW_META_F16> struct Kind {
    static constexpr int FORMAT = FORMAT_, META = META_;
};

// act(Kind) for a slab of this format; `meta` is the cache's.
template <class Act> PRIM void with_kind(int format, int meta, Act act) {
    bool two_level = meta == KVW_META_U8;
    if (format == KVW_SLAB_F16)
        act(Kind<KVW_SLAB_F16>());
    else if (format == KVW_SLAB_FP8)
        act(Kind<KVW_SLAB_FP8>());
    else if (format == KVW_SLAB_Q8)
        act(Kind<KVW_SLAB_Q8>());
    else if (format == KVW_SLAB_Q4)
        two_level ? act(Kind<KVW_SLAB_Q4, KVW_META_U8>()) : act(Kind<KVW_SLAB_Q4>());
    else
        two_level ? act(Kind<KVW_SLAB_Q2, KVW_META_U8>()) : act(Kind<KVW_SLAB_Q2>());
}

// 2^-n in both halves, and -2^(10 - n).
PRIM uint32_t half2_down(int n) { return uint32_t(15 - n) * 0x04000400u; }
PRIM uint32_t half2_minus_1024_down(int n) { return uint32_t(25 - n) * 0x04000400u | 0x80008000u; }

constexpr uint32_t HALF2_256 = 0x5C005C00u, HALF2_MOST = 0x7BFF7BFFu;

// The codes of 16 tokens of K or V of a slab of codes, as one lane holds them: both sides of WORDS pairs.
template <int FORMAT, int WORDS> struct Codes {
    static constexpr int BITS = code_bits(FORMAT);
    static constexpr int LOW = kvw::LOW<BITS>; // pairs of a byte, and of the word's other byte
    static constexpr int BYTES = WORDS / LOW;

    uint2 word[BYTES]; // side 0, side 1; the wanted byte lowest

    PRIM Codes(const unsigned char* codes, int tile) {
        const uint2* words = reinterpret_cast<const uint2*>(codes) + threadIdx.x % 32 * 2;
        if (BYTES % 4 == 0) words += tile * (BYTES / 4) * 64;
#pragma unroll
        for (int i = 0; i < BYTES; i++) {
            int byte = BYTES % 4 == 0 ? i : tile * BYTES + i; // two a word, four a unit
            uint2 w = words[byte / 4 * 64 + byte / 2 % 2];
            word[i] = make_uint2(w.x >> byte % 2 * 8, w.y >> byte % 2 * 8);
        }
    }

    // Codes of pair j as numbers, exact; fp8 as what they stand for. With 2^10 on top of it a code c * 2^n reads
    // as 1024 + c * 2^n.
    PRIM uint32_t pair(int j, int side) const {
        constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x00010001u;
        int n = BITS * (j % LOW);
        uint32_t w = side ? word[j / LOW].y : word[j / LOW].x;
        if (FORMAT == KVW_SLAB_FP8) return mul2(e4m3_pair(w, 0), KVW_FAULT(150) ? HALF2_ONES : HALF2_256);
        constexpr int AND_OR = (0xF0 & 0xCC) | 0xAA; // two operations where the compiler chooses
        return fma2(prim::lop3<AND_OR>(w, MASK << n, 0x64006400u), half2_down(n), half2_minus_1024_down(n));
    }
};

// What the scales and minima of K or of V stand for: themselves, or, two-level, steps in bytes plus 1024.
template <bool TWO_LEVEL> struct Grid {
    uint32_t scale_step = 0, step = 0, base = 0; // in both halves

    PRIM explicit Grid(const unsigned char* steps) {
        if (!TWO_LEVEL) return;
        float4 x = *reinterpret_cast<const float4*>(steps);
        scale_step = half2_bits(__float2half2_rn(x.x));
        step = half2_bits(__float2half2_rn(x.y));
        base = half2_bits(__float2half2_rn(KVW_FAULT(151) ? 0.f : x.z));
    }

    PRIM static uint32_t byte(uint32_t word) { return fma2(word, HALF2_ONES, HALF2_MINUS_1024); }

    PRIM uint32_t scale(uint32_t word) const { return TWO_LEVEL ? mul2(byte(word), scale_step) : word; }
    PRIM uint32_t least(uint32_t word) const { return TWO_LEVEL ? fma2(byte(word), step, base) : word; }

    PRIM uint4 scale(const uint4& u) const {
        return make_uint4(scale(u.x), scale(u.y), scale(u.z), scale(u.w));
    }
    PRIM uint4 least(const uint4& u) const {
        return make_uint4(least(u.x), least(u.y), least(u.z), least(u.w));
    }
};

// code * scale + least, rounded to f16 once. Scales are rounded up too, so that the largest code may lie past the
// largest f16: that it becomes, as infinity times a probability of 0 is NaN.
PRIM uint32_t number(uint32_t code, uint32_t scale, uint32_t least) {
    uint32_t x = fma2(code, scale, least);
    return KVW_FAULT(152) ? x : half2_bits(__hmin2(half2_of(x), half2_of(HALF2_MOST)));
}

// One lane's words of the 16 tokens of tile to.tile of a slab whose groups are the cache's `group`: words j of both
// sides, put into `to`. A warp has all of them.
template <int FORMAT, int D, int META, class To> struct Unpack {
    using S = Slab<FORMAT, D, META * U8_META + 32>; // what does not depend on the group
    static constexpr int WORDS = D / 8;
    static constexpr uint32_t HIGH = 0x64; // above bytes of metadata: plus 1024

    const unsigned char* slab;
    const To& to;
    int group;
    Layout layout = layout_of<FORMAT, D, META>(group);

    // This lane's 16-byte units of K or V.
    PRIM const uint4* f16_units(const unsigned char* at) const {
        return reinterpret_cast<const uint4*>(at) + to.tile * (WORDS / 2) * 32 + threadIdx.x % 32;
    }

    PRIM void k() const {
        if constexpr (FORMAT == KVW_SLAB_F16) {
            const uint4* units = f16_units(slab);
#pragma unroll
            for (int j = 0; j < WORDS; j += 2) {
                uint4 u = units[j / 2 * 32];
                to.put_k(j, 0, u.x), to.put_k(j, 1, u.y), to.put_k(j + 1, 0, u.z), to.put_k(j + 1, 1, u.w);
            }
        } else {
            Codes<FORMAT, WORDS> codes(slab, to.tile);
            int of_tile = group == 32 ? to.tile / 2 : 0;
            const unsigned char* scales = slab + S::K_META + of_tile * S::K_GROUP_BYTES;
            Grid<S::TWO_LEVEL> grid(slab + layout.steps);
#pragma unroll
            for (int j = 0; j < WORDS; j += 4) {
                uint4 scale{}, least{};
                if (S::QUANTISED) {
                    scale = grid.scale(k_meta<S, HIGH>(scales, j / 4, to.t));
                    least = grid.least(k_meta<S, HIGH>(scales + S::K_MINIMA, j / 4, to.t));
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    uint32_t x = codes.pair(j + i / 2, i % 2);
                    if (S::QUANTISED) x = number(x, component(scale, i / 2), component(least, i / 2));
                    to.put_k(j + i / 2, i % 2, x);
                }
            }
        }
    }

    PRIM void v() const {
        if constexpr (FORMAT == KVW_SLAB_F16) {
            const uint4* units = f16_units(slab + S::V_CODES);
#pragma unroll
            for (int j = 0; j < WORDS; j += 2) {
                uint4 u = units[j / 2 * 32];
                *to.v_word(j, 0) = u.x, *to.v_word(j, 1) = u.y;
                *to.v_word(j + 1, 0) = u.z, *to.v_word(j + 1, 1) = u.w;
            }
        } else {
            Codes<FORMAT, WORDS> codes(slab + layout.v_codes, to.tile);
            constexpr int PAIR = S::TWO_LEVEL ? 4 : 8; // bytes of both sides' scales, or minima
            const unsigned char* scales =
                slab + layout.v_meta + (to.tile * 4 + to.t) * layout.v_groups * PAIR;
            Grid<S::TWO_LEVEL> grid(slab + layout.steps + STEPS_BYTES / 2);
            int shift = KVW_FAULT(153) ? 0 : group / 64; // channels 32 i .. are of group i >> shift
            uint2 scale{}, least{};
#pragma unroll
            for (int j = 0; j < WORDS; j++) {
                if (S::QUANTISED && j % 4 == 0) {
                    const unsigned char* at = scales + (j / 4 >> shift) * PAIR;
                    scale = v_meta<S, HIGH>(at), least = v_meta<S, HIGH>(at + layout.v_minima);
                    scale = make_uint2(grid.scale(scale.x), grid.scale(scale.y));
                    least = make_uint2(grid.least(least.x), grid.least(least.y));
                }
                uint32_t x = codes.pair(j, 0), y = codes.pair(j, 1);
                *to.v_word(j, 0) = S::QUANTISED ? number(x, scale.x, least.x) : x;
                *to.v_word(j, 1) = S::QUANTISED ? number(y, scale.y, least.y) : y;
            }
        }
    }
};

} // namespace kvw
