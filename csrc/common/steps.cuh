// steps.cuh - the walk over slabs that attention makes: which bytes come next, and their copy into shared
// memory.
//
// A step is a whole quantised slab, or TILES * 16 tokens of an f16 slab, K then V: about as many bytes. Steps
// are found and copied by the threads that share their buffers, a warp or a CTA; everything but the copies'
// offsets is the same in each. What is divided among them are units: a slab of the table, or one step of the
// ring.
#pragma once
#include "slab.cuh"
#include <type_traits>

namespace kvw {

// The formats that one kernel reads: with fp8 no other but f16, and q8 only with f16 metadata.
constexpr int FP8_FORMATS = 1 << KVW_SLAB_F16 | 1 << KVW_SLAB_FP8;
template <int GROUP>
constexpr int QUANTISED_FORMATS =
    1 << KVW_SLAB_F16 | 1 << KVW_SLAB_Q4 | 1 << KVW_SLAB_Q2 | (GROUP < U8_META ? 1 << KVW_SLAB_Q8 : 0);

// launch(GROUP, FORMATS) with constants for the kernel that reads this cache. Groups of 64 and of 128 are the same
// at D = 64.
template <int D, class Launch> kvw_status launch_for(const kvw_cache& c, Launch launch) {
    auto quantised = [&](auto group) {
        return launch(group, std::integral_constant<int, QUANTISED_FORMATS<group()>>());
    };
    if (c.pools[KVW_SLAB_FP8])
        return launch(std::integral_constant<int, 32>(), std::integral_constant<int, FP8_FORMATS>());
    if (c.meta == KVW_META_U8 && c.group == 32) return quantised(std::integral_constant<int, 32 | U8_META>());
    if (c.meta == KVW_META_U8) return quantised(std::integral_constant<int, 64 | U8_META>());
    if (c.group == 32) return quantised(std::integral_constant<int, 32>());
    if (D > 64 && c.group == 128) return quantised(std::integral_constant < int, D == 64 ? 64 : 128 > ());
    return quantised(std::integral_constant<int, 64>());
}

// Bytes that a buffer must hold for the formats that a cache has pools of.
template <int TILES> __host__ __device__ inline int step_bytes(const kvw_cache& c) {
    size_t most = TILES * 64 * c.head_dim;
    for (int f = KVW_SLAB_Q8; f < KVW_SLAB_FORMATS; f++) {
        size_t bytes = c.pools[f] ? slab_bytes(f, c.head_dim, c.group, c.meta) : 0;
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
template <int D, int GROUP, int TILES, class Token = int> struct Walk {
    const Head<D, GROUP>& head;
    int next, end, stride;
    Token low, high;      // tokens below low and from high on are not wanted
    SlabAddress mine = 0; // of this lane in the batch of 32 units at hand
    unsigned left = 0;    // lanes whose unit is still to come
    int batch = 0;        // unit of lane 0

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

// Whether a format among FORMATS is this one. Two bits tell q2 from the others: where all are compared as one
// value ptxas makes a jump table, of which q2 wants no part.
template <int FORMATS, int FORMAT> PRIM bool is(int format) {
    static_assert(KVW_SLAB_Q2 == 3 && KVW_SLAB_FORMATS <= 7);
    constexpr int BITS = FORMAT == KVW_SLAB_Q2 ? 3 : 15;
    return FORMATS == 1 << FORMAT || ((FORMATS >> FORMAT & 1) && (format & BITS) == FORMAT);
}

// Who copies a step where: thread `thread` of `threads` that share the buffer. A bulk copy completes on `bar`.
struct Copier {
    int thread, threads;
    uint64_t* bar;
};

// PARTS pieces of BYTES, `apart` bytes from one to the next in memory, one after the other at `to`.
template <bool BULK, int BYTES, int PARTS = 1>
PRIM void copy(unsigned char* to, const unsigned char* from, int apart, const Copier& c) {
    if (BULK && prim::HOPPER) {
        if (c.thread != 0) return;
        prim::mbar_expect(c.bar, PARTS * BYTES);
#pragma unroll
        for (int i = 0; i < PARTS; i++) prim::copy_bulk(to + i * BYTES, from + i * apart, BYTES, c.bar);
        return;
    }
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
#pragma unroll
        for (int at = 0; at < BYTES; at += 16 * c.threads) {
            int offset = at + 16 * c.thread;
            if (at + 16 * c.threads <= BYTES || offset < BYTES)
                prim::cp_async16(to + i * BYTES + offset, from + i * apart + offset);
        }
    }
}

// The bytes of a step: by cp.async of all threads, or, where BULK, by bulk copies of thread 0 on sm_90.
template <int D, int GROUP, int FORMATS, int TILES, bool BULK = false>
PRIM void fetch(Step step, unsigned char* to, int thread, int threads, uint64_t* bar = nullptr) {
    const unsigned char* slab = bytes_of(step.slab);
    const Copier c{thread, threads, bar};
    int format = format_of(step.slab);
    if (is<FORMATS, KVW_SLAB_Q2>(format)) {
        copy<BULK, Slab<KVW_SLAB_Q2, D, GROUP>::BYTES>(to, slab, 0, c);
    } else if (is<FORMATS, KVW_SLAB_Q4>(format)) {
        copy<BULK, Slab<KVW_SLAB_Q4, D, GROUP>::BYTES>(to, slab, 0, c);
    } else if (is<FORMATS, KVW_SLAB_Q8>(format)) {
        copy<BULK, Slab<KVW_SLAB_Q8, D, GROUP>::BYTES>(to, slab, 0, c);
    } else if (is<FORMATS, KVW_SLAB_FP8>(format)) {
        copy<BULK, Slab<KVW_SLAB_FP8, D, GROUP>::BYTES>(to, slab, 0, c);
    } else {
        slab += step.first % TOKENS / 16 * (32 * D);
        copy<BULK, TILES * 32 * D, 2>(to, slab, Slab<KVW_SLAB_F16, D, GROUP>::V_CODES, c);
    }
}

// A ring of STAGES buffers that hold steps on their way, STAGES - 1 of them ahead of the one in use. Of all
// the threads that share it: filled by bulk copies and an mbarrier a buffer on sm_90, by cp.async elsewhere.
template <int STAGES> struct Pipe {
    static constexpr int HEADER = 128; // STAGES mbarriers

    unsigned char* base; // 128-byte aligned: the header, then the buffers
    int bytes;           // of a buffer
    int thread, threads;
    unsigned taken = 0; // steps

    __host__ __device__ static constexpr int size(int bytes) { return HEADER + STAGES * bytes; }
    PRIM unsigned char* buffer(unsigned i) const { return base + HEADER + int(i % STAGES) * bytes; }
    PRIM uint64_t* full(unsigned i) const { return reinterpret_cast<uint64_t*>(base) + i % STAGES; }

    // Once, before a barrier of the sharing threads.
    PRIM void init() const {
        if (!prim::HOPPER || thread != 0) return;
        for (int i = 0; i < STAGES; i++) prim::mbar_init(full(i), 1);
        prim::mbar_fence();
    }

    // Starts a step's copy, `ahead` steps after the next to be taken; no step counts too. The sharing threads
    // are through with what the buffer held, and those that wrote there have called wrote() before a barrier.
    template <int D, int GROUP, int FORMATS, int TILES> PRIM void fetch(Step step, int ahead) const {
        unsigned i = taken + ahead;
        if (step.slab) kvw::fetch<D, GROUP, FORMATS, TILES, true>(step, buffer(i), thread, threads, full(i));
        if (!prim::HOPPER) prim::cp_async_commit();
    }

    // The buffer of the next step. It is full for threads past a barrier after this.
    PRIM unsigned char* take() {
        unsigned i = taken++;
        if (KVW_FAULT(100)) return buffer(i);
        if (prim::HOPPER)
            prim::mbar_wait(full(i), KVW_FAULT(141) ? 0 : i / STAGES % 2);
        else
            prim::cp_async_wait<STAGES - 1>();
        return buffer(i);
    }

    // After this thread wrote to a buffer: bulk copies come by another way than its stores.
    PRIM static void wrote() {
        if (prim::HOPPER && !KVW_FAULT(142)) prim::fence_async();
    }
};

} // namespace kvw
