// check.h - shadow state of the checked build: who touched each byte last, and what each thread knows of
// others.
#pragma once
#include <map>
#include "internal.h"

namespace simt {

using Clocks = std::vector<uint32_t>;
using Seen = std::map<uint64_t, uint32_t>; // block -> generation, (block, thread) -> clock; both exclusive
inline uint64_t block_key(uint32_t block) { return uint64_t(block) << 16; }
inline uint64_t thread_key(uint32_t block, unsigned thread) { return uint64_t(block) << 16 | (thread + 1); }
void merge(Seen& into, const Seen& from);

// What an mbarrier hands on: by the completed phases, and gathered so far for the one under way.
struct Handed {
    unsigned agent = 0;
    Clocks released, gathering;
    Seen seen, seen_gathering;
    uint32_t copied = 0, copy_site = 0; // phase that the newest bulk copy completes in, and its line
};

struct Range {
    Cell* cells;
    unsigned bytes;
};

// Of one block. Behind its n threads, clocks count agents that work on their own: the bulk copies of an
// mbarrier, by the phase that they complete in, and the wgmma of a warpgroup, by their group.
struct Shadow {
    uint32_t epoch = 0;
    std::vector<Clocks> known;    // known[t][u]: what t knows of u
    std::vector<Clocks> at_fence; // at_fence[t]: known[t] when t last passed a device-wide fence
    std::vector<Clocks> readers;  // of this generation
    uint32_t readers_used = 0;
    std::vector<Cell> dynamic;
    std::unordered_map<const void*, std::vector<Cell>> statics;
    Seen seen; // of other blocks, by the whole block
    std::vector<Seen> seen_by;
    std::vector<Handed> mbarriers;
    std::vector<std::vector<Range>> unfenced; // shared memory that a thread wrote since its last proxy fence
};
Shadow& shadow_of(Block& block);

struct Access {
    Fiber& fiber;
    Block& block;
    Shadow& shadow;
    uint32_t site;
    const char* what;
    bool write, atomic;
    unsigned agent = 0; // of an access through the async proxy: who makes it, at which clock; 0: the thread
    uint32_t clock = 0;
    const Clocks* common = nullptr; // what all threads that issue it together know; null: one issues it

    bool async() const { return agent != 0; }
    unsigned recorded() const { return agent ? agent : fiber.thread.flat; }
    bool by(unsigned thread) const { return !common && thread == fiber.thread.flat; } // in its program order
    const Clocks& known() const { return common ? *common : shadow.known[fiber.thread.flat]; }
    uint32_t now() const { return agent ? clock : shadow.known[recorded()][recorded()]; }
};

uint32_t site_id(const Site& site);
std::string site_text(uint32_t id); // "pc 0x..." relative to this library, or file:line

// check.cpp: the happens-before test of one byte.
void touch(const Access& access, Cell& cell, uint32_t epoch, const char* space);
uint32_t launch_epoch();
// check_memory.cpp: finds the bytes, checks bounds and initialisation, touches each.
void check_access(Fiber& fiber, const void* p, unsigned bytes, bool write, Site site, const char* what,
                  bool atomic);
void check_access(const Access& access, const void* p, unsigned bytes);
void check_copy_begin(Fiber& fiber, const Copy& copy);
void check_copy_land(Fiber& fiber, const Copy& copy);
Cell* shared_cells(const Access& a, const unsigned char* p, unsigned bytes);
// check_async.cpp: mbarriers, bulk copies, the proxy fence.
void async_mbar_init(Fiber& fiber, Mbarrier& bar, Site site);
void async_mbar_arrive(Fiber& fiber, Mbarrier& bar, Site site);
void async_mbar_complete(Block& block, Mbarrier& bar);
void async_mbar_wait(Fiber& fiber, Mbarrier& bar, Site site);
void async_bulk_begin(Fiber& fiber, const BulkCopy& copy);
void async_bulk_land(const BulkCopy& copy);
void async_fence(Fiber& fiber);
void async_wgmma_begin(Block& block, Warpgroup& group, const Wgmma& op);
void async_wgmma_wait(Fiber& fiber, Warpgroup& group, unsigned groups);
void async_registers(const Access& a, const unsigned char* p, unsigned bytes);
void async_block_barrier(Shadow& s, size_t threads);
void async_block_end(Shadow& s);
void forget_lookups();

} // namespace simt
