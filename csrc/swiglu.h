/* swiglu.h - silu(gate) * up, the activation of the feed-forward block. */
#ifndef KVWARP_SWIGLU_H
#define KVWARP_SWIGLU_H
#include "types.h"

typedef struct kvw_swiglu_params {
    uint32_t struct_size; /* sizeof(kvw_swiglu_params) */
    int32_t tokens;       /* T */
    const void *gate;     /* [T, width] f16 */
    const void *up;       /* [T, width] f16 */
    void *out;            /* [T, width] f16, may be gate or up */
    int64_t in_stride;    /* elements between tokens of gate and of up */
    int32_t width;        /* a multiple of 8 */
    int32_t reserved;     /* 0 */
} kvw_swiglu_params;

KVW_API kvw_status kvw_swiglu_check(const kvw_swiglu_params *p);
KVW_API size_t kvw_swiglu_workspace(const kvw_swiglu_params *p);
KVW_API size_t kvw_swiglu_bytes(const kvw_swiglu_params *p);
KVW_API kvw_status kvw_swiglu(const kvw_swiglu_params *p, kvw_stream stream);

#endif
