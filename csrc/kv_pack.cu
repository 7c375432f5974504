// kv_pack: writing the cache: RoPE, the f16 ring, and packing of the 64 tokens that leave the window.
//
// Math      K' = rotate(K, position), beyond the range of f16 +-65504, as V; ring[slot] = (K', V); packed
//           slab = quantise(its 64 tokens), bit for bit src/slab/codec.rs::encode_rounded. APPEND: with hadamard K' is
//           that times the Hadamard matrix of D, and q_out is q turned likewise, bit for bit what rope_select gives
// Shapes    k, v [T, H, D] f16 or bf16 with strides between tokens, q [T, q_heads, D] f16; the cache as slab.h has it
// Layout    K quantised per channel over group tokens, V per token over group channels (KIVI,
//           arXiv:2402.02750)
// Bytes     8 D a token and head, 4 D a query head; f16 slabs are read and packed ones written, and the lower half
//           of feedback is read -> kvw_kv_pack_bytes()
// Launch    APPEND grid (H + q_heads / 4, S), FILL (tiles of 16 tokens, H, S), FLUSH (slabs, H, S); 128 threads, at
//           most 17 KB of shared memory; with feedback 320 D bytes more
// Workspace none
// Order     deterministic; no atomics; every word of a slab is written by the one lane that owns it
// Oracle    src/slab/codec.rs, src/kv_pack/kivi.rs, src/rope_select/oracle.rs, src/hadamard.rs
//
// APPEND: a slab leaves the window with token len - 1 if (len - window) is a positive multiple of 64; in a head that has
// dropped tokens, where `packed` says how many slabs left it before, if it is 64 (packed + 1). In a ring of
// kvw_ring_slabs(window) that token may fall on the slab's first one, so the slab is packed before the token is
// written; only with window 0 the slab holds the token itself and comes after it. The entry's format decides: fp8, q8,
// q4 and q2 are packed, f16 is copied, a hole drops the tokens.
//
// kivi_exact: KIVI's schedule with residual length R = window. With N = len after this token: if N % R ==
// 0, K of the last R tokens is quantised (groups aligned to token 0); if N > R, V of token N - 1 - R. So
// after each step K of the first R * floor(N / R) and V of the first max(0, N - R) tokens are quantised;
// KIVI's code has the same boundaries, but attends before it quantises, here a step comes after. Codes go
// into the table's slab at once, which therefore needs its entry when its first K is quantised, and the
// dequantised f16 values replace the ring's copy. Attention reads the ring until the slab leaves the
// window: both halves are complete then. Entries in f16 are copied at that time. FLUSH brings slabs first
// .. to the boundaries of len at once; none of them may be quantised in part.
//
// Why it looks like this:
// 1. A lane owns the same pairs in every format, so codes are assembled in registers into whole words.
// 2. FILL gathers 16 tokens in shared memory and writes 16-byte units; element by element only in the
//    first and last tile, which may be shared with tokens that are there already.
// 3. Packing runs in the append itself, so a step is the same launches whether or not a slab is due.
// 4. Feedback goes through the channels of K one by one (common/feedback.cuh): a chain of about 270 clocks each,
//    of which four or five shuffles are half, and 600 a block of eight for the errors of the block before and the
//    barrier. Predicted 45,000 clocks at D = 128, 26 us, once in 64 steps of a head; two-level metadata adds 60 a
//    channel, its f64 steps.
// 5. Queries are turned by CTAs of their own beside those that append, a warp a head: a decoded token takes one launch
//    from its projections to attention instead of two. Predicted to save 2 us a layer, a launch's gap and floor; 64 us a
//    step of 32 layers. Sines are computed by the lane that needs them, four at D = 128: no barrier before the first.
#include "kv_pack.h"
#include "rope_select.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/kivi.cuh"
#include "common/turn.cuh"

namespace {

using namespace kvw;
using Params = kvw_kv_pack_params;

// ---- tokens into the ring

// Four channels of a key as two words, at even channels c[0] and c[1].
struct KeyWords {
    int c[2];
    uint32_t word[2];
};

// Elements i and i + 1 of rows in the input's type.
PRIM float2 two(const Params& p, const void* rows, int64_t i) {
    if (p.dtype == KVW_BF16)
        return __bfloat1622float2(
            *reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(rows) + i));
    return __half22float2(*reinterpret_cast<const __half2*>(static_cast<const __half*>(rows) + i));
}

template <int D>
PRIM KeyWords key_words(const Params& p, int64_t token, int head, int n, const __half* key = nullptr) {
    bool half = p.pairing == KVW_ROPE_HALF;
    KeyWords w = {{half ? 2 * n : 4 * n, half ? 2 * n + D / 2 : 4 * n + 2}, {}};
    if (key) {
        for (int i = 0; i < 2; i++) w.word[i] = *reinterpret_cast<const uint32_t*>(key + w.c[i]);
        return w;
    }
    int64_t row = token * p.k_stride + head * D;
    float2 x = two(p, p.k, row + w.c[0]), y = two(p, p.k, row + w.c[1]);
    if (p.positions) {
        float position = float(p.positions[token]), sin[2], cos[2];
        sin_cos(__fmul_rn(position, p.inv_freq[2 * n]), sin[0], cos[0]);
        sin_cos(__fmul_rn(position, p.inv_freq[2 * n + 1]), sin[1], cos[1]);
        if (half) swap(x.y, y.x); // now each of x and y is a pair
        rotate(x.x, x.y, sin[0], cos[0]);
        rotate(y.x, y.y, sin[1], cos[1]);
        if (half) swap(x.y, y.x);
    }
    w.word[0] = half2_bits(half_saturated(x.x), half_saturated(x.y));
    w.word[1] = half2_bits(half_saturated(y.x), half_saturated(y.y));
    return w;
}

// Two channels of a value.
template <int D> PRIM uint32_t value_word(const Params& p, int64_t token, int head, int n) {
    float2 x = two(p, p.v, token * p.v_stride + head * D + 2 * n);
    return half2_bits(half_saturated(x.x), half_saturated(x.y));
}

template <int D> PRIM unsigned char* ring_slab(const Head<D, 0>& head, int slab) {
    return head.ring + size_t(slab % head.cache.ring_slabs) * Slab<KVW_SLAB_F16, D, 32>::BYTES;
}

// A head of a token times its rotation and, where it is asked for, the Hadamard matrix; by one warp.
template <int D> PRIM void turn_head(const Params& p, const void* x, int64_t at, int token, __half* out) {
    int lane = int(threadIdx.x) % 32;
    float y[D / 32], position = float(p.positions[token]);
    rotate_head(
        y, lane, p.pairing == KVW_ROPE_HALF,
        [&](int c) {
            return p.dtype == KVW_BF16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(x)[at + c])
                                       : __half2float(static_cast<const __half*>(x)[at + c]);
        },
        [&](int pair, float& sin, float& cos) {
            sin_cos(__fmul_rn(position, p.inv_freq[pair]), sin, cos);
        });
    if (!KVW_FAULT(218)) __syncwarp(); // the head is read: out may be x
    if (p.hadamard) times_hadamard(y, lane);
#pragma unroll
    for (int i = 0; i < D / 32; i++) out[32 * i + lane] = half_saturated(y[i]);
}

// Four query heads of a token, a warp each.
template <int D> PRIM void turn_queries(const Params& p, int token, int first) {
    int head = first + int(threadIdx.x) / 32;
    if (head >= p.q_heads) return;
    __half* out = static_cast<__half*>(p.q_out) + (int64_t(token) * p.q_heads + head) * D;
    turn_head<D>(p, p.q, token * p.q_stride + head * D, token, out);
}

// Row `token` of k and v to `slot` of the ring; `key` is its key where that has been turned.
template <int D>
PRIM void write_token(const Params& p, const Head<D, 0>& head, int64_t token, int slot, const __half* key) {
    unsigned char* slab = ring_slab(head, slot / TOKENS);
    int at = slot % TOKENS;
    for (int n = int(threadIdx.x); n < D / 4; n += PACK_THREADS) {
        KeyWords w = key_words<D>(p, token, head.head, n, key);
        *reinterpret_cast<uint32_t*>(slab + k_word<D>(at, w.c[0])) = w.word[0];
        *reinterpret_cast<uint32_t*>(slab + k_word<D>(at, w.c[1])) = w.word[1];
    }
    for (int n = int(threadIdx.x); n < D / 2; n += PACK_THREADS) {
        uint32_t word = value_word<D>(p, token, head.head, n);
        v_element<D>(slab, at, 2 * n) = __ushort_as_half(uint16_t(word));
        v_element<D>(slab, at, 2 * n + 1) = __ushort_as_half(uint16_t(word >> 16));
    }
}

constexpr int TILE = 16, PAD = 8; // PAD halves a row: rows fall on different banks

// 16 tokens of a head, from the 16-aligned slot `first` on; those before `start` or after the end are not
// ours.
template <int D> __global__ void __launch_bounds__(PACK_THREADS, 4) fill(const __grid_constant__ Params p) {
    constexpr int ROW = D + PAD;
    KVW_SHARED(__half, keys, TILE * ROW);
    KVW_SHARED(__half, values, TILE * ROW);
    int s = int(blockIdx.z), tokens = p.cu_tokens[s + 1] - p.cu_tokens[s];
    Head<D, 0> head(p.cache, s, int(blockIdx.y));
    int start = head.len - tokens, first = start / TILE * TILE + int(blockIdx.x) * TILE;
    if (tokens <= 0 || start < 0 || first >= head.len) return;
    auto ours = [&](int row) { return first + row >= start && first + row < head.len; };
    for (int i = int(threadIdx.x); i < TILE * D / 2; i += PACK_THREADS) {
        int row = i / (D / 2), n = i % (D / 2);
        if (!ours(row)) continue;
        int64_t token = p.cu_tokens[s] + (first + row - start);
        *reinterpret_cast<uint32_t*>(values + row * ROW + 2 * n) = value_word<D>(p, token, head.head, n);
        if (n >= D / 4) continue;
        KeyWords w = key_words<D>(p, token, head.head, n);
        *reinterpret_cast<uint32_t*>(keys + row * ROW + w.c[0]) = w.word[0];
        *reinterpret_cast<uint32_t*>(keys + row * ROW + w.c[1]) = w.word[1];
    }
    __syncthreads();
    unsigned char* slab = ring_slab(head, first / TOKENS);
    bool whole = (ours(0) && ours(TILE - 1)) || KVW_FAULT(205);
    auto element = [&](const __half* at, int row) { return whole || ours(row) ? *at : __ushort_as_half(0); };
    int tile = first % TOKENS / TILE;
    for (int i = int(threadIdx.x); i < D / 16 * 32; i += PACK_THREADS) {
        int u = i / 32, lane = i % 32, r = lane / 4, t = lane % 4;
        uint32_t k[4], v[4];
#pragma unroll
        for (int n = 0; n < 4; n++) { // component n: pair j = 2 u + n / 2, side n % 2
            int j = 2 * u + n / 2, key = r + n % 2 * 8, value = 2 * t + n % 2 * 8;
            const __half *x = keys + key * ROW + 8 * j + 2 * t, *y = values + value * ROW + 8 * j + r;
            k[n] = half2_bits(element(x, key), element(x + 1, key));
            v[n] = half2_bits(element(y, value), element(y + ROW, value + 1));
        }
        unsigned char* to = slab + ((tile * (D / 16) + u) * 32 + lane) * 16;
        if (whole) {
            prim::stg128(to, make_uint4(k[0], k[1], k[2], k[3]));
            prim::stg128(to + V_SECTION<D>, make_uint4(v[0], v[1], v[2], v[3]));
            continue;
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int key = r + n % 2 * 8, value = 2 * t + n % 2 * 8;
            uint16_t* pair = reinterpret_cast<uint16_t*>(to + V_SECTION<D> + 4 * n);
            if (ours(key)) *reinterpret_cast<uint32_t*>(to + 4 * n) = k[n];
            if (ours(value)) pair[0] = uint16_t(v[n]);
            if (ours(value + 1)) pair[1] = uint16_t(v[n] >> 16);
        }
    }
}

// ---- slabs out of the ring

// The table's slab i, 0 where there is none.
template <int D> PRIM SlabAddress table_slab(const Head<D, 0>& head, int i) {
    return head.row ? head.entry(head.row[i]) : 0;
}

template <int D> PRIM void copy_slab(const unsigned char* from, unsigned char* to) {
    for (int at = int(threadIdx.x) * 16; at < Slab<KVW_SLAB_F16, D, 32>::BYTES; at += PACK_THREADS * 16)
        prim::stg128(to + at, *reinterpret_cast<const uint4*>(from + at));
}

// `meta` and `shared` are shared memory, the latter Feedback<D>::BYTES long if there is feedback.
template <int D>
PRIM void pack_slab(const Params& p, const Head<D, 0>& head, int i, uint32_t* meta, unsigned char* shared) {
    SlabAddress to = table_slab(head, i);
    int format = format_of(to);
    unsigned char *from = ring_slab(head, i), *bytes = bytes_of(to);
    if (to == 0) return;
    if (format == KVW_SLAB_F16) return copy_slab<D>(from, bytes);
    const __half* weights = static_cast<const __half*>(has_meta(format) ? p.feedback : nullptr);
    if (weights) weights += size_t(head.head) * D * D;
    pack_whole(Packer<D>(p.cache, format, p.range, from, bytes, meta), weights, shared);
}

template <int D>
PRIM void advance_slab(const Head<D, 0>& head, int i, Span keys, Span values, uint32_t* meta) {
    SlabAddress to = table_slab(head, i);
    unsigned char *from = ring_slab(head, i), *bytes = bytes_of(to);
    bool complete = values.from < values.until && values.until == TOKENS;
    if (to == 0) return;
    if (format_of(to) != KVW_SLAB_F16)
        advance(Packer<D>(head.cache, format_of(to), 1.f, from, bytes, meta), keys, values);
    else if (complete)
        copy_slab<D>(from, bytes);
}

template <int D> __global__ void __launch_bounds__(PACK_THREADS, 4) append(const __grid_constant__ Params p) {
    KVW_DYN_SHARED(unsigned char, shared);
    KVW_SHARED(uint32_t, meta, META_WORDS<D>);
    KVW_SHARED(__half, turned, D);
    int s = int(blockIdx.y), window = p.cache.window, more = int(blockIdx.x) - p.cache.kv_heads;
    if (more >= 0) return turn_queries<D>(p, s, more * PACK_WARPS);
    Head<D, 0> head(p.cache, s, int(blockIdx.x));
    int len = head.len, rest = len - window, next = rest / TOKENS - 1;
    if (p.cache.packed && !KVW_FAULT(220)) next = head.packed;
    if (len < 1) return;
    const __half* key = p.hadamard && !KVW_FAULT(219) ? turned : nullptr;
    if (key) {
        if (threadIdx.x < 32) turn_head<D>(p, p.k, s * p.k_stride + head.head * D, s, turned);
        if (!KVW_FAULT(217)) __syncthreads();
    }
    bool leaves = next >= 0 && rest == (next + 1) * TOKENS;
    bool first = window == 0 || p.kivi_exact || KVW_FAULT(202);
    if (first) write_token(p, head, s, len - 1, key);
    __syncthreads();
    if (!p.kivi_exact && leaves) pack_slab(p, head, next, meta, shared);
    __syncthreads();
    if (!first) write_token(p, head, s, len - 1, key);
    if (!p.kivi_exact) return;
    if (rest < 0) return;
    bool keys = len % window == 0; // tokens rest .. len - 1; V of token rest - 1
    int lowest = max(rest - 1, 0) / TOKENS, last = keys ? (len - 1) / TOKENS : lowest;
    for (int i = lowest; i <= last; i++) {
        Span k = keys ? within(i, rest, len) : Span{0, 0};
        Span v = within(i, max(rest - 1, 0), rest);
        if (k.from < k.until || v.from < v.until) advance_slab(head, i, k, v, meta);
    }
}

template <int D> __global__ void __launch_bounds__(PACK_THREADS, 4) flush(const __grid_constant__ Params p) {
    KVW_DYN_SHARED(unsigned char, shared);
    KVW_SHARED(uint32_t, meta, META_WORDS<D>);
    int s = int(blockIdx.z), h = int(blockIdx.y);
    Head<D, 0> head(p.cache, s, h);
    int i = p.first[p.cache.lens_heads == 1 ? s : s * p.cache.kv_heads + h] + int(blockIdx.x);
    if (i < 0) return;
    if (!p.kivi_exact) {
        if (i < head.packed) pack_slab(p, head, i, meta, shared);
        return;
    }
    int window = p.cache.window, keys = head.len / window * window, values = max(head.len - window, 0);
    if (i * TOKENS < keys) advance_slab(head, i, within(i, 0, keys), within(i, 0, values), meta);
}

template <int D> kvw_status launch(const Params& p, kvw_stream stream) {
    unsigned heads = unsigned(p.cache.kv_heads), seqs = unsigned(p.cache.seqs), most = unsigned(p.max_tokens);
    unsigned queries = unsigned(p.q ? (p.q_heads + PACK_WARPS - 1) / PACK_WARPS : 0);
    size_t shared = p.feedback ? Feedback<D>::BYTES : 0;
    if (p.op == KVW_PACK_APPEND)
        return KVW_LAUNCH((append<D>), dim3(heads + queries, seqs), PACK_THREADS, shared, stream, p);
    if (p.op == KVW_PACK_FLUSH)
        return KVW_LAUNCH((flush<D>), dim3(most, heads, seqs), PACK_THREADS, shared, stream, p);
    // A run of `most` slots touches one aligned tile more than it fills.
    return KVW_LAUNCH((fill<D>), dim3((most + 14) / TILE + 1, heads, seqs), PACK_THREADS, 0, stream, p);
}

} // namespace

// What APPEND turns: queries, and keys by more than RoPE.
static kvw_status check_turned(const kvw_kv_pack_params& p) {
    bool append = p.op == KVW_PACK_APPEND && p.positions;
    KVW_REQUIRE(p.hadamard == 0 || (p.hadamard == 1 && append), SHAPE, hadamard);
    KVW_OPTIONAL(p, q);
    KVW_OPTIONAL(p, q_out);
    KVW_REQUIRE(!p.q_out == !p.q, NULL, q_out);
    if (!p.q) return KVW_OK;
    int64_t row = int64_t(p.q_heads) * p.cache.head_dim;
    KVW_REQUIRE(append, SHAPE, q);
    KVW_REQUIRE(p.dtype == KVW_F16, FORMAT, dtype);
    KVW_REQUIRE(p.q_heads >= 1 && p.q_heads <= GRID_YZ_MAX, SHAPE, q_heads);
    KVW_REQUIRE(p.q_stride >= row && p.q_stride % 8 == 0, SHAPE, q_stride);
    KVW_REQUIRE(p.q != p.q_out || p.q_stride == row, SHAPE, q_stride);
    return KVW_OK;
}

kvw_status kvw_kv_pack_check(const kvw_kv_pack_params* p) {
    KVW_CHECK_PARAMS(p);
    const kvw_cache& c = p->cache;
    bool append = p->op == KVW_PACK_APPEND, fill = p->op == KVW_PACK_FILL, flush = p->op == KVW_PACK_FLUSH;
    KVW_REQUIRE(append || fill || flush, SHAPE, op);
    KVW_TRY(check_cache(c));
    KVW_REQUIRE(fill || !c.packed || (append && !p->kivi_exact), SHAPE, packed);
    KVW_REQUIRE(p->kivi_exact == 0 || (p->kivi_exact == 1 && !fill), SHAPE, kivi_exact);
    KVW_REQUIRE(p->kivi_exact == 0 || (c.meta == KVW_META_F16 && !c.pools[KVW_SLAB_FP8]), FORMAT, kivi_exact);
    KVW_REQUIRE(p->kivi_exact == 0 || (c.window >= 1 && c.window % c.group == 0), SHAPE, window);
    KVW_OPTIONAL(*p, feedback);
    KVW_REQUIRE(!p->kivi_exact || !p->feedback, FORMAT, feedback);
    KVW_REQUIRE(p->range >= 0.f && p->range <= 1.f, SHAPE, range);
    KVW_REQUIRE(!p->kivi_exact || p->range == 0.f || p->range == 1.f, FORMAT, range);
    if (flush) {
        KVW_REQUIRED(*p, first);
        KVW_REQUIRE(c.table, NULL, table);
        KVW_REQUIRE(p->max_tokens >= 1, SHAPE, max_tokens);
        return KVW_OK;
    }
    KVW_REQUIRED(*p, k);
    KVW_REQUIRED(*p, v);
    KVW_REQUIRE(p->dtype == KVW_F16 || p->dtype == KVW_BF16, FORMAT, dtype);
    KVW_OPTIONAL(*p, positions);
    KVW_OPTIONAL(*p, inv_freq);
    KVW_REQUIRE(p->positions || !p->inv_freq, NULL, positions);
    KVW_REQUIRE(p->inv_freq || !p->positions, NULL, inv_freq);
    KVW_REQUIRE(p->pairing == KVW_ROPE_INTERLEAVED || p->pairing == KVW_ROPE_HALF, SHAPE, pairing);
    int64_t row = int64_t(c.kv_heads) * c.head_dim;
    KVW_REQUIRE(p->k_stride >= row && p->k_stride % 8 == 0, SHAPE, k_stride);
    KVW_REQUIRE(p->v_stride >= row && p->v_stride % 8 == 0, SHAPE, v_stride);
    KVW_REQUIRE(fill ? p->tokens >= 1 : p->tokens == c.seqs, SHAPE, tokens);
    KVW_TRY(check_turned(*p));
    if (fill) {
        KVW_REQUIRED(*p, cu_tokens);
        int64_t room = int64_t(c.ring_slabs) * KVW_SLAB_TOKENS;
        KVW_REQUIRE(p->max_tokens >= 1 && p->max_tokens <= room, SHAPE, max_tokens);
    }
    return KVW_OK;
}

size_t kvw_kv_pack_workspace(const kvw_kv_pack_params*) { return 0; }

// APPEND counts the token and a 64th of the slab that leaves once in 64 steps; FLUSH counts full launches.
// Slabs are written in the smallest format that has a pool; what feedback holds is read once a launch.
size_t kvw_kv_pack_bytes(const kvw_kv_pack_params* p) {
    if (kvw_kv_pack_check(p) != KVW_OK) return 0;
    const kvw_cache& c = p->cache;
    size_t token = size_t(c.kv_heads) * c.head_dim * 8;
    size_t slab = slab_bytes(KVW_SLAB_F16, c.head_dim, c.group, c.meta) +
                  slab_bytes(narrowest(c), c.head_dim, c.group, c.meta);
    size_t weights = p->feedback ? size_t(c.kv_heads) * c.head_dim * (c.head_dim - 1) : 0;
    if (p->op == KVW_PACK_FILL) return p->tokens * token;
    if (p->op == KVW_PACK_FLUSH) return size_t(c.seqs) * c.kv_heads * p->max_tokens * slab + weights;
    size_t queries = p->q ? size_t(p->q_heads) * c.head_dim * 4 : 0;
    return p->tokens * (token + queries + (c.table ? (c.kv_heads * slab + weights) / TOKENS : 0));
}

kvw_status kvw_kv_pack(const kvw_kv_pack_params* p, kvw_stream stream) {
    KVW_TRY(kvw_kv_pack_check(p));
    switch (p->cache.head_dim) {
    case 64: return launch<64>(*p, stream);
    case 96: return launch<96>(*p, stream);
    case 128: return launch<128>(*p, stream);
    default: return launch<256>(*p, stream);
    }
}
