// radix.cuh - what radix selections by a CTA share: running sums over its threads, and the bin in which one ends.
#pragma once
#include "prim.cuh"

namespace kvw {

// Running sum of x over the threads of a CTA of WARPS warps, own included; `all` is the whole. `warps` is WARPS values
// in shared memory, which others may have read until now.
template <int WARPS, class T> PRIM T running_sum(T x, T* warps, T& all) {
    int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        T y = __shfl_up_sync(~0u, x, lanes);
        if (lane >= lanes) x += y;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = x;
    __syncthreads();
    all = 0;
#pragma unroll 8
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) x += warps[w];
        all += warps[w];
    }
    return x;
}

// A bin, and the sum over higher bins.
template <class T> struct Bin {
    T before;
    int bin; // -1: the sum of all does not reach what is asked for
};

// The bin, counted from the top, in which the running sum over `sums`, BINS of them, reaches `need`, at least 1. By a
// CTA that has written them before a barrier; `found` is in shared memory too.
template <int WARPS, int BINS, class T> PRIM Bin<T> find_bin(const T* sums, T* warps, Bin<T>* found, T need) {
    constexpr int OWN = BINS / (32 * WARPS);
    int top = BINS - 1 - int(threadIdx.x) * OWN;
    T own = 0, all;
    for (int i = 0; i < OWN; i++) own += sums[top - i];
    T after = running_sum<WARPS>(own, warps, all), before = after - own;
    if (before < need && after >= need) {
        int bin = top;
        while (before + sums[bin] < need) before += sums[bin--];
        *found = {before, bin};
    }
    if (threadIdx.x == 0 && all < need) *found = {all, -1};
    __syncthreads();
    return *found;
}

} // namespace kvw
