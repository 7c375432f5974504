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

// Of one block.
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
};
Shadow& shadow_of(Block& block);

struct Access {
    Fiber& fiber;
    Block& block;
    Shadow& shadow;
    uint32_t site;
    const char* what;
    bool write, atomic;
};

uint32_t site_id(const Site& site);
std::string site_text(uint32_t id); // "pc 0x..." relative to this library, or file:line

// check.cpp: the happens-before test of one byte.
void touch(const Access& access, Cell& cell, uint32_t epoch, const char* space);
uint32_t launch_epoch();
// check_memory.cpp: finds the bytes, checks bounds and initialisation, touches each.
void check_access(Fiber& fiber, const void* p, unsigned bytes, bool write, Site site, const char* what,
                  bool atomic);
void check_copy_begin(Fiber& fiber, const Copy& copy);
void check_copy_land(Fiber& fiber, const Copy& copy);
void forget_lookups();

} // namespace simt
