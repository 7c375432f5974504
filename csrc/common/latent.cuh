// latent.cuh - where everything lies in a slab of EliteKV's cache (arXiv:2503.01586), and where the slabs of a
// sequence lie in memory.
//
// A row is what the cache holds of a token and layer: c elements of the latent z, shared by all heads, then 2 r
// rotated elements of the key of each kv head (r first halves of its elite pairs, then r second halves): c + 2 r H
// f16 numbers and nothing else. A slab is 64 rows, four tiles of 16 tokens; a tile is columns of 8 channels:
//   element (token, channel) at (token / 16 * width / 8 + channel / 8) * 256 + token % 16 * 16 + channel % 8 * 2 bytes
// so that 8 channels of a token are 16 bytes, what the append writes at once, and half a column, 8 tokens by 8
// channels, is one matrix of ldmatrix in 128 bytes that touch every bank once. Two columns are a block, 16 tokens by 16
// channels in 512 bytes: lane l gives the address of its 16 bytes number l, and
//   ldmatrix.x4        is the A fragment of z as keys     (rows tokens, k channels)
//   ldmatrix.x4.trans  is, registers 1 and 2 exchanged, that of z as values (rows channels, k tokens)
// so the one copy of z in shared memory is both operands.
//
// Codes of a packed slab lie as its elements would: 8 channels of a token are BITS bytes, even channels in the lower half
// of the word, odd ones in the upper, the first lowest. Behind its four tiles come scales and minima, f16, of each column
// [8 scales | 8 minima] of its 64 tokens: element = code * scale + minimum, rounded to f16.
#pragma once
#include "codec.cuh"
#include "fields.cuh"
#include "launch.cuh"
#include "prim.cuh"
#include "../lowrank_kv.h"

namespace kvw {

constexpr int TILE_TOKENS = 16, COLUMN = 8, COLUMN_BYTES = 2 * COLUMN * TILE_TOKENS;
constexpr int BLOCK_CHANNELS = 2 * COLUMN, BLOCK_BYTES = 2 * COLUMN_BYTES;
constexpr int SLAB_TILES = KVW_SLAB_TOKENS / TILE_TOKENS;

constexpr int COLUMN_META = 32; // bytes of a column's scales and minima

// Elements of a row.
__host__ __device__ inline int latent_width(const kvw_latent& c) { return c.rank + 2 * c.pairs * c.kv_heads; }
__host__ __device__ inline int latent_columns(const kvw_latent& c) { return latent_width(c) / COLUMN; }
__host__ __device__ inline size_t latent_tile_bytes(const kvw_latent& c) {
    return size_t(latent_columns(c)) * COLUMN_BYTES;
}

// Bits of an element.
__host__ __device__ inline int latent_bits(int format) {
    return format == KVW_SLAB_F16 ? 16 : format == KVW_SLAB_Q4 ? 4 : 2;
}

__host__ __device__ inline size_t latent_slab_bytes(const kvw_latent& c, int format) {
    size_t codes = SLAB_TILES * latent_tile_bytes(c) / 16 * latent_bits(format);
    return codes + (format == KVW_SLAB_F16 ? 0 : latent_columns(c) * COLUMN_META);
}

// Entry of slab `i` of sequence `s`; NO_SLAB where there is none: a hole, or a slab of another format.
constexpr uint32_t NO_SLAB = KVW_ENTRY_HOLE;
PRIM bool is_packed(uint32_t entry) { return entry >> KVW_ENTRY_SHIFT != KVW_SLAB_F16; }
PRIM uint32_t latent_entry(const kvw_latent& c, int s, int i) {
    uint32_t entry = c.table[size_t(s) * c.table_stride + i];
    return !is_packed(entry) || int(entry >> KVW_ENTRY_SHIFT) == c.format ? entry : NO_SLAB;
}

// A tile, and where the scales of its slab lie if it is packed.
struct LatentTile {
    unsigned char *at, *meta;
};

// Tile `tile` of the slab of an entry.
PRIM LatentTile latent_tile(const kvw_latent& c, uint32_t entry, int tile) {
    int format = is_packed(entry) ? c.format : KVW_SLAB_F16;
    size_t bytes = latent_tile_bytes(c) / 16 * latent_bits(format);
    unsigned char* slab = static_cast<unsigned char*>(is_packed(entry) ? c.packed : c.pool) +
                          (entry & KVW_ENTRY_INDEX) * latent_slab_bytes(c, format);
    return {slab + tile * bytes, slab + SLAB_TILES * bytes};
}

// 8 channels of a token out of their codes.
template <int BITS> PRIM uint4 latent_values(uint32_t codes, const unsigned char* meta) {
    constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x00010001u, OF_1024 = 0x64006400u;
    uint4 scales = *reinterpret_cast<const uint4*>(meta), minima = *reinterpret_cast<const uint4*>(meta + 16);
    if (BITS == 2) codes |= codes << 8;
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t whole = fma2(codes >> (BITS * j) & MASK | OF_1024, HALF2_ONES, HALF2_MINUS_1024);
        out[j] = fma2(whole, component(scales, j), component(minima, j));
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

// The codes of 8 channels of a token: number `i` of a tile's.
template <int BITS> PRIM uint32_t latent_codes(const unsigned char* tile, int i) {
    return BITS == 4 ? reinterpret_cast<const uint32_t*>(tile)[i] : reinterpret_cast<const uint16_t*>(tile)[i];
}

// What a slab is made of.
inline kvw_status check_latent_shape(const kvw_latent& c) {
    KVW_REQUIRE(c.kv_heads >= 1 && c.kv_heads <= 1024, SHAPE, kv_heads);
    KVW_REQUIRE(c.rank >= BLOCK_CHANNELS && c.rank <= KVW_LATENT_MOST && c.rank % BLOCK_CHANNELS == 0, SHAPE,
                rank);
    KVW_REQUIRE(c.pairs >= 1 && c.pairs <= 64 && c.pairs * c.kv_heads % 4 == 0, SHAPE, pairs);
    bool known = c.format == KVW_SLAB_F16 || c.format == KVW_SLAB_Q4 || c.format == KVW_SLAB_Q2;
    KVW_REQUIRE(known, FORMAT, format);
    return KVW_OK;
}

// A cache's numbers.
inline kvw_status check_latent_numbers(const kvw_latent& c) {
    KVW_REQUIRE(c.seqs >= 1 && c.seqs <= 65535, SHAPE, seqs);
    KVW_TRY(check_latent_shape(c));
    KVW_REQUIRE(c.table_stride >= 1, SHAPE, table_stride);
    return KVW_OK;
}

// The same and its pointers.
inline kvw_status check_latent(const kvw_latent& c) {
    KVW_REQUIRED(c, pool);
    KVW_OPTIONAL(c, packed);
    KVW_REQUIRE(!c.packed == (c.format == KVW_SLAB_F16), NULL, packed);
    KVW_REQUIRED(c, table);
    KVW_REQUIRED(c, lens);
    return check_latent_numbers(c);
}

} // namespace kvw
