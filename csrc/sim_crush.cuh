// sim_crush.cuh - KVCrush: the part of sim_evict that knows tokens by the heads that would keep them.
#pragma once
#include "sim_evict.h"
#include "common/random.cuh"

namespace kvw {

constexpr int BITS_THREADS = 256, BITS_TOKENS = 1024; // of a CTA
constexpr int CRUSH_WARPS = 32, CRUSH_THREADS = 32 * CRUSH_WARPS, DISTANCES = 33;

// The first of n ascending numbers that is at least x.
PRIM int lower_bound(const int32_t* numbers, int n, int x) {
    int from = 0;
    while (n > 0) {
        int half = n / 2;
        if (numbers[from + half] < x)
            from += half + 1, n -= half + 1;
        else
            n = half;
    }
    return from;
}

// Bits of BITS_TOKENS tokens: a warp puts those of every eighth head.
__global__ void __launch_bounds__(BITS_THREADS) put_bits(const __grid_constant__ kvw_sim_evict_params p) {
    KVW_SHARED(uint32_t, words, BITS_TOKENS);
    int s = int(blockIdx.y), heads = p.cache.kv_heads, lane = int(threadIdx.x) % 32;
    int begin = int(blockIdx.x) * BITS_TOKENS, end = min(begin + BITS_TOKENS, p.columns);
    for (int i = int(threadIdx.x); i < BITS_TOKENS; i += BITS_THREADS) words[i] = 0;
    if (!KVW_FAULT(711)) __syncthreads();
    for (int h = int(threadIdx.x) / 32; h < heads; h += BITS_THREADS / 32) {
        size_t row = size_t(s) * heads + h;
        const int32_t* kept = p.kept + row * p.kept_stride;
        int n = min(p.kept_counts[row], p.kept_stride), from = lower_bound(kept, n, begin + KVW_FAULT(712));
        for (int i = from + lane; i < n && kept[i] < end; i += 32) atomicOr(&words[kept[i] - begin], 1u << h);
    }
    __syncthreads();
    for (int i = begin + int(threadIdx.x); i < end; i += BITS_THREADS)
        p.bits[size_t(s) * p.columns + i] = words[i - begin];
}

// Distances of 32 candidates, as votes over their bits: a lane knows which of them are at any distance. ABSENT is that of
// those which are not there.
constexpr int ABSENT = 64;

struct Votes {
    uint32_t bit[6], present;

    PRIM explicit Votes(int d) : present(__ballot_sync(~0u, d != ABSENT)) {
#pragma unroll
        for (int b = 0; b < 6; b++) bit[b] = __ballot_sync(~0u, d & 1 << b);
    }

    // Votes that agree with bits of which `not_bit` has all where they are clear, none where they are set.
    PRIM uint32_t at(const uint32_t (&not_bit)[6]) const {
        uint32_t all = present;
#pragma unroll
        for (int b = 0; b < 6; b++) all &= bit[b] ^ not_bit[b];
        return all;
    }

    PRIM uint32_t at(int d) const {
        uint32_t not_bit[6];
        spread(d, not_bit);
        return at(not_bit);
    }

    PRIM static void spread(int d, uint32_t (&not_bit)[6]) {
#pragma unroll
        for (int b = 0; b < 6; b++) not_bit[b] = uint32_t(d >> b & 1) - 1;
    }
};

// How many a warp has at each distance, or where the next one goes: at distance d in lane d, at 32 in every lane.
struct Tally {
    int low = 0, high = 0;
    uint32_t not_lane[6];

    PRIM Tally() { Votes::spread(int(threadIdx.x) % 32, not_lane); }

    PRIM void add(const Votes& votes) {
        low += __popc(votes.at(not_lane));
        if (!KVW_FAULT(713)) high += __popc(votes.bit[5]);
    }

    PRIM int at(int d) const {
        int x = __shfl_sync(~0u, low, d % 32);
        return d == 32 ? high : x;
    }
};

struct Crush {
    const uint32_t* bits;
    const int32_t* candidates; // null: all
    int tokens, n;             // of bits, of candidates
    uint32_t mask, anchor;     // of the heads there are

    PRIM Crush(const kvw_sim_evict_params& p, int s)
        : bits(p.bits + size_t(s) * p.columns),
          candidates(p.candidates ? p.candidates + size_t(s) * p.columns : nullptr),
          tokens(min(max(p.counts[s], 0), p.columns)),
          n(candidates ? min(max(p.candidate_counts[s], 0), p.columns) : tokens),
          mask(~0u >> (32 - p.cache.kv_heads)),
          anchor(0) {}

    PRIM int token(int i) const { return candidates ? candidates[i] : i; }

    PRIM int distance(int i) const {
        if (i >= n) return ABSENT;
        return __popc((bits[token(i)] ^ anchor) & (KVW_FAULT(714) ? ~0u : mask));
    }
};

// Bits of 32 words across a warp, turned: bit i of lane b is what bit b of lane i was. Halves of a block change places
// with the lane that is `lanes` away: it keeps `own` of its bits, the others come turned by `turn`.
struct Transpose {
    uint32_t own[5], turn[5];

    PRIM Transpose() {
        uint32_t low = 0xFFFF;
#pragma unroll
        for (int n = 0, lanes = 16; n < 5; n++, lanes /= 2, low ^= low << lanes) {
            bool upper = threadIdx.x & lanes;
            own[n] = upper ? ~low : low, turn[n] = uint32_t(upper ? 32 - lanes : lanes);
        }
    }

    PRIM uint32_t of(uint32_t x) const {
#pragma unroll
        for (int n = 0, lanes = 16; n < 5; n++, lanes /= 2) {
            uint32_t y = __shfl_xor_sync(~0u, x, lanes);
            x = (x & own[n]) | (__funnelshift_l(y, y, turn[n]) & ~own[n]);
        }
        return x;
    }
};

// Which bits more than half of the tokens have; `counts` [CRUSH_WARPS][32].
PRIM uint32_t majority(const Crush& crush, int* counts) {
    int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, own = 0; // tokens with bit `lane`
    const Transpose transpose;
#pragma unroll 1
    for (int first = warp * 32; first < crush.tokens; first += CRUSH_THREADS)
        own += __popc(transpose.of(first + lane < crush.tokens ? crush.bits[first + lane] : 0));
    counts[warp * 32 + lane] = own;
    if (!KVW_FAULT(715)) __syncthreads();
    int all = 0;
#pragma unroll 4
    for (int w = 0; w < CRUSH_WARPS; w++) all += counts[w * 32 + lane];
    __syncthreads(); // counts are free again
    return __ballot_sync(~0u, 2 * all + KVW_FAULT(716) > crush.tokens);
}

// Anchors that do not depend on the tokens.
PRIM uint32_t given_anchor(const kvw_sim_evict_params& p) {
    switch (p.anchor) {
    case KVW_ANCHOR_RANDOM: return uint32_t(random_bits(p.seed, 0) >> 32);
    case KVW_ANCHOR_ALTERNATE: return 0xAAAAAAAAu;
    case KVW_ANCHOR_ONES: return ~0u;
    default: return 0;
    }
}

// Evenly spaced places: floor(j (all - 1) / (wanted - 1)) for j from 0 to wanted - 1; the first if 1 is wanted.
struct Spaced {
    uint32_t steps, gaps;
    uint64_t inverse; // floor((2^64 - 1) / steps)

    PRIM Spaced(int all, int wanted)
        : steps(wanted > 1 ? uint32_t(max(all - 1, 1)) : 1u << 31),
          gaps(uint32_t(wanted > 1 ? wanted - 1 : max(wanted, 0))),
          inverse(~0ull / steps) {}

    // Whether a multiple of steps lies in [place gaps, (place + 1) gaps).
    PRIM bool has(int place) const {
        uint64_t x = uint64_t(uint32_t(place)) * gaps;
        uint32_t past = uint32_t(x) - uint32_t(__umul64hi(x, inverse)) * steps; // one quotient short at most
        if (past >= steps) past -= steps;
        return (past == 0 ? 0 : steps - past) < gaps;
    }
};

// A sequence a CTA, a stretch of neighbouring candidates a warp. ptx/represent.ptx does the same.
__global__ void __launch_bounds__(CRUSH_THREADS, 1) represent(const __grid_constant__ kvw_sim_evict_params p) {
    KVW_DYN_SHARED(unsigned char, raw);
    KVW_SHARED(int, counts, DISTANCES * CRUSH_WARPS); // [distance][warp ^ distance]: all banks once
    prim::Carve carve(raw);
    uint32_t* chosen = carve.take<uint32_t>((p.columns + 31) / 32);
    int s = int(blockIdx.x), lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    Crush crush(p, s);
    crush.anchor = p.anchor == KVW_ANCHOR_MEAN ? majority(crush, counts) : given_anchor(p);
    int groups = (crush.n + 31) / 32, stretch = (groups + CRUSH_WARPS - 1) / CRUSH_WARPS;
    int first = min(warp * stretch, groups), end = min(first + stretch, groups);
    auto count = [&](int d, int w) -> int& { return counts[d * CRUSH_WARPS + (w ^ d % 32)]; };

    Tally tally;
#pragma unroll 1
    for (int group = first; group < end; group++) tally.add(Votes(crush.distance(group * 32 + lane)));
    count(lane, warp) = tally.low;
    if (lane == 0) count(32, warp) = tally.high;
    if (!KVW_FAULT(717)) __syncthreads();
    Tally next, whole; // places of this warp's first ones; how many there are
#pragma unroll 2
    for (int w = 0; w < CRUSH_WARPS; w++) {
        int low = count(lane, w), high = count(32, w);
        if (w < warp) next.low += low, next.high += high;
        whole.low += low;
    }
    int sum = whole.low; // at this distance and below
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        int x = __shfl_up_sync(~0u, sum, lanes);
        if (lane >= lanes) sum += x;
    }
    next.low += sum - whole.low;
    next.high += __shfl_sync(~0u, sum, 31);

    int own = 0;
    const Spaced spaced(crush.n, p.wanted[s]);
#pragma unroll 1
    for (int group = first; group < end; group++) {
        int d = crush.distance(group * 32 + lane);
        Votes v(d);
        uint32_t before = (KVW_FAULT(718) ? 0u : 1u << lane) - 1;
        int place = next.at(d) + __popc(v.at(d) & before);
        uint32_t is = __ballot_sync(~0u, d != ABSENT && spaced.has(place));
        if (lane == 0) chosen[group] = is;
        own += __popc(is);
        next.add(v);
    }
    __syncthreads(); // counts are free again
    if (lane == 0) counts[warp] = own;
    __syncthreads();
    int at = __reduce_add_sync(~0u, lane < warp ? counts[lane] : 0);
    int32_t* to = p.chosen + size_t(s) * p.columns;
#pragma unroll 1
    for (int group = first; group < end; group++) {
        uint32_t is = chosen[group];
        if (is >> lane & 1) to[at + __popc(is & ((1u << lane) - 1))] = crush.token(group * 32 + lane);
        at += __popc(is);
    }
}

} // namespace kvw

// ptx/represent.ptx, which knows the parameters by their places; in the executor its translation.
#define KVW_AT(field, place)                                                                                 \
    static_assert(offsetof(kvw_sim_evict_params, field) == place, "ptx/represent.ptx has " #field " elsewhere")
KVW_AT(cache.kv_heads, 92);
KVW_AT(bits, 160);
KVW_AT(counts, 168);
KVW_AT(candidates, 176);
KVW_AT(candidate_counts, 184);
KVW_AT(wanted, 192);
KVW_AT(chosen, 200);
KVW_AT(seed, 208);
KVW_AT(columns, 224);
KVW_AT(anchor, 236);
#undef KVW_AT
static_assert(sizeof(kvw_sim_evict_params) == 248, "ptx/represent.ptx has another size");

extern "C" __global__ void __launch_bounds__(kvw::CRUSH_THREADS, 1)
    kvw_represent(const __grid_constant__ kvw_sim_evict_params p) {
#if defined(__CUDACC__)
    asm volatile(
#include "represent.ptx.h"
        ::
            : "memory");
#else
    auto* kvw_represent_param_0 = reinterpret_cast<const unsigned char*>(&p);
#include "represent.ptx.h"
#endif
}
