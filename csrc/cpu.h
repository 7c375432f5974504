/* cpu.h - the same ops on the processor: the same params, with pointers to host memory.
 *
 * What kvw_<op>_check refuses, kvw_<op>_cpu refuses with the same status; beyond that it reads lengths, tables and
 * slots before it follows them, and refuses those that lead outside. Results are there on return. Calls from many
 * threads at once are fine as long as no two write the same memory; they share one team of threads, as many as the
 * machine has cores or KVW_THREADS says, and a child of fork() gets its own. No call aborts the process.
 */
#ifndef KVWARP_CPU_H
#define KVWARP_CPU_H
#include "kv_gather.h"
#include "kv_pack.h"
#include "paged_attn.h"
#include "prefill_attn.h"
#include "rms_norm.h"
#include "rope_select.h"
#include "sim_evict.h"
#include "token_score.h"
#include "token_select.h"

#define KVW_ERR_CPU (-8) /* the CPU path does not take this field; a fault of the library where it is params */

KVW_API kvw_status kvw_kv_gather_cpu(const kvw_kv_gather_params *p);
KVW_API kvw_status kvw_kv_pack_cpu(const kvw_kv_pack_params *p);
/* Without sinks, k_norm, rotation and softcap. No workspace is needed: it may be null. */
KVW_API kvw_status kvw_paged_attn_cpu(const kvw_paged_attn_params *p);
KVW_API kvw_status kvw_prefill_attn_cpu(const kvw_prefill_attn_params *p);
KVW_API kvw_status kvw_rms_norm_cpu(const kvw_rms_norm_params *p);
/* Without pairs. */
KVW_API kvw_status kvw_rope_select_cpu(const kvw_rope_select_params *p);
/* LAG and NORM alone. */
KVW_API kvw_status kvw_sim_evict_cpu(const kvw_sim_evict_params *p);
KVW_API kvw_status kvw_token_score_cpu(const kvw_token_score_params *p);
/* No workspace is needed: it may be null. */
KVW_API kvw_status kvw_token_select_cpu(const kvw_token_select_params *p);

#endif
