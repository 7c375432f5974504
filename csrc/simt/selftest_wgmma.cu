// selftest_wgmma.cu - the matrix products of a warpgroup, correct, with bugs that a fault number plants. Driven
// by tests/simt_self.rs; never part of a library.
#include "common/launch.cuh"
#include "common/wgmma.cuh"

namespace {

constexpr int K = 64; // four steps of 16

struct Io {
    const uint32_t* in;
    uint32_t* out;
};

PRIM uint32_t pair(const uint32_t* row) { return (row[0] & 0xFFFF) | row[1] << 16; }

// D = A B, A [64, K] and B [N, K] a 16-bit element a word of input; D [64, N] f32. The last two steps of k are
// a group of their own. 1 block of 128 + 32: the last warp only fills the tile, with the others.
template <class T, int N> __global__ void __launch_bounds__(160, 1) warpgroup_matmul(Io io) {
    KVW_DYN_SHARED(unsigned char, raw);
    prim::Carve carve(raw);
    unsigned char* tile = carve.take<unsigned char, 1024>(N * 128);
    int t = threadIdx.x, warp = t / 32, g = t % 32 / 4, c = t % 4 * 2;
    const uint32_t *a = io.in, *b = io.in + 64 * K;
    for (int i = t; i < N * K / 2; i += 160) {
        int row = i / (K / 2), k = i % (K / 2) * 2, at = prim::swizzled(row, 2 * k);
        if (KVW_FAULT(67)) at = row * 128 + 2 * k;
        *reinterpret_cast<uint32_t*>(tile + at) = pair(b + row * K + k);
    }
    if (!KVW_FAULT(60) || warp != 4) prim::fence_async();
    if (!KVW_FAULT(69) || warp != 4) prim::bar_sync(1, KVW_FAULT(69) ? 128 : 160);
    if (warp == 4) return;
    if (!KVW_FAULT(68) || warp != 2) prim::registers_down<168>();
    uint32_t fragment[K / 16][4];
    for (int i = 0; i < K / 16 * 4; i++)
        fragment[i / 4][i % 4] = pair(a + (16 * warp + g + i % 2 * 8) * K + i / 4 * 16 + c + i % 4 / 2 * 8);
    float d[N / 2];
    for (int i = 0; i < N / 2; i++) d[i] = 1.f;
    uint64_t descriptor = prim::swizzled_tile(tile);
    if (KVW_FAULT(63)) descriptor += 8ull << 32;
    if (!KVW_FAULT(61)) prim::wgmma_fence();
    if (KVW_FAULT(66)) d[5] = 0.f;
    for (int k = 0; k < K / 16; k++) {
        prim::wgmma<T, N>(d, fragment[k], descriptor + 2 * k, k > 0);
        if (k % 2) prim::wgmma_commit();
    }
    if (KVW_FAULT(64) && t == 7) *reinterpret_cast<uint32_t*>(tile + 20) = 0;
    if (KVW_FAULT(65)) fragment[3][1] = 0;
    if (KVW_FAULT(62))
        prim::wgmma_wait<1>(d);
    else
        prim::wgmma_wait<0>(d);
    for (int i = 0; i < N / 2; i++)
        io.out[(16 * warp + g + i % 4 / 2 * 8) * N + i / 4 * 8 + c + i % 2] = __float_as_uint(d[i]);
}

} // namespace

#define SELFTEST(name, T, N)                                                                                 \
    extern "C" kvw_status simt_selftest_##name(const uint32_t* in, uint32_t* out) {                          \
        return KVW_LAUNCH((warpgroup_matmul<T, N>), 1, 160, N * 128, nullptr, Io{in, out});                  \
    }
SELFTEST(wgmma_f16_64, __half, 64)
SELFTEST(wgmma_f16_96, __half, 96)
SELFTEST(wgmma_f16_128, __half, 128)
SELFTEST(wgmma_bf16_64, __nv_bfloat16, 64)
