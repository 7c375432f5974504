// kv_pack: writing the cache: RoPE, the f16 ring, and packing of the 64 tokens that leave the window.
//
// Math      K' = rotate(K, position), beyond the range of f16 +-65504, as V; ring[slot] = (K', V); packed
//           slab = quantise(its 64 tokens), bit for bit src/slab/codec.rs::encode_rounded
// Shapes    k, v [T, H, D] f16 or bf16 with strides between tokens; the cache as slab.h has it
// Layout    K quantised per channel over group tokens, V per token over group channels (KIVI,
//           arXiv:2402.02750)
// Bytes     8 D a token and head; f16 slabs are read and packed ones written, and the lower half of feedback is
//           read -> kvw_kv_pack_bytes()
// Launch    APPEND grid (H, S), FILL (tiles of 16 tokens, H, S), FLUSH (slabs, H, S); 128 threads, at
//           most 17 KB of shared memory; with feedback 320 D bytes more
// Workspace none
// Order     deterministic; no atomics; every word of a slab is written by the one lane that owns it
// Oracle    src/slab/codec.rs, src/kv_pack/kivi.rs
//
// APPEND: a slab leaves the window with token len - 1 if (len - window) is a positive multiple of 64. In
// a ring of kvw_ring_slabs(window) that token may fall on the slab's first one, so the slab is packed
// before the token is written; only with window 0 the slab holds the token itself and comes after it. The
// entry's format decides: fp8, q8, q4 and q2 are packed, f16 is copied, a hole drops the tokens.
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
#include "kv_pack.h"
#include "rope_select.h"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/feedback.cuh"

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

template <int D> PRIM KeyWords key_words(const Params& p, int64_t token, int head, int n) {
    bool half = p.pairing == KVW_ROPE_HALF;
    KeyWords w = {{half ? 2 * n : 4 * n, half ? 2 * n + D / 2 : 4 * n + 2}, {}};
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

template <int D> constexpr int V_SECTION = Slab<KVW_SLAB_F16, D, 32>::V_CODES;

template <int D> PRIM __half& v_element(unsigned char* slab, int token, int channel) {
    return *reinterpret_cast<__half*>(slab + V_SECTION<D> + v_word<D>(token, channel) + token % 2 * 2);
}

template <int D> PRIM unsigned char* ring_slab(const Head<D, 0>& head, int slab) {
    return head.ring + size_t(slab % head.cache.ring_slabs) * Slab<KVW_SLAB_F16, D, 32>::BYTES;
}

// Row `token` of k and v to `slot` of the ring.
template <int D> PRIM void write_token(const Params& p, const Head<D, 0>& head, int64_t token, int slot) {
    unsigned char* slab = ring_slab(head, slot / TOKENS);
    int at = slot % TOKENS;
    for (int n = int(threadIdx.x); n < D / 4; n += PACK_THREADS) {
        KeyWords w = key_words<D>(p, token, head.head, n);
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
    int s = int(blockIdx.y), window = p.cache.window;
    Head<D, 0> head(p.cache, s, int(blockIdx.x));
    int len = head.len, rest = len - window;
    if (len < 1) return;
    bool leaves = rest >= TOKENS && rest % TOKENS == 0;
    bool first = window == 0 || p.kivi_exact || KVW_FAULT(202);
    if (first) write_token(p, head, s, len - 1);
    __syncthreads();
    if (!p.kivi_exact && leaves) pack_slab(p, head, rest / TOKENS - 1, meta, shared);
    __syncthreads();
    if (!first) write_token(p, head, s, len - 1);
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
    size_t shared = p.feedback ? Feedback<D>::BYTES : 0;
    if (p.op == KVW_PACK_APPEND)
        return KVW_LAUNCH((append<D>), dim3(heads, seqs), PACK_THREADS, shared, stream, p);
    if (p.op == KVW_PACK_FLUSH)
        return KVW_LAUNCH((flush<D>), dim3(most, heads, seqs), PACK_THREADS, shared, stream, p);
    // A run of `most` slots touches one aligned tile more than it fills.
    return KVW_LAUNCH((fill<D>), dim3((most + 14) / TILE + 1, heads, seqs), PACK_THREADS, 0, stream, p);
}

} // namespace

kvw_status kvw_kv_pack_check(const kvw_kv_pack_params* p) {
    KVW_CHECK_PARAMS(p);
    const kvw_cache& c = p->cache;
    bool append = p->op == KVW_PACK_APPEND, fill = p->op == KVW_PACK_FILL, flush = p->op == KVW_PACK_FLUSH;
    KVW_REQUIRE(append || fill || flush, SHAPE, op);
    KVW_TRY(check_cache(c));
    KVW_REQUIRE(fill || !c.packed, SHAPE, packed);
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
    return p->tokens * (token + (c.table ? (c.kv_heads * slab + weights) / TOKENS : 0));
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
