// kv_gather: what an eviction leaves: rows of a staged f16 ring into packed slabs and a ring, in one pass.
//
// Math      token i of (s, h) = the token in slot slots[s, h, i] of from, at slot 64 first[s, h] + i of the cache: in
//           its ring as it is, with zeros after the last one of a slab; in the table's slabs as kv_pack's FLUSH of
//           such a ring packs them, bit for bit
// Shapes    from [S, H, from_slabs] f16 slabs, slots [S, H, slots_stride], lens heads ragged; the cache as slab.h has it
// Layout    slabs of common/slab.cuh on both sides
// Bytes     4 D + 4 a token gathered: its f16 row and its slot, read; slabs written; the lower half of feedback
//           -> kvw_kv_gather_bytes()
// Launch    grid (max_slabs, H, S), 128 threads; 256 D bytes of shared memory, with feedback 320 D more
// Workspace none
// Order     deterministic; every unit of a slab is written by the one lane that owns it
// Oracle    src/kv_gather/oracle.rs, then src/slab/codec.rs
//
// Why it looks like this:
// 1. A lane's 16-byte unit of the new slab is made of the units in which the old slabs hold its tokens: 2 of K, 4 of V,
//    of which it takes a half and a quarter. A token's neighbours lie in the same units, so all of a slab that
//    keeps a quarter of its tokens is touched: bytes are those of the slabs left behind, and L1 has them when the
//    next lane asks. Predicted: 6 loads of 16 bytes for 2 units, 768 clocks of L1 for a slab at D = 128, against
//    10,000 of an SM's share of HBM at a quarter kept.
// 2. Packed slabs are staged in shared memory: extremes and codes read them twice, feedback once more. Slabs that stay f16
//    are written where they belong at once.
// 3. With feedback D = 256 needs 148 KB of shared memory: devices that have less refuse `feedback` there.
#include "kv_gather.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/feedback.cuh"

namespace {

using namespace kvw;
using Params = kvw_kv_gather_params;

template <int D> using F16 = Slab<KVW_SLAB_F16, D, 32>;

// Where one token of the old slabs lies: the units of its tile, side and half in them.
template <int D> struct Source {
    const unsigned char* tile; // null: no token
    int row;                   // of the tile

    PRIM Source(const unsigned char* from, int slabs, int slot) : tile(nullptr), row(slot % 16) {
        if (slot < 0) return;
        int slab = slot / TOKENS % (KVW_FAULT(751) ? slabs - 1 : slabs);
        tile = from + size_t(slab) * F16<D>::BYTES + slot % TOKENS / 16 * (D / 16) * UNIT_BYTES;
    }

    // Words j and j + 1 of unit u for lane t of this row of K.
    PRIM uint2 key(int u, int t) const {
        if (!tile) return make_uint2(0, 0);
        uint4 x = prim::ldg128(tile + (u * 32 + row % 8 * 4 + t) * 16);
        return row < 8 ? make_uint2(x.x, x.z) : make_uint2(x.y, x.w);
    }

    // Halves of channels r of pairs j and j + 1 of unit u of V, each in the low half of a word.
    PRIM uint2 value(int u, int r) const {
        if (!tile) return make_uint2(0, 0);
        uint4 x = prim::ldg128(tile + F16<D>::V_CODES + (u * 32 + r * 4 + row % 8 / 2) * 16);
        uint2 y = row < 8 ? make_uint2(x.x, x.z) : make_uint2(x.y, x.w);
        int shift = row % 2 * 16;
        return make_uint2(y.x >> shift & 0xFFFF, y.y >> shift & 0xFFFF);
    }
};

// Tokens of one tile into their units at `to`, by a warp; `slot(row)` is that of the tile's row, below 0: none.
template <int D, class Slot>
PRIM void gather_tile(const unsigned char* from, int slabs, unsigned char* to, int tile, Slot slot) {
    int lane = int(threadIdx.x) % 32, r = lane / 4, t = lane % 4;
    auto source = [&](int row) { return Source<D>(from, slabs, slot(row)); };
    unsigned char* own = to + (tile * (D / 16) * 32 + lane) * 16;
    const Source<D> a = source(r), b = source(r + 8);
    const Source<D> v[4] = {source(2 * t), source(2 * t + 1), source(2 * t + 8), source(2 * t + 9)};
#pragma unroll 2
    for (int u = 0; u < D / 16; u++) {
        uint2 low = a.key(u, t), high = b.key(u, t);
        prim::stg128(own + u * UNIT_BYTES, make_uint4(low.x, high.x, low.y, high.y));
    }
#pragma unroll 2
    for (int u = 0; u < D / 16; u++) {
        uint2 x[4];
#pragma unroll
        for (int n = 0; n < 4; n++) x[n] = v[n].value(u, r);
        if (KVW_FAULT(752)) swap(x[1], x[2]);
        prim::stg128(own + F16<D>::V_CODES + u * UNIT_BYTES,
                     make_uint4(x[0].x | x[1].x << 16, x[2].x | x[3].x << 16, x[0].y | x[1].y << 16,
                                x[2].y | x[3].y << 16));
    }
}

template <int D> __global__ void __launch_bounds__(PACK_THREADS, 4) gather(const __grid_constant__ Params p) {
    KVW_DYN_SHARED(unsigned char, raw);
    KVW_SHARED(uint32_t, meta, META_WORDS<D>);
    prim::Carve carve(raw);
    unsigned char* stage = carve.take<unsigned char>(F16<D>::BYTES);
    unsigned char* shared = p.feedback ? carve.take<unsigned char>(Feedback<D>::BYTES) : nullptr;
    const kvw_cache& c = p.cache;
    int s = int(blockIdx.z), h = int(blockIdx.y), of = c.lens_heads == 1 ? s : s * c.kv_heads + h;
    size_t row = size_t(s) * c.kv_heads + h;
    Head<D, 0> head(c, s, h);
    int first = p.first ? p.first[of] : 0, i = first + int(blockIdx.x);
    if (i < 0 || i >= head.slabs()) return;
    SlabAddress to = head.slab(i);
    if (to == 0) return;
    const bool packed = format_of(to) != KVW_SLAB_F16;

    const int32_t* slots = p.slots + row * p.slots_stride + int64_t(i - first) * TOKENS;
    const int live = min(head.len - i * TOKENS, TOKENS), warp = int(threadIdx.x) / 32;
    auto slot = [&](int at) { return 16 * warp + at < live || KVW_FAULT(753) ? slots[16 * warp + at] : -1; };
    const unsigned char* from = static_cast<const unsigned char*>(p.from) + row * p.from_slabs * F16<D>::BYTES;
    gather_tile<D>(from, p.from_slabs, packed ? stage : bytes_of(to), warp, slot);
    if (!packed) return;
    if (!KVW_FAULT(754)) __syncthreads();
    const __half* weights = static_cast<const __half*>(has_meta(format_of(to)) ? p.feedback : nullptr);
    if (weights) weights += size_t(KVW_FAULT(755) ? 0 : h) * D * D;
    pack_whole(Packer<D>(c, format_of(to), p.range, stage, bytes_of(to), meta), weights, shared);
}

template <int D> kvw_status launch(const Params& p, kvw_stream stream) {
    size_t shared = F16<D>::BYTES + (p.feedback ? Feedback<D>::BYTES : 0);
    dim3 grid(unsigned(p.max_slabs), unsigned(p.cache.kv_heads), unsigned(p.cache.seqs));
#if defined(__CUDACC__)
    if (p.feedback && D == 256) {
        int device = 0, most = 0;
        KVW_TRY(status_of(cudaGetDevice(&device)));
        KVW_TRY(status_of(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
        KVW_REQUIRE(size_t(most) >= shared + META_WORDS<D> * 4, FORMAT, feedback);
    }
#endif
    return KVW_LAUNCH((gather<D>), grid, PACK_THREADS, shared, stream, p);
}

} // namespace

kvw_status kvw_kv_gather_check(const kvw_kv_gather_params* p) {
    KVW_CHECK_PARAMS(p);
    const kvw_cache& c = p->cache;
    KVW_TRY(check_cache(c));
    KVW_REQUIRED(*p, from);
    KVW_REQUIRE(p->from != c.ring, SHAPE, from);
    KVW_REQUIRED(*p, slots);
    KVW_OPTIONAL(*p, first);
    KVW_OPTIONAL(*p, feedback);
    KVW_REQUIRE(p->from_slabs >= 1, SHAPE, from_slabs);
    KVW_REQUIRE(p->slots_stride >= 1, SHAPE, slots_stride);
    KVW_REQUIRE(p->max_slabs >= 1, SHAPE, max_slabs);
    KVW_REQUIRE(p->range >= 0.f && p->range <= 1.f, SHAPE, range);
    KVW_REQUIRE(p->reserved == 0, SHAPE, reserved);
    return KVW_OK;
}

size_t kvw_kv_gather_workspace(const kvw_kv_gather_params*) { return 0; }

// Of full launches: whole slabs, those past what the window needs packed in the narrowest format that has a pool.
size_t kvw_kv_gather_bytes(const kvw_kv_gather_params* p) {
    if (kvw_kv_gather_check(p) != KVW_OK) return 0;
    const kvw_cache& c = p->cache;
    size_t slabs = size_t(p->max_slabs), rows = slabs * TOKENS * (size_t(c.head_dim) * 4 + 4);
    size_t weights = p->feedback ? size_t(c.head_dim) * (c.head_dim - 1) : 0; // the lower half, f16
    size_t of_head = rows + slab_bytes_held(c, p->max_slabs, 0);
    return size_t(c.seqs) * c.kv_heads * of_head + c.kv_heads * weights;
}

kvw_status kvw_kv_gather(const kvw_kv_gather_params* p, kvw_stream stream) {
    KVW_TRY(kvw_kv_gather_check(p));
    switch (p->cache.head_dim) {
    case 64: return launch<64>(*p, stream);
    case 96: return launch<96>(*p, stream);
    case 128: return launch<128>(*p, stream);
    default: return launch<256>(*p, stream);
    }
}
