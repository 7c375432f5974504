// embed: token ids to rows of the embedding matrix, in f32.
//
// Math      out[t] = f32(table[ids[t]]); zeros where the id is outside the vocabulary
// Shapes    table [vocab, width] f16, bf16 or f32; ids [T]; out [T, width] f32
// Bytes     a row of the table and a row of out a token -> kvw_embed_bytes()
// Launch    a thread takes 8 neighbouring channels; 256 threads a CTA, as many CTAs as that takes
// Workspace none
// Order     deterministic
// Oracle    src/embed.rs::oracle
#include "kvwarp.h"
#include "common/check.cuh"
#include "common/launch.cuh"

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

template <class T>
__global__ void __launch_bounds__(THREADS) embed(const __grid_constant__ kvw_embed_params p) {
    int a_row = p.width / CHANNELS;
    int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= int64_t(p.tokens) * a_row) return;
    int64_t token = n / a_row;
    int channel = int(n % a_row) * CHANNELS, id = p.ids[token];
    float x[CHANNELS] = {};
    if (id >= 0 && (id < p.vocab || KVW_FAULT(351)))
        load8(static_cast<const T*>(p.table) + int64_t(id) * p.width + channel, x);
    uint4 raw[2];
    memcpy(raw, x, sizeof raw);
    float* out = p.out + token * p.width + channel;
    prim::stg128(out, raw[0]);
    prim::stg128(out + 4, raw[1]);
}

size_t dtype_bytes(int32_t dtype) { return dtype == KVW_F32 ? 4 : 2; }

} // namespace

kvw_status kvw_embed_check(const kvw_embed_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRE(p->dtype == KVW_F16 || p->dtype == KVW_BF16 || p->dtype == KVW_F32, FORMAT, dtype);
    KVW_REQUIRED(*p, table);
    KVW_REQUIRED(*p, ids);
    KVW_REQUIRED(*p, out);
    KVW_REQUIRE(p->tokens >= 1, SHAPE, tokens);
    KVW_REQUIRE(p->vocab >= 1, SHAPE, vocab);
    KVW_REQUIRE(p->width >= 1 && p->width % CHANNELS == 0, SHAPE, width);
    KVW_REQUIRE(int64_t(p->tokens) * (p->width / CHANNELS) <= int64_t(INT32_MAX) * THREADS, SHAPE, tokens);
    KVW_REQUIRE(p->reserved == 0, SHAPE, reserved);
    return KVW_OK;
}

size_t kvw_embed_workspace(const kvw_embed_params*) { return 0; }

size_t kvw_embed_bytes(const kvw_embed_params* p) {
    if (kvw_embed_check(p) != KVW_OK) return 0;
    return size_t(p->tokens) * (4 + size_t(p->width) * (dtype_bytes(p->dtype) + 4));
}

kvw_status kvw_embed(const kvw_embed_params* p, kvw_stream stream) {
    KVW_TRY(kvw_embed_check(p));
    int64_t threads = int64_t(p->tokens) * (p->width / CHANNELS);
    dim3 grid(unsigned((threads + THREADS - 1) / THREADS));
    if (p->dtype == KVW_F32) return KVW_LAUNCH((embed<float>), grid, THREADS, 0, stream, *p);
    if (p->dtype == KVW_F16) return KVW_LAUNCH((embed<__half>), grid, THREADS, 0, stream, *p);
    return KVW_LAUNCH((embed<__nv_bfloat16>), grid, THREADS, 0, stream, *p);
}
