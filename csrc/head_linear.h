/* head_linear.h - a matrix for each kv head times rows of its query heads: what absorbs and expands a latent. */
#ifndef KVWARP_HEAD_LINEAR_H
#define KVWARP_HEAD_LINEAR_H
#include "types.h"

typedef struct kvw_head_linear_params {
    uint32_t struct_size;  /* sizeof(kvw_head_linear_params) */
    int32_t tokens;        /* T */
    const void *weight;    /* [H, rows, cols] f16 */
    const void *x;         /* T rows of x_stride elements, H * G heads of each head_stride apart, cols read; f16 */
    void *y;               /* [T, H * G, rows] f16 */
    const float *bias;     /* [H, rows], added to every row of its head; or null */
    int64_t x_stride;      /* a multiple of 8 */
    int32_t x_head_stride; /* a multiple of 8 */
    int32_t kv_heads;      /* H */
    int32_t q_heads;       /* H * G */
    int32_t rows;
    int32_t cols;          /* a multiple of 8 */
    int32_t reserved;      /* 0 */
} kvw_head_linear_params;

KVW_API kvw_status kvw_head_linear_check(const kvw_head_linear_params *p);
KVW_API size_t kvw_head_linear_workspace(const kvw_head_linear_params *p);
KVW_API size_t kvw_head_linear_bytes(const kvw_head_linear_params *p);
KVW_API kvw_status kvw_head_linear(const kvw_head_linear_params *p, kvw_stream stream);

#endif
