/* kvwarp.h - the whole C ABI of kvwarp: kernels for compressed KV caches. C11, no CUDA headers.
 *
 * Every op takes one params struct and a stream, and comes with three pure functions that make no CUDA call:
 * _check (are the numbers acceptable?), _workspace (scratch bytes) and _bytes (DRAM bytes the op must move).
 * No op allocates, synchronises, prints, throws or exits; lengths live on the device, so a captured graph
 * stays valid while sequences grow. Pointers are device pointers, 16-byte aligned unless said otherwise.
 *
 * Letters in shapes: S sequences, T tokens of all sequences, H kv heads, G query heads a kv head, D head dim.
 */
#ifndef KVWARP_H
#define KVWARP_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVW_ABI_VERSION 1

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

int32_t kvw_abi_version(void);
/* A static text: which field, what is wrong with it; CUDA's own text for a cudaError_t. */
const char *kvw_status_str(kvw_status s);
/* Usable CUDA devices; 35 (cudaErrorInsufficientDriver) or 100 (cudaErrorNoDevice) where there is none. */
kvw_status kvw_device_count(int32_t *count);

#include "slab.h"

#include "embed.h"
#include "kv_pack.h"
#include "linear.h"
#include "page_table.h"
#include "paged_attn.h"
#include "prefill_attn.h"
#include "rms_norm.h"
#include "rope_select.h"
#include "sample.h"
#include "swiglu.h"

#ifdef __cplusplus
}
#endif
#endif
