/* sim_evict.h - scores of tokens without attention: LagKV, key norms, and KVCrush's bits and representatives. */
#ifndef KVWARP_SIM_EVICT_H
#define KVWARP_SIM_EVICT_H
#include "types.h"
#include "slab.h"

#define KVW_EVICT_LAG 0       /* LagKV: partitions of lag tokens, each scored against the next */
#define KVW_EVICT_NORM 1      /* lengths of keys */
#define KVW_EVICT_BITS 2      /* which heads would keep a token */
#define KVW_EVICT_REPRESENT 3 /* tokens that stand for the candidates */

/* Where the extremes of K's channels in a reference come from. */
#define KVW_LAG_ELEMENTS 0
#define KVW_LAG_META 1 /* scales and minima of groups that lie in it whole, elements elsewhere */

/* What REPRESENT measures distances from. */
#define KVW_ANCHOR_MEAN 0      /* each bit that more than half of the tokens have */
#define KVW_ANCHOR_RANDOM 1    /* of the seed */
#define KVW_ANCHOR_ALTERNATE 2 /* of every odd head */
#define KVW_ANCHOR_ZEROS 3
#define KVW_ANCHOR_ONES 4

typedef struct kvw_sim_evict_params {
    uint32_t struct_size;      /* sizeof(kvw_sim_evict_params) */
    int32_t op;                /* KVW_EVICT_* */
    kvw_cache cache;           /* LAG, NORM; BITS and REPRESENT read seqs and kv_heads alone, H at most 32 */
    float *scores;             /* LAG: out [S, H, partitions, lag]; NORM: out [S, H, columns] */
    const int32_t *first;      /* LAG, NORM: [S, lens_heads] slot of the first score; null: 0 */
    const int32_t *kept;       /* BITS: [S, H, kept_stride] tokens that a head would keep, ascending, below columns */
    const int32_t *kept_counts; /* BITS: [S, H] of them, 0 to kept_stride */
    uint32_t *bits;            /* [S, columns] out of BITS, in of REPRESENT; bit h is head h's */
    const int32_t *counts;     /* REPRESENT: [S] tokens of a row of bits, 0 to columns */
    const int32_t *candidates; /* REPRESENT: [S, columns] ascending tokens; null: all */
    const int32_t *candidate_counts; /* [S] 0 to columns; with candidates */
    const int32_t *wanted;     /* REPRESENT: [S] representatives */
    int32_t *chosen;           /* REPRESENT: out [S, columns]: the first min(wanted, candidates) of a row, ascending */
    uint64_t seed;             /* REPRESENT: of KVW_ANCHOR_RANDOM */
    int32_t lag;               /* LAG: tokens a partition, a multiple of 16 up to 1024 */
    int32_t partitions;        /* LAG: most that are scored of a head; floor((len - first) / lag) - 1 are */
    int32_t columns;           /* NORM: slots scored of a head; BITS, REPRESENT: tokens of a row, up to 2^17 */
    int32_t kept_stride;       /* BITS */
    int32_t reference;         /* LAG: KVW_LAG_* */
    int32_t anchor;            /* REPRESENT: KVW_ANCHOR_* */
    float v_weight;            /* LAG: of V's softmax; K's has 1 */
    int32_t plain;             /* REPRESENT: 1 = the kernel in CUDA C++, not that of ptx/; the same tokens */
} kvw_sim_evict_params;

KVW_API kvw_status kvw_sim_evict_check(const kvw_sim_evict_params *p);
KVW_API size_t kvw_sim_evict_workspace(const kvw_sim_evict_params *p);
KVW_API size_t kvw_sim_evict_bytes(const kvw_sim_evict_params *p);
KVW_API kvw_status kvw_sim_evict(const kvw_sim_evict_params *p, kvw_stream stream);

#endif
