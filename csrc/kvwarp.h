/* kvwarp.h - the whole C ABI of kvwarp: kernels for compressed KV caches. C11, no CUDA headers.
 *
 * Every op takes one params struct and a stream, and comes with three pure functions that make no CUDA call:
 * _check (are the numbers acceptable?), _workspace (scratch bytes) and _bytes (DRAM bytes the op must move).
 * No op allocates, synchronises, prints, throws or exits; lengths live on the device, so a captured graph
 * stays valid while sequences grow. Pointers are device pointers, 16-byte aligned unless said otherwise. cpu.h has
 * the same ops on host memory.
 *
 * Letters in shapes: S sequences, T tokens of all sequences, H kv heads, G query heads a kv head, D head dim.
 */
#ifndef KVWARP_H
#define KVWARP_H
#include "types.h"

#define KVW_ABI_VERSION 1

KVW_API int32_t kvw_abi_version(void);
/* A static text: which field, what is wrong with it; CUDA's own text for a cudaError_t. */
KVW_API const char *kvw_status_str(kvw_status s);
/* Usable CUDA devices; 35 (cudaErrorInsufficientDriver) or 100 (cudaErrorNoDevice) where there is none. */
KVW_API kvw_status kvw_device_count(int32_t *count);

#include "slab.h"

#include "embed.h"
#include "head_linear.h"
#include "kv_gather.h"
#include "kv_pack.h"
#include "linear.h"
#include "lowrank_kv.h"
#include "page_table.h"
#include "paged_attn.h"
#include "prefill_attn.h"
#include "rms_norm.h"
#include "rope_select.h"
#include "sample.h"
#include "sim_evict.h"
#include "swiglu.h"
#include "token_score.h"
#include "token_select.h"

#include "cpu.h"

#endif
