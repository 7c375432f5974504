// runtime.h - what a kernel, a launch and a test see of the executor.
//
// Every CUDA thread is a fibre of the calling OS thread; a launch runs to completion before it returns, so
// streams are in order and copies are immediate. All state is thread-local: parallel tests do not meet.
// Models: blocks, warps, barriers, warp collectives, cp.async, mbarriers and bulk copies, shared memory, device
// memory.
// Cannot show: performance, occupancy, per-architecture limits, clusters, tensor maps, approximate last bits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include "vector_types.h"

namespace simt {

struct Block;
struct Warp;
struct Fiber;

// What a kernel can see of its own thread.
struct Thread {
    uint3 index;
    unsigned flat, lane, warp_index;
    Block* block;
    Warp* warp;
    Fiber* fiber;
};

struct BlockView {
    uint3 index;
    dim3 threads, grid;
    unsigned char* dynamic;
    size_t dynamic_bytes;
};

// initial-exec: one instruction an access; the two shared objects together take a few words of static TLS.
#define SIMT_TLS thread_local __attribute__((tls_model("initial-exec")))
extern SIMT_TLS Thread* self_thread;
extern SIMT_TLS int active_fault;
BlockView& block_view();

struct Launch {
    const char* name = "kernel";
    dim3 grid{1}, block{1};
    size_t shared_bytes = 0;
    uint64_t seed = 0;     // 0: in order, each thread runs until it waits. Else: random order and preemption
    unsigned resident = 1; // blocks alive at once; cooperative: the whole grid
    bool cooperative = false;
    size_t stack_bytes = 256 * 1024;
};

struct Report {
    bool ok = true;
    std::string message; // the first failure
    uint64_t switches = 0, collectives = 0, barriers = 0, cp_async = 0, copy_bulk = 0, mma = 0, wgmma = 0,
             accesses = 0;
    uint64_t ldmatrix_conflicts = 0; // extra shared memory wavefronts of all ldmatrix
};

Report run(const Launch& launch, void (*kernel)(void*), void* arg);

template <class F> Report launch(const Launch& config, F&& kernel) {
    auto call = [](void* p) { (*static_cast<std::remove_reference_t<F>*>(p))(); };
    return run(config, call, const_cast<void*>(static_cast<const void*>(&kernel)));
}

// Runs a kernel with this OS thread's seed and resident blocks, keeps its report, returns a kvw_status.
int launch_status(Launch config, void (*kernel)(void*), void* arg);

// Ends the launch with this message; the first one wins.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Device memory: named, at least 256 bytes of guard on both sides, filled with 0xff, unwritten until written.
void* device_alloc(size_t bytes, const char* name);
void device_free(void* p);
void mark_written(const void* p, size_t bytes);

// A default argument that names the caller, so that reports point into the kernel.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// A warp collective: `op` runs once, when every lane of the mask has arrived with its input and output.
using WarpOp = void (*)(uint32_t mask, const void* const* in, void* const* out, uint64_t attribute);
void collective(uint32_t mask, WarpOp op, const char* name, const void* in, void* out, uint64_t attribute,
                const char* file, int line);
void sync_op(uint32_t mask, const void* const* in, void* const* out, uint64_t);
void shuffle_op(uint32_t mask, const void* const* in, void* const* out, uint64_t kind);
void ballot_op(uint32_t mask, const void* const* in, void* const* out, uint64_t);
void match_op(uint32_t mask, const void* const* in, void* const* out, uint64_t);
void reduce_op(uint32_t mask, const void* const* in, void* const* out, uint64_t kind);
void ldmatrix_op(uint32_t mask, const void* const* in, void* const* out, uint64_t matrices_and_trans);
void movmatrix_op(uint32_t mask, const void* const* in, void* const* out, uint64_t);
void mma_f16_op(uint32_t mask, const void* const* in, void* const* out, uint64_t);
void mma_bf16_op(uint32_t mask, const void* const* in, void* const* out, uint64_t);

constexpr uint64_t LDMATRIX_TRANS = 8; // or-ed to the number of matrices
struct MmaIn {
    uint32_t a[4], b[2];
    float c[4];
};
// How an mma adds its 16 products and C. Hardware is none of them exactly; results must not depend on it.
enum MmaMode { MMA_EXACT = 0, MMA_F32_IN_ORDER = 1, MMA_ALIGNED_TRUNCATED = 2 };
void set_mma_mode(int mode);

// Barrier `id`; count 0: every live thread. Returns in how many arriving threads `predicate` held.
unsigned barrier(unsigned id, unsigned count, bool predicate, const char* file, int line);
void grid_barrier(const char* file, int line);

void cp_async(void* dst, const void* src, unsigned bytes, unsigned src_bytes, const char* file, int line);
void cp_async_commit();
void cp_async_wait(unsigned keep);

// sm_90: mbarriers in shared memory, bulk copies that complete on them, the fence between the proxies. An error
// in a session whose device is older.
bool hopper();
void set_hopper(bool on);
void mbar_init(void* bar, unsigned arrivals, const char* file, int line);
void mbar_fence();
void mbar_arrive(void* bar, unsigned expected_bytes, const char* file, int line);
void mbar_wait(void* bar, unsigned parity, const char* file, int line);
void copy_bulk(void* dst, const void* src, unsigned bytes, void* bar, const char* file, int line);
void fence_async();

// sm_90a: matrix products of a warpgroup, four warps from a multiple of four on.
struct WgmmaIn {
    float* d;          // [n / 2] of this thread
    const uint32_t* a; // [4] of this thread
    uint64_t b;        // descriptor
    unsigned n;
    bool bf16, accumulate;
};
void wgmma(const WgmmaIn& in, const char* file, int line);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned keep, const char* file, int line);
void set_registers(unsigned count, const char* file, int line);
uint32_t shared_offset(const void* p, const char* file, int line); // as the device would see the address

void* shared_static(const void* key, size_t bytes);
void shared_rewind();
void* shared_take(size_t bytes, size_t align);

void yield();
void maybe_yield();
void atomic_hook(void* p, unsigned bytes, const char* file, int line);
void fence_hook(bool beyond_block);
void acquire_hook(const void* p, unsigned bytes, const char* file, int line);
// An access whose width the host compiler would hide: alignment is checked in every build.
// Plain bytes, out of sight of the checked build: fibres switch only inside the executor, so a read, a change
// and a write made of these are indivisible.
void raw_copy(void* dst, const void* src, size_t bytes);
void check_aligned(const void* p, unsigned bytes, const char* file, int line);

inline int fault() { return active_fault; }

} // namespace simt
