// How fast can slabs at random places be read? By the bulk copy engine, by cp.async and by plain loads into
// registers; slabs of 1.5 to 12 KB, rings of 2 to 4, 8 to 16 warps an SM in 1 to 4 CTAs. 2 GiB a pass, so that
// L2 is cold. Every method must give the same XOR of everything it read.
#include "probe.cuh"
#include "common/prim.cuh"
#include <algorithm>

namespace probe {
namespace {
enum Method { BULK, BULK_EVICT_FIRST, ASYNC, LOADS };
const char* const NAMES[] = {"bulk", "bulk evict_first", "cp.async", "loads"};
constexpr size_t PAYLOAD = size_t(2) << 30;

__global__ void fill(uint4* pool, size_t units) {
    size_t stride = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < units; i += stride) {
        uint32_t x = uint32_t(i) * 0x9E3779B9u;
        pool[i] = make_uint4(x, x ^ x >> 15, x * 0x85EBCA6Bu, ~x ^ x << 13);
    }
}

// prim::copy_bulk without its hint: data stays in L2 as any other.
PRIM void copy_bulk_unhinted(void* to, const void* from, int bytes, uint64_t* bar) {
#if PRIM_SM90
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     prim::shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(prim::shared_address(bar))
                 : "memory");
#endif
}

PRIM uint32_t mixed(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// Slabs order[next .. end), 32 entries at a time, one a lane.
struct Walk {
    const uint32_t* order;
    uint32_t next, end, batch = 0;

    PRIM bool take(uint32_t& slab) {
        if (next >= end) return false;
        uint32_t lane = threadIdx.x % 32, at = next % 32;
        if (at == 0 || batch == 0) batch = order[min(next - at + lane, end - 1)] + 1;
        slab = __shfl_sync(~0u, batch, int(at)) - 1;
        next++;
        return true;
    }
};

// A warp reads its share of the slabs through a ring of `stages` buffers in shared memory.
template <int METHOD, int BYTES>
__global__ void __launch_bounds__(512)
    through_shared(const unsigned char* pool, const uint32_t* order, uint32_t slabs, int stages, uint32_t* out) {
    extern __shared__ __align__(128) unsigned char raw[];
    int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(raw + size_t(warps) * stages * BYTES) + warp * stages;
    unsigned char* ring = raw + size_t(warp) * stages * BYTES;
    constexpr bool BY_BULK = METHOD == BULK || METHOD == BULK_EVICT_FIRST;
    if (BY_BULK && !prim::HOPPER) return;
    if (BY_BULK && lane == 0) {
        for (int i = 0; i < stages; i++) prim::mbar_init(barriers + i, 1);
        prim::mbar_fence();
    }
    __syncwarp();
    uint32_t all = gridDim.x * warps, me = blockIdx.x * warps + warp, share = (slabs + all - 1) / all;
    Walk walk{order, min(me * share, slabs), min(me * share + share, slabs)};
    uint32_t pending = walk.end - walk.next, sum = 0;
    auto start = [&](int stage) {
        uint32_t slab;
        if (walk.take(slab)) {
            const unsigned char* from = pool + size_t(slab) * BYTES;
            unsigned char* to = ring + stage * BYTES;
            if (BY_BULK) {
                if (lane == 0) {
                    prim::mbar_expect(barriers + stage, BYTES);
                    if (METHOD == BULK_EVICT_FIRST)
                        prim::copy_bulk(to, from, BYTES, barriers + stage);
                    else
                        copy_bulk_unhinted(to, from, BYTES, barriers + stage);
                }
            } else {
#pragma unroll
                for (int at = 0; at < BYTES; at += 512) prim::cp_async16(to + at + lane * 16, from + at + lane * 16);
            }
        }
        if (!BY_BULK) prim::cp_async_commit();
    };
    for (int i = 0; i < stages; i++) start(i);
    for (int stage = 0, parity = 0; pending > 0; pending--) {
        if (BY_BULK) {
            prim::mbar_wait(barriers + stage, parity);
        } else if (stages == 2) {
            prim::cp_async_wait<1>();
        } else if (stages == 3) {
            prim::cp_async_wait<2>();
        } else {
            prim::cp_async_wait<3>();
        }
        __syncwarp();
#pragma unroll
        for (int at = 0; at < BYTES; at += 512)
            sum ^= mixed(*reinterpret_cast<const uint4*>(ring + stage * BYTES + at + lane * 16));
        __syncwarp();
        start(stage);
        if (++stage == stages) stage = 0, parity ^= 1;
    }
    sum = __reduce_xor_sync(~0u, sum);
    if (lane == 0) atomicXor(out, sum);
}

// The same through registers: `DEEP` slabs of UNITS 16-byte words a lane in flight.
template <int BYTES, int DEEP>
__global__ void __launch_bounds__(512)
    through_registers(const unsigned char* pool, const uint32_t* order, uint32_t slabs, uint32_t* out) {
    constexpr int UNITS = BYTES / 512;
    int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    uint32_t all = gridDim.x * warps, me = blockIdx.x * warps + threadIdx.x / 32, share = (slabs + all - 1) / all;
    Walk walk{order, min(me * share, slabs), min(me * share + share, slabs)};
    uint4 held[DEEP][UNITS];
    uint32_t sum = 0;
    auto start = [&](uint4(&to)[UNITS]) {
        uint32_t slab;
        bool some = walk.take(slab);
        const unsigned char* from = pool + size_t(some ? slab : 0) * BYTES + lane * 16;
#pragma unroll
        for (int i = 0; i < UNITS; i++) to[i] = some ? prim::ldg128_stream(from + i * 512) : uint4{};
    };
    uint32_t pending = walk.end - walk.next;
#pragma unroll
    for (int i = 0; i < DEEP; i++) start(held[i]);
    for (uint32_t done = 0; done < pending; done += DEEP) {
#pragma unroll
        for (int d = 0; d < DEEP; d++) {
#pragma unroll
            for (int i = 0; i < UNITS; i++) sum ^= mixed(held[d][i]);
            start(held[d]);
        }
    }
    sum = __reduce_xor_sync(~0u, sum);
    if (lane == 0) atomicXor(out, sum);
}

struct Pool {
    const Card& card;
    Report& report;
    Memory<unsigned char> bytes{PAYLOAD};
    Memory<uint32_t> order{PAYLOAD / 1536}, out{1};
    Timer timer{};
    bool agree = true;
    uint32_t sum = 0; // of the whole payload, in the units that all sizes share
    uint32_t slabs = 0;

    // A random order of the slabs of this size; all sizes divide the same payload.
    void shuffle(size_t slab) {
        slabs = uint32_t(PAYLOAD / 12288 * (12288 / slab));
        std::vector<uint32_t> index(slabs);
        uint64_t state = slab;
        for (uint32_t i = 0; i < slabs; i++) index[i] = i;
        for (uint32_t i = slabs; i > 1; i--) std::swap(index[i - 1], index[random_bits(state) % i]);
        order.put(index);
    }

    void measure(const std::string& name, const std::function<void()>& launch) {
        CHECK(cudaMemset(out.p, 0, 4));
        launch();
        CHECK(cudaGetLastError());
        uint32_t got = out.host()[0];
        if (sum == 0) sum = got;
        agree &= got == sum;
        double payload = double(PAYLOAD / 12288) * 12288;
        report.row("slabs", name, rate(timer.many(5, nullptr, launch), payload), "GB/s");
    }
};

std::string label(const char* method, int bytes, int stages, int warps, int ctas) {
    char text[96];
    snprintf(text, sizeof text, "%s %d B ring %d; %d warps an SM in %d CTAs", method, bytes, stages, warps, ctas);
    return text;
}

template <int METHOD, int BYTES> void shared_case(Pool& pool, int stages, int warps, int ctas) {
    size_t shared = size_t(warps / ctas) * stages * (BYTES + 8);
    if (shared + 1024 > pool.card.properties.sharedMemPerMultiprocessor / ctas ||
        shared > pool.card.properties.sharedMemPerBlockOptin)
        return;
    auto kernel = through_shared<METHOD, BYTES>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    pool.measure(label(NAMES[METHOD], BYTES, stages, warps, ctas), [&, stages, warps, ctas] {
        kernel<<<pool.card.sms * ctas, warps / ctas * 32, shared>>>(pool.bytes.p, pool.order.p, pool.slabs, stages, pool.out.p);
    });
}

template <int BYTES, int DEEP> void register_case(Pool& pool, int warps, int ctas) {
    pool.measure(label(NAMES[LOADS], BYTES, DEEP, warps, ctas), [&, warps, ctas] {
        through_registers<BYTES, DEEP><<<pool.card.sms * ctas, warps / ctas * 32>>>(pool.bytes.p, pool.order.p, pool.slabs, pool.out.p);
    });
}

template <int BYTES> void size(Pool& pool) {
    pool.shuffle(BYTES);
    struct Shape {
        int warps, ctas;
    };
    for (auto [warps, ctas] : {Shape{8, 1}, {8, 2}, {12, 1}, {12, 3}, {16, 1}, {16, 2}, {16, 4}}) {
        for (int stages = 2; stages <= 4; stages++) {
            if (pool.card.properties.major >= 9) {
                shared_case<BULK, BYTES>(pool, stages, warps, ctas);
                shared_case<BULK_EVICT_FIRST, BYTES>(pool, stages, warps, ctas);
            }
            shared_case<ASYNC, BYTES>(pool, stages, warps, ctas);
        }
        if constexpr (BYTES <= 6144) register_case<BYTES, 2>(pool, warps, ctas);
        register_case<BYTES, 1>(pool, warps, ctas);
    }
}
} // namespace

void slabs(const Card& card, Report& report) {
    Pool pool{card, report};
    fill<<<card.sms * 8, 256>>>(reinterpret_cast<uint4*>(pool.bytes.p), PAYLOAD / 16);
    CHECK(cudaGetLastError());
    size<6144>(pool);
    size<3072>(pool);
    size<1536>(pool);
    size<12288>(pool);
    report.expect("slabs", "every method read every byte", pool.agree);
}
} // namespace probe
