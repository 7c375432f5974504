// selftest.cu - one small kernel per primitive: the executor's own tests, driven by tests/simt_self.rs.
// Not a product kernel; nvcc compiles it in a test and never links it.
#include "common/grid.cuh"
#include "common/launch.cuh"
#include "common/prim.cuh"

namespace {

constexpr int WORDS = 32; // per thread, of warp_ops

struct Io {
    const uint32_t* in;
    uint32_t* out;
};

// Every warp collective and bit instruction, a word of output each. Two warps.
__global__ void warp_ops(Io io) {
    const uint32_t* x = io.in + threadIdx.x * WORDS;
    uint32_t* y = io.out + threadIdx.x * WORDS;
    int lane = threadIdx.x % 32;
    y[0] = __shfl_sync(~0u, x[0], x[1] & 31);
    y[1] = __shfl_up_sync(~0u, x[0], 3);
    y[2] = __shfl_down_sync(~0u, x[0], 5, 16);
    y[3] = __shfl_xor_sync(~0u, x[0], 9);
    y[4] = __ballot_sync(~0u, x[0] & 1);
    y[5] = uint32_t(__any_sync(~0u, (x[0] & 0xff) == 7));
    y[6] = uint32_t(__all_sync(~0u, lane < 32));
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
    y[18] = __funnelshift_r(x[0], x[1], x[2]);
    y[19] = uint32_t(__popc(x[0]) + 64 * __clz(int(x[1])) + 4096 * __ffs(int(x[2])));
    y[20] = __brev(x[0]);
    y[21] = uint32_t(__dp4a(int(x[0]), int(x[1]), int(x[2])));
    y[22] = __umulhi(x[0], x[1]);
}

// Matrices of element numbers 0 to 255, row-major, 8 rows of 8 each: what each lane receives.
__global__ void matrix_maps(Io io) {
    KVW_SHARED(uint16_t, elements, 256);
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) elements[i] = uint16_t(i);
    __syncwarp();
    uint32_t r[4];
    prim::ldsm_x4(r, elements + lane * 8);
    for (int i = 0; i < 4; i++) io.out[lane * 9 + i] = r[i];
    io.out[lane * 9 + 8] = prim::movmatrix_trans(r[0]);
    prim::ldsm_x4_trans(r, elements + lane * 8);
    for (int i = 0; i < 4; i++) io.out[lane * 9 + 4 + i] = r[i];
}

// C = A B with A 16x16 and B 16x8 row-major, a 16-bit element a word of input; C 16x8 f32.
template <class T> __global__ void matmul(Io io) {
    constexpr int STRIDE = 24; // 48 bytes: rows of a matrix in different banks
    KVW_DYN_SHARED(unsigned char, raw);
    prim::Carve carve(raw);
    uint16_t* a = carve.take<uint16_t>(16 * STRIDE);
    uint16_t* b = carve.take<uint16_t, 128>(16 * 8);
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) a[i / 16 * STRIDE + i % 16] = uint16_t(io.in[i]);
    for (int i = lane; i < 128; i += 32) b[i] = uint16_t(io.in[256 + i]);
    __syncwarp();
    uint32_t fa[4], fb[4];
    prim::ldsm_x4(fa, a + lane % 16 * STRIDE + lane / 16 * 8);
    prim::ldsm_x4_trans(fb, b + lane % 16 * 8);
    float c[4] = {};
    prim::mma_16816<T>(c, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++)
        io.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = __float_as_uint(c[i]);
}

// Two groups of one 16-byte copy a thread, the second zero-filled in odd threads. Fault 1 reads the first
// group before it has landed.
__global__ void async_copies(Io io) {
    KVW_SHARED(uint4, tile, 64);
    int t = threadIdx.x;
    prim::cp_async16(tile + t, io.in + t * 8);
    prim::cp_async_commit();
    prim::cp_async16(tile + 32 + t, io.in + t * 8 + 4, t % 2 == 0);
    prim::cp_async_commit();
    if (!KVW_FAULT(1)) prim::cp_async_wait<1>();
    uint4 first = tile[t];
    prim::cp_async_wait<0>();
    uint4 second = tile[32 + t];
    prim::stg128(io.out + t * 8, first);
    prim::stg128(io.out + t * 8 + 4, second);
}

// One 16-bit pattern a thread, in both formats, with the tie above it in both conversions.
__global__ void halves(Io io) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    __half h = __ushort_as_half(uint16_t(i));
    __nv_bfloat16 b = __ushort_as_bfloat16(uint16_t(i));
    float tie = __uint_as_float(io.in[i]);
    io.out[i * 4] = __float_as_uint(__half2float(h));
    io.out[i * 4 + 1] = __float_as_uint(__bfloat162float(b));
    io.out[i * 4 + 2] =
        __half_as_ushort(__float2half_rn(tie)) | uint32_t(__half_as_ushort(__double2half(tie))) << 16;
    io.out[i * 4 + 3] = __bfloat16_as_ushort(__float2bfloat16_rn(tie));
}

// Fused multiply-add, sum, product, larger, smaller of three f16 each, two at a time.
__global__ void half_arithmetic(Io io) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __half a = __ushort_as_half(uint16_t(io.in[i * 3]));
    __half b = __ushort_as_half(uint16_t(io.in[i * 3 + 1]));
    __half c = __ushort_as_half(uint16_t(io.in[i * 3 + 2]));
    __half2 x = __halves2half2(a, b), y = __half2half2(c);
    uint32_t* out = io.out + i * 5;
    out[0] = __half_as_ushort(__hfma(a, b, c));
    out[1] = __half_as_ushort(__low2half(__hadd2(x, y)));
    out[2] = __half_as_ushort(__high2half(__hmul2(x, y)));
    out[3] = __half_as_ushort(__low2half(__hmax2(x, y)));
    out[4] = __half_as_ushort(__low2half(__hmin2(x, y)));
}

// Counters that every thread of the grid changes: sum, maximum, bits, and a sum built from compare-and-swap.
__global__ void atomics(Io io) {
    uint32_t v = io.in[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(io.out, v);
    atomicMax(io.out + 1, v);
    atomicXor(io.out + 2, v);
    uint32_t old = 0, seen;
    while ((seen = atomicCAS(io.out + 3, old, old + v)) != old) old = seen;
    atomicAdd(reinterpret_cast<float*>(io.out + 4), 0.5f);
}

// Warp 0 hands 32 words to warp 1 through barrier 1 while warp 2 takes no part.
__global__ void named_barrier(Io io) {
    KVW_SHARED(uint32_t, box, 32);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) box[lane] = io.in[lane];
    if (warp < 2) prim::bar_sync(1, 64);
    if (warp == 1) io.out[lane] = box[31 - lane];
}

// Every block reads what its neighbour wrote before the grid-wide barrier.
__global__ void neighbours(Io io) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    io.out[n + i] = io.in[i];
    prim::grid_sync();
    io.out[i] = io.out[n + (i + blockDim.x) % n];
}

} // namespace

#define SELFTEST(name, kernel, grid, block, smem)                                                            \
    extern "C" kvw_status simt_selftest_##name(const uint32_t* in, uint32_t* out) {                          \
        return KVW_LAUNCH((kernel), grid, block, smem, nullptr, Io{in, out});                                \
    }
SELFTEST(warp, warp_ops, 1, 64, 0)
SELFTEST(maps, matrix_maps, 1, 32, 0)
SELFTEST(matmul_f16, matmul<__half>, 1, 32, 16 * 24 * 2 + 256)
SELFTEST(matmul_bf16, matmul<__nv_bfloat16>, 1, 32, 16 * 24 * 2 + 256)
SELFTEST(async, async_copies, 1, 32, 0)
SELFTEST(halves, halves, 256, 256, 0)
SELFTEST(half_arithmetic, half_arithmetic, 64, 64, 0)
SELFTEST(atomics, atomics, 4, 64, 0)
SELFTEST(named_barrier, named_barrier, 1, 96, 0)
SELFTEST(too_much_shared, warp_ops, 1, 64, 300 * 1024)

extern "C" kvw_status simt_selftest_neighbours(const uint32_t* in, uint32_t* out) {
    return KVW_LAUNCH_COOPERATIVE(neighbours, 7, 32, 0, nullptr, Io{in, out});
}
