// check.cuh - argument checks that several ops share; host code, no CUDA call.
#pragma once
#include "slab.cuh"
#include <algorithm>
#include <initializer_list>

namespace kvw {

constexpr int GRID_YZ_MAX = 65535;

// Every pointer 16-byte aligned; null passes.
inline bool aligned(std::initializer_list<const void*> pointers) {
    for (const void* p : pointers) {
        if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
    }
    return true;
}

inline bool any_null(std::initializer_list<const void*> pointers) {
    for (const void* p : pointers) {
        if (!p) return true;
    }
    return false;
}

// A cache's numbers and pointers. Where `packed` is null the ring must hold what the window needs. A table
// may be null only together with every pool: nothing is packed. CSR rows are shared by all heads (table_heads
// 1).
inline kvw_status check_cache(const kvw_cache& c) {
    bool head_dim = slab_bytes(KVW_SLAB_F16, c.head_dim, 32) != 0;
    if (c.seqs < 1 || c.seqs > GRID_YZ_MAX || c.kv_heads < 1 || c.kv_heads > GRID_YZ_MAX || !head_dim)
        return KVW_ERR_SHAPE;
    if (int64_t(c.seqs) * c.kv_heads > INT32_MAX) return KVW_ERR_SHAPE; // indices of lens
    if (slab_bytes(KVW_SLAB_F16, c.head_dim, c.group) == 0) return KVW_ERR_FORMAT;
    bool table_used = c.table || c.pools[KVW_SLAB_F16] || c.pools[KVW_SLAB_Q4] || c.pools[KVW_SLAB_Q2];
    if (any_null({c.ring, c.lens}) || (table_used && !c.table)) return KVW_ERR_NULL;
    if (c.pools[1]) return KVW_ERR_FORMAT; // no format has tag 1
    if (!aligned({c.pools[0], c.pools[2], c.pools[3], c.ring, c.table, c.indptr, c.lens, c.packed}))
        return KVW_ERR_ALIGN;
    if (c.window < 0 || c.window > INT32_MAX - 126) return KVW_ERR_SHAPE;
    if (c.ring_slabs < (c.packed ? 1 : ring_slabs(c.window))) return KVW_ERR_SHAPE;
    if (c.table_heads != 1 && (c.table_heads != c.kv_heads || c.indptr)) return KVW_ERR_SHAPE;
    if (c.table && !c.indptr && c.table_stride < 1) return KVW_ERR_SHAPE;
    if ((c.lens_heads != 1 && c.lens_heads != c.kv_heads) || c.reserved != 0) return KVW_ERR_SHAPE;
    return KVW_OK;
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
    int narrowest = c.pools[KVW_SLAB_Q2] ? KVW_SLAB_Q2 : c.pools[KVW_SLAB_Q4] ? KVW_SLAB_Q4 : KVW_SLAB_F16;
    return f16 * slab_bytes(KVW_SLAB_F16, c.head_dim, c.group) +
           (slabs - f16) * slab_bytes(narrowest, c.head_dim, c.group);
}

} // namespace kvw
