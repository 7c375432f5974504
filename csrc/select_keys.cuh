// select_keys.cuh - the radix selection of token_select by a CTA, and the indices of what it selects: token_select.cu says
// why it looks like this.
#pragma once
#include "token_select.h"
#include "common/radix.cuh"
#include "common/rank.cuh"

namespace kvw {

constexpr int SELECT_THREADS = 1024, SELECT_WARPS = SELECT_THREADS / 32, DIGITS = 3, BINS = 2048;

PRIM int shift_of(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

// Part of a row.
struct Slice {
    const float* scores;
    int begin, end;

    // Calls f(index, key) of this warp's stretch, all lanes together; lanes past the end have index -1.
    template <class F> PRIM void each(F f) const {
        int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, size = max(0, end - begin);
        int stretch = (size + SELECT_THREADS - 1) / SELECT_THREADS * 32, from = begin + warp * stretch;
        int to = min(from + stretch, end);
#pragma unroll 4
        for (int at = from; at < to; at += 32) {
            int i = at + lane < to ? at + lane : -1;
            f(i, i < 0 ? 0u : rank_key(scores[i]));
        }
    }
};

// What is selected: keys above `key`, and the first `ties` that equal it.
struct Cut {
    uint32_t key, ties;
    bool found; // the k-th best is what `key` stands for
};

struct Shared {
    uint32_t counts[BINS];
    uint32_t warps[SELECT_WARPS];
    Bin<uint32_t> found;
};

// The radix selection of one segment: digits above `digit` are known, and the k-th best is the `need`-th of them.
struct Selection {
    uint32_t prefix = 0, need = 0;
    int digit = 0;
    bool all = false, none = false; // more than there are; no score at all

    PRIM explicit Selection(int k) : need(uint32_t(max(k, 0))), none(k < 1) {}

    PRIM static void clear(Shared& shared) {
        for (int bin = threadIdx.x; bin < BINS; bin += SELECT_THREADS) shared.counts[bin] = 0;
        __syncthreads();
    }

    // Counts a slice's keys by the digit.
    PRIM void count(const Slice& slice, Shared& shared) const {
        int last = -1;
        uint32_t run = 0;
        const int shift = shift_of(digit), above = digit == 0 ? 32 : shift_of(digit - 1);
        slice.each([&](int i, uint32_t key) {
            if (i < 0 || (digit > 0 && key >> above != prefix >> above)) return;
            int bin = int(key >> shift) & (BINS - 1) >> (digit == 2);
            if (bin != last) {
                if (run) atomicAdd(&shared.counts[last], run);
                last = bin, run = 0;
            }
            run++;
        });
        if (run) atomicAdd(&shared.counts[last], run);
    }

    // The digit, from the counts of all.
    PRIM void take(Shared& shared) {
        if (!KVW_FAULT(391)) __syncthreads();
        if (none) {
            digit++;
            return;
        }
        Bin<uint32_t> f = find_bin<SELECT_WARPS, BINS>(shared.counts, shared.warps, &shared.found, need);
        if (f.bin < 0) all = true;
        prefix |= uint32_t(max(f.bin, 0)) << shift_of(digit++);
        need -= all ? 0 : f.before;
    }

    PRIM Cut cut(int op) const {
        if (none) return {~0u, 0, false};
        if (all) return {0, ~0u, false};
        return {prefix, op == KVW_SELECT_TOP_K ? need : 0, true};
    }
};

// Better and equal keys of a warp's stretch.
PRIM uint2 count_kept(const Slice& slice, const Cut& cut) {
    uint2 n = make_uint2(0, 0);
    slice.each([&](int i, uint32_t key) {
        n.x += __popc(__ballot_sync(~0u, i >= 0 && key > cut.key));
        n.y += __popc(__ballot_sync(~0u, i >= 0 && key == cut.key));
    });
    return n;
}

// Of `equal` keys after `before` others, those that are kept.
PRIM uint32_t kept_ties(const Cut& cut, uint32_t before, uint32_t equal) {
    return cut.ties > before ? min(cut.ties - before, equal) : 0;
}

// Writes the indices of a slice. `equal` keys of the segment came before it, `kept` of the row; returns how many there
// are of both then.
PRIM void write(const kvw_token_select_params& p, int row, const Slice& slice, const Cut& cut, Shared& shared,
                uint32_t& equal, uint32_t& kept) {
    int lane = threadIdx.x % 32;
    uint2 n = count_kept(slice, cut);
    uint32_t own = lane == 0 ? n.y : 0, all_equal, all_kept;
    uint32_t upto = running_sum<SELECT_WARPS>(own, shared.warps, all_equal);
    upto = __shfl_sync(~0u, upto, 0) - n.y;
    uint32_t before = equal + (KVW_FAULT(392) ? 0 : upto);
    own = lane == 0 ? n.x + kept_ties(cut, before, n.y) : 0;
    uint32_t at = running_sum<SELECT_WARPS>(own, shared.warps, all_kept);
    at = kept + __shfl_sync(~0u, at - own, 0);
    int* indices = p.indices + size_t(row) * p.index_stride;
    uint32_t earlier = (1u << lane) - 1;
    slice.each([&](int i, uint32_t key) {
        bool tie = i >= 0 && key == cut.key;
        unsigned ties = __ballot_sync(~0u, tie);
        bool keep = (i >= 0 && key > cut.key) || (tie && before + __popc(ties & earlier) < cut.ties);
        unsigned keeps = __ballot_sync(~0u, keep);
        uint32_t to = at + __popc(keeps & earlier);
        if (keep && to < uint32_t(p.index_stride)) indices[to] = i + KVW_FAULT(393);
        before += __popc(ties), at += __popc(keeps);
    });
    equal += all_equal, kept += all_kept;
}

PRIM Slice row_of(const kvw_token_select_params& p, int row) {
    int len = p.lens && !KVW_FAULT(394) ? min(max(p.lens[row], 0), p.n) : p.n;
    return {p.scores + size_t(row) * p.n, 0, len};
}

PRIM void put_kth(const kvw_token_select_params& p, int segment, const Cut& cut) {
    if (p.kth && threadIdx.x == 0) p.kth[segment] = rank_value(cut.found ? cut.key : 0);
}

} // namespace kvw
