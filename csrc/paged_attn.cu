// paged_attn: one decode step of attention over mixed-format slabs and the f16 ring, split over slabs.
//
// Math      s[t] = scale * (q . k[t]);  out = sum_t softmax(s)[t] * v[t];  k, v = code * scale + minimum
// Shapes    q, out [S, H * G, D] f16, query head h * G + g reads kv head h; lse [S, H * G] f32
// Layout    slabs of common/slab.cuh, each in its own format; a page table row, then the ring
// Bytes     every slab once, as stored, q and out                           -> kvw_paged_attn_bytes()
// Launch    grid (splits, H, S), 4 warps (2 or 1 where steps are large), 8 columns a warp, 16 for G > 8;
//           D = 256, G > 8: two CTAs a kv head. Dynamic shared memory for two steps a warp: 64 KB at
//           D = 128 for q2 and f16 (3 CTAs an SM on sm_90, 2 on sm_80, 1 on sm_89), 80 KB with q4
// Workspace S * H * G * splits * (D + 4) * 4 bytes of partial rows (softmax.cuh); none with one split
// Order     deterministic: warps, then splits, are added in index order
// Oracle    src/paged_attn/oracle.rs
//
// Why it looks like this:
// 1. A warp takes whole slabs alone, every fourth of its CTA's range, and keeps its own running softmax:
//    no barrier in the loop. The warps' partial rows meet once in shared memory.
// 2. Table entries are read 32 at a time, one a lane, and become addresses there; holes cost one ballot.
// 3. A step is a slab, or 16 tokens of an f16 slab, whose bytes are then about those of a quantised slab.
//    Two step buffers a warp, filled by cp.async, 16 bytes a lane, keep 6 to 8 KB a warp in flight.
// 4. Format is a warp-uniform branch round inlined bodies. Outputs accumulate in the unit of the format
//    read last (attend.cuh); a change of format rescales them by powers of two, which is exact.
// 5. Masks and the clearing of bytes past the length are off the path of all slabs but the outermost.
// 6. The running maximum is a whole number of powers of two: partial results differ by exact factors, and
//    outputs for 1 to 9 splits agree to 1e-5 although probabilities are f16.
// 7. Hot path, a q2 slab of 64 tokens at D = 128, group 32, G <= 8: predicted 714 SASS instructions without
//    loop overhead, budget 760 with it; measured
//    710 on sm_80, 712 on sm_89, 742 on sm_90a, 84 of them HMMA, with 158, 168 and 164 registers
//    (tests/sass.txt): three CTAs an SM.
//    No run on a GPU yet.
#include "kvwarp.h"
#include "common/attend.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/steps.cuh"
#include <algorithm>
#include <cmath>

namespace {
using namespace kvw;

constexpr int WARPS = 4;
constexpr int MOST_SPLITS = 1024;
constexpr int F16_TILES = 1;

template <int FORMAT, int TILES, int D, int GROUP, int NT>
PRIM void attend(Attend<D, GROUP, NT>& a, unsigned char* kc, unsigned char* vc, int first, int low, int len) {
    bool edge = first < low || first + TILES * 16 > len;
    int from[NT][2], to[NT][2];
#pragma unroll
    for (int i = 0; i < NT * 2; i++)
        from[i / 2][i % 2] = low - first, to[i / 2][i % 2] = len - first + KVW_FAULT(103);
    if (first + TILES * 16 > len && !KVW_FAULT(109)) {
        clear_past<FORMAT, D, GROUP, TILES>(vc, len - first, threadIdx.x % 32, 32);
        __syncwarp();
    }
    a.template step<FORMAT, TILES>(kc, vc, edge, from, to);
}

template <int D, int GROUP, int NT, int FORMATS>
__global__ void __launch_bounds__(WARPS * 32, NT == 1 && D <= 128 ? 3 : 2)
    attn(const __grid_constant__ kvw_paged_attn_params p) {
    KVW_DYN_SHARED(unsigned char, raw);
    prim::Carve carve(raw);
    int warp = threadIdx.x / 32, warps = blockDim.x / 32, bytes = step_bytes<F16_TILES>(p.cache);
    unsigned char* buffer = carve.take<unsigned char, 128>(2 * bytes * warps) + 2 * bytes * warp;
    uint4* shared_q = carve.take<uint4>(Queries<D, NT>::SHARED_BYTES / 16);

    int heads = p.q_heads / p.cache.kv_heads,
        blocks = (heads + 8 * NT - 1) / (8 * NT); // blocks of query heads
    int split = blockIdx.x, h = blockIdx.y / blocks, s = blockIdx.z, skip = blockIdx.y % blocks * 8 * NT;
    int columns = min(8 * NT, heads - skip);
    Head<D, GROUP> head(p.cache, s, h);
    size_t row = size_t(s) * p.q_heads + h * heads + skip; // of q and out: this CTA's first
    int low = p.sliding_window > 0 ? max(0, head.len - p.sliding_window + KVW_FAULT(110)) : 0,
        slabs = head.slabs();
    int share = (slabs - low / TOKENS + p.splits - 1) / p.splits, begin = low / TOKENS + split * share;

    Walk<D, GROUP, F16_TILES> walk{head, begin + warp, min(begin + share, slabs), warps, low, head.len};
    int lane = threadIdx.x % 32;
    Step step = walk.start();
    if (step.slab) fetch<D, GROUP, FORMATS, F16_TILES>(step, buffer, lane, 32);
    prim::cp_async_commit();

    Attend<D, GROUP, NT> a;
    const __half* rows[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        int column = 8 * n + lane / 4;
        size_t from = KVW_FAULT(106) ? size_t(s) * p.q_heads + column * p.cache.kv_heads + h : row + column;
        rows[n] = column < columns ? static_cast<const __half*>(p.q) + from * D : nullptr;
    }
    a.begin(rows, p.scale, shared_q, warp == 0);
    if (Queries<D, NT>::SHARED) __syncthreads();

    for (int at = 0;; at ^= bytes) {
        a.use_format(step.slab ? format_of(step.slab) : KVW_SLAB_F16);
        if (!step.slab) break;
        Step next = walk.after(step);
        if (next.slab) fetch<D, GROUP, FORMATS, F16_TILES>(next, buffer + (at ^ bytes), lane, 32);
        prim::cp_async_commit();
        if (!KVW_FAULT(100)) prim::cp_async_wait<1>();
        __syncwarp();
        unsigned char* data = buffer + at;
        int format = format_of(step.slab);
        if (is<FORMATS, KVW_SLAB_Q2>(format)) {
            constexpr int V = Slab<KVW_SLAB_Q2, D, GROUP>::V_CODES;
            attend<KVW_SLAB_Q2, 4>(a, data, data + V, step.first, low, head.len);
        } else if (is<FORMATS, KVW_SLAB_Q4>(format)) {
            constexpr int V = Slab<KVW_SLAB_Q4, D, GROUP>::V_CODES;
            attend<KVW_SLAB_Q4, 4>(a, data, data + V, step.first, low, head.len);
        } else if (is<FORMATS, KVW_SLAB_Q8>(format)) {
            constexpr int V = Slab<KVW_SLAB_Q8, D, GROUP>::V_CODES;
            attend<KVW_SLAB_Q8, 4>(a, data, data + V, step.first, low, head.len);
        } else {
            attend<KVW_SLAB_F16, F16_TILES>(a, data, data + F16_TILES * 32 * D, step.first, low, head.len);
        }
        if (!KVW_FAULT(101)) __syncwarp(); // before the buffer is filled again
        step = next;
    }

    a.store(reinterpret_cast<float*>(buffer));
    if (!KVW_FAULT(113)) __syncthreads();
    const float* parts = reinterpret_cast<const float*>(buffer - 2 * bytes * warp);
    for (int i = threadIdx.x; i < columns * D; i += blockDim.x) {
        int column = i / D, c = i % D;
        Merged x = merge_rows<D>(parts + column * (D + ROW_EXTRA), warps, 2 * bytes / 4, c);
        if (p.splits == 1) {
            static_cast<__half*>(p.out)[(row + column) * D + c] = normalised(x);
            if (p.lse && c == 0) p.lse[row + column] = log_sum_exp(x);
        } else {
            float* part =
                static_cast<float*>(p.workspace) + ((row + column) * p.splits + split) * (D + ROW_EXTRA);
            part[c] = x.o;
            if (c == 0) part[D] = x.m, part[D + 1] = x.l;
        }
    }
}

// Adds the partial rows of one query head in the order of the splits. One CTA of D threads a row.
template <int D> __global__ void __launch_bounds__(D) merge(const __grid_constant__ kvw_paged_attn_params p) {
    size_t row = blockIdx.x;
    const float* parts = static_cast<const float*>(p.workspace) + row * p.splits * (D + ROW_EXTRA);
    Merged x = merge_rows<D>(parts, p.splits - KVW_FAULT(108), D + ROW_EXTRA, threadIdx.x);
    static_cast<__half*>(p.out)[row * D + threadIdx.x] = normalised(x);
    if (p.lse && threadIdx.x == 0) p.lse[row] = log_sum_exp(x);
}

template <int D, int GROUP, int NT> kvw_status launch(const kvw_paged_attn_params& p, kvw_stream stream) {
    // As many warps, up to four, as fit 96 KB with two steps each: every architecture has that much.
    int bytes = step_bytes<F16_TILES>(p.cache), warps = WARPS;
    while (warps > 1 && 2 * warps * bytes > 96 * 1024) warps /= 2;
    size_t shared = 2 * size_t(bytes) * warps + Queries<D, NT>::SHARED_BYTES;
    int blocks = (p.q_heads / p.cache.kv_heads + 8 * NT - 1) / (8 * NT);
    dim3 grid(p.splits, p.cache.kv_heads * blocks, p.cache.seqs);
    KVW_TRY(KVW_LAUNCH((attn<D, GROUP, NT, ALL_FORMATS>), grid, warps * 32, shared, stream, p));
    if (p.splits == 1) return KVW_OK;
    return KVW_LAUNCH((merge<D>), p.cache.seqs * p.q_heads, D, 0, stream, p);
}

template <int D, int GROUP> kvw_status launch_tiles(const kvw_paged_attn_params& p, kvw_stream stream) {
    if constexpr (D < 256) { // 16 columns of 256 outputs do not fit a warp's registers: two CTAs instead
        if (p.q_heads / p.cache.kv_heads > 8) return launch<D, GROUP, 2>(p, stream);
    }
    return launch<D, GROUP, 1>(p, stream);
}

template <int D> kvw_status launch_group(const kvw_paged_attn_params& p, kvw_stream stream) {
    if (p.cache.group == 32) return launch_tiles<D, 32>(p, stream);
    if constexpr (D > 64) { // groups of 64 and of 128 are the same at D = 64
        if (p.cache.group == 128) return launch_tiles<D, 128>(p, stream);
    }
    return launch_tiles<D, 64>(p, stream);
}

// CTAs a (sequence, head): enough to fill a large GPU three times over, as long as a warp gets two slabs, and
// no more partial rows than a merge adds quickly.
int splits_of(const kvw_paged_attn_params& p) {
    if (p.splits > 0) return p.splits;
    constexpr int64_t TARGET = 3 * 132, MOST = 64;
    int64_t heads = int64_t(p.cache.seqs) * p.cache.kv_heads,
            seen = slabs_seen(p.max_slabs, p.sliding_window), useful = (seen + 2 * WARPS - 1) / (2 * WARPS);
    return int(std::min({(TARGET + heads - 1) / heads, std::max<int64_t>(useful, 1), MOST}));
}

kvw_status check_numbers(const kvw_paged_attn_params& p) {
    const kvw_cache& c = p.cache;
    KVW_TRY(check_cache(c));
    KVW_REQUIRE(p.q_heads >= 1 && p.q_heads % c.kv_heads == 0 && p.q_heads / c.kv_heads <= 16, SHAPE,
                q_heads);
    KVW_REQUIRE(int64_t(c.seqs) * p.q_heads <= INT32_MAX, SHAPE, seqs);
    KVW_REQUIRE(c.kv_heads * 2 <= GRID_YZ_MAX, SHAPE, kv_heads);
    KVW_REQUIRE(p.max_slabs >= 1, SHAPE, max_slabs);
    KVW_REQUIRE(p.splits >= 0 && p.splits <= MOST_SPLITS, SHAPE, splits);
    KVW_REQUIRE(p.sliding_window >= 0, SHAPE, sliding_window);
    KVW_REQUIRE(std::isfinite(p.scale) && p.scale >= 0.f, SHAPE, scale);
    return KVW_OK;
}
} // namespace

kvw_status kvw_paged_attn_check(const kvw_paged_attn_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_TRY(check_numbers(*p));
    KVW_REQUIRED(*p, q);
    KVW_REQUIRED(*p, out);
    KVW_OPTIONAL(*p, lse);
    KVW_OPTIONAL(*p, workspace);
    size_t need = kvw_paged_attn_workspace(p);
    KVW_REQUIRE(p->workspace || need == 0, NULL, workspace);
    KVW_REQUIRE(p->workspace_bytes >= need, WORKSPACE, workspace_bytes);
    return KVW_OK;
}

size_t kvw_paged_attn_workspace(const kvw_paged_attn_params* p) {
    if (!p || p->struct_size != sizeof *p || check_numbers(*p) != KVW_OK) return 0;
    int splits = splits_of(*p);
    return splits == 1 ? 0
                       : size_t(p->cache.seqs) * p->q_heads * splits * (p->cache.head_dim + ROW_EXTRA) * 4;
}

size_t kvw_paged_attn_bytes(const kvw_paged_attn_params* p) {
    if (kvw_paged_attn_check(p) != KVW_OK) return 0;
    size_t heads = size_t(p->cache.seqs) * p->cache.kv_heads,
           q = size_t(p->cache.seqs) * p->q_heads * p->cache.head_dim;
    return heads * slab_bytes_held(p->cache, p->max_slabs, p->sliding_window) + 2 * 2 * q;
}

kvw_status kvw_paged_attn(const kvw_paged_attn_params* p, kvw_stream stream) {
    KVW_TRY(kvw_paged_attn_check(p));
    kvw_paged_attn_params resolved = *p;
    resolved.splits = splits_of(*p);
    if (p->scale == 0.f) resolved.scale = 1.f / sqrtf(float(p->cache.head_dim));
    switch (p->cache.head_dim) {
    case 64: return launch_group<64>(resolved, stream);
    case 96: return launch_group<96>(resolved, stream);
    case 128: return launch_group<128>(resolved, stream);
    default: return launch_group<256>(resolved, stream);
    }
}
