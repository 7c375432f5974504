// attend.cuh - attention of one warp: NT * 8 query columns against steps of 16 to 64 tokens in shared memory.
//
// mma.m16n8k16 with swapped operands: K tokens and V channels are the 16 rows (A, straight from slab bytes),
// query columns are the 8 columns (B). With r = lane / 4 and t = lane % 4 a lane owns
//   queries    channels 8 j + 2 t + {0, 1} of column r            words j, B fragments of K's mma
//   scores     tokens r, r + 8 of a tile, columns 2 t, 2 t + 1    C fragments
//   outputs    channels 16 i + r, + 8, columns 2 t, 2 t + 1       C fragments of V's mma
// Codes enter the mma as subnormals (codec.cuh). Their powers of two and the scales are folded into the B
// side: K's scale and power into the query words, V's scale into the probabilities; V's power stays in the
// accumulator until the format changes. At 8 bits scales are small, so that their products would lose bits as
// f16 subnormals: both factors are made larger by a power of two first. q . minima of a K group is D / 16 more
// mma whose result every row shares; V's minima and the sum of probabilities share one more mma a tile of
// tokens (rows 0 to 7: minima of V groups; rows 8 to 15: ones).
//
// Two-level metadata: bytes enter as subnormals too (K's scales, all minima), or as 1024 + byte less 1024 times
// the probability (V's scales: one rounding, and no loss where both are small). K's steps are in the unit of
// scores, and its minima's base times the sum of a query. V's step of scales multiplies the probabilities of its
// slab, relative to `v_step`, the step that outputs are multiples of: that follows the slabs' steps only where
// one is not within 2^0 to 2^5 of it, so that probabilities neither overflow nor lose bits in f16. Sums of
// minima and of probabilities are made for each slab and scaled when it is done.
#pragma once
#include "meta.cuh"
#include "queries.cuh"
#include "slab.cuh"
#include "softmax.cuh"

namespace kvw {

// tanh within 3e-6 of itself; tanhf takes three times the instructions and too many registers.
PRIM float tanh_close(float x) {
    float large = fmaf(-2.f, prim::rcp_approx(prim::exp2_approx(2.f * LOG2_E * x) + 1.f), 1.f), y = x * x;
    float small = x * fmaf(y, fmaf(y, 2.f / 15.f, -1.f / 3.f), 1.f);
    return y < 0.03f ? small : large;
}

template <int D, int GROUP, int NT> struct Attend {
    static constexpr int WORDS = D / 8;
    static constexpr bool TWO_LEVEL = GROUP >= U8_META;

    Queries<D, NT, GROUP / U8_META> q;
    float o[NT][D / 16][4]; // sums of p * v, rows of channel word j times 2^code_exponent(j) of `format`
    float z[NT][4];         // 0, 1: sums of p * minimum of V group r; 2, 3: sums of p
    float m[NT][2];         // columns 2 t, 2 t + 1: largest score, base 2, rounded up to a whole number
    float k[NT][2];         // base-2 score of a raw score of 1
    float q_sum[NT][2];     // two-level metadata: of the query words
    int r, t, format;
    int v_step = 0; // two-level metadata: log2 of the step of scales that outputs are multiples of

    // Columns r of the NT tiles, of which pair(n, j) gives channels 8 j + 2 t + {0, 1}.
    template <class Pair> PRIM void begin(Pair pair, float scale, uint4* shared, bool write) {
        int lane = threadIdx.x % 32;
        r = lane / 4, t = lane % 4, format = KVW_SLAB_F16;
        q.shared = shared + lane;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float mine = scale * LOG2_E * power_of_two(q.load(n, pair, write));
#pragma unroll
            for (int c = 0; c < 2; c++) {
                k[n][c] = __shfl_sync(~0u, mine, (2 * t + c) * 4);
                m[n][c] = NO_SCORE;
                if (TWO_LEVEL) q_sum[n][c] = __shfl_sync(~0u, q.sums[TWO_LEVEL ? n : 0], (2 * t + c) * 4);
            }
#pragma unroll
            for (int c = 0; c < 4; c++) z[n][c] = 0.f;
#pragma unroll
            for (int i = 0; i < D / 16 * 4; i++) o[n][i / 4][i % 4] = 0.f;
        }
    }

    // Makes the outputs multiples of what codes of format `to` read as; KVW_SLAB_F16: the outputs themselves.
    PRIM void use_format(int to) {
        if (to == format || KVW_FAULT(111)) return; // 111: formats read alike
        float change[4];
#pragma unroll
        for (int j = 0; j < 4; j++) change[j] = power_of_two(exponent(to, j) - exponent(format, j) + v_step);
        v_step = 0;
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < D / 16 * 4; i++) o[n][i / 4][i % 4] *= change[i / 4 % 2 * 2 + i % 4 / 2];
        }
        format = to;
    }

    // Brings `v_step` near a slab's step 2^e; returns what probabilities are to be multiplied by, log2.
    PRIM int use_step(int e) {
        if (e < v_step || e > v_step + 5) {
            float change = power_of_two(v_step - (e - 2));
#pragma unroll
            for (int i = 0; i < NT * (D / 16) * 4; i++) o[i / (D / 4)][i / 4 % (D / 16)][i % 4] *= change;
            v_step = e - 2;
        }
        return e - v_step;
    }

    // One step of TILES * 16 tokens: `kc` its K section (metadata after the codes), `vc` its V section. Where
    // `edge`, adjust(s, unit) first changes the raw scores s, in units of `unit`: mask() and its like.
    template <int FORMAT, int TILES, class Adjust>
    PRIM void step(const unsigned char* kc, const unsigned char* vc, bool edge, Adjust adjust) {
        using S = Slab<FORMAT, D, GROUP>;
        float s[TILES][NT][4];
        if constexpr (S::TWO_LEVEL) {
            const float4* steps = reinterpret_cast<const float4*>(kc + S::STEPS);
            float unit = steps[0].x * float(1 << 29),
                  inverse = __int_as_float(0x7F000000 - __float_as_int(unit));
            scores<FORMAT>(kc, steps[0].y * float(1 << 24) * inverse, steps[0].z * inverse, s);
            if (edge) adjust(s, unit);
            int lift = use_step((__float_as_int(steps[1].x) >> 23) - 127);
            softmax<true>(s, unit, float(lift));
            values<FORMAT>(vc, power_of_two(-lift), s);
        } else {
            scores<FORMAT>(kc, 1.f / score_unit<FORMAT>, 0.f, s);
            if (edge) adjust(s, score_unit<FORMAT>);
            softmax<false>(s, score_unit<FORMAT>, 0.f);
            values<FORMAT>(vc, 1.f, s);
        }
    }

    // Column c of tile n sees the step's tokens from[n][c] .. to[n][c] - 1 only.
    template <int TILES>
    PRIM void mask(float (&s)[TILES][NT][4], const int (&from)[NT][2], const int (&to)[NT][2]) const {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < NT * 4; i++) {
                int token = 16 * tile + r + i % 4 / 2 * 8, n = i / 4, c = i % 2;
                if (token < from[n][c] || token >= to[n][c]) s[tile][n][i % 4] = -INFINITY;
            }
        }
    }

    // Scores times by_token[token], of the step's first `live` tokens.
    template <int TILES>
    PRIM void scale_tokens(float (&s)[TILES][NT][4], const float* by_token, int live) const {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int side = 0; side < 2; side++) {
                int token = 16 * tile + r + 8 * side;
                float norm = token < live ? __ldg(by_token + token + KVW_FAULT(138)) : 1.f;
#pragma unroll
                for (int n = 0; n < NT; n++) s[tile][n][2 * side] *= norm, s[tile][n][2 * side + 1] *= norm;
            }
        }
    }

    // Scores x become cap * tanh(x / cap).
    template <int TILES> PRIM void soften(float (&s)[TILES][NT][4], float unit, float cap) const {
#pragma unroll
        for (int i = 0; i < NT * 4; i++) {
            int n = i / 4, c = i % 4;
            // A raw score to x / cap, and back.
            float down = k[n][c % 2] * unit * prim::rcp_approx(cap * LOG2_E), up = prim::rcp_approx(down);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) s[tile][n][c] = tanh_close(s[tile][n][c] * down) * up;
        }
    }

    // Writes column c of all tiles as partial row c of `rows`, D + ROW_EXTRA floats each.
    PRIM void store(float* rows) const {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float* row = rows + (8 * n + 2 * t + c) * (D + ROW_EXTRA);
#pragma unroll
                for (int i = 0; i < D / 16; i++) {
                    float minimum = __shfl_sync(~0u, z[n][c], 16 * i / V_GROUP * 4 + t);
                    row[16 * i + r] = o[n][i][c] + minimum;
                    row[16 * i + r + 8] = o[n][i][2 + c] + minimum;
                }
                if (r == 0) row[D] = m[n][c], row[D + 1] = z[n][2 + c];
            }
        }
    }

private:
    static constexpr int V_GROUP = Slab<KVW_SLAB_Q2, D, GROUP>::V_GROUP;
    // What a product of a folded query and a code as it reads is a fraction of.
    template <int FORMAT>
    static constexpr float score_unit = FORMAT == KVW_SLAB_F16   ? 1.f
                                        : FORMAT == KVW_SLAB_FP8 ? float(1 << 8)
                                        : FORMAT == KVW_SLAB_Q8  ? float(1 << 14)
                                                                 : float(1 << 20);
    // log2 of what probabilities are multiplied by before V's scale.
    template <int FORMAT> static constexpr int V_FOLD = FORMAT == KVW_SLAB_Q8 ? 6 : 0;

    // log2 of the output that code 1 of pair j adds at scale 1 and probability 1.
    PRIM static int exponent(int f, int j) {
        if (f == KVW_SLAB_Q8) return code_exponent<8>(j) + (KVW_FAULT(115) ? 0 : V_FOLD<KVW_SLAB_Q8>);
        if (f == KVW_SLAB_FP8) return KVW_FAULT(117) ? 0 : -8;
        return f == KVW_SLAB_F16 ? 0 : f == KVW_SLAB_Q4 ? code_exponent<4>(j) : code_exponent<2>(j);
    }

    // Pair f of a side, out of the unit that holds it.
    template <int FORMAT> PRIM static uint32_t pair(const uint4& unit, int f, int side) {
        constexpr int SLOTS = Slab<FORMAT, D, GROUP>::SLOTS;
        uint32_t word = component(unit, f / SLOTS % 2 * 2 + side);
        if (FORMAT == KVW_SLAB_FP8) return e4m3_pair(word, f % SLOTS);
        return unpack<Slab<FORMAT, D, GROUP>::BITS>(word, f % SLOTS);
    }

    // Raw scores of the step. A raw 1 of a minimum as it reads counts `least`, a query's sum `base`.
    template <int FORMAT, int TILES>
    PRIM void scores(const unsigned char* kc, float least, float base, float (&s)[TILES][NT][4]) const {
        using S = Slab<FORMAT, D, GROUP>;
        constexpr int GROUPS = S::QUANTISED ? S::K_GROUPS : 1, PER_GROUP = TILES / GROUPS;
        constexpr int BLOCK = WORDS < 16 ? WORDS : 16; // query words scaled at a time
        const uint4* codes = reinterpret_cast<const uint4*>(kc) + threadIdx.x % 32;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int group = KVW_FAULT(104) ? 0 : g; // the wrong group's scale
            const unsigned char* scales = kc + S::K_META + group * S::K_GROUP_BYTES;
            float constant[NT][4] = {};
            if constexpr (S::QUANTISED) minima<S>(scales + S::K_MINIMA, least, base, constant);
#pragma unroll
            for (int i = 0; i < PER_GROUP * NT * 4; i++) {
                s[g * PER_GROUP + i / (NT * 4)][i / 4 % NT][i % 4] = constant[i / 4 % NT][i % 4];
            }
#pragma unroll
            for (int block = 0; block < WORDS; block += BLOCK) {
                uint4 b[NT][BLOCK / 4];
#pragma unroll
                for (int i = 0; i < BLOCK / 4; i++) {
                    uint4 scale = S::QUANTISED ? k_meta<S>(scales, block / 4 + i, t) : uint4{};
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        uint4 f = q.template folded<FORMAT>(n, block / 4 + i);
                        if (S::QUANTISED) {
                            f = make_uint4(mul2(f.x, scale.x), mul2(f.y, scale.y), mul2(f.z, scale.z),
                                           mul2(f.w, scale.w));
                        }
                        b[n][i] = f;
                    }
                }
#pragma unroll
                for (int tile = g * PER_GROUP; tile < (g + 1) * PER_GROUP; tile++) {
                    uint4 unit;
#pragma unroll
                    for (int j = 0; j < BLOCK; j += 2) {
                        int f = tile * WORDS + block + j;
                        if (j == 0 || f % (2 * S::SLOTS) == 0) unit = codes[f / (2 * S::SLOTS) * 32];
                        const int swap = KVW_FAULT(102); // fragment registers 1 and 2 swapped
                        const uint32_t a[4] = {
                            pair<FORMAT>(unit, f, 0), pair<FORMAT>(unit, f + swap, 1 - swap),
                            pair<FORMAT>(unit, f + 1 - swap, swap), pair<FORMAT>(unit, f + 1, 1)};
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            prim::mma_16816<__half>(s[tile][n], a, component(b[n][j / 4], j % 4),
                                                    component(b[n][j / 4], j % 4 + 1));
                        }
                    }
                }
            }
        }
    }

    // q . minimum of a K group in every row. A unit of minima is an A fragment as it is: rows 0 to 7 hold words
    // 4 i and 4 i + 2, rows 8 to 15 the odd ones, and each half meets its own B.
    template <class S>
    PRIM void minima(const unsigned char* at, float least, float base, float (&out)[NT][4]) const {
        float even[NT][4] = {}, odd[NT][4] = {};
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            uint4 u = k_meta<S>(at, i, t);
            const uint32_t a[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 f = q.unit(n, 0, i);
                prim::mma_16816<__half>(even[n], a, f.x, f.y);
                prim::mma_16816<__half>(odd[n], a, f.z, f.w);
            }
        }
#pragma unroll
        for (int i = 0; i < NT * 4; i++) {
            float& x = out[i / 4][i % 4] = (even[i / 4][i % 2] + odd[i / 4][2 + i % 2]) * least;
            if (S::TWO_LEVEL && !KVW_FAULT(118)) x = fmaf(q_sum[i / 4][i % 2], base, x);
        }
    }

    // Raw scores, in units of `unit`, to probabilities relative to the running maximum, times 2^lift.
    template <bool LIFTED, int TILES> PRIM void softmax(float (&s)[TILES][NT][4], float unit, float lift) {
        float most[NT][2], slope[NT][2];
        bool grows = false;
#pragma unroll
        for (int i = 0; i < NT * 2; i++) {
            int n = i / 2, c = i % 2;
            float a = fmaxf(s[0][n][c], s[0][n][c + 2]);
#pragma unroll
            for (int tile = 1; tile < TILES; tile++) a = fmaxf(a, fmaxf(s[tile][n][c], s[tile][n][c + 2]));
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) a = fmaxf(a, __shfl_xor_sync(~0u, a, lanes));
            slope[n][c] = k[n][c] * unit;
            most[n][c] = a * slope[n][c];
            grows |= most[n][c] > m[n][c];
        }
        if (__any_sync(~0u, grows)) rescale(most);
#pragma unroll
        for (int i = 0; i < TILES * NT * 4; i++) {
            float& x = s[i / (NT * 4)][i / 4 % NT][i % 4];
            float top = m[i / 4 % NT][i % 2];
            x = prim::exp2_approx(fmaf(x, slope[i / 4 % NT][i % 2], LIFTED ? lift - top : -top));
        }
    }

    PRIM void rescale(const float (&most)[NT][2]) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float top = fmaxf(m[n][c], ceilf(most[n][c])), f = prim::exp2_approx(m[n][c] - top);
                m[n][c] = top, z[n][c] *= f, z[n][c + 2] *= f;
#pragma unroll
                for (int i = 0; i < D / 16 && !KVW_FAULT(107); i++) o[n][i][c] *= f, o[n][i][c + 2] *= f;
            }
        }
    }

    // Adds probabilities times V; `down` undoes what probabilities were multiplied by.
    template <int FORMAT, int TILES>
    PRIM void values(const unsigned char* vc, float down, const float (&p)[TILES][NT][4]) {
        using S = Slab<FORMAT, D, GROUP>;
        constexpr int PER_TILE = S::V_MINIMA / (TOKENS / 16) / 4; // bytes of scales a lane t
        const uint4* codes = reinterpret_cast<const uint4*>(vc) + threadIdx.x % 32;
        const unsigned char* scales = vc + S::CODE_BYTES + t * PER_TILE;
        const unsigned char* minima = scales + S::V_MINIMA + r % S::V_GROUPS * (PER_TILE / S::V_GROUPS);
        float part[NT][4] = {}; // what `z` gets of a slab with two-level metadata
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint2 least = make_uint2(0, 0);
            if constexpr (S::QUANTISED) least = v_meta<S>(minima + tile * 4 * PER_TILE);
            const uint32_t sums[4] = {least.x, HALF2_ONES, least.y, HALF2_ONES};
            uint32_t b[NT][2], scaled[NT][2], less[NT][2];
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    __half2 tokens = __floats2half2_rn(p[tile][n][2 * side], p[tile][n][2 * side + 1]);
                    b[n][side] = scaled[n][side] = prim::movmatrix_trans(half2_bits(tokens));
                    if (S::TWO_LEVEL) less[n][side] = mul2(b[n][side], HALF2_MINUS_1024);
                }
                prim::mma_16816<__half>(S::TWO_LEVEL ? part[n] : z[n], sums, b[n][0], b[n][1]);
                if (V_FOLD<FORMAT> != 0) {
                    constexpr uint32_t FACTOR =
                        uint32_t(15 + V_FOLD<FORMAT>) << 10 | uint32_t(15 + V_FOLD<FORMAT>) << 26;
                    b[n][0] = mul2(b[n][0], FACTOR), b[n][1] = mul2(b[n][1], FACTOR);
                }
            }
            uint4 unit;
            uint2 scale[4];
#pragma unroll
            for (int j = 0; j < WORDS; j += 2) {
                int f = tile * WORDS + j, group = 8 * j / S::V_GROUP;
                if (j == 0 || f % (2 * S::SLOTS) == 0) unit = codes[f / (2 * S::SLOTS) * 32];
                if (S::QUANTISED && 8 * j % S::V_GROUP == 0) {
                    v_scales<S>(scales + tile * 4 * PER_TILE, group, scale);
                    uint2 x = scale[group % 4];
                    if (KVW_FAULT(114)) x.y = x.x;
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        scaled[n][0] = S::TWO_LEVEL ? fma2(b[n][0], x.x, less[n][0]) : mul2(b[n][0], x.x);
                        scaled[n][1] = S::TWO_LEVEL ? fma2(b[n][1], x.y, less[n][1]) : mul2(b[n][1], x.y);
                    }
                }
                const uint32_t a[4] = {pair<FORMAT>(unit, f, 0), pair<FORMAT>(unit, f + 1, 0),
                                       pair<FORMAT>(unit, f, 1), pair<FORMAT>(unit, f + 1, 1)};
#pragma unroll
                for (int n = 0; n < NT; n++)
                    prim::mma_16816<__half>(o[n][j / 2], a, scaled[n][0], scaled[n][1]);
            }
        }
        if constexpr (S::TWO_LEVEL) {
            float4 steps = *reinterpret_cast<const float4*>(vc + (S::STEPS - S::V_CODES) + STEPS_BYTES / 2);
            float least = steps.y * float(1 << 24) * down, base = steps.z * down;
#pragma unroll
            for (int i = 0; i < NT * 2; i++) {
                float sum = part[i / 2][i % 2 + 2], &minimum = z[i / 2][i % 2], &total = z[i / 2][i % 2 + 2];
                minimum = fmaf(part[i / 2][i % 2], least, fmaf(sum, base, minimum));
                total = fmaf(sum, KVW_FAULT(119) ? 1.f : down, total);
            }
        }
    }
};

} // namespace kvw
