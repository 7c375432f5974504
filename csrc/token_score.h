/* token_score.h - what attention gives to tokens: column sums and maxima of exp(s - lse), and log-sum-exps over a
 * subset of slots. */
#ifndef KVWARP_TOKEN_SCORE_H
#define KVWARP_TOKEN_SCORE_H
#include "types.h"
#include "slab.h"

#define KVW_SCORE_LSE 0 /* of each row over the slots of its sequence's ranges */
#define KVW_SCORE_SUM 1 /* of a column over rows, for each query head */
#define KVW_SCORE_MAX 2 /* of a column over rows and the query heads of a kv head */

typedef struct kvw_token_score_params {
    uint32_t struct_size;     /* sizeof(kvw_token_score_params) */
    int32_t op;               /* KVW_SCORE_* */
    kvw_cache cache;          /* lens count the rows: row i of n is slot len - n + i and sees the slots up to it */
    const void *q;            /* [T, H * G, D] of dtype, rotated; the last row of sequence s is its newest token */
    float *lse;               /* [S, lse_rows, H * G] natural log, of the last lse_rows rows, as prefill_attn leaves
                                 it: out of LSE, in of SUM and MAX, where a row of minus infinity gives nothing */
    float *scores;            /* SUM: [S, H, G, columns], MAX: [S, H, columns]; 0 where no row sees the slot */
    const int32_t *cu_tokens; /* [S + 1] first row of each sequence in q */
    const int32_t *first;     /* [S, lens_heads] slot of column 0; null: 0 */
    const int32_t *seen;      /* LSE: [S, ranges, 2] slots from .. to - 1, which do not overlap; null: all */
    int32_t q_heads;          /* H * G, G from 1 to 16 */
    int32_t tokens;           /* T */
    int32_t max_tokens;       /* most rows of any sequence in q */
    int32_t lse_rows;         /* only so many of the last rows take part; at least 1 */
    int32_t columns;          /* SUM, MAX: slots scored of each head; what lies past its length gets 0 */
    int32_t ranges;           /* LSE: with seen, at least 1 */
    int32_t max_slabs;        /* LSE: most slabs seen of any (sequence, head), for kvw_token_score_bytes; 0 = not
                                 known */
    int32_t accumulate;       /* 1: scores are added to, or the larger is kept, so that rows may come in pieces */
    int32_t dtype;            /* of q: KVW_F16 or KVW_BF16 */
    float scale;              /* of q . k; 0: 1 / sqrt(D) */
} kvw_token_score_params;

KVW_API kvw_status kvw_token_score_check(const kvw_token_score_params *p);
KVW_API size_t kvw_token_score_workspace(const kvw_token_score_params *p);
KVW_API size_t kvw_token_score_bytes(const kvw_token_score_params *p);
KVW_API kvw_status kvw_token_score(const kvw_token_score_params *p, kvw_stream stream);

#endif
