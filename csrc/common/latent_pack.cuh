// latent_pack.cuh - a full slab of EliteKV's cache into codes, and a row of codes into its elements.
#pragma once
#include "latent_ring.cuh"
#include "rounding.cuh"

namespace kvw {

// 8 channels of a token of a packed tile.
PRIM uint4 unpacked(const kvw_latent& c, const LatentTile& tile, int column, int token) {
    const unsigned char* meta = tile.meta + column * COLUMN_META;
    int i = column * TILE_TOKENS + token;
    if (c.format == KVW_SLAB_Q4) return latent_values<4>(latent_codes<4>(tile.at, i), meta);
    return latent_values<2>(latent_codes<2>(tile.at, i), meta);
}

// Channel i of a column's 8.
PRIM float element(const uint4& row, int i) {
    float2 pair = __half22float2(half2_of(component(row, i / 2)));
    return i % 2 == 0 ? pair.x : pair.y;
}

// A thread takes a column of a tile; four neighbours, a column's four tiles, share its scales.
template <int BITS> __global__ void __launch_bounds__(256) pack_latents(const __grid_constant__ Lowrank p) {
    const kvw_latent& c = p.cache;
    int n = int(blockIdx.x * 256 + threadIdx.x), column = n / SLAB_TILES, tile = n % SLAB_TILES;
    uint32_t from = p.moves[2 * blockIdx.y], to = p.moves[2 * blockIdx.y + 1];
    if (from == NO_SLAB || is_packed(from) || int(to >> KVW_ENTRY_SHIFT) != c.format) return;
    bool exists = column < latent_columns(c);
    const unsigned char* x = latent_tile(c, from, tile).at + (exists ? column : 0) * COLUMN_BYTES;
    Interval extremes[COLUMN];
#pragma unroll
    for (int i = 0; i < COLUMN; i++) extremes[i] = {INFINITY, -INFINITY};
#pragma unroll 4
    for (int t = 0; t < TILE_TOKENS; t++) {
        uint4 row = prim::ldg128(x + t * 16);
#pragma unroll
        for (int i = 0; i < COLUMN; i++) {
            float value = element(row, i);
            extremes[i] = {fminf(extremes[i].low, value), fmaxf(extremes[i].high, value)};
        }
    }
    const Rounding rounding(BITS, p.range);
    Scale scales[COLUMN];
#pragma unroll
    for (int i = 0; i < COLUMN; i++) {
#pragma unroll
        for (int lane = 1; lane < SLAB_TILES; lane *= 2) {
            extremes[i].low = fminf(extremes[i].low, __shfl_xor_sync(~0u, extremes[i].low, lane));
            extremes[i].high = fmaxf(extremes[i].high, __shfl_xor_sync(~0u, extremes[i].high, lane));
        }
        scales[i] = Scale::of(extremes[i], rounding);
    }
    if (!exists) return;
    LatentTile packed = latent_tile(c, to, tile);
    if (tile == 0) {
        __half* meta = reinterpret_cast<__half*>(packed.meta + column * COLUMN_META);
#pragma unroll
        for (int i = 0; i < COLUMN; i++) meta[i] = scales[i].scale, meta[COLUMN + i] = scales[i].minimum;
    }
#pragma unroll 4
    for (int t = 0; t < TILE_TOKENS; t++) {
        uint4 row = prim::ldg128(x + t * 16);
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < COLUMN; i++) {
            float low = __half2float(scales[i].minimum), step = __half2float(scales[i].scale);
            uint32_t code = uint32_t(code_of(element(row, i), low, step, rounding.max_code));
            codes |= code << (i % 2 * 4 * BITS + i / 2 * BITS);
        }
        int at = column * TILE_TOKENS + t;
        if (BITS == 4)
            reinterpret_cast<uint32_t*>(packed.at)[at] = codes;
        else
            reinterpret_cast<uint16_t*>(packed.at)[at] = uint16_t(codes);
    }
}

} // namespace kvw
