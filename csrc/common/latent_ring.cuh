// latent_ring.cuh - what a CTA of lowrank_kv reads of a tile, and how it comes to each of its warps.
//
// A CTA has HEADS query heads and all channels of z. Warp w of eight takes blocks 1/8 of z and every eighth item: an
// item is a block of elite keys that a tile of 8 query heads meets. A warp copies what it reads, and nobody else reads
// it: its ring needs no barrier of the CTA.
#pragma once
#include "latent.cuh"

namespace kvw {

using Lowrank = kvw_lowrank_kv_params;

constexpr int LATENT_WARPS = 8;

// Heads of all query tokens of a sequence, what kernels take for heads: n is head n % q_heads of token n / q_heads.
__host__ __device__ inline int query_rows(const Lowrank& p) { return p.q_len * p.q_heads; }

// Columns lo .. hi - 1 of a row hold the keys of query heads head .. head + 7.
struct EliteColumns {
    int lo, hi;

    __host__ __device__ EliteColumns(const Lowrank& p, int head) : lo(0), hi(0) {
        const kvw_latent& c = p.cache;
        int group = p.q_heads / c.kv_heads, rows = query_rows(p);
        if (head >= rows) return;
        int first = head % p.q_heads, last = first + (head + 7 < rows ? 7 : rows - 1 - head);
        if (last >= p.q_heads) first = 0, last = p.q_heads - 1; // two tokens, or more
        lo = (c.rank + first / group * 2 * c.pairs) / COLUMN;
        hi = (c.rank + (last / group + 1) * 2 * c.pairs + COLUMN - 1) / COLUMN;
    }

    __host__ __device__ int items() const { return (hi - lo + 1) / 2; }
};

// Two columns of elite keys, the tile of query heads that meets them, and their queries. The last column of a row may
// be alone: then the one before it is read too, and does not count.
struct Item {
    int packed, unused;
    uint2 words[32]; // B fragments, a lane each

    PRIM static int pack(int tile, int column, int last) {
        int moved = column + 1 > last;
        return tile << 24 | moved << 23 | (column - moved);
    }
    PRIM int tile() const { return packed >> 24; }
    PRIM int column() const { return packed & 0x7FFFFF; }
    PRIM int counts_from() const { return column() + (packed >> 23 & 1); }
};

// Items of the `tiles` tiles of 8 heads from `head` on.
__host__ __device__ inline int count_items(const Lowrank& p, int head, int tiles) {
    int n = 0;
    for (int tile = 0; tile < tiles; tile++) n += EliteColumns(p, head + 8 * tile).items();
    return n;
}

// Number n of them, packed.
PRIM int item_at(const Lowrank& p, int head, int n) {
    for (int tile = 0;; tile++) {
        EliteColumns columns(p, head + 8 * tile);
        if (n < columns.items()) return Item::pack(tile, columns.lo + 2 * n, latent_columns(p.cache) - 1);
        n -= columns.items();
    }
}

// The tiles of tokens `token` (a multiple of 64) to until - 1 of a sequence, holes left out; by a whole warp, alike in
// every lane.
struct TileWalk {
    static constexpr int BATCH = 32 * KVW_SLAB_TOKENS; // entries are read 32 at a time, one a lane

    const kvw_latent& c;
    int s, token, until;
    uint32_t mine;

    PRIM TileWalk(const kvw_latent& cache, int seq, int from, int to)
        : c(cache), s(seq), token(from), until(to) {
        load();
    }

    // The next tile, and its first token, plus 1 where it is packed; none and -1: no more.
    PRIM LatentTile next(int& first) {
        while (token < until) {
            if (token % BATCH == 0) load();
            uint32_t entry = __shfl_sync(~0u, mine, token / KVW_SLAB_TOKENS % 32);
            if (entry != NO_SLAB) {
                first = token + is_packed(entry);
                token += TILE_TOKENS;
                return latent_tile(c, entry, first / TILE_TOKENS % SLAB_TILES);
            }
            token = (token / KVW_SLAB_TOKENS + 1) * KVW_SLAB_TOKENS;
        }
        first = -1;
        return {nullptr, nullptr};
    }

private:
    PRIM void load() {
        int slab = token / BATCH * 32 + int(threadIdx.x) % 32;
        mine = slab * KVW_SLAB_TOKENS < until ? latent_entry(c, s, slab) : NO_SLAB;
    }
};

// A warp's buffers, one or two: its blocks of z, then its items; then, where there are packed tiles, their scales. Codes
// come to the end of their blocks' place, and are spread over it from its beginning on. Filled by bulk copies and an
// mbarrier each on sm_90, by cp.async elsewhere.
struct LatentRing {
    static constexpr int HEADER = 128; // mbarriers

    unsigned char* base;
    int bytes, stages; // of a buffer; buffers
    int first, count;  // blocks of z
    const Item* items; // this warp's, LATENT_WARPS apart
    int item_count;
    int packed;         // bits of packed tiles
    unsigned taken = 0; // tiles

    PRIM unsigned char* buffer(unsigned i) const { return base + HEADER + (stages == 2 ? i % 2 : 0) * bytes; }
    PRIM uint64_t* full(unsigned i) const {
        return reinterpret_cast<uint64_t*>(base) + (stages == 2 ? i % 2 : 0);
    }
    PRIM unsigned char* elite(unsigned char* buffer, int i) const {
        return buffer + (count + i) * BLOCK_BYTES;
    }
    PRIM int column(int i) const { return items[i * LATENT_WARPS].column(); }

    PRIM void init() const {
        if (prim::HOPPER && threadIdx.x % 32 == 0) {
            for (int i = 0; i < stages; i++) prim::mbar_init(full(i), 1);
            prim::mbar_fence();
        }
        __syncwarp();
    }

    // Starts the copy of a tile, `ahead` after the next to be taken; null counts too, and no other follows it before
    // all are taken. All lanes are through with the buffer.
    PRIM void fetch(LatentTile tile, bool is_packed, int ahead) const {
        unsigned i = taken + ahead;
        int block = is_packed ? packed * TILE_TOKENS * 2 : BLOCK_BYTES;
        unsigned char* to = buffer(i);
        if (prim::HOPPER) {
            if (!tile.at || threadIdx.x % 32 != 0) return;
            prim::mbar_expect(full(i), blocks() * (block + (is_packed ? 2 * COLUMN_META : 0)));
            fetch_part<true>(to + blocks() * (BLOCK_BYTES - block), tile.at, block, full(i));
            if (is_packed) fetch_part<true>(to + blocks() * BLOCK_BYTES, tile.meta, 2 * COLUMN_META, full(i));
            return;
        }
        if (tile.at) {
            fetch_part<false>(to + blocks() * (BLOCK_BYTES - block), tile.at, block, nullptr);
            if (is_packed) fetch_part<false>(to + blocks() * BLOCK_BYTES, tile.meta, 2 * COLUMN_META, nullptr);
        }
        prim::cp_async_commit();
    }

    // Of each of this warp's blocks `block` bytes.
    template <bool BULK>
    PRIM void fetch_part(unsigned char* to, const unsigned char* from, int block, uint64_t* bar) const {
        const unsigned char* z = from + first * block;
        if (BULK && count) copy(to, z, count * block, bar);
        int lane = int(threadIdx.x) % 32;
#pragma unroll 1
        for (int at = 16 * lane; !BULK && at < count * block; at += 512) prim::cp_async16(to + at, z + at);
#pragma unroll 1
        for (int k = 0; k < item_count; k++) {
            unsigned char* item = to + (count + k) * block;
            const unsigned char* columns = from + column(k) * (block / 2);
            if (BULK)
                copy(item, columns, block, bar);
            else if (16 * lane < block)
                prim::cp_async16(item + 16 * lane, columns + 16 * lane);
        }
    }

    PRIM int blocks() const { return count + item_count; }

    // Codes of a packed tile become what an f16 tile has: block i ends where what is left of the codes begins, or before.
    template <int BITS> PRIM void spread_codes(unsigned char* to) const {
        int lane = int(threadIdx.x) % 32;
        const unsigned char* codes = to + blocks() * (BLOCK_BYTES - BITS * 2 * TILE_TOKENS);
        const unsigned char* meta = to + blocks() * BLOCK_BYTES + lane / TILE_TOKENS * COLUMN_META;
#pragma unroll 1
        for (int i = 0; i < blocks(); i++) {
            uint4 x = latent_values<BITS>(latent_codes<BITS>(codes, 32 * i + lane), meta + i * 2 * COLUMN_META);
            if (!KVW_FAULT(432)) __syncwarp(); // all have read theirs
            prim::stg128(to + i * BLOCK_BYTES + 16 * lane, x);
        }
        if (prim::HOPPER && !KVW_FAULT(433)) prim::fence_async();
        __syncwarp();
    }
    PRIM void spread(unsigned char* to) const {
        if (packed == 4)
            spread_codes<4>(to);
        else
            spread_codes<2>(to);
    }

    // The buffer of the next tile, full for lanes past a __syncwarp.
    PRIM unsigned char* take() {
        unsigned i = taken++;
        if (KVW_FAULT(417)) return buffer(i);
        if (prim::HOPPER)
            prim::mbar_wait(full(i), KVW_FAULT(426) ? 0 : int(i / unsigned(stages)) % 2);
        else if (stages == 2)
            prim::cp_async_wait<1>();
        else
            prim::cp_async_wait<0>();
        return buffer(i);
    }

    // Other CTAs read the same z: it stays in L2.
    PRIM static void copy(void* to, const void* from, int bytes, uint64_t* bar) {
        prim::copy_bulk<true>(to, from, bytes, bar);
    }

    // Zeros in z of tokens from `live` on: what lies there may be NaN, and 0 * NaN is NaN.
    PRIM void clear_past(unsigned char* z, int live) const {
#pragma unroll 1
        for (int at = int(threadIdx.x) % 32; at < count * 2 * TILE_TOKENS; at += 32)
            if (at % TILE_TOKENS >= live) prim::stg128(z + 16 * at, make_uint4(0, 0, 0, 0));
        if (prim::HOPPER && !KVW_FAULT(425)) prim::fence_async();
        __syncwarp();
    }
};

} // namespace kvw
