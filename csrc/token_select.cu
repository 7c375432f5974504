// token_select: which tokens stay: scores pooled over neighbours and summed over heads, the k best by exact radix
// selection, and rows gathered by the indices of those.
//
// Math      POOL: out[r, i] = sum_g of the mean, or the largest, of scores[r, g, i - width / 2 .. i + width / 2]
//           TOP_K: the k first of a segment's scores by (score descending, row, index ascending), NaN last; ABOVE: those
//           that rank before the k-th score, whatever their number. Both as ascending indices of each row
//           GATHER: out[r, i] = x[first[r] + indices[r, i]], and the same of positions
// Shapes    scores [rows, group or 1, n] f32; indices [rows, index_stride]; k, kth [rows / segment]; counts [rows]
// Bytes     every array once                                                      -> kvw_token_select_bytes()
// Launch    POOL: 1,024 columns a CTA; GATHER: a row a CTA; a selection: one CTA of 1,024 threads for a segment of up to
//           65,536 scores, else 264 CTAs that share all segments; one launch
// Workspace of large segments: a ticket; by segment four counters and three histograms; 8 bytes for 8,192 scores
// Order     deterministic: counts are integers; means are summed from the left, then over the group
// Oracle    src/token_select/oracle.rs
//
// Why it looks like this:
// 1. A score's rank key has 32 bits: three histograms of 11, 11 and 10 of them find the k-th best exactly. Its ties go to
//    the first ones: a count of better and of equal scores a warp, running sums, and ballots give every index its place,
//    so indices come out ascending and nothing is sorted. A pass reads the scores again, from L2.
// 2. Weights of one head share a few exponents, and scores of padding are all alike: a thread counts a run of equal bins
//    before it adds it. Of eleven bits eight are the exponent.
// 3. A large segment (KVzip, arXiv:2505.23416: all heads of all layers) is cut into slices of 8,192. Every CTA draws
//    tickets: first all slices for histogram 0, then all for 1, .. for counts, for indices. A ticket waits for the stage
//    before it, which lower tickets work on, each drawn by a CTA that runs: no CTA waits for one that has not started, so
//    no cooperative launch is needed. The last to finish clears what the next call wants clear.
// 4. Predicted for 32,768 scores a row, one CTA a row: a pass reads 128 KB at 64 bytes a clock, 1.2 us, and counts 1,024
//    times 32 into banks that collide 4 to 8 times, 4 us; three of those, counts and indices, ten barriers: 20 us a
//    layer whatever the number of heads. 31.7 million scores (32 layers, 8 heads, 124k): five passes of 127 MB, 210 us.
//    POOL of 32 heads: 4.2 MB in, 1 MB out, 3 us. GATHER of 6,500 rows of 8 KB: 36 us. No run on a GPU yet.
#include "token_select.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "select_keys.cuh"

namespace {
using namespace kvw;
using Params = kvw_token_select_params;

constexpr int THREADS = SELECT_THREADS, WARPS = SELECT_WARPS;
constexpr int SLICE = 8192, ALONE = 65536, CTAS = 264;
constexpr int POOL_THREADS = 256, POOL_COLUMNS = 1024, WIDEST = 255;
constexpr int GATHER_THREADS = 128;

// A segment a CTA.
__global__ void __launch_bounds__(THREADS, 1) select_alone(const __grid_constant__ Params p) {
    KVW_SHARED(Shared, whole, 1);
    Shared& shared = whole[0];
    int segment = blockIdx.x, first = segment * p.segment;
    Selection selection(p.k[segment]);
#pragma unroll 1
    for (int digit = 0; digit < DIGITS && !selection.all; digit++) {
        Selection::clear(shared);
        for (int row = first; row < first + p.segment; row++) selection.count(row_of(p, row), shared);
        selection.take(shared);
    }
    Cut cut = selection.cut(p.op);
    put_kth(p, segment, cut);
    uint32_t equal = 0;
    for (int row = first; row < first + p.segment; row++) {
        uint32_t kept = 0;
        if (KVW_FAULT(395)) equal = 0;
        write(p, row, row_of(p, row), cut, shared, equal, kept);
        if (threadIdx.x == 0) p.counts[row] = int(kept);
    }
}

// Where segments that several CTAs share keep what they know: zero between calls, but for `slices`.
struct Board {
    uint32_t* ticket;
    uint32_t* done;   // [segments][STAGES] slices that are through with a stage
    uint32_t* counts; // [segments][DIGITS][BINS]
    uint2* slices;    // [slices] better and equal keys

    static constexpr int STAGES = DIGITS + 2, TICKET_WORDS = 4, WORDS = 8 + DIGITS * BINS;

    __host__ __device__ static int per_row(const Params& p) { return (p.n + SLICE - 1) / SLICE; }
    __host__ __device__ static size_t bytes(const Params& p) {
        return (TICKET_WORDS + size_t(p.rows / p.segment) * WORDS) * 4 + size_t(p.rows) * per_row(p) * 8;
    }

    PRIM explicit Board(const Params& p) : ticket(static_cast<uint32_t*>(p.workspace)) {
        done = ticket + TICKET_WORDS;
        counts = done + size_t(p.rows / p.segment) * 8;
        slices = reinterpret_cast<uint2*>(counts + size_t(p.rows / p.segment) * (DIGITS * BINS));
    }

    PRIM uint32_t* stage(int segment, int stage) const { return done + segment * 8 + stage; }

    // Says that a slice is through with a stage; whether it is the last of `slices_`.
    PRIM bool finish(int segment, int at, int slices_) const {
        bool last = false;
        __syncthreads();
        if (threadIdx.x == 0) {
            if (!KVW_FAULT(396)) __threadfence();
            last = atomicAdd(stage(segment, at), 1u) == unsigned(slices_ - 1);
            __threadfence();
        }
        return __syncthreads_or(last);
    }

    // Until all are; what they wrote is seen then.
    PRIM void wait(int segment, int at, int slices_) const {
        if (threadIdx.x == 0) {
            while (prim::ld_acquire(stage(segment, at)) != unsigned(slices_)) {
            }
        }
        __syncthreads();
    }
};

// One slice of a segment at one stage.
struct Share {
    const Params& p;
    const Board& board;
    Shared& shared;
    int slice, row, segment, per_row, per_segment; // slices

    PRIM Slice mine() const {
        Slice whole = row_of(p, row);
        int begin = slice % per_row * SLICE;
        return {whole.scores, begin, min(begin + SLICE, whole.end)};
    }

    PRIM uint32_t* counts(int digit) const {
        return board.counts + (size_t(segment) * DIGITS + digit) * BINS;
    }

    // The selection as far as the first `digits` histograms say.
    PRIM Selection known(int digits) const {
        Selection selection(p.k[segment]);
        for (int digit = 0; digit < digits && !selection.all; digit++) {
            __syncthreads(); // counts of before have been read
            for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.counts[bin] = counts(digit)[bin];
            selection.take(shared);
        }
        return selection;
    }

    PRIM void count(int digit) const {
        Selection selection = known(digit);
        selection.digit = digit;
        __syncthreads();
        Selection::clear(shared);
        selection.count(mine(), shared);
        __syncthreads();
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
            if (shared.counts[bin]) atomicAdd(counts(digit) + bin, shared.counts[bin]);
        }
    }

    // Sum over the CTA of f(i) for from <= i < to.
    template <class F> PRIM uint32_t sum(int from, int to, F f) const {
        uint32_t own = 0, all;
        for (int i = from + threadIdx.x; i < to; i += THREADS) own += f(i);
        running_sum<WARPS>(own, shared.warps, all);
        return all;
    }

    PRIM void count_all() const {
        Cut cut = known(DIGITS).cut(p.op);
        uint2 n = count_kept(mine(), cut);
        bool one = threadIdx.x % 32 == 0;
        uint32_t better, equal;
        running_sum<WARPS>(one ? n.x : 0u, shared.warps, better);
        running_sum<WARPS>(one ? n.y : 0u, shared.warps, equal);
        if (threadIdx.x == 0) board.slices[slice] = make_uint2(better, equal);
    }

    PRIM void write_all() const {
        Cut cut = known(DIGITS).cut(p.op);
        if (slice == segment * per_segment) put_kth(p, segment, cut);
        auto better = [&](int i) { return board.slices[i].x; };
        auto equal = [&](int i) { return board.slices[i].y; };
        int of_row = row * per_row;
        uint32_t before = KVW_FAULT(398) ? 0 : sum(segment * per_segment, of_row, equal);
        uint32_t in_row = sum(of_row, slice, equal);
        uint32_t kept = sum(of_row, slice, better) + kept_ties(cut, before, in_row);
        before += in_row;
        write(p, row, mine(), cut, shared, before, kept);
        if (threadIdx.x == 0 && (slice + 1) % per_row == 0) p.counts[row] = int(kept);
    }

    PRIM void run(int at) const {
        if (at > 0) board.wait(segment, at - 1, per_segment);
        if (at < DIGITS)
            count(at);
        else if (at == DIGITS)
            count_all();
        else
            write_all();
        if (!board.finish(segment, at, per_segment) || at + 1 < Board::STAGES || KVW_FAULT(399)) return;
        for (int i = threadIdx.x; i < DIGITS * BINS; i += THREADS) counts(0)[i] = 0;
        if (threadIdx.x < Board::STAGES) *board.stage(segment, threadIdx.x) = 0;
    }
};

// Segments that several CTAs share.
__global__ void __launch_bounds__(THREADS, 1) select_together(const __grid_constant__ Params p) {
    KVW_SHARED(Shared, whole, 1);
    KVW_SHARED(unsigned, drawn, 1);
    const Board board(p);
    const int per_row = Board::per_row(p), slices = p.rows * per_row, tickets = slices * Board::STAGES;
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned ticket = drawn[0] = atomicAdd(board.ticket, 1u);
            if (ticket == unsigned(tickets) + gridDim.x - 1)
                atomicExch(board.ticket, 0u); // the last draw of all
        }
        __syncthreads();
        if (drawn[0] >= unsigned(tickets)) return;
        int slice = int(drawn[0]) % slices, row = slice / per_row;
        Share share{p, board, whole[0], slice, row, row / p.segment, per_row, per_row * p.segment};
        share.run(int(drawn[0]) / slices);
    }
}

__global__ void __launch_bounds__(POOL_THREADS) pool(const __grid_constant__ Params p) {
    KVW_DYN_SHARED(float, window);
    int row = blockIdx.y, reach = p.width / 2, first = int(blockIdx.x) * POOL_COLUMNS;
    int len = p.lens ? min(max(p.lens[row], 0), p.n) : p.n;
    bool means = p.pool == KVW_POOL_AVG;
    constexpr int EACH = POOL_COLUMNS / POOL_THREADS;
    float sum[EACH] = {};
    for (int g = 0; g < p.group; g++) {
        const float* scores = p.scores + (size_t(row) * p.group + g) * p.n;
        if (!KVW_FAULT(400)) __syncthreads();
        for (int i = threadIdx.x; i < POOL_COLUMNS + 2 * reach; i += POOL_THREADS) {
            int at = first + i - reach;
            bool inside = at >= 0 && at < len;
            window[i] = inside ? scores[at] : means ? 0.f : __uint_as_float(0x7FC00000u);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const float* at = window + threadIdx.x + j * POOL_THREADS;
            float x = at[0];
            for (int i = 1; i < p.width; i++) x = means ? __fadd_rn(x, at[i]) : fmaxf(x, at[i]);
            sum[j] =
                __fadd_rn(sum[j], means ? __fdiv_rn(x, float(KVW_FAULT(401) ? p.width - 1 : p.width)) : x);
        }
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        int at = first + threadIdx.x + j * POOL_THREADS;
        if (at < len) static_cast<float*>(p.out)[size_t(row) * p.n + at] = sum[j];
    }
}

__global__ void __launch_bounds__(GATHER_THREADS) gather(const __grid_constant__ Params p) {
    int row = blockIdx.y, i = blockIdx.x;
    if (p.counts && i >= p.counts[row] && !KVW_FAULT(402)) return;
    size_t to = size_t(row) * p.index_stride + i;
    size_t from = size_t((p.first && !KVW_FAULT(403) ? p.first[row] : 0) + p.indices[to]);
    if (p.positions && threadIdx.x == 0) p.out_positions[to] = p.positions[from];
    if (!p.x) return;
    const uint4* source = static_cast<const uint4*>(p.x) + from * (p.row_bytes / 16);
    uint4* out = static_cast<uint4*>(p.out) + to * (p.row_bytes / 16);
#pragma unroll 4
    for (int at = threadIdx.x; at < p.row_bytes / 16; at += GATHER_THREADS)
        prim::stg128(out + at, prim::ldg128_stream(source + at));
}

bool shared_by_ctas(const Params& p) { return int64_t(p.segment) * p.n > ALONE; }

kvw_status check_selection(const Params& p) {
    KVW_REQUIRED(p, scores);
    KVW_REQUIRED(p, k);
    KVW_REQUIRED(p, indices);
    KVW_REQUIRED(p, counts);
    KVW_OPTIONAL(p, kth);
    KVW_OPTIONAL(p, lens);
    KVW_REQUIRE(p.segment >= 1 && p.rows % p.segment == 0, SHAPE, segment);
    KVW_REQUIRE(p.index_stride >= 1, SHAPE, index_stride);
    KVW_REQUIRE(int64_t(p.segment) * p.n <= INT32_MAX / 8, SHAPE, n); // counts and tickets
    if (!shared_by_ctas(p)) return KVW_OK;
    KVW_REQUIRE(int64_t(p.rows) * Board::per_row(p) <= INT32_MAX / 8, SHAPE, n);
    KVW_REQUIRED(p, workspace);
    KVW_REQUIRE(p.workspace_bytes >= Board::bytes(p), WORKSPACE, workspace_bytes);
    return KVW_OK;
}

kvw_status check_gather(const Params& p) {
    KVW_REQUIRED(p, indices);
    KVW_OPTIONAL(p, counts);
    KVW_OPTIONAL(p, first);
    KVW_REQUIRE(p.x || p.positions, NULL, x);
    KVW_OPTIONAL(p, x);
    KVW_OPTIONAL(p, positions);
    KVW_REQUIRE(!p.x || p.out, NULL, out);
    KVW_OPTIONAL(p, out);
    KVW_REQUIRE(!p.positions || p.out_positions, NULL, out_positions);
    KVW_OPTIONAL(p, out_positions);
    KVW_REQUIRE(!p.x || (p.row_bytes >= 16 && p.row_bytes % 16 == 0), SHAPE, row_bytes);
    KVW_REQUIRE(p.index_stride >= 1, SHAPE, index_stride);
    return KVW_OK;
}
} // namespace

kvw_status kvw_token_select_check(const Params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRE(p->op >= KVW_SELECT_POOL && p->op <= KVW_SELECT_GATHER, SHAPE, op);
    KVW_REQUIRE(p->rows >= 1 && p->rows <= GRID_YZ_MAX, SHAPE, rows);
    if (p->op == KVW_SELECT_GATHER) return check_gather(*p);
    KVW_REQUIRE(p->n >= 1 && p->n <= INT32_MAX / 2, SHAPE, n);
    if (p->op != KVW_SELECT_POOL) return check_selection(*p);
    KVW_REQUIRED(*p, scores);
    KVW_REQUIRED(*p, out);
    KVW_OPTIONAL(*p, lens);
    KVW_REQUIRE(p->group >= 1, SHAPE, group);
    KVW_REQUIRE(p->width % 2 == 1 && p->width >= 1 && p->width <= WIDEST, SHAPE, width);
    KVW_REQUIRE(p->pool == KVW_POOL_AVG || p->pool == KVW_POOL_MAX, SHAPE, pool);
    return KVW_OK;
}

size_t kvw_token_select_workspace(const Params* p) {
    if (!p || (p->op != KVW_SELECT_TOP_K && p->op != KVW_SELECT_ABOVE)) return 0;
    return p->segment >= 1 && p->rows >= 1 && p->n >= 1 && shared_by_ctas(*p) ? Board::bytes(*p) : 0;
}

size_t kvw_token_select_bytes(const Params* p) {
    if (kvw_token_select_check(p) != KVW_OK) return 0;
    size_t rows = size_t(p->rows), scores = rows * p->n * 4, indices = rows * p->index_stride;
    if (p->op == KVW_SELECT_POOL) return scores * (size_t(p->group) + 1);
    if (p->op == KVW_SELECT_GATHER)
        return indices * (4 + (p->x ? 2 * size_t(p->row_bytes) : 0) + (p->positions ? 8 : 0));
    return scores + indices * 4 + rows * 4;
}

kvw_status kvw_token_select(const Params* p, kvw_stream stream) {
    KVW_TRY(kvw_token_select_check(p));
    if (p->op == KVW_SELECT_GATHER)
        return KVW_LAUNCH(gather, dim3(unsigned(p->index_stride), p->rows), GATHER_THREADS, 0, stream, *p);
    if (p->op == KVW_SELECT_POOL) {
        dim3 grid(unsigned((p->n + POOL_COLUMNS - 1) / POOL_COLUMNS), p->rows);
        size_t shared = (POOL_COLUMNS + size_t(p->width) - 1) * 4;
        return KVW_LAUNCH(pool, grid, POOL_THREADS, shared, stream, *p);
    }
    if (!shared_by_ctas(*p))
        return KVW_LAUNCH(select_alone, dim3(unsigned(p->rows / p->segment)), THREADS, 0, stream, *p);
    int64_t slices = int64_t(p->rows) * Board::per_row(*p);
    return KVW_LAUNCH(select_together, dim3(unsigned(std::min<int64_t>(slices, CTAS))), THREADS, 0, stream,
                      *p);
}
