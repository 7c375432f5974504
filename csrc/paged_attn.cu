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
//    Two step buffers a warp (Pipe in common/steps.cuh): one is read while the other fills, by one bulk copy
//    for lane 0 on sm_90, read once and evicted first, by cp.async of all lanes elsewhere. With three CTAs
//    an SM that is 72 KB of q2 or 96 KB of f16 in flight at D = 128.
// 6. Format is a warp-uniform branch round inlined bodies. Outputs accumulate in the unit of the format
//    read last (attend.cuh); a change of format rescales them by powers of two, which is exact.
// 7. Masks and the clearing of bytes past the length are off the path of all slabs but the outermost. What
//    softcap and k_norm do to scores takes the masks' place: where they are given every slab is outermost.
// 8. The running maximum is a whole number of powers of two: partial results differ by exact factors, and
//    heads cut 1 to 18 ways agree to 1e-6 before the output is rounded, although probabilities are f16.
// 9. Hot path, a q2 slab of 64 tokens at D = 128, group 32, 8 columns: predicted 714 SASS instructions
//    without loop overhead, budget 760 with it; measured
//    728 on sm_80, 730 on sm_89, 740 on sm_90a, 84 of them HMMA, with 167, 167 and 162 registers
//    (tests/sass.txt): three CTAs an SM. What only outer steps need lies in shared memory for that.
//    No run on a GPU yet.
#include "paged_attn.h"
#include "common/attend.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/pieces.cuh"
#include <algorithm>
#include <cmath>

namespace {
using namespace kvw;

constexpr int WARPS = 4;
constexpr int STAGES = 2; // step buffers of a warp
constexpr int DEFAULT_CTAS = 3 * 132, DEFAULT_LEAST = WARPS;
constexpr int MOST_CTAS = KVW_PAGED_ATTN_TICKETS / 4, MOST_LEAST = 1 << 16, MOST_ROWS = 16;

// Scores of an outer step before the softmax: what is given to change them, then the masks.
template <int D, int GROUP, int NT> struct Outer {
    const Params& p;
    const Attend<D, GROUP, NT>& a;
    const Piece& piece;
    int first;

    template <int TILES> PRIM void operator()(float (&s)[TILES][NT][4], float unit) const {
        const QueryBlock& columns = piece.columns;
        Seen seen(p, piece.len);
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
    unsigned char* v = data + (FORMAT == KVW_SLAB_F16 ? TILES * 32 * D : S::V_CODES);
    int end = outer.first + TILES * 16;
    bool edge = outer.first < from || end > to;
    if (edge && end > outer.piece.len && !KVW_FAULT(109)) {
        clear_past<FORMAT, D, GROUP, TILES>(v, outer.piece.len - outer.first, threadIdx.x % 32, 32);
        Pipe<STAGES>::wrote();
        __syncwarp();
    }
    a.template step<FORMAT, TILES>(data, v, edge, outer);
}

template <int FORMATS, int D, int GROUP, int NT>
PRIM void attend_format(int format, Attend<D, GROUP, NT>& a, const Outer<D, GROUP, NT>& outer,
                        unsigned char* data, int from, int to) {
    if (is<FORMATS, KVW_SLAB_Q2>(format)) return attend<KVW_SLAB_Q2, 4>(a, outer, data, from, to);
    if (is<FORMATS, KVW_SLAB_Q4>(format)) return attend<KVW_SLAB_Q4, 4>(a, outer, data, from, to);
    if (is<FORMATS, KVW_SLAB_Q8>(format)) return attend<KVW_SLAB_Q8, 4>(a, outer, data, from, to);
    if (is<FORMATS, KVW_SLAB_FP8>(format)) return attend<KVW_SLAB_FP8, 4>(a, outer, data, from, to);
    attend<KVW_SLAB_F16, RING_TILES>(a, outer, data, from, to);
}

// What a warp does of its CTA's units of one head: its partial rows, left in its buffers. `rows` is where the
// first warp's are, and rotated queries meanwhile.
template <int D, int GROUP, int NT, int FORMATS>
PRIM void attend_units(const Params& p, const Piece& piece, float* rows, Pipe<STAGES>& pipe,
                       uint4* shared_q) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const QueryBlock& columns = piece.columns;
    Head<D, GROUP> head(p.cache, columns.s, columns.h);
    Seen seen(p, piece.len);
    Units<RING_TILES> units{head.packed};
    int begin = units.of(piece.low) + piece.work.unit,
        end = min(begin + piece.work.take() + KVW_FAULT(135), units.end(piece.len));
    bool hooked = p.k_norm || p.softcap > 0.f;
    int inner_from = hooked ? INT32_MAX : seen.from(p.q_len - 1),
        inner_to = seen.to(KVW_FAULT(136) ? p.q_len - 1 : 0);

    QueryRows<NT> queries;
    queries.bf16 = p.dtype == KVW_BF16;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        int x = 8 * n + lane / 4;
        queries.row[n] = x < columns.count ? static_cast<const __half*>(p.q) + columns.at(p, x) * D : nullptr;
    }
    Attend<D, GROUP, NT> a;
    if (p.rotation) {
        rotate<D, NT>(p.rotation, queries, rows);
        pipe.wrote();
        __syncthreads();
        a.begin(RotatedRows<D>{rows}, p.scale, shared_q, warp == 0);
        __syncthreads();
    }
    Walk<D, GROUP, RING_TILES, Kept> walk{head, begin + warp, end, warps, {&piece.low}, {&piece.len}};
    Step ahead[STAGES - 1];
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        ahead[i] = i == 0 ? walk.start() : walk.after(ahead[i - 1]);
        pipe.fetch<D, GROUP, FORMATS, RING_TILES>(ahead[i], i);
    }
    if (!p.rotation) {
        a.begin(queries, p.scale, shared_q, warp == 0);
        if (Queries<D, NT>::SHARED) __syncthreads();
    }

    for (;;) {
        Step step = ahead[0];
        a.use_format(step.slab ? format_of(step.slab) : KVW_SLAB_F16);
        if (!step.slab) break;
        Step last = walk.after(ahead[STAGES - 2]);
#pragma unroll
        for (int i = 0; i < STAGES - 2; i++) ahead[i] = ahead[i + 1];
        ahead[STAGES - 2] = last;
        pipe.fetch<D, GROUP, FORMATS, RING_TILES>(last, STAGES - 1);
        unsigned char* data = pipe.take();
        __syncwarp();
        attend_format<FORMATS>(format_of(step.slab), a, Outer<D, GROUP, NT>{p, a, piece, step.first}, data,
                               inner_from, inner_to);
        if (!KVW_FAULT(101)) __syncwarp(); // before the buffer is filled again
    }
    a.store(reinterpret_cast<float*>(pipe.buffer(0)));
    pipe.wrote();
}

// Writes channels c .. c + 3 of column x.
template <int D> PRIM void write(const Params& p, const QueryBlock& columns, int x, int c, Merged merged) {
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
PRIM void finish(const Params& p, const Piece& piece, const float* rows, int stride) {
    const Work& work = piece.work;
    const QueryBlock& columns = piece.columns;
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
    KVW_SHARED(Piece, kept, 1);
    prim::Carve carve(raw);
    int bytes = step_bytes<RING_TILES>(p.cache), ring = Pipe<STAGES>::size(bytes);
    unsigned char* rings = carve.take<unsigned char, 128>(ring * int(blockDim.x / 32));
    uint4* shared_q = carve.take<uint4>(Queries<D, NT>::SHARED_BYTES / 16);

    Pipe<STAGES> pipe{rings + int(threadIdx.x / 32) * ring, bytes, int(threadIdx.x % 32), 32};
    pipe.init();
    float* rows = reinterpret_cast<float*>(rings + Pipe<STAGES>::HEADER); // the first warp's
    __syncwarp();
    auto units = [&](int at) { return units_of(p, at); };
    Work work = first_work(p.cache.seqs * p.cache.lens_heads, heads_an_entry<COLUMNS>(p), p.least, units);
    while (work.at < work.end) {
        if (threadIdx.x == 0) kept[0] = piece_of<COLUMNS>(p, work);
        __syncthreads();
        attend_units<D, GROUP, NT, FORMATS>(p, kept[0], rows, pipe, shared_q);
        if (!KVW_FAULT(113)) __syncthreads();
        const Piece piece = kept[0];
        finish<D, COLUMNS>(p, piece, rows, ring / 4);
        work = piece.work;
        work.advance(heads_an_entry<COLUMNS>(p), units);
    }
}

// A CTA has 16 columns where there are more than 8; 16 of 256 outputs do not fit a warp's registers.
int column_tiles(const Params& p) { return columns_of(p) > 8 && p.cache.head_dim < 256 ? 2 : 1; }

// Bound on the list of work: a head's slabs, those in the ring counted by their steps.
int64_t most_units(const Params& p) {
    int columns = 8 * column_tiles(p), ring = std::min(p.max_slabs, p.cache.ring_slabs);
    int64_t heads = int64_t(p.cache.seqs) * p.cache.kv_heads * ((columns_of(p) + columns - 1) / columns);
    return heads * (p.max_slabs + int64_t(ring) * (TOKENS / (16 * RING_TILES) - 1));
}

template <int D, int GROUP, int NT, int FORMATS> kvw_status launch(const Params& p, kvw_stream stream) {
    // As many warps, up to four, as fit 96 KB with their rings: every architecture has that much.
    int ring = Pipe<STAGES>::size(step_bytes<RING_TILES>(p.cache)), warps = WARPS;
    while (warps > 1 && warps * ring > 96 * 1024) warps /= 2;
    size_t shared = size_t(ring) * warps + Queries<D, NT>::SHARED_BYTES;
    int64_t grid = std::min<int64_t>(p.ctas, (most_units(p) + p.least - 1) / p.least);
    return KVW_LAUNCH((attn<D, GROUP, NT, FORMATS>), unsigned(grid), warps * 32, shared, stream, p);
}

template <int D, int GROUP, int FORMATS> kvw_status launch_tiles(const Params& p, kvw_stream stream) {
    if constexpr (D < 256) {
        if (column_tiles(p) == 2) return launch<D, GROUP, 2, FORMATS>(p, stream);
    }
    return launch<D, GROUP, 1, FORMATS>(p, stream);
}

template <int D> kvw_status launch_group(const Params& p, kvw_stream stream) {
    return launch_for<D>(
        p.cache, [&](auto group, auto formats) { return launch_tiles<D, group(), formats()>(p, stream); });
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
