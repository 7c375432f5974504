// embed: token ids to rows of the embedding matrix; without ids, all rows of a matrix unpacked.
//
// Math      out[t] = table[ids[t]], or table[t] without ids; zeros where that is outside the vocabulary; beyond
//           the range of an f16 out, +-65504
// Shapes    table [vocab, width] f16, bf16, f32 or in blocks (linear.h); ids [T]; out [T, width] f32 or f16
// Bytes     a row of the table and a row of out a token, 4 an id -> kvw_embed_bytes()
// Launch    a thread takes 8 neighbouring channels, of a table in blocks a lane's share of a step (blocks.cuh);
//           256 threads a CTA, as many CTAs as that takes
// Workspace none
// Order     deterministic
// Oracle    src/embed.rs::oracle
#include "embed.h"
#include "common/blocks.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/rope.cuh"

namespace {

constexpr int THREADS = 256, CHANNELS = 8;

// Eight values from 16 or 32 bytes; T carries the type.
template <class T> PRIM void load8(const T* from, float (&x)[CHANNELS]) {
    uint4 raw = prim::ldg128_stream(from);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        T two[2];
        memcpy(two, &words[i], sizeof words[i]);
        x[2 * i] = float(two[0]);
        x[2 * i + 1] = float(two[1]);
    }
}

template <> PRIM void load8<float>(const float* from, float (&x)[CHANNELS]) {
    uint4 raw[2] = {prim::ldg128_stream(from), prim::ldg128_stream(from + 4)};
    memcpy(x, raw, sizeof raw);
}

// The row that a token asks for; -1 outside the vocabulary.
PRIM int id_of(const kvw_embed_params& p, int64_t token) {
    int id = p.ids && !KVW_FAULT(352) ? p.ids[token] : int(token);
    return id >= 0 && (id < p.vocab || KVW_FAULT(351)) ? id : -1;
}

PRIM uint32_t two_halves(float a, float b) {
    return kvw::half2_bits(__halves2half2(kvw::half_saturated(a), kvw::half_saturated(b)));
}

PRIM void store4(const kvw_embed_params& p, int64_t at, const float* x) {
    if (p.out_dtype == KVW_F16) {
        uint2 halves = make_uint2(two_halves(x[0], x[1]), two_halves(x[2], x[3]));
        *reinterpret_cast<uint2*>(static_cast<__half*>(p.out) + at) = halves;
        return;
    }
    uint4 raw;
    memcpy(&raw, x, sizeof raw);
    prim::stg128(static_cast<float*>(p.out) + at, raw);
}

template <class T>
__global__ void __launch_bounds__(THREADS) embed(const __grid_constant__ kvw_embed_params p) {
    int a_row = p.width / CHANNELS;
    int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= int64_t(p.tokens) * a_row) return;
    int64_t token = n / a_row;
    int channel = int(n % a_row) * CHANNELS, id = id_of(p, token);
    float x[CHANNELS] = {};
    if (id >= 0) load8(static_cast<const T*>(p.table) + int64_t(id) * p.width + channel, x);
    store4(p, token * p.width + channel, x);
    store4(p, token * p.width + channel + 4, x + 4);
}

template <int DTYPE>
__global__ void __launch_bounds__(THREADS) unpack(const __grid_constant__ kvw_embed_params p) {
    using Step = kvw::Step<DTYPE>;
    kvw::Matrix matrix = {static_cast<const unsigned char*>(p.table), size_t(p.vocab), p.width};
    int q = int(threadIdx.x) % 4, steps = (p.width + Step::COLS - 1) / Step::COLS;
    int64_t n = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 4;
    int64_t token = min(n / steps, int64_t(p.tokens) - 1);
    bool inside = n < int64_t(p.tokens) * steps; // the others take part in the warp's shuffles
    int step = int(n % steps), id = id_of(p, token);
    Step w;
    w.load(matrix, size_t(id >= 0 ? id : p.vocab), step, q);
#pragma unroll
    for (int j = 0; j < Step::COLS / 32; j++) {
        int first = step * Step::COLS + 32 * j;
        uint32_t pairs[4];
        w.pairs(j, pairs);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            kvw::Affine of = w.affine(j, half);
            float2 a = __half22float2(kvw::half2_of(pairs[2 * half]));
            float2 b = __half22float2(kvw::half2_of(pairs[2 * half + 1]));
            float x[4] = {a.x, a.y, b.x, b.y};
            for (float& value : x) value = __fadd_rn(__fmul_rn(value, of.scale), of.offset);
            int64_t at = token * p.width + first + kvw::first_column<Step>(q, half);
            if (inside && first < p.width) store4(p, at, x);
        }
    }
}

template <int DTYPE> kvw_status launch_unpack(const kvw_embed_params& p, kvw_stream stream) {
    constexpr int COLS = kvw::Step<DTYPE>::COLS;
    int64_t threads = int64_t(p.tokens) * ((p.width + COLS - 1) / COLS) * 4;
    dim3 grid(unsigned((threads + THREADS - 1) / THREADS));
    return KVW_LAUNCH((unpack<DTYPE>), grid, THREADS, 0, stream, p);
}

} // namespace

kvw_status kvw_embed_check(const kvw_embed_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRE(p->dtype >= KVW_F32 && p->dtype <= KVW_Q6_K, FORMAT, dtype);
    KVW_REQUIRE(p->out_dtype == KVW_F32 || p->out_dtype == KVW_F16, FORMAT, out_dtype);
    KVW_REQUIRED(*p, table);
    KVW_OPTIONAL(*p, ids);
    KVW_REQUIRED(*p, out);
    KVW_REQUIRE(p->tokens >= 1, SHAPE, tokens);
    KVW_REQUIRE(p->vocab >= 1, SHAPE, vocab);
    KVW_REQUIRE(p->width >= 1 && p->width % CHANNELS == 0, SHAPE, width);
    KVW_REQUIRE(int64_t(p->tokens) * (p->width / CHANNELS) <= int64_t(INT32_MAX) * THREADS, SHAPE, tokens);
    KVW_REQUIRE(p->width % kvw::block_cols(p->dtype) == 0, SHAPE, width);
    return KVW_OK;
}

size_t kvw_embed_workspace(const kvw_embed_params*) { return 0; }

size_t kvw_embed_bytes(const kvw_embed_params* p) {
    if (kvw_embed_check(p) != KVW_OK) return 0;
    size_t out = size_t(p->width) * (p->out_dtype == KVW_F32 ? 4 : 2);
    return size_t(p->tokens) * ((p->ids ? 4 : 0) + kvw::row_bytes(p->dtype, p->width) + out);
}

kvw_status kvw_embed(const kvw_embed_params* p, kvw_stream stream) {
    KVW_TRY(kvw_embed_check(p));
    int64_t threads = int64_t(p->tokens) * (p->width / CHANNELS);
    dim3 grid(unsigned((threads + THREADS - 1) / THREADS));
    switch (p->dtype) {
    case KVW_F32: return KVW_LAUNCH((embed<float>), grid, THREADS, 0, stream, *p);
    case KVW_F16: return KVW_LAUNCH((embed<__half>), grid, THREADS, 0, stream, *p);
    case KVW_BF16: return KVW_LAUNCH((embed<__nv_bfloat16>), grid, THREADS, 0, stream, *p);
    case KVW_Q8_0: return launch_unpack<KVW_Q8_0>(*p, stream);
    case KVW_Q4_0: return launch_unpack<KVW_Q4_0>(*p, stream);
    case KVW_Q4_1: return launch_unpack<KVW_Q4_1>(*p, stream);
    case KVW_Q4_K: return launch_unpack<KVW_Q4_K>(*p, stream);
    default: return launch_unpack<KVW_Q6_K>(*p, stream);
    }
}
