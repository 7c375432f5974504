// swiglu: silu(gate) * up, the activation of the feed-forward block.
//
// Math      out = f16(gate / (1 + e^-gate) * up), in f32 before the rounding; beyond its range +-65504
// Shapes    gate, up [T, width] f16 with a stride between tokens; out [T, width] f16, dense
// Bytes     6 an element -> kvw_swiglu_bytes()
// Launch    a thread takes 8 neighbouring channels; 256 threads a CTA, as many CTAs as that takes
// Workspace none
// Order     deterministic; every element is written by the thread that read it, so out may be gate or up
// Oracle    src/swiglu.rs::oracle
#include "swiglu.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/rope.cuh"

namespace {

constexpr int THREADS = 256, CHANNELS = 8;

// Below -80 the value is under 1e-32 and the quotient's range would end. NaN fails the comparison and stays.
PRIM float silu(float x) {
    x = x < -80.f ? -80.f : x;
    return __fdividef(x, 1.f + __expf(-x));
}

// Two channels.
PRIM uint32_t gated(uint32_t gate, uint32_t up) {
    __half2 g, u;
    memcpy(&g, &gate, sizeof g);
    memcpy(&u, &up, sizeof u);
    __half low = kvw::half_saturated(silu(__low2float(g)) * __low2float(u));
    __half high = kvw::half_saturated(silu(__high2float(g)) * __high2float(u));
    return uint32_t(__half_as_ushort(high)) << 16 | __half_as_ushort(low);
}

__global__ void __launch_bounds__(THREADS) swiglu(const __grid_constant__ kvw_swiglu_params p) {
    int a_row = p.width / CHANNELS;
    int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= int64_t(p.tokens) * a_row) return;
    int64_t token = n / a_row, channel = n % a_row * CHANNELS, from = token * p.in_stride + channel;
    // Plain loads: out may be one of the inputs.
    uint4 g = *reinterpret_cast<const uint4*>(static_cast<const __half*>(p.gate) + from);
    uint4 u = *reinterpret_cast<const uint4*>(static_cast<const __half*>(p.up) + from);
    uint4 out = {gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, KVW_FAULT(341) ? g.w : u.w)};
    prim::stg128(static_cast<__half*>(p.out) + token * p.width + channel, out);
}

} // namespace

kvw_status kvw_swiglu_check(const kvw_swiglu_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRED(*p, gate);
    KVW_REQUIRED(*p, up);
    KVW_REQUIRED(*p, out);
    KVW_REQUIRE(p->tokens >= 1, SHAPE, tokens);
    KVW_REQUIRE(p->width >= 1 && p->width % CHANNELS == 0, SHAPE, width);
    KVW_REQUIRE(p->in_stride >= p->width && p->in_stride % CHANNELS == 0, SHAPE, in_stride);
    bool in_place = p->out == p->gate || p->out == p->up;
    KVW_REQUIRE(!in_place || p->in_stride == p->width, SHAPE, in_stride);
    KVW_REQUIRE(int64_t(p->tokens) * (p->width / CHANNELS) <= int64_t(INT32_MAX) * THREADS, SHAPE, tokens);
    KVW_REQUIRE(p->reserved == 0, SHAPE, reserved);
    return KVW_OK;
}

size_t kvw_swiglu_workspace(const kvw_swiglu_params*) { return 0; }

size_t kvw_swiglu_bytes(const kvw_swiglu_params* p) {
    if (kvw_swiglu_check(p) != KVW_OK) return 0;
    return size_t(p->tokens) * size_t(p->width) * 6;
}

kvw_status kvw_swiglu(const kvw_swiglu_params* p, kvw_stream stream) {
    KVW_TRY(kvw_swiglu_check(p));
    int64_t threads = int64_t(p->tokens) * (p->width / CHANNELS);
    return KVW_LAUNCH(swiglu, dim3(unsigned((threads + THREADS - 1) / THREADS)), THREADS, 0, stream, *p);
}
