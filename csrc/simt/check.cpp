// check.cpp - the checked build's happens-before order, which does not depend on the schedule that ran.
//
// Ordered by: program order, block barriers (a generation of the block), __syncwarp and named barriers
// (vector clocks within a block), and across blocks by fence, then atomic, seen by a later atomic or acquire
// load. Stricter than the device: __threadfence_block orders nothing (use a barrier).
// Not seen: a missing fence after an acquiring atomic; of readers in two blocks only the last is remembered;
// weak-memory outcomes beyond missing order. Writing the same value twice is a race, as it is on the device.
#include "check.h"
#include <algorithm>
#include <atomic>

namespace simt {
namespace {

thread_local std::unordered_map<Block*, std::unique_ptr<Shadow>> shadows;
thread_local std::vector<std::unique_ptr<Shadow>> spare_shadows;
thread_local Block* last_block;
thread_local Shadow* last_shadow;
thread_local std::unordered_map<const void*, Seen> released; // by address of the atomic
thread_local uint32_t this_launch;
std::atomic<uint32_t> next_epoch{1}; // process-wide: buffers may move between OS threads

[[noreturn]] void report_race(const Access& a, const char* kind, const Cell& cell, bool after_write,
                              const char* space) {
    unsigned thread = after_write ? cell.write_thread : cell.read_thread;
    unsigned block = after_write ? cell.write_block : cell.read_block;
    std::string here = site_text(a.site), there = site_text(after_write ? cell.write_site : cell.read_site);
    fail("%s race in %s memory: %s by thread %u (block %u) at %s after a %s by thread %u (block %u) at %s",
         kind, space, a.what, a.fiber.thread.flat, a.block.number, here.c_str(),
         after_write ? "write" : "read", thread, block, there.c_str());
}

// Asynchronous agents (behind the block's threads) do not stop at barriers: only their clock orders them.
bool ordered_before(const Access& a, uint32_t block, uint32_t generation, uint32_t clock, unsigned thread) {
    bool agent = thread >= a.block.fibers.size();
    if (block == a.block.number) {
        if (!agent && (generation != a.block.generation || a.by(thread))) return true;
        if (a.known()[thread] >= clock) return true;
    }
    for (const Seen* seen : {&a.shadow.seen, &a.shadow.seen_by[a.fiber.thread.flat]}) {
        auto of_block = seen->find(block_key(block));
        if (!agent && of_block != seen->end() && of_block->second > generation) return true;
        auto of_thread = seen->find(thread_key(block, thread));
        if (of_thread != seen->end() && of_thread->second > clock) return true;
    }
    return false;
}

bool read_in_this_generation(const Access& a, const Cell& cell) {
    return cell.read_block == a.block.number && cell.read_generation == a.block.generation;
}

void note_write(const Access& a, Cell& cell, const char* space) {
    unsigned self = a.recorded();
    if (cell.read_block != NOBODY && !a.atomic) {
        auto check_reader = [&](unsigned thread, uint32_t clock) {
            if (ordered_before(a, cell.read_block, cell.read_generation, clock, thread)) return;
            cell.read_thread = uint16_t(thread);
            report_race(a, "write-after-read", cell, false, space);
        };
        check_reader(cell.read_thread, cell.read_clock);
        if (cell.other_clock) check_reader(cell.other_thread, cell.other_clock);
        if (cell.readers && read_in_this_generation(a, cell)) {
            const Clocks& clocks = a.shadow.readers[cell.readers - 1];
            for (unsigned t = 0; t < clocks.size(); t++) {
                if (clocks[t]) check_reader(t, clocks[t]);
            }
        }
    }
    cell.write_block = a.block.number;
    cell.write_generation = a.block.generation;
    cell.write_clock = a.now();
    cell.write_thread = uint16_t(self);
    cell.write_site = a.site;
    cell.read_block = NOBODY;
    cell.other_clock = cell.readers = 0;
    cell.fence_clock = 0;
    cell.written = true;
    cell.atomic = a.atomic;
}

void note_read(const Access& a, Cell& cell) {
    unsigned self = a.recorded();
    Shadow& s = a.shadow;
    uint32_t clock = a.now();
    if (!read_in_this_generation(a, cell)) {
        cell.other_clock = cell.readers = 0;
    } else if (cell.read_thread != self && (!cell.other_clock || cell.other_thread == self)) {
        cell.other_thread = uint16_t(self);
        cell.other_clock = clock;
        return;
    } else if (cell.read_thread != self) {
        if (!cell.readers) {
            if (s.readers_used == s.readers.size()) s.readers.emplace_back();
            s.readers[s.readers_used++].assign(s.known[0].size(), 0);
            cell.readers = s.readers_used;
        }
        Clocks& clocks = s.readers[cell.readers - 1];
        if (clocks.size() <= self) clocks.resize(self + 1, 0);
        clocks[self] = clock;
        return;
    }
    cell.read_block = a.block.number;
    cell.read_generation = a.block.generation;
    cell.read_clock = clock;
    cell.read_thread = uint16_t(self);
    cell.read_site = a.site;
}

void block_begin(Block& block) {
    std::unique_ptr<Shadow> s;
    if (spare_shadows.empty()) {
        s = std::make_unique<Shadow>();
    } else {
        s = std::move(spare_shadows.back());
        spare_shadows.pop_back();
    }
    size_t n = block.fibers.size();
    s->epoch = next_epoch++;
    s->known.resize(n);
    for (size_t i = 0; i < n; i++) {
        s->known[i].assign(n, 0);
        s->known[i][i] = 1;
    }
    if (s->dynamic.size() < block.dynamic_store.size()) s->dynamic.resize(block.dynamic_store.size());
    s->statics.clear();
    s->readers_used = 0;
    s->seen.clear();
    s->seen_by.assign(n, {});
    s->at_fence.assign(n, {});
    s->mbarriers.clear();
    s->unfenced.assign(n, {});
    last_block = nullptr;
    shadows[&block] = std::move(s);
}

void block_end(Block& block) {
    last_block = nullptr;
    auto found = shadows.find(&block);
    if (found == shadows.end()) return;
    if (!runner->failed) async_block_end(*found->second);
    spare_shadows.push_back(std::move(found->second));
    shadows.erase(found);
}

void block_barrier(Block& block) {
    Shadow& s = shadow_of(block);
    s.readers_used = 0;
    for (Seen& seen : s.seen_by) merge(s.seen, seen);
    for (Fiber* fiber : block.fibers) fiber->fenced = false;
    if (!s.mbarriers.empty()) async_block_barrier(s, block.fibers.size());
}

void launch_begin() {
    this_launch = next_epoch++;
    released.clear();
    shadows.clear();
    last_block = nullptr;
    forget_lookups();
}

void grid_barrier() { this_launch = next_epoch++; }

// What the threads know of their block and of others becomes common to them.
void sync(Fiber* const* fibers, unsigned n) {
    Shadow& s = shadow_of(*fibers[0]->thread.block);
    Clocks merged = s.known[fibers[0]->thread.flat];
    Seen seen;
    for (unsigned i = 0; i < n; i++) {
        const Clocks& other = s.known[fibers[i]->thread.flat];
        for (size_t t = 0; t < merged.size(); t++) merged[t] = std::max(merged[t], other[t]);
        merge(seen, s.seen_by[fibers[i]->thread.flat]);
    }
    for (unsigned i = 0; i < n; i++) {
        unsigned t = fibers[i]->thread.flat;
        s.known[t] = merged;
        s.known[t][t]++;
        s.seen_by[t] = seen;
    }
}

void fence(Fiber& fiber, bool beyond_block) {
    if (!beyond_block) return;
    fiber.fenced = true;
    unsigned t = fiber.thread.flat;
    Shadow& s = shadow_of(*fiber.thread.block);
    s.known[t][t]++;
    s.at_fence[t] = s.known[t];
}

void raise(Seen& seen, uint64_t key, uint32_t value) {
    uint32_t& v = seen[key];
    v = std::max(v, value);
}

// An atomic takes over what earlier fenced atomics on the address released, and after a fence releases
// itself.
void atomic(Fiber& fiber, void* p, unsigned bytes, Site site) {
    Block& block = *fiber.thread.block;
    Shadow& s = shadow_of(block);
    check_access(fiber, p, bytes, true, site, "atomic", true);
    Seen& seen = released[p];
    unsigned t = fiber.thread.flat;
    merge(s.seen_by[t], seen);
    if (!fiber.fenced) return;
    raise(seen, block_key(block.number), block.generation);
    const Clocks& clocks = s.at_fence[t];
    for (unsigned u = 0; u < clocks.size(); u++) {
        // Own accesses before the fence, and those of others that were known by then.
        if (clocks[u]) raise(seen, thread_key(block.number, u), clocks[u] + (u != t));
    }
    merge(seen, s.seen);
    merge(seen, s.seen_by[t]);
}

void acquire(Fiber& fiber, const void* p, unsigned bytes, Site site) {
    check_access(fiber, p, bytes, false, site, "acquiring load", true);
    auto found = released.find(p);
    if (found != released.end())
        merge(shadow_of(*fiber.thread.block).seen_by[fiber.thread.flat], found->second);
}

void access(Fiber& fiber, const void* p, unsigned bytes, bool write, Site site, const char* what) {
    check_access(fiber, p, bytes, write, site, what, false);
}

const Checker callbacks{launch_begin,
                        block_begin,
                        block_end,
                        block_barrier,
                        grid_barrier,
                        sync,
                        access,
                        check_copy_begin,
                        check_copy_land,
                        atomic,
                        fence,
                        acquire,
                        async_mbar_init,
                        async_mbar_arrive,
                        async_mbar_complete,
                        async_mbar_wait,
                        async_bulk_begin,
                        async_bulk_land,
                        async_fence,
                        async_wgmma_begin,
                        async_wgmma_wait};
[[maybe_unused]] const Checker* const installed = checker = &callbacks;

} // namespace

void merge(Seen& into, const Seen& from) {
    for (auto& [key, value] : from) raise(into, key, value);
}

Shadow& shadow_of(Block& block) {
    if (last_block != &block) {
        last_block = &block;
        last_shadow = shadows[&block].get();
    }
    return *last_shadow;
}

uint32_t launch_epoch() { return this_launch; }

void touch(const Access& a, Cell& cell, uint32_t epoch, const char* space) {
    if (cell.epoch != epoch) {
        cell = Cell{};
        cell.epoch = epoch;
    }
    bool known =
        cell.write_block == NOBODY || (a.atomic && cell.atomic) ||
        ordered_before(a, cell.write_block, cell.write_generation, cell.write_clock, cell.write_thread);
    bool by_agent = cell.write_block != NOBODY && cell.write_thread >= a.block.fibers.size();
    if (by_agent && (cell.in_flight || !known))
        fail("%s of shared memory with a bulk copy in flight, issued at %s and not waited for, at %s", a.what,
             site_text(cell.write_site).c_str(), site_text(a.site).c_str());
    if (cell.in_flight)
        fail("%s of shared memory with a cp.async in flight (issued by thread %u) at %s", a.what,
             cell.write_thread, site_text(a.site).c_str());
    if (!known) report_race(a, a.write ? "write-write" : "read-after-write", cell, true, space);
    if (a.async() && cell.write_block != NOBODY && !by_agent &&
        (!cell.fence_clock ||
         !ordered_before(a, cell.write_block, cell.fence_generation, cell.fence_clock, cell.write_thread)))
        fail("%s of %s memory that thread %u wrote at %s without fence.proxy.async after it, at %s", a.what,
             space, cell.write_thread, site_text(cell.write_site).c_str(), site_text(a.site).c_str());
    if (a.write)
        note_write(a, cell, space);
    else
        note_read(a, cell);
}

} // namespace simt
