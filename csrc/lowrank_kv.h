/* lowrank_kv.h - EliteKV's cache: one latent for all heads and a few rotated pairs of each; written, packed, attended to.
 *
 * A query head's row of D elements is [r first halves of its elite pairs | r second halves | the D - 2 r others]: an
 * engine permutes the rows of W_q when it loads them, and those of W_k that remain, so that rope_select turns the first
 * 2 r elements where they lie. head_linear multiplies the others by B_K of the head, which gives the latent query, and
 * what attention returns by B_V. common/latent.cuh has the bytes of a slab.
 */
#ifndef KVWARP_LOWRANK_KV_H
#define KVWARP_LOWRANK_KV_H
#include "types.h"
#include "slab.h"

#define KVW_LOWRANK_APPEND 0 /* write rows of new tokens, one or many a sequence */
#define KVW_LOWRANK_ATTEND 1 /* attention of the newest tokens of each sequence */
#define KVW_LOWRANK_READ 2   /* rows of tokens that are held, one or many a sequence; those in holes stay as they are */
#define KVW_LOWRANK_PACK 3   /* full f16 slabs into slabs of codes */

#define KVW_LATENT_MOST 2432 /* largest rank */

typedef struct kvw_latent {
    void *pool;            /* [slabs][kvw_latent_slab_bytes] of f16: those that are not full, or all */
    void *packed;          /* the same of `format`; null where that is KVW_SLAB_F16 */
    const uint32_t *table; /* [S, table_stride] entries of KVW_SLAB_F16 or of `format`; of any other: a hole */
    const int32_t *lens;   /* [S] tokens held, new ones included */
    int32_t seqs;          /* S >= 1 */
    int32_t kv_heads;      /* H >= 1 */
    int32_t pairs;         /* r elite pairs a head, 1 to 64, r * H a multiple of 4 */
    int32_t rank;          /* c, a multiple of 16 to KVW_LATENT_MOST */
    int32_t table_stride;  /* entries a row */
    int32_t format;        /* of packed: KVW_SLAB_Q4 or KVW_SLAB_Q2; KVW_SLAB_F16: there are none */
} kvw_latent;

typedef struct kvw_lowrank_kv_params {
    uint32_t struct_size;     /* sizeof(kvw_lowrank_kv_params) */
    int32_t op;               /* KVW_LOWRANK_* */
    kvw_latent cache;
    void *z;                  /* APPEND: [T, c] f16, READ writes it */
    void *k;                  /* APPEND: [T, H, 2 r] f16, rotated; READ writes it */
    const int32_t *cu_tokens; /* APPEND, READ: [S + 1] first row of each, at slots len - n ..; null: one row each */
    const uint32_t *moves;    /* PACK: [T, 2] entries: the slab that is packed, and where it goes; a hole: nothing */
    const void *q;            /* ATTEND: [S, q_len, H * G, c] f16, latent queries */
    const void *q_elite;      /* ATTEND: 2 r rotated elements a query head, f16 */
    void *out;                /* ATTEND: [S, q_len, H * G, c] f16, sums of p * z; zeros where no tokens are seen */
    float *lse;               /* ATTEND: [S, q_len, H * G] natural-log sum of exponentials, -inf of none; or null */
    void *workspace;          /* ATTEND: kvw_lowrank_kv_workspace() bytes, not for two calls at the same time */
    size_t workspace_bytes;
    int64_t z_stride;         /* elements between tokens of z, a multiple of 8 */
    int64_t k_stride;         /* elements between tokens of k, a multiple of 8 */
    int64_t q_elite_stride;   /* elements between query tokens of q_elite, even */
    int32_t head_stride;      /* elements between heads of q_elite, even: D where they lie in the queries */
    int32_t tokens;           /* APPEND, READ, PACK: T */
    int32_t max_tokens;       /* APPEND, READ: most of these tokens of a sequence */
    int32_t q_heads;          /* ATTEND: H * G, at most 1024 */
    int32_t max_slabs;        /* ATTEND: bound on ceil(len / 64) */
    int32_t ctas;             /* ATTEND: CTAs that share the work, to 4096; 0 = what 132 SMs hold at once */
    int32_t least;            /* ATTEND: slabs a CTA takes at least, to 65536; 0 = 8 */
    float scale;              /* ATTEND: of a score, 1 / sqrt(D) */
    int32_t q_len;            /* ATTEND: newest tokens of each sequence, 1 to 16; each sees those up to itself */
    float range;              /* PACK: share of a group's range that 2-bit codes span, above 0, at most 1 */
} kvw_lowrank_kv_params;

/* 64 rows of c + 2 r H elements: of each element 128 bytes in f16, 36 in q4, 20 in q2, the f16 scale and minimum of its 64
 * tokens included. 0 for numbers that are refused. */
KVW_API size_t kvw_latent_slab_bytes(int32_t format, int32_t rank, int32_t pairs, int32_t kv_heads);

KVW_API kvw_status kvw_lowrank_kv_check(const kvw_lowrank_kv_params *p);
KVW_API size_t kvw_lowrank_kv_workspace(const kvw_lowrank_kv_params *p);
KVW_API size_t kvw_lowrank_kv_bytes(const kvw_lowrank_kv_params *p);
KVW_API kvw_status kvw_lowrank_kv(const kvw_lowrank_kv_params *p, kvw_stream stream);

#endif
