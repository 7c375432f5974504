// lowrank_kv: rows of EliteKV's cache written, read and packed, and the newest tokens of each sequence attending to them.
//
// Math      APPEND: row[slot] = (z, k); READ: (z, k) = row[slot]. ATTEND: s[t] = scale * (q . z[t] + q_elite . k[t]),
//           q = B_K q_rest absorbed, of tokens t up to the query's own; out = sum_t w[t] z[t], w = softmax(s): what B_V
//           makes the head's output (arXiv:2503.01586, as in MLA). PACK: 64 tokens of a channel into codes of 4 or 2 bits
// Shapes    z [T, c], k [T, H, 2 r], q and out [S, N, H * G, c], q_elite [S, N, H * G] rows of 2 r, all f16; lse
//           [S, N, H * G] f32; N = q_len. Query head h * G + g reads the elite keys of kv head h, and z as all do
// Layout    slabs of common/latent.cuh, found through a page table
// Bytes     APPEND, READ, PACK: what is read and written. ATTEND: every row once, q, q_elite and out -> kvw_lowrank_kv_bytes()
// Launch    APPEND, READ, PACK: grid (tiles of 16 tokens, S or T), 256 threads. ATTEND: grid (shares, groups of heads), 8 warps;
//           then merge, grid (512 channels, N * H * G, S), 128 threads. Dynamic shared memory for two tiles where the
//           device has it, else for one, and rank is refused where that is too much: at c = 2048, r = 12, H = 32
//           175 KB or 97 KB
// Workspace of each sequence where its parts begin and how many they are, then two blocks of partial rows a CTA
// Order     deterministic: warps, then parts, are added in order
// Oracle    src/lowrank_kv/oracle.rs
//
// Why it looks like this:
// 1. z is keys and values: a tile of 16 tokens is copied into shared memory once and read there twice (ldmatrix, then
//    ldmatrix.trans). All tokens of all its channels must lie there until the softmax is known, which is what limits a
//    step to 16 tokens: 57 KB at c = 1792, two of them on sm_90.
// 2. A warp owns channels, not tokens: c / 8 of them for Q K and for P V. What it needs of a tile it copies for itself;
//    queries and outputs of its channels stay in registers, 64 and 128 of a lane for 16 heads at c = 2048. Only scores
//    cross warps: partial sums of 16 tokens by 8 warps, 8 KB at 16 heads, added in order between two barriers.
// 3. Heads a CTA are what the f32 outputs allow: 32 up to c = 512, 16 up to 2048, 8 beyond. CTAs of the other groups of
//    heads read the same tiles at the same time, from L2: at H = 32 and c = 1792 twice. So nothing needs a cluster,
//    and no second pass over z: with c in chunks over four CTAs and scores summed in distributed shared memory z would
//    cross L2 once, at two cluster barriers a tile; to be measured against this.
// 4. Elite keys are channels too. For a tile of 8 query heads the queries are block diagonal there: column h has its
//    2 r elements where its kv head's lie and zeros elsewhere, so keys of several heads take the mma that one head
//    would. Items, blocks of such channels, are dealt to the warps.
// 5. Heads of N query tokens are as many heads: those of neighbouring tokens share a CTA and with it the tile, and
//    only the end of a sequence is not alike for all. A tile of 8 in which two tokens meet has items of all kv heads.
// 6. Work is cut as in paged_attn (common/streamk.cuh), in slabs; but a partial row is 4 c bytes a head, 131 KB for
//    16 heads at c = 2048, so parts are merged by a launch of its own that all SMs share, not by the last CTA.
// 7. Predicted for H100 at c = 1792, r = 4, H = 32 (4096 bytes a token): a tile comes in 2600 clocks to each of two
//    groups, 16 * 4096 bytes at 12.5 bytes a clock and SM; its 56 HMMA a warp are 370 clocks of the tensor pipe, two
//    warps each. SASS of a tile, of the kernel for c to 2048: 510 instructions on sm_80, 514 on sm_89, 538 on sm_90a,
//    66 of them HMMA (tests/sass.txt), 1080 issue slots of the 2600 for two warps: bound by memory. No run on a GPU yet.
// 8. Codes are spread into f16 once a tile, in place, some 20 instructions a block: 1560 issue slots where 4-bit codes
//    come in 730 clocks and 2-bit ones in 410. So both take 0.6 of the time of f16, and 2 bits save memory alone.
#include "lowrank_kv.h"
#include "common/check.cuh"
#include "common/latent_attend.cuh"
#include "common/latent_pack.cuh"
#include "common/launch.cuh"
#include "common/streamk.cuh"
#include <algorithm>
#include <cmath>

namespace {
using namespace kvw;
using Params = kvw_lowrank_kv_params;

constexpr int THREADS = 32 * LATENT_WARPS, MERGE_THREADS = 128;
constexpr int MOST_CTAS = 4096, MOST_LEAST = 1 << 16, DEFAULT_LEAST = 8, MOST_ROWS = 16;

// ---- rows into slabs, or out of them

// A tile of 16 slots; ONE: one token of a sequence at most.
template <bool ONE, bool READ>
__global__ void __launch_bounds__(THREADS) rows(const __grid_constant__ Params p) {
    const kvw_latent& c = p.cache;
    int s = int(blockIdx.y), from = p.cu_tokens ? p.cu_tokens[s] : s;
    int n = p.cu_tokens ? p.cu_tokens[s + 1] - from : 1, len = c.lens[s], start = len - n;
    int tile = start / TILE_TOKENS + int(blockIdx.x);
    if (n <= 0 || start < 0 || tile * TILE_TOKENS >= len) return;
    uint32_t entry = latent_entry(c, s, tile / SLAB_TILES);
    if (entry == NO_SLAB) return;
    if (!READ && is_packed(entry)) return;
    LatentTile slots = latent_tile(c, entry, tile % SLAB_TILES);
    int columns = latent_columns(c), of_z = c.rank / COLUMN, rounded = (columns + 1) / 2 * 2;
    for (int i = int(threadIdx.x); i < (ONE ? columns : rounded * TILE_TOKENS); i += THREADS) {
        // 32 bytes of a token's row at once, 256 of a column by a warp.
        int column = ONE ? i : i / 32 * 2 + i % 2, token = ONE ? start % TILE_TOKENS : i / 2 % TILE_TOKENS;
        int slot = tile * TILE_TOKENS + token - KVW_FAULT(427);
        bool ours = (slot >= start || KVW_FAULT(430)) && slot < len;
        if (column >= columns || !ours) continue;
        int64_t row = from + (slot - start);
        __half* x = column < of_z ? static_cast<__half*>(p.z) + row * p.z_stride + column * COLUMN
                                  : static_cast<__half*>(p.k) + row * p.k_stride + (column - of_z) * COLUMN;
        unsigned char* held = slots.at + column * COLUMN_BYTES + token * 16;
        if (READ)
            prim::stg128(x, is_packed(entry) ? unpacked(c, slots, column, token) : prim::ldg128_stream(held));
        else
            prim::stg128(held, prim::ldg128_stream(x));
    }
}

// ---- attention

// Slabs of a sequence; one where there are none, so that somebody writes the zeros.
PRIM int units_of(const Params& p, int s) {
    return max(1, (p.cache.lens[s] + KVW_SLAB_TOKENS - 1) / KVW_SLAB_TOKENS);
}

// One CTA's part of a sequence.
template <int NT, int BLOCKS>
PRIM void attend_piece(const Params& p, const Work& work, int head, LatentRing& ring,
                       const Shared<NT>& shared, Attention<NT, BLOCKS>& a) {
    int s = work.head, warp = int(threadIdx.x) / 32, end = work.unit + work.take() + KVW_FAULT(422);
    const int len = p.cache.lens[s];
    TileWalk walk(p.cache, s, work.unit * KVW_SLAB_TOKENS, min(end * KVW_SLAB_TOKENS, len));
    const bool two = ring.stages == 2;
    int first = -1, ahead = -1; // tokens of the tile at hand, of the one after it
#pragma unroll 1
    for (int i = 0; i < ring.stages; i++) {
        first = ahead;
        LatentTile tile = walk.next(ahead);
        ring.fetch(tile, ahead % 2 == 1, i);
    }
    elite_words(p, s, head, shared);
    a.begin(p, s, head, ring);
    __syncthreads();
    const float unit = p.scale * LOG2_E;
    float* part = shared.parts + warp * Shared<NT>::HEADS * PITCH;
    for (;;) {
        if (!two) first = ahead;
        if (first < 0) break;
        unsigned char* buffer = ring.take();
        __syncwarp();
        if (first % 2) ring.spread(buffer);
        int live = len - first / TILE_TOKENS * TILE_TOKENS + KVW_FAULT(413);
        if (live < TILE_TOKENS && !KVW_FAULT(416)) ring.clear_past(buffer, live);
        a.scores(ring, buffer, part);
        if (!KVW_FAULT(411)) __syncthreads();
        add_parts(p, head, shared, unit, live);
        if (!KVW_FAULT(412)) __syncthreads();
        uint32_t b[NT][2];
        a.softmax(shared.scores, b);
        a.values(ring, buffer, b);
        if (!KVW_FAULT(418)) __syncwarp(); // before the buffer is filled again
        first = ahead;
        LatentTile tile = walk.next(ahead);
        ring.fetch(tile, ahead % 2 == 1, two);
    }
    a.total();
}

// What a launch is made of.
struct Plan {
    Params p;
    int heads, groups, shares; // heads a CTA; the grid
    int items;                 // of a CTA, at most
    int stages, buffer;        // of a warp's ring; bytes
};

struct Parts {
    int first_cta, count; // count 0: the sequence lay in one share
};

// Partial rows lie behind the parts of all sequences.
__host__ __device__ inline size_t parts_bytes(const Params& p) {
    return (size_t(p.cache.seqs) * 8 + 15) / 16 * 16;
}

// Partial rows of a group of heads in share `cta`; `begins`: of the sequence that begins there and goes on.
PRIM float* block_of(const Plan& plan, int group, int cta, bool begins) {
    unsigned char* blocks = static_cast<unsigned char*>(plan.p.workspace) + parts_bytes(plan.p);
    size_t block = (size_t(group) * plan.shares + cta) * 2 + (begins && !KVW_FAULT(423));
    return reinterpret_cast<float*>(blocks) + block * plan.heads * (plan.p.cache.rank + ROW_EXTRA);
}

// What a warp needs again when it is through with a sequence: registers are for what every tile needs.
struct Kept {
    Work work;
    int first;
};
constexpr size_t STATIC_BYTES = 512; // of attend's shared memory, at most
static_assert(LATENT_WARPS * sizeof(Kept) + sizeof(int) <= STATIC_BYTES);

template <int NT, int BLOCKS>
__global__ void __launch_bounds__(THREADS, NT* BLOCKS <= 8 ? 2 : 1)
    attend(const __grid_constant__ Plan plan) {
    KVW_DYN_SHARED(unsigned char, raw);
    const Params& p = plan.p;
    KVW_SHARED(Kept, kept, LATENT_WARPS);
    KVW_SHARED(int, count, 1);
    constexpr int HEADS = 8 * NT;
    prim::Carve carve(raw);
    int ring_bytes = LatentRing::HEADER + plan.stages * plan.buffer;
    Shared<NT> shared;
    shared.rings = carve.take<unsigned char, 128>(ring_bytes * LATENT_WARPS);
    shared.parts = carve.take<float>(LATENT_WARPS * HEADS * PITCH);
    shared.scores = carve.take<float>(HEADS * PITCH);
    shared.items = carve.take<Item>(plan.items);
    shared.count = count;

    int warp = int(threadIdx.x) / 32, head = int(blockIdx.y) * HEADS, blocks = p.cache.rank / BLOCK_CHANNELS;
    int items = count_items(p, head, NT);
    for (int n = int(threadIdx.x); n < items; n += THREADS) shared.items[n].packed = item_at(p, head, n);
    if (threadIdx.x == 0) *shared.count = items;
    __syncthreads();
    int first = blocks * warp / LATENT_WARPS, end = blocks * (warp + 1) / LATENT_WARPS;
    LatentRing ring{shared.rings + warp * ring_bytes,
                    plan.buffer,
                    plan.stages,
                    first,
                    end - first,
                    shared.items + warp,
                    (items - warp + LATENT_WARPS - 1) / LATENT_WARPS,
                    latent_bits(p.cache.format)};
    ring.init();
    auto units = [&](int s) { return units_of(p, s); };
    Work work = first_work(p.cache.seqs, 1, p.least, units);
    while (work.at < work.end) {
        Attention<NT, BLOCKS> a;
        if (threadIdx.x % 32 == 0) kept[warp] = {work, ring.first};
        attend_piece(p, work, head, ring, shared, a);
        work = kept[warp].work, ring.first = kept[warp].first;
        __syncwarp(); // before lane 0 writes there again
        bool whole = work.take() == work.units;
        if (whole)
            a.write(p, work.head, head, ring);
        else
            a.store(p, ring, block_of(plan, int(blockIdx.y), int(blockIdx.x), work.unit == 0));
        if (work.unit == 0 && blockIdx.y == 0 && threadIdx.x == 0)
            static_cast<Parts*>(p.workspace)[work.head] = {
                work.first_cta(), whole ? 0 : work.last_cta() - work.first_cta() + 1};
        work.advance(1, units);
    }
}

// Four channels of a head a thread: the parts of its sequence, in order.
__global__ void __launch_bounds__(MERGE_THREADS) merge(const __grid_constant__ Plan plan) {
    const Params& p = plan.p;
    int s = int(blockIdx.z), h = int(blockIdx.y), c = 4 * int(blockIdx.x * MERGE_THREADS + threadIdx.x);
    Parts parts = static_cast<const Parts*>(p.workspace)[s];
    if (parts.count == 0 || c >= p.cache.rank) return;
    auto row = [&](int k) -> const float* {
        return block_of(plan, h / plan.heads, parts.first_cta + k, k == 0) +
               h % plan.heads * (p.cache.rank + ROW_EXTRA);
    };
    Merged sum = merge_rows<0>(row, parts.count - KVW_FAULT(421), ROW_EXTRA + c);
    size_t at = size_t(s) * query_rows(p) + h;
    put4(static_cast<__half*>(p.out) + at * p.cache.rank + c, false, normalised(sum));
    if (p.lse && c == 0) p.lse[at] = log_sum_exp(sum);
}

// Heads a CTA: what the outputs allow, and no more than there are.
int heads_of(const Params& p) {
    int most = p.cache.rank <= 512 ? 32 : p.cache.rank <= 2048 ? 16 : 8;
    return query_rows(p) <= 16 ? std::min(most, 16) : most;
}

Plan plan_of(const Params& p) {
    Plan plan{p, heads_of(p), 0, 0, 0, 2, 0};
    int ctas = p.ctas ? p.ctas : plan.heads * p.cache.rank <= 8192 ? 264 : 132; // two CTAs an SM, or one
    if (p.least == 0) plan.p.least = DEFAULT_LEAST;
    plan.groups = (query_rows(p) + plan.heads - 1) / plan.heads;
    int64_t units = int64_t(p.cache.seqs) * p.max_slabs;
    plan.shares =
        int(std::min<int64_t>(std::max(1, ctas / plan.groups), (units + plan.p.least - 1) / plan.p.least));
    for (int head = 0; head < query_rows(p); head += plan.heads)
        plan.items = std::max(plan.items, count_items(p, head, plan.heads / 8));
    int blocks = (p.cache.rank / BLOCK_CHANNELS + LATENT_WARPS - 1) / LATENT_WARPS;
    int most = blocks + (plan.items + LATENT_WARPS - 1) / LATENT_WARPS;
    plan.buffer = most * (BLOCK_BYTES + (p.cache.format == KVW_SLAB_F16 ? 0 : 2 * COLUMN_META));
    return plan;
}

size_t shared_bytes(const Plan& plan) {
    size_t ring = size_t(LatentRing::HEADER) + plan.stages * plan.buffer;
    return ring * LATENT_WARPS + (LATENT_WARPS + 1) * plan.heads * PITCH * 4 + plan.items * sizeof(Item) + 16;
}

// One buffer a warp where the device has no room for two.
kvw_status fit(Plan& plan) {
    int device = 0, most = 0;
    KVW_TRY(status_of(cudaGetDevice(&device)));
    KVW_TRY(status_of(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
    const size_t room = size_t(most) - STATIC_BYTES;
    if (shared_bytes(plan) > room) plan.stages = 1;
    KVW_REQUIRE(shared_bytes(plan) <= room, SHAPE, rank);
    return KVW_OK;
}

kvw_status launch_pack(const Params& p, kvw_stream stream) {
    dim3 grid(unsigned((latent_columns(p.cache) * SLAB_TILES + THREADS - 1) / THREADS), unsigned(p.tokens));
    if (p.cache.format == KVW_SLAB_Q4) return KVW_LAUNCH(pack_latents<4>, grid, THREADS, 0, stream, p);
    return KVW_LAUNCH(pack_latents<2>, grid, THREADS, 0, stream, p);
}

template <int NT, int BLOCKS> kvw_status launch_attend(Plan plan, kvw_stream stream) {
    KVW_TRY(fit(plan));
    const kvw_latent& c = plan.p.cache;
    dim3 grid(unsigned(plan.shares), unsigned(plan.groups));
    KVW_TRY(KVW_LAUNCH((attend<NT, BLOCKS>), grid, THREADS, shared_bytes(plan), stream, plan));
    if (plan.shares == 1) return KVW_OK;
    dim3 outputs(unsigned((c.rank / 4 + MERGE_THREADS - 1) / MERGE_THREADS), unsigned(query_rows(plan.p)),
                 unsigned(c.seqs));
    return KVW_LAUNCH(merge, outputs, MERGE_THREADS, 0, stream, plan);
}

kvw_status launch_attend(const Plan& plan, kvw_stream stream) {
    int rank = plan.p.cache.rank;
    if (plan.heads == 32)
        return rank <= 256 ? launch_attend<4, 2>(plan, stream) : launch_attend<4, 4>(plan, stream);
    if (plan.heads == 8) return launch_attend<1, 19>(plan, stream);
    if (rank <= 256) return launch_attend<2, 2>(plan, stream);
    if (rank <= 512) return launch_attend<2, 4>(plan, stream);
    return rank <= 1024 ? launch_attend<2, 8>(plan, stream) : launch_attend<2, 16>(plan, stream);
}

template <bool READ> kvw_status launch_rows(const Params& p, kvw_stream stream) {
    dim3 one(1, unsigned(p.cache.seqs));
    if (p.max_tokens == 1) return KVW_LAUNCH((rows<true, READ>), one, THREADS, 0, stream, p);
    // A run of max_tokens slots touches one aligned tile more than it fills.
    dim3 tiles(unsigned((p.max_tokens + TILE_TOKENS - 2) / TILE_TOKENS + 1), unsigned(p.cache.seqs));
    return KVW_LAUNCH((rows<false, READ>), tiles, THREADS, 0, stream, p);
}

kvw_status check_rows(const Params& p) {
    const kvw_latent& c = p.cache;
    KVW_REQUIRED(p, z);
    KVW_REQUIRED(p, k);
    KVW_OPTIONAL(p, cu_tokens);
    KVW_REQUIRE(p.tokens >= 1 && (p.cu_tokens || p.tokens == c.seqs), SHAPE, tokens);
    KVW_REQUIRE(p.max_tokens >= 1 && p.max_tokens <= p.tokens, SHAPE, max_tokens);
    KVW_REQUIRE(p.cu_tokens || p.max_tokens == 1, SHAPE, max_tokens);
    KVW_REQUIRE(p.z_stride >= c.rank && p.z_stride % 8 == 0, SHAPE, z_stride);
    KVW_REQUIRE(p.k_stride >= latent_width(c) - c.rank && p.k_stride % 8 == 0, SHAPE, k_stride);
    return KVW_OK;
}

kvw_status check_pack(const Params& p) {
    KVW_REQUIRED(p, moves);
    KVW_REQUIRE(p.cache.format != KVW_SLAB_F16, FORMAT, format);
    KVW_REQUIRE(p.tokens >= 1 && p.tokens <= GRID_YZ_MAX, SHAPE, tokens);
    KVW_REQUIRE(p.range > 0.f && p.range <= 1.f, SHAPE, range);
    return KVW_OK;
}

kvw_status check_attend_numbers(const Params& p) {
    const kvw_latent& c = p.cache;
    KVW_REQUIRE(p.q_heads >= 1 && p.q_heads <= 1024 && p.q_heads % c.kv_heads == 0, SHAPE, q_heads);
    KVW_REQUIRE(p.head_stride >= 2 * c.pairs && p.head_stride % 2 == 0, SHAPE, head_stride);
    int64_t row = int64_t(p.q_heads - 1) * p.head_stride + 2 * c.pairs;
    KVW_REQUIRE(p.q_elite_stride >= row && p.q_elite_stride % 2 == 0, SHAPE, q_elite_stride);
    KVW_REQUIRE(p.max_slabs >= 1 && int64_t(p.max_slabs) * c.seqs <= INT32_MAX, SHAPE, max_slabs);
    KVW_REQUIRE(p.ctas >= 0 && p.ctas <= MOST_CTAS, SHAPE, ctas);
    KVW_REQUIRE(p.least >= 0 && p.least <= MOST_LEAST, SHAPE, least);
    KVW_REQUIRE(std::isfinite(p.scale) && p.scale > 0.f, SHAPE, scale);
    KVW_REQUIRE(p.q_len >= 1 && p.q_len <= MOST_ROWS, SHAPE, q_len);
    return KVW_OK;
}
} // namespace

size_t kvw_latent_slab_bytes(int32_t format, int32_t rank, int32_t pairs, int32_t kv_heads) {
    kvw_latent c{};
    c.rank = rank, c.pairs = pairs, c.kv_heads = kv_heads, c.format = format;
    return check_latent_shape(c) == KVW_OK ? latent_slab_bytes(c, format) : 0;
}

kvw_status kvw_lowrank_kv_check(const kvw_lowrank_kv_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRE(p->op >= KVW_LOWRANK_APPEND && p->op <= KVW_LOWRANK_PACK, SHAPE, op);
    KVW_TRY(check_latent(p->cache));
    if (p->op == KVW_LOWRANK_PACK) return check_pack(*p);
    if (p->op != KVW_LOWRANK_ATTEND) return check_rows(*p);
    KVW_TRY(check_attend_numbers(*p));
    KVW_REQUIRED(*p, q);
    KVW_REQUIRED(*p, q_elite);
    KVW_REQUIRED(*p, out);
    KVW_OPTIONAL(*p, lse);
    KVW_REQUIRED(*p, workspace);
    KVW_REQUIRE(p->workspace_bytes >= kvw_lowrank_kv_workspace(p), WORKSPACE, workspace_bytes);
    return KVW_OK;
}

size_t kvw_lowrank_kv_workspace(const kvw_lowrank_kv_params* p) {
    if (!p || p->struct_size != sizeof *p || p->op != KVW_LOWRANK_ATTEND ||
        check_latent_numbers(p->cache) != KVW_OK || check_attend_numbers(*p) != KVW_OK)
        return 0;
    Plan plan = plan_of(*p);
    size_t rows = size_t(plan.groups) * plan.shares * 2 * plan.heads;
    return parts_bytes(*p) + rows * (p->cache.rank + ROW_EXTRA) * 4;
}

size_t kvw_lowrank_kv_bytes(const kvw_lowrank_kv_params* p) {
    if (kvw_lowrank_kv_check(p) != KVW_OK) return 0;
    const kvw_latent& c = p->cache;
    size_t row = 2 * size_t(latent_width(c)), seqs = size_t(c.seqs);
    if (p->op == KVW_LOWRANK_PACK)
        return p->tokens * (latent_slab_bytes(c, KVW_SLAB_F16) + latent_slab_bytes(c, c.format) + 8);
    if (p->op != KVW_LOWRANK_ATTEND) return p->tokens * 2 * row;
    size_t queries = seqs * query_rows(*p);
    return seqs * p->max_slabs * KVW_SLAB_TOKENS * row + queries * 4 * size_t(c.rank + c.pairs);
}

kvw_status kvw_lowrank_kv(const kvw_lowrank_kv_params* p, kvw_stream stream) {
    KVW_TRY(kvw_lowrank_kv_check(p));
    if (p->op == KVW_LOWRANK_APPEND) return launch_rows<false>(*p, stream);
    if (p->op == KVW_LOWRANK_READ) return launch_rows<true>(*p, stream);
    if (p->op == KVW_LOWRANK_PACK) return launch_pack(*p, stream);
    return launch_attend(plan_of(*p), stream);
}
