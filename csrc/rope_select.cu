// rope_select: rotary position embedding of the queries or keys of some tokens.
//
// Math      pair i = channels (a, b): angle = f32(position * inv_freq[i]); out = (a cos - b sin, a sin +
//           b cos), beyond the range of f16 +-65504
// Shapes    x, out [T, heads, D] f16 with a stride between tokens; positions [T]; inv_freq [D / 2]
// Layout    pair i = (2i, 2i + 1) interleaved, (i, i + D / 2) half
// Bytes     x once, out once, 4 a position, 2 D of frequencies -> kvw_rope_select_bytes()
// Launch    a CTA of 256 threads a token, 1 KB of shared memory
// Workspace none
// Order     deterministic; every element is written by the thread that read it, so out may be x
// Oracle    src/rope_select/oracle.rs
//
// Why it looks like this:
// 1. Sines are computed once a token and kept in shared memory: all heads use the same ones.
// 2. A thread turns four neighbouring pairs: 16-byte accesses interleaved, twice 8 bytes half. Heads
//    whose size or stride is odd in that sense take the same kernel with one pair a thread.
#include "kvwarp.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/rope.cuh"

namespace {

constexpr int THREADS = 256;

// PAIRS halves at p as one access.
template <int PAIRS> struct alignas(2 * PAIRS) Halves {
    __half of[PAIRS];
};

// PAIRS pairs from pair i on: (a, b) interleaved lie side by side, half lie D / 2 apart.
template <int PAIRS, bool HALF>
PRIM void turn(const __half* in, __half* out, int i, int d, const float* sin, const float* cos) {
    Halves<PAIRS> low, high;
    int at = HALF ? i : 2 * i, gap = HALF ? d / 2 : PAIRS;
    low = *reinterpret_cast<const Halves<PAIRS>*>(in + at);
    high = *reinterpret_cast<const Halves<PAIRS>*>(in + at + gap);
#pragma unroll
    for (int n = 0; n < PAIRS; n++) {
        // Interleaved, element e of the 2 PAIRS in order lies in low or high.
        __half& x = HALF ? low.of[n] : 2 * n < PAIRS ? low.of[2 * n % PAIRS] : high.of[2 * n % PAIRS];
        __half& y = HALF                ? high.of[n]
                    : 2 * n + 1 < PAIRS ? low.of[(2 * n + 1) % PAIRS]
                                        : high.of[(2 * n + 1) % PAIRS];
        float a = __half2float(x), b = __half2float(y);
        kvw::rotate(a, b, sin[i + n], cos[i + n]);
        x = kvw::half_saturated(a);
        y = kvw::half_saturated(b);
    }
    *reinterpret_cast<Halves<PAIRS>*>(out + at) = low;
    *reinterpret_cast<Halves<PAIRS>*>(out + at + gap) = high;
}

template <int PAIRS, bool HALF>
__global__ void __launch_bounds__(THREADS) rope(const __grid_constant__ kvw_rope_select_params p) {
    KVW_SHARED(float, sin, kvw::ROPE_MAX_D / 2);
    KVW_SHARED(float, cos, kvw::ROPE_MAX_D / 2);
    int pairs = p.head_dim / 2, token = int(blockIdx.x);
    for (int i = int(threadIdx.x); i < pairs; i += THREADS) {
        float s, c;
        kvw::sin_cos(__fmul_rn(float(p.positions[token]), p.inv_freq[i]), s, c);
        sin[i] = s;
        cos[i] = c;
    }
    if (!KVW_FAULT(301)) __syncthreads();
    const __half* in = static_cast<const __half*>(p.x) + token * p.x_stride;
    __half* out = static_cast<__half*>(p.out) + token * p.out_stride;
    int a_head = pairs / PAIRS;
    for (int n = int(threadIdx.x); n < p.heads * a_head; n += THREADS) {
        int head = n / a_head, i = n % a_head * PAIRS;
        turn<PAIRS, HALF>(in + head * p.head_dim, out + head * p.head_dim, i, p.head_dim, sin, cos);
    }
}

} // namespace

kvw_status kvw_rope_select_check(const kvw_rope_select_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRED(*p, x);
    KVW_REQUIRED(*p, out);
    KVW_REQUIRED(*p, positions);
    KVW_REQUIRED(*p, inv_freq);
    KVW_REQUIRE(p->tokens >= 1, SHAPE, tokens);
    KVW_REQUIRE(p->heads >= 1 && p->heads <= kvw::GRID_YZ_MAX, SHAPE, heads);
    KVW_REQUIRE(p->head_dim >= 2 && p->head_dim <= kvw::ROPE_MAX_D && p->head_dim % 2 == 0, SHAPE, head_dim);
    KVW_REQUIRE(p->pairing == KVW_ROPE_INTERLEAVED || p->pairing == KVW_ROPE_HALF, SHAPE, pairing);
    int64_t row = int64_t(p->heads) * p->head_dim;
    KVW_REQUIRE(p->x_stride >= row, SHAPE, x_stride);
    KVW_REQUIRE(p->out_stride >= row, SHAPE, out_stride);
    KVW_REQUIRE(p->x != p->out || p->x_stride == p->out_stride, SHAPE, out_stride);
    return KVW_OK;
}

size_t kvw_rope_select_workspace(const kvw_rope_select_params*) { return 0; }

size_t kvw_rope_select_bytes(const kvw_rope_select_params* p) {
    if (kvw_rope_select_check(p) != KVW_OK) return 0;
    return size_t(p->tokens) * (size_t(p->heads) * p->head_dim * 4 + 4) + size_t(p->head_dim) * 2;
}

kvw_status kvw_rope_select(const kvw_rope_select_params* p, kvw_stream stream) {
    KVW_TRY(kvw_rope_select_check(p));
    bool half = p->pairing == KVW_ROPE_HALF;
    bool wide = p->head_dim % 8 == 0 && p->x_stride % 8 == 0 && p->out_stride % 8 == 0;
    dim3 grid(unsigned(p->tokens));
    if (wide && half) return KVW_LAUNCH((rope<4, true>), grid, THREADS, 0, stream, *p);
    if (wide) return KVW_LAUNCH((rope<4, false>), grid, THREADS, 0, stream, *p);
    if (half) return KVW_LAUNCH((rope<1, true>), grid, THREADS, 0, stream, *p);
    return KVW_LAUNCH((rope<1, false>), grid, THREADS, 0, stream, *p);
}
