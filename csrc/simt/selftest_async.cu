// selftest_async.cu - what runs beside the threads on sm_90, correct, with bugs that a fault number plants.
// Driven by tests/simt_self.rs; never part of a library.
#include "common/launch.cuh"
#include "common/prim.cuh"

namespace {

constexpr int TILE = 64; // words
constexpr int TILES = 5, SLOTS = 2;

struct Io {
    const uint32_t* in;
    uint32_t* out;
};

struct Ring {
    uint64_t *full, *empty;
    uint32_t* slots;
};

PRIM void produce(const Io& io, const Ring& ring) {
    for (int i = 0; i < TILES; i++) {
        int slot = i % SLOTS, bytes = TILE * 4;
        if (!KVW_FAULT(47)) prim::mbar_wait(ring.empty + slot, i / SLOTS % 2 ^ 1 ^ KVW_FAULT(45));
        prim::mbar_expect(ring.full + slot, KVW_FAULT(41) ? bytes - 16 : KVW_FAULT(42) ? bytes + 16 : bytes);
        if (KVW_FAULT(51)) prim::mbar_arrive(ring.full + slot);
        prim::copy_bulk(ring.slots + slot * TILE, io.in + i * TILE, KVW_FAULT(54) ? 24 : bytes,
                        ring.full + slot);
    }
    if (KVW_FAULT(50)) {
        prim::mbar_wait(ring.empty, 0);
        prim::mbar_expect(ring.full, 16);
        prim::copy_bulk(ring.slots, io.in, 16, ring.full);
    }
}

// Tiles reversed; the first word of a slot is overwritten before the slot is given back.
PRIM void consume(const Io& io, const Ring& ring, int t) {
    for (int i = 0; i < TILES; i++) {
        int slot = i % SLOTS;
        uint32_t* tile = ring.slots + slot * TILE;
        if (!KVW_FAULT(40)) prim::mbar_wait(ring.full + slot, i / SLOTS % 2 ^ KVW_FAULT(53));
        io.out[i * TILE + t] = tile[TILE - 1 - t];
        prim::bar_sync(1, 64);
        if (t < 4) tile[t] = 0;
        if (!KVW_FAULT(46)) prim::fence_async();
        if (!KVW_FAULT(56)) __syncwarp();
        if (t % 32 == 0) prim::mbar_arrive(ring.empty + slot);
    }
}

// Warp 0 brings tiles by bulk copy through a ring of two slots, warps 1 and 2 take them. 1 block of 96.
__global__ void bulk_ring(Io io) {
    KVW_DYN_SHARED(unsigned char, raw);
    KVW_SHARED(uint64_t, full, SLOTS);
    KVW_SHARED(uint64_t, empty, SLOTS);
    prim::Carve carve(raw);
    Ring ring{full, empty, carve.take<uint32_t, 128>(SLOTS * TILE)};
    int t = threadIdx.x;
    if (t == 0) {
        for (int i = 0; i < SLOTS - KVW_FAULT(49); i++) prim::mbar_init(full + i, 1);
        for (int i = 0; i < SLOTS; i++) prim::mbar_init(empty + i, 2);
        if (KVW_FAULT(48)) prim::mbar_init(full, 1);
        if (!KVW_FAULT(43)) prim::mbar_fence();
    }
    if (!KVW_FAULT(44) || t >= 32) prim::bar_sync(2, KVW_FAULT(44) ? 64 : 96);
    if (KVW_FAULT(55) && t == 40) full[1] = 0;
    if (t >= 32)
        consume(io, ring, t - 32);
    else if (t == 0)
        produce(io, ring);
}

// Words 0 to 63 of out, copied and read back reversed into 64 to 127 while their source is overwritten after
// the wait. 1 block of 64.
__global__ void bulk_source(Io io) {
    KVW_SHARED(uint64_t, bar, 1);
    KVW_SHARED(uint32_t, tile, TILE);
    int t = threadIdx.x;
    if (t == 0) {
        prim::mbar_init(bar, 1);
        prim::mbar_fence();
        prim::mbar_expect(bar, TILE * 4);
        prim::copy_bulk(tile, io.out, TILE * 4, bar);
        if (KVW_FAULT(52)) io.out[5] = 0;
    }
    __syncthreads();
    if (!KVW_FAULT(57)) prim::mbar_wait(bar, 0);
    io.out[t] = io.in[t];
    io.out[TILE + t] = tile[TILE - 1 - t];
}

} // namespace

#define SELFTEST(kernel, block, smem)                                                                        \
    extern "C" kvw_status simt_selftest_##kernel(const uint32_t* in, uint32_t* out) {                        \
        return KVW_LAUNCH(kernel, 1, block, smem, nullptr, Io{in, out});                                     \
    }
SELFTEST(bulk_ring, 96, SLOTS* TILE * 4)
SELFTEST(bulk_source, 64, 0)
