// memory.cpp - device buffers, shared memory pieces, cp.async, and the hooks of atomics and fences.
//
// cp.async is deferred as far as the PTX model allows: its destination holds 0xff until its thread waits for
// its group, and the source is read then. Freed device addresses are not used again. Limits of one
// architecture's shared memory are not checked, only what the launch asked for.
#include "internal.h"
#include <sys/mman.h>
#include <cstdlib>
#include <map>
#include <mutex>

namespace simt {

// ---- device memory: one reserved range of addresses, pages given back when a buffer is freed
constexpr size_t PAGE = 4096, DEVICE_ALIGN = 256; // cudaMalloc's alignment and no more
static std::mutex arena_mutex;
static unsigned char* arena;
static size_t arena_bytes, arena_used;
static std::map<const unsigned char*, Allocation> allocations;

static bool reserve_arena() {
    for (arena_bytes = 256ull << 30; !arena && arena_bytes >= 1ull << 30; arena_bytes /= 2) {
        void* p = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) continue;
        arena = static_cast<unsigned char*>(p);
        return true;
    }
    return arena != nullptr;
}

static size_t pages_of(size_t bytes) {
    return (DEVICE_ALIGN + bytes + DEVICE_ALIGN + PAGE - 1) / PAGE * PAGE;
}

void* device_alloc(size_t bytes, const char* name) {
    std::lock_guard<std::mutex> lock(arena_mutex);
    if (!arena && !reserve_arena()) return nullptr;
    if (bytes > arena_bytes || pages_of(bytes) > arena_bytes - arena_used) return nullptr;
    unsigned char* at = arena + arena_used + DEVICE_ALIGN;
    arena_used += pages_of(bytes);
    memset(at, 0xff, bytes);
    Allocation& a = allocations[at];
    a.at = at;
    a.bytes = bytes;
    a.name = name;
    a.written.assign((bytes + 63) / 64, 0);
    return at;
}

void device_free(void* p) {
    std::lock_guard<std::mutex> lock(arena_mutex);
    auto found = allocations.find(static_cast<unsigned char*>(p));
    if (found == allocations.end()) return;
    madvise(found->second.at - DEVICE_ALIGN, pages_of(found->second.bytes), MADV_DONTNEED);
    allocations.erase(found);
}

bool in_device_memory(const void* p) {
    auto* at = static_cast<const unsigned char*>(p);
    return arena && at >= arena && at < arena + arena_bytes;
}

Allocation* find_allocation(const void* p) {
    auto* at = static_cast<const unsigned char*>(p);
    std::lock_guard<std::mutex> lock(arena_mutex);
    auto after = allocations.upper_bound(at + DEVICE_ALIGN);
    if (after == allocations.begin()) return nullptr;
    Allocation& a = std::prev(after)->second;
    return at < a.at - DEVICE_ALIGN + pages_of(a.bytes) ? &a : nullptr;
}

void mark_written(const void* p, size_t bytes) {
    Allocation* a = in_device_memory(p) ? find_allocation(p) : nullptr;
    if (!a) return;
    auto* at = static_cast<const unsigned char*>(p);
    for (size_t i = 0; i < bytes; i++) {
        if (at + i >= a->at && at + i < a->at + a->bytes) a->set_written(size_t(at + i - a->at));
    }
}

// ---- shared memory
void* shared_static(const void* key, size_t bytes) {
    auto& store = runner->current->thread.block->statics[key];
    if (store.empty()) store.assign(bytes + STATIC_PAD, 0xff);
    return static_begin(store);
}

void shared_rewind() { runner->current->pieces_taken = 0; }

// Every thread carves the same pieces; the first to ask lays them out, 64 bytes of red zone apart.
void* shared_take(size_t bytes, size_t align) {
    constexpr size_t RED_ZONE = 64;
    Fiber& self = *runner->current;
    Block& block = *self.thread.block;
    unsigned i = self.pieces_taken++;
    if (i < block.pieces.size()) {
        if (block.pieces[i].bytes != bytes) fail("shared memory is carved differently by different threads");
        return block.pieces[i].at;
    }
    unsigned char* at =
        block.pieces.empty() ? block.dynamic : block.pieces.back().at + block.pieces.back().bytes + RED_ZONE;
    at = reinterpret_cast<unsigned char*>((uintptr_t(at) + align - 1) / align * align);
    block.dynamic_taken = (block.dynamic_taken + align - 1) / align * align + bytes;
    if (block.dynamic_taken > block.dynamic_bytes)
        fail("kernel takes %zu bytes of dynamic shared memory, launch gives %zu", block.dynamic_taken,
             block.dynamic_bytes);
    if (at + bytes > block.dynamic_store.data() + block.dynamic_store.size())
        fail("executor: no room left for red zones");
    block.pieces.push_back({at, bytes});
    return at;
}

bool in_shared_memory(Block& block, const unsigned char* p, unsigned bytes) {
    auto inside = [&](std::vector<unsigned char>& store) {
        return p >= store.data() && p + bytes <= store.data() + store.size();
    };
    if (inside(block.dynamic_store)) return true;
    for (auto& [key, store] : block.statics) {
        if (inside(store)) return true;
    }
    return false;
}

// ---- cp.async
void cp_async(void* dst, const void* src, unsigned bytes, unsigned src_bytes, const char* file, int line) {
    Fiber& self = *runner->current;
    maybe_yield();
    if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %u bytes at %s:%d", bytes, file, line);
    if (uintptr_t(dst) % bytes || (src_bytes && uintptr_t(src) % bytes))
        fail("misaligned cp.async at %s:%d", file, line);
    Copy copy{static_cast<unsigned char*>(dst),
              static_cast<const unsigned char*>(src),
              bytes,
              src_bytes,
              self.copy_group,
              file,
              line};
    if (!in_shared_memory(*self.thread.block, copy.dst, bytes))
        fail("cp.async destination is not shared memory at %s:%d", file, line);
    if (checker) checker->copy_begin(self, copy);
    runner->report.cp_async++;
    memset(dst, 0xff, bytes);
    self.copies.push_back(copy);
}

void cp_async_commit() { runner->current->copy_group++; }

void cp_async_wait(unsigned keep) {
    Fiber& self = *runner->current;
    maybe_yield();
    std::erase_if(self.copies, [&](const Copy& copy) {
        if (self.copy_group - copy.group <= keep) return false;
        if (checker) checker->copy_land(self, copy);
        if (copy.src_bytes) memcpy(copy.dst, copy.src, copy.src_bytes);
        memset(copy.dst + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
        return true;
    });
}

// ---- atomics, fences, alignment
void raw_copy(void* dst, const void* src, size_t bytes) { memcpy(dst, src, bytes); }

void check_aligned(const void* p, unsigned bytes, const char* file, int line) {
    if (uintptr_t(p) % bytes) fail("misaligned %u-byte access at %s:%d", bytes, file, line);
}
void atomic_hook(void* p, unsigned bytes, const char* file, int line) {
    maybe_yield();
    check_aligned(p, bytes, file, line);
    if (checker && runner && runner->current)
        checker->atomic(*runner->current, p, bytes, {nullptr, file, line});
}
void acquire_hook(const void* p, unsigned bytes, const char* file, int line) {
    check_aligned(p, bytes, file, line);
    if (checker && runner && runner->current)
        checker->acquire(*runner->current, p, bytes, {nullptr, file, line});
}
void fence_hook(bool beyond_block) {
    if (checker && runner && runner->current) checker->fence(*runner->current, beyond_block);
}

} // namespace simt
