// steps.cuh - the walk over slabs that attention makes: which bytes come next, and their copy into shared
// memory.
//
// A step is a whole quantised slab, or TILES * 16 tokens of an f16 slab, K then V: about as many bytes. Steps
// are found and copied by the threads that share their buffers, a warp or a CTA; everything but the copies'
// offsets is the same in each. What is divided among them are units: a slab of the table, or one step of the
// ring.
#pragma once
#include "slab.cuh"

namespace kvw {

constexpr int ALL_FORMATS = 1 << KVW_SLAB_F16 | 1 << KVW_SLAB_Q8 | 1 << KVW_SLAB_Q4 | 1 << KVW_SLAB_Q2;

// Bytes that a buffer must hold for the formats that a cache has pools of.
template <int TILES> __host__ __device__ inline int step_bytes(const kvw_cache& c) {
    size_t most = TILES * 64 * c.head_dim;
    for (int f = KVW_SLAB_Q8; f <= KVW_SLAB_Q2; f++) {
        size_t bytes = c.pools[f] ? slab_bytes(f, c.head_dim, c.group) : 0;
        if (bytes > most) most = bytes;
    }
    return int(most);
}

struct Step {
    SlabAddress slab; // 0: no more
    int first;        // token
};

// The units of a head that has `packed` slabs in the table.
template <int TILES> struct Units {
    int packed;

    // Unit that holds a token.
    PRIM int of(int token) const {
        int ring = packed * TOKENS;
        return token < ring ? token / TOKENS : packed + (token - ring) / (16 * TILES);
    }

    // First token of a unit.
    PRIM int token(int unit) const { return unit * TOKENS - max(0, unit - packed) * (TOKENS - 16 * TILES); }

    // One past the unit of the last of `len` tokens.
    PRIM int end(int len) const { return len > 0 ? of(len - 1) + 1 : 0; }
};

// Every `stride`-th unit of next .. end, holes left out, by a whole warp.
template <int D, int GROUP, int TILES> struct Walk {
    const Head<D, GROUP>& head;
    int next, end, stride, low, high; // tokens below low and from high on are not wanted
    SlabAddress mine = 0;             // of this lane in the batch of 32 units at hand
    unsigned left = 0;                // lanes whose unit is still to come
    int batch = 0;                    // unit of lane 0

    PRIM Step start() {
        int lane = threadIdx.x % 32;
        Units<TILES> units{head.packed};
        while (left == 0 && next < end) {
            int i = next + lane * stride;
            mine = i < end ? head.slab(units.token(i) / TOKENS) : 0;
            left = __ballot_sync(~0u, mine != 0);
            batch = next;
            next += 32 * stride;
        }
        if (left == 0) return {0, 0};
        int from = __ffs(int(left)) - 1, unit = batch + from * stride;
        left &= left - 1;
        Step step = {__shfl_sync(~0u, mine, from), unit * TOKENS};
        if (format_of(step.slab) == KVW_SLAB_F16)
            step.first = max(units.token(unit), low / (16 * TILES) * (16 * TILES));
        return step;
    }

    PRIM Step after(Step step) {
        if (format_of(step.slab) == KVW_SLAB_F16 && step.first < head.packed * TOKENS) {
            step.first += 16 * TILES;
            if (step.first % TOKENS != 0 && step.first < high) return step;
        }
        return start();
    }
};

template <int FORMATS, int FORMAT> PRIM bool is(int format) {
    return FORMATS == 1 << FORMAT || ((FORMATS >> FORMAT & 1) && format == FORMAT);
}

// This thread's share of a copy by `threads`.
template <int BYTES> PRIM void copy(unsigned char* to, const unsigned char* from, int thread, int threads) {
#pragma unroll
    for (int at = 0; at < BYTES; at += 16 * threads) {
        int offset = at + 16 * thread;
        if (at + 16 * threads <= BYTES || offset < BYTES) prim::cp_async16(to + offset, from + offset);
    }
}

template <int D, int GROUP, int FORMATS, int TILES>
PRIM void fetch(Step step, unsigned char* to, int thread, int threads) {
    const unsigned char* slab = bytes_of(step.slab);
    int format = format_of(step.slab);
    if (is<FORMATS, KVW_SLAB_Q2>(format)) {
        copy<Slab<KVW_SLAB_Q2, D, GROUP>::BYTES>(to, slab, thread, threads);
    } else if (is<FORMATS, KVW_SLAB_Q4>(format)) {
        copy<Slab<KVW_SLAB_Q4, D, GROUP>::BYTES>(to, slab, thread, threads);
    } else if (is<FORMATS, KVW_SLAB_Q8>(format)) {
        copy<Slab<KVW_SLAB_Q8, D, GROUP>::BYTES>(to, slab, thread, threads);
    } else {
        constexpr int PART = TILES * 32 * D;
        slab += step.first % TOKENS / 16 * (32 * D);
        copy<PART>(to, slab, thread, threads);
        copy<PART>(to + PART, slab + Slab<KVW_SLAB_F16, D, GROUP>::V_CODES, thread, threads);
    }
}

} // namespace kvw
