// head_linear: y = W_h x for the query heads of each kv head h: what makes latent queries of EliteKV's queries, and heads
// of its latent outputs.
//
// Math      y[t, h G + g, i] = b[h, i] + sum_j W[h, i, j] x[t, h G + g, j], products exact, sums f32; beyond the range of f16
//           +-65504. Absorbed: W = B_K of the head [c, D - 2 r] makes q of lowrank_kv; expanded: W = B_V [D, c] makes
//           what W_o takes (arXiv:2503.01586)
// Shapes    weight [H, rows, cols] f16, bias [H, rows] f32 or none, x [T, H * G, cols] f16 with strides, y [T, H * G, rows] f16
// Layout    W is the M = 16 operand of mma.m16n8k16, the T G rows of x that meet it are the N = 8 one
// Bytes     W once, x, y -> kvw_head_linear_bytes()
// Launch    grid (row tiles, H, T G / 16), 256 threads. cols <= 256: a warp takes 16 rows; else eight warps share
//           the columns of 16 rows, 8 KB of shared memory
// Workspace none
// Order     deterministic: mma, then warps in order; a row of y does not depend on what else is in the batch
// Oracle    src/head_linear.rs::oracle
//
// Why it looks like this:
// 1. One launch for all heads: at H = 32, c = 1792, D = 128 each W_h is 430 KB, 2 us of linear, and there are 32.
// 2. Bound by reading W, 14 MB there, 5 us at 3 TB/s: 16-byte loads, eight in flight a lane, columns in the order in
//    which linear takes them, so neither ldmatrix nor shared memory is needed. Not measured.
// 3. cols must be a multiple of 8, and x 16-byte aligned. Where 2 r is not a multiple of 8, x begins at the multiple
//    below, within the elite elements, and W has zero columns for them: 6 at most.
#include "head_linear.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/rope.cuh"

namespace {

using Params = kvw_head_linear_params;

constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16, CHUNK = 8, STEPS = 4; // of 32 columns, in flight
constexpr int MOST_COLUMNS = 16, ALONE = 256; // rows of x a CTA; cols that a warp takes alone

// Row `column` of the T G that meet W_h.
struct Columns {
    const Params& p;
    int head, group;

    PRIM int count() const { return p.tokens * group; }
    PRIM int q_head(int column) const { return head * group + column % group; }
    PRIM const __half* x(int column) const {
        if (column >= count()) return nullptr;
        return static_cast<const __half*>(p.x) + column / group * p.x_stride +
               int64_t(q_head(column)) * p.x_head_stride;
    }
    PRIM __half* y(int column) const {
        size_t row = size_t(column / group) * p.q_heads + (KVW_FAULT(441) ? head : q_head(column));
        return static_cast<__half*>(p.y) + row * p.rows;
    }
};

PRIM uint4 chunk_of(const __half* row, int chunk, int chunks, bool stream) {
    if (!row || (chunk >= chunks && !KVW_FAULT(442))) return make_uint4(0, 0, 0, 0);
    return stream ? prim::ldg128_stream(row + chunk * CHUNK) : prim::ldg128(row + chunk * CHUNK);
}

// c: 16 rows from `row` on by 8 columns a tile. Every `stride`-th run of STEPS steps from `first` on.
template <int TILES>
PRIM void multiply(const Columns& columns, int row, int column, int first, int stride, float (&c)[TILES][4]) {
    const Params& p = columns.p;
    int lane = int(threadIdx.x) % 32, g = lane / 4, q = lane % 4, chunks = p.cols / CHUNK;
    const __half* w = static_cast<const __half*>(p.weight) + (size_t(columns.head) * p.rows + row) * p.cols;
    const __half* low = row + g < p.rows ? w + size_t(g) * p.cols : nullptr;
    const __half* high = row + g + 8 < p.rows ? w + size_t(g + 8) * p.cols : nullptr;
    const __half* x[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) x[n] = columns.x(column + 8 * n + g);
    for (int run = first * STEPS * 4; run < chunks; run += stride * STEPS * 4) {
        uint4 a[STEPS], b[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            a[i] = chunk_of(low, run + 4 * i + q, chunks, true);
            b[i] = chunk_of(high, run + 4 * i + q, chunks, true);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const uint32_t left[4] = {a[i].x, b[i].x, a[i].y, b[i].y},
                           right[4] = {a[i].z, b[i].z, a[i].w, b[i].w};
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                uint4 y = chunk_of(x[n], run + 4 * i + q, chunks, false);
                prim::mma_16816<__half>(c[n], left, y.x, y.y);
                prim::mma_16816<__half>(c[n], right, y.z, y.w);
            }
        }
    }
}

// Element (row, column) of a C fragment: i of tile n.
PRIM void store(const Columns& columns, int row, int column, float sum) {
    const Params& p = columns.p;
    if (row >= p.rows || column >= columns.count()) return;
    if (p.bias) sum += p.bias[(KVW_FAULT(445) ? 0 : columns.head) * p.rows + row];
    columns.y(column)[row] = kvw::half_saturated(sum);
}

template <int TILES> __global__ void __launch_bounds__(THREADS, 2) alone(const __grid_constant__ Params p) {
    Columns columns{p, int(blockIdx.y), p.q_heads / p.kv_heads};
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, column = int(blockIdx.z) * MOST_COLUMNS;
    int row = (int(blockIdx.x) * WARPS + warp) * ROWS;
    if (row >= p.rows) return;
    float c[TILES][4] = {};
    multiply<TILES>(columns, row, column, 0, 1, c);
#pragma unroll
    for (int i = 0; i < TILES * 4; i++)
        store(columns, row + lane / 4 + i % 4 / 2 * 8, column + i / 4 * 8 + lane % 4 * 2 + i % 2,
              c[i / 4][i % 4]);
}

template <int TILES> __global__ void __launch_bounds__(THREADS, 2) shared(const __grid_constant__ Params p) {
    KVW_SHARED(float, sums, WARPS* MOST_COLUMNS* ROWS); // [warp][column][row]
    Columns columns{p, int(blockIdx.y), p.q_heads / p.kv_heads};
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, column = int(blockIdx.z) * MOST_COLUMNS;
    int row = int(blockIdx.x) * ROWS;
    float c[TILES][4] = {};
    multiply<TILES>(columns, row, column, warp, WARPS, c);
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) {
        int at = lane / 4 + i % 4 / 2 * 8, x = i / 4 * 8 + lane % 4 * 2 + i % 2;
        sums[(warp * MOST_COLUMNS + x) * ROWS + at] = c[i / 4][i % 4];
    }
    if (!KVW_FAULT(443)) __syncthreads();
    for (int i = int(threadIdx.x); i < TILES * 8 * ROWS; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS - KVW_FAULT(444); w++) sum += sums[w * MOST_COLUMNS * ROWS + i];
        store(columns, row + i % ROWS, column + i / ROWS, sum);
    }
}

} // namespace

kvw_status kvw_head_linear_check(const kvw_head_linear_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRED(*p, weight);
    KVW_REQUIRED(*p, x);
    KVW_REQUIRED(*p, y);
    KVW_OPTIONAL(*p, bias);
    KVW_REQUIRE(p->kv_heads >= 1 && p->kv_heads <= kvw::GRID_YZ_MAX, SHAPE, kv_heads);
    KVW_REQUIRE(p->q_heads >= 1 && p->q_heads % p->kv_heads == 0, SHAPE, q_heads);
    int64_t columns = int64_t(p->tokens) * (p->q_heads / p->kv_heads);
    KVW_REQUIRE(p->tokens >= 1 && columns <= int64_t(kvw::GRID_YZ_MAX) * MOST_COLUMNS, SHAPE, tokens);
    KVW_REQUIRE(p->rows >= 1 && p->rows <= 1 << 24, SHAPE, rows);
    KVW_REQUIRE(p->cols >= 1 && p->cols <= 1 << 24 && p->cols % CHUNK == 0, SHAPE, cols);
    KVW_REQUIRE(p->x_head_stride >= p->cols && p->x_head_stride % CHUNK == 0, SHAPE, x_head_stride);
    int64_t row = int64_t(p->q_heads - 1) * p->x_head_stride + p->cols;
    KVW_REQUIRE(p->x_stride >= row && p->x_stride % CHUNK == 0, SHAPE, x_stride);
    KVW_REQUIRE(p->reserved == 0, SHAPE, reserved);
    return KVW_OK;
}

size_t kvw_head_linear_workspace(const kvw_head_linear_params*) { return 0; }

size_t kvw_head_linear_bytes(const kvw_head_linear_params* p) {
    if (kvw_head_linear_check(p) != KVW_OK) return 0;
    size_t rows = size_t(p->rows), cols = size_t(p->cols);
    size_t bias = p->bias ? 4 * p->kv_heads * rows : 0;
    return bias + 2 * (p->kv_heads * rows * cols + size_t(p->tokens) * p->q_heads * (rows + cols));
}

kvw_status kvw_head_linear(const kvw_head_linear_params* p, kvw_stream stream) {
    KVW_TRY(kvw_head_linear_check(p));
    int columns = p->tokens * (p->q_heads / p->kv_heads), tiles = (p->rows + ROWS - 1) / ROWS;
    bool one_warp = p->cols <= ALONE;
    dim3 grid(unsigned(one_warp ? (tiles + WARPS - 1) / WARPS : tiles), unsigned(p->kv_heads),
              unsigned((columns + MOST_COLUMNS - 1) / MOST_COLUMNS));
    if (one_warp && columns <= 8) return KVW_LAUNCH((alone<1>), grid, THREADS, 0, stream, *p);
    if (one_warp) return KVW_LAUNCH((alone<2>), grid, THREADS, 0, stream, *p);
    if (columns <= 8) return KVW_LAUNCH((shared<1>), grid, THREADS, 0, stream, *p);
    return KVW_LAUNCH((shared<2>), grid, THREADS, 0, stream, *p);
}
