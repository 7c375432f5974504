/* prefill_attn.h - causal attention of a chunk of queries over slabs that already hold the chunk's own K and V. */
#ifndef KVWARP_PREFILL_ATTN_H
#define KVWARP_PREFILL_ATTN_H
#include "types.h"
#include "slab.h"

typedef struct kvw_prefill_attn_params {
    uint32_t struct_size;     /* sizeof(kvw_prefill_attn_params) */
    int32_t q_heads;          /* H * G, G from 1 to 16 */
    kvw_cache cache;          /* lens count the chunk; packed is set: the chunk lies in the ring, f16 */
    const void *q;            /* [T, H * G, D] of dtype, rotated; the last row of sequence s is its newest token */
    void *out;                /* [T, H * G, D] of dtype */
    float *lse;               /* [S, lse_rows, H * G] natural log, of the last lse_rows rows, or null; a sequence
                                 with fewer rows leaves its leading ones untouched */
    const int32_t *cu_tokens; /* [S + 1] first row of each sequence */
    int32_t tokens;           /* T */
    int32_t max_tokens;       /* most rows of any sequence */
    int32_t lse_rows;
    int32_t max_slabs;        /* most slabs of any (sequence, head), for kvw_prefill_attn_bytes; 0 = not known */
    int32_t sliding_window;   /* a query sees itself and the sliding_window - 1 tokens before it; 0 = all */
    int32_t dtype;            /* KVW_F16 or KVW_BF16 */
    float scale;              /* of q . k; 0 = 1 / sqrt(D) */
    int32_t reserved;         /* 0 */
} kvw_prefill_attn_params;

KVW_API kvw_status kvw_prefill_attn_check(const kvw_prefill_attn_params *p);
KVW_API size_t kvw_prefill_attn_workspace(const kvw_prefill_attn_params *p);
KVW_API size_t kvw_prefill_attn_bytes(const kvw_prefill_attn_params *p);
KVW_API kvw_status kvw_prefill_attn(const kvw_prefill_attn_params *p, kvw_stream stream);

#endif
