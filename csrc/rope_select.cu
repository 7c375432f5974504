// rope_select: rotary position embedding of the queries or keys of some tokens.
//
// Math      pair i = channels (a, b): angle = f32(position * inv_freq[i]); out = (a cos - b sin, a sin +
//           b cos), beyond the range of f16 +-65504. With hadamard, that head times the orthonormal Hadamard matrix
//           of D before it is rounded, additions in the order of src/hadamard.rs::keys; D = 96: three of 32 mixed
//           by the reflection 1 - 2/3. With lists: elements (i, r + i) of a head, by inv_freq[pairs[list of the head, i]]
// Shapes    x, out [T, heads, D] f16 with a stride between tokens, the last rest_heads of out's heads in rest;
//           positions [T]; inv_freq [D / 2]
// Layout    pair i = (2i, 2i + 1) interleaved, (i, i + D / 2) half
// Bytes     x once, out once, 4 a position, 2 D of frequencies; with lists only what turns, and what is copied where out
//           is not x -> kvw_rope_select_bytes()
// Launch    a CTA of 256 threads a token, 1 KB of shared memory; with hadamard a warp takes a head
// Workspace none
// Order     deterministic; every element is written by the thread that read it, with hadamard by the warp that has
//           read all of the head, so out may be x
// Oracle    src/rope_select/oracle.rs, src/hadamard.rs
//
// Why it looks like this:
// 1. Sines are computed once a token and kept in shared memory: all heads use the same ones.
// 2. A thread turns four neighbouring pairs: 16-byte accesses interleaved, twice 8 bytes half. Heads
//    whose size or stride is odd in that sense take the same kernel with one pair a thread.
// 3. Queries and keys of a fused projection lie side by side, so one launch turns both: x its first query head, heads
//    their sum, x_stride the whole row. Attention wants dense queries: rest leaves the keys in their rows. Predicted to
//    save 2 us a layer against a launch for each, the gap between two launches and the floor of a small one.
// 4. With lists a thread turns one pair: a few hundred a token, and their sines are gathered from those of all pairs.
//    Queries lie in place, so that what does not turn is not touched; those of a decoded token are 32 D elements.
// 5. With hadamard lane l has channels 32 i + l: five stages by shuffles, the others within the lane (common/turn.cuh).
#include "rope_select.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/turn.cuh"

namespace {

constexpr int THREADS = 256;

// Where a head of a token goes.
PRIM __half* out_head(const kvw_rope_select_params& p, int token, int head) {
    int own = p.heads - p.rest_heads, left = KVW_FAULT(304) ? head : head - own;
    if (head < own) return static_cast<__half*>(p.out) + token * p.out_stride + head * p.head_dim;
    return static_cast<__half*>(p.rest) + token * p.rest_stride + left * p.head_dim;
}

// PAIRS halves at p as one access.
template <int PAIRS> struct alignas(2 * PAIRS) Halves {
    __half of[PAIRS];
};

// PAIRS pairs from pair i on: (a, b) interleaved lie side by side, half lie D / 2 apart.
template <int PAIRS, bool HALF>
PRIM void turn(const __half* in, __half* out, int i, int d, const float* sin, const float* cos) {
    Halves<PAIRS> low, high;
    int at = HALF ? i : 2 * i, gap = HALF ? d / 2 : PAIRS;
    low = *reinterpret_cast<const Halves<PAIRS>*>(in + at);
    high = *reinterpret_cast<const Halves<PAIRS>*>(in + at + gap);
#pragma unroll
    for (int n = 0; n < PAIRS; n++) {
        // Interleaved, element e of the 2 PAIRS in order lies in low or high.
        __half& x = HALF ? low.of[n] : 2 * n < PAIRS ? low.of[2 * n % PAIRS] : high.of[2 * n % PAIRS];
        __half& y = HALF                ? high.of[n]
                    : 2 * n + 1 < PAIRS ? low.of[(2 * n + 1) % PAIRS]
                                        : high.of[(2 * n + 1) % PAIRS];
        float a = __half2float(x), b = __half2float(y);
        kvw::rotate(a, b, sin[i + n], cos[i + n]);
        x = kvw::half_saturated(a);
        y = kvw::half_saturated(b);
    }
    *reinterpret_cast<Halves<PAIRS>*>(out + at) = low;
    *reinterpret_cast<Halves<PAIRS>*>(out + at + gap) = high;
}

template <int PAIRS, bool HALF>
__global__ void __launch_bounds__(THREADS) rope(const __grid_constant__ kvw_rope_select_params p) {
    KVW_SHARED(float, sin, kvw::ROPE_MAX_D / 2);
    KVW_SHARED(float, cos, kvw::ROPE_MAX_D / 2);
    int pairs = p.head_dim / 2, token = int(blockIdx.x);
    for (int i = int(threadIdx.x); i < pairs; i += THREADS) {
        float s, c;
        kvw::sin_cos(__fmul_rn(float(p.positions[token]), p.inv_freq[i]), s, c);
        sin[i] = s;
        cos[i] = c;
    }
    if (!KVW_FAULT(301)) __syncthreads();
    const __half* in = static_cast<const __half*>(p.x) + token * p.x_stride;
    int a_head = pairs / PAIRS;
    for (int n = int(threadIdx.x); n < p.heads * a_head; n += THREADS) {
        int head = n / a_head, i = n % a_head * PAIRS;
        turn<PAIRS, HALF>(in + head * p.head_dim, out_head(p, token, head), i, p.head_dim, sin, cos);
    }
}

// ---- listed pairs alone

__global__ void __launch_bounds__(THREADS) elite(const __grid_constant__ kvw_rope_select_params p) {
    KVW_SHARED(float, sin, kvw::ROPE_MAX_D / 2);
    KVW_SHARED(float, cos, kvw::ROPE_MAX_D / 2);
    int token = int(blockIdx.x), own = p.heads - p.rest_heads, r = p.elite, d = p.head_dim;
    for (int i = int(threadIdx.x); i < d / 2; i += THREADS) {
        float s, c;
        kvw::sin_cos(__fmul_rn(float(p.positions[token]), p.inv_freq[i]), s, c);
        sin[i] = s;
        cos[i] = c;
    }
    if (!KVW_FAULT(305)) __syncthreads();
    const __half* in = static_cast<const __half*>(p.x) + token * p.x_stride;
    __half *out = static_cast<__half*>(p.out) + token * p.out_stride,
           *rest = static_cast<__half*>(p.rest) + token * p.rest_stride;
    for (int n = int(threadIdx.x); n < p.heads * r; n += THREADS) {
        int head = n / r, i = n % r, left = head - own;
        int list = left < 0 ? head * p.lists / own : left * p.lists / p.rest_heads, at = head * d;
        if (left >= 0) at = own * d + left * 2 * r;
        int pair = KVW_FAULT(306) ? i : p.pairs[list * r + i];
        float a = __half2float(in[at + i]), b = __half2float(in[at + r + i]);
        kvw::rotate(a, b, sin[pair], cos[pair]);
        __half* to = left < 0 ? out + head * d : rest + left * 2 * r;
        to[i] = kvw::half_saturated(a);
        to[r + i] = kvw::half_saturated(b);
    }
    if (p.out == p.x || KVW_FAULT(307)) return;
    int others = d - 2 * r;
    for (int n = int(threadIdx.x); n < own * others; n += THREADS) {
        int at = n / others * d + 2 * r + n % others;
        out[at] = in[at];
    }
}

// ---- and the Hadamard matrix

template <int D>
__global__ void __launch_bounds__(THREADS) hadamard(const __grid_constant__ kvw_rope_select_params p) {
    KVW_SHARED(float, sin, D / 2);
    KVW_SHARED(float, cos, D / 2);
    const bool half = p.pairing == KVW_ROPE_HALF;
    int token = int(blockIdx.x), lane = int(threadIdx.x) % 32;
    for (int i = int(threadIdx.x); i < D / 2; i += THREADS) {
        float s, c;
        kvw::sin_cos(__fmul_rn(float(p.positions[token]), p.inv_freq[i]), s, c);
        sin[i] = s;
        cos[i] = c;
    }
    if (!KVW_FAULT(302)) __syncthreads();
    for (int head = int(threadIdx.x) / 32; head < p.heads; head += THREADS / 32) {
        const __half* in = static_cast<const __half*>(p.x) + token * p.x_stride + head * D;
        __half* out = out_head(p, token, head);
        float x[D / 32];
        kvw::rotate_head(
            x, lane, half, [&](int c) { return __half2float(in[c]); },
            [&](int pair, float& s, float& c) { s = sin[pair], c = cos[pair]; });
        __syncwarp(); // the head is read: out may be x
        kvw::times_hadamard(x, lane);
#pragma unroll
        for (int i = 0; i < D / 32; i++) out[32 * i + lane] = kvw::half_saturated(x[i]);
    }
}

// Elements of a token's row of x, and of a rest head.
int64_t rest_dim(const kvw_rope_select_params& p) { return p.pairs ? 2 * p.elite : p.head_dim; }
int64_t row_of(const kvw_rope_select_params& p) {
    return int64_t(p.heads - p.rest_heads) * p.head_dim + p.rest_heads * rest_dim(p);
}

kvw_status check_lists(const kvw_rope_select_params& p) {
    KVW_OPTIONAL(p, pairs);
    KVW_REQUIRE(!p.pairs == (p.elite == 0), SHAPE, elite);
    KVW_REQUIRE(!p.pairs == (p.lists == 0), SHAPE, lists);
    if (!p.pairs) return KVW_OK;
    KVW_REQUIRE(p.pairing == KVW_ROPE_HALF, SHAPE, pairing);
    KVW_REQUIRE(p.hadamard == 0, SHAPE, hadamard);
    KVW_REQUIRE(p.elite >= 1 && p.elite <= p.head_dim / 2, SHAPE, elite);
    KVW_REQUIRE(p.lists >= 1 && (p.heads - p.rest_heads) % p.lists == 0, SHAPE, lists);
    KVW_REQUIRE(p.rest_heads % p.lists == 0, SHAPE, rest_heads);
    return KVW_OK;
}

} // namespace

kvw_status kvw_rope_select_check(const kvw_rope_select_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRED(*p, x);
    KVW_REQUIRED(*p, out);
    KVW_REQUIRED(*p, positions);
    KVW_REQUIRED(*p, inv_freq);
    KVW_REQUIRE(p->tokens >= 1, SHAPE, tokens);
    KVW_REQUIRE(p->heads >= 1 && p->heads <= kvw::GRID_YZ_MAX, SHAPE, heads);
    KVW_REQUIRE(p->head_dim >= 2 && p->head_dim <= kvw::ROPE_MAX_D && p->head_dim % 2 == 0, SHAPE, head_dim);
    KVW_REQUIRE(p->pairing == KVW_ROPE_INTERLEAVED || p->pairing == KVW_ROPE_HALF, SHAPE, pairing);
    const int d = p->head_dim;
    KVW_REQUIRE(p->hadamard == 0 || (p->hadamard == 1 && (d == 64 || d == 96 || d == 128 || d == 256)), SHAPE,
                hadamard);
    KVW_REQUIRE(p->reserved == 0, SHAPE, reserved);
    KVW_OPTIONAL(*p, rest);
    KVW_REQUIRE(p->rest_heads >= 0 && p->rest_heads < p->heads, SHAPE, rest_heads);
    KVW_REQUIRE(!p->rest == (p->rest_heads == 0), NULL, rest);
    KVW_TRY(check_lists(*p));
    KVW_REQUIRE(p->rest_stride >= p->rest_heads * rest_dim(*p), SHAPE, rest_stride);
    KVW_REQUIRE(p->x_stride >= row_of(*p), SHAPE, x_stride);
    KVW_REQUIRE(p->out_stride >= int64_t(p->heads - p->rest_heads) * d, SHAPE, out_stride);
    KVW_REQUIRE(p->x != p->out || p->x_stride == p->out_stride, SHAPE, out_stride);
    return KVW_OK;
}

size_t kvw_rope_select_workspace(const kvw_rope_select_params*) { return 0; }

size_t kvw_rope_select_bytes(const kvw_rope_select_params* p) {
    if (kvw_rope_select_check(p) != KVW_OK) return 0;
    size_t fixed = size_t(p->head_dim) * 2, row = size_t(row_of(*p));
    if (p->pairs) {
        fixed += size_t(p->lists) * p->elite;
        if (p->x == p->out) row = size_t(p->heads) * 2 * p->elite;
    }
    return size_t(p->tokens) * (row * 4 + 4) + fixed;
}

kvw_status kvw_rope_select(const kvw_rope_select_params* p, kvw_stream stream) {
    KVW_TRY(kvw_rope_select_check(p));
    bool half = p->pairing == KVW_ROPE_HALF;
    bool wide = (p->head_dim | p->x_stride | p->out_stride | p->rest_stride) % 8 == 0;
    dim3 grid(unsigned(p->tokens));
    if (p->pairs) return KVW_LAUNCH(elite, grid, THREADS, 0, stream, *p);
    if (p->hadamard) {
        switch (p->head_dim) {
        case 64: return KVW_LAUNCH((hadamard<64>), grid, THREADS, 0, stream, *p);
        case 96: return KVW_LAUNCH((hadamard<96>), grid, THREADS, 0, stream, *p);
        case 128: return KVW_LAUNCH((hadamard<128>), grid, THREADS, 0, stream, *p);
        default: return KVW_LAUNCH((hadamard<256>), grid, THREADS, 0, stream, *p);
        }
    }
    if (wide && half) return KVW_LAUNCH((rope<4, true>), grid, THREADS, 0, stream, *p);
    if (wide) return KVW_LAUNCH((rope<4, false>), grid, THREADS, 0, stream, *p);
    if (half) return KVW_LAUNCH((rope<1, true>), grid, THREADS, 0, stream, *p);
    return KVW_LAUNCH((rope<1, false>), grid, THREADS, 0, stream, *p);
}
