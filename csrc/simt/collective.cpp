// collective.cpp - warp collectives: lanes gather by mask, the operation runs once, all go on.
//
// Reports lanes outside their own mask, overlapping masks, and lanes of one mask that arrive in different
// operations. A lane that never arrives ends as a deadlock. What a shuffle returns from a lane outside the
// mask is undefined on the device; here it is 0xBAD....
#include "internal.h"
#include <algorithm>

namespace simt {

constexpr uint64_t UNDEFINED_BITS = 0xBADBADBADBADBADBull;

template <class F> static void each_lane(uint32_t mask, F f) {
    for (unsigned lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) f(lane);
    }
}

// The group that this lane joins; a new one where none waits with its mask.
static Gathering& join(Warp& warp, uint32_t mask, unsigned lane, WarpOp op, const char* name,
                       uint64_t attribute, const char* file, int line) {
    for (Gathering& g : warp.pending) {
        if (!(g.mask & mask)) continue;
        if (g.mask != mask) {
            if (!(g.mask >> lane & 1)) continue;
            fail("%s at %s:%d: mask %08x, but lanes already wait in %s with mask %08x", name, file, line,
                 mask, g.name, g.mask);
        }
        if (g.op != op || g.attribute != attribute) {
            int other = __builtin_ctz(g.arrived);
            fail("warp divergence: lane %u in %s at %s:%d, lane %d in %s at %s:%d", lane, name, file, line,
                 other, g.name, g.fiber[other]->file, g.fiber[other]->line);
        }
        return g;
    }
    Gathering fresh{};
    fresh.mask = mask;
    fresh.op = op;
    fresh.attribute = attribute;
    fresh.name = name;
    return warp.pending.emplace_back(fresh);
}

// Shared memory that an ldmatrix reads: 16 bytes a row; row r of a matrix goes to lanes 4 * r + q, or, with
// .trans, element e of it to lane 4 * e + r / 2.
static void check_ldmatrix(const Gathering& g, const char* file, int line) {
    Site site{nullptr, file, line};
    unsigned rows = 8 * unsigned(g.attribute & 7);
    bool trans = g.attribute & LDMATRIX_TRANS;
    for (unsigned i = 0; i < rows; i++) {
        auto* row = *static_cast<const unsigned char* const*>(g.in[i]);
        unsigned r = i % 8;
        for (unsigned e = 0; e < 8; e++) {
            unsigned lane = trans ? e * 4 + r / 2 : r * 4 + e / 2;
            checker->access(*g.fiber[lane], row + 2 * e, 2, false, site, "ldmatrix");
        }
    }
}

static void tell_checker(const Gathering& g, const char* file, int line) {
    if (g.op == ldmatrix_op) check_ldmatrix(g, file, line);
    if (g.op != sync_op) return;
    Fiber* fibers[32];
    unsigned n = 0;
    each_lane(g.mask, [&](unsigned lane) { fibers[n++] = g.fiber[lane]; });
    checker->sync(fibers, n);
}

void collective(uint32_t mask, WarpOp op, const char* name, const void* in, void* out, uint64_t attribute,
                const char* file, int line) {
    Fiber* self = runner->current;
    Warp& warp = *self->thread.warp;
    unsigned lane = self->thread.lane;
    maybe_yield();
    runner->report.collectives++;
    if (!(mask >> lane & 1))
        fail("%s at %s:%d: lane %u is not in its own mask %08x", name, file, line, lane, mask);
    Gathering& g = join(warp, mask, lane, op, name, attribute, file, line);
    g.arrived |= 1u << lane;
    g.in[lane] = in;
    g.out[lane] = out;
    g.fiber[lane] = self;
    self->file = file;
    self->line = line;
    if (g.arrived != mask) return block_on(name, file, line);
    Gathering full = g;
    warp.pending.erase(warp.pending.begin() + (&g - warp.pending.data()));
    if (checker) tell_checker(full, file, line);
    op(mask, full.in, full.out, attribute);
    each_lane(mask, [&](unsigned i) {
        if (i != lane) wake(full.fiber[i]);
    });
    maybe_yield();
}

void sync_op(uint32_t, const void* const*, void* const*, uint64_t) {}

static unsigned shuffle_source(unsigned lane, const ShuffleIn& in, uint64_t kind) {
    unsigned base = lane & ~(in.width - 1), last = base + in.width - 1;
    switch (kind) {
    case SHUFFLE_INDEX: return base + (in.operand & (in.width - 1));
    case SHUFFLE_UP: return lane < base + in.operand ? lane : lane - in.operand;
    case SHUFFLE_DOWN: return lane + in.operand > last ? lane : lane + in.operand;
    default: return (lane ^ in.operand) > last ? lane : lane ^ in.operand;
    }
}

void shuffle_op(uint32_t mask, const void* const* in, void* const* out, uint64_t kind) {
    each_lane(mask, [&](unsigned lane) {
        auto& mine = *static_cast<const ShuffleIn*>(in[lane]);
        if (mine.width == 0 || mine.width > 32 || (mine.width & (mine.width - 1)))
            fail("shuffle width %u is not a power of two up to 32", mine.width);
        unsigned source = shuffle_source(lane, mine, kind);
        bool defined = source < 32 && mask >> source & 1;
        *static_cast<uint64_t*>(out[lane]) =
            defined ? static_cast<const ShuffleIn*>(in[source])->bits : UNDEFINED_BITS;
    });
}

void ballot_op(uint32_t mask, const void* const* in, void* const* out, uint64_t) {
    uint32_t votes = 0;
    each_lane(mask, [&](unsigned lane) { votes |= (*static_cast<const uint32_t*>(in[lane]) != 0) << lane; });
    each_lane(mask, [&](unsigned lane) { *static_cast<uint32_t*>(out[lane]) = votes; });
}

void match_op(uint32_t mask, const void* const* in, void* const* out, uint64_t) {
    each_lane(mask, [&](unsigned lane) {
        uint32_t same = 0;
        each_lane(mask, [&](unsigned other) {
            if (*static_cast<const uint64_t*>(in[other]) == *static_cast<const uint64_t*>(in[lane]))
                same |= 1u << other;
        });
        *static_cast<uint32_t*>(out[lane]) = same;
    });
}

static uint32_t reduce_pair(uint32_t a, uint32_t b, uint64_t kind) {
    switch (kind) {
    case REDUCE_ADD: return a + b;
    case REDUCE_MIN: return std::min(a, b);
    case REDUCE_MAX: return std::max(a, b);
    case REDUCE_AND: return a & b;
    case REDUCE_OR: return a | b;
    case REDUCE_XOR: return a ^ b;
    case REDUCE_MIN_S: return uint32_t(std::min(int(a), int(b)));
    default: return uint32_t(std::max(int(a), int(b)));
    }
}

void reduce_op(uint32_t mask, const void* const* in, void* const* out, uint64_t kind) {
    unsigned first = unsigned(__builtin_ctz(mask));
    uint32_t result = *static_cast<const uint32_t*>(in[first]);
    each_lane(mask & ~(1u << first), [&](unsigned lane) {
        result = reduce_pair(result, *static_cast<const uint32_t*>(in[lane]), kind);
    });
    each_lane(mask, [&](unsigned lane) { *static_cast<uint32_t*>(out[lane]) = result; });
}

} // namespace simt
