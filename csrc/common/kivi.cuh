// kivi.cuh - KIVI's own schedule (arXiv:2402.02750): parts of a slab are quantised while it is still in the ring.
#pragma once
#include "feedback.cuh"

namespace kvw {

template <int D> constexpr int V_SECTION = Slab<KVW_SLAB_F16, D, 32>::V_CODES;

template <int D> PRIM __half& v_element(unsigned char* slab, int token, int channel) {
    return *reinterpret_cast<__half*>(slab + V_SECTION<D> + v_word<D>(token, channel) + token % 2 * 2);
}

// KIVI: V of one token, by one warp. Lane (r, q) takes channels 8 j + r, j = q mod 4; of the lanes whose codes
// share a word the first joins them into it. This token owns one half of the word at most.
template <int D> PRIM void pack_value(const Packer<D>& packer, int token) {
    constexpr int PAIRS = D / 8;
    const Layout& l = packer.l;
    const int bits = packer.bits, slots = 16 / bits, max_code = packer.rounding.max_code;
    const int share = min(slots, 4); // lanes
    const int group_pairs = l.v_group / 8;
    int lane = int(threadIdx.x) % 32, r = lane / 4, q = lane % 4;
    int tile = token / 16, t = token % 8 / 2, side = token % 16 / 8, e = token % 2;
#pragma unroll 1
    for (int first = 0; first < PAIRS; first += group_pairs) {
        int end = min(first + group_pairs, PAIRS);
        float low = INFINITY, high = -INFINITY;
        for (int j = first + q; j < end; j += 4) {
            float x = __half2float(v_element<D>(packer.from, token, 8 * j + r));
            low = fminf(low, x);
            high = fmaxf(high, x);
        }
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            low = fminf(low, __shfl_xor_sync(~0u, low, lanes));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, lanes));
        }
        __half scale = group_scale(low, high, max_code), min = __float2half_rn(low + 0.f);
        int pair = ((tile * 4 + t) * l.v_groups + first / group_pairs) * 2 + side;
        __half* meta = reinterpret_cast<__half*>(packer.to + l.v_meta) + 2 * pair + e;
        if (lane == 0) meta[0] = scale, meta[l.v_minima / 2] = min;
        for (int j0 = first; j0 < end; j0 += 4) {
            __half& x = v_element<D>(packer.from, token, 8 * (j0 + q) + r);
            float code = code_of(__half2float(x), low, __half2float(scale), max_code);
            x = half_saturated(fmaf(code, __half2float(scale), __half2float(min)));
            int f = tile * PAIRS + j0 + q, word = f * bits / 16, shift = (f * bits & 15) + 16 * e;
            uint32_t codes = uint32_t(code) << shift, mask = ((1u << bits * share) - 1) << shift;
            for (int lanes = 1; lanes < share; lanes *= 2) codes |= __shfl_xor_sync(~0u, codes, lanes);
            if (KVW_FAULT(207)) mask |= mask << 16 | mask >> 16;
            unsigned char* at =
                packer.to + l.v_codes + (word / 2 * 32 + r * 4 + t) * 16 + (2 * (word % 2) + side) * 4;
            uint32_t* own = reinterpret_cast<uint32_t*>(at);
            if (q % share == 0) *own = (*own & ~mask) | codes;
        }
    }
}

// KIVI: K of `keys` and V of `values`, tokens of slab i, in the table's format. The tokens of one lane's
// words, (t, side), stay with one warp, one after the other.
template <int D> PRIM void advance(const Packer<D>& packer, Span keys, Span values) {
    if (keys.from < keys.until) packer.pack_keys(keys);
    for (int token = values.from; token < values.until; token++) {
        int words = token % 16 / 2; // t + 4 * side
        if (words % PACK_WARPS == packer.warp) pack_value(packer, token);
    }
    __syncthreads(); // meta is free again
}

PRIM Span within(int slab, int from, int until) {
    return {min(max(from - slab * TOKENS, 0), TOKENS), min(max(until - slab * TOKENS, 0), TOKENS)};
}

} // namespace kvw
