// selftest_bugs.cu - correct small kernels, each with bugs that a fault number plants: proof that the checked
// build finds every class of defect it claims to find. Driven by tests/simt_self.rs; never part of a library.
#include "common/launch.cuh"
#include "common/prim.cuh"

namespace {

constexpr int THREADS = 64;
constexpr int BLOCKS = 3; // of 32 threads

struct Io {
    const uint32_t* in;
    uint32_t* out;
};

// Twice through shared memory, reversed each time: out = in. Launch 1 block of 64.
__global__ void exchange(Io io) {
    KVW_DYN_SHARED(unsigned char, raw);
    prim::Carve carve(raw);
    uint32_t* first = carve.take<uint32_t>(THREADS);
    uint32_t* second = carve.take<uint32_t>(KVW_FAULT(27) ? 2 * THREADS : THREADS);
    KVW_SHARED(uint32_t, third, THREADS);
    int t = threadIdx.x;
    first[t] = 0;
    __syncthreads();
    first[KVW_FAULT(10) ? t / 2 : t] = io.in[KVW_FAULT(14) && t == 63 ? 64 : t];
    if (!KVW_FAULT(11)) __syncthreads();
    uint32_t v = first[63 - t];
    if (!KVW_FAULT(24)) __syncthreads();
    first[t] = 0;
    if (!KVW_FAULT(13) || t != 5) second[t] = v;
    uint32_t* third_begin = third;
    third_begin[KVW_FAULT(16) ? t + 1 : t] = v;
    __syncthreads();
    v = second[KVW_FAULT(15) && t == 0 ? 64 : 63 - t];
    io.out[t] = KVW_FAULT(23) ? io.out[t ^ 1] : v;
}

// Accesses that need alignment, an index, an address or a shift amount. Launch 1 block of 64.
__global__ void single_thread_bugs(Io io) {
    int t = threadIdx.x;
    const uint32_t* source = io.in + t % 16 * 4;
    if (KVW_FAULT(17)) source++;
    uint4 v = *reinterpret_cast<const uint4*>(source);
    if (KVW_FAULT(30)) v = prim::ldg128(source + 1);
    if (KVW_FAULT(26)) v.x = *reinterpret_cast<const uint32_t*>(uint64_t(t));
    uint32_t parts[4] = {v.x, v.y, v.z, v.w};
    int shift = KVW_FAULT(29) ? t : t % 32;
    io.out[t] = parts[KVW_FAULT(25) ? t % 16 : t % 4] >> shift;
}

// Warp collectives and barriers that not all threads reach. Launch 1 block of 64.
__global__ void meeting_bugs(Io io) {
    KVW_SHARED(uint16_t, matrix, 256);
    int t = threadIdx.x, lane = t % 32;
    if (t < 32) {
        for (int i = 0; i < 8; i++) matrix[lane * 8 + i] = uint16_t(io.in[lane]);
        if (!KVW_FAULT(12)) __syncwarp();
        uint32_t r[4];
        prim::ldsm_x4(r, matrix + (31 - lane) * 8);
        io.out[lane] = r[0];
        if (KVW_FAULT(18) && lane < 16) __syncwarp();
        io.out[32 + lane] = __shfl_xor_sync(~0u, r[1], 1);
    }
    if (KVW_FAULT(19) && t < 32) prim::bar_sync(1, 64);
    if (KVW_FAULT(21) && t < 32)
        __syncthreads();
    else
        __syncthreads();
    if (KVW_FAULT(31) && t == 3) __shfl_sync(0xf0u, t, 4);
}

// Sums of blocks, merged by the block that comes last: out[0] = sum, out[1] = ticket, out[2..] partial sums.
__global__ void last_block_merges(Io io) {
    KVW_SHARED(uint32_t, last, 1);
    uint32_t* partial = io.out + 2;
    uint32_t sum = __reduce_add_sync(~0u, io.in[blockIdx.x * 32 + threadIdx.x]);
    if (threadIdx.x == 0) {
        partial[KVW_FAULT(28) ? 0 : blockIdx.x] = sum;
        if (!KVW_FAULT(20)) __threadfence();
        last[0] = atomicAdd(io.out + 1, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last[0] || threadIdx.x != 0) return;
    uint32_t total = 0;
    for (uint32_t i = 0; i < gridDim.x; i++) total += partial[i];
    io.out[0] = total;
}

// The same by warps, without a block barrier: out[0] = sum, out[1] = ticket, out[2..] a word a lane.
__global__ void last_warp_merges(Io io) {
    uint32_t lane = threadIdx.x % 32, warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    uint32_t warps = gridDim.x * blockDim.x / 32, *words = io.out + 2, ticket = 0;
    words[warp * 32 + lane] = io.in[warp * 32 + lane];
    if (!KVW_FAULT(33)) __syncwarp();
    if (lane == 0) {
        if (!KVW_FAULT(34)) __threadfence();
        ticket = atomicAdd(io.out + 1, 1u);
    }
    if (!KVW_FAULT(35)) __syncwarp();
    if (__shfl_sync(~0u, ticket, 0) != warps - 1) return;
    uint32_t total = 0;
    for (uint32_t w = 0; w < warps; w++) total += __reduce_add_sync(~0u, words[w * 32 + 31 - lane]);
    if (lane == 0) io.out[0] = total;
}

// A grid barrier made by hand: the ticket is spun on with an acquiring load.
__global__ void spin_barrier(Io io) {
    uint32_t *ticket = io.out + 1, *box = io.out + 2;
    box[blockIdx.x * 32 + threadIdx.x] = io.in[blockIdx.x * 32 + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
        if (!KVW_FAULT(32)) __threadfence();
        atomicAdd(ticket, 1u);
        while (prim::ld_acquire(ticket) < gridDim.x) {
        }
    }
    __syncthreads();
    uint32_t neighbour = (blockIdx.x + 1) % gridDim.x;
    uint32_t sum = __reduce_add_sync(~0u, box[neighbour * 32 + threadIdx.x]);
    if (threadIdx.x == 0) box[gridDim.x * 32 + blockIdx.x] = sum;
}

} // namespace

#define SELFTEST(kernel, grid, block, smem)                                                                  \
    extern "C" kvw_status simt_selftest_##kernel(const uint32_t* in, uint32_t* out) {                        \
        return KVW_LAUNCH(kernel, grid, block, smem, nullptr, Io{in, out});                                  \
    }
SELFTEST(exchange, 1, THREADS, 2 * THREADS * 4)
SELFTEST(single_thread_bugs, 1, THREADS, 0)
SELFTEST(meeting_bugs, 1, THREADS, 0)
SELFTEST(last_block_merges, BLOCKS, 32, 0)
SELFTEST(last_warp_merges, 2, THREADS, 0)

extern "C" kvw_status simt_selftest_spin_barrier(const uint32_t* in, uint32_t* out) {
    return KVW_LAUNCH_COOPERATIVE(spin_barrier, BLOCKS, 32, 0, nullptr, Io{in, out});
}
