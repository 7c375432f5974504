/* rms_norm.h - root mean square layer normalisation of the residual stream. */
#ifndef KVWARP_RMS_NORM_H
#define KVWARP_RMS_NORM_H
#include "types.h"

typedef struct kvw_rms_norm_params {
    uint32_t struct_size; /* sizeof(kvw_rms_norm_params) */
    float eps;            /* added to the mean square, > 0 */
    const float *x;       /* [T, width] f32 */
    const float *weight;  /* [width] f32 */
    void *out;            /* [T, width] f16 */
    int32_t tokens;       /* T */
    int32_t width;        /* a multiple of 8, at most 32768 */
} kvw_rms_norm_params;

KVW_API kvw_status kvw_rms_norm_check(const kvw_rms_norm_params *p);
KVW_API size_t kvw_rms_norm_workspace(const kvw_rms_norm_params *p);
KVW_API size_t kvw_rms_norm_bytes(const kvw_rms_norm_params *p);
KVW_API kvw_status kvw_rms_norm(const kvw_rms_norm_params *p, kvw_stream stream);

#endif
