/* types.h - what every header of the C ABI is made of: statuses, streams, element types. */
#ifndef KVWARP_TYPES_H
#define KVWARP_TYPES_H
#include <stddef.h>
#include <stdint.h>

#ifdef __GNUC__
#define KVW_VISIBLE __attribute__((visibility("default"))) /* the library is built with all else hidden */
#else
#define KVW_VISIBLE
#endif
#ifdef __cplusplus
#define KVW_API extern "C" KVW_VISIBLE
#else
#define KVW_API KVW_VISIBLE
#endif

/* 0 ok; negative: refused, nothing was launched; positive: a cudaError_t, verbatim. A refusal is a KVW_ERR_*
 * less 16 times the number of the field at fault; kvw_status_str() puts both into words. */
typedef int32_t kvw_status;
#define KVW_ERR_OF(status) ((status) < 0 ? -(-(status) % 16) : (status)) /* the KVW_ERR_* of a refusal */
#define KVW_OK 0
#define KVW_ERR_STRUCT (-1)    /* struct_size is not sizeof(params): caller and library differ in version */
#define KVW_ERR_NULL (-2)      /* a required pointer is null */
#define KVW_ERR_SHAPE (-3)     /* a size or an option is out of range, or two fields contradict each other */
#define KVW_ERR_ALIGN (-4)     /* a pointer is not 16-byte aligned */
#define KVW_ERR_FORMAT (-5)    /* a format, group or dtype that this op does not support */
#define KVW_ERR_WORKSPACE (-6) /* workspace_bytes < kvw_<op>_workspace() */
#define KVW_ERR_EXECUTOR (-7)  /* CPU executor of the kernel sources only: the kernel misbehaved */

typedef struct CUstream_st *kvw_stream; /* == cudaStream_t == CUstream */

/* Element types of dense tensors, and of the weight matrices of embed and linear, which may also be in blocks
 * of codes; linear.h gives the planes that those lie in. */
#define KVW_F32 0
#define KVW_F16 1
#define KVW_BF16 2
#define KVW_Q8_0 3 /* blocks of 32: q d */
#define KVW_Q4_0 4 /* blocks of 32: (q - 8) d */
#define KVW_Q4_1 5 /* blocks of 32: q d + m */
#define KVW_Q4_K 6 /* blocks of 256, groups of 32: q (d s) - dmin m */
#define KVW_Q6_K 7 /* blocks of 256, groups of 16: (q - 32) (d s) */

#endif
