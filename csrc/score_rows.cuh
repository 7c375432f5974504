// score_rows.cuh - the query rows of token_score, and their log-sum-exps over a subset of slots: token_score.cu says why
// it looks like this.
#pragma once
#include "token_score.h"
#include "common/columns.cuh"
#include "common/fragments.cuh"

namespace kvw {

// Of a warp, tiles of 8 columns that it keeps; warps of a CTA, and CTAs an SM: as many as registers allow.
template <int D> constexpr int ROW_TILES = D < 256 ? 4 : 2;
template <int D> constexpr int ROW_WARPS = D == 96 || D == 128 ? 12 : 8;
template <int D> constexpr int ROW_CTAS = D == 64 ? 2 : 1;

// Rows of the sequence that take part: the last ones.
PRIM Columns columns_of(const kvw_token_score_params& p, int s, int len) {
    int end = p.cu_tokens[s + 1], rows = min(end - p.cu_tokens[s], p.lse_rows);
    return {end - rows, rows, p.q_heads / p.cache.kv_heads, len, 0};
}

// Where the log-sum-exp of a column lies.
PRIM float* lse_of(const kvw_token_score_params& p, const Columns& columns, int s, int h, int column) {
    size_t row = size_t(s) * p.lse_rows + columns.lse_row(column, p.lse_rows);
    return p.lse + row * p.q_heads + h * columns.group + column % columns.group;
}

// A slab, and which of its tokens count: none before `from`, none from `to` on.
struct Part {
    SlabAddress slab; // 0: no more
    int first, from, to;
};

// The slabs that hold slots of the ranges, up to slot high - 1, holes left out.
template <int D> struct Subset {
    const Head<D, 0>& head;
    const int* ranges; // null: everything
    int count, high;
    int range = 0, next = 0, from = 0, to = 0;

    PRIM Part take() {
        for (;;) {
            while (next * TOKENS >= to) {
                if (range == count) return {0, 0, 0, 0};
                from = ranges ? max(0, ranges[2 * range]) : 0;
                to = ranges ? min(ranges[2 * range + 1], high) : high;
                next = from / TOKENS, range++;
            }
            Part part{head.slab(next), next * TOKENS, KVW_FAULT(381) ? next * TOKENS : from, to};
            next++;
            if (part.slab) return part;
        }
    }
};

// The columns of one warp, and their sums of exponentials so far, of each lane for the tokens that it sees.
template <int D> struct RowSums {
    static constexpr int NT = ROW_TILES<D>, WORDS = D / 8;
    static constexpr float SLACK = 32.f; // log2 of what a sum may hold of a token: far from f32's limit

    uint32_t w[NT][WORDS];
    float k[NT][2], m[NT][2],
        l[NT][2]; // base-2 score of a raw score of 1; what weights are relative to; sums
    int r, t;

    PRIM void begin(const QueryRows<NT>& q, float scale) {
        int lane = threadIdx.x % 32;
        r = lane / 4, t = lane % 4;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 x[WORDS];
#pragma unroll
            for (int j = 0; j < WORDS; j++) x[j] = q(n, j);
            float unit = scale * LOG2_E * power_of_two(normalise(x, w[n]));
#pragma unroll
            for (int c = 0; c < 2; c++) {
                k[n][c] = __shfl_sync(~0u, unit, (2 * t + c) * 4);
                m[n][c] = NO_SCORE, l[n][c] = 0.f;
            }
        }
    }

    // Adds a slab; `mine` is the first column.
    PRIM void add(const uint4* units, const Part& part, const Columns& columns, int mine) {
        int last = min(mine + 8 * NT, columns.rows * columns.group) - 1, from = part.from - part.first,
            to = part.to - part.first;
        if (last < mine || part.first >= columns.to(last)) return;
        bool edge =
            from > 0 || to < TOKENS || last + 1 < mine + 8 * NT || part.first + TOKENS > columns.to(mine);
#pragma unroll 1
        for (int tile = 0; tile < TOKENS / 16; tile++) {
            float s[NT][4] = {};
#pragma unroll
            for (int i = 0; i < WORDS / 2; i++) {
                uint4 u = units[(tile * (WORDS / 2) + i) * 32 + threadIdx.x % 32];
                const uint32_t a[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
                for (int n = 0; n < NT; n++) prim::mma_16816<__half>(s[n], a, w[n][2 * i], w[n][2 * i + 1]);
            }
#pragma unroll
            for (int i = 0; i < NT * 4 && edge; i++) {
                int token = 16 * tile + r + i % 4 / 2 * 8, column = mine + i / 4 * 8 + 2 * t + i % 2;
                if (token < from || token >= min(to, columns.to(column) - part.first))
                    s[i / 4][i % 4] = -INFINITY;
            }
            add(s);
        }
    }

    // Calls put(column of this warp, log-sum-exp).
    template <class Put> PRIM void finish(Put put) {
#pragma unroll
        for (int i = 0; i < NT * 2; i++) {
            float top = m[i / 2][i % 2], sum = l[i / 2][i % 2];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                float m2 = __shfl_xor_sync(~0u, top, lanes), l2 = __shfl_xor_sync(~0u, sum, lanes);
                float both = fmaxf(top, m2);
                sum = sum * prim::exp2_approx(top - both) +
                      l2 * prim::exp2_approx(KVW_FAULT(382) ? 0.f : m2 - both);
                top = both;
            }
            float lse = sum == 0.f ? -INFINITY : (top + log2f(sum)) * LN_2;
            if (r == 0) put(i / 2 * 8 + 2 * t + i % 2, lse);
        }
    }

private:
    PRIM void add(const float (&s)[NT][4]) {
        bool grows = false;
#pragma unroll
        for (int i = 0; i < NT * 2; i++) {
            int n = i / 2, c = i % 2;
            grows |= fmaf(fmaxf(s[n][c], s[n][c + 2]), k[n][c], -m[n][c]) > SLACK;
        }
        if (grows) {
#pragma unroll
            for (int i = 0; i < NT * 2; i++) {
                int n = i / 2, c = i % 2;
                float top = fmaxf(m[n][c], fmaxf(s[n][c], s[n][c + 2]) * k[n][c]);
                if (!KVW_FAULT(383)) l[n][c] *= prim::exp2_approx(m[n][c] - top);
                m[n][c] = top;
            }
        }
#pragma unroll
        for (int i = 0; i < NT * 4; i++) {
            int n = i / 4, c = i % 2;
            l[n][c] += prim::exp2_approx(fmaf(s[n][i % 4], k[n][c], -m[n][c]));
        }
    }
};

template <int D>
__global__ void __launch_bounds__(32 * ROW_WARPS<D>, ROW_CTAS<D>)
    row_sums(const __grid_constant__ kvw_token_score_params p) {
    constexpr int NT = ROW_TILES<D>, COLUMNS = 8 * NT * ROW_WARPS<D>, THREADS = 32 * ROW_WARPS<D>;
    KVW_DYN_SHARED(unsigned char, raw);
    prim::Carve shared(raw);
    uint4* units = shared.take<uint4>(2 * KeySlab<D>::UNITS);
    int h = blockIdx.y, s = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Head<D, 0> head(p.cache, s, h);
    Columns columns = columns_of(p, s, head.len);
    // The rows that see most start first.
    int begin = int(gridDim.x - 1 - blockIdx.x) * COLUMNS, mine = begin + warp * 8 * NT;
    if (!columns.exists(begin)) return;
    QueryRows<NT> q{{}, p.dtype == KVW_BF16};
#pragma unroll
    for (int n = 0; n < NT; n++) {
        int column = mine + 8 * n + lane / 4;
        if (columns.exists(column))
            q.row[n] = static_cast<const __half*>(p.q) + columns.row(column, p.q_heads, h) * D;
    }
    RowSums<D> sums;
    sums.begin(q, p.scale);

    int high = columns.to(min(begin + COLUMNS, columns.rows * columns.group) - 1);
    const int* ranges = p.seen ? p.seen + size_t(s) * p.ranges * 2 : nullptr;
    Subset<D> subset{head, ranges, ranges ? p.ranges : 1, min(high, head.len)};
    auto slab = [&](int turn) { return KeySlab<D>{units + turn % 2 * KeySlab<D>::UNITS}; };
    Part part = subset.take();
    if (part.slab) slab(0).template bring<THREADS>(part.slab, p.cache, 0);
    prim::cp_async_commit();
    for (int turn = 0; part.slab; turn++) {
        Part next = subset.take();
        if (next.slab) slab(turn + 1).template bring<THREADS>(next.slab, p.cache, turn + 1);
        prim::cp_async_commit();
        if (!KVW_FAULT(384)) prim::cp_async_wait<1>();
        __syncthreads();
        sums.add(slab(turn).units, part, columns, mine);
        if (!KVW_FAULT(380)) __syncthreads(); // before the buffer is filled again
        part = next;
    }
    sums.finish([&](int x, float lse) {
        if (columns.exists(mine + x)) *lse_of(p, columns, s, h, mine + x) = lse;
    });
}

} // namespace kvw
