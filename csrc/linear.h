/* linear.h - y = x W^T + bias for one to sixteen rows of x; larger products belong to cuBLAS. */
#ifndef KVWARP_LINEAR_H
#define KVWARP_LINEAR_H
#include "kvwarp.h"

typedef struct kvw_linear_params {
    uint32_t struct_size; /* sizeof(kvw_linear_params) */
    int32_t dtype;        /* of weight: KVW_F16 or KVW_BF16 */
    const void *weight;   /* [rows, cols] */
    const void *x;        /* [T, cols] f16 */
    const float *bias;    /* [rows] or null */
    void *y;              /* [T, rows] f16 or f32 */
    int32_t y_dtype;      /* KVW_F16 or KVW_F32 */
    int32_t accumulate;   /* 1: y += (y_dtype KVW_F32 only), the residual connection */
    int32_t tokens;       /* T, 1 to 16 */
    int32_t rows;
    int32_t cols;         /* a multiple of 8 */
    int32_t reserved;     /* 0 */
} kvw_linear_params;

kvw_status kvw_linear_check(const kvw_linear_params *p);
size_t kvw_linear_workspace(const kvw_linear_params *p);
size_t kvw_linear_bytes(const kvw_linear_params *p);
kvw_status kvw_linear(const kvw_linear_params *p, kvw_stream stream);

#endif
