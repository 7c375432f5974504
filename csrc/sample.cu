// sample: the next token of each sequence: a repetition penalty, then greedy, or top-k, then top-p, then min-p,
// then temperature, and a seeded draw.
//
// Math      x = logit, if its id is in the history: x > 0 ? x / penalty : x * penalty. weight(x, t) =
//           floor(e^((x - max) / t) * 2^40), 0 for NaN, 2^40 for x = max; rank by (logit descending, id
//           ascending), NaN last. top-k: the first k ranks. top-p: the fewest ranks whose weights at t = 1
//           reach max(1, floor(total * top_p)), top_p in units of 2^-32, total over the kept. min-p: weight at
//           t = 1 of at least floor(min_p * 2^40). Draw: with total now over weights at t = temperature, the
//           first id whose running sum in id order exceeds floor(r * total / 2^64). Nothing kept: the best. r
//           = mix(seed + (step + 1) * 0x9E3779B97F4A7C15), SplitMix64's output step + 1 from seed: mix(z): z =
//           (z ^ z >> 30) * 0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; z ^ z >> 31
// Shapes    logits [S, vocab] f32, vocab up to 2^22; history [S, up to 256] i32; all others [S]
// Bytes     the logits once, 32 a sequence, 8 and the history with a penalty -> kvw_sample_bytes()
// Launch    a CTA of 512 threads a sequence, 27 KB of shared memory
// Workspace none
// Order     deterministic, and the same bits as src/sample/cpu.rs: sums are of integers, e^x is made of
//           single f32 multiplications and additions
// Oracle    src/sample/oracle.rs
//
// Why it looks like this:
// 1. A cut is a rank of 54 bits, key then id, so ties need no code of their own. Both cuts are found by
//    one radix selection: histograms of 11 bits, down to the digit where the run of ranks ends, at most
//    five.
// 2. Eleven bits a digit: of a float's first eight, all logits of a model share a few values, and atomics
//    of a warp to one bin take turns.
// 3. Passes over the logits after the first come from L2: 128 k logits are 512 KB.
// 4. Penalised logits are not stored: a hash table of the history's distinct ids stays in shared memory and
//    each pass asks it. An id's low bits are its hash, so that the 32 neighbours of a warp read 32 banks.
#include "sample.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/radix.cuh"
#include "common/random.cuh"
#include "common/rank.cuh"

namespace {

using u64 = unsigned long long;

constexpr int THREADS = 512, WARPS = THREADS / 32, DIGIT = 11, BINS = 1 << DIGIT, ID_BITS = 22;
constexpr int HISTORY = 256, SLOTS = 2 * HISTORY, EMPTY = -1;
constexpr float ONE = 1099511627776.f; // 2^40, the largest weight

// The steps of src/exp.rs::exp.
PRIM float exp_exact(float x) {
    constexpr float ROUND = 12582912.f;
    x = fminf(fmaxf(x, -87.f), 88.f);
    float shifted = __fadd_rn(__fmul_rn(x, 1.44269504f), ROUND), n = __fsub_rn(shifted, ROUND);
    float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 355.f / 512.f)), __fmul_rn(n, -2.1219444e-4f));
    constexpr float C[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f};
    float p = 1.f / 5040;
#pragma unroll
    for (float c : C) p = __fadd_rn(__fmul_rn(p, r), c);
    uint32_t exponent = __float_as_uint(shifted) - 0x4B400000u + 127u;
    return __fmul_rn(p, __uint_as_float(exponent << 23));
}

PRIM u64 weight(float x, float max, float scale) {
    float e = x == max ? 1.f : exp_exact(__fmul_rn(__fsub_rn(x, max), scale));
    return u64(__fmul_rn(e, ONE));
}

// Greater is better.
PRIM u64 rank_of(int id, float x) {
    uint32_t order = KVW_FAULT(322) ? uint32_t(id) : (1u << ID_BITS) - 1 - uint32_t(id);
    return u64(kvw::rank_key(x)) << ID_BITS | order;
}

PRIM int id_of(u64 rank) { return (1 << ID_BITS) - 1 - int(rank & ((1u << ID_BITS) - 1)); }

struct Shared {
    u64 sums[BINS];
    uint32_t counts[BINS];
    u64 warps[WARPS];
    kvw::Bin<u64> found;
    int history[SLOTS]; // ids by their low bits, or in the next slots; at most half of them in use
};

PRIM u64 running_sum(u64 x, Shared& shared, u64& all) {
    return kvw::running_sum<WARPS>(x, shared.warps, all);
}

PRIM int slot_of(int id) { return int(unsigned(id) % SLOTS); }

struct Row {
    const float* logits;
    int vocab;
    const int* history; // null where nothing is penalised
    float penalty;

    PRIM bool repeats(int id) const {
        int slot = slot_of(id);
        while (history[slot] != id && history[slot] != EMPTY) slot = slot_of(slot + 1);
        return history[slot] == id;
    }

    PRIM float logit(int id) const {
        float x = logits[id];
        if (!history || !repeats(id)) return x;
        return x > 0.f || KVW_FAULT(325) ? __fdiv_rn(x, penalty) : __fmul_rn(x, penalty);
    }

    template <class F> PRIM void each(F f) const {
        for (int id = int(threadIdx.x); id < vocab; id += THREADS) f(id, logit(id));
    }
};

// Sequence s, the ids of its history in their slots.
PRIM Row row_of(const kvw_sample_params& p, int s, Shared& shared) {
    Row row = {p.logits + size_t(s) * p.vocab, p.vocab, nullptr, 1.f};
    if (!p.history || p.penalty[s] == 1.f) return row;
    for (int slot = int(threadIdx.x); slot < SLOTS; slot += THREADS) shared.history[slot] = EMPTY;
    __syncthreads();
    int i = int(threadIdx.x);
    if (i < min(p.history_lens[s], p.history_stride)) {
        int id = p.history[size_t(s) * p.history_stride + i], slot = slot_of(id), was = EMPTY;
        if (id >= 0 && id < p.vocab) {
            while ((was = atomicCAS(&shared.history[slot], EMPTY, id)) != EMPTY && was != id)
                slot = slot_of(slot + 1);
        }
    }
    if (!KVW_FAULT(326)) __syncthreads();
    row.history = shared.history;
    row.penalty = p.penalty[s];
    return row;
}

PRIM u64 best_rank(const Row& row, Shared& shared) {
    u64 best = 0;
    row.each([&](int id, float x) { best = max(best, rank_of(id, x)); });
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) best = max(best, __shfl_xor_sync(~0u, best, lanes));
    if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) best = max(best, shared.warps[w]);
    return best;
}

// The rank that ends the shortest run of ranks, best first, whose measures reach `need`; ranks below `cut` do
// not take part. Digits below the returned ones are zero where the last bin holds one token.
template <class F> PRIM u64 select(const Row& row, Shared& shared, u64 cut, u64 need, F measure) {
    u64 prefix = 0;
    int shift = 32 + ID_BITS;
#pragma unroll 1
    for (int digit = 0; digit < 5; digit++) {
        int width = digit == 2 ? 10 : DIGIT, above = shift; // 11 + 11 + 10 bits of key, 11 + 11 of id
        shift -= width;
        for (int bin = int(threadIdx.x); bin < BINS; bin += THREADS)
            shared.sums[bin] = shared.counts[bin] = 0;
        __syncthreads();
        row.each([&](int id, float x) {
            u64 rank = rank_of(id, x);
            if (rank < cut || rank >> above != prefix >> above) return;
            int bin = int(rank >> shift) & ((1 << width) - 1);
            atomicAdd(&shared.sums[bin], measure(x));
            atomicAdd(&shared.counts[bin], 1u);
        });
        if (!KVW_FAULT(321)) __syncthreads();
        kvw::Bin<u64> f = kvw::find_bin<WARPS, BINS>(shared.sums, shared.warps, &shared.found, need);
        prefix |= u64(f.bin) << shift;
        need -= f.before;
        uint32_t count = shared.counts[f.bin];
        __syncthreads();
        if (count == 1) break;
    }
    return prefix;
}

// floor(total * fraction / 2^32), at least 1.
PRIM u64 share(u64 total, float top_p) {
    u64 fraction = u64(__fmul_rn(fmaxf(top_p, 0.f), 4294967296.f));
    u64 part = (total >> 32) * fraction + (((total & 0xFFFFFFFFu) * fraction) >> 32);
    return part > 0 ? part : 1;
}

// A warp sums a stretch of neighbouring ids, then the one stretch that holds the target is walked.
template <class F> PRIM int draw(const Row& row, Shared& shared, u64 random, int best, F measure) {
    KVW_SHARED(int, drawn, 1);
    int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    int stretch = (row.vocab + THREADS - 1) / THREADS * 32, first = min(warp * stretch, row.vocab);
    int end = min(first + stretch, row.vocab);
    u64 own = 0, all;
    for (int id = first + lane; id < end; id += 32) own += measure(id, row.logit(id));
    if (threadIdx.x == 0) drawn[0] = best;
    u64 after = running_sum(own, shared, all), target = __umul64hi(random, all);
    u64 until = __shfl_sync(~0u, after, 31), sum = warp == 0 ? 0 : until - shared.warps[warp];
    if (all > 0 && sum <= target && target < until) {
        for (int id0 = first; id0 < end; id0 += 32) {
            int id = id0 + lane;
            u64 x = id < end ? measure(id, row.logit(id)) : 0;
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                u64 y = __shfl_up_sync(~0u, x, lanes);
                if (lane >= lanes) x += y;
            }
            uint32_t over = __ballot_sync(~0u, sum + x > target);
            if (over != 0) {
                if (lane == 0) drawn[0] = id0 + __ffs(int(over)) - 1;
                break;
            }
            if (!KVW_FAULT(323)) sum += __shfl_sync(~0u, x, 31);
        }
    }
    __syncthreads();
    return drawn[0];
}

__global__ void __launch_bounds__(THREADS, 2) sample(const __grid_constant__ kvw_sample_params p) {
    KVW_SHARED(Shared, shared_, 1);
    Shared& shared = shared_[0];
    int s = int(blockIdx.x);
    Row row = row_of(p, s, shared);
    u64 best = best_rank(row, shared), cut = 0, all;
    int token = id_of(best);
    float max = row.logit(token), temperature = p.temperature[s], top_p = p.top_p[s];
    if (temperature > 0.f && best >> ID_BITS != 0) {
        if (p.top_k[s] > 0 && p.top_k[s] < p.vocab)
            cut = select(row, shared, cut, u64(p.top_k[s]), [](float) { return 1ull; });
        auto plain = [&](float x) { return weight(x, max, 1.f); };
        if (top_p < 1.f) {
            u64 own = 0;
            row.each([&](int id, float x) { own += rank_of(id, x) >= cut || KVW_FAULT(324) ? plain(x) : 0; });
            running_sum(own, shared, all);
            cut = select(row, shared, cut, share(all, top_p), plain);
        }
        u64 least = u64(__fmul_rn(fmaxf(p.min_p[s], 0.f), ONE));
        float scale = __fdiv_rn(1.f, temperature);
        token = draw(row, shared, kvw::random_bits(p.seeds[s], p.steps[s]), token, [&](int id, float x) {
            bool kept = rank_of(id, x) >= cut && (least == 0 || plain(x) >= least);
            return kept ? weight(x, max, scale) : 0ull;
        });
    }
    if (threadIdx.x == 0) p.tokens[s] = token;
}

} // namespace

kvw_status kvw_sample_check(const kvw_sample_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRED(*p, logits);
    KVW_REQUIRED(*p, tokens);
    KVW_REQUIRED(*p, seeds);
    KVW_REQUIRED(*p, steps);
    KVW_REQUIRED(*p, temperature);
    KVW_REQUIRED(*p, top_p);
    KVW_REQUIRED(*p, min_p);
    KVW_REQUIRED(*p, top_k);
    KVW_REQUIRE(p->seqs >= 1, SHAPE, seqs);
    KVW_REQUIRE(p->vocab >= 1 && p->vocab <= 1 << ID_BITS, SHAPE, vocab);
    KVW_OPTIONAL(*p, history);
    if (!p->history) return KVW_OK;
    KVW_REQUIRED(*p, history_lens);
    KVW_REQUIRED(*p, penalty);
    KVW_REQUIRE(p->history_stride >= 1 && p->history_stride <= HISTORY, SHAPE, history_stride);
    return KVW_OK;
}

size_t kvw_sample_workspace(const kvw_sample_params*) { return 0; }

size_t kvw_sample_bytes(const kvw_sample_params* p) {
    if (kvw_sample_check(p) != KVW_OK) return 0;
    size_t history = p->history ? 8 + size_t(p->history_stride) * 4 : 0;
    return size_t(p->seqs) * (size_t(p->vocab) * 4 + 32 + history);
}

kvw_status kvw_sample(const kvw_sample_params* p, kvw_stream stream) {
    KVW_TRY(kvw_sample_check(p));
    return KVW_LAUNCH(sample, dim3(unsigned(p->seqs)), THREADS, 0, stream, *p);
}
