/* paged_attn.h - one decode step of attention over mixed-format slabs and the f16 ring, split over slabs. */
#ifndef KVWARP_PAGED_ATTN_H
#define KVWARP_PAGED_ATTN_H
#include "kvwarp.h"

typedef struct kvw_paged_attn_params {
    uint32_t struct_size;   /* sizeof(kvw_paged_attn_params) */
    int32_t q_heads;        /* H * G, G from 1 to 16 */
    kvw_cache cache;        /* lens count the newest token */
    const void *q;          /* [S, H * G, D] f16, rotated */
    void *out;              /* [S, H * G, D] f16; zeros where a head holds no tokens */
    float *lse;             /* [S, H * G] natural-log sum of exponentials, or null; -inf where no tokens */
    void *workspace;        /* kvw_paged_attn_workspace() bytes; contents need no initialisation */
    size_t workspace_bytes;
    int32_t max_slabs;      /* bound on ceil(len / 64) over all (seq, head): sizes the grid */
    int32_t splits;         /* CTAs a (seq, head); 0 = chosen from max_slabs */
    int32_t sliding_window; /* attend to the newest sliding_window tokens only; 0 = all */
    float scale;            /* of q . k; 0 = 1 / sqrt(D) */
} kvw_paged_attn_params;

kvw_status kvw_paged_attn_check(const kvw_paged_attn_params *p);
size_t kvw_paged_attn_workspace(const kvw_paged_attn_params *p);
size_t kvw_paged_attn_bytes(const kvw_paged_attn_params *p);
kvw_status kvw_paged_attn(const kvw_paged_attn_params *p, kvw_stream stream);

#endif
