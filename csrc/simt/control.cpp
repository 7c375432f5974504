// control.cpp - what a test calls: seeds, faults, buffers, the last failure and the counters of the last
// launch. All of it belongs to the calling OS thread, except device memory.
#include "internal.h"
#include "../types.h"
#include <cstdio>

namespace simt {

SIMT_TLS int active_fault = 0;
static thread_local uint64_t seed = 0;
static thread_local unsigned resident = 2;
static thread_local Report last_report;

int launch_status(Launch config, void (*kernel)(void*), void* arg) {
    config.seed = seed;
    config.resident = resident;
    last_report = run(config, kernel, arg);
    return last_report.ok ? KVW_OK : KVW_ERR_EXECUTOR;
}

} // namespace simt

extern "C" {

// Counters of this thread's last launch, as tests/simt.rs declares them.
struct simt_counters {
    uint64_t switches, collectives, barriers, mma, wgmma, cp_async, copy_bulk, accesses, ldmatrix_conflicts;
};

void simt_configure(uint64_t seed, uint32_t resident) {
    simt::seed = seed;
    simt::resident = resident;
}
void simt_set_fault(int32_t fault) { simt::active_fault = fault; }
void simt_mma_mode(int32_t mode) { simt::set_mma_mode(mode); }
void simt_set_hopper(int32_t on) { simt::set_hopper(on != 0); }

// Valid until this thread's next launch; empty when the last launch went well.
const char* simt_last_error(void) { return simt::last_report.message.c_str(); }

void simt_report(simt_counters* out) {
    const simt::Report& r = simt::last_report;
    *out = {r.switches,  r.collectives, r.barriers,          r.mma, r.wgmma, r.cp_async,
            r.copy_bulk, r.accesses,    r.ldmatrix_conflicts};
}

void* simt_alloc(size_t bytes, const char* name) { return simt::device_alloc(bytes, name); }
void simt_free(void* p) { simt::device_free(p); }
void simt_mark_written(const void* p, size_t bytes) { simt::mark_written(p, bytes); }

} // extern "C"
