// token_score: what attention gives to tokens: column sums and maxima of its weights, from log-sum-exps that are there
// already; and log-sum-exps over a subset of slots.
//
// Math      s[i, t] = scale * (q[i] . k[t]) for the slots t <= len - n + i of row i of n
//           SUM: score[g, t] = sum_i e^(s[i, t] - lse[i]) over the rows i of query head g
//           MAX: score[t] = max over i and g of the same;   LSE: lse[i] = log sum e^s[i, t] over t in its ranges
// Shapes    q [T, H * G, D] of dtype; lse [S, lse_rows, H * G], scores [S, H, G or 1, columns] f32
// Layout    slabs of common/slab.cuh, through the table in any format and in the ring
// Bytes     K of the columns once, q, lse and the scores; LSE: K of max_slabs slabs   -> kvw_token_score_bytes()
// Launch    SUM, MAX: grid (256 tokens, 128 at D = 256; H; S), 8 warps; LSE: grid (columns; H; S), 8 warps of 32 columns
//           at D = 64, of 16 at D = 256, else 12 of 32
// Workspace none
// Order     deterministic: a column adds its rows in order, a row its tokens, by one warp; no atomics
// Oracle    src/token_score/oracle.rs
//
// Why it looks like this:
// 1. SnapKV, FastKV (arXiv:2502.01068): SUM over the last 8 to 64 rows, with the lse of prefill_attn. H2O, PrefixKV
//    (arXiv:2412.03409): SUM over all rows. KVzip (arXiv:2505.23416): LSE over sinks, chunk and repetition, then MAX
//    over the chunk. Nothing is normalised twice and no matrix of weights is stored.
// 2. SUM and MAX keep keys: a warp holds 32 tokens as A fragments in 2 D / 4 registers, straight from the slab (f16: as
//    it lies there; else unpacked once, one rounding to f16), and all query rows pass through shared memory, where eight
//    warps read them. Rows in units of eight of one query head, so that a lane's columns are one sum: scores never
//    leave registers, and lanes meet once a head. A maximum takes no exponential but its last.
// 3. Query rows are copied raw by the warp that then makes B fragments of them (normalised, as bf16 has not f16's range):
//    a chunk of eight units is under way while the one before is used, with one barrier a chunk. 256 tokens a CTA keep
//    what it reads of the queries at 10 bytes a clock of an SM, of the 24 or so that L2 gives.
// 4. LSE keeps queries: 32 columns a warp as B fragments, keys through shared memory, two slabs. A lane has sums of its
//    own for the tokens that it sees, relative to a number that moves only where a score passes it by 2^32: no shuffles
//    and next to no rescaling until the end.
// 5. Predicted for Llama-3-8B, 32,768 tokens, a layer. SUM, 8 rows, f16: 67 MB of K, 4.2 MB of scores: 24 us at 3.0
//    TB/s; q2, group 32: 9.4 MB more than the scores' 4.2: 6 us. SUM, 64 rows: 17 GFLOP, 29 us at 590 TFLOPS (60 % of
//    f16's peak, what mma.sync is known for); all rows: 4.4 TFLOP, 7.5 ms, half of attention's. At D = 128 a unit of 8
//    rows is 16 mma, 101 clocks, and 8 exponentials a lane, 64 clocks. KVzip, a chunk of 2,048: LSE 70 GFLOP, 120 us;
//    MAX 35 GFLOP, 60 us. No run on a GPU yet; registers are in tests/sass.txt.
#include "token_score.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "score_rows.cuh"
#include <cmath>

namespace {
using namespace kvw;
using Params = kvw_token_score_params;

constexpr int WARPS = 8, THREADS = 32 * WARPS;

// Tiles of 16 tokens that a warp keeps, and CTAs an SM.
template <int D> constexpr int KEY_TILES = D < 256 ? 2 : 1;
template <int D> constexpr int CTAS = D < 256 ? 2 : 1;

// Query rows of a kv head as B fragments in shared memory, in units of 8 rows of one query head; chunk c is units
// c * WARPS and on, of which each warp brings one.
template <int D> struct Queries8 {
    static constexpr int WORDS = D / 8, RAW_ROW = 2 * D + 16; // bytes; padding spreads rows over banks
    static constexpr int UNIT = WORDS / 4 * 32;               // 16-byte words of four channel words a lane
    static constexpr size_t SHARED_BYTES = WARPS * (2 * (UNIT * 16 + 8 * 8) + 8 * RAW_ROW);

    const Params& p;
    const Columns& columns;
    int s, h, first, per_head; // row of the first unit of each head; units a head
    uint4* words;              // [2][WARPS][UNIT]
    float2* terms;         // [2][WARPS * 8] of a row: base-2 score of a raw score of 1, minus its log-sum-exp
    unsigned char* raw;    // this warp's 8 rows
    float lse = -INFINITY; // of row lane / 4 of the unit on its way

    PRIM void carve(prim::Carve& shared) {
        words = shared.take<uint4>(2 * WARPS * UNIT);
        terms = shared.take<float2>(2 * WARPS * 8);
        raw = shared.take<unsigned char>(WARPS * 8 * RAW_ROW) + threadIdx.x / 32 * (8 * RAW_ROW);
    }

    // Starts this warp's unit of chunk c.
    PRIM void fetch(int c) {
        int lane = threadIdx.x % 32, unit = c * WARPS + threadIdx.x / 32;
        int g = unit / per_head, row = first + unit % per_head * 8;
        auto column = [&](int r) { return (row + r) * columns.group + g; };
        auto exists = [&](int r) { return g < columns.group && row + r < columns.rows; };
        for (int i = lane; i < 8 * WORDS; i += 32) {
            int r = i / WORDS, at = i % WORDS * 16;
            bool ok = exists(r);
            size_t from = ok ? columns.row(column(r), p.q_heads, h) * (2 * D) + at : 0;
            prim::cp_async16(raw + r * RAW_ROW + at, static_cast<const unsigned char*>(p.q) + from, ok);
        }
        lse = exists(lane / 4) ? *lse_of(p, columns, s, h, column(lane / 4)) : -INFINITY;
        prim::cp_async_commit();
    }

    // Makes fragments of it.
    PRIM void convert(int c) {
        if (!KVW_FAULT(372)) prim::cp_async_wait<0>();
        __syncwarp();
        int lane = threadIdx.x % 32, to = c % 2 * WARPS + threadIdx.x / 32;
        QueryRows<1> row{{raw + lane / 4 * RAW_ROW}, p.dtype == KVW_BF16};
        float2 x[WORDS];
        uint32_t w[WORDS];
#pragma unroll
        for (int j = 0; j < WORDS; j++) x[j] = row(0, j);
        float unit = p.scale * LOG2_E * power_of_two(normalise(x, w));
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            words[to * UNIT + i * 32 + lane] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
        }
        bool none = lse == -INFINITY && !KVW_FAULT(374);
        float2 term = none ? make_float2(0.f, -INFINITY) : make_float2(unit, -lse * LOG2_E);
        if (lane % 4 == 0) terms[to * 8 + lane / 4] = term;
        __syncwarp(); // before the raw rows are overwritten
    }
};

// The tokens of one warp, from `token` on, and what they have got so far.
template <int D, int OP> struct Scored {
    static constexpr int TILES = KEY_TILES<D>, WORDS = D / 8;

    KeyTile<D> keys[TILES];
    float sums[TILES][2]; // of tokens r and r + 8 of a tile, over this lane's columns: base-2 maxima for MAX
    int token, r, t;

    PRIM void begin() {
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) sums[i / 2][i % 2] = OP == KVW_SCORE_SUM ? 0.f : -INFINITY;
    }

    // Adds a unit of rows, of which row x sees the tokens before end + x.
    PRIM void add(const uint4* words, const float2* terms, int end) {
        if (end + 7 <= token) return;
        float s[TILES][4] = {};
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            uint4 b = words[i * 32 + threadIdx.x % 32];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                prim::mma_16816<__half>(s[tile], keys[tile].a[2 * i], b.x, b.y);
                prim::mma_16816<__half>(s[tile], keys[tile].a[2 * i + 1], b.z, b.w);
            }
        }
        float4 term = *reinterpret_cast<const float4*>(terms + 2 * t);
        bool edge = end < token + 16 * TILES;
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) {
            int tile = i / 4, side = i % 4 / 2, c = i % 2;
            float x = fmaf(s[tile][i % 4], c ? term.z : term.x, c ? term.w : term.y);
            if (edge && token + 16 * tile + r + 8 * side >= end + 2 * t + c + KVW_FAULT(373)) x = -INFINITY;
            float& sum = sums[tile][side];
            sum = OP == KVW_SCORE_SUM ? sum + prim::exp2_approx(x) : fmaxf(sum, x);
        }
    }

    // Calls put(token, score) for each token, and begins again.
    template <class Put> PRIM void finish(Put put) {
#pragma unroll
        for (int i = 0; i < 2 * TILES * 2; i++) {
            float& x = sums[i / 2 % TILES][i % 2];
            float y = __shfl_xor_sync(~0u, x, 1 + i / (2 * TILES));
            x = OP == KVW_SCORE_SUM ? x + y : fmaxf(x, y);
        }
        if (t == 0) {
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) {
                float x = sums[i / 2][i % 2];
                put(token + 8 * i + r, OP == KVW_SCORE_SUM ? x : prim::exp2_approx(x));
            }
        }
        if (!KVW_FAULT(375)) begin();
    }
};

template <int D, int OP>
__global__ void __launch_bounds__(THREADS, CTAS<D>) score(const __grid_constant__ Params p) {
    constexpr int TILES = KEY_TILES<D>;
    KVW_DYN_SHARED(unsigned char, raw);
    prim::Carve shared(raw);
    int h = blockIdx.y, s = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Head<D, 0> head(p.cache, s, h);
    Columns columns = columns_of(p, s, head.len);
    int from = p.first ? p.first[p.cache.lens_heads == 1 ? s : s * p.cache.kv_heads + h] : 0;
    int start = from / TOKENS * TOKENS + int(blockIdx.x) * (WARPS * TILES * 16);
    if (start >= from + p.columns) return;

    Scored<D, OP> mine;
    mine.r = lane / 4, mine.t = lane % 4, mine.token = start + warp * TILES * 16;
    SlabAddress slab = mine.token < head.len ? head.slab(mine.token / TOKENS) : 0;
#pragma unroll
    for (int tile = 0; tile < TILES && slab; tile++)
        mine.keys[tile].load(slab, p.cache, mine.token / 16 % 4 + tile);
    mine.begin();
    const bool here = slab != 0;

    auto put = [&](int g) {
        size_t row = size_t(s) * p.cache.kv_heads + h;
        if (OP == KVW_SCORE_SUM) row = row * columns.group + g;
        float* scores = p.scores + row * p.columns;
        return [&, scores](int token, float x) {
            int column = token - (KVW_FAULT(376) ? from / TOKENS * TOKENS : from);
            if (column < 0 || column >= p.columns) return;
            bool held = here && (token < head.len || KVW_FAULT(377));
            if (held && p.accumulate && !KVW_FAULT(378))
                x = OP == KVW_SCORE_SUM ? scores[column] + x : fmaxf(scores[column], x);
            if (held || !p.accumulate) scores[column] = held ? x : 0.f;
        };
    };
    int before = head.len - columns.rows, first = max(0, start - before);
    int per_head = (max(0, columns.rows - first) + 7) / 8, units = per_head * columns.group;
    Queries8<D> queries{p, columns, s, h, first, per_head, nullptr, nullptr, nullptr};
    queries.carve(shared);
    // A chunk is on its way while the one before it is used.
    for (int c = 0, g = 0, i = 0;; c++) {
        bool more = c * WARPS < units;
        if (more) queries.fetch(c);
        int done = max(0, c - 1) * WARPS, x = (c + 1) % 2 * WARPS, end = x + min(c * WARPS, units) - done;
#pragma unroll 1
        for (; x < end; x++) {
            if (here)
                mine.add(queries.words + x * queries.UNIT, queries.terms + x * 8, before + first + 8 * i + 1);
            if (++i < per_head) continue;
            if (OP == KVW_SCORE_SUM || g + 1 == columns.group) mine.finish(put(g));
            i = 0, g++;
        }
        if (!more) break;
        queries.convert(c);
        if (!KVW_FAULT(379)) __syncthreads();
    }
    if (units > 0) return;
    for (int g = 0; g < (OP == KVW_SCORE_SUM ? columns.group : 1); g++) mine.finish(put(g));
}

// Bytes of K, metadata included, of `slabs` slabs: as slab_bytes_held().
size_t key_bytes(const kvw_cache& c, int slabs) {
    auto bytes = [&](int format) { return size_t(layout_of(format, c.head_dim, c.group, c.meta).v_codes); };
    int f16 = std::min(slabs, ring_slabs(c.window));
    return f16 * bytes(KVW_SLAB_F16) + (slabs - f16) * bytes(narrowest(c));
}

template <int D> kvw_status launch(const Params& p, kvw_stream stream) {
    int heads = p.cache.kv_heads, seqs = p.cache.seqs;
    if (p.op == KVW_SCORE_LSE) {
        int64_t columns = int64_t(std::min(p.max_tokens, p.lse_rows)) * (p.q_heads / heads);
        constexpr int EACH = 8 * ROW_TILES<D> * ROW_WARPS<D>;
        dim3 grid(unsigned((columns + EACH - 1) / EACH), heads, seqs);
        return KVW_LAUNCH((row_sums<D>), grid, 32 * ROW_WARPS<D>, 2 * KeySlab<D>::BYTES, stream, p);
    }
    constexpr int EACH = WARPS * KEY_TILES<D> * 16;
    int64_t tokens = int64_t(p.columns) + (p.first ? TOKENS - 1 : 0); // wherever they begin in a slab
    dim3 grid(unsigned((tokens + EACH - 1) / EACH), heads, seqs);
    size_t shared = Queries8<D>::SHARED_BYTES;
    if (p.op == KVW_SCORE_SUM) return KVW_LAUNCH((score<D, KVW_SCORE_SUM>), grid, THREADS, shared, stream, p);
    return KVW_LAUNCH((score<D, KVW_SCORE_MAX>), grid, THREADS, shared, stream, p);
}
} // namespace

kvw_status kvw_token_score_check(const Params* p) {
    KVW_CHECK_PARAMS(p);
    const kvw_cache& c = p->cache;
    bool by_row = p->op == KVW_SCORE_LSE;
    KVW_REQUIRE(by_row || p->op == KVW_SCORE_SUM || p->op == KVW_SCORE_MAX, SHAPE, op);
    KVW_TRY(check_cache(c));
    KVW_REQUIRED(*p, q);
    KVW_REQUIRED(*p, lse);
    KVW_REQUIRED(*p, cu_tokens);
    KVW_OPTIONAL(*p, first);
    KVW_OPTIONAL(*p, seen);
    KVW_REQUIRE(p->q_heads >= 1 && p->q_heads % c.kv_heads == 0, SHAPE, q_heads);
    KVW_REQUIRE(p->q_heads / c.kv_heads <= 16, SHAPE, q_heads);
    KVW_REQUIRE(p->tokens >= 1 && p->tokens <= INT32_MAX / 16, SHAPE, tokens);
    KVW_REQUIRE(p->max_tokens >= 1 && p->max_tokens <= p->tokens, SHAPE, max_tokens);
    KVW_REQUIRE(p->lse_rows >= 1, SHAPE, lse_rows);
    KVW_REQUIRE(p->max_slabs >= 0, SHAPE, max_slabs);
    KVW_REQUIRE(p->accumulate == 0 || (p->accumulate == 1 && !by_row), SHAPE, accumulate);
    KVW_REQUIRE(p->dtype == KVW_F16 || p->dtype == KVW_BF16, FORMAT, dtype);
    KVW_REQUIRE(std::isfinite(p->scale) && p->scale >= 0.f, SHAPE, scale);
    KVW_REQUIRE(p->ranges >= (p->seen ? 1 : 0) && (by_row || p->ranges == 0), SHAPE, ranges);
    if (by_row) return KVW_OK;
    KVW_REQUIRED(*p, scores);
    KVW_REQUIRE(p->columns >= 1 && p->columns <= INT32_MAX / 2, SHAPE, columns);
    return KVW_OK;
}

size_t kvw_token_score_workspace(const Params*) { return 0; }

size_t kvw_token_score_bytes(const Params* p) {
    if (kvw_token_score_check(p) != KVW_OK) return 0;
    const kvw_cache& c = p->cache;
    bool by_row = p->op == KVW_SCORE_LSE;
    int64_t rows = std::min<int64_t>(p->tokens, int64_t(c.seqs) * p->lse_rows);
    size_t moved = size_t(rows) * p->q_heads * (size_t(c.head_dim) * 2 + 4);
    size_t slabs = by_row ? p->max_slabs : (p->columns + TOKENS - 1) / TOKENS;
    moved += size_t(c.seqs) * c.kv_heads * key_bytes(c, int(slabs));
    if (by_row) return moved;
    int scored = p->op == KVW_SCORE_SUM ? p->q_heads : c.kv_heads;
    return moved + size_t(c.seqs) * scored * p->columns * 4 * (p->accumulate ? 2 : 1);
}

kvw_status kvw_token_score(const Params* p, kvw_stream stream) {
    KVW_TRY(kvw_token_score_check(p));
    Params resolved = *p;
    if (p->scale == 0.f) resolved.scale = 1.f / sqrtf(float(p->cache.head_dim));
    switch (p->cache.head_dim) {
    case 64: return launch<64>(resolved, stream);
    case 96: return launch<96>(resolved, stream);
    case 128: return launch<128>(resolved, stream);
    default: return launch<256>(resolved, stream);
    }
}
