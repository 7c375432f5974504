// mbarrier.cpp - mbarriers, bulk copies and the fence between the generic and the async proxy, as sm_90 has
// them.
//
// A bulk copy lands as late as all waiting threads allow (seed 0) or at a random moment; until then its
// destination holds 0xff. Stricter than the device: bytes are expected before their copy is issued, the
// thread that initialises an mbarrier fences before a copy names it, an mbarrier is initialised once.
#include "internal.h"

namespace simt {

static thread_local bool hopper_on = false;
bool hopper() { return hopper_on; }
void set_hopper(bool on) { hopper_on = on; }

constexpr uint64_t COOKIE = 0x6b76772d6d626172; // what an initialised mbarrier holds here

static Fiber& hopper_thread(const char* name, const char* file, int line) {
    if (!hopper_on) fail("%s at %s:%d is an instruction of sm_90", name, file, line);
    maybe_yield();
    return *runner->current;
}

static Mbarrier* find(Block& block, const void* at) {
    for (auto& bar : block.mbarriers) {
        if (bar->at == at) return bar.get();
    }
    return nullptr;
}

static Mbarrier& expect_mbarrier(Fiber& self, void* at, const char* name, const char* file, int line) {
    Mbarrier* bar = find(*self.thread.block, at);
    uint64_t held = 0;
    if (bar) memcpy(&held, at, sizeof held);
    if (held != COOKIE) fail("%s at %s:%d: no mbarrier was initialised there", name, file, line);
    return *bar;
}

void mbar_init(void* at, unsigned arrivals, const char* file, int line) {
    Fiber& self = hopper_thread("mbarrier.init", file, line);
    Block& block = *self.thread.block;
    auto* p = static_cast<unsigned char*>(at);
    if (uintptr_t(p) % 8 || !in_shared_memory(block, p, 8))
        fail("an mbarrier is 8 aligned bytes of shared memory: %s:%d", file, line);
    if (arrivals == 0 || arrivals > 0xFFFFF) fail("mbarrier for %u arrivals at %s:%d", arrivals, file, line);
    if (find(block, at)) fail("mbarrier initialised again at %s:%d", file, line);
    auto bar = std::make_unique<Mbarrier>();
    bar->at = p;
    bar->arrivals = bar->missing = arrivals;
    bar->slot = unsigned(block.mbarriers.size());
    bar->maker = &self;
    if (checker) checker->mbar_init(self, *bar, {nullptr, file, line});
    memcpy(at, &COOKIE, sizeof COOKIE);
    block.mbarriers.push_back(std::move(bar));
}

void mbar_fence() {
    if (!hopper_on) fail("fence.mbarrier_init is an instruction of sm_90");
    for (auto& bar : runner->current->thread.block->mbarriers) {
        if (bar->maker == runner->current) bar->fenced = true;
    }
}

static void complete_if_done(Block& block, Mbarrier& bar) {
    if (bar.missing || bar.bytes) return;
    bar.phase++;
    bar.missing = bar.arrivals;
    if (checker) checker->mbar_complete(block, bar);
    for (Fiber* fiber : bar.waiting) wake(fiber);
    bar.waiting.clear();
}

void mbar_arrive(void* at, unsigned expected_bytes, const char* file, int line) {
    Fiber& self = hopper_thread("mbarrier.arrive", file, line);
    Mbarrier& bar = expect_mbarrier(self, at, "mbarrier.arrive", file, line);
    if (checker) checker->mbar_arrive(self, bar, {nullptr, file, line});
    if (!bar.missing)
        fail("mbarrier.arrive at %s:%d: all %u arrivals of this phase have been made, %lld bytes are missing",
             file, line, bar.arrivals, (long long)bar.bytes);
    bar.bytes += expected_bytes;
    bar.missing--;
    complete_if_done(*self.thread.block, bar);
}

void mbar_wait(void* at, unsigned parity, const char* file, int line) {
    Fiber& self = hopper_thread("mbarrier.try_wait", file, line);
    if (parity > 1) fail("mbarrier parity %u at %s:%d is neither 0 nor 1", parity, file, line);
    Mbarrier& bar = expect_mbarrier(self, at, "mbarrier.try_wait", file, line);
    if ((bar.phase & 1) == parity) {
        bar.waiting.push_back(&self);
        self.waits_on = &bar;
        block_on("mbarrier wait", file, line);
        self.waits_on = nullptr;
    }
    if (checker) checker->mbar_wait(self, bar, {nullptr, file, line});
}

void copy_bulk(void* dst, const void* src, unsigned bytes, void* at, const char* file, int line) {
    Fiber& self = hopper_thread("cp.async.bulk", file, line);
    Block& block = *self.thread.block;
    Mbarrier& bar = expect_mbarrier(self, at, "cp.async.bulk", file, line);
    BulkCopy copy{static_cast<unsigned char*>(dst),
                  static_cast<const unsigned char*>(src),
                  bytes,
                  &bar,
                  &block,
                  file,
                  line};
    if (bytes == 0 || (uintptr_t(dst) | uintptr_t(src) | bytes) % 16)
        fail("cp.async.bulk of %u bytes at %s:%d: addresses and size are multiples of 16", bytes, file, line);
    if (!in_shared_memory(block, copy.dst, bytes))
        fail("cp.async.bulk destination is not shared memory at %s:%d", file, line);
    if (!bar.fenced) fail("cp.async.bulk at %s:%d: no fence after mbarrier.init", file, line);
    if (bar.bytes - bar.claimed < bytes)
        fail("cp.async.bulk at %s:%d brings %u bytes, its mbarrier expects %lld more", file, line, bytes,
             (long long)(bar.bytes - bar.claimed));
    if (checker) checker->bulk_begin(self, copy);
    bar.claimed += bytes;
    block.copies_in_flight++;
    runner->report.copy_bulk++;
    memset(dst, 0xff, bytes);
    runner->bulk.push_back(copy);
}

bool land_a_copy() {
    auto& bulk = runner->bulk;
    if (bulk.empty()) return false;
    size_t i = runner->config.seed ? runner->random() % bulk.size() : 0;
    BulkCopy copy = bulk[i];
    bulk.erase(bulk.begin() + ptrdiff_t(i));
    if (checker) checker->bulk_land(copy);
    memcpy(copy.dst, copy.src, copy.bytes);
    copy.bar->claimed -= copy.bytes;
    copy.bar->bytes -= copy.bytes;
    copy.block->copies_in_flight--;
    complete_if_done(*copy.block, *copy.bar);
    return true;
}

void fence_async() {
    if (!hopper_on) fail("fence.proxy.async is an instruction of sm_90");
    maybe_yield();
    if (checker) checker->fence_async(*runner->current);
}

} // namespace simt
