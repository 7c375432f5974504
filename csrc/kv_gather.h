/* kv_gather.h - what an eviction leaves: rows of a staged f16 ring into packed slabs and a ring, in one pass. */
#ifndef KVWARP_KV_GATHER_H
#define KVWARP_KV_GATHER_H
#include "types.h"
#include "slab.h"

typedef struct kvw_kv_gather_params {
    uint32_t struct_size;  /* sizeof(kvw_kv_gather_params) */
    int32_t max_slabs;     /* most slabs written of any (sequence, head); at least 1 */
    kvw_cache cache;       /* what is written: lens count the gathered tokens, which fill the slabs in the table whole */
    const void *from;      /* [S, H, from_slabs] f16 slabs, slot i in slab i / 64 % from_slabs; not the cache's ring */
    const int32_t *slots;  /* [S, H, slots_stride] slots of from, ascending; each head has its own */
    const int32_t *first;  /* [S, lens_heads] first slab written; null: 0. Entry i of slots goes to slot 64 first + i */
    const void *feedback;  /* [H, D, D] f16 as in kv_pack.h; null: none */
    int32_t from_slabs;    /* at least 1 */
    int32_t slots_stride;  /* at least the most gathered tokens of a head */
    float range;           /* as in kv_pack.h */
    int32_t reserved;      /* 0 */
} kvw_kv_gather_params;

KVW_API kvw_status kvw_kv_gather_check(const kvw_kv_gather_params *p);
KVW_API size_t kvw_kv_gather_workspace(const kvw_kv_gather_params *p);
KVW_API size_t kvw_kv_gather_bytes(const kvw_kv_gather_params *p);
KVW_API kvw_status kvw_kv_gather(const kvw_kv_gather_params *p, kvw_stream stream);

#endif
