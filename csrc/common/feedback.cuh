// feedback.cuh - codes of K channel by channel, each making up for the rounding errors of those before it, bit for
// bit src/slab/codec.rs::encode_rounded: channel j rounds x_j + sum over i < j of M_ji e_i, summed in that order.
//
// A lane has tokens 2 lane and 2 lane + 1, so a group of 64 tokens is a warp and one of 32 half of it. The four
// warps take blocks of eight channels in turn: one is rounded while the others add what errors there are to
// their own, in even shares of the time that is left, and only those of the last block wait for it.
#pragma once
#include "pack.cuh"

namespace kvw {

template <int D> struct Feedback {
    static constexpr int BLOCK = 8, BLOCKS = D / BLOCK;
    static constexpr int BYTES = D * TOKENS * 5; // of shared memory: errors, codes

    const Packer<D>& packer;
    const __half* weights; // M [D, D] of the head
    float2* errors;        // [D][32], values before their channel's turn
    uint16_t* pairs;       // [D][32] of two codes, bytes
    int lane = packer.lane;

    PRIM Feedback(const Packer<D>& packer_, const void* weights_, unsigned char* shared)
        : packer(packer_),
          weights(static_cast<const __half*>(weights_)),
          errors(reinterpret_cast<float2*>(shared)),
          pairs(reinterpret_cast<uint16_t*>(shared + D * TOKENS * 4)) {}

    // Codes of K, and its scales and minima in `packer.meta`. Ends with a barrier.
    PRIM void run() const {
        float2 y[BLOCK];
        int own = packer.warp, done = 0; // next block of this warp, which has the errors of channels < done
        load(y, own);
#pragma unroll 1
        for (int turn = 0; turn < BLOCKS; turn++) {
            int left = own - turn, ready = turn * BLOCK;
            int until = left > 1 ? done + (ready - done) / left / BLOCK * BLOCK : ready;
            if (own < BLOCKS) {
#pragma unroll 1
                for (; done < until; done += BLOCK) make_up(y, own, done);
            }
            if (left == 0) {
                round(y, own);
                own += PACK_WARPS, done = 0;
                if (own < BLOCKS) load(y, own);
            }
            if (!KVW_FAULT(211)) __syncthreads();
        }
        join();
    }

private:
    PRIM void load(float2 (&y)[BLOCK], int block) const {
#pragma unroll
        for (int j = 0; j < BLOCK; j += 2) {
            int c = block * BLOCK + j;
            const unsigned char *even = packer.from + k_word<D>(2 * lane, c),
                                *odd = packer.from + k_word<D>(2 * lane + 1, c);
            float2 x[2] = {__half22float2(*reinterpret_cast<const __half2*>(even)),
                           __half22float2(*reinterpret_cast<const __half2*>(odd))};
            y[j] = make_float2(x[0].x, x[1].x), y[j + 1] = make_float2(x[0].y, x[1].y);
            errors[c * 32 + lane] = y[j], errors[(c + 1) * 32 + lane] = y[j + 1];
        }
    }

    PRIM static void add(float2& y, float weight, float2 error) {
        y.x = fmaf(weight, error.x, y.x), y.y = fmaf(weight, error.y, y.y);
    }

    // Errors of channels first .. first + 7 into all channels of a block.
    PRIM void make_up(float2 (&y)[BLOCK], int block, int first) const {
        uint4 rows[BLOCK];
#pragma unroll
        for (int j = 0; j < BLOCK; j++) rows[j] = prim::ldg128(weights + (block * BLOCK + j) * D + first);
#pragma unroll
        for (int i = 0; i < BLOCK; i += 2) {
            float2 low = errors[(first + i) * 32 + lane], high = errors[(first + i + 1) * 32 + lane];
#pragma unroll
            for (int j = 0; j < BLOCK; j++) {
                float2 weight = __half22float2(half2_of(component(rows[j], i / 2)));
                add(y[j], weight.x, low);
                add(y[j], weight.y, high);
            }
        }
    }

    // y[0] is the channel at hand: the others move up as its error is added to them.
    PRIM void round(float2 (&y)[BLOCK], int block) const {
#pragma unroll 1
        for (int c = block * BLOCK; c < (block + 1) * BLOCK; c++) {
            __half later[BLOCK - 1]; // its error's weights; those past the block land in what nobody reads
#pragma unroll
            for (int n = 0; n < BLOCK - 1; n++) later[n] = weights[min(c + 1 + n, D - 1) * D + c];
            float2 error = round_channel(c, {saturated(y[0].x), saturated(y[0].y)});
#pragma unroll
            for (int n = 0; n < BLOCK - 1; n++) {
                y[n] = y[n + 1];
                add(y[n], KVW_FAULT(215) ? 0.f : __half2float(later[n]), error);
            }
        }
    }

    // Codes, scale and minimum of what is wanted of channel c; the error that is left.
    PRIM float2 round_channel(int c, const float2& wanted) const {
        Interval x = {fminf(fminf(wanted.x, wanted.y), INFINITY),
                      fmaxf(fmaxf(wanted.x, wanted.y), -INFINITY)};
        int lanes = packer.l.k_group / 2; // of a group
        for (int n = 1; n < lanes; n *= 2) {
            x.low = fminf(x.low, __shfl_xor_sync(~0u, x.low, n));
            x.high = fmaxf(x.high, __shfl_xor_sync(~0u, x.high, n));
        }
        Scale s = packer.k_scale(x);
        if (lane % lanes == 0) packer.put_k_scale(lane / lanes, c, s);
        float scale = __half2float(s.scale), minimum = __half2float(s.minimum);
        float2 value = KVW_FAULT(214) ? wanted : errors[c * 32 + lane];
        float low = code_of(wanted.x, minimum, scale, packer.rounding.max_code);
        float high = code_of(wanted.y, minimum, scale, packer.rounding.max_code);
        float2 error = {value.x - fmaf(low, scale, minimum), value.y - fmaf(high, scale, minimum)};
        if (error.x != error.x) error.x = 0.f;
        if (error.y != error.y) error.y = 0.f;
        errors[c * 32 + lane] = error;
        pairs[c * 32 + lane] = uint16_t(uint32_t(low) | uint32_t(high) << 8);
        return error;
    }

    // Codes into words: a warp takes word w of both sides.
    PRIM void join() const {
        const unsigned char* codes = reinterpret_cast<const unsigned char*>(pairs);
        const int bits = packer.bits, slots = 16 / bits;
#pragma unroll 1
        for (int w = packer.warp; w < TOKENS / 16 * Packer<D>::PAIRS * bits / 16; w += PACK_WARPS) {
            uint32_t out[2] = {};
#pragma unroll 2
            for (int slot = 0; slot < slots; slot++) {
                int f = w * slots + slot, token = f / Packer<D>::PAIRS * 16 + packer.r;
                const unsigned char* at = codes + (f % Packer<D>::PAIRS * 8 + 2 * packer.t) * TOKENS + token;
                out[0] |= uint32_t(at[0] | at[TOKENS] << 16) << slot * bits;
                out[1] |= uint32_t(at[8] | at[TOKENS + 8] << 16) << slot * bits;
            }
            packer.put_words(0, w, out);
        }
    }
};

// The whole slab, K and V; `weights` null: each element for itself. Otherwise `shared` is Feedback<D>::BYTES long.
template <int D> PRIM void pack_whole(const Packer<D>& packer, const void* weights, unsigned char* shared) {
    const Span all = {0, TOKENS};
    packer.measure(!weights);
    if (weights)
        Feedback<D>(packer, weights, shared).run();
    else
        packer.template codes<true, false>(all);
    packer.template codes<false, false>(all);
    packer.put_meta();
}

} // namespace kvw
