// tiles.cuh - a slab as wgmma reads it: K and V in f16, in tiles of 128-byte rows, swizzled (wgmma.cuh).
//
// K is a row a token, 64 channels, ceil(D / 64) tiles after one another; V a row a channel, 64 tokens. So both
// are K-major, and the pairs of a slab (slab.cuh), two channels of a token of K, two tokens of a channel of V,
// are words of a row. A warp writes one word of 8 rows at a time, 16 bytes of each: all banks once.
#pragma once
#include "codec.cuh"
#include "slab.cuh"
#include "wgmma.cuh"

namespace kvw {

template <int D> struct Tiles {
    static constexpr int K_TILE = 64 * 128; // 64 channels of all tokens
    static constexpr int V = (D + 63) / 64 * K_TILE;
    static constexpr int BYTES = V + D * 128;
};

// 2^-n in both halves, and -2^(10 - n).
PRIM uint32_t half2_down(int n) { return uint32_t(15 - n) * 0x04000400u; }
PRIM uint32_t half2_minus_1024_down(int n) { return uint32_t(25 - n) * 0x04000400u | 0x80008000u; }

// The codes of 16 tokens of K or V of a quantised slab, as one lane holds them: both sides of WORDS pairs.
template <class S, int WORDS> struct Codes {
    static constexpr int LOW = kvw::LOW<S::BITS>; // pairs of a byte, and of the word's other byte
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

    // Codes of pair j as numbers. With 2^10 on top of it a code c * 2^n reads as 1024 + c * 2^n, exact.
    PRIM uint32_t pair(int j, int side) const {
        constexpr uint32_t MASK = ((1u << S::BITS) - 1) * 0x00010001u;
        int n = S::BITS * (j % LOW);
        uint32_t w = side ? word[j / LOW].y : word[j / LOW].x;
        return fma2((w & MASK << n) | 0x64006400u, half2_down(n), half2_minus_1024_down(n));
    }
};

// One lane's part of 16 tokens: tile `tile` of the slab, written by a warp.
template <int FORMAT, int D, int GROUP> struct Unpack {
    using S = Slab<FORMAT, D, GROUP>;
    static constexpr int WORDS = D / 8;

    const unsigned char* slab;
    unsigned char* to;          // Tiles<D>
    int tile, t, k_at, v_at[2]; // where words j = 0 go

    PRIM Unpack(const unsigned char* from, unsigned char* tiles, int tile_)
        : slab(from), to(tiles), tile(tile_), t(threadIdx.x % 4) {
        int r = threadIdx.x % 32 / 4;
        k_at = KVW_FAULT(145) ? (16 * tile + r) * 128 + 4 * t : prim::swizzled(16 * tile + r, 4 * t);
        for (int side = 0; side < 2; side++)
            v_at[side] = Tiles<D>::V + prim::swizzled(r, (2 * tile + side) * 16 + 4 * t);
    }

    PRIM void put_k(int j, int side, uint32_t word) const {
        int at = (k_at ^ j % 8 * 16) + side * 1024 + j / 8 * Tiles<D>::K_TILE;
        *reinterpret_cast<uint32_t*>(to + at) = word;
    }

    PRIM uint32_t* v_word(int j, int side) const {
        return reinterpret_cast<uint32_t*>(to + v_at[side] + j * 1024);
    }

    PRIM void k() const {
        if constexpr (!S::QUANTISED) {
            const uint4* units =
                reinterpret_cast<const uint4*>(slab) + tile * (WORDS / 2) * 32 + threadIdx.x % 32;
#pragma unroll
            for (int j = 0; j < WORDS; j += 2) {
                uint4 u = units[j / 2 * 32];
                put_k(j, 0, u.x), put_k(j, 1, u.y), put_k(j + 1, 0, u.z), put_k(j + 1, 1, u.w);
            }
        } else {
            Codes<S, WORDS> codes(slab, tile);
            const uint4* scales =
                reinterpret_cast<const uint4*>(slab + S::K_META + 16 * tile / S::K_GROUP * S::K_GROUP_BYTES) +
                t;
#pragma unroll
            for (int j = 0; j < WORDS; j += 4) {
                uint4 scale = scales[j], least = scales[S::K_MINIMA / 16 + j];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    uint32_t code = codes.pair(j + i / 2, i % 2);
                    put_k(j + i / 2, i % 2, fma2(code, component(scale, i / 2), component(least, i / 2)));
                }
            }
        }
    }

    PRIM void v() const {
        if constexpr (!S::QUANTISED) {
            const uint4* units = reinterpret_cast<const uint4*>(slab + S::V_CODES) + tile * (WORDS / 2) * 32 +
                                 threadIdx.x % 32;
#pragma unroll
            for (int j = 0; j < WORDS; j += 2) {
                uint4 u = units[j / 2 * 32];
                *v_word(j, 0) = u.x, *v_word(j, 1) = u.y, *v_word(j + 1, 0) = u.z, *v_word(j + 1, 1) = u.w;
            }
        } else {
            Codes<S, WORDS> codes(slab + S::V_CODES, tile);
            const uint2* scales =
                reinterpret_cast<const uint2*>(slab + S::V_META) + (tile * 4 + t) * S::V_GROUPS;
            uint2 scale, least;
#pragma unroll
            for (int j = 0; j < WORDS; j++) {
                constexpr int V_GROUP = S::V_GROUP;
                if (8 * j % V_GROUP == 0)
                    scale = scales[8 * j / V_GROUP], least = scales[S::V_MINIMA / 8 + 8 * j / V_GROUP];
                *v_word(j, 0) = fma2(codes.pair(j, 0), scale.x, least.x);
                *v_word(j, 1) = fma2(codes.pair(j, 1), scale.y, least.y);
            }
        }
    }

    // Bytes past the newest token may be anything, NaN too, and 0 * NaN is NaN: clears V of tokens >= live.
    PRIM void clear_past(int live) const {
        for (int i = 0; i < 2 * WORDS; i++) {
            int held = live - (16 * tile + 2 * t + i % 2 * 8);
            if (held < 2) *v_word(i / 2, i % 2) &= held == 1 ? 0xFFFFu : 0u;
        }
    }
};

// Tokens 16 tile .. of a slab whose newest token is the one before `live`, into tiles.
template <int FORMAT, int D, int GROUP>
PRIM void unpack(const unsigned char* slab, unsigned char* tiles, int tile, int live) {
    Unpack<FORMAT, D, GROUP> u(slab, tiles, tile);
    u.k();
    u.v();
    if (live < TOKENS && !KVW_FAULT(144)) u.clear_past(live);
}

} // namespace kvw
