// page_table: edits of page tables by a count that lives on the device, so that a captured step can carry them.
//
// Math      table[edits[i][0]] = edits[i][1] for i < count; an index >= entries is skipped
// Shapes    table [entries]; edits [max_edits, 2]; count [1]
// Bytes     4, and an edit 8 read and 4 written, all max_edits counted -> kvw_page_table_bytes()
// Launch    a thread an edit, 256 threads a CTA
// Workspace none
// Order     deterministic: indices differ from one another
// Oracle    src/page_table.rs::oracle
#include "page_table.h"
#include "common/check.cuh"
#include "common/launch.cuh"

namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) edit(const __grid_constant__ kvw_page_table_params p) {
    int i = int(blockIdx.x) * THREADS + int(threadIdx.x);
    if (i >= (KVW_FAULT(361) ? p.max_edits : min(*p.count, p.max_edits))) return;
    uint2 e = reinterpret_cast<const uint2*>(p.edits)[i];
    if (e.x < uint32_t(p.entries) || KVW_FAULT(362)) p.table[e.x] = e.y;
}

} // namespace

kvw_status kvw_page_table_check(const kvw_page_table_params* p) {
    KVW_CHECK_PARAMS(p);
    KVW_REQUIRE(p->max_edits >= 1 && p->max_edits <= 1 << 30, SHAPE, max_edits);
    KVW_REQUIRED(*p, table);
    KVW_REQUIRED(*p, edits);
    KVW_REQUIRED(*p, count);
    KVW_REQUIRE(p->entries >= 1, SHAPE, entries);
    KVW_REQUIRE(p->reserved == 0, SHAPE, reserved);
    return KVW_OK;
}

size_t kvw_page_table_workspace(const kvw_page_table_params*) { return 0; }

size_t kvw_page_table_bytes(const kvw_page_table_params* p) {
    if (kvw_page_table_check(p) != KVW_OK) return 0;
    return 4 + size_t(p->max_edits) * 12;
}

kvw_status kvw_page_table(const kvw_page_table_params* p, kvw_stream stream) {
    KVW_TRY(kvw_page_table_check(p));
    dim3 grid(unsigned((p->max_edits + THREADS - 1) / THREADS));
    return KVW_LAUNCH(edit, grid, THREADS, 0, stream, *p);
}
