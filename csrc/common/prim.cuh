// prim.cuh - every instruction that CUDA C++ has no name for, once for the device (inline PTX) and once for
// the CPU executor. With wgmma.cuh the only file with inline PTX. Including it gives a kernel everything it needs.
//
// On the device the wrappers cost nothing; in the executor each trailing `file, line` names the caller in
// reports. Matrix layouts: with g = lane / 4 and t = 2 * (lane % 4), a register holds elements t and t + 1;
//   A 16x16  a0 (g, t)  a1 (g+8, t)  a2 (g, t+8)  a3 (g+8, t+8)
//   B 16x8   b0 (k = t, n = g)  b1 (k = t+8, n = g)        C 16x8   c0 c1 (g, t)  c2 c3 (g+8, t)
#pragma once
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define PRIM __device__ __forceinline__
#define PRIM_SITE
#define PRIM_ONLY_SITE
// Dynamic and static shared memory: a pointer to the whole, and an array of n elements.
#define KVW_DYN_SHARED(T, name) extern __shared__ __align__(128) T name[]
#define KVW_SHARED(T, name, n)  __shared__ __align__(16) T name[n]
// A seeded fault: a change that the tests must notice. Constant false on the device.
#define KVW_FAULT(n) false
#else
#define PRIM                    inline
#define PRIM_SITE               , SIMT_SITE
#define PRIM_ONLY_SITE          SIMT_SITE
#define KVW_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(::simt::block_view().dynamic)
#define KVW_SHARED(T, name, n)                                                                               \
    T(&name)                                                                                                 \
    [n] = *reinterpret_cast<T(*)[n]>(::simt::shared_static(                                                  \
        []() -> const void* {                                                                                \
            static char key;                                                                                 \
            return &key;                                                                                     \
        }(),                                                                                                 \
        sizeof(T) * (n)))
#define KVW_FAULT(n) (::simt::fault() == (n))
#endif

namespace prim {

#if defined(__CUDACC__)
PRIM uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// Whether the code at hand is compiled for sm_90 or newer: the only place for mbarriers and bulk copies, whose
// wrappers are empty elsewhere. In the executor each session says.
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PRIM_SM90 1
constexpr bool HOPPER = true;
#else
#define PRIM_SM90 0
constexpr bool HOPPER = false;
#endif
#else
struct OfThisSession {
    operator bool() const { return simt::hopper(); }
};
constexpr OfThisSession HOPPER;
#endif

// ---- copies from global to shared memory, past the registers

// 16 bytes; zeros when !ok, and src is then not read. Both addresses 16-byte aligned.
PRIM void cp_async16(void* dst, const void* src, bool ok = true PRIM_SITE) {
#if defined(__CUDACC__)
    int bytes = ok ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
                 "r"(bytes)
                 : "memory");
#else
    simt::cp_async(dst, src, 16, ok ? 16 : 0, file, line);
#endif
}

// Closes the group of this thread's copies so far.
PRIM void cp_async_commit() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    simt::cp_async_commit();
#endif
}

// Waits until at most KEEP of this thread's groups are in flight; other threads need a barrier after it.
template <int KEEP> PRIM void cp_async_wait() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory");
#else
    simt::cp_async_wait(KEEP);
#endif
}

// ---- sm_90: mbarriers in shared memory, and bulk copies that complete on them

// Phases complete once `arrivals` threads have arrived and every expected byte has landed. One thread
// initialises an mbarrier, once, then fences; the others need a barrier after that.
PRIM void mbar_init(uint64_t* bar, int arrivals PRIM_SITE) {
#if !defined(__CUDACC__)
    simt::mbar_init(bar, unsigned(arrivals), file, line);
#elif PRIM_SM90
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals)
                 : "memory");
#endif
}

// Makes the initialisations of this thread known to bulk copies.
PRIM void mbar_fence() {
#if !defined(__CUDACC__)
    simt::mbar_fence();
#elif PRIM_SM90
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives; what this thread did before is known to those who wait for the phase.
PRIM void mbar_arrive(uint64_t* bar PRIM_SITE) {
#if !defined(__CUDACC__)
    simt::mbar_arrive(bar, 0, file, line);
#elif PRIM_SM90
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
#endif
}

// Arrives, and adds to the bytes that the phase waits for. Before the copies that bring them.
PRIM void mbar_expect(uint64_t* bar, int bytes PRIM_SITE) {
#if !defined(__CUDACC__)
    simt::mbar_arrive(bar, unsigned(bytes), file, line);
#elif PRIM_SM90
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
                 "r"(bytes)
                 : "memory");
#endif
}

// Waits for the end of the phase of this parity: phases 0, 2, 4, ... have 0. Parity 1 of a fresh mbarrier
// counts as over.
PRIM void mbar_wait(uint64_t* bar, int parity PRIM_SITE) {
#if !defined(__CUDACC__)
    simt::mbar_wait(bar, unsigned(parity), file, line);
#elif PRIM_SM90
    uint32_t over;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(over)
            : "r"(shared_address(bar)), "r"(parity)
            : "memory");
    } while (!over);
#endif
}

// `bytes` from global to shared memory by the copy engine, all multiples of 16; read once (evict first), or
// AGAIN, by other CTAs.
template <bool AGAIN = false>
PRIM void copy_bulk(void* dst, const void* src, int bytes, uint64_t* bar PRIM_SITE) {
#if !defined(__CUDACC__)
    simt::copy_bulk(dst, src, unsigned(bytes), bar, file, line);
#elif PRIM_SM90
    if (AGAIN) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1], %2, [%3];" ::"r"(shared_address(dst)),
                     "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(shared_address(bar))
                     : "memory");
        return;
    }
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(dst)),
                 "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(shared_address(bar)), "l"(policy)
                 : "memory");
#endif
}

// Between this thread's plain accesses to shared memory before it and bulk copies or tensor cores that touch
// the same bytes after it; those of other threads need a barrier as well.
PRIM void fence_async() {
#if !defined(__CUDACC__)
    simt::fence_async();
#elif PRIM_SM90
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- 16-byte global accesses

// Read-only data that stays useful: all caches.
PRIM uint4 ldg128(const void* p PRIM_SITE) {
#if defined(__CUDACC__)
    return __ldg(static_cast<const uint4*>(p));
#else
    simt::check_aligned(p, 16, file, line);
    return *static_cast<const uint4*>(p);
#endif
}

// Read-only data that is used once: not kept in L1.
PRIM uint4 ldg128_stream(const void* p PRIM_SITE) {
#if defined(__CUDACC__)
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
#else
    simt::check_aligned(p, 16, file, line);
    return *static_cast<const uint4*>(p);
#endif
}

PRIM void stg128(void* p, uint4 v PRIM_SITE) {
#if !defined(__CUDACC__)
    simt::check_aligned(p, 16, file, line);
#endif
    *static_cast<uint4*>(p) = v;
}

// ---- matrices

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
PRIM void ldsm_x4(uint32_t (&r)[4], const void* row PRIM_SITE) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    simt::collective(~0u, simt::ldmatrix_op, "ldmatrix.x4", &row, r, 4, file, line);
#endif
}

// The same, each matrix transposed.
PRIM void ldsm_x4_trans(uint32_t (&r)[4], const void* row PRIM_SITE) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    simt::collective(~0u, simt::ldmatrix_op, "ldmatrix.x4.trans", &row, r, 4 | simt::LDMATRIX_TRANS, file,
                     line);
#endif
}

// Transposes an 8x8 matrix of 16-bit elements that the warp holds.
PRIM uint32_t movmatrix_trans(uint32_t a PRIM_SITE) {
    uint32_t d;
#if defined(__CUDACC__)
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
#else
    simt::collective(~0u, simt::movmatrix_op, "movmatrix", &a, &d, 0, file, line);
#endif
    return d;
}

// c += A B, A and B of T, c in f32.
template <class T>
PRIM void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 PRIM_SITE);
#if defined(__CUDACC__)
#define PRIM_MMA(T, type)                                                                                    \
    template <> PRIM void mma_16816<T>(float(&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {      \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                          \
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                 \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
    }
PRIM_MMA(__half, "f16")
PRIM_MMA(__nv_bfloat16, "bf16")
#undef PRIM_MMA
#else
template <class T>
PRIM void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file,
                    int line) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
    simt::MmaIn in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    simt::WarpOp op = std::is_same_v<T, __half> ? simt::mma_f16_op : simt::mma_bf16_op;
    simt::collective(~0u, op, "mma.m16n8k16", &in, c, 0, file, line);
}
#endif

// ---- bits and numbers

// Any function of three bits, on 32 of them: LUT = f(0xF0, 0xCC, 0xAA).
template <int LUT> PRIM uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
#if defined(__CUDACC__)
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(LUT));
#else
    d = 0;
    for (int i = 0; i < 8; i++) {
        if (LUT >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
#endif
    return d;
}

// Four bytes out of the eight of (b, a), a nibble of the selector each.
PRIM uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// 2^x, relative error 2^-22; subnormal results are zero. The executor's is exact and flushes nothing.
PRIM float exp2_approx(float x) {
#if defined(__CUDACC__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// 1 / x, relative error 2^-23; the executor's is exact.
PRIM float rcp_approx(float x) {
#if defined(__CUDACC__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.f / x;
#endif
}

// ---- order between threads

// Barrier `id` (1 to 15) for `threads` of the block, a multiple of 32; 0 is __syncthreads.
PRIM void bar_sync(int id, int threads PRIM_SITE) {
#if defined(__CUDACC__)
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    simt::barrier(unsigned(id), unsigned(threads), false, file, line);
#endif
}

// A load that sees everything before a release of the same word; the only load to spin on.
PRIM uint32_t ld_acquire(const uint32_t* p PRIM_SITE) {
    uint32_t v;
#if defined(__CUDACC__)
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
#else
    simt::yield(); // others must move for the word to change
    simt::acquire_hook(p, sizeof v, file, line);
    simt::raw_copy(&v, p, sizeof v);
#endif
    return v;
}

// ---- dynamic shared memory, cut into pieces that every thread takes in the same order
struct Carve {
    unsigned char* next;

    PRIM explicit Carve(unsigned char* base) : next(base) {
#if !defined(__CUDACC__)
        simt::shared_rewind(); // each piece lies between red zones; `next` is not used
#endif
    }

    template <class T, int ALIGN = 16> PRIM T* take(int n) {
        static_assert(ALIGN >= 16 && ALIGN <= 1024 && (ALIGN & (ALIGN - 1)) == 0);
        size_t bytes = (size_t(n) * sizeof(T) + 15) / 16 * 16;
#if defined(__CUDACC__)
        // Added to the pointer, so that the compiler still knows it as one into shared memory.
        unsigned char* at = next + (-reinterpret_cast<uintptr_t>(next) & (ALIGN - 1));
        next = at + bytes;
        return reinterpret_cast<T*>(at);
#else
        return static_cast<T*>(simt::shared_take(bytes, ALIGN));
#endif
    }
};

} // namespace prim
