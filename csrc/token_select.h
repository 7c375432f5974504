/* token_select.h - which tokens stay: pooled scores, exact selection, and rows gathered by index. */
#ifndef KVWARP_TOKEN_SELECT_H
#define KVWARP_TOKEN_SELECT_H
#include "types.h"

#define KVW_SELECT_POOL 0   /* windows of neighbouring scores, summed over a group of rows */
#define KVW_SELECT_TOP_K 1  /* ascending indices of the k best; ties to the lower row, then index; NaN last */
#define KVW_SELECT_ABOVE 2  /* of those that rank before the k-th best, so that all its like are left out */
#define KVW_SELECT_GATHER 3 /* rows of x, and positions, by index */

#define KVW_POOL_AVG 0 /* what lies outside counts as 0 and is divided by too */
#define KVW_POOL_MAX 1 /* what lies outside is ignored, and so is NaN unless there is nothing else */

typedef struct kvw_token_select_params {
    uint32_t struct_size;     /* sizeof(kvw_token_select_params) */
    int32_t op;               /* KVW_SELECT_* */
    const float *scores;      /* POOL: [rows, group, n]; TOP_K, ABOVE: [rows, n] */
    const int32_t *lens;      /* [rows] scores of a row in use, up to n; null: n */
    const int32_t *k;         /* [rows / segment] TOP_K, ABOVE: 0 selects nothing, more than there are all */
    int32_t *indices;         /* [rows, index_stride] out of TOP_K, ABOVE (what does not fit is left out), in of GATHER */
    int32_t *counts;          /* [rows] indices of a row: out of TOP_K, ABOVE; in of GATHER, null there: index_stride */
    float *kth;               /* [rows / segment] the k-th best score, NaN where there is none; or null */
    const void *x;            /* GATHER: rows of row_bytes, 16-byte aligned; null: positions only */
    const int32_t *first;     /* GATHER: [rows] row of x, and of positions, of index 0; null: 0 */
    const int32_t *positions; /* GATHER: of the rows of x; or null */
    void *out;                /* POOL: [rows, n] f32; GATHER: [rows, index_stride, row_bytes] */
    int32_t *out_positions;   /* GATHER: [rows, index_stride]; with positions */
    void *workspace;          /* kvw_token_select_workspace() bytes: zero them once; each call leaves them so */
    size_t workspace_bytes;
    int32_t rows;             /* 1 to 65,535 */
    int32_t n;                /* scores of a row, and its stride; at least 1 */
    int32_t group;            /* POOL: rows summed */
    int32_t width;            /* POOL: odd, 1 to 255 */
    int32_t pool;             /* POOL: KVW_POOL_* */
    int32_t segment;          /* TOP_K, ABOVE: rows that compete for one k; divides rows */
    int32_t index_stride;
    int32_t row_bytes;        /* GATHER: a multiple of 16 */
} kvw_token_select_params;

KVW_API kvw_status kvw_token_select_check(const kvw_token_select_params *p);
KVW_API size_t kvw_token_select_workspace(const kvw_token_select_params *p);
KVW_API size_t kvw_token_select_bytes(const kvw_token_select_params *p);
KVW_API kvw_status kvw_token_select(const kvw_token_select_params *p, kvw_stream stream);

#endif
