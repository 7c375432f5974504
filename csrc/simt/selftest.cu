// selftest.cu - one tiny kernel per primitive and per planted bug: the executor's own tests. Not a product
// kernel: nvcc compiles it in tests only, and never links it. Driven by tests/simt_self.rs.
#include "common/launch.cuh"
#include "common/prim.cuh"

namespace {

constexpr int THREADS = 64;
constexpr int WORDS = 64; // per thread, in and out

struct Io {
    const uint32_t* in;
    uint32_t* out;
};

// Every warp collective and integer instruction, a word of output each.
__global__ void warp_ops(Io io) {
    const uint32_t* x = io.in + threadIdx.x * WORDS;
    uint32_t* y = io.out + threadIdx.x * WORDS;
    int lane = threadIdx.x % 32;
    y[0] = __shfl_sync(~0u, x[0], x[1] & 31);
    y[1] = __shfl_up_sync(~0u, x[0], 3);
    y[2] = __shfl_down_sync(~0u, x[0], 5, 16);
    y[3] = __shfl_xor_sync(~0u, x[0], 9);
    y[4] = __ballot_sync(~0u, x[0] & 1);
    y[5] = __any_sync(~0u, (x[0] & 0xff) == 7);
    y[6] = __all_sync(~0u, lane < 32);
    y[7] = __match_any_sync(~0u, x[0] & 3);
    y[8] = __reduce_add_sync(~0u, x[0]);
    y[9] = __reduce_max_sync(~0u, x[0]);
    y[10] = __reduce_min_sync(~0u, x[0]);
    y[11] = __reduce_xor_sync(~0u, x[0]);
    y[12] = uint32_t(__reduce_min_sync(~0u, int(x[0])));
    if (lane < 12)
        y[13] = __shfl_xor_sync(0xfffu, x[0], 1);
    else
        y[13] = __ballot_sync(0xfffff000u, x[0] & 2);
    y[14] = uint32_t(__syncthreads_count(x[0] & 1));
    y[15] = prim::lop3<0x96>(x[0], x[1], x[2]);
    y[16] = prim::lop3<0xE8>(x[0], x[1], x[2]);
    y[17] = prim::prmt(x[0], x[1], 0x9d51);
    y[18] = prim::movmatrix_trans(x[0]);
}

} // namespace

extern "C" kvw_status simt_selftest_warp(const uint32_t* in, uint32_t* out) {
    return KVW_LAUNCH(warp_ops, 1, THREADS, 0, nullptr, Io{in, out});
}
