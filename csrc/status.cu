// status: what the library says about itself: version, statuses in words, devices, sizes of slabs and rings.
//
// The messages name the argument and what would do; a positive status is a cudaError_t and keeps CUDA's text.
#include "kvwarp.h"
#include "common/slab.cuh"

int32_t kvw_abi_version(void) { return KVW_ABI_VERSION; }

const char* kvw_status_str(kvw_status s) {
    switch (s) {
    case KVW_OK: return "ok";
    case KVW_ERR_STRUCT: return "struct_size is not sizeof(params): header and library differ in version";
    case KVW_ERR_NULL: return "a required pointer is null";
    case KVW_ERR_SHAPE: return "a size or an option is out of range; the family's header gives the limits";
    case KVW_ERR_ALIGN: return "a pointer is not 16-byte aligned";
    case KVW_ERR_FORMAT: return "a format, group or dtype that this op does not support";
    case KVW_ERR_WORKSPACE: return "workspace_bytes is less than the op's _workspace() asks for";
    case KVW_ERR_EXECUTOR: return "the CPU executor stopped the kernel; simt_last_error() says why";
    }
    return s > 0 ? cudaGetErrorString(static_cast<cudaError_t>(s)) : "unknown status";
}

kvw_status kvw_device_count(int32_t* count) {
    if (!count) return KVW_ERR_NULL;
    int found = 0;
    cudaError_t e = cudaGetDeviceCount(&found);
    *count = e == cudaSuccess ? found : 0;
    return static_cast<kvw_status>(e);
}

size_t kvw_slab_bytes(int32_t format, int32_t head_dim, int32_t group) {
    return kvw::slab_bytes(format, head_dim, group);
}

int32_t kvw_ring_slabs(int32_t window) { return kvw::ring_slabs(window); }
