/* embed.h - token ids to rows of the embedding matrix; all rows of a matrix unpacked. */
#ifndef KVWARP_EMBED_H
#define KVWARP_EMBED_H
#include "types.h"

typedef struct kvw_embed_params {
    uint32_t struct_size; /* sizeof(kvw_embed_params) */
    int32_t dtype;        /* of table: any element type */
    const void *table;    /* [vocab, width], types of blocks in planes (linear.h) */
    const int32_t *ids;   /* [T]; an id outside 0 .. vocab - 1 gives a row of zeros; null = 0 .. T - 1 */
    void *out;            /* [T, width] f32, the residual stream, or f16 */
    int32_t tokens;       /* T */
    int32_t vocab;
    int32_t width;        /* a multiple of 8, and of the block */
    int32_t out_dtype;    /* KVW_F32 or KVW_F16 */
} kvw_embed_params;

KVW_API kvw_status kvw_embed_check(const kvw_embed_params *p);
KVW_API size_t kvw_embed_workspace(const kvw_embed_params *p);
KVW_API size_t kvw_embed_bytes(const kvw_embed_params *p);
KVW_API kvw_status kvw_embed(const kvw_embed_params *p, kvw_stream stream);

#endif
