// elements.cuh - the numbers in a slab in f32, exact, a tile of 16 tokens a warp; format, group and metadata are told
// apart at run time, once for each two pairs of both sides.
//
// Lane (r, t) has of pairs j and j + 1 (j even) x[i][side][e]:
//   K   token r + 8 side of the tile,           channel 8 (j + i) + 2 t + e
//   V   token 2 t + e + 8 side,                 channel 8 (j + i) + r
#pragma once
#include "codec.cuh"
#include "slab.cuh"

namespace kvw {

struct Elements {
    float x[2][2][2]; // [i][side][e]
};

// Scales or minima: of K of pairs j + n, of V of sides n; [n][e].
struct Factors {
    float x[2][2];
};

template <int D> struct SlabElements {
    static constexpr int WORDS = D / 8; // pairs of a tile, of one side

    const unsigned char* slab;
    const Layout l;
    const int format, bits;
    const bool two_level;
    int lane = int(threadIdx.x) % 32, r = lane / 4, t = lane % 4;

    PRIM SlabElements(const kvw_cache& c, SlabAddress a)
        : slab(bytes_of(a)),
          l(layout_of(format_of(a), D, c.group, c.meta)),
          format(format_of(a)),
          bits(code_bits(format)),
          two_level(has_meta(format) && c.meta == KVW_META_U8) {}

    // Pairs j and j + 1 of the keys of a tile.
    PRIM Elements keys(int tile, int j) const {
        Elements e = codes(0, tile, j);
        if (!has_meta(format)) return e;
        Factors scale, least;
        k_meta(tile * 16 / l.k_group, j, scale, least);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float& x = e.x[n / 4][n / 2 % 2][n % 2];
            x = fmaf(x, scale.x[n / 4][n % 2], least.x[n / 4][n % 2]);
        }
        return e;
    }

    PRIM Elements values(int tile, int j) const {
        Elements e = codes(l.v_codes, tile, j);
        if (!has_meta(format)) return e;
        int pair = ((tile * 4 + t) * l.v_groups + j * 8 / l.v_group) * 2;
        Factors scale = factors(l.v_meta, pair, 1, false), least = factors(l.v_meta + l.v_minima, pair, 1, true);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float& x = e.x[n / 4][n / 2 % 2][n % 2];
            x = fmaf(x, scale.x[n / 2 % 2][n % 2], least.x[n / 2 % 2][n % 2]);
        }
        return e;
    }

    // Of channels 8 (j + i) + 2 t + e, [i][e], in a group of tokens of K.
    PRIM void k_meta(int group, int j, Factors& scale, Factors& least) const {
        int at = l.k_meta + group * l.k_group_bytes, pair = (j / 4 * 4 + t) * 4 + j % 4;
        scale = factors(at, pair, 0, false);
        least = factors(at + l.k_minima, pair, 0, true);
    }

private:
    // Codes as numbers; of f16 and fp8 what they stand for.
    PRIM Elements codes(int section, int tile, int j) const {
        Elements e;
        int f = tile * WORDS + j;
        if (format == KVW_SLAB_F16) {
            uint4 u = *reinterpret_cast<const uint4*>(slab + section + (f / 2 * 32 + lane) * 16);
#pragma unroll
            for (int n = 0; n < 4; n++) put(e, n, __half22float2(half2_of(component(u, n))), 1.f);
            return e;
        }
        int word = f * bits / 16, shift = f * bits % 16;
        uint2 u = *reinterpret_cast<const uint2*>(slab + section + (word / 2 * 32 + lane) * 16 + word % 2 * 8);
#pragma unroll
        for (int n = 0; n < 4; n++) { // i = n / 2, side n % 2
            uint32_t w = n % 2 ? u.y : u.x;
            if (format == KVW_SLAB_FP8) {
                put(e, n, __half22float2(half2_of(e4m3_pair(w, n / 2))), 256.f);
            } else {
                w >>= shift + n / 2 * bits;
                uint32_t mask = (1u << bits) - 1;
                put(e, n, make_float2(float(w & mask), float(w >> 16 & mask)), 1.f);
            }
        }
        return e;
    }

    PRIM static void put(Elements& e, int n, float2 x, float unit) {
        e.x[n / 2][n % 2][0] = x.x * unit, e.x[n / 2][n % 2][1] = x.y * unit;
    }

    // Two neighbouring pairs from an even one on, of K (0) or V (1).
    PRIM Factors factors(int section, int pair, int which, bool minima) const {
        if (!two_level) {
            uint2 u = *reinterpret_cast<const uint2*>(slab + section + pair * 4);
            float2 a = __half22float2(half2_of(u.x)), b = __half22float2(half2_of(u.y));
            return {{{a.x, a.y}, {b.x, b.y}}};
        }
        const float* steps = reinterpret_cast<const float*>(slab + l.steps) + 4 * which;
        uint32_t u = *reinterpret_cast<const uint32_t*>(slab + section + pair * 2);
        float step = steps[minima], base = minima ? steps[2] : 0.f;
        Factors out;
#pragma unroll
        for (int n = 0; n < 4; n++) // byte 2 e + n
            out.x[n % 2][n / 2] = fmaf(float(u >> 8 * n & 0xFF), step, base);
        return out;
    }
};

} // namespace kvw
