/* sample.h - the next token of each sequence: a repetition penalty, then greedy, or top-k,
 * top-p, min-p, then temperature, seeded. */
#ifndef KVWARP_SAMPLE_H
#define KVWARP_SAMPLE_H
#include "types.h"

typedef struct kvw_sample_params {
    uint32_t struct_size;     /* sizeof(kvw_sample_params) */
    int32_t seqs;             /* S */
    const float *logits;      /* [S, vocab] f32 */
    int32_t *tokens;          /* [S] out */
    const uint64_t *seeds;    /* [S]; unused by greedy rows */
    const int32_t *steps;     /* [S] draw number: (seed, step) fixes the random number */
    const float *temperature; /* [S]; 0 = greedy, ties to the lowest id */
    const float *top_p;       /* [S] in (0, 1]; 1 = off */
    const float *min_p;       /* [S] in [0, 1); 0 = off */
    const int32_t *top_k;     /* [S]; 0 = off */
    const int32_t *history;   /* [S, history_stride] ids that the penalty applies to; null = off */
    const int32_t *history_lens; /* [S] ids in use, 0 to history_stride; with history */
    const float *penalty;     /* [S] above 0: positive logits divided, others multiplied; 1 = off; with history */
    int32_t vocab;            /* at least 1 */
    int32_t history_stride;   /* 1 to 256; with history */
} kvw_sample_params;

KVW_API kvw_status kvw_sample_check(const kvw_sample_params *p);
KVW_API size_t kvw_sample_workspace(const kvw_sample_params *p);
KVW_API size_t kvw_sample_bytes(const kvw_sample_params *p);
KVW_API kvw_status kvw_sample(const kvw_sample_params *p, kvw_stream stream);

#endif
