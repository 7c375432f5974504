// status: what the library says about itself: version, statuses in words, devices, sizes of slabs and rings.
//
// A negative status names the field at fault; a positive one is a cudaError_t and keeps CUDA's text.
#include "kvwarp.h"
#include "common/fields.cuh"
#include "common/slab.cuh"

int32_t kvw_abi_version(void) { return KVW_ABI_VERSION; }

namespace {

constexpr int ERRORS = 8;

// Row of a field: what each KVW_ERR_* means for it.
#define KVW_ROW(prefix)                                                                                      \
    {"ok",                                                                                                   \
     prefix "not sizeof the params: header and library differ in version",                                   \
     prefix "a required pointer is null",                                                                    \
     prefix "out of range, or contradicts another field; the family's header gives the limits",              \
     prefix "the pointer is not 16-byte aligned",                                                            \
     prefix "a format, group or dtype that this op does not support",                                        \
     prefix "less than the op's _workspace() asks for",                                                      \
     prefix "the CPU executor stopped the kernel; simt_last_error() says why"},

#define KVW_FIELD_ROW(name) KVW_ROW(#name ": ")
constexpr const char* MEANINGS[][ERRORS] = {KVW_ROW("") KVW_FIELDS(KVW_FIELD_ROW)};
static_assert(sizeof MEANINGS / sizeof *MEANINGS == size_t(kvw::Field::COUNT), "a row a field");

} // namespace

const char* kvw_status_str(kvw_status s) {
    if (s > 0) return cudaGetErrorString(static_cast<cudaError_t>(s));
    int field = -(s / 16), error = -(s % 16);
    bool known = field < int(kvw::Field::COUNT) && error < ERRORS && (error > 0 || field == 0);
    return known ? MEANINGS[field][error] : "unknown status";
}

kvw_status kvw_device_count(int32_t* count) {
    KVW_REQUIRE(count, NULL, params);
    int found = 0;
    cudaError_t e = cudaGetDeviceCount(&found);
    *count = e == cudaSuccess ? found : 0;
    return static_cast<kvw_status>(e);
}

size_t kvw_slab_bytes(int32_t format, int32_t head_dim, int32_t group, int32_t meta) {
    return kvw::slab_bytes(format, head_dim, group, meta);
}

int32_t kvw_ring_slabs(int32_t window) { return kvw::ring_slabs(window); }
