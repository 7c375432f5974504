/* slab.h - the cache as the kernels see it: slabs, page tables, the recent ring.
 *
 * A slab is 64 tokens of one kv head of one layer, K and V together, contiguous, 16-byte aligned. Token t of
 * a (sequence, head) lies in slab t / 64. The first `packed` slabs of a (sequence, head) are found through the
 * page table, each in its own format; the later ones, still f16, lie in the ring at slot (slab % ring_slabs).
 * Slabs are stored in the order in which mma.m16n8k16 lanes consume them; common/slab.cuh gives the layout.
 */
#ifndef KVWARP_SLAB_H
#define KVWARP_SLAB_H
#include "types.h"

#define KVW_SLAB_TOKENS 64
#define KVW_SLAB_VERSION 1 /* of the byte layout; stored wherever slabs leave the process */

/* Slab formats: the top four bits of a page table entry. */
#define KVW_SLAB_F16 0
#define KVW_SLAB_Q8 1 /* q8, q4, q2: codes of 8, 4, 2 bits, f16 scale and minimum a group */
#define KVW_SLAB_Q4 2
#define KVW_SLAB_Q2 3
#define KVW_SLAB_FP8 4 /* e4m3, saturated to +-448, no metadata; not in one cache with q8, q4 or q2 */
#define KVW_SLAB_FORMATS 5

/* Scales and minima. */
#define KVW_META_F16 0
#define KVW_META_U8 1 /* bytes in steps of the slab's own; q4 and q2, group 32 or 64 */

/* Page table entry: format << 28 | slab index in the pool of that format. */
#define KVW_ENTRY_INDEX 0x0FFFFFFFu
#define KVW_ENTRY_SHIFT 28
#define KVW_ENTRY_HOLE 0xFFFFFFFFu /* no slab: its tokens are skipped */

typedef struct kvw_cache {
    void *pools[KVW_SLAB_FORMATS]; /* by format: [slabs][kvw_slab_bytes]; null where a format is not in use */
    void *ring;                    /* [S, H, ring_slabs] f16 slabs */
    const uint32_t *table;         /* entries: [S, table_heads, table_stride], or CSR rows where indptr is set */
    const int32_t *indptr;         /* [S + 1] first entry of each sequence (FlashInfer); null = block table (vLLM) */
    const int32_t *lens;           /* [S, lens_heads] tokens held, the ring's included */
    const int32_t *packed;         /* [S, lens_heads] slabs in the table; null = max(0, (len - window) / 64) */
    int32_t seqs;                  /* S >= 1 */
    int32_t kv_heads;              /* H >= 1 */
    int32_t head_dim;              /* D: 64, 96, 128 or 256 */
    int32_t group;                 /* quantisation group of q8, q4 and q2: 32, 64 or 128 */
    int32_t window;                /* tokens that stay f16 in the ring, >= 0; fewer than 64 more may */
    int32_t ring_slabs;            /* >= kvw_ring_slabs(window) */
    int32_t table_stride;          /* entries a row; unused with indptr */
    int32_t table_heads;           /* H: a row a head; 1: rows shared by all heads, entry e is slab e * H + h */
    int32_t lens_heads;            /* H: a length a head; 1: one for all heads */
    int32_t meta;                  /* KVW_META_* of q4 and q2 */
} kvw_cache;

/* Bytes of a slab; 0 where it is not supported. A multiple of 128, with KVW_META_U8 of 32: cp.async and bulk
 * copies ask for 16. */
KVW_API size_t kvw_slab_bytes(int32_t format, int32_t head_dim, int32_t group, int32_t meta);
/* Ring slabs that a window needs: (window + 126) / 64. */
KVW_API int32_t kvw_ring_slabs(int32_t window);

#endif
