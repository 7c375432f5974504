/* page_table.h - edits of page tables by a count that lives on the device. */
#ifndef KVWARP_PAGE_TABLE_H
#define KVWARP_PAGE_TABLE_H
#include "types.h"

typedef struct kvw_page_table_params {
    uint32_t struct_size;  /* sizeof(kvw_page_table_params) */
    int32_t max_edits;     /* rows of edits, at least 1 */
    uint32_t *table;       /* [entries] */
    const uint32_t *edits; /* [max_edits, 2] index, entry; indices differ, one >= entries is skipped */
    const int32_t *count;  /* [1] edits to do; clamped to 0 .. max_edits */
    int32_t entries;       /* at least 1 */
    int32_t reserved;      /* 0 */
} kvw_page_table_params;

KVW_API kvw_status kvw_page_table_check(const kvw_page_table_params *p);
KVW_API size_t kvw_page_table_workspace(const kvw_page_table_params *p);
KVW_API size_t kvw_page_table_bytes(const kvw_page_table_params *p);
KVW_API kvw_status kvw_page_table(const kvw_page_table_params *p, kvw_stream stream);

#endif
