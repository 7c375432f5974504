/* embed.h - token ids to rows of the embedding matrix. */
#ifndef KVWARP_EMBED_H
#define KVWARP_EMBED_H
#include "kvwarp.h"

typedef struct kvw_embed_params {
    uint32_t struct_size; /* sizeof(kvw_embed_params) */
    int32_t dtype;        /* of table: KVW_F16, KVW_BF16 or KVW_F32 */
    const void *table;    /* [vocab, width] */
    const int32_t *ids;   /* [T]; an id outside 0 .. vocab - 1 gives a row of zeros */
    float *out;           /* [T, width] f32, the residual stream */
    int32_t tokens;       /* T */
    int32_t vocab;
    int32_t width;        /* a multiple of 8 */
    int32_t reserved;     /* 0 */
} kvw_embed_params;

kvw_status kvw_embed_check(const kvw_embed_params *p);
size_t kvw_embed_workspace(const kvw_embed_params *p);
size_t kvw_embed_bytes(const kvw_embed_params *p);
kvw_status kvw_embed(const kvw_embed_params *p, kvw_stream stream);

#endif
