// paged_attn: attention of 1 to 16 new tokens a sequence over mixed-format slabs and the f16 ring.
//
// Math      s[i, t] = scale * (R q[i] . k[t]) * k_norm[t], softened by softcap * tanh(s / softcap), over the
//           tokens t < len - q_len + i + 1 that the sliding window leaves;  out[i] = sum_t w[t] * v[t],
//           w = softmax(s[i]), of s[i] and the head's sink where there are sinks
// Shapes    q, out [S, q_len, H * G, D] f16 or bf16, query head h * G + g reads kv head h;
//           lse [S, q_len, H * G] f32
// Layout    slabs of common/slab.cuh, each in its own format; a page table row, then the ring
// Bytes     every slab once, as stored, q and out                           -> kvw_paged_attn_bytes()
// Launch    min(ctas, units / least) CTAs of 4 warps (2 or 1 where steps are large). A CTA has 8 query columns at
//           a time, 16 where there are more than 8 (not at D = 256). Dynamic shared memory for two steps a
//           warp: 64 KB at D = 128 for q2 and f16 (3 CTAs an SM on sm_90, 2 on sm_80, 1 on sm_89), 80 KB
//           with q4
// Workspace a ticket a CTA, then ctas * 2 blocks of partial rows (softmax.cuh): of the head that a CTA's
//           share begins in and of the one that it ends in. The same for all lengths and batches
// Order     deterministic: warps, then CTAs, are added in the order of their tokens
// Oracle    src/paged_attn/oracle.rs
//
// Why it looks like this:
// 1. Work is cut into equal shares whatever the batch and its lengths are (common/streamk.cuh), by every CTA
//    for itself. A share begins and ends in the middle of a head; heads that lie in one share are written at
//    once. Of the CTAs that hold parts of a head, the one that finishes last adds them all, in order: no
//    second launch, no CTA waits for another. The ticket that tells which is the last belongs to the CTA
//    where the head begins, as no other head begins there and goes on: tickets need not grow with the batch.
// 2. Work is counted in units of about the same bytes, a slab of the table or 16 tokens of the ring: the
//    ring's f16 slabs are divided among warps too. A slab of the table counts as one in any format.
// 3. A warp takes every fourth unit of its CTA's part of a head and keeps its own running softmax: no
//    barrier in the loop. The warps' partial rows meet once in shared memory.
// 4. Table entries are read 32 at a time, one a lane, and become addresses there; holes cost one ballot.
// 5. A step is a slab, or 16 tokens of an f16 slab, whose bytes are then about those of a quantised slab.
//    Two step buffers a warp, filled by cp.async, 16 bytes a lane, keep 6 to 8 KB a warp in flight.
// 6. Format is a warp-uniform branch round inlined bodies. Outputs accumulate in the unit of the format
//    read last (attend.cuh); a change of format rescales them by powers of two, which is exact.
// 7. Masks and the clearing of bytes past the length are off the path of all slabs but the outermost. What
//    softcap and k_norm do to scores takes the masks' place: where they are given every slab is outermost.
// 8. The running maximum is a whole number of powers of two: partial results differ by exact factors, and
//    heads cut 1 to 18 ways agree to 1e-6 before the output is rounded, although probabilities are f16.
// 9. Hot path, a q2 slab of 64 tokens at D = 128, group 32, 8 columns: predicted 714 SASS instructions
//    without loop overhead, budget 760 with it; measured HOTPATH
//    No run on a GPU yet.
#include "kvwarp.h"
#include "common/attend.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/steps.cuh"
#include "common/streamk.cuh"
#include <algorithm>
#include <cmath>

namespace {
using namespace kvw;

constexpr int WARPS = 4;
constexpr int F16_TILES = 1;
constexpr int DEFAULT_CTAS = 3 * 132, DEFAULT_LEAST = WARPS;
constexpr int MOST_CTAS = KVW_PAGED_ATTN_TICKETS / 4, MOST_LEAST = 1 << 16, MOST_ROWS = 16;

using Params = kvw_paged_attn_params;

// Query columns of a kv head: column x is row x / G of query head x % G. A CTA takes blocks of them.
__host__ __device__ inline int columns_of(const Params& p) {
    return p.q_len * (p.q_heads / p.cache.kv_heads);
}

// Which of `len` tokens the rows of a sequence see.
struct Seen {
    int len, rows, window;

    PRIM Seen(const Params& p, int n) : len(n), rows(p.q_len), window(p.sliding_window) {}
    PRIM int to(int row) const { return len - rows + row + 1; }
    PRIM int from(int row) const { return window > 0 ? max(0, to(row) - window + KVW_FAULT(110)) : 0; }
};

// Units of heads of entry `at` of lens; one where nothing is seen, so that somebody writes the zeros.
PRIM int units_of(const Params& p, int at) {
    Seen seen(p, p.cache.lens[at]);
    Units<F16_TILES> units{packed_slabs(p.cache, at, seen.len)};
    return max(1, units.end(seen.len) - units.of(seen.from(0)));
}

// The columns of head `head` of the list: column x of it is column skip + x of (s, h).
struct Columns {
    int s, h, skip, count, group;

    template <int MOST> PRIM static Columns of(const Params& p, int head) {
        int all = columns_of(p), blocks = (all + MOST - 1) / MOST, skip = head % blocks * MOST;
        head /= blocks;
        return {head / p.cache.kv_heads, head % p.cache.kv_heads, skip, min(MOST, all - skip),
                p.q_heads / p.cache.kv_heads};
    }

    PRIM int row(int x) const { return KVW_FAULT(130) ? (skip + x) % group : (skip + x) / group; }

    PRIM int q_head(const Params& p, int x) const {
        int g = (skip + x) % group;
        return KVW_FAULT(106) ? g * p.cache.kv_heads + h : h * group + g;
    }

    // Row of q, out and lse.
    PRIM size_t at(const Params& p, int x) const {
        return (size_t(s) * p.q_len + (skip + x) / group) * p.q_heads + q_head(p, x);
    }
};

// Heads of the list that share an entry of lens.
template <int MOST> PRIM int heads_an_entry(const Params& p) {
    int blocks = (columns_of(p) + MOST - 1) / MOST;
    return p.cache.lens_heads == 1 ? p.cache.kv_heads * blocks : blocks;
}

// Scores of an outer step before the softmax: what is given to change them, then the masks.
template <int D, int GROUP, int NT> struct Outer {
    const Params& p;
    const Attend<D, GROUP, NT>& a;
    const Columns& columns;
    Seen seen;
    int first;

    template <int TILES> PRIM void operator()(float (&s)[TILES][NT][4], float unit) const {
        if (p.k_norm) {
            size_t head = size_t(columns.s) * p.cache.kv_heads + columns.h;
            a.scale_tokens(s, p.k_norm + head * p.k_norm_stride + first, seen.len - first);
        }
        if (p.softcap > 0.f) a.soften(s, unit, p.softcap + KVW_FAULT(131));
        int from[NT][2], to[NT][2];
#pragma unroll
        for (int i = 0; i < NT * 2; i++) {
            int row = columns.row(i / 2 * 8 + 2 * a.t + i % 2);
            from[i / 2][i % 2] = seen.from(row) - first;
            to[i / 2][i % 2] = seen.to(row) - first + KVW_FAULT(103);
        }
        a.mask(s, from, to);
    }
};

// One step of a warp; outside of tokens from .. to - 1 not every row sees all of it, or scores need changing.
template <int FORMAT, int TILES, int D, int GROUP, int NT>
PRIM void attend(Attend<D, GROUP, NT>& a, const Outer<D, GROUP, NT>& outer, unsigned char* data, int from,
                 int to) {
    using S = Slab<FORMAT, D, GROUP>;
    unsigned char* v = data + (S::QUANTISED ? S::V_CODES : TILES * 32 * D);
    int end = outer.first + TILES * 16, len = outer.seen.len;
    bool edge = outer.first < from || end > to;
    if (edge && end > len && !KVW_FAULT(109)) {
        clear_past<FORMAT, D, GROUP, TILES>(v, len - outer.first, threadIdx.x % 32, 32);
        __syncwarp();
    }
    a.template step<FORMAT, TILES>(data, v, edge, outer);
}

// What a warp does of its CTA's units of one head: its partial rows, left at the start of its buffers. The
// rows of a CTA's warps lie `2 * bytes` apart; `buffers` are the first warp's.
template <int D, int GROUP, int NT, int FORMATS>
PRIM void attend_units(const Params& p, const Work& work, const Columns& columns, unsigned char* buffers,
                       int bytes, uint4* shared_q) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    unsigned char* buffer = buffers + 2 * bytes * warp;
    Head<D, GROUP> head(p.cache, columns.s, columns.h);
    Seen seen(p, head.len);
    Units<F16_TILES> units{head.packed};
    int low = seen.from(0), begin = units.of(low) + work.unit,
        end = min(begin + work.take() + KVW_FAULT(135), units.end(head.len));
    bool hooked = p.k_norm || p.softcap > 0.f;
    int inner_from = hooked ? INT32_MAX : seen.from(p.q_len - 1),
        inner_to = seen.to(KVW_FAULT(136) ? p.q_len - 1 : 0);

    QueryRows<NT> rows;
    rows.bf16 = p.dtype == KVW_BF16;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        int x = 8 * n + lane / 4;
        rows.row[n] = x < columns.count ? static_cast<const __half*>(p.q) + columns.at(p, x) * D : nullptr;
    }
    Attend<D, GROUP, NT> a;
    if (p.rotation) {
        float* rotated = reinterpret_cast<float*>(buffers);
        rotate<D, NT>(p.rotation, rows, rotated);
        __syncthreads();
        a.begin(RotatedRows<D>{rotated}, p.scale, shared_q, warp == 0);
        __syncthreads();
    }
    Walk<D, GROUP, F16_TILES> walk{head, begin + warp, end, warps, low, head.len};
    Step step = walk.start();
    if (step.slab) fetch<D, GROUP, FORMATS, F16_TILES>(step, buffer, lane, 32);
    prim::cp_async_commit();
    if (!p.rotation) {
        a.begin(rows, p.scale, shared_q, warp == 0);
        if (Queries<D, NT>::SHARED) __syncthreads();
    }

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
        Outer<D, GROUP, NT> outer{p, a, columns, seen, step.first};
        if (is<FORMATS, KVW_SLAB_Q2>(format))
            attend<KVW_SLAB_Q2, 4>(a, outer, data, inner_from, inner_to);
        else if (is<FORMATS, KVW_SLAB_Q4>(format))
            attend<KVW_SLAB_Q4, 4>(a, outer, data, inner_from, inner_to);
        else if (is<FORMATS, KVW_SLAB_Q8>(format))
            attend<KVW_SLAB_Q8, 4>(a, outer, data, inner_from, inner_to);
        else
            attend<KVW_SLAB_F16, F16_TILES>(a, outer, data, inner_from, inner_to);
        if (!KVW_FAULT(101)) __syncwarp(); // before the buffer is filled again
        step = next;
    }
    a.store(reinterpret_cast<float*>(buffer));
}

// Writes channels c .. c + 3 of column x.
template <int D> PRIM void write(const Params& p, const Columns& columns, int x, int c, Merged merged) {
    if (p.sinks) merged = with_sink(merged, p.sinks[columns.q_head(p, KVW_FAULT(137) ? 0 : x)]);
    size_t row = columns.at(p, x);
    put4(static_cast<__half*>(p.out) + row * D + c, p.dtype == KVW_BF16, normalised(merged));
    if (p.lse && c == 0) p.lse[row] = log_sum_exp(merged);
}

// Block `i` of partial rows in the workspace, COLUMNS rows or as many as there are.
template <int D, int COLUMNS> __host__ __device__ inline size_t block_floats(const Params& p) {
    return size_t(columns_of(p) < COLUMNS ? columns_of(p) : COLUMNS) * (D + ROW_EXTRA);
}

// True in the CTA that hands in the last of a head's parts; it then sees what the others wrote.
PRIM bool last_of_head(const Params& p, const Work& work) {
    bool last = false;
    if (threadIdx.x == 0) {
        unsigned* ticket = static_cast<unsigned*>(p.workspace) + work.first_cta();
        if (!KVW_FAULT(132)) __threadfence();
        last = atomicAdd(ticket, 1u) == unsigned(work.last_cta() - work.first_cta());
        if (last && !KVW_FAULT(133)) atomicExch(ticket, 0u);
        __threadfence();
    }
    return __syncthreads_or(last);
}

// Adds the warps' partial rows of a head. Where the CTA had all of the head, that is the result; else a part
// of it, and the last CTA to get here adds the parts.
template <int D, int COLUMNS>
PRIM void finish(const Params& p, const Work& work, const Columns& columns, const float* rows, int stride) {
    const size_t floats = block_floats<D, COLUMNS>(p);
    float* blocks = static_cast<float*>(p.workspace) + KVW_PAGED_ATTN_TICKETS / 4;
    float* mine = blocks + (2 * size_t(blockIdx.x) + (work.unit == 0 && !KVW_FAULT(134))) * floats;
    bool whole = work.take() == work.units;
    for (int i = threadIdx.x; i < columns.count * (D / 4); i += blockDim.x) {
        int x = i / (D / 4), c = i % (D / 4) * 4, at = x * (D + ROW_EXTRA);
        Merged sum = merge_rows<D>([&](int warp) { return rows + warp * stride + at; }, blockDim.x / 32, c);
        if (whole) {
            write<D>(p, columns, x, c, sum);
        } else {
            *reinterpret_cast<float4*>(mine + at + c) = sum.o;
            if (c == 0) *reinterpret_cast<float2*>(mine + at + D) = make_float2(sum.m, sum.l);
        }
    }
    __syncthreads(); // rows are read, and parts written
    if (whole || !last_of_head(p, work)) return;
    int first = work.first_cta(), parts = work.last_cta() - first + 1 - KVW_FAULT(108);
    for (int i = threadIdx.x; i < columns.count * (D / 4); i += blockDim.x) {
        int x = i / (D / 4), c = i % (D / 4) * 4;
        auto part = [&](int k) {
            return blocks + (2 * size_t(first + k) + (k == 0)) * floats + x * (D + ROW_EXTRA);
        };
        write<D>(p, columns, x, c, merge_rows<D>(part, parts, c));
    }
}

template <int D, int GROUP, int NT, int FORMATS>
__global__ void __launch_bounds__(WARPS * 32, NT == 1 && D <= 128 ? 3 : 2)
    attn(const __grid_constant__ kvw_paged_attn_params p) {
    constexpr int COLUMNS = 8 * NT;
    KVW_DYN_SHARED(unsigned char, raw);
    KVW_SHARED(Work, kept, 1); // not in registers while slabs are read
    prim::Carve carve(raw);
    int warps = blockDim.x / 32, bytes = step_bytes<F16_TILES>(p.cache);
    unsigned char* buffers = carve.take<unsigned char, 128>(2 * bytes * warps);
    uint4* shared_q = carve.take<uint4>(Queries<D, NT>::SHARED_BYTES / 16);

    auto units = [&](int at) { return units_of(p, at); };
    Work work = first_work(p.cache.seqs * p.cache.lens_heads, heads_an_entry<COLUMNS>(p), p.least, units);
    while (work.at < work.end) {
        if (threadIdx.x == 0) kept[0] = work;
        Columns columns = Columns::of<COLUMNS>(p, work.head);
        attend_units<D, GROUP, NT, FORMATS>(p, work, columns, buffers, bytes, shared_q);
        if (!KVW_FAULT(113)) __syncthreads();
        work = kept[0];
        columns = Columns::of<COLUMNS>(p, work.head);
        finish<D, COLUMNS>(p, work, columns, reinterpret_cast<const float*>(buffers), 2 * bytes / 4);
        work.advance(heads_an_entry<COLUMNS>(p), units);
    }
}

// A CTA has 16 columns where there are more than 8; 16 of 256 outputs do not fit a warp's registers.
int column_tiles(const Params& p) { return columns_of(p) > 8 && p.cache.head_dim < 256 ? 2 : 1; }

// Bound on the list of work: a head's slabs, those in the ring counted by their steps.
int64_t most_units(const Params& p) {
    int columns = 8 * column_tiles(p), ring = std::min(p.max_slabs, p.cache.ring_slabs);
    int64_t heads = int64_t(p.cache.seqs) * p.cache.kv_heads * ((columns_of(p) + columns - 1) / columns);
    return heads * (p.max_slabs + int64_t(ring) * (TOKENS / (16 * F16_TILES) - 1));
}

template <int D, int GROUP, int NT> kvw_status launch(const Params& p, kvw_stream stream) {
    // As many warps, up to four, as fit 96 KB with two steps each: every architecture has that much.
    int bytes = step_bytes<F16_TILES>(p.cache), warps = WARPS;
    while (warps > 1 && 2 * warps * bytes > 96 * 1024) warps /= 2;
    size_t shared = 2 * size_t(bytes) * warps + Queries<D, NT>::SHARED_BYTES;
    int64_t grid = std::min<int64_t>(p.ctas, (most_units(p) + p.least - 1) / p.least);
    return KVW_LAUNCH((attn<D, GROUP, NT, ALL_FORMATS>), unsigned(grid), warps * 32, shared, stream, p);
}

template <int D, int GROUP> kvw_status launch_tiles(const Params& p, kvw_stream stream) {
    if constexpr (D < 256) {
        if (column_tiles(p) == 2) return launch<D, GROUP, 2>(p, stream);
    }
    return launch<D, GROUP, 1>(p, stream);
}

template <int D> kvw_status launch_group(const Params& p, kvw_stream stream) {
    if (p.cache.group == 32) return launch_tiles<D, 32>(p, stream);
    if constexpr (D > 64) { // groups of 64 and of 128 are the same at D = 64
        if (p.cache.group == 128) return launch_tiles<D, 128>(p, stream);
    }
    return launch_tiles<D, 64>(p, stream);
}

kvw_status check_numbers(const Params& p) {
    const kvw_cache& c = p.cache;
    KVW_TRY(check_cache(c));
    KVW_REQUIRE(p.q_heads >= 1 && p.q_heads % c.kv_heads == 0, SHAPE, q_heads);
    KVW_REQUIRE(p.q_heads / c.kv_heads <= 16, SHAPE, q_heads);
    KVW_REQUIRE(p.q_len >= 1 && p.q_len <= MOST_ROWS, SHAPE, q_len);
    KVW_REQUIRE(int64_t(c.seqs) * p.q_heads * p.q_len <= INT32_MAX, SHAPE, seqs);
    KVW_REQUIRE(p.max_slabs >= 1 && most_units(p) <= INT32_MAX, SHAPE, max_slabs);
    KVW_REQUIRE(p.ctas >= 0 && p.ctas <= MOST_CTAS, SHAPE, ctas);
    KVW_REQUIRE(p.least >= 0 && p.least <= MOST_LEAST, SHAPE, least);
    KVW_REQUIRE(p.sliding_window >= 0, SHAPE, sliding_window);
    KVW_REQUIRE(!p.k_norm || p.k_norm_stride >= 1, SHAPE, k_norm_stride);
    KVW_REQUIRE(p.dtype == KVW_F16 || p.dtype == KVW_BF16, FORMAT, dtype);
    KVW_REQUIRE(std::isfinite(p.scale) && p.scale >= 0.f, SHAPE, scale);
    KVW_REQUIRE(std::isfinite(p.softcap) && p.softcap >= 0.f, SHAPE, softcap);
    return KVW_OK;
}

// With what the caller left to us.
Params resolved(const Params& p) {
    Params full = p;
    if (p.ctas == 0) full.ctas = DEFAULT_CTAS;
    if (p.least == 0) full.least = DEFAULT_LEAST;
    if (p.scale == 0.f) full.scale = 1.f / sqrtf(float(p.cache.head_dim));
    return full;
}
} // namespace

kvw_status kvw_paged_attn_check(const kvw_paged_attn_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_TRY(check_numbers(*p));
    KVW_REQUIRED(*p, q);
    KVW_REQUIRED(*p, out);
    KVW_OPTIONAL(*p, lse);
    KVW_OPTIONAL(*p, sinks);
    KVW_OPTIONAL(*p, k_norm);
    KVW_OPTIONAL(*p, rotation);
    KVW_REQUIRED(*p, workspace);
    KVW_REQUIRE(p->workspace_bytes >= kvw_paged_attn_workspace(p), WORKSPACE, workspace_bytes);
    return KVW_OK;
}

size_t kvw_paged_attn_workspace(const kvw_paged_attn_params* p) {
    if (!p || p->struct_size != sizeof *p || check_numbers(*p) != KVW_OK) return 0;
    int rows = std::min(8 * column_tiles(*p), columns_of(*p));
    return KVW_PAGED_ATTN_TICKETS +
           size_t(resolved(*p).ctas) * 2 * rows * (p->cache.head_dim + ROW_EXTRA) * 4;
}

size_t kvw_paged_attn_bytes(const kvw_paged_attn_params* p) {
    if (kvw_paged_attn_check(p) != KVW_OK) return 0;
    size_t heads = size_t(p->cache.seqs) * p->cache.kv_heads,
           q = size_t(p->cache.seqs) * p->q_len * p->q_heads * p->cache.head_dim;
    return heads * slab_bytes_held(p->cache, p->max_slabs, p->sliding_window) + 2 * 2 * q;
}

kvw_status kvw_paged_attn(const kvw_paged_attn_params* p, kvw_stream stream) {
    KVW_TRY(kvw_paged_attn_check(p));
    switch (p->cache.head_dim) {
    case 64: return launch_group<64>(resolved(*p), stream);
    case 96: return launch_group<96>(resolved(*p), stream);
    case 128: return launch_group<128>(resolved(*p), stream);
    default: return launch_group<256>(resolved(*p), stream);
    }
}
