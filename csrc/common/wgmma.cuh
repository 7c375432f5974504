// wgmma.cuh - sm_90a: matrix products of a warpgroup (128 threads, four warps from a multiple of four on), and
// the registers that its threads may hold. Beside prim.cuh the only file with inline PTX.
//
// m64nNk16, with w = warp % 4, g = lane / 4, t = 2 * (lane % 4); a register holds elements t and t + 1:
//   A 64x16  a0 (16w+g, t)  a1 (16w+g+8, t)  a2 (16w+g, t+8)  a3 (16w+g+8, t+8)
//   B Nx16   in shared memory, rows of n; 64 values of k (128 bytes) a row, swizzled: see `swizzled`
//   D 64xN   d[4i] d[4i+1] (16w+g, 8i+t)  d[4i+2] d[4i+3] (16w+g+8, 8i+t)
// It runs beside the threads: between wgmma and wgmma_wait nobody touches d, a, or the bytes of B.
#pragma once
#include "prim.cuh"

#if defined(__CUDACC__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PRIM_SM90A 1
#else
#define PRIM_SM90A 0
#endif

namespace prim {

// Whether the code at hand is compiled for sm_90a.
#if defined(__CUDACC__)
constexpr bool WGMMA = PRIM_SM90A;
#else
constexpr OfThisSession WGMMA;
#endif

// Byte (row, byte) of a tile of 128-byte rows, whose start is a multiple of 1024 bytes: each group of 16 bytes
// changes places within its row, so that 8 rows of one column lie in different banks.
PRIM int swizzled(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }

// Descriptor of B in such a tile; 16 values of k further on is + 2, a tile further on + bytes / 16.
PRIM uint64_t swizzled_tile(const void* tile PRIM_SITE) {
#if defined(__CUDACC__)
    uint32_t at = shared_address(tile);
#else
    uint32_t at = simt::shared_offset(tile, file, line);
#endif
    constexpr uint64_t ROWS_8 = 1024 / 16, SWIZZLE_128 = 1;
    return SWIZZLE_128 << 62 | ROWS_8 << 32 | 1ull << 16 | (at & 0x3FFFF) >> 4;
}

// Before a wgmma, after this thread has touched its accumulators or A.
PRIM void wgmma_fence() {
#if !defined(__CUDACC__)
    simt::wgmma_fence();
#elif PRIM_SM90A
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of this warpgroup's wgmma so far.
PRIM void wgmma_commit() {
#if !defined(__CUDACC__)
    simt::wgmma_commit();
#elif PRIM_SM90A
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most KEEP groups are in flight; d are accumulators that it hands back.
template <int KEEP, int N> PRIM void wgmma_wait(float (&d)[N] PRIM_SITE) {
#if !defined(__CUDACC__)
    simt::wgmma_wait(KEEP, file, line);
#elif PRIM_SM90A
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(KEEP) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory"); // no use of d moves before the wait
#endif
}

// d = A B, or d += A B.
template <class T, int N>
PRIM void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate PRIM_SITE);

#if defined(__CUDACC__)
#define PRIM_D8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),              \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define PRIM_D32 PRIM_D8(0), PRIM_D8(8), PRIM_D8(16), PRIM_D8(24)
#define PRIM_D48 PRIM_D32, PRIM_D8(32), PRIM_D8(40)
#define PRIM_D64 PRIM_D48, PRIM_D8(48), PRIM_D8(56)
#define PRIM_R32                                                                                             \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"     \
    "%27,%28,%29,%30,%31"
#define PRIM_R48 PRIM_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define PRIM_R64 PRIM_R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#if PRIM_SM90A
#define PRIM_WGMMA(T, type, N, registers, d_list, a_list, b_operand, accumulate_operand)                     \
    template <>                                                                                              \
    PRIM void wgmma<T, N>(float(&d)[N / 2], const uint32_t(&a)[4], uint64_t b, bool accumulate) {            \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " accumulate_operand                                    \
                     ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" registers     \
                     "}, {" a_list "}, " b_operand ", p, 1, 1, 0; }"                                         \
                     : d_list                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));            \
    }
#else
#define PRIM_WGMMA(T, type, N, registers, d_list, a_list, b_operand, accumulate_operand)                     \
    template <> PRIM void wgmma<T, N>(float(&)[N / 2], const uint32_t(&)[4], uint64_t, bool) {}
#endif
#define PRIM_WGMMA_OF(T, type)                                                                               \
    PRIM_WGMMA(T, type, 64, PRIM_R32, PRIM_D32, "%32,%33,%34,%35", "%36", "%37")                             \
    PRIM_WGMMA(T, type, 96, PRIM_R48, PRIM_D48, "%48,%49,%50,%51", "%52", "%53")                             \
    PRIM_WGMMA(T, type, 128, PRIM_R64, PRIM_D64, "%64,%65,%66,%67", "%68", "%69")
PRIM_WGMMA_OF(__half, "f16")
PRIM_WGMMA_OF(__nv_bfloat16, "bf16")
#undef PRIM_WGMMA_OF
#undef PRIM_WGMMA
#undef PRIM_R64
#undef PRIM_R48
#undef PRIM_R32
#undef PRIM_D64
#undef PRIM_D48
#undef PRIM_D32
#undef PRIM_D8
#else
template <class T, int N>
PRIM void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, const char* file,
                int line) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
    simt::wgmma({d, a, b, N, std::is_same_v<T, __nv_bfloat16>, accumulate}, file, line);
}
#endif

// Registers a thread of this warpgroup may hold from here on, a multiple of 8 from 24 to 256: fewer than
// before, or more, once others have given them up.
template <int COUNT> PRIM void registers_down(PRIM_ONLY_SITE) {
#if !defined(__CUDACC__)
    simt::set_registers(COUNT, file, line);
#elif PRIM_SM90A
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT> PRIM void registers_up(PRIM_ONLY_SITE) {
#if !defined(__CUDACC__)
    simt::set_registers(COUNT, file, line);
#elif PRIM_SM90A
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

} // namespace prim
