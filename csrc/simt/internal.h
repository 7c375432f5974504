// internal.h - the executor's own state: fibres, blocks, the runner, and the hooks of the checked build.
#pragma once
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>
#include "simt.h"

namespace simt {

enum class State : uint8_t { ready, blocked, done };

// One cp.async on its way: the bytes land when its thread waits for its group.
struct Copy {
    unsigned char* dst;
    const unsigned char* src;
    unsigned bytes, src_bytes, group;
    const char* file;
    int line;
};

// An mbarrier of a block. Phase n is under way once n phases have completed.
struct Mbarrier {
    unsigned char* at;
    unsigned arrivals, missing;     // of every phase; of the phase under way
    int64_t bytes = 0, claimed = 0; // expected and not landed; of these, by copies on their way
    uint32_t phase = 0;
    unsigned slot; // among the mbarriers of its block
    bool fenced = false;
    Fiber* maker;
    std::vector<Fiber*> waiting;
};

// A bulk copy on its way: the bytes are read and land together, at a moment of the schedule's choosing.
struct BulkCopy {
    unsigned char* dst;
    const unsigned char* src;
    unsigned bytes;
    Mbarrier* bar;
    Block* block;
    const char* file;
    int line;
};

// Registers of A of one thread that a wgmma in flight reads: where, and what they must stay.
struct Fragment {
    const uint32_t* at;
    uint32_t held[4];
    const char* file;
    int line;
};

// Accumulators of one thread that a wgmma in flight writes; the thread's own copy holds poison meanwhile.
struct Accumulators {
    float* d;
    std::vector<float> value;
    unsigned group; // of the newest wgmma on them
    std::vector<Fragment> read;
};

// A wgmma on its way, by a whole warpgroup.
struct Wgmma {
    unsigned n, group;
    bool bf16, accumulate;
    uint64_t b;
    uint32_t a[128][4];
    float* d[128];
    const char* file;
    int line;
};

struct Warpgroup {
    std::vector<Fiber*> arrived; // at the instruction under way
    std::vector<WgmmaIn> in;
    const char* name = nullptr;
    std::vector<Wgmma> queue; // not computed yet
    unsigned agent = 0;       // of the checked build
};

struct Span {
    const unsigned char* at;
    unsigned bytes;
};

struct Fiber {
    Thread thread;
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;
    size_t stack_bytes = 0;
    State state = State::ready;
    const char* waits_in = nullptr; // what, file, line: where it waits
    const char* file = nullptr;
    int line = 0;
    std::vector<Copy> copies;
    unsigned copy_group = 0;
    unsigned pieces_taken = 0;
    bool fenced = false; // a device-wide fence since its last block barrier
    const Mbarrier* waits_on = nullptr;
    std::vector<Accumulators> accumulators; // in flight
    unsigned wgmma_groups = 0;              // committed
    bool wgmma_fenced = false;
    std::vector<Span> changed; // registers written since the last wgmma fence (checked build)
};

// Lanes gathering for one collective.
struct Gathering {
    uint32_t mask, arrived;
    WarpOp op;
    uint64_t attribute;
    const char* name;
    const void* in[32];
    void* out[32];
    Fiber* fiber[32];
};

struct Warp {
    std::vector<Gathering> pending;
};

struct Barrier {
    unsigned want = 0;       // arrivals that open it; 0: every live thread of the block
    unsigned votes = 0;      // predicates seen so far
    unsigned last_votes = 0; // of the generation that opened last
    std::vector<Fiber*> waiting;
};

struct Piece {
    unsigned char* at;
    size_t bytes;
};

struct Block : BlockView {
    unsigned number = 0, live = 0;
    uint32_t generation = 1; // block-wide barriers passed
    std::vector<Warp> warps;
    std::vector<Fiber*> fibers;
    Barrier barriers[16];
    std::vector<unsigned char> dynamic_store;
    size_t dynamic_taken = 0;
    std::vector<Piece> pieces;
    std::unordered_map<const void*, std::vector<unsigned char>> statics;
    std::vector<std::unique_ptr<Mbarrier>> mbarriers;
    unsigned copies_in_flight = 0;
    std::vector<Warpgroup> warpgroups;
};

constexpr size_t STATIC_PAD = 32; // before and after a static shared array
inline unsigned char* static_begin(std::vector<unsigned char>& store) {
    return reinterpret_cast<unsigned char*>((uintptr_t(store.data()) + 15) & ~uintptr_t(15));
}

struct Runner {
    Launch config;
    Report report;
    void (*kernel)(void*) = nullptr;
    void* arg = nullptr;
    std::vector<Fiber*> ready;
    size_t head = 0; // ready[head..] wait for their turn
    Fiber* current = nullptr;
    void* scheduler_sp = nullptr;
    std::vector<Block*> blocks;
    std::vector<Fiber*> pool;
    Barrier grid_barrier;
    std::vector<BulkCopy> bulk;
    unsigned live = 0;
    uint64_t random_state = 0, priority_salt = 0;
    bool failed = false;

    uint64_t random() {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return random_state * 0x2545F4914F6CDD1Dull >> 11;
    }
};
extern SIMT_TLS Runner* runner;

// fiber.cpp
Fiber* make_fiber();
void start_fiber(Fiber& fiber);
void switch_to(Fiber* to); // null: back to the scheduler
Fiber* pick();
void wake(Fiber* fiber);
void block_on(const char* what, const char* file, int line); // returns once woken
void drop_fibers();
// barrier.cpp
void open_barrier_if_full(Block& block, unsigned id);
// mbarrier.cpp
bool land_a_copy(); // false: none is on its way
// wgmma.cpp
void wgmma_row(Block& block, const Wgmma& op, unsigned n, const unsigned char* (&half)[2]);
// memory.cpp
bool in_shared_memory(Block& block, const unsigned char* p, unsigned bytes);

// Where an access comes from: the kernel's code address, or the source line of a primitive.
struct Site {
    const void* pc = nullptr;
    const char* file = nullptr;
    int line = 0;
};

// The checked build's callbacks; null in the plain build.
struct Checker {
    void (*launch_begin)();
    void (*block_begin)(Block&);
    void (*block_end)(Block&);
    void (*block_barrier)(Block&);
    void (*grid_barrier)();
    void (*sync)(Fiber* const* fibers, unsigned n); // these threads are now ordered after one another
    void (*access)(Fiber&, const void* p, unsigned bytes, bool write, Site, const char* what);
    void (*copy_begin)(Fiber&, const Copy&);
    void (*copy_land)(Fiber&, const Copy&);
    void (*atomic)(Fiber&, void* p, unsigned bytes, Site);
    void (*fence)(Fiber&, bool beyond_block);
    void (*acquire)(Fiber&, const void* p, unsigned bytes, Site);
    void (*mbar_init)(Fiber&, Mbarrier&, Site);
    void (*mbar_arrive)(Fiber&, Mbarrier&, Site);
    void (*mbar_complete)(Block&, Mbarrier&); // its phase has just been raised
    void (*mbar_wait)(Fiber&, Mbarrier&, Site);
    void (*bulk_begin)(Fiber&, const BulkCopy&);
    void (*bulk_land)(const BulkCopy&);
    void (*fence_async)(Fiber&);
    void (*wgmma_begin)(Block&, Warpgroup&, const Wgmma&);
    void (*wgmma_wait)(Fiber&, Warpgroup&, unsigned groups);
};
extern const Checker* checker;

constexpr uint32_t NOBODY = ~0u;

// The checked build's view of one byte of shared or device memory. A block is known by its number, a point in
// its life by its generation (block-wide barriers passed) and the clock of the thread within it.
struct Cell {
    uint32_t epoch = 0; // launch of device memory, block life of shared memory; older means untouched
    uint32_t write_block = NOBODY, write_generation = 0, write_clock = 0, write_site = 0;
    uint32_t read_block = NOBODY, read_generation = 0, read_clock = 0, read_site = 0;
    uint32_t other_clock = 0; // of a second reader in this generation; 0: none
    uint32_t readers = 0;     // 1 + index of the readers' clocks, once a third one came
    uint32_t fence_generation = 0,
             fence_clock = 0; // of the writer's proxy fence after the write; 0: none yet
    uint16_t write_thread = 0, read_thread = 0, other_thread = 0;
    bool written = false, in_flight = false, atomic = false;
};

// memory.cpp: one named buffer of device memory.
struct Allocation {
    unsigned char* at = nullptr;
    size_t bytes = 0;
    std::string name;
    std::vector<uint64_t> written;              // a bit a byte
    std::vector<std::unique_ptr<Cell[]>> cells; // the checked build's shadow, a chunk at a time
    bool is_written(size_t i) const { return written[i / 64] >> (i % 64) & 1; }
    void set_written(size_t i) { written[i / 64] |= 1ull << (i % 64); }
};
bool in_device_memory(const void* p);
Allocation* find_allocation(const void* p); // the buffer that p lies in or near; null: none there, or freed

} // namespace simt
