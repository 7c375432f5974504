//! Kernels for compressed KV caches: CUDA sources behind a plain C ABI, and a fast CPU path for each.
