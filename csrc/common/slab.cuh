// slab.cuh - where everything lies in a slab, and where slab i of a (sequence, head) lies in memory.
//
// A slab is four sections: K codes, K metadata, V codes, V metadata (f16 has no metadata). With r = lane / 4,
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
#pragma once
#include "prim.cuh"
#include "../kvwarp.h"

namespace kvw {

constexpr int TOKENS = KVW_SLAB_TOKENS;
constexpr int UNIT_BYTES = 16 * 32; // a unit of all lanes

__host__ __device__ constexpr int code_bits(int format) {
    return format == KVW_SLAB_F16 ? 16 : format == KVW_SLAB_Q8 ? 8 : format == KVW_SLAB_Q4 ? 4 : 2;
}

// Layout of slabs of FORMAT; all offsets are bytes from the slab's start.
template <int FORMAT, int D, int GROUP> struct Slab {
    static constexpr bool QUANTISED = FORMAT != KVW_SLAB_F16;
    static constexpr int BITS = code_bits(FORMAT);
    static constexpr int SLOTS = 16 / BITS;                         // pairs a word
    static constexpr int K_GROUP = GROUP < TOKENS ? GROUP : TOKENS; // tokens
    static constexpr int V_GROUP = GROUP < D ? GROUP : D;           // channels; the last group may be shorter
    static constexpr int K_GROUPS = TOKENS / K_GROUP;
    static constexpr int V_GROUPS = (D + V_GROUP - 1) / V_GROUP;
    static constexpr int CODE_BYTES = TOKENS * D * BITS / 8; // of K, and of V
    static constexpr int K_META = CODE_BYTES;
    static constexpr int K_GROUP_BYTES = 4 * D; // 2 D of scales, 2 D of minima
    static constexpr int K_MINIMA = 2 * D;      // from the scales of the same group
    static constexpr int V_CODES = K_META + (QUANTISED ? K_GROUPS * K_GROUP_BYTES : 0);
    static constexpr int V_META = V_CODES + CODE_BYTES;
    static constexpr int V_META_BYTES = QUANTISED ? TOKENS * V_GROUPS * 4 : 0;
    static constexpr int V_MINIMA = V_META_BYTES / 2; // from V_META
    static constexpr int BYTES = (V_META + V_META_BYTES + 127) / 128 * 128;
};

// The same size where the shape is known at run time only; 0 = not supported.
__host__ __device__ constexpr size_t slab_bytes(int format, int d, int group) {
    bool known = format >= KVW_SLAB_F16 && format <= KVW_SLAB_Q2;
    if (!known || (d != 64 && d != 96 && d != 128 && d != 256)) return 0;
    if (group != 32 && group != 64 && group != 128) return 0;
    int k_groups = group < TOKENS ? TOKENS / group : 1, v_groups = (d + group - 1) / group;
    int meta = format == KVW_SLAB_F16 ? 0 : k_groups * d * 4 + TOKENS * v_groups * 4;
    return size_t(2 * TOKENS * d * code_bits(format) / 8 + meta + 127) / 128 * 128;
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
        if (format == KVW_SLAB_F16) return in_pool(KVW_SLAB_F16, F16_BYTES, e);
        if (format == KVW_SLAB_Q8) return in_pool(KVW_SLAB_Q8, Slab<KVW_SLAB_Q8, D, GROUP>::BYTES, e);
        if (format == KVW_SLAB_Q4) return in_pool(KVW_SLAB_Q4, Slab<KVW_SLAB_Q4, D, GROUP>::BYTES, e);
        if (format == KVW_SLAB_Q2) return in_pool(KVW_SLAB_Q2, Slab<KVW_SLAB_Q2, D, GROUP>::BYTES, e);
        return 0; // a hole
    }

private:
    static constexpr int F16_BYTES = Slab<KVW_SLAB_F16, D, GROUP>::BYTES;

    PRIM SlabAddress in_pool(int format, int bytes, uint32_t e) const {
        size_t index = e & KVW_ENTRY_INDEX;
        if (cache.table_heads == 1) index = index * cache.kv_heads + head;
        if (!cache.pools[format]) return 0;
        return reinterpret_cast<SlabAddress>(static_cast<unsigned char*>(cache.pools[format]) +
                                             index * bytes) |
               format;
    }
};

} // namespace kvw
