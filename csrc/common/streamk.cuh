// streamk.cuh - one list of work for all CTAs, cut into equal shares on the device.
//
// The list is every head's units, head after head; CTA i takes units [i * share, (i + 1) * share). Lengths
// are read by every CTA for itself, so a launch needs no plan from the host and a captured graph stays valid.
#pragma once
#include "prim.cuh"

namespace kvw {

// What a CTA has still to do, and of which head first.
struct Work {
    int head, unit; // head, and its first unit that is this CTA's
    int units;      // of that head
    int at, end;    // places in the list: of that unit, and one past this CTA's last
    int share;

    PRIM int take() const { return min(units - unit, end - at); }

    // CTAs that hold the head's first and last unit.
    PRIM int first_cta() const { return (at - unit) / share; }
    PRIM int last_cta() const { return (at - unit + units - 1) / share; }

    // To the next head: each `heads` of them in turn have units_of(0), units_of(1), ... units, at least 1.
    template <class UnitsOf> PRIM void advance(int heads, UnitsOf units_of) {
        at += take(), head++, unit = 0;
        if (at < end) units = units_of(head / heads);
    }
};

// This CTA's first work: heads as in advance(), entries * heads of them. By a whole warp: each lane sums a run
// of entries; the run that holds the CTA's first unit is cut again, until it is one entry. Up to 32 entries
// cost one look at each.
template <class UnitsOf> PRIM Work first_work(int entries, int heads, int least, UnitsOf units_of) {
    int lane = threadIdx.x % 32, first = 0, before = 0;
    Work work{0, 0, 0, 0, 0, 0};
    for (int count = entries;;) {
        int run = (count + 31) / 32, mine = 0;
        for (int i = lane * run; i < min(lane * run + run, count); i++) mine += units_of(first + i);
        mine *= heads;
        int upto = mine; // of all lanes so far
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int x = __shfl_up_sync(~0u, upto, d);
            if (lane >= d) upto += x;
        }
        if (work.share == 0) {
            int all = __shfl_sync(~0u, upto, 31), ctas = gridDim.x;
            work.share = max(least, (all + ctas - 1) / ctas);
            work.at = int(min(int64_t(work.share) * blockIdx.x, int64_t(all)));
            work.end = min(work.share, all - work.at) + work.at;
            if (work.at == all) return work;
        }
        unsigned past = __ballot_sync(~0u, before + upto > work.at);
        int owner = __ffs(int(past)) - 1;
        before += __shfl_sync(~0u, upto - mine, owner);
        first += owner * run;
        if (run == 1) break;
        count = min(run, count - owner * run);
    }
    work.units = units_of(first);
    work.head = first * heads + (work.at - before) / work.units;
    work.unit = (work.at - before) % work.units;
    return work;
}

} // namespace kvw
