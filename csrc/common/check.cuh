// check.cuh - argument checks that several ops share; host code, no CUDA call.
#pragma once
#include "fields.cuh"
#include "slab.cuh"
#include <algorithm>

namespace kvw {

constexpr int GRID_YZ_MAX = 65535;

// A cache's numbers and pointers. Where `packed` is null the ring must hold what the window needs. A table
// may be null only together with every pool: nothing is packed. CSR rows are shared by all heads (table_heads
// 1).
inline kvw_status check_cache(const kvw_cache& c) {
    KVW_REQUIRE(c.seqs >= 1 && c.seqs <= GRID_YZ_MAX, SHAPE, seqs);
    KVW_REQUIRE(c.kv_heads >= 1 && c.kv_heads <= GRID_YZ_MAX, SHAPE, kv_heads);
    KVW_REQUIRE(int64_t(c.seqs) * c.kv_heads <= INT32_MAX, SHAPE, seqs); // indices of lens
    KVW_REQUIRE(slab_bytes(KVW_SLAB_F16, c.head_dim, 32, KVW_META_F16) != 0, SHAPE, head_dim);
    KVW_REQUIRE(c.meta == KVW_META_F16 || c.meta == KVW_META_U8, FORMAT, meta);
    KVW_REQUIRE(slab_bytes(KVW_SLAB_F16, c.head_dim, c.group, c.meta) != 0, FORMAT, group);
    KVW_REQUIRED(c, ring);
    KVW_REQUIRED(c, lens);
    KVW_OPTIONAL(c, indptr);
    KVW_OPTIONAL(c, packed);
    KVW_OPTIONAL(c, table);
    for (int f = 0; f < KVW_SLAB_FORMATS; f++) {
        bool known = slab_bytes(f, c.head_dim, c.group, c.meta) != 0;
        KVW_REQUIRE(known || !c.pools[f], FORMAT, pools);
        KVW_REQUIRE(!c.pools[f] || !c.pools[KVW_SLAB_FP8] || !has_meta(f), FORMAT, pools);
        KVW_REQUIRE(reinterpret_cast<uintptr_t>(c.pools[f]) % 16 == 0, ALIGN, pools);
        KVW_REQUIRE(!c.pools[f] || c.table, NULL, table);
    }
    KVW_REQUIRE(c.window >= 0 && c.window <= INT32_MAX - 126, SHAPE, window);
    KVW_REQUIRE(c.ring_slabs >= (c.packed ? 1 : ring_slabs(c.window)), SHAPE, ring_slabs);
    KVW_REQUIRE(c.table_heads == 1 || c.table_heads == c.kv_heads, SHAPE, table_heads);
    KVW_REQUIRE(c.table_heads == 1 || !c.indptr, SHAPE, indptr);
    KVW_REQUIRE(!c.table || c.indptr || c.table_stride >= 1, SHAPE, table_stride);
    KVW_REQUIRE(c.lens_heads == 1 || c.lens_heads == c.kv_heads, SHAPE, lens_heads);
    return KVW_OK;
}

// The narrowest format that has a pool.
inline int narrowest(const kvw_cache& c) {
    for (int f : {KVW_SLAB_Q2, KVW_SLAB_Q4, KVW_SLAB_FP8, KVW_SLAB_Q8}) {
        if (c.pools[f]) return f;
    }
    return KVW_SLAB_F16;
}

// Slabs out of `slabs` that hold the newest sliding_window tokens (0 = all), wherever they begin.
inline int slabs_seen(int slabs, int sliding_window) {
    return sliding_window > 0 ? int(std::min<int64_t>(slabs, (int64_t(sliding_window) + 126) / TOKENS))
                              : slabs;
}

// Bytes of the slabs that one (sequence, head) reads if it holds `slabs` slabs and sees `sliding_window`
// tokens (0 = all): the ring's share is f16, the rest of the narrowest format in use.
inline size_t slab_bytes_held(const kvw_cache& c, int slabs, int sliding_window) {
    slabs = slabs_seen(slabs, sliding_window);
    int f16 = std::min(slabs, ring_slabs(c.window));
    return f16 * slab_bytes(KVW_SLAB_F16, c.head_dim, c.group, c.meta) +
           (slabs - f16) * slab_bytes(narrowest(c), c.head_dim, c.group, c.meta);
}

} // namespace kvw
