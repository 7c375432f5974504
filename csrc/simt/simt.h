// simt.h - the CUDA language for a plain C++20 compiler: qualifiers, built-in variables, warp and block
// collectives, atomics, fences. Stands in for cuda_runtime.h when a .cu file is built for the CPU.
//
// __shared__ is an error on purpose: KVW_SHARED and KVW_DYN_SHARED give memory that is owned by a block and
// bounds-checked. __activemask is missing on purpose: no kernel may rely on it.
#pragma once
#include "runtime.h"
#include "intrinsics.h"

#define KVW_SIMT 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__   use_KVW_SHARED_or_KVW_DYN_SHARED

#define threadIdx (::simt::self_thread->index)
#define blockIdx  (::simt::block_view().index)
#define blockDim  (::simt::block_view().threads)
#define gridDim   (::simt::block_view().grid)
#define warpSize  32

namespace simt {

enum ShuffleKind { SHUFFLE_INDEX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR };
struct ShuffleIn {
    uint64_t bits;
    unsigned operand, width;
};

template <class T>
T shuffle(uint32_t mask, T v, unsigned operand, unsigned width, ShuffleKind kind, const char* name,
          const char* file, int line) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 2, 4 or 8 bytes");
    ShuffleIn in{0, operand, width};
    memcpy(&in.bits, &v, sizeof v);
    uint64_t out = 0;
    collective(mask, shuffle_op, name, &in, &out, kind, file, line);
    memcpy(static_cast<void*>(&v), &out, sizeof v);
    return v;
}

enum ReduceKind {
    REDUCE_ADD,
    REDUCE_MIN,
    REDUCE_MAX,
    REDUCE_AND,
    REDUCE_OR,
    REDUCE_XOR,
    REDUCE_MIN_S,
    REDUCE_MAX_S
};

template <class T>
T reduce(uint32_t mask, T v, ReduceKind kind, const char* name, const char* file, int line) {
    T out;
    collective(mask, reduce_op, name, &v, &out, kind, file, line);
    return out;
}

// One indivisible step with the atomic_hook before it: neither yields in between.
template <class T, class F> T read_modify_write(T* p, F f) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    T old;
    raw_copy(&old, p, sizeof old);
    T next = f(old);
    raw_copy(p, &next, sizeof next);
    return old;
}

} // namespace simt

inline void __syncthreads(SIMT_SITE) { simt::barrier(0, 0, false, file, line); }
inline int __syncthreads_count(int p, SIMT_SITE) { return int(simt::barrier(0, 0, p != 0, file, line)); }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::barrier(0, 0, p != 0, file, line) != 0; }
inline int __syncthreads_and(int p, SIMT_SITE) { return simt::barrier(0, 0, p == 0, file, line) == 0; }
inline void __syncwarp(uint32_t mask = ~0u, SIMT_SITE) {
    simt::collective(mask, simt::sync_op, "__syncwarp", nullptr, nullptr, 0, file, line);
}

template <class T> T __shfl_sync(uint32_t mask, T v, int lane, int width = 32, SIMT_SITE) {
    return simt::shuffle(mask, v, lane, width, simt::SHUFFLE_INDEX, "__shfl_sync", file, line);
}
template <class T> T __shfl_up_sync(uint32_t mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
    return simt::shuffle(mask, v, delta, width, simt::SHUFFLE_UP, "__shfl_up_sync", file, line);
}
template <class T> T __shfl_down_sync(uint32_t mask, T v, unsigned delta, int width = 32, SIMT_SITE) {
    return simt::shuffle(mask, v, delta, width, simt::SHUFFLE_DOWN, "__shfl_down_sync", file, line);
}
template <class T> T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32, SIMT_SITE) {
    return simt::shuffle(mask, v, lanes, width, simt::SHUFFLE_XOR, "__shfl_xor_sync", file, line);
}

inline unsigned __ballot_sync(uint32_t mask, int p, SIMT_SITE) {
    uint32_t in = p != 0, out;
    simt::collective(mask, simt::ballot_op, "__ballot_sync", &in, &out, 0, file, line);
    return out;
}
inline int __any_sync(uint32_t mask, int p, SIMT_SITE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(uint32_t mask, int p, SIMT_SITE) { return __ballot_sync(mask, p, file, line) == mask; }
template <class T> unsigned __match_any_sync(uint32_t mask, T v, SIMT_SITE) {
    uint64_t in = 0;
    memcpy(&in, &v, sizeof v);
    uint32_t out;
    simt::collective(mask, simt::match_op, "__match_any_sync", &in, &out, 0, file, line);
    return out;
}

#define SIMT_REDUCE(name, T, kind)                                                                           \
    inline T __reduce_##name##_sync(uint32_t mask, T v, SIMT_SITE) {                                         \
        return simt::reduce(mask, v, simt::kind, "__reduce_" #name "_sync", file, line);                     \
    }
SIMT_REDUCE(add, unsigned, REDUCE_ADD)
SIMT_REDUCE(min, unsigned, REDUCE_MIN)
SIMT_REDUCE(max, unsigned, REDUCE_MAX)
SIMT_REDUCE(and, unsigned, REDUCE_AND)
SIMT_REDUCE(or, unsigned, REDUCE_OR)
SIMT_REDUCE(xor, unsigned, REDUCE_XOR)
SIMT_REDUCE(add, int, REDUCE_ADD)
SIMT_REDUCE(min, int, REDUCE_MIN_S)
SIMT_REDUCE(max, int, REDUCE_MAX_S)
#undef SIMT_REDUCE

#define SIMT_ATOMIC(name, expression)                                                                        \
    template <class T> T name(T* p, std::type_identity_t<T> v, SIMT_SITE) {                                  \
        simt::atomic_hook(p, sizeof(T), file, line);                                                         \
        return simt::read_modify_write(p, [v](T old) -> T { return expression; });                           \
    }
SIMT_ATOMIC(atomicAdd, old + v)
SIMT_ATOMIC(atomicSub, old - v)
SIMT_ATOMIC(atomicExch, v)
SIMT_ATOMIC(atomicMax, old > v ? old : v)
SIMT_ATOMIC(atomicMin, old < v ? old : v)
SIMT_ATOMIC(atomicAnd, old& v)
SIMT_ATOMIC(atomicOr, old | v)
SIMT_ATOMIC(atomicXor, old ^ v)
SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef SIMT_ATOMIC
template <class T> T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v, SIMT_SITE) {
    simt::atomic_hook(p, sizeof(T), file, line);
    return simt::read_modify_write(p, [=](T old) -> T { return old == expected ? v : old; });
}

inline void __threadfence_block() {
    simt::fence_hook(false);
    simt::maybe_yield();
}
inline void __threadfence() {
    simt::fence_hook(true);
    simt::maybe_yield();
}
[[noreturn]] inline void __trap() { simt::fail("__trap()"); }
inline void __nanosleep(unsigned) { simt::yield(); }
