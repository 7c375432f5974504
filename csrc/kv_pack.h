/* kv_pack.h - writing the cache: RoPE, the f16 ring, and quantisation when 64 tokens leave the window. */
#ifndef KVWARP_KV_PACK_H
#define KVWARP_KV_PACK_H
#include "types.h"
#include "slab.h"

#define KVW_PACK_APPEND 0 /* one token a sequence, at slot len - 1; packs the slab that leaves the window */
#define KVW_PACK_FILL 1   /* many tokens a sequence into the ring, at slots len - n .. len - 1; packs nothing */
#define KVW_PACK_FLUSH 2  /* pack slabs first[s] .. packed - 1 from the ring into the table's slabs */

typedef struct kvw_kv_pack_params {
    uint32_t struct_size;     /* sizeof(kvw_kv_pack_params) */
    int32_t op;               /* KVW_PACK_* */
    kvw_cache cache;          /* APPEND, FILL: lens already count the new tokens; packed is null or, APPEND without
                                 kivi_exact, what was in the table before, FILL: as after it. FLUSH: packed is null */
    const void *k;            /* [T, H, D] of dtype, T = S in APPEND; not read by FLUSH */
    const void *v;            /* [T, H, D] of dtype */
    const int32_t *positions; /* [T] RoPE positions; null: K is rotated already */
    const float *inv_freq;    /* [D / 2] radians a position, scaling applied; null with positions null */
    const void *q;            /* [T, q_heads, D] f16: queries, which APPEND turns as it does keys; or null */
    void *q_out;              /* [T, q_heads, D] f16, may be q; null with q null */
    const int32_t *cu_tokens; /* [S + 1] first row of each sequence in k, v (FILL) */
    const int32_t *first;     /* [S, lens_heads] first slab to pack (FLUSH) */
    const void *feedback;     /* [H, D, D] f16: weights of K's rounding errors, row j of channels < j; null: none */
    int64_t k_stride;         /* elements between tokens of k, H * D when dense */
    int64_t v_stride;         /* elements between tokens of v */
    int64_t q_stride;         /* elements between tokens of q, a multiple of 8 */
    int32_t tokens;           /* T */
    int32_t max_tokens;       /* FILL: most new tokens of any sequence; FLUSH: most slabs of any (seq, head) */
    int32_t q_heads;
    int32_t hadamard;         /* 1 (APPEND with positions): K and q after RoPE times the Hadamard matrix of D; or 0 */
    int32_t pairing;          /* KVW_ROPE_INTERLEAVED or KVW_ROPE_HALF */
    int32_t kivi_exact;       /* 1 (APPEND, FLUSH): KIVI's own boundaries, window % group == 0; see kv_pack.cu */
    float range;              /* share of a group's range that 2-bit codes span, in (0, 1]; 0: all of it */
    int32_t dtype;            /* of k, v: KVW_F16 or KVW_BF16; beyond f16's range they become +-65504 */
} kvw_kv_pack_params;

KVW_API kvw_status kvw_kv_pack_check(const kvw_kv_pack_params *p);
KVW_API size_t kvw_kv_pack_workspace(const kvw_kv_pack_params *p);
KVW_API size_t kvw_kv_pack_bytes(const kvw_kv_pack_params *p);
KVW_API kvw_status kvw_kv_pack(const kvw_kv_pack_params *p, kvw_stream stream);

#endif
