// grid.cuh - the barrier of a whole cooperative grid. Apart from prim.cuh because its device header doubles
// what nvcc has to read.
#pragma once
#include "prim.cuh"
#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

namespace prim {

// Every thread of every block of a KVW_LAUNCH_COOPERATIVE meets here; writes before it are visible after it.
#if defined(__CUDACC__)
PRIM void grid_sync() { cooperative_groups::this_grid().sync(); }
#else
PRIM void grid_sync(SIMT_SITE) { simt::grid_barrier(file, line); }
#endif

} // namespace prim
