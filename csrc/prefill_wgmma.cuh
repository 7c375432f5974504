// prefill_wgmma.cuh - the kernel of prefill_attn.cu for sm_90a. See there.
//
// A CTA is three warpgroups and 128 columns of one (sequence, kv head): warpgroup 0 unpacks, 1 and 2 attend
// 64 columns each. Two rings in shared memory, both by mbarriers:
//   raw    slabs as they are, by bulk copy; taken by the four unpacking warps, 16 tokens each
//   tiles  K and V in f16 (tiles.cuh); made by the unpacking warps, taken by the eight attending warps
// The unpacking warps walk over the slabs in step and each knows what comes; the attending ones are told the
// first token of each stage, or END.
#pragma once
#include "common/columns.cuh"
#include "common/steps.cuh"
#include "common/warpgroup.cuh"

namespace kvw {

constexpr int WGMMA_D = 128; // largest D that shared memory and registers have room for

template <int D> struct PrefillRing {
    static constexpr int RAW = 3, STAGES = 3, ROWS = 64, COLUMNS = 128;
    static constexpr int THREADS = 384, UNPACKING_WARPS = 4, ATTENDING_WARPS = 8;
    static constexpr int RAW_BYTES = Slab<KVW_SLAB_F16, D, 64>::BYTES; // the largest slab
    static constexpr int END = -1;
    // A thread's registers: 168 at the start, then these, 504 * 128 in all.
    static constexpr int UNPACKING_REGISTERS = D == 96 ? 152 : 120;
    static constexpr int ATTENDING_REGISTERS = (504 - UNPACKING_REGISTERS) / 2;
    static constexpr size_t SHARED_BYTES = 1024 + STAGES * Tiles<D>::BYTES + RAW * RAW_BYTES + 256;

    unsigned char *tiles, *raw;
    uint64_t *raw_full, *raw_empty, *full, *empty;
    int* first; // token, by stage

    PRIM explicit PrefillRing(unsigned char* shared) {
        prim::Carve carve(shared);
        tiles = carve.take<unsigned char, 1024>(STAGES * Tiles<D>::BYTES);
        raw = carve.take<unsigned char, 128>(RAW * RAW_BYTES);
        raw_full = carve.take<uint64_t>(RAW);
        raw_empty = carve.take<uint64_t>(RAW);
        full = carve.take<uint64_t>(STAGES);
        empty = carve.take<uint64_t>(STAGES);
        first = carve.take<int>(STAGES);
    }

    // By the whole CTA.
    PRIM void start() const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < RAW; i++)
                prim::mbar_init(raw_full + i, 1), prim::mbar_init(raw_empty + i, UNPACKING_WARPS);
            for (int i = 0; i < STAGES; i++)
                prim::mbar_init(full + i, UNPACKING_WARPS), prim::mbar_init(empty + i, ATTENDING_WARPS);
            prim::mbar_fence();
        }
        __syncthreads();
    }
};

// Where a ring is: the slot, and the parity of its phase.
template <int SLOTS> struct Turn {
    int slot = 0, parity = 0;

    PRIM void next() {
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
        parity ^= slot == 0;
    }
};

// Warpgroup 0. Formats, group and metadata are told apart here, at run time, so that one kernel serves every
// cache. `low` .. `high` are the tokens that any column sees.
template <int D> struct Unpacker {
    using Ring = PrefillRing<D>;
    const Ring& ring;
    const Head<D, 0>& head;
    int warp, lane;

    PRIM void bring(Step step, int slot) const {
        if (threadIdx.x != 0 || !step.slab) return;
        int bytes = 0;
        with_kind(format_of(step.slab), head.cache.meta, [&](auto kind) {
            using K = decltype(kind);
            bytes = layout_of<K::FORMAT, D, K::META>(head.cache.group).bytes;
        });
        prim::mbar_expect(ring.raw_full + slot, bytes);
        prim::copy_bulk<true>(ring.raw + slot * Ring::RAW_BYTES, bytes_of(step.slab), bytes,
                              ring.raw_full + slot);
    }

    PRIM void put(Step step, int slot, int stage) const {
        const unsigned char* raw = ring.raw + slot * Ring::RAW_BYTES;
        const Tile<D> tile(ring.tiles + stage * Tiles<D>::BYTES, warp);
        with_kind(format_of(step.slab), head.cache.meta, [&](auto kind) {
            using K = decltype(kind);
            Unpack<K::FORMAT, D, K::META, Tile<D>> unpack{raw, tile, head.cache.group};
            unpack.k();
            unpack.v();
        });
        int live = head.len - step.first;
        if (live < TOKENS && !KVW_FAULT(144)) tile.clear_past(live);
    }

    // Hands a stage to the attending warps.
    PRIM void hand_over(int stage, int first) const {
        if (threadIdx.x == 0) ring.first[stage] = first;
        if (!KVW_FAULT(142)) prim::fence_async();
        __syncwarp();
        if (lane == 0) prim::mbar_arrive(ring.full + stage);
    }

    PRIM void run(int low, int high) const {
        Walk<D, 0, 4> walk{head, low / TOKENS, (min(high, head.len) + TOKENS - 1) / TOKENS, 1, low, high};
        Step ahead[Ring::RAW]; // the step at hand and those after it
        auto advance = [&] {
#pragma unroll
            for (int i = 0; i + 1 < Ring::RAW; i++) ahead[i] = ahead[i + 1];
            return ahead[Ring::RAW - 1] = walk.start();
        };
#pragma unroll 1
        for (int i = 0; i < Ring::RAW; i++) bring(advance(), i);
        Turn<Ring::RAW> raw;
        Turn<Ring::STAGES> out;
        while (ahead[0].slab) {
            prim::mbar_wait(ring.raw_full + raw.slot, raw.parity);
            if (!KVW_FAULT(141)) prim::mbar_wait(ring.empty + out.slot, out.parity ^ 1);
            put(ahead[0], raw.slot, out.slot);
            hand_over(out.slot, ahead[0].first);
            if (lane == 0) prim::mbar_arrive(ring.raw_empty + raw.slot);
            Step last = advance();
            if (warp == 0 && last.slab && !KVW_FAULT(148))
                prim::mbar_wait(ring.raw_empty + raw.slot, raw.parity);
            bring(last, raw.slot);
            raw.next(), out.next();
        }
        prim::mbar_wait(ring.empty + out.slot, out.parity ^ 1);
        hand_over(out.slot, Ring::END);
    }
};

// Warpgroups 1 and 2.
template <int D> struct Attender {
    using Ring = PrefillRing<D>;
    const Ring& ring;
    const Columns& columns;
    int begin; // column of row 0

    PRIM int column(int side) const {
        return begin + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * side;
    }

    PRIM void mask(float (&s)[TOKENS / 2], int first) const {
        int last = min(begin + Ring::ROWS, columns.rows * columns.group) - 1;
        if (first + TOKENS <= columns.to(begin) && first >= columns.from(last)) return;
        int from[2], to[2];
#pragma unroll
        for (int side = 0; side < 2; side++)
            from[side] = columns.from(column(side)) - first, to[side] = columns.to(column(side)) - first;
        Rows<D>::mask(s, from, to);
    }

    PRIM int wait(const Turn<Ring::STAGES>& turn) const {
        if (!KVW_FAULT(140)) prim::mbar_wait(ring.full + turn.slot, turn.parity);
        return ring.first[turn.slot];
    }

    PRIM void release(int stage) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) prim::mbar_arrive(ring.empty + stage);
    }

    PRIM uint64_t stage(int slot, uint64_t tiles) const { return tiles + slot * (Tiles<D>::BYTES / 16); }

    // The next step's scores are made, and its softmax runs, while the tensor cores add this one's values.
    PRIM void run(Rows<D>& rows) const {
        const uint64_t k_tiles = prim::swizzled_tile(ring.tiles), v_tiles = k_tiles + Tiles<D>::V / 16;
        float s[TOKENS / 2], shrink[2];
        Turn<Ring::STAGES> turn, next;
        int first = wait(next);
        if (first == Ring::END) return;
        prim::wgmma_fence();
        rows.scores(s, stage(next.slot, k_tiles));
        prim::wgmma_wait<0>(s);
        mask(s, first);
        rows.softmax(s, shrink);
        rows.take(s);
        next.next();
        first = wait(next);
        while (first != Ring::END) {
            if (!KVW_FAULT(143)) prim::wgmma_fence();
            rows.scores(s, stage(next.slot, k_tiles));
            rows.values(stage(turn.slot, v_tiles));
            prim::wgmma_wait<1>(s);
            mask(s, first);
            bool grows = rows.softmax(s, shrink);
            prim::wgmma_wait<0>(rows.o);
            if (!KVW_FAULT(149)) release(turn.slot);
            if (grows && !KVW_FAULT(146)) rows.rescale(shrink);
            rows.take(s);
            turn.next(), next.next();
            first = wait(next);
        }
        prim::wgmma_fence();
        rows.values(stage(turn.slot, v_tiles));
        prim::wgmma_wait<0>(rows.o);
    }

    PRIM void store(const Rows<D>& rows, const kvw_prefill_attn_params& p, int s, int h) const {
        int t = threadIdx.x % 4;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float sum = rows.total(side), up = sum > 0.f ? 1.f / sum : 0.f;
            if (!columns.exists(column(side))) continue;
            size_t row = columns.row(column(side), p.q_heads, h);
            uint32_t* out = static_cast<uint32_t*>(p.out) + row * (D / 2) + t;
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                out[4 * i] = output_pair(rows.o[4 * i + 2 * side] * up, rows.o[4 * i + 2 * side + 1] * up,
                                         p.dtype == KVW_BF16);
            int kept = columns.lse_row(column(side), p.lse_rows);
            if (t == 0 && p.lse && kept >= 0) {
                float lse = sum > 0.f ? (rows.m[side] + log2f(sum)) * LN_2 : -INFINITY;
                p.lse[(size_t(s) * p.lse_rows + kept) * p.q_heads + row % p.q_heads] = lse;
            }
        }
    }
};

// Where this is not compiled for sm_90a the kernel has no body, and takes fewer threads than a launch has: the
// host asks for that number.
template <int D>
__global__ void __launch_bounds__(prim::WGMMA ? PrefillRing<D>::THREADS : 32, 1)
    attn_wgmma(const __grid_constant__ kvw_prefill_attn_params p) {
    if (!prim::WGMMA) return;
    using Ring = PrefillRing<D>;
    KVW_DYN_SHARED(unsigned char, raw);
    Ring ring(raw);
    int h = blockIdx.y, s = blockIdx.z, warpgroup = threadIdx.x / 128;
    Head<D, 0> head(p.cache, s, h);
    int first_row = p.cu_tokens[s], rows = p.cu_tokens[s + 1] - first_row,
        group = p.q_heads / p.cache.kv_heads;
    Columns columns{first_row, rows, group, head.len, p.sliding_window};
    int begin = int(gridDim.x - 1 - blockIdx.x) * Ring::COLUMNS;
    if (!columns.exists(begin)) return;
    ring.start();
    if (warpgroup == 0) {
        prim::registers_down<Ring::UNPACKING_REGISTERS>();
        int last = min(begin + Ring::COLUMNS, rows * group) - 1;
        Unpacker<D>{ring, head, int(threadIdx.x) / 32, int(threadIdx.x) % 32}.run(columns.from(begin),
                                                                                  columns.to(last));
    } else {
        prim::registers_up<Ring::ATTENDING_REGISTERS>();
        Attender<D> attender{ring, columns, begin + (warpgroup - 1) * Ring::ROWS};
        QueryRows<2> q{{}, p.dtype == KVW_BF16};
#pragma unroll
        for (int side = 0; side < 2; side++) {
            int column = attender.column(side);
            if (columns.exists(column))
                q.row[side] = static_cast<const __half*>(p.q) + columns.row(column, p.q_heads, h) * D;
        }
        Rows<D> mine;
        mine.load(q, p.scale);
        attender.run(mine);
        attender.store(mine, p, s, h);
    }
}

} // namespace kvw
