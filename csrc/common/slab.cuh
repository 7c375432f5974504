// slab.cuh - where everything lies in a slab, and where slab i of a (sequence, head) lies in memory.
//
// A slab is four sections: K codes, K metadata, V codes, V metadata (f16 and fp8 have no metadata). With r = lane / 4,
// t = lane % 4 and tiles of 16 tokens, a pair is two neighbouring elements of one lane, the halves of a word:
//   K pair (tile, j, side)   token 16 tile + r + 8 side,          channels 8 j + 2 t + {0, 1}
//   V pair (tile, j, side)   tokens 16 tile + 2 t + {0, 1} + 8 side,   channel 8 j + r
// A lane numbers the pairs of one side f = tile * D / 8 + j. A word holds SLOTS of them: pair f is slot
// f % SLOTS of word f / SLOTS. Words come in 16-byte units a lane, two words of each side:
//   unit f / (2 SLOTS) of lane l is 16 bytes at (unit * 32 + l) * 16, components (word 0 side 0, word 0 side
//   1, word 1 side 0, word 1 side 1)
// so that one unit feeds whole A fragments of mma.m16n8k16; at 16 bits a unit of K is one fragment.
// K metadata: for each group of tokens, scales then minima, f16 pairs (channels 8 j + 2 t + {0, 1}) in units
// [j / 4][t], component j % 4. V metadata: scales then minima, f16 pairs of tokens, [tile][t][group][side].
// Two-level metadata (KVW_META_U8) is the same in bytes: two neighbouring pairs, j and j + 1 of K or the sides
// of V, share a word as the pairs of 8-bit codes do; f32 steps at the slab's end say what a byte stands for:
//   scale = byte * step of scales,   minimum = byte * step of minima + base
// Steps are powers of two and the base is a multiple of its step below 1024 of them, so that both are f16.
#pragma once
#include "prim.cuh"
#include "../slab.h"

namespace kvw {

constexpr int TOKENS = KVW_SLAB_TOKENS;
constexpr int UNIT_BYTES = 16 * 32; // a unit of all lanes
constexpr int STEPS_BYTES = 32;     // of K: step of scales, step and base of minima, 0; then of V; f32

// In a template's GROUP: metadata is KVW_META_U8. GROUP 0: group and metadata are those of the cache at run time.
constexpr int U8_META = KVW_META_U8 << 8;

__host__ __device__ constexpr int code_bits(int format) {
    if (format == KVW_SLAB_F16) return 16;
    return format == KVW_SLAB_Q4 ? 4 : format == KVW_SLAB_Q2 ? 2 : 8;
}

__host__ __device__ constexpr bool has_meta(int format) {
    return format == KVW_SLAB_Q8 || format == KVW_SLAB_Q4 || format == KVW_SLAB_Q2;
}

// Groups, and offsets in bytes from the slab's start unless said otherwise.
struct Layout {
    int k_group, v_group;   // tokens, channels; the last group of channels may be shorter
    int k_groups, v_groups; // of a slab, of a token
    int code_bytes;         // of K, and of V
    int k_meta, k_group_bytes;
    int k_minima; // from the scales of the same group
    int v_codes, v_meta, v_meta_bytes;
    int v_minima; // from v_meta
    int steps;    // of two-level metadata
    int bytes;
};

__host__ __device__ constexpr Layout layout_of(int format, int d, int group, int meta) {
    bool two_level = has_meta(format) && meta == KVW_META_U8;
    int width = has_meta(format) ? two_level ? 1 : 2 : 0; // bytes of a scale, and of a minimum
    Layout l{};
    l.k_group = group < TOKENS ? group : TOKENS;
    l.v_group = group < d ? group : d;
    l.k_groups = TOKENS / l.k_group;
    l.v_groups = (d + l.v_group - 1) / l.v_group;
    l.code_bytes = TOKENS * d * code_bits(format) / 8;
    l.k_meta = l.code_bytes;
    l.k_minima = width * d;
    l.k_group_bytes = 2 * l.k_minima;
    l.v_codes = l.k_meta + l.k_groups * l.k_group_bytes;
    l.v_meta = l.v_codes + l.code_bytes;
    l.v_minima = width * TOKENS * l.v_groups;
    l.v_meta_bytes = 2 * l.v_minima;
    l.steps = l.v_meta + l.v_meta_bytes;
    l.bytes = two_level ? l.steps + STEPS_BYTES : (l.steps + 127) / 128 * 128;
    return l;
}

// The same for a group known at run time: one of three constants, without the divisions.
template <int FORMAT, int D, int META> PRIM Layout layout_of(int group) {
    if (group == 32) return layout_of(FORMAT, D, 32, META);
    if (group == 64) return layout_of(FORMAT, D, 64, META);
    return layout_of(FORMAT, D, 128, META);
}

// The same at compile time.
template <int FORMAT, int D, int GROUP> struct Slab {
    static constexpr Layout LAYOUT = layout_of(FORMAT, D, GROUP % U8_META, GROUP / U8_META);
    static constexpr bool QUANTISED = has_meta(FORMAT);
    static constexpr bool TWO_LEVEL = QUANTISED && GROUP >= U8_META;
    static constexpr int BITS = code_bits(FORMAT);
    static constexpr int SLOTS = 16 / BITS; // pairs a word
    static constexpr int K_GROUP = LAYOUT.k_group, V_GROUP = LAYOUT.v_group;
    static constexpr int K_GROUPS = LAYOUT.k_groups, V_GROUPS = LAYOUT.v_groups;
    static constexpr int CODE_BYTES = LAYOUT.code_bytes;
    static constexpr int K_META = LAYOUT.k_meta, K_GROUP_BYTES = LAYOUT.k_group_bytes;
    static constexpr int K_MINIMA = LAYOUT.k_minima, V_MINIMA = LAYOUT.v_minima;
    static constexpr int V_CODES = LAYOUT.v_codes, V_META = LAYOUT.v_meta;
    static constexpr int STEPS = LAYOUT.steps;
    static constexpr int BYTES = LAYOUT.bytes;
};

// 0 = not supported.
__host__ __device__ constexpr size_t slab_bytes(int format, int d, int group, int meta) {
    if (format < 0 || format >= KVW_SLAB_FORMATS || (d != 64 && d != 96 && d != 128 && d != 256)) return 0;
    if (group != 32 && group != 64 && (group != 128 || meta == KVW_META_U8)) return 0;
    if (meta != KVW_META_F16 && meta != KVW_META_U8) return 0;
    if (meta == KVW_META_U8 && (format == KVW_SLAB_Q8 || format == KVW_SLAB_FP8)) return 0;
    return size_t(layout_of(format, d, group, meta).bytes);
}

constexpr int ring_slabs(int window) { return int((int64_t(window) + 126) / 64); }

// Address of a slab with its format in the low bits (pools are 16-byte aligned); 0 where there is no slab.
using SlabAddress = uint64_t;
constexpr SlabAddress FORMAT_BITS = 15;

PRIM int format_of(SlabAddress a) { return int(a & FORMAT_BITS); }
PRIM unsigned char* bytes_of(SlabAddress a) { return reinterpret_cast<unsigned char*>(a & ~FORMAT_BITS); }

// Slabs in the table of the heads of entry `at` of lens, which hold `len` tokens.
PRIM int packed_slabs(const kvw_cache& c, int at, int len) {
    return c.packed ? c.packed[at] : max(0, (len - c.window) / TOKENS);
}

// Slabs of one (sequence, head). D and GROUP are the cache's.
template <int D, int GROUP> struct Head {
    const kvw_cache& cache;
    const uint32_t* row; // its table entries; null where nothing is packed
    unsigned char* ring; // its ring_slabs f16 slabs
    int head, len, packed;

    PRIM Head(const kvw_cache& c, int s, int h) : cache(c), head(h) {
        int at = c.lens_heads == 1 ? s : s * c.kv_heads + h;
        len = c.lens[at];
        packed = packed_slabs(c, at, len);
        size_t first = c.indptr ? size_t(c.indptr[s]) : size_t(s) * c.table_heads * c.table_stride;
        if (c.table_heads != 1) first += size_t(h) * c.table_stride;
        row = c.table ? c.table + first : nullptr;
        ring = static_cast<unsigned char*>(c.ring) + (size_t(s) * c.kv_heads + h) * c.ring_slabs * F16_BYTES;
    }

    PRIM int slabs() const { return (len + TOKENS - 1) / TOKENS; }

    // Slab 0 <= i < slabs().
    PRIM SlabAddress slab(int i) const {
        if (i >= packed) {
            return reinterpret_cast<SlabAddress>(ring + size_t((i + KVW_FAULT(105)) % cache.ring_slabs) *
                                                            F16_BYTES) |
                   KVW_SLAB_F16;
        }
        return row ? entry(row[i]) : 0;
    }

    // What a table entry stands for: a shared row's entry e is slab e * H + h of its pool.
    PRIM SlabAddress entry(uint32_t e) const {
        uint32_t format = e >> KVW_ENTRY_SHIFT;
        if (format == KVW_SLAB_F16) return in_pool<KVW_SLAB_F16>(e);
        if (format == KVW_SLAB_Q8) return in_pool<KVW_SLAB_Q8>(e);
        if (format == KVW_SLAB_Q4) return in_pool<KVW_SLAB_Q4>(e);
        if (format == KVW_SLAB_Q2) return in_pool<KVW_SLAB_Q2>(e);
        if (format == KVW_SLAB_FP8) return in_pool<KVW_SLAB_FP8>(e);
        return 0; // a hole
    }

private:
    static constexpr int F16_BYTES = Slab<KVW_SLAB_F16, D, 32>::BYTES;

    template <int FORMAT> PRIM SlabAddress in_pool(uint32_t e) const {
        size_t index = e & KVW_ENTRY_INDEX;
        size_t bytes = GROUP                ? Slab < FORMAT, D,
               GROUP ? GROUP : 32 > ::BYTES : layout_of(FORMAT, D, cache.group, cache.meta).bytes;
        if (cache.table_heads == 1) index = index * cache.kv_heads + head;
        if (!cache.pools[FORMAT]) return 0;
        return reinterpret_cast<SlabAddress>(static_cast<unsigned char*>(cache.pools[FORMAT]) +
                                             index * bytes) |
               FORMAT;
    }
};

} // namespace kvw
