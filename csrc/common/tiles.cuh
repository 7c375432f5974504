// tiles.cuh - a slab as wgmma reads it: K and V in f16, in tiles of 128-byte rows, swizzled (wgmma.cuh).
//
// K is a row a token, 64 channels, ceil(D / 64) tiles after one another; V a row a channel, 64 tokens. So both
// are K-major, and the pairs of a slab (slab.cuh), two channels of a token of K, two tokens of a channel of V,
// are words of a row. A warp writes one word of 8 rows at a time, 16 bytes of each: all banks once.
#pragma once
#include "unpack.cuh"
#include "wgmma.cuh"

namespace kvw {

template <int D> struct Tiles {
    static constexpr int K_TILE = 64 * 128; // 64 channels of all tokens
    static constexpr int V = (D + 63) / 64 * K_TILE;
    static constexpr int BYTES = V + D * 128;
};

// One lane's words of 16 tokens in tiles: those of tile `tile` of the slab, written by a warp.
template <int D> struct Tile {
    unsigned char* to; // Tiles<D>
    int tile, t;
    int k_at, v_at[2]; // where words j = 0 go

    PRIM Tile(unsigned char* tiles, int tile_) : to(tiles), tile(tile_), t(threadIdx.x % 4) {
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

    // Bytes past the newest token may be anything, NaN too, and 0 * NaN is NaN: clears V of tokens >= live.
    PRIM void clear_past(int live) const {
        for (int i = 0; i < 2 * (D / 8); i++) {
            int held = live - (16 * tile + 2 * t + i % 2 * 8);
            if (held < 2) *v_word(i / 2, i % 2) &= held == 1 ? 0xFFFFu : 0u;
        }
    }
};

} // namespace kvw
