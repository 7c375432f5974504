// rms_norm: root mean square layer normalisation of the residual stream, f32 in, f16 out.
//
// Math      out = f16(x * weight / sqrt(mean(x^2) + eps))
// Shapes    x [T, width] f32; weight [width] f32; out [T, width] f16
// Bytes     6 an element, and the weights once -> kvw_rms_norm_bytes()
// Launch    a CTA a token, of 32 to 1024 threads; a thread keeps up to 32 elements in registers
// Workspace none
// Order     deterministic: lanes by shuffles, then warps in order
// Oracle    src/rms_norm.rs::oracle
//
// Why it looks like this:
// 1. x is read once: a row of 32768 elements fits the registers of 1024 threads.
// 2. The weights are asked for before the barrier, so that their latency hides behind the sum; rows of
//    over 16384, which fill the registers, ask after it.
#include "rms_norm.h"
#include "common/check.cuh"
#include "common/launch.cuh"

namespace {

constexpr int CHANNELS = 8, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32;

struct Eight {
    float of[CHANNELS];
};

PRIM Eight load8(const float* from) {
    uint4 raw[2] = {prim::ldg128(from), prim::ldg128(from + 4)};
    Eight x;
    memcpy(&x, raw, sizeof x);
    return x;
}

PRIM float sum_of_warp(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

PRIM float sum_of_block(float x) {
    KVW_SHARED(float, sums, MAX_WARPS);
    x = sum_of_warp(x);
    int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
    if (lane == 0) sums[warp] = x;
    if (!KVW_FAULT(311)) __syncthreads();
    return sum_of_warp(lane < warps ? sums[lane] : 0.f);
}

PRIM uint32_t pack2(float a, float b) {
    __half2 h = __floats2half2_rn(a, b);
    uint32_t bits;
    memcpy(&bits, &h, sizeof bits);
    return bits;
}

// CHUNKS: eights a thread.
template <int CHUNKS>
__global__ void __launch_bounds__(MAX_THREADS) rms_norm(const __grid_constant__ kvw_rms_norm_params p) {
    const float* row = p.x + size_t(blockIdx.x) * p.width;
    __half* out = static_cast<__half*>(p.out) + size_t(blockIdx.x) * p.width;
    constexpr bool EARLY = CHUNKS <= 2;
    Eight x[CHUNKS] = {}, w[CHUNKS] = {};
    float squares = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int at = (c * int(blockDim.x) + int(threadIdx.x)) * CHANNELS;
        if (at >= p.width) continue;
        x[c] = load8(row + at);
        if (EARLY) w[c] = load8(p.weight + at);
#pragma unroll
        for (float v : x[c].of) squares = fmaf(v, v, squares);
    }
    float mean = sum_of_block(squares) / float(p.width);
    float scale = rsqrtf(mean + (KVW_FAULT(312) ? 0.f : p.eps));
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int at = (c * int(blockDim.x) + int(threadIdx.x)) * CHANNELS;
        if (at >= p.width) continue;
        if (!EARLY) w[c] = load8(p.weight + at);
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            words[i] = pack2(x[c].of[2 * i] * scale * w[c].of[2 * i],
                             x[c].of[2 * i + 1] * scale * w[c].of[2 * i + 1]);
        }
        prim::stg128(out + at, make_uint4(words[0], words[1], words[2], words[3]));
    }
}

} // namespace

kvw_status kvw_rms_norm_check(const kvw_rms_norm_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRED(*p, x);
    KVW_REQUIRED(*p, weight);
    KVW_REQUIRED(*p, out);
    KVW_REQUIRE(p->tokens >= 1, SHAPE, tokens);
    KVW_REQUIRE(p->eps > 0, SHAPE, eps);
    KVW_REQUIRE(p->width >= 1 && p->width % CHANNELS == 0 && p->width <= 32768, SHAPE, width);
    return KVW_OK;
}

size_t kvw_rms_norm_workspace(const kvw_rms_norm_params*) { return 0; }

size_t kvw_rms_norm_bytes(const kvw_rms_norm_params* p) {
    if (kvw_rms_norm_check(p) != KVW_OK) return 0;
    return size_t(p->width) * (size_t(p->tokens) * 6 + 4);
}

kvw_status kvw_rms_norm(const kvw_rms_norm_params* p, kvw_stream stream) {
    KVW_TRY(kvw_rms_norm_check(p));
    int eights = p->width / CHANNELS;
    int chunks = eights <= MAX_THREADS ? 1 : eights <= 2 * MAX_THREADS ? 2 : 4;
    int threads = ((eights + chunks - 1) / chunks + 31) / 32 * 32;
    dim3 grid(unsigned(p->tokens));
    if (chunks == 1) return KVW_LAUNCH((rms_norm<1>), grid, threads, 0, stream, *p);
    if (chunks == 2) return KVW_LAUNCH((rms_norm<2>), grid, threads, 0, stream, *p);
    return KVW_LAUNCH((rms_norm<4>), grid, threads, 0, stream, *p);
}
