// linear: y = x W^T + bias for one to sixteen rows of x: decode steps and small batches, bound by reading W.
//
// Math      y[t, r] = sum_c x[t, c] W[r, c] + bias[r] (+ y[t, r] where accumulate), products exact, sums
//           f32; beyond the range of an f16 y, +-65504
// Shapes    weight [rows, cols] f16, bf16 or in blocks (Q8_0, Q4_0, Q4_1, Q4_K, Q6_K: linear.h); x [T, cols]
//           f16; bias [rows] f32; y [T, rows] f16 or f32
// Layout    W is the M = 16 operand of mma.m16n8k16, tokens are the N = 8 one: a step computes 16 rows
//           for 8 tokens
// Bytes     W once, x, y, and y again where accumulate -> kvw_linear_bytes()
// Launch    T = 1, dense: a warp a row, 4 warps a CTA. Else: a CTA of 8 warps takes 16 rows, its warps share
//           the columns; 8 KB of shared memory
// Workspace none
// Order     deterministic: lanes by shuffles or mma, then warps in order; with weights in blocks the same for
//           every T, so that a row of y has the same bits whatever else is in the batch
// Oracle    src/linear/oracle.rs
//
// Why it looks like this:
// 1. Weights are read once: 16-byte loads that do not stay in L1, eight (T = 1) or eight (T > 1) in
//    flight a lane.
// 2. The order of columns within an mma is free as long as W and x agree: lane (g, q) loads columns 8 q
//    .. 8 q + 7 of a step of 32 and feeds them as the fragments of two mma, with neither ldmatrix nor
//    shared memory.
// 3. Weights in blocks: codes become exact halves (an LOP3 and an HFMA2 a pair, most of the instructions),
//    an mma sums a group, and one FFMA an element of the result applies the scale; minima meet sums of x,
//    from an mma with ones. Decoded once for all T. Predicted for H100 (3.35 TB/s, 132 SMs of 4 issues a
//    clock, 1.7 GHz: 0.27 warp instructions a byte), from SASS of sm_90a, T <= 8 and T > 8: Q8_0 0.12,
//    0.15; Q4_0 0.19, 0.23; Q4_1 0.20, 0.26; Q4_K 0.21, 0.34; Q6_K 0.20, 0.24: bound by memory, but for
//    Q4_K beyond T = 8, where issue allows 79 % of it. x comes from L1 while T cols 2 bytes fit beside 16
//    KB of sums, about 200 KB; beyond, 16 rows of 4-bit weights share an L2 stream of x that is T / 4.5
//    times theirs, so that cols of 14336 want T <= 7. Not measured.
// 4. With bf16 weights x is split in two bf16 terms, its upper 8 bits and the 3 that remain: exact, where
//    rounding x to bf16 would cost 2^-9. The second mma is free next to the loads.
#include "linear.h"
#include "common/blocks.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/rope.cuh"

namespace {

using Params = kvw_linear_params;

constexpr int MAX_TOKENS = 16, CHUNK = 8; // columns of a 16-byte load

template <class T> PRIM float2 two_floats(uint32_t word) {
    T two[2];
    memcpy(two, &word, sizeof word);
    return make_float2(float(two[0]), float(two[1]));
}

PRIM void store(const Params& p, int token, int row, float sum) {
    size_t at = size_t(token) * p.rows + row;
    if (p.bias) sum += p.bias[row];
    if (p.y_dtype == KVW_F16) {
        static_cast<__half*>(p.y)[at] = kvw::half_saturated(sum);
        return;
    }
    float* y = static_cast<float*>(p.y) + at;
    *y = p.accumulate && !KVW_FAULT(334) ? *y + sum : sum;
}

// ---- one token

constexpr int GEMV_THREADS = 128, GEMV_LOADS = 8;

template <class W> __global__ void __launch_bounds__(GEMV_THREADS, 4) gemv(const __grid_constant__ Params p) {
    int row = int(blockIdx.x) * (GEMV_THREADS / 32) + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    if (row >= p.rows) return;
    const W* weight = static_cast<const W*>(p.weight) + size_t(row) * p.cols;
    const __half* x = static_cast<const __half*>(p.x);
    int chunks = p.cols / CHUNK;
    float sum = 0;
    for (int first = lane; first < chunks; first += 32 * GEMV_LOADS) {
        uint4 w[GEMV_LOADS];
#pragma unroll
        for (int i = 0; i < GEMV_LOADS; i++) {
            int c = first + 32 * i;
            w[i] = c < chunks ? prim::ldg128_stream(weight + c * CHUNK) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < GEMV_LOADS; i++) {
            int c = min(first + 32 * i, chunks - 1); // past the end: times zero
            uint4 y = prim::ldg128(x + c * CHUNK);
            if (first + 32 * i >= chunks) continue;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float2 a = two_floats<W>(kvw::component(w[i], n)),
                       b = two_floats<__half>(kvw::component(y, n));
                sum = fmaf(a.x, b.x, sum);
                sum = fmaf(a.y, b.y, sum);
            }
        }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (lane == 0) store(p, 0, row, sum);
}

// ---- two to sixteen tokens, dense

constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16, STEPS = 4; // of 32 columns, in flight

// c += A B for 16 columns: a the words of W, b those of x.
PRIM void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    prim::mma_16816<__half>(c, a, b0, b1);
}

struct Split {
    uint32_t high, low;
};

PRIM Split split(uint32_t halves) {
    float2 x = two_floats<__half>(halves);
    __nv_bfloat162 high = __floats2bfloat162_rn(x.x, x.y);
    __nv_bfloat162 low = __floats2bfloat162_rn(x.x - __low2float(high), x.y - __high2float(high));
    Split s;
    memcpy(&s.high, &high, sizeof high);
    memcpy(&s.low, &low, sizeof low);
    return s;
}

PRIM void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    Split x0 = split(b0), x1 = split(b1);
    prim::mma_16816<__nv_bfloat16>(c, a, x0.high, x1.high);
    prim::mma_16816<__nv_bfloat16>(c, a, x0.low, x1.low);
}

// A 16-byte chunk of a row, zeros outside.
PRIM uint4 chunk_of(const void* matrix, int row, int rows, int chunk, int chunks, bool stream) {
    if (row >= rows || (chunk >= chunks && !KVW_FAULT(332))) return make_uint4(0, 0, 0, 0);
    const uint4* at = static_cast<const uint4*>(matrix) + size_t(row) * chunks + chunk;
    return stream ? prim::ldg128_stream(at) : prim::ldg128(at);
}

// Sums of the warps for the CTA's rows, in order; c: 16 rows by 8 tokens a tile.
template <int TILES> PRIM void reduce(const Params& p, int row, const float (&c)[TILES][4]) {
    KVW_SHARED(float, sums, WARPS* MAX_TOKENS* ROWS); // [warp][token][row]
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = 8 * n + 2 * q + i % 2, at = g + i / 2 * 8;
            sums[(warp * MAX_TOKENS + token) * ROWS + at] = c[n][i];
        }
    }
    if (!KVW_FAULT(331)) __syncthreads();
    for (int i = int(threadIdx.x); i < p.tokens * ROWS; i += THREADS) {
        int token = i / ROWS, at = i % ROWS;
        if (row + at >= p.rows) continue;
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sums[(w * MAX_TOKENS + token) * ROWS + at];
        store(p, token, row + at, sum);
    }
}

// TILES: of 8 tokens.
template <class W, int TILES>
__global__ void __launch_bounds__(THREADS, 2) batch(const __grid_constant__ Params p) {
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
    int row = int(blockIdx.x) * ROWS, chunks = p.cols / CHUNK;
    float c[TILES][4] = {};
    for (int first = warp * STEPS * 4; first < chunks; first += WARPS * STEPS * 4) {
        uint4 low[STEPS], high[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            low[i] = chunk_of(p.weight, row + g, p.rows, first + 4 * i + q, chunks, true);
            high[i] = chunk_of(p.weight, row + g + 8, p.rows, first + 4 * i + q, chunks, true);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                uint4 x = chunk_of(p.x, 8 * n + g, p.tokens, first + 4 * i + q, chunks, false);
                const uint4 &w0 = KVW_FAULT(333) ? high[i] : low[i], &w8 = KVW_FAULT(333) ? low[i] : high[i];
                const uint32_t a[4] = {w0.x, w8.x, w0.y, w8.y}, b[4] = {w0.z, w8.z, w0.w, w8.w};
                multiply(c[n], a, x.x, x.y, W());
                multiply(c[n], b, x.z, x.w, W());
            }
        }
    }
    reduce(p, row, c);
}

template <class W> kvw_status launch(const Params& p, kvw_stream stream) {
    constexpr int GEMV_ROWS = GEMV_THREADS / 32;
    dim3 warps(unsigned((p.rows + GEMV_ROWS - 1) / GEMV_ROWS)), tiles(unsigned((p.rows + ROWS - 1) / ROWS));
    if (p.tokens == 1) return KVW_LAUNCH((gemv<W>), warps, GEMV_THREADS, 0, stream, p);
    if (p.tokens <= 8) return KVW_LAUNCH((batch<W, 1>), tiles, THREADS, 0, stream, p);
    return KVW_LAUNCH((batch<W, 2>), tiles, THREADS, 0, stream, p);
}

// ---- weights in blocks

// Eight halves of x, as the B fragments that the lane's codes of 32 columns meet; x: the lane's first.
template <class Step> PRIM uint4 activations(const __half* x, bool ok) {
    if (!ok) return make_uint4(0, 0, 0, 0);
    if (Step::GROUP == 32) return prim::ldg128(x);
    uint2 low = *reinterpret_cast<const uint2*>(x), high = *reinterpret_cast<const uint2*>(x + 16);
    return make_uint4(low.x, low.y, high.x, high.y);
}

// y += W x over 32 columns, number j of a step: w[0] of row g, w[1] of row g + 8; x: the lane's activations.
template <class Step, int TILES>
PRIM void multiply_32(const Step (&w)[2], int j, const uint4 (&x)[TILES], float (&y)[TILES][4]) {
    constexpr uint32_t ONES[4] = {kvw::ONE_F16, kvw::ONE_F16, kvw::ONE_F16, kvw::ONE_F16};
    uint32_t a[2][4];
#pragma unroll
    for (int r = 0; r < 2; r++) w[r].pairs(j, a[r]);
    float c[TILES][4] = {}, sum[TILES][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t codes[4] = {a[0][2 * half], a[1][2 * half], a[0][2 * half + 1], a[1][2 * half + 1]};
        bool last = Step::GROUP == 16 || half == 1; // of a group
        kvw::Affine of[2] = {};
        if (last) {
            for (int r = 0; r < 2; r++) of[r] = w[KVW_FAULT(335) ? 0 : r].affine(j, half);
        }
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            uint32_t b0 = kvw::component(x[n], 2 * half), b1 = kvw::component(x[n], 2 * half + 1);
            prim::mma_16816<__half>(c[n], codes, b0, b1);
            if (Step::OFFSET) prim::mma_16816<__half>(sum[n], ONES, b0, b1);
            if (!last) continue;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                y[n][i] = fmaf(of[i / 2].scale, c[n][i], y[n][i]);
                if (Step::OFFSET) y[n][i] = fmaf(of[i / 2].offset, sum[n][i], y[n][i]);
                c[n][i] = 0;
            }
        }
    }
}

// A step, of which `left` columns exist; x: where the lane begins in its token of each tile, null where
// there is none.
template <class Step, int TILES>
PRIM void multiply_step(const Step (&w)[2], const __half* const (&x)[TILES], size_t first, int left,
                        float (&y)[TILES][4]) {
    constexpr int AT_ONCE = TILES == 2 && Step::OFFSET ? 1 : 2; // runs of 128 columns that the registers bear
#pragma unroll(AT_ONCE)
    for (int run = 0; run < Step::COLS / 128; run++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int j = 4 * run + k;
            bool inside = Step::COLS == 256 || 32 * j < left;
            uint4 at[TILES];
#pragma unroll
            for (int n = 0; n < TILES; n++)
                at[n] = activations<Step>(x[n] + first + 32 * j, x[n] && inside);
            multiply_32(w, j, at, y);
        }
    }
}

template <int DTYPE, int TILES>
__global__ void __launch_bounds__(THREADS, 2) blocks(const __grid_constant__ Params p) {
    using Step = kvw::Step<DTYPE>;
    constexpr int DEPTH = 256 / (Step::COLS * (DTYPE == KVW_Q8_0 ? 2 : 1)); // 64 bytes of codes a lane
    kvw::Matrix matrix = {static_cast<const unsigned char*>(p.weight), size_t(p.rows), p.cols};
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
    int row = int(blockIdx.x) * ROWS, steps = (p.cols + Step::COLS - 1) / Step::COLS;
    float y[TILES][4] = {};
    const __half* x[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int token = 8 * n + g;
        const __half* own = static_cast<const __half*>(p.x) + size_t(token) * p.cols;
        x[n] = token < p.tokens ? own + kvw::first_column<Step>(q, 0) : nullptr;
    }
    for (int first = warp; first < steps; first += WARPS * DEPTH) {
        Step w[DEPTH][2];
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            int step = first + WARPS * i;
            if (step >= steps) break;
            for (int r = 0; r < 2; r++) w[i][r].load(matrix, size_t(row + g + 8 * r), step, q);
        }
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            int step = first + WARPS * i;
            if (step >= steps) break;
            multiply_step(w[i], x, size_t(step) * Step::COLS, p.cols - step * Step::COLS, y);
        }
    }
    reduce(p, row, y);
}

template <int DTYPE> kvw_status launch_blocks(const Params& p, kvw_stream stream) {
    dim3 tiles(unsigned((p.rows + ROWS - 1) / ROWS));
    if (p.tokens <= 8) return KVW_LAUNCH((blocks<DTYPE, 1>), tiles, THREADS, 0, stream, p);
    return KVW_LAUNCH((blocks<DTYPE, 2>), tiles, THREADS, 0, stream, p);
}

} // namespace

kvw_status kvw_linear_check(const kvw_linear_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRE(p->dtype == KVW_F16 || p->dtype == KVW_BF16 || kvw::in_blocks(p->dtype), FORMAT, dtype);
    KVW_REQUIRE(p->y_dtype == KVW_F16 || p->y_dtype == KVW_F32, FORMAT, y_dtype);
    KVW_REQUIRED(*p, weight);
    KVW_REQUIRED(*p, x);
    KVW_OPTIONAL(*p, bias);
    KVW_REQUIRED(*p, y);
    KVW_REQUIRE(p->accumulate == 0 || p->accumulate == 1, SHAPE, accumulate);
    KVW_REQUIRE(p->accumulate == 0 || p->y_dtype == KVW_F32, FORMAT, y_dtype);
    KVW_REQUIRE(p->tokens >= 1 && p->tokens <= MAX_TOKENS, SHAPE, tokens);
    KVW_REQUIRE(p->rows >= 1 && p->rows <= 1 << 28, SHAPE, rows);
    KVW_REQUIRE(p->cols >= 1 && p->cols <= 1 << 28 && p->cols % CHUNK == 0, SHAPE, cols);
    KVW_REQUIRE(p->cols % kvw::block_cols(p->dtype) == 0, SHAPE, cols);
    KVW_REQUIRE(p->reserved == 0, SHAPE, reserved);
    return KVW_OK;
}

size_t kvw_linear_workspace(const kvw_linear_params*) { return 0; }

size_t kvw_linear_bytes(const kvw_linear_params* p) {
    if (kvw_linear_check(p) != KVW_OK) return 0;
    size_t rows = size_t(p->rows), cols = size_t(p->cols), tokens = size_t(p->tokens);
    size_t y = tokens * rows * (p->y_dtype == KVW_F16 ? 2 : 4) * size_t(1 + p->accumulate);
    return rows * kvw::row_bytes(p->dtype, p->cols) + tokens * cols * 2 + y + (p->bias ? rows * 4 : 0);
}

kvw_status kvw_linear(const kvw_linear_params* p, kvw_stream stream) {
    KVW_TRY(kvw_linear_check(p));
    switch (p->dtype) {
    case KVW_F16: return launch<__half>(*p, stream);
    case KVW_BF16: return launch<__nv_bfloat16>(*p, stream);
    case KVW_Q8_0: return launch_blocks<KVW_Q8_0>(*p, stream);
    case KVW_Q4_0: return launch_blocks<KVW_Q4_0>(*p, stream);
    case KVW_Q4_1: return launch_blocks<KVW_Q4_1>(*p, stream);
    case KVW_Q4_K: return launch_blocks<KVW_Q4_K>(*p, stream);
    default: return launch_blocks<KVW_Q6_K>(*p, stream);
    }
}
