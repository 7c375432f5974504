// launch.cuh - the host side of an op: one way to launch a kernel, for nvcc and for the CPU executor.
//
//   KVW_TRY(KVW_LAUNCH(kvw_x_stage_d128, dim3(splits, heads, seqs), 128, smem_bytes, stream, *p));
//
// Arguments after the stream are the kernel's. Put a template kernel in parentheses: (kernel<128, 4>).
// The value is a kvw_status: 0, a positive cudaError_t, or, in the executor, KVW_ERR_EXECUTOR, with what went
// wrong in simt_last_error().
#pragma once
#include <cuda_runtime.h>
#include "../types.h"

#define KVW_TRY(expression)                                                                                  \
    do {                                                                                                     \
        kvw_status status_ = (expression);                                                                   \
        if (status_ != KVW_OK) return status_;                                                               \
    } while (0)

#define KVW_LAUNCH(kernel, grid, block, smem_bytes, stream, ...)                                             \
    ::kvw::launch(#kernel, false, kernel, grid, block, smem_bytes, stream, __VA_ARGS__)

// All blocks alive at once, as prim::grid_sync (grid.cuh) needs.
#define KVW_LAUNCH_COOPERATIVE(kernel, grid, block, smem_bytes, stream, ...)                                 \
    ::kvw::launch(#kernel, true, kernel, grid, block, smem_bytes, stream, __VA_ARGS__)

namespace kvw {

// Arguments convert to the kernel's parameter types instead of taking part in their deduction.
template <class T> struct AsDeclared {
    using type = T;
};

// A cudaError_t as a kvw_status.
inline kvw_status status_of(cudaError_t e) { return static_cast<kvw_status>(e); }

#if defined(__CUDACC__)

// Dynamic shared memory beyond 48 KB must be asked for. The limit is raised to the device's, whatever the
// launch needs, so that concurrent launches of one kernel cannot lower it for one another.
inline cudaError_t allow_shared_memory(const void* kernel, size_t bytes) {
    constexpr size_t ALWAYS_ALLOWED = 48 * 1024;
    if (bytes <= ALWAYS_ALLOWED) return cudaSuccess;
    cudaFuncAttributes attributes;
    cudaError_t e = cudaFuncGetAttributes(&attributes, kernel);
    if (e != cudaSuccess || size_t(attributes.maxDynamicSharedSizeBytes) >= bytes) return e;
    int device = 0, most = 0;
    if ((e = cudaGetDevice(&device)) != cudaSuccess) return e;
    e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (e != cudaSuccess) return e;
    most -= int(attributes.sharedSizeBytes);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <class... P>
kvw_status launch(const char*, bool cooperative, void (*kernel)(P...), dim3 grid, dim3 block,
                  size_t smem_bytes, kvw_stream stream, typename AsDeclared<P>::type... args) {
    const void* entry = reinterpret_cast<const void*>(kernel);
    cudaError_t e = allow_shared_memory(entry, smem_bytes);
    if (e != cudaSuccess) return status_of(e);
    void* pointers[] = {static_cast<void*>(&args)...};
    e = cooperative ? cudaLaunchCooperativeKernel(entry, grid, block, pointers, smem_bytes, stream)
                    : cudaLaunchKernel(entry, grid, block, pointers, smem_bytes, stream);
    cudaError_t sticky = cudaGetLastError();
    return status_of(e != cudaSuccess ? e : sticky);
}

#else

template <class... P>
kvw_status launch(const char* name, bool cooperative, void (*kernel)(P...), dim3 grid, dim3 block,
                  size_t smem_bytes, kvw_stream, typename AsDeclared<P>::type... args) {
    simt::Launch config;
    config.name = name;
    config.cooperative = cooperative;
    config.grid = grid;
    config.block = block;
    config.shared_bytes = smem_bytes;
    auto call = [&] { kernel(args...); };
    return simt::launch_status(config, [](void* p) { (*static_cast<decltype(call)*>(p))(); }, &call);
}

#endif

} // namespace kvw
