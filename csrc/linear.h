/* linear.h - y = x W^T + bias for one to sixteen rows of x; larger products belong to cuBLAS.
 *
 * Planes of a matrix in blocks: the bytes of its GGUF blocks in another order, codes first, no padding. A run is
 * 128 columns (Q8_0: 64), the last of a row maybe fewer; n is its number of 32s. Little-endian, row by row:
 *
 *   Q8_0      codes [rows, cols] bytes: in a run, 8 bytes for each (q, j), q of 4, j of n; byte k is column
 *             32 j + 8 q + k / 4 * 4 + k % 2 * 2 + k / 2 % 2.   d [rows, cols / 32] f16
 *   Q4_0      codes [rows, cols / 2] bytes: in a run, a word for each (q, j); nibble k, from bit 4 k, is column
 *             32 j + 8 q + k % 4 * 2 + k / 4.   d [rows, cols / 32] f16
 *   Q4_1      codes as in Q4_0.   (d, m) [rows, cols / 32, 2] f16
 *   Q4_K      codes as in Q4_0.   first 16 bytes of each block, d, dmin, s and m: [rows, cols / 256, 16]
 *   Q6_K      low four bits as in Q4_0, but column 32 j + k / 2 % 2 * 16 + 4 q + k % 2 * 2 + k / 4.
 *             high two bits [rows, cols / 4] bytes: in each 256 columns, a word for each (q, i), i of 4; the
 *             pair from bit 16 b + 8 c + 2 a belongs to nibble a + 4 b of word (q, j), j = 2 i + c of 8.
 *             s [rows, cols / 16] bytes.   d [rows, cols / 256] f16
 */
#ifndef KVWARP_LINEAR_H
#define KVWARP_LINEAR_H
#include "types.h"

typedef struct kvw_linear_params {
    uint32_t struct_size; /* sizeof(kvw_linear_params) */
    int32_t dtype;        /* of weight: any element type but KVW_F32 */
    const void *weight;   /* [rows, cols], types of blocks in planes */
    const void *x;        /* [T, cols] f16 */
    const float *bias;    /* [rows] or null */
    void *y;              /* [T, rows] f16 or f32 */
    int32_t y_dtype;      /* KVW_F16 or KVW_F32 */
    int32_t accumulate;   /* 1: y += (y_dtype KVW_F32 only), the residual connection */
    int32_t tokens;       /* T, 1 to 16 */
    int32_t rows;
    int32_t cols;         /* a multiple of 8, and of the block */
    int32_t reserved;     /* 0 */
} kvw_linear_params;

KVW_API kvw_status kvw_linear_check(const kvw_linear_params *p);
KVW_API size_t kvw_linear_workspace(const kvw_linear_params *p);
KVW_API size_t kvw_linear_bytes(const kvw_linear_params *p);
KVW_API kvw_status kvw_linear(const kvw_linear_params *p, kvw_stream stream);

#endif
