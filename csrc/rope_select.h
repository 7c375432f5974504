/* rope_select.h - rotary position embedding of queries or keys; every pair selected is plain RoPE.
 *
 * With lists of pairs (EliteKV) a head turns its r elite pairs alone. They come first in its row, [r first halves | r
 * second halves | D - 2 r others]: an engine permutes the rows of W_q and W_k so when it loads them. Element i turns
 * with element r + i, by the frequency of the pair that the list names in place i; the others stay. Of keys only the
 * elite elements are rows of x: the rest heads then have 2 r elements, not D.
 */
#ifndef KVWARP_ROPE_SELECT_H
#define KVWARP_ROPE_SELECT_H
#include "types.h"

#define KVW_ROPE_INTERLEAVED 0 /* pair i = channels (2i, 2i + 1): GGUF's llama tensors */
#define KVW_ROPE_HALF 1        /* pair i = channels (i, i + D / 2): Hugging Face, GGUF's qwen2 tensors */

typedef struct kvw_rope_select_params {
    uint32_t struct_size;     /* sizeof(kvw_rope_select_params) */
    int32_t pairing;          /* KVW_ROPE_* */
    const void *x;            /* [T, heads, D] f16 */
    void *out;                /* [T, heads - rest_heads, D] f16, may be x */
    void *rest;               /* [T, rest_heads, D] f16: the last of x's heads, may be where they lie; or null */
    const int8_t *pairs;      /* [lists, elite] pairs below D / 2, each once in a list; null: every pair of every head */
    const int32_t *positions; /* [T] */
    const float *inv_freq;    /* [D / 2] radians a position, scaling applied */
    int64_t x_stride;         /* elements between tokens of x */
    int64_t out_stride;       /* elements between tokens of out */
    int64_t rest_stride;      /* elements between tokens of rest */
    int32_t tokens;           /* T */
    int32_t heads;            /* of x */
    int32_t rest_heads;       /* 0 where rest is null */
    int32_t head_dim;         /* D, even, at most 256 */
    int32_t hadamard;         /* 1: then times the orthonormal Hadamard matrix of D, 64, 96, 128 or 256; or 0 */
    int32_t elite;            /* r, pairs of a list, to D / 2; 0 where pairs is null */
    int32_t lists;            /* each for as many neighbouring heads, of out and of rest; 0 where pairs is null */
    int32_t reserved;         /* 0 */
} kvw_rope_select_params;

KVW_API kvw_status kvw_rope_select_check(const kvw_rope_select_params *p);
KVW_API size_t kvw_rope_select_workspace(const kvw_rope_select_params *p);
KVW_API size_t kvw_rope_select_bytes(const kvw_rope_select_params *p);
KVW_API kvw_status kvw_rope_select(const kvw_rope_select_params *p, kvw_stream stream);

#endif
