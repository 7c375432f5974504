// prefill_attn: causal attention of a chunk of queries over slabs that already hold its own K and V.
//
// Math      s[i, t] = scale * (q[i] . k[t]) for the tokens t <= position(i) = len - n + i that the sliding
//           window leaves;  out[i] = sum_t softmax(s[i])[t] * v[t]
// Shapes    q, out [T, H * G, D] of dtype, n rows a sequence; lse [S, lse_rows, H * G] f32, of the last rows
// Layout    slabs of common/slab.cuh: history through the table in any format, the chunk in the ring, f16
// Bytes     q, out, the chunk's own K and V; with max_slabs also the history, once   -> kvw_prefill_attn_bytes()
// Launch    grid (ceil(max_tokens * G / COLUMNS), H, S); sm_90a at D <= 128: 12 warps, COLUMNS = 128, else
//           4 warps, COLUMNS = 64, 32 at D = 256
// Workspace none
// Order     deterministic: a column's tokens are added in order, by one warp or warpgroup
// Oracle    src/prefill_attn/oracle.rs
//
// Why it looks like this:
// 1. Column x of a kv head is query row x / G of its query head x % G: heads of a group share unpacked K and V.
//    CTAs with the longest rows start first. Only steps on the diagonal, at the window's edge or at the end pay
//    for masks.
// 2. sm_90a (prefill_wgmma.cuh): wgmma wants K and V in shared memory as rows, slabs are in the order of
//    mma.sync lanes. Keeping slabs as they are and making Q and P the shared operand needs no rewriting, but a
//    column's scores then lie across four warps: its maxima and P go through shared memory at every step, which
//    B operands keep busy for half of the time as it is. So one warpgroup rewrites each slab into swizzled rows:
//    f16 and fp8 as they are, of codes exact ones first, then scale and minimum in one rounding to f16. Format,
//    group and metadata are told apart there, once a slab: one kernel a head dim. Two warpgroups, 64 columns
//    each, keep Q, P and O in registers. Scores of the next slab are under way, and its softmax runs, while
//    values are added.
// 3. Predicted at D = 128 for 64 tokens of 128 columns, in clocks of an SM: tensor cores 1024; shared memory
//    512 of B operands + 256 of rewriting + 16 to 256 of slabs; exponentials 512; instructions issued by each
//    scheduler (counted in SASS) 2 * 265 of attention + 140 of the unpacking loop + of a slab 90 (f16), 380 to
//    410 (fp8, 2 to 8 bits), 540 (bytes of metadata). So f16 is bound by tensor cores, which wait at the ends of
//    steps: 60 to 65 % of their peak expected; codes, which keep the schedulers busy for as long as the tensor
//    cores, 50 to 60 %. 192 registers a thread of the two, 120 of the one (176 and 152 at D = 96), 193 KB
//    of shared memory: a CTA an SM. At D = 256 the tiles would take all of shared memory and O 128 registers, so
//    it stays with the other kernel, which has no code for sm_90a at D <= 128.
// 4. The other kernel is the decode kernel's warp (common/attend.cuh), 16 columns a warp (8 at D = 256); the
//    CTA's warps share each step: two buffers filled by all threads, a barrier before and after use. A step that
//    no column of a warp sees is skipped. A warp reads each A fragment for 16 columns, so shared memory, not
//    mma, is expected to bound it. Registers are in tests/sass.txt; no run on a GPU yet.
#include "prefill_attn.h"
#include "common/attend.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/steps.cuh"
#include "prefill_wgmma.cuh"
#include <cmath>

namespace {
using namespace kvw;

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int F16_TILES = 2;

template <int D> constexpr int COLUMN_TILES = D < 256 ? 2 : 1;                     // a warp
template <int D> constexpr int ROW_FLOATS = 8 * COLUMN_TILES<D> * (D + ROW_EXTRA); // partial rows of a warp

template <int D> size_t buffer_bytes(const kvw_cache& c) {
    return std::max(2 * size_t(step_bytes<F16_TILES>(c)), size_t(WARPS) * ROW_FLOATS<D> * 4);
}

// One warp's part of a step: columns first_column .. first_column + 8 NT - 1.
template <int FORMAT, int TILES, int D, int GROUP, int NT>
PRIM void attend(Attend<D, GROUP, NT>& a, const Columns& columns, int first_column, unsigned char* kc,
                 unsigned char* vc, int first) {
    int last = min(first_column + 8 * NT, columns.rows * columns.group) - 1, end = first + TILES * 16;
    if (last < first_column || first >= columns.to(last) || end <= columns.from(first_column)) return;
    bool edge =
        last + 1 < first_column + 8 * NT || end > columns.to(first_column) || first < columns.from(last);
    a.template step<FORMAT, TILES>(kc, vc, edge, [&](auto& s, float) {
        int from[NT][2], to[NT][2];
#pragma unroll
        for (int i = 0; i < NT * 2; i++) {
            int column = first_column + i / 2 * 8 + 2 * a.t + i % 2;
            from[i / 2][i % 2] = columns.from(column) - first, to[i / 2][i % 2] = columns.to(column) - first;
        }
        a.mask(s, from, to);
    });
}

// The same by the CTA; bytes past the length are cleared first.
template <int FORMAT, int TILES, int D, int GROUP, int NT>
PRIM void attend_together(Attend<D, GROUP, NT>& a, const Columns& columns, int first_column,
                          unsigned char* kc, unsigned char* vc, int first) {
    if (first + TILES * 16 > columns.len && !KVW_FAULT(125)) {
        clear_past<FORMAT, D, GROUP, TILES>(vc, columns.len - first, threadIdx.x, THREADS);
        __syncthreads();
    }
    a.use_format(FORMAT);
    attend<FORMAT, TILES>(a, columns, first_column, kc, vc, first);
}

template <int D, int GROUP, int FORMATS>
__global__ void __launch_bounds__(THREADS, 2) attn(const __grid_constant__ kvw_prefill_attn_params p) {
    if (prim::WGMMA && D <= WGMMA_D) return; // never launched there: no code
    constexpr int NT = COLUMN_TILES<D>;
    KVW_DYN_SHARED(unsigned char, raw);
    prim::Carve carve(raw);
    int bytes = step_bytes<F16_TILES>(p.cache), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned char* buffer = carve.take<unsigned char, 128>(max(2 * bytes, WARPS * ROW_FLOATS<D> * 4));
    uint4* shared_q = carve.take<uint4>(WARPS * Queries<D, NT>::SHARED_BYTES / 16);

    int h = blockIdx.y, s = blockIdx.z;
    Head<D, GROUP> head(p.cache, s, h);
    int first_row = p.cu_tokens[s], rows = p.cu_tokens[s + 1] - first_row,
        group = p.q_heads / p.cache.kv_heads;
    Columns columns{first_row, rows, group, head.len, p.sliding_window};
    int begin = int(gridDim.x - 1 - blockIdx.x) * (8 * NT * WARPS), mine = begin + warp * 8 * NT;
    if (!columns.exists(begin)) return;

    Attend<D, GROUP, NT> a;
    QueryRows<NT> q{{}, p.dtype == KVW_BF16};
#pragma unroll
    for (int n = 0; n < NT; n++) {
        int column = mine + 8 * n + lane / 4;
        if (columns.exists(column))
            q.row[n] = static_cast<const __half*>(p.q) + columns.row(column, p.q_heads, h) * D;
    }
    a.begin(q, p.scale, shared_q + warp * (Queries<D, NT>::SHARED_BYTES / 16), true);
    __syncwarp();

    int low = columns.from(begin), high = columns.to(min(begin + 8 * NT * WARPS, rows * group) - 1);
    Units<F16_TILES> units{head.packed};
    Walk<D, GROUP, F16_TILES> walk{head, units.of(low), units.end(min(high, head.len)), 1, low, high};
    Step step = walk.start();
    if (step.slab) fetch<D, GROUP, FORMATS, F16_TILES>(step, buffer, threadIdx.x, THREADS);
    prim::cp_async_commit();
    for (int at = 0; step.slab; at ^= bytes) {
        Step next = walk.after(step);
        if (next.slab) fetch<D, GROUP, FORMATS, F16_TILES>(next, buffer + (at ^ bytes), threadIdx.x, THREADS);
        prim::cp_async_commit();
        if (!KVW_FAULT(122)) prim::cp_async_wait<1>();
        __syncthreads();
        unsigned char* data = buffer + at;
        int format = format_of(step.slab);
        if (is<FORMATS, KVW_SLAB_Q2>(format)) {
            constexpr int V = Slab<KVW_SLAB_Q2, D, GROUP>::V_CODES;
            attend_together<KVW_SLAB_Q2, 4>(a, columns, mine, data, data + V, step.first);
        } else if (is<FORMATS, KVW_SLAB_Q4>(format)) {
            constexpr int V = Slab<KVW_SLAB_Q4, D, GROUP>::V_CODES;
            attend_together<KVW_SLAB_Q4, 4>(a, columns, mine, data, data + V, step.first);
        } else if (is<FORMATS, KVW_SLAB_Q8>(format)) {
            constexpr int V = Slab<KVW_SLAB_Q8, D, GROUP>::V_CODES;
            attend_together<KVW_SLAB_Q8, 4>(a, columns, mine, data, data + V, step.first);
        } else if (is<FORMATS, KVW_SLAB_FP8>(format)) {
            constexpr int V = Slab<KVW_SLAB_FP8, D, GROUP>::V_CODES;
            attend_together<KVW_SLAB_FP8, 4>(a, columns, mine, data, data + V, step.first);
        } else {
            attend_together<KVW_SLAB_F16, F16_TILES>(a, columns, mine, data, data + F16_TILES * 32 * D,
                                                     step.first);
        }
        if (!KVW_FAULT(121)) __syncthreads(); // before the buffer is filled again
        step = next;
    }
    a.use_format(KVW_SLAB_F16);

    float* parts = reinterpret_cast<float*>(buffer) + warp * ROW_FLOATS<D>;
    a.store(parts);
    __syncwarp();
    for (int i = lane; i < 8 * NT * (D / 4); i += 32) {
        int x = i / (D / 4), column = mine + x, c = i % (D / 4) * 4;
        if (!columns.exists(column)) break;
        Merged sum = merge_rows<D>([&](int) { return parts + x * (D + ROW_EXTRA); }, 1, c);
        size_t row = columns.row(column, p.q_heads, h);
        put4(static_cast<__half*>(p.out) + row * D + c, q.bf16, normalised(sum));
        int kept = columns.lse_row(column, p.lse_rows);
        if (c == 0 && p.lse && kept >= 0) {
            p.lse[(size_t(s) * p.lse_rows + kept) * p.q_heads + row % p.q_heads] = log_sum_exp(sum);
        }
    }
}

// Whether the code that this device runs of a kernel for sm_90a has a body. Where that cannot be said neither
// kernel is launched: one of them has none.
template <class Kernel> kvw_status runs_here(Kernel kernel, int threads, bool& here) {
#if defined(__CUDACC__)
    cudaFuncAttributes attributes;
    cudaError_t e = cudaFuncGetAttributes(&attributes, kernel);
    here = e == cudaSuccess && attributes.maxThreadsPerBlock >= threads;
    if (e != cudaSuccess) cudaGetLastError(); // clears it
    return status_of(e);
#else
    (void)kernel, (void)threads;
    here = prim::WGMMA;
    return KVW_OK;
#endif
}

dim3 grid_of(const kvw_prefill_attn_params& p, int columns_each) {
    int64_t columns = int64_t(p.max_tokens) * (p.q_heads / p.cache.kv_heads);
    return dim3(unsigned((columns + columns_each - 1) / columns_each), p.cache.kv_heads, p.cache.seqs);
}

template <int D, int GROUP, int FORMATS>
kvw_status launch(const kvw_prefill_attn_params& p, kvw_stream stream) {
    constexpr int NT = COLUMN_TILES<D>, COLUMNS = 8 * NT * WARPS;
    size_t shared = buffer_bytes<D>(p.cache) + WARPS * Queries<D, NT>::SHARED_BYTES;
    return KVW_LAUNCH((attn<D, GROUP, FORMATS>), grid_of(p, COLUMNS), THREADS, shared, stream, p);
}

template <int D> kvw_status launch_group(const kvw_prefill_attn_params& p, kvw_stream stream) {
    if constexpr (D <= WGMMA_D) {
        using Ring = PrefillRing<D>;
        bool here = false;
        KVW_TRY(runs_here(attn_wgmma<D>, Ring::THREADS, here));
        if (here)
            return KVW_LAUNCH((attn_wgmma<D>), grid_of(p, Ring::COLUMNS), Ring::THREADS, Ring::SHARED_BYTES,
                              stream, p);
    }
    return launch_for<D>(p.cache,
                         [&](auto group, auto formats) { return launch<D, group(), formats()>(p, stream); });
}
} // namespace

kvw_status kvw_prefill_attn_check(const kvw_prefill_attn_params* p) {
    KVW_CHECK_PARAMS(p);
    const kvw_cache& c = p->cache;
    KVW_TRY(check_cache(c));
    KVW_REQUIRE(c.packed, NULL, packed);
    KVW_REQUIRED(*p, q);
    KVW_REQUIRED(*p, out);
    KVW_OPTIONAL(*p, lse);
    KVW_REQUIRED(*p, cu_tokens);
    KVW_REQUIRE(p->q_heads >= 1 && p->q_heads % c.kv_heads == 0, SHAPE, q_heads);
    KVW_REQUIRE(p->q_heads / c.kv_heads <= 16, SHAPE, q_heads);
    KVW_REQUIRE(p->tokens >= 1 && p->tokens <= INT32_MAX / 16, SHAPE, tokens);
    KVW_REQUIRE(p->max_tokens >= 1 && p->max_tokens <= p->tokens, SHAPE, max_tokens);
    KVW_REQUIRE(p->lse_rows >= (p->lse ? 1 : 0), SHAPE, lse_rows);
    KVW_REQUIRE(p->max_slabs >= 0, SHAPE, max_slabs);
    KVW_REQUIRE(p->sliding_window >= 0, SHAPE, sliding_window);
    KVW_REQUIRE(p->dtype == KVW_F16 || p->dtype == KVW_BF16, FORMAT, dtype);
    KVW_REQUIRE(std::isfinite(p->scale) && p->scale >= 0.f, SHAPE, scale);
    KVW_REQUIRE(p->reserved == 0, SHAPE, reserved);
    return KVW_OK;
}

size_t kvw_prefill_attn_workspace(const kvw_prefill_attn_params*) { return 0; }

size_t kvw_prefill_attn_bytes(const kvw_prefill_attn_params* p) {
    if (kvw_prefill_attn_check(p) != KVW_OK) return 0;
    const kvw_cache& c = p->cache;
    size_t moved = size_t(p->tokens) * (2 * p->q_heads + 2 * c.kv_heads) * c.head_dim * 2;
    int chunk = (p->tokens / c.seqs + TOKENS - 1) / TOKENS; // slabs, of sequences alike
    int history = slabs_seen(std::max(0, p->max_slabs - chunk), p->sliding_window);
    return moved +
           size_t(c.seqs) * c.kv_heads * history * slab_bytes(narrowest(c), c.head_dim, c.group, c.meta);
}

kvw_status kvw_prefill_attn(const kvw_prefill_attn_params* p, kvw_stream stream) {
    KVW_TRY(kvw_prefill_attn_check(p));
    kvw_prefill_attn_params resolved = *p;
    if (p->scale == 0.f) resolved.scale = 1.f / sqrtf(float(p->cache.head_dim));
    switch (p->cache.head_dim) {
    case 64: return launch_group<64>(resolved, stream);
    case 96: return launch_group<96>(resolved, stream);
    case 128: return launch_group<128>(resolved, stream);
    default: return launch_group<256>(resolved, stream);
    }
}
