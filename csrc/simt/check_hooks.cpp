// check_hooks.cpp - the functions that the compiler calls in a checked kernel.
//
// Kernels are built with -fsanitize=thread,alignment,bounds,shift-exponent and without the sanitizers'
// libraries: the calls land here, so every load and store is seen with its CUDA thread, and so are misaligned
// vector accesses, indices outside a local array, and shifts that the device and the host do differently.
// Not seen: what a called memcpy or memset does.
#include "check.h"

namespace {

// A kernel's own access; host code of the same file passes through unchecked.
void seen(void* p, unsigned bytes, bool write, const void* pc) {
    if (!simt::runner || !simt::runner->current) return;
    simt::check_access(*simt::runner->current, p, bytes, write, {pc, nullptr, 0}, write ? "write" : "read",
                       false);
}
void seen_aligned(void* p, unsigned bytes, bool write, const void* pc) {
    if (!simt::runner || !simt::runner->current) return;
    if (uintptr_t(p) % bytes)
        simt::fail("misaligned %u-byte access at %s", bytes,
                   simt::site_text(simt::site_id({pc, nullptr, 0})).c_str());
    seen(p, bytes, write, pc);
}

// What the compiler tells about a place; the layout is its ABI.
struct Place {
    const char* file;
    uint32_t line, column;
};
struct Type {
    uint16_t kind, info;
    char name[1];
};
struct Mismatch {
    Place place;
    const Type* type;
    unsigned char log_alignment, kind;
};
struct TwoTypes {
    Place place;
    const Type *first, *second;
};
bool in_kernel() { return simt::runner && simt::runner->current; }

} // namespace

#define SIMT_HOOK(n)                                                                                         \
    extern "C" void __tsan_read##n(void* p) { seen_aligned(p, n, false, __builtin_return_address(0)); }      \
    extern "C" void __tsan_write##n(void* p) { seen_aligned(p, n, true, __builtin_return_address(0)); }      \
    extern "C" void __tsan_volatile_read##n(void* p) {                                                       \
        seen_aligned(p, n, false, __builtin_return_address(0));                                              \
    }                                                                                                        \
    extern "C" void __tsan_volatile_write##n(void* p) {                                                      \
        seen_aligned(p, n, true, __builtin_return_address(0));                                               \
    }                                                                                                        \
    extern "C" void __tsan_unaligned_read##n(void* p) { seen(p, n, false, __builtin_return_address(0)); }    \
    extern "C" void __tsan_unaligned_write##n(void* p) { seen(p, n, true, __builtin_return_address(0)); }
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)

extern "C" {

void __tsan_read_range(void* p, unsigned long n) { seen(p, unsigned(n), false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { seen(p, unsigned(n), true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// The guard of a static in host code.
int8_t __tsan_atomic8_load(const volatile int8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }

void __ubsan_handle_type_mismatch_v1(Mismatch* m, unsigned long p) {
    if (!in_kernel()) return;
    if (p < 4096) simt::fail("null pointer at %s:%u", m->place.file, m->place.line);
    simt::fail("misaligned access of a %s, which needs %d bytes, at %s:%u", m->type->name,
               1 << m->log_alignment, m->place.file, m->place.line);
}
void __ubsan_handle_out_of_bounds(TwoTypes* t, unsigned long index) {
    if (in_kernel())
        simt::fail("index %ld out of bounds of a %s at %s:%u", long(index), t->first->name, t->place.file,
                   t->place.line);
}
void __ubsan_handle_shift_out_of_bounds(TwoTypes* t, unsigned long, unsigned long by) {
    if (in_kernel())
        simt::fail("shift of a %s by %ld at %s:%u", t->first->name, long(by), t->place.file, t->place.line);
}

} // extern "C"
