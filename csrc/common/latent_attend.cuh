// latent_attend.cuh - attention of a CTA's warps to a tile of EliteKV's cache: 8 NT query heads, of z to each warp its
// channels.
//
// mma.m16n8k16 with swapped operands, as in attend.cuh: with r = lane / 4 and t = lane % 4 a lane owns
//   queries    channels 16 i + 2 t + {0, 1}, + 8 of head r         B fragments of Q K
//   scores     tokens r, r + 8, heads 2 t, 2 t + 1                 C fragments, partial: of the warp's channels
//   weights    tokens 2 t + {0, 1}, + 8 of head r                  B fragments of P V, from the sums of all warps
//   outputs    channels 16 i + r, + 8, heads 2 t, 2 t + 1          C fragments
#pragma once
#include "latent_ring.cuh"
#include "softmax.cuh"

namespace kvw {

constexpr int PITCH = 20; // floats of a head's 16 scores: neither their writes nor their reads meet in a bank

// Query heads of a CTA, and what its warps share.
template <int NT> struct Shared {
    static constexpr int HEADS = 8 * NT;

    unsigned char* rings;
    float* parts;  // [warp][HEADS][PITCH]
    float* scores; // [HEADS][PITCH]
    Item* items;
    int* count; // of items
};

template <int NT, int BLOCKS> struct Attention {
    static constexpr int HEADS = 8 * NT;
    static constexpr int CHAINS =
        NT <= 2 && NT * BLOCKS <= 19 ? 2 : 1; // of mma into one score, if registers allow

    uint2 q[BLOCKS][NT];    // B fragments of this warp's channels, column r
    float o[BLOCKS][NT][4]; // C fragments: channels 16 i + r, + 8, heads 8 n + 2 t, + 1
    float m[NT],
        l[NT]; // head 8 n + r: largest score, base 2, rounded up to a whole number; this lane's sum of p
    int r, t;

    PRIM void begin(const Lowrank& p, int s, int head, const LatentRing& ring) {
        r = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int h = head + 8 * n + r;
            const uint32_t* row =
                static_cast<const uint32_t*>(p.q) + (size_t(s) * query_rows(p) + h) * (p.cache.rank / 2);
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                const uint32_t* at = row + 8 * (ring.first + i) + t;
                bool ok = h < query_rows(p) && i < ring.count;
                q[i][n] = ok ? make_uint2(at[0], at[4]) : make_uint2(0, 0);
                o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.f;
            }
            m[n] = NO_SCORE, l[n] = 0.f;
        }
    }

    // What this warp's channels add to the raw scores of a tile, into its row of parts.
    PRIM void scores(const LatentRing& ring, unsigned char* buffer, float* part) const {
        int lane = int(threadIdx.x) % 32;
        float s[CHAINS][NT][4] = {};
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            if (i >= ring.count) break;
            uint32_t a[4];
            prim::ldsm_x4(a, buffer + i * BLOCK_BYTES + lane * 16);
#pragma unroll
            for (int n = 0; n < NT; n++) prim::mma_16816<__half>(s[i % CHAINS][n], a, q[i][n].x, q[i][n].y);
        }
#pragma unroll 1
        for (int i = 0; i < ring.item_count; i++) {
            uint32_t a[4];
            prim::ldsm_x4(a, ring.elite(buffer, i) + lane * 16);
            const Item& item = ring.items[i * LATENT_WARPS];
            uint2 b = item.words[lane];
            int tile = item.tile();
#pragma unroll
            for (int n = 0; n < NT; n++)
                if (n == tile) prim::mma_16816<__half>(s[0][n], a, b.x, b.y);
        }
#pragma unroll
        for (int i = 0; i < NT * 4; i++) {
            int head = 8 * (i / 4) + 2 * t + i % 2, token = r + i % 4 / 2 * 8;
            part[head * PITCH + token] =
                s[0][i / 4][i % 4] + (CHAINS == 2 ? s[CHAINS - 1][i / 4][i % 4] : 0.f);
        }
    }

    // Scores to probabilities relative to the running maximum: B fragments of P V.
    PRIM void softmax(const float* scores, uint32_t (&b)[NT][2]) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const float* row = scores + (8 * n + r) * PITCH + 2 * t;
            float2 x[2] = {*reinterpret_cast<const float2*>(row), *reinterpret_cast<const float2*>(row + 8)};
            float most = fmaxf(fmaxf(x[0].x, x[0].y), fmaxf(x[1].x, x[1].y));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            if (__any_sync(~0u, most > m[n])) rescale(n, most);
#pragma unroll
            for (int side = 0; side < 2; side++) {
                __half2 p = __floats2half2_rn(prim::exp2_approx(x[side].x - m[n]),
                                              prim::exp2_approx(x[side].y - m[n]));
                memcpy(&b[n][side], &p, 4);
                float2 rounded = __half22float2(p);
                l[n] += rounded.x + rounded.y;
            }
        }
    }

    PRIM void rescale(int n, float most) {
        float top = fmaxf(m[n], ceilf(most)), shrink = prim::exp2_approx(m[n] - top);
        m[n] = top, l[n] *= shrink;
        float even = __shfl_sync(~0u, shrink, 8 * t), odd = __shfl_sync(~0u, shrink, 8 * t + 4);
#pragma unroll
        for (int i = 0; i < BLOCKS && !KVW_FAULT(415); i++)
            o[i][n][0] *= even, o[i][n][1] *= odd, o[i][n][2] *= even, o[i][n][3] *= odd;
    }

    PRIM void values(const LatentRing& ring, unsigned char* buffer, const uint32_t (&b)[NT][2]) {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            if (i >= ring.count) break;
            uint32_t x[4];
            prim::ldsm_x4_trans(x, buffer + i * BLOCK_BYTES + int(threadIdx.x) % 32 * 16);
            const int swap = KVW_FAULT(414) ? 1 : 2;
            const uint32_t a[4] = {x[0], x[swap], x[3 - swap], x[3]};
#pragma unroll
            for (int n = 0; n < NT; n++) prim::mma_16816<__half>(o[i][n], a, b[n][0], b[n][1]);
        }
    }

    // l of all tokens of the head, in every lane of its row.
    PRIM void total() {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            l[n] += __shfl_xor_sync(~0u, l[n], 1);
            l[n] += __shfl_xor_sync(~0u, l[n], 2);
        }
    }

    // The heads' outputs, where the CTA had all of the sequence.
    PRIM void write(const Lowrank& p, int s, int head, const LatentRing& ring) const {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float inverse = l[n] > 0.f ? 1.f / l[n] : 0.f;
            float even = __shfl_sync(~0u, inverse, 8 * t), odd = __shfl_sync(~0u, inverse, 8 * t + 4);
            int h = head + 8 * n + r;
            size_t row = size_t(s) * query_rows(p) + h;
            if (p.lse && h < query_rows(p) && threadIdx.x < 32 && t == 0)
                p.lse[row] = log_sum_exp({make_float4(0.f, 0.f, 0.f, 0.f), m[n], l[n]});
            uint32_t* out = static_cast<uint32_t*>(p.out) + row * (p.cache.rank / 2);
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                if (i >= ring.count) break;
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    __half2 pair = __floats2half2_rn(o[i][n][2 * side] * even, o[i][n][2 * side + 1] * odd);
                    uint32_t word;
                    memcpy(&word, &pair, 4);
                    word = prim::movmatrix_trans(word); // channels 16 i + 8 side + 2 t, + 1 of head 8 n + r
                    if (h < query_rows(p)) out[8 * (ring.first + i) + 4 * side + t] = word;
                }
            }
        }
    }

    // A block of partial rows: m, l, two unused, c sums.
    PRIM void store(const Lowrank& p, const LatentRing& ring, float* block) const {
        const int stride = p.cache.rank + ROW_EXTRA;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            if (threadIdx.x < 32 && t == 0)
                *reinterpret_cast<float2*>(block + (8 * n + r) * stride) = make_float2(m[n], l[n]);
            float* row = block + (8 * n + 2 * t) * stride + ROW_EXTRA + 16 * ring.first + r;
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                if (i >= ring.count) break;
#pragma unroll
                for (int e = 0; e < 4; e++) row[e % 2 * stride + 16 * i + e / 2 * 8] = o[i][n][e];
            }
        }
    }
};

// Adds the warps' parts, in order, and makes scores of them: base 2, minus infinity past the query's own token, of
// `live` that are held from here on.
template <int NT>
PRIM void add_parts(const Lowrank& p, int head, const Shared<NT>& shared, float unit, int live) {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < Shared<NT>::HEADS * TILE_TOKENS; i += 32 * LATENT_WARPS) {
        int at = i / TILE_TOKENS * PITCH + i % TILE_TOKENS;
        float sum = 0.f;
#pragma unroll 4
        for (int w = 0; w < LATENT_WARPS - KVW_FAULT(420); w++)
            sum += shared.parts[w * Shared<NT>::HEADS * PITCH + at];
        int later = p.q_len == 1 ? 0 : p.q_len - 1 - (head + i / TILE_TOKENS) / p.q_heads - KVW_FAULT(431);
        shared.scores[at] = i % TILE_TOKENS < live - later ? sum * unit : -INFINITY;
    }
}

// B fragments of the elite queries of sequence `s`: zero but where a head's own keys lie.
template <int NT> PRIM void elite_words(const Lowrank& p, int s, int head, const Shared<NT>& shared) {
    const kvw_latent& c = p.cache;
    int width = 2 * c.pairs, group = p.q_heads / c.kv_heads;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < *shared.count * 32; i += 32 * LATENT_WARPS) {
        Item& item = shared.items[i / 32];
        int r = i % 32 / 4, t = i % 4, h = head + 8 * item.tile() + r, own = h % p.q_heads;
        int kv = own / group * !KVW_FAULT(419);
        int64_t token = int64_t(s) * p.q_len + h / p.q_heads;
        const __half* q = static_cast<const __half*>(p.q_elite) + token * p.q_elite_stride +
                          int64_t(own) * p.head_stride;
        uint32_t word[2];
#pragma unroll
        for (int side = 0; side < 2; side++) {
            int column = item.column() + side, e = column * COLUMN + 2 * t - c.rank - kv * width;
            bool ok = h < query_rows(p) && column >= item.counts_from() && e >= 0 && e < width;
            word[side] = ok ? *reinterpret_cast<const uint32_t*>(q + e) : 0;
        }
        item.words[i % 32] = make_uint2(word[0], word[1]);
    }
}

} // namespace kvw
