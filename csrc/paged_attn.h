/* paged_attn.h - attention of 1 to 16 new tokens a sequence over mixed-format slabs and the f16 ring. */
#ifndef KVWARP_PAGED_ATTN_H
#define KVWARP_PAGED_ATTN_H
#include "types.h"
#include "slab.h"

typedef struct kvw_paged_attn_params {
    uint32_t struct_size;   /* sizeof(kvw_paged_attn_params) */
    int32_t q_heads;        /* H * G, G from 1 to 16 */
    kvw_cache cache;        /* lens count all q_len new tokens */
    const void *q;          /* [S, q_len, H * G, D], rotary embedding applied */
    void *out;              /* [S, q_len, H * G, D]; zeros where a row sees no tokens */
    float *lse;             /* [S, q_len, H * G] natural-log sum of exponentials, or null; -inf where no tokens */
    void *workspace;        /* kvw_paged_attn_workspace() bytes: zero its first KVW_PAGED_ATTN_TICKETS bytes
                               once; every call leaves them zero. Not for two calls at the same time */
    size_t workspace_bytes;
    const float *sinks;     /* [H * G] score of a token without value that every row sees, or null */
    const float *k_norm;    /* [S, H, k_norm_stride] by token: multiplies its scores; or null */
    const void *rotation;   /* [D, D] f16, row major: q is replaced by R q; or null */
    int32_t k_norm_stride;  /* >= the longest len where k_norm is given */
    int32_t q_len;          /* 1 to 16; row i of a sequence sees tokens below len - q_len + i + 1 */
    int32_t max_slabs;      /* bound on ceil(len / 64) over all (seq, head): may make the grid smaller */
    int32_t ctas;           /* CTAs that share the work, to 4096; 0 = 396, three on each of 132 SMs */
    int32_t least;          /* units a CTA takes at least, to 65536; 0 = 4. A unit: a slab, 16 tokens of the ring */
    int32_t sliding_window; /* a row sees its newest sliding_window tokens only; 0 = all */
    int32_t dtype;          /* of q and out: KVW_F16 or KVW_BF16 */
    float scale;            /* of q . k; 0 = 1 / sqrt(D) */
    float softcap;          /* scores become softcap * tanh(score / softcap); 0 = off */
} kvw_paged_attn_params;

#define KVW_PAGED_ATTN_TICKETS 16384

KVW_API kvw_status kvw_paged_attn_check(const kvw_paged_attn_params *p);
KVW_API size_t kvw_paged_attn_workspace(const kvw_paged_attn_params *p);
KVW_API size_t kvw_paged_attn_bytes(const kvw_paged_attn_params *p);
KVW_API kvw_status kvw_paged_attn(const kvw_paged_attn_params *p, kvw_stream stream);

#endif
