// barrier.cpp - __syncthreads with its counting forms, named barriers 0 to 15, the cooperative grid barrier.
//
// Threads of a block that meet at two different __syncthreads lines are reported: hardware lets them pass,
// but such a kernel is wrong after the next edit. An intended split uses named barriers.
#include "internal.h"

namespace simt {

static void release(Barrier& barrier) {
    auto woken = std::move(barrier.waiting);
    barrier.waiting.clear();
    barrier.want = 0;
    barrier.last_votes = barrier.votes;
    barrier.votes = 0;
    for (Fiber* fiber : woken) {
        if (fiber != runner->current) wake(fiber);
    }
}

void open_barrier_if_full(Block& block, unsigned id) {
    Barrier& barrier = block.barriers[id];
    if (barrier.waiting.empty()) return;
    size_t want = barrier.want ? barrier.want : block.live;
    if (barrier.waiting.size() < want) return;
    runner->report.barriers++;
    if (checker) {
        bool whole_block = id == 0 && barrier.waiting.size() == block.live;
        if (whole_block)
            checker->block_barrier(block);
        else
            checker->sync(barrier.waiting.data(), unsigned(barrier.waiting.size()));
        if (whole_block) block.generation++;
    }
    release(barrier);
}

unsigned barrier(unsigned id, unsigned count, bool predicate, const char* file, int line) {
    Fiber* self = runner->current;
    Block& block = *self->thread.block;
    if (id > 15) fail("barrier %u at %s:%d: there are barriers 0 to 15", id, file, line);
    if (count % 32) fail("barrier %u at %s:%d: %u threads are not whole warps", id, file, line, count);
    Barrier& barrier = block.barriers[id];
    maybe_yield();
    if (!barrier.waiting.empty()) {
        Fiber* first = barrier.waiting[0];
        if (id == 0 && count == 0 && (first->line != line || strcmp(first->file, file) != 0))
            fail("threads meet at different __syncthreads: %s:%d and %s:%d", first->file, first->line, file,
                 line);
        if (barrier.want != count)
            fail("barrier %u at %s:%d expects %u threads, at %s:%d %u", id, file, line, count, first->file,
                 first->line, barrier.want);
    }
    self->file = file;
    self->line = line;
    barrier.want = count;
    barrier.votes += predicate;
    barrier.waiting.push_back(self);
    open_barrier_if_full(block, id);
    if (!barrier.waiting.empty())
        block_on(id ? "named barrier" : "__syncthreads", file, line);
    else if (runner->config.seed)
        yield();
    return barrier.last_votes; // the next generation cannot open before this thread arrives again
}

void grid_barrier(const char* file, int line) {
    if (!runner->config.cooperative) fail("grid barrier at %s:%d needs a cooperative launch", file, line);
    Barrier& barrier = runner->grid_barrier;
    barrier.waiting.push_back(runner->current);
    if (barrier.waiting.size() < runner->live) return block_on("grid barrier", file, line);
    if (checker) checker->grid_barrier();
    for (Block* block : runner->blocks) block->generation++;
    release(barrier);
}

} // namespace simt
