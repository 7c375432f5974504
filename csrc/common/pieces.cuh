// pieces.cuh - which rows, columns and tokens a CTA of paged_attn has before it.
#pragma once
#include "steps.cuh"
#include "streamk.cuh"

namespace kvw {

constexpr int RING_TILES = 1; // of a step of the ring, and of any f16 slab

using Params = kvw_paged_attn_params;

// Query columns of a kv head: column x is row x / G of query head x % G. A CTA takes blocks of them.
__host__ __device__ inline int columns_of(const Params& p) {
    return p.q_len * (p.q_heads / p.cache.kv_heads);
}

// Which of `len` tokens the rows of a sequence see.
struct Seen {
    int len, rows, window;

    PRIM Seen(const Params& p, int n) : len(n), rows(p.q_len), window(p.sliding_window) {}
    PRIM int to(int row) const { return len - rows + row + 1; }
    PRIM int from(int row) const { return window > 0 ? max(0, to(row) - window + KVW_FAULT(110)) : 0; }
};

// Units of heads of entry `at` of lens; one where nothing is seen, so that somebody writes the zeros.
PRIM int units_of(const Params& p, int at) {
    Seen seen(p, p.cache.lens[at]);
    Units<RING_TILES> units{packed_slabs(p.cache, at, seen.len)};
    return max(1, units.end(seen.len) - units.of(seen.from(0)));
}

// The columns of head `head` of the list: column x of it is column skip + x of (s, h).
struct QueryBlock {
    int s, h, skip, count, group;

    template <int MOST> PRIM static QueryBlock of(const Params& p, int head) {
        int all = columns_of(p), blocks = (all + MOST - 1) / MOST, skip = head % blocks * MOST;
        head /= blocks;
        return {head / p.cache.kv_heads, head % p.cache.kv_heads, skip, min(MOST, all - skip),
                p.q_heads / p.cache.kv_heads};
    }

    PRIM int row(int x) const { return KVW_FAULT(130) ? (skip + x) % group : (skip + x) / group; }

    PRIM int q_head(const Params& p, int x) const {
        int g = (skip + x) % group;
        return KVW_FAULT(106) ? g * p.cache.kv_heads + h : h * group + g;
    }

    // Row of q, out and lse.
    PRIM size_t at(const Params& p, int x) const {
        return (size_t(s) * p.q_len + (skip + x) / group) * p.q_heads + q_head(p, x);
    }
};

// Heads of the list that share an entry of lens.
template <int MOST> PRIM int heads_an_entry(const Params& p) {
    int blocks = (columns_of(p) + MOST - 1) / MOST;
    return p.cache.lens_heads == 1 ? p.cache.kv_heads * blocks : blocks;
}

// A CTA's work on one head, kept in shared memory: registers are for what every step needs.
struct Piece {
    Work work;
    QueryBlock columns;
    int len, low; // tokens of the sequence, and the first that any row sees
};

// Of Walk::low and high.
struct Kept {
    const int* at;
    PRIM operator int() const { return *at; }
};

template <int MOST> PRIM Piece piece_of(const Params& p, const Work& work) {
    QueryBlock columns = QueryBlock::of<MOST>(p, work.head);
    int len = p.cache.lens[p.cache.lens_heads == 1 ? columns.s : columns.s * p.cache.kv_heads + columns.h];
    return {work, columns, len, Seen(p, len).from(0)};
}

} // namespace kvw
