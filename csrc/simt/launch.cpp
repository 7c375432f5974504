// launch.cpp - one launch: blocks start while fewer than `resident` live, fibres run until none is ready, and
// the first failure ends it all. A launch that would never end for lack of a ready fibre is a deadlock and is
// reported with the places where its threads wait; a spin loop that never yields is not noticed.
#include "internal.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace simt {

constexpr size_t DYNAMIC_ALIGN = 1024;
constexpr size_t RED_ZONE_ROOM = 4096;
constexpr size_t MAX_SHARED = 227 * 1024; // sm_90, the largest supported
constexpr unsigned MAX_THREADS = 1024;

static std::string describe(const Thread& t) {
    uint3 b = t.block->index;
    char s[160];
    snprintf(s, sizeof s, " [block (%u,%u,%u) thread %u = warp %u lane %u]", b.x, b.y, b.z, t.flat,
             t.warp_index, t.lane);
    return s;
}

void fail(const char* format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (!runner || !runner->current) {
        fprintf(stderr, "device code called outside a launch: %s\n", text);
        abort();
    }
    if (!runner->failed) {
        runner->failed = true;
        runner->report.ok = false;
        runner->report.message =
            std::string(runner->config.name) + ": " + text + describe(runner->current->thread);
    }
    runner->current->state = State::done;
    switch_to(nullptr);
    abort();
}

static void start_block(unsigned number) {
    const Launch& c = runner->config;
    auto* block = new Block;
    block->number = number;
    block->grid = c.grid;
    block->threads = c.block;
    block->index = {number % c.grid.x, number / c.grid.x % c.grid.y, number / c.grid.x / c.grid.y};
    unsigned n = c.block.x * c.block.y * c.block.z;
    block->live = n;
    runner->live += n;
    block->dynamic_bytes = c.shared_bytes;
    block->dynamic_store.assign(c.shared_bytes * 2 + RED_ZONE_ROOM, 0xff); // 0xff.. is a NaN in every format
    uintptr_t at = uintptr_t(block->dynamic_store.data());
    block->dynamic =
        reinterpret_cast<unsigned char*>((at + DYNAMIC_ALIGN - 1) / DYNAMIC_ALIGN * DYNAMIC_ALIGN);
    block->warps.resize((n + 31) / 32);
    block->warpgroups.resize(n / 128);
    block->fibers.resize(n);
    for (unsigned i = 0; i < n; i++) {
        Fiber* fiber = make_fiber();
        uint3 index = {i % c.block.x, i / c.block.x % c.block.y, i / c.block.x / c.block.y};
        fiber->thread = {index, i, i % 32, i / 32, block, &block->warps[i / 32], fiber};
        block->fibers[i] = fiber;
        start_fiber(*fiber);
    }
    runner->blocks.push_back(block);
    if (checker) checker->block_begin(*block);
}

static void retire_block(Block* block) {
    for (Fiber* fiber : block->fibers) runner->pool.push_back(fiber);
    delete block;
}

static void report_deadlock() {
    std::string message = std::string(runner->config.name) + ": deadlock:";
    std::unordered_map<std::string, int> seen;
    constexpr int MOST_PLACES = 6;
    for (Block* block : runner->blocks) {
        for (Fiber* fiber : block->fibers) {
            if (fiber->state != State::blocked) continue;
            char place[240], text[300];
            int n = snprintf(place, sizeof place, " %s at %s:%d", fiber->waits_in, fiber->file, fiber->line);
            if (const Mbarrier* bar = fiber->waits_on)
                snprintf(place + n, sizeof place - size_t(n), ", %u arrivals and %lld bytes missing",
                         bar->missing, (long long)bar->bytes);
            if (seen[place]++ || seen.size() > MOST_PLACES) continue;
            snprintf(text, sizeof text, "%s (first: block %u warp %u lane %u);", place, block->number,
                     fiber->thread.warp_index, fiber->thread.lane);
            message += text;
        }
    }
    runner->failed = true;
    runner->report.ok = false;
    runner->report.message = message;
}

static const char* refusal(const Launch& c) {
    uint64_t threads = uint64_t(c.block.x) * c.block.y * c.block.z;
    if (threads == 0 || threads > MAX_THREADS || c.block.z > 64) return "a block must have 1 to 1024 threads";
    if (!c.grid.x || !c.grid.y || !c.grid.z) return "an empty grid";
    if (c.grid.y > 65535 || c.grid.z > 65535) return "grid.y and grid.z are at most 65535";
    if (c.shared_bytes > MAX_SHARED) return "more than 227 KB of dynamic shared memory";
    return nullptr;
}

static void run_blocks() {
    Runner& r = *runner;
    const Launch& c = r.config;
    unsigned total = c.grid.x * c.grid.y * c.grid.z, next = 0;
    unsigned resident = c.cooperative ? total : std::max(1u, c.resident);
    std::vector<unsigned> order(total);
    for (unsigned i = 0; i < total; i++) order[i] = i;
    if (c.seed) {
        for (unsigned i = total; i > 1; i--) std::swap(order[i - 1], order[r.random() % i]);
    }
    while (!r.failed) {
        while (r.blocks.size() < resident && next < total) start_block(order[next++]);
        if (r.blocks.empty()) break;
        Fiber* fiber = pick();
        if (!fiber) {
            report_deadlock();
            break;
        }
        switch_to(fiber);
        std::erase_if(r.blocks, [&](Block* block) {
            if (block->live || r.failed) return false;
            retire_block(block);
            return true;
        });
    }
    for (Block* block : r.blocks)
        retire_block(block); // after a failure: live fibres are dropped, not unwound
}

Report run(const Launch& config, void (*kernel)(void*), void* arg) {
    Runner r;
    r.config = config;
    r.kernel = kernel;
    r.arg = arg;
    r.random_state = config.seed * 0x9E3779B97F4A7C15ull | 1;
    for (int i = 0; i < 4; i++) r.priority_salt = r.random();
    if (const char* why = refusal(config)) {
        r.report.ok = false;
        r.report.message = std::string(config.name) + ": launch refused: " + why;
        return r.report;
    }
    Runner* outer = runner;
    runner = &r;
    if (checker) checker->launch_begin();
    run_blocks();
    drop_fibers();
    runner = outer;
    self_thread = outer && outer->current ? &outer->current->thread : nullptr;
    return r.report;
}

} // namespace simt
