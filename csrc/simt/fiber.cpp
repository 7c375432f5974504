// fiber.cpp - one fibre per CUDA thread: stacks, the switch, and who runs next.
//
// The order of execution is a seeded choice: in order (seed 0), uniformly random (seed % 3 == 1), or random
// priorities of warps (2) or threads (0), under which one side of a missing barrier runs far ahead. A
// schedule that no seed of a test tries is not seen here; the checked build does not depend on luck. Built
// without -fsanitize=thread, like every .cpp in this folder.
#include "internal.h"
#include <sys/mman.h>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
// simt_switch(save, load): push what a callee must keep, swap stacks, pop.
asm(R"(
.text
.p2align 4
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
extern "C" void simt_switch(void** save, void* load);
#else
#include <ucontext.h>
// Other processors: thirty times slower a switch, which still runs every test.
static void simt_switch(void** save, void* load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(load));
}
#endif

namespace simt {

SIMT_TLS Thread* self_thread;
SIMT_TLS Runner* runner;
const Checker* checker = nullptr;

BlockView& block_view() { return *self_thread->block; }

constexpr size_t GUARD = 4096;
constexpr size_t PRIORITY_WINDOW = 1024; // ready fibres compared for each pick

static void thread_main() {
    runner->kernel(runner->arg);
    Fiber* self = runner->current;
    Block& block = *self->thread.block;
    if (!self->accumulators.empty()) fail("a thread ends with a wgmma in flight");
    self->state = State::done;
    runner->live--;
    block.live--;
    if (block.live) {
        open_barrier_if_full(block, 0); // those who exit no longer count
    } else {
        if (block.copies_in_flight) fail("a block ends with a bulk copy in flight");
        if (checker) checker->block_end(block);
    }
    switch_to(block.live ? pick() : nullptr); // the scheduler retires finished blocks
    abort();
}

Fiber* make_fiber() {
    Fiber* fiber;
    if (!runner->pool.empty()) {
        fiber = runner->pool.back();
        runner->pool.pop_back();
        fiber->copies.clear();
        fiber->copy_group = fiber->pieces_taken = 0;
        fiber->fenced = false;
        fiber->waits_on = nullptr;
        fiber->accumulators.clear();
        fiber->changed.clear();
        fiber->wgmma_groups = 0;
        fiber->wgmma_fenced = false;
    } else {
        fiber = new Fiber;
        size_t bytes = runner->config.stack_bytes;
        void* p = mmap(nullptr, bytes + GUARD, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED || mprotect(p, GUARD, PROT_NONE) != 0) abort();
        fiber->stack = static_cast<unsigned char*>(p) + GUARD;
        fiber->stack_bytes = bytes;
    }
    fiber->state = State::ready;
    return fiber;
}

void start_fiber(Fiber& fiber) {
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
    void** sp = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - 64);
    *--sp = nullptr; // thread_main never returns
    *--sp = reinterpret_cast<void*>(thread_main);
    for (int i = 0; i < 6; i++) *--sp = nullptr; // the registers that simt_switch pops
    fiber.stack_pointer = sp;
#else
    auto* context = reinterpret_cast<ucontext_t*>(fiber.stack); // the far end of its own stack
    getcontext(context);
    context->uc_link = nullptr;
    context->uc_stack.ss_sp = fiber.stack + sizeof(ucontext_t);
    context->uc_stack.ss_size = fiber.stack_bytes - sizeof(ucontext_t);
    makecontext(context, thread_main, 0);
    fiber.stack_pointer = context;
#endif
    runner->ready.push_back(&fiber);
}

void drop_fibers() {
    for (Fiber* fiber : runner->pool) {
        munmap(fiber->stack - GUARD, fiber->stack_bytes + GUARD);
        delete fiber;
    }
    runner->pool.clear();
}

void switch_to(Fiber* to) {
    Fiber* from = runner->current;
    if (from == to) return;
    runner->report.switches++;
    runner->current = to;
    self_thread = to ? &to->thread : nullptr;
    simt_switch(from ? &from->stack_pointer : &runner->scheduler_sp,
                to ? to->stack_pointer : runner->scheduler_sp);
}

static uint64_t priority(const Thread& t) {
    uint64_t unit = runner->config.seed % 3 == 2 ? t.warp_index : t.flat;
    uint64_t p = ((t.block->number * 1031ull + unit) ^ runner->priority_salt) * 0x9E3779B97F4A7C15ull;
    p ^= p >> 29;
    p *= 0xBF58476D1CE4E5B9ull;
    return p;
}

static size_t choose() {
    Runner& r = *runner;
    size_t waiting = r.ready.size() - r.head;
    if (r.config.seed == 0) return r.head;
    if (r.config.seed % 3 == 1) return r.head + r.random() % waiting;
    if (r.random() % 256 == 0) r.priority_salt = r.random();
    size_t best = r.head, end = r.head + (waiting < PRIORITY_WINDOW ? waiting : PRIORITY_WINDOW);
    uint64_t best_priority = 0;
    for (size_t i = r.head; i < end; i++) {
        uint64_t p = priority(r.ready[i]->thread);
        if (p >= best_priority) best_priority = p, best = i;
    }
    return best;
}

Fiber* pick() {
    auto& ready = runner->ready;
    size_t& head = runner->head;
    if (runner->failed) return nullptr;
    if (!runner->bulk.empty() && runner->config.seed && runner->random() % 8 == 0) land_a_copy();
    while (head == ready.size()) {
        ready.clear();
        head = 0;
        if (!land_a_copy()) return nullptr;
    }
    std::swap(ready[head], ready[choose()]);
    Fiber* fiber = ready[head++];
    if (head > 4096 && head * 2 > ready.size()) {
        ready.erase(ready.begin(), ready.begin() + ptrdiff_t(head));
        head = 0;
    }
    return fiber;
}

void wake(Fiber* fiber) {
    fiber->state = State::ready;
    runner->ready.push_back(fiber);
}

void block_on(const char* what, const char* file, int line) {
    Fiber* self = runner->current;
    self->state = State::blocked;
    self->waits_in = what;
    self->file = file;
    self->line = line;
    switch_to(pick());
}

void yield() {
    if (!runner || !runner->current) return;
    runner->ready.push_back(runner->current);
    switch_to(pick());
}

void maybe_yield() {
    if (runner && runner->current && runner->config.seed && (runner->random() & 3) == 0) yield();
}

} // namespace simt
