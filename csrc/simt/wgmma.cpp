// wgmma.cpp - wgmma.mma_async m64nNk16 with A in registers and B in shared memory, as sm_90a has it.
//
// With w = warp % 4, g = lane / 4, t = 2 * (lane % 4), a register holding elements t and t + 1 of a row:
//   A 64x16  a0 (16w+g, t)  a1 (16w+g+8, t)  a2 (16w+g, t+8)  a3 (16w+g+8, t+8)
//   D 64xN   d[4i] d[4i+1] (16w+g, 8i+t)  d[4i+2] d[4i+3] (16w+g+8, 8i+t)
// B is K-major, 16 values of k = 32 bytes a row. Its descriptor holds, in 16 bytes each, the start in bits 0 to
// 13, the leading byte offset in 16 to 29 (of swizzled K-major operands not used), the stride byte offset
// between groups of eight rows in 32 to 45; the base offset in 49 to 51; the swizzle in 62 and 63: 1 for 128
// bytes, 2 for 64, 3 for 32. Rows of a group are as far apart as the swizzle is wide, and bits 4 to 6 (4 to 5,
// 4) of an address are xor-ed with bits 7 to 9 (7 to 8, 7).
// Products run when they are waited for, or at once, as the schedule likes; until then the thread's
// accumulators hold poison. Stricter than the device: all 128 threads meet at each wgmma.
#include "internal.h"
#include "half.h"
#include <algorithm>

namespace simt {

constexpr uint32_t POISON = 0x7fc0dead;
constexpr unsigned GROUP = 128;

static Fiber& sm90a_thread(const char* name, const char* file, int line) {
    if (!hopper()) fail("%s at %s:%d is an instruction of sm_90a", name, file, line);
    maybe_yield();
    return *runner->current;
}

static Warpgroup& warpgroup_of(const Fiber& fiber, const char* name, const char* file, int line) {
    auto& groups = fiber.thread.block->warpgroups;
    if (fiber.thread.flat / GROUP >= groups.size())
        fail("%s at %s:%d: thread %u is in no whole warpgroup", name, file, line, fiber.thread.flat);
    return groups[fiber.thread.flat / GROUP];
}

// Waits for all 128 threads at the same instruction; true in the one that comes last.
static bool meet(Warpgroup& group, Fiber& self, const WgmmaIn& in, const char* name, const char* file,
                 int line) {
    if (!group.arrived.empty()) {
        const WgmmaIn& first = group.in[0];
        bool alike = name == group.name && first.b == in.b && first.n == in.n && first.bf16 == in.bf16 &&
                     first.accumulate == in.accumulate;
        if (!alike)
            fail("a warpgroup meets in different instructions: %s at %s:%d, %s at %s:%d", name, file, line,
                 group.name, group.arrived[0]->file, group.arrived[0]->line);
    }
    self.file = file;
    self.line = line;
    group.name = name;
    group.arrived.push_back(&self);
    group.in.push_back(in);
    if (group.arrived.size() == GROUP) return true;
    block_on(name, file, line);
    return false;
}

static void part(Warpgroup& group, Fiber& self) {
    for (Fiber* fiber : group.arrived) {
        if (fiber != &self) wake(fiber);
    }
    group.arrived.clear();
    group.in.clear();
}

uint32_t shared_offset(const void* p, const char* file, int line) {
    Block& block = *runner->current->thread.block;
    auto* at = static_cast<const unsigned char*>(p);
    size_t offset = size_t(at - block.dynamic);
    if (at < block.dynamic || offset >= 256 * 1024)
        fail("%s:%d: a descriptor's operand lies in dynamic shared memory", file, line);
    return uint32_t(offset);
}

// The 32 bytes of row n of B; the swizzle may part the two halves.
void wgmma_row(Block& block, const Wgmma& op, unsigned n, const unsigned char* (&half)[2]) {
    constexpr unsigned WIDTH[4] = {0, 128, 64, 32};
    auto field = [&](int bit) { return uint32_t(op.b >> bit & 0x3FFF) << 4; };
    unsigned width = WIDTH[op.b >> 62], base = op.b >> 49 & 7;
    if (!width || base)
        fail("wgmma at %s:%d: an operand without swizzle or with a base offset", op.file, op.line);
    for (unsigned h = 0; h < 2; h++) {
        uint32_t at = field(0) + n / 8 * field(32) + n % 8 * width + h * 16;
        at ^= at >> 3 & (width - 16);
        half[h] = block.dynamic + at;
        if (!in_shared_memory(block, half[h], 16))
            fail("wgmma at %s:%d: row %u of B lies outside shared memory", op.file, op.line, n);
    }
}

static float widen(uint16_t h, bool bf16) { return bf16 ? bf16_to_float(h) : f16_to_float(h); }

static Accumulators* in_flight(Fiber& fiber, const float* d) {
    for (Accumulators& acc : fiber.accumulators) {
        if (acc.d == d) return &acc;
    }
    return nullptr;
}

static void compute(Block& block, const Wgmma& op, unsigned first_thread) {
    std::vector<float> b(op.n * 16);
    for (unsigned n = 0; n < op.n; n++) {
        const unsigned char* half[2];
        wgmma_row(block, op, n, half);
        uint16_t row[16];
        memcpy(row, half[0], 16);
        memcpy(row + 8, half[1], 16);
        for (unsigned k = 0; k < 16; k++) b[n * 16 + k] = widen(row[k], op.bf16);
    }
    for (unsigned thread = 0; thread < GROUP; thread++) {
        Fiber& fiber = *block.fibers[first_thread + thread];
        Accumulators& acc = *in_flight(fiber, op.d[thread]);
        for (unsigned half = 0; half < 2; half++) {
            double a[16];
            for (unsigned k = 0; k < 16; k++) {
                unsigned holder = thread / 4 * 4 + k % 8 / 2; // of elements k and k ^ 1 of this row
                a[k] = widen(uint16_t(op.a[holder][half + k / 8 * 2] >> k % 2 * 16), op.bf16);
            }
            for (unsigned i = 0; i < op.n / 8; i++) {
                for (unsigned c = 0; c < 2; c++) {
                    float& d = acc.value[4 * i + 2 * half + c];
                    const float* row = &b[(8 * i + thread % 4 * 2 + c) * 16];
                    double sum = op.accumulate ? d : 0.f;
                    for (unsigned k = 0; k < 16; k++) sum += a[k] * row[k];
                    d = float(sum);
                }
            }
        }
    }
}

static void compute_through(Block& block, unsigned first_thread, unsigned groups) {
    auto& queue = block.warpgroups[first_thread / GROUP].queue;
    size_t n = 0;
    while (n < queue.size() && int(queue[n].group - groups) < 0) compute(block, queue[n++], first_thread);
    queue.erase(queue.begin(), queue.begin() + ptrdiff_t(n));
}

// The thread's accumulators, taken away until they are waited for.
static void take(Fiber& fiber, const Wgmma& op, const WgmmaIn& in) {
    Accumulators* acc = in_flight(fiber, in.d);
    if (!acc) {
        acc = &fiber.accumulators.emplace_back(Accumulators{in.d, {in.d, in.d + op.n / 2}, 0, {}});
        for (unsigned i = 0; i < op.n / 2; i++) memcpy(in.d + i, &POISON, sizeof POISON);
    }
    acc->group = op.group;
    acc->read.push_back({in.a, {in.a[0], in.a[1], in.a[2], in.a[3]}, op.file, op.line});
}

// What a wait hands back: both must be as the wgmma left them.
static void check_untouched(const Accumulators& acc, const char* file, int line) {
    for (size_t i = 0; i < acc.value.size(); i++) {
        if (memcmp(acc.d + i, &POISON, sizeof POISON) != 0)
            fail("accumulators changed while a wgmma was in flight, waited for at %s:%d", file, line);
    }
    for (const Fragment& a : acc.read) {
        if (memcmp(a.at, a.held, sizeof a.held) != 0)
            fail("registers of A changed under the wgmma at %s:%d", a.file, a.line);
    }
}

static void begin(Block& block, Warpgroup& group, const char* file, int line) {
    const WgmmaIn& first = group.in[0];
    Wgmma op{};
    op.n = first.n;
    op.group = group.arrived[0]->wgmma_groups;
    op.bf16 = first.bf16;
    op.accumulate = first.accumulate;
    op.b = first.b;
    op.file = file;
    op.line = line;
    for (unsigned i = 0; i < GROUP; i++) {
        Fiber& fiber = *group.arrived[i];
        unsigned thread = fiber.thread.flat % GROUP;
        if (fiber.wgmma_groups != op.group)
            fail("wgmma at %s:%d: the warpgroup has committed different numbers of groups", file, line);
        memcpy(op.a[thread], group.in[i].a, 16);
        op.d[thread] = group.in[i].d;
        take(fiber, op, group.in[i]);
    }
    if (checker) checker->wgmma_begin(block, group, op);
    group.queue.push_back(op);
    if (runner->config.seed && runner->random() % 2)
        compute_through(block, group.arrived[0]->thread.flat / GROUP * GROUP, op.group + 1);
    runner->report.wgmma++;
}

void wgmma(const WgmmaIn& in, const char* file, int line) {
    Fiber& self = sm90a_thread("wgmma", file, line);
    if (in.n % 8 || in.n < 8 || in.n > 256) fail("wgmma n%u at %s:%d", in.n, file, line);
    if (!self.wgmma_fenced)
        fail("wgmma at %s:%d: no wgmma.fence since registers were handed back", file, line);
    for (const Span& span : self.changed) {
        auto overlaps = [&](const void* p, unsigned bytes) {
            auto* at = static_cast<const unsigned char*>(p);
            return at < span.at + span.bytes && span.at < at + bytes;
        };
        if (overlaps(in.a, 16) || overlaps(in.d, in.n * 2))
            fail("wgmma at %s:%d: its registers were written after the last wgmma.fence", file, line);
    }
    Warpgroup& group = warpgroup_of(self, "wgmma", file, line);
    if (!meet(group, self, in, "wgmma", file, line)) return;
    begin(*self.thread.block, group, file, line);
    part(group, self);
}

void wgmma_fence() {
    Fiber& self = sm90a_thread("wgmma.fence", "", 0);
    self.wgmma_fenced = true;
    self.changed.clear();
}

void wgmma_commit() { sm90a_thread("wgmma.commit_group", "", 0).wgmma_groups++; }

void wgmma_wait(unsigned keep, const char* file, int line) {
    Fiber& self = sm90a_thread("wgmma.wait_group", file, line);
    if (self.wgmma_groups <= keep) return;
    unsigned groups = self.wgmma_groups - keep;
    Block& block = *self.thread.block;
    Warpgroup& group = warpgroup_of(self, "wgmma.wait_group", file, line);
    compute_through(block, self.thread.flat / GROUP * GROUP, groups);
    std::erase_if(self.accumulators, [&](const Accumulators& acc) {
        if (int(acc.group - groups) >= 0) return false;
        check_untouched(acc, file, line);
        memcpy(acc.d, acc.value.data(), acc.value.size() * sizeof(float));
        self.wgmma_fenced = false;
        return true;
    });
    if (checker) checker->wgmma_wait(self, group, groups);
}

void set_registers(unsigned count, const char* file, int line) {
    Fiber& self = sm90a_thread("setmaxnreg", file, line);
    if (count % 8 || count < 24 || count > 256) fail("setmaxnreg %u at %s:%d", count, file, line);
    Warpgroup& group = warpgroup_of(self, "setmaxnreg", file, line);
    WgmmaIn in{};
    in.n = count;
    if (meet(group, self, in, "setmaxnreg", file, line)) part(group, self);
}

} // namespace simt
