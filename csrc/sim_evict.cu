// sim_evict: scores of tokens without attention: LagKV, key norms; KVCrush's bits and representatives.
//
// Math      LAG (LagKV, arXiv:2504.04704): partition p is the lag tokens from slot first + p lag on, its reference the
//           lag after them. Of each channel c of K, and of V, m and M are the smallest and largest in the reference;
//           d[i] = std over c of (x[i, c] - m[c]) / (M[c] - m[c]), unbiased, over the channels with 0 < M - m < inf
//           (0 if fewer than two); score[i] = softmax(d of K)[i] + v_weight * softmax(d of V)[i], over the partition.
//           NaN takes no part in m and M; a token with a NaN in a channel that counts, or in a hole, scores NaN, and is
//           not in the softmax. KVW_LAG_META: m and M of K are over minima and minima plus largest code times scale
//           of the groups that lie in the reference whole, and over the other elements
//           NORM: |k|
//           KVCrush (arXiv:2503.00022), BITS: bit h of token i = i is in kept[h]. REPRESENT: candidates in order of
//           (popcount(bits ^ anchor), index), of which places floor(j (n - 1) / (wanted - 1)) are chosen, j = 0, 1,
//           ..; the first if 1 is wanted, all if no more are there
// Shapes    as sim_evict.h has them; all sums and softmaxes in f32
// Layout    slabs of common/slab.cuh in any format
// Bytes     LAG: slabs of partitions + 1, scores; NORM: keys, scores; BITS, REPRESENT: each array once
//           -> kvw_sim_evict_bytes()
// Launch    LAG: grid (partitions, H, S), NORM: (slabs, H, S), 128 threads; BITS: (tokens / 1024, S), 256 threads;
//           REPRESENT: a CTA of 1024 threads a sequence, 20 KB of shared memory
// Workspace none
// Order     deterministic: a number's summands and their order depend on the shape alone; atomics are ORs of bits
// Oracle    src/sim_evict/oracle.rs
//
// Why it looks like this:
// 1. Elements are read as their lanes hold them (common/elements.cuh). A channel's extremes lie across r for K and across t
//    for V, so a warp takes two pairs of columns down the whole reference and needs no other warp; a token's sums
//    lie the other way, so a warp takes a tile of tokens across all channels. Between them is one barrier.
// 2. A reference is the next CTA's target: it comes from L2, once from HBM. Metadata spares K of it: two numbers a channel
//    and group instead of 32 to 64 elements.
// 3. Deviations in one pass, from each lane's first number: d = y - y0 keeps what cancels within the count of numbers,
//    and lanes merge exact means. A second pass would unpack everything twice; unpacking is what bounds codes: 8
//    instructions an element, so 16 clocks a token of an SM at D = 128 (K and V), against 40 of its share of HBM at f16.
// 4. BITS takes lists, so that selection is token_select's alone. Ascending lists cut into stretches of tokens: shared
//    memory collects the words, and each is written once.
// 5. There are but 33 distances. Ballots over the six bits of a distance tell every lane which of 32 candidates are at its
//    own distance: a histogram and stable places in registers, no sort and no shared atomics. What is written are
//    flags, so that the result ascends without one either. Six tests of one register are one instruction in SASS, which
//    nvcc's front end takes apart: ptx/README.md has the counts of ptx/represent.ptx and of the C++ it follows.
#include "sim_evict.h"
#include "sim_crush.cuh"
#include "sim_lag.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"

namespace {

using namespace kvw;
using Params = kvw_sim_evict_params;

constexpr int MAX_TOKENS = 1 << 17; // of a row of bits

template <int D> kvw_status launch(const Params& p, kvw_stream stream) {
    unsigned heads = unsigned(p.cache.kv_heads), seqs = unsigned(p.cache.seqs);
    if (p.op == KVW_EVICT_LAG)
        return KVW_LAUNCH((lag<D>), dim3(unsigned(p.partitions), heads, seqs), LAG_THREADS, 0, stream, p);
    unsigned slabs = unsigned((int64_t(p.columns) + 2 * TOKENS - 2) / TOKENS); // wherever they begin
    return KVW_LAUNCH((norms<D>), dim3(slabs, heads, seqs), LAG_THREADS, 0, stream, p);
}

kvw_status check_scores(const Params& p) {
    KVW_TRY(check_cache(p.cache));
    KVW_REQUIRED(p, scores);
    KVW_OPTIONAL(p, first);
    if (p.op == KVW_EVICT_NORM) {
        KVW_REQUIRE(p.columns >= 1, SHAPE, columns);
        return KVW_OK;
    }
    KVW_REQUIRE(p.lag >= 16 && p.lag <= MAX_LAG && p.lag % 16 == 0, SHAPE, lag);
    KVW_REQUIRE(p.partitions >= 1 && p.partitions <= (1 << 30) / p.lag, SHAPE, partitions);
    KVW_REQUIRE(p.reference == KVW_LAG_ELEMENTS || p.reference == KVW_LAG_META, SHAPE, reference);
    return KVW_OK;
}

kvw_status check_crush(const Params& p) {
    KVW_REQUIRE(p.cache.seqs >= 1 && p.cache.seqs <= GRID_YZ_MAX, SHAPE, seqs);
    KVW_REQUIRE(p.cache.kv_heads >= 1 && p.cache.kv_heads <= 32, SHAPE, kv_heads);
    KVW_REQUIRE(p.columns >= 1 && p.columns <= MAX_TOKENS, SHAPE, columns);
    KVW_REQUIRED(p, bits);
    if (p.op == KVW_EVICT_BITS) {
        KVW_REQUIRED(p, kept);
        KVW_REQUIRED(p, kept_counts);
        KVW_REQUIRE(p.kept_stride >= 1, SHAPE, kept_stride);
        return KVW_OK;
    }
    KVW_REQUIRED(p, counts);
    KVW_REQUIRED(p, wanted);
    KVW_REQUIRED(p, chosen);
    KVW_OPTIONAL(p, candidates);
    KVW_OPTIONAL(p, candidate_counts);
    KVW_REQUIRE(!p.candidates || p.candidate_counts, NULL, candidate_counts);
    KVW_REQUIRE(p.plain == 0 || p.plain == 1, SHAPE, plain);
    KVW_REQUIRE(p.anchor >= KVW_ANCHOR_MEAN && p.anchor <= KVW_ANCHOR_ONES, SHAPE, anchor);
    return KVW_OK;
}

} // namespace

kvw_status kvw_sim_evict_check(const kvw_sim_evict_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRE(p->op >= KVW_EVICT_LAG && p->op <= KVW_EVICT_REPRESENT, SHAPE, op);
    return p->op <= KVW_EVICT_NORM ? check_scores(*p) : check_crush(*p);
}

size_t kvw_sim_evict_workspace(const kvw_sim_evict_params*) { return 0; }

// Tokens in the narrowest format that has a pool but for what the window keeps, K alone for NORM; full rows.
size_t kvw_sim_evict_bytes(const kvw_sim_evict_params* p) {
    if (kvw_sim_evict_check(p) != KVW_OK) return 0;
    const kvw_cache& c = p->cache;
    size_t rows = size_t(c.seqs) * c.kv_heads, columns = size_t(p->columns);
    auto slabs = [](size_t tokens) { return int((tokens + TOKENS - 1) / TOKENS); };
    switch (p->op) {
    case KVW_EVICT_LAG: {
        size_t scored = size_t(p->partitions) * p->lag;
        return rows * (slab_bytes_held(c, slabs(scored + p->lag), 0) + scored * 4);
    }
    case KVW_EVICT_NORM: return rows * (slab_bytes_held(c, slabs(columns), 0) / 2 + columns * 4);
    case KVW_EVICT_BITS: return rows * p->kept_stride * 4 + c.seqs * columns * 4;
    default: return c.seqs * columns * (p->candidates ? 12 : 8);
    }
}

kvw_status kvw_sim_evict(const kvw_sim_evict_params* p, kvw_stream stream) {
    KVW_TRY(kvw_sim_evict_check(p));
    unsigned seqs = unsigned(p->cache.seqs);
    if (p->op == KVW_EVICT_BITS) {
        unsigned ctas = unsigned((p->columns + BITS_TOKENS - 1) / BITS_TOKENS);
        return KVW_LAUNCH(put_bits, dim3(ctas, seqs), BITS_THREADS, 0, stream, *p);
    }
    if (p->op == KVW_EVICT_REPRESENT) {
        if (!p->plain) return KVW_LAUNCH(kvw_represent, dim3(seqs), CRUSH_THREADS, 0, stream, *p);
        size_t shared = size_t(p->columns + 127) / 128 * 16; // a bit a token, in units that are carved
        return KVW_LAUNCH(represent, dim3(seqs), CRUSH_THREADS, shared, stream, *p);
    }
    switch (p->cache.head_dim) {
    case 64: return launch<64>(*p, stream);
    case 96: return launch<96>(*p, stream);
    case 128: return launch<128>(*p, stream);
    default: return launch<256>(*p, stream);
    }
}
