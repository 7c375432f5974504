// fragments.cuh - K of a slab in any format as A fragments of m16n8k16 in f16, and query rows as its B fragments.
//
// Words j and j + 1 of both sides are the fragment of channels 8 j .. 8 j + 15 of a tile of 16 tokens (slab.cuh): one
// 16-byte unit a lane, in the order in which an f16 slab has them.
#pragma once
#include "queries.cuh"
#include "unpack.cuh"

namespace kvw {

// One tile in registers.
template <int D> struct KeyTile {
    static constexpr int WORDS = D / 8;

    mutable uint32_t a[WORDS / 2][4];
    int tile, t;

    PRIM void put_k(int j, int side, uint32_t word) const {
        a[j / 2][KVW_FAULT(371) ? side * 2 + j % 2 : j % 2 * 2 + side] = word;
    }

    // Of a slab in memory.
    PRIM void load(SlabAddress slab, const kvw_cache& cache, int tile_) {
        tile = tile_, t = threadIdx.x % 4;
        with_kind(format_of(slab), cache.meta, [&](auto kind) {
            using K = decltype(kind);
            Unpack<K::FORMAT, D, K::META, KeyTile>{bytes_of(slab), *this, cache.group}.k();
        });
    }
};

// A slab in shared memory: units [tile][j / 2][lane].
template <int D> struct KeySlab {
    static constexpr int WORDS = D / 8, UNITS = TOKENS / 16 * (WORDS / 2) * 32, BYTES = UNITS * 16;

    uint4* units;
    int tile = 0, t = 0;
    mutable uint4 unit{};

    PRIM void put_k(int j, int side, uint32_t word) const {
        uint32_t& to = j % 2 ? side ? unit.w : unit.z : side ? unit.y : unit.x;
        to = word;
        if (j % 2 && side) units[(tile * (WORDS / 2) + j / 2) * 32 + threadIdx.x % 32] = unit;
    }

    // By THREADS threads: f16 by copies, which every thread closes and waits for; else four of the warps, those whose
    // turn it is, unpack a tile each.
    template <int THREADS> PRIM void bring(SlabAddress slab, const kvw_cache& cache, int turn) {
        int thread = int(threadIdx.x), warp = thread / 32;
        if (format_of(slab) == KVW_SLAB_F16) {
            for (int i = thread; i < UNITS; i += THREADS)
                prim::cp_async16(units + i, bytes_of(slab) + 16 * i);
        } else if (warp / 4 == turn % (THREADS / 128)) {
            tile = warp % 4, t = thread % 4;
            with_kind(format_of(slab), cache.meta, [&](auto kind) {
                using K = decltype(kind);
                Unpack<K::FORMAT, D, K::META, KeySlab>{bytes_of(slab), *this, cache.group}.k();
            });
        }
    }
};

} // namespace kvw
