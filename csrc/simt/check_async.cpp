// check_async.cpp - the checked build's order of what runs beside the threads: bulk copies and mbarriers.
//
// A copy is checked where it is issued, with what the issuing thread knows, and stamped with an agent of its
// own, the copies of its mbarrier, at the phase that it completes in. A thread learns of a phase, and of what
// the arriving threads knew, only by waiting for it; a block barrier passes on what its threads have learnt.
// Reads and writes of the async proxy also want a proxy fence after a thread's plain write to the same bytes.
// The reads of a wgmma are checked with what all its 128 threads know, and last until one waits for its group.
#include "check.h"
#include <algorithm>

namespace simt {
namespace {

void raise(Clocks& into, const Clocks& from) {
    if (into.size() < from.size()) into.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

Access of_copy(const BulkCopy& copy, Fiber& fiber, const char* what, bool write) {
    Block& block = *copy.block;
    Access a{fiber, block, shadow_of(block), site_id({nullptr, copy.file, copy.line}), what, write, false};
    a.agent = a.shadow.mbarriers[copy.bar->slot].agent;
    a.clock = copy.bar->phase + 1;
    return a;
}

unsigned new_agent(Shadow& s) {
    for (Clocks& known : s.known) known.push_back(0);
    return unsigned(s.known[0].size() - 1);
}

} // namespace

void async_mbar_init(Fiber& fiber, Mbarrier& bar, Site site) {
    check_access(fiber, bar.at, 8, true, site, "mbarrier.init", false);
    Shadow& s = shadow_of(*fiber.thread.block);
    s.mbarriers.emplace_back().agent = new_agent(s);
}

void async_mbar_arrive(Fiber& fiber, Mbarrier& bar, Site site) {
    check_access(fiber, bar.at, 8, false, site, "mbarrier.arrive", true);
    Shadow& s = shadow_of(*fiber.thread.block);
    unsigned t = fiber.thread.flat;
    raise(s.mbarriers[bar.slot].gathering, s.known[t]);
    merge(s.mbarriers[bar.slot].seen_gathering, s.seen_by[t]);
    s.known[t][t]++;
}

void async_mbar_complete(Block& block, Mbarrier& bar) {
    Handed& handed = shadow_of(block).mbarriers[bar.slot];
    raise(handed.released, handed.gathering);
    merge(handed.seen, handed.seen_gathering);
    if (handed.released.size() <= handed.agent) handed.released.resize(handed.agent + 1, 0);
    handed.released[handed.agent] = bar.phase;
}

void async_mbar_wait(Fiber& fiber, Mbarrier& bar, Site site) {
    check_access(fiber, bar.at, 8, false, site, "mbarrier.try_wait", true);
    Shadow& s = shadow_of(*fiber.thread.block);
    raise(s.known[fiber.thread.flat], s.mbarriers[bar.slot].released);
    merge(s.seen_by[fiber.thread.flat], s.mbarriers[bar.slot].seen);
}

void async_bulk_begin(Fiber& fiber, const BulkCopy& copy) {
    check_access(fiber, copy.bar->at, 8, false, {nullptr, copy.file, copy.line}, "cp.async.bulk", true);
    check_access(of_copy(copy, fiber, "cp.async.bulk read", false), copy.src, copy.bytes);
    Access a = of_copy(copy, fiber, "cp.async.bulk write", true);
    check_access(a, copy.dst, copy.bytes);
    Cell* cells = shared_cells(a, copy.dst, copy.bytes);
    for (unsigned i = 0; i < copy.bytes; i++) cells[i].in_flight = true;
    Handed& handed = a.shadow.mbarriers[copy.bar->slot];
    handed.copied = a.clock;
    handed.copy_site = a.site;
}

void async_bulk_land(const BulkCopy& copy) {
    Access a = of_copy(copy, *copy.block->fibers[0], "cp.async.bulk landing", true);
    Cell* cells = shared_cells(a, copy.dst, copy.bytes);
    for (unsigned i = 0; i < copy.bytes; i++) cells[i].in_flight = false;
}

void async_fence(Fiber& fiber) {
    Block& block = *fiber.thread.block;
    Shadow& s = shadow_of(block);
    unsigned t = fiber.thread.flat;
    s.known[t][t]++;
    for (const Range& range : s.unfenced[t]) {
        for (unsigned i = 0; i < range.bytes; i++) {
            Cell& cell = range.cells[i];
            bool own = cell.epoch == s.epoch && cell.write_block == block.number && cell.write_thread == t;
            if (!own || cell.fence_clock || cell.in_flight) continue;
            cell.fence_generation = block.generation;
            cell.fence_clock = s.known[t][t];
        }
    }
    s.unfenced[t].clear();
}

void async_wgmma_begin(Block& block, Warpgroup& group, const Wgmma& op) {
    Shadow& s = shadow_of(block);
    if (!group.agent) group.agent = new_agent(s);
    Fiber& first = *group.arrived[0];
    Clocks common = s.known[first.thread.flat];
    for (Fiber* fiber : group.arrived) {
        const Clocks& known = s.known[fiber->thread.flat];
        for (size_t i = 0; i < common.size(); i++) common[i] = std::min(common[i], known[i]);
    }
    Access a{first, block, s, site_id({nullptr, op.file, op.line}), "wgmma read", false, false};
    a.agent = group.agent;
    a.clock = op.group + 1;
    a.common = &common;
    for (unsigned n = 0; n < op.n; n++) {
        const unsigned char* half[2];
        wgmma_row(block, op, n, half);
        check_access(a, half[0], 16);
        check_access(a, half[1], 16);
    }
}

void async_wgmma_wait(Fiber& fiber, Warpgroup& group, unsigned groups) {
    if (!group.agent) return;
    uint32_t& clock = shadow_of(*fiber.thread.block).known[fiber.thread.flat][group.agent];
    clock = std::max(clock, groups);
}

// A thread's access to its own variables, where the compiler keeps them in memory.
void async_registers(const Access& a, const unsigned char* p, unsigned bytes) {
    Fiber& fiber = a.fiber;
    for (const Accumulators& acc : fiber.accumulators) {
        auto* d = reinterpret_cast<const unsigned char*>(acc.d);
        if (p < d + acc.value.size() * sizeof(float) && d < p + bytes)
            fail("%s of accumulators of a wgmma in flight at %s", a.what, site_text(a.site).c_str());
    }
    if (a.write && (fiber.wgmma_fenced || fiber.wgmma_groups)) fiber.changed.push_back({p, bytes});
}

void async_block_barrier(Shadow& s, size_t threads) {
    for (size_t agent = threads; agent < s.known[0].size(); agent++) {
        uint32_t most = 0;
        for (const Clocks& known : s.known) most = std::max(most, known[agent]);
        for (Clocks& known : s.known) known[agent] = most;
    }
}

void async_block_end(Shadow& s) {
    for (const Handed& handed : s.mbarriers) {
        uint32_t most = 0;
        for (const Clocks& known : s.known) most = std::max(most, known[handed.agent]);
        if (most < handed.copied)
            fail("a block ends with a bulk copy in flight, issued at %s and not waited for",
                 site_text(handed.copy_site).c_str());
    }
}

} // namespace simt
