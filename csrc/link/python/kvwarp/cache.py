"""A cache of one layer: the newest tokens f16 in a ring, older ones in slabs of a format, grown as needed."""
from __future__ import annotations

import itertools
import math

import torch

from . import abi, ops, scores, turn
from .choose import Read, score
from .errors import Error
from .ops import APPEND, F16, FILL, TOKENS, Slabs


class Layer:
    """Tokens of S sequences, which may differ in number: `held` of each, fewer than were read where some were dropped; the
    first `packed` slabs are found through the table, and among the first `chosen` tokens is not chosen again. A sequence is
    `fresh` until something of it has been read. What has been read and is not packed yet is `waiting`.

    `stores` is the format of each head's history where it is not that of the spec, `feedback` [H, D, D] f16 weights of
    rounding errors of keys: both come from a calibration.
    """

    def __init__(self, spec, seqs, heads, head_dim, device, stores=None, feedback=None):
        if head_dim not in (64, 96, 128, 256):
            raise Error("head_dim", f"{head_dim}; supported: 64, 96, 128, 256")
        self.spec, self.shape, self.head_dim, self.device = spec, (seqs, heads), head_dim, torch.device(device)
        self.stores = stores or [spec.format] * heads
        if len(self.stores) != heads:
            raise Error("stores", f"a calibration of {len(self.stores)} kv heads; here are {heads}")
        self.rounding = {"range": spec.range / 100, "feedback": None if feedback is None else feedback.to(device)}
        self.f16_bytes = self._bytes(F16)
        self.slabs = self._slabs(self._ring(abi.ring_slabs(spec.window)))
        self.held, self.packed, self.chosen = [0] * seqs, [0] * seqs, [0] * seqs
        self.fresh, self.waiting, self.capacity = [True] * seqs, None, 0

    def _bytes(self, format):
        return abi.slab_bytes(format, self.head_dim, self.spec.group, self.spec.meta)

    def _ring(self, slabs):
        return torch.zeros((*self.shape, max(slabs, 1), self.f16_bytes), dtype=torch.uint8, device=self.device)

    def _int(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _slabs(self, ring):
        (seqs, heads), spec = self.shape, self.spec
        holes, lens = self._int([[[-1]] * heads] * seqs), self._int([0] * seqs)
        return Slabs(ring, holes, lens, self.head_dim, window=spec.window, group=spec.group, meta=spec.meta)

    def _due(self):
        """Slabs of each sequence that have left the window."""
        return [max(p, (n - self.spec.window) // TOKENS) for n, p in zip(self.held, self.packed)]

    def _pieces(self, capacity):
        """Formats in use, and of which heads and columns of the table they are."""
        sinks = capacity if self.spec.format == F16 else self.spec.sink_slabs
        if sinks:
            yield F16, list(range(self.shape[1])), 0, sinks
        for format in sorted(set(self.stores) - {F16}):
            yield format, [h for h, store in enumerate(self.stores) if store == format], sinks, capacity

    def reserve(self, slabs):
        """Room in the pools for so many slabs a head: the first `sinks` tokens in f16, the others in their heads' formats."""
        if slabs <= self.capacity:
            return
        seqs = self.shape[0]
        capacity = max(slabs, 2 * self.capacity, 8 + self.spec.sink_slabs)
        for format, of, start, end in self._pieces(capacity):
            columns, size = end - start, self._bytes(format)
            pool = torch.zeros((seqs, len(of), columns, size), dtype=torch.uint8, device=self.device)
            if format in self.slabs.pools:
                old = self.slabs.pools[format].view(seqs, len(of), -1, size)
                pool[:, :, : old.shape[2]] = old
            self.slabs.pools[format] = pool.view(-1, size)
        self._index(capacity)

    def _index(self, capacity):
        """The table of pools that have `capacity` slabs a head."""
        table = torch.empty((*self.shape, capacity), dtype=torch.int32, device=self.device)
        for format, of, start, end in self._pieces(capacity):
            shape = self.shape[0], len(of), end - start
            index = torch.arange(math.prod(shape), dtype=torch.int32, device=self.device)
            table[:, of, start:end] = index.view(shape) | format << 28
        self.slabs.table, self.capacity = table, capacity

    def append(self, k, v, q, scale, sliding_window=0):
        """One more token a sequence, k and v [S, H, D], q [S, 1, q_heads, D]: its attention over what is held then."""
        dtype, (k, v, q) = q.dtype, self._enter(k, v, q)
        self.held = [n + 1 for n in self.held]
        due, s = self._due(), self.slabs
        self.reserve(max(due))
        s.lens, s.packed = self._int(self.held), self._int(self.packed)
        ops.kv_pack(APPEND, k, v, None, 0, *s.tensors(), s.numbers(), **self.rounding)
        if due != self.packed:
            self.packed, s.packed = due, self._int(due)
        most = max((n + TOKENS - 1) // TOKENS for n in self.held)
        out = ops.paged_attn(q, most, scale, sliding_window, *s.tensors(), s.numbers())
        chosen = {i: self._lag(i, s) for i in range(self.shape[0]) if self._parts(i)}
        if chosen:
            source = s.ring.clone()
            for i, slots in chosen.items():
                self._gather(i, slots, source)
            s.lens, s.packed = self._int(self.held), self._int(self.packed)
        return self._leave(out, dtype)

    def extend(self, k, v, q, counts, scale, sliding_window=0, place=(0, 1)):
        """`counts` tokens of each sequence, k and v [T, H, D], q [T, q_heads, D]: their attention. After it tokens are dropped,
        in layer `place[0]` of `place[1]`, and what has left the window is packed, but where budgets wait for `settle`."""
        dtype, (k, v, q) = q.dtype, self._enter(k, v, q)
        before, done = self.held, self.packed
        self.held = [n + c for n, c in zip(before, counts)]
        slots = [(n + TOKENS - 1) // TOKENS - d for n, d in zip(self.held, done)]
        # All that is f16 in one ring: slabs that may leave the window, and those that stay.
        stage = self._slabs(self._ring(max(*slots, abi.ring_slabs(self.spec.window), 1) + 1))
        stage.pools, stage.table, stage.lens = self.slabs.pools, self.slabs.table, self._int(self.held)
        stage.packed = self._int(done)
        self._move(self.slabs.ring, stage.ring, before)
        starts = self._int([0, *itertools.accumulate(counts)])
        most, rows = max(counts), self._rows(counts)
        lse = torch.empty((self.shape[0], rows, q.shape[1]), device=self.device) if rows else None
        ops.kv_pack(FILL, k, v, starts, most, *stage.tensors(), stage.numbers())
        out = ops.prefill_attn(q, starts, most, scale, sliding_window, *stage.tensors(), stage.numbers(), lse)
        scored = self._score(stage, counts, q, lse, scale, place)
        self.waiting, self.fresh = (stage, done, {i: found for i, (found, _) in scored.items()}), [False] * self.shape[0]
        if not (self.spec.waits and scored):
            self.settle({i: (k, found.room) for i, (found, k) in scored.items()})
        return self._leave(out, dtype)

    def settle(self, budgets):
        """Of sequences in `budgets` so many tokens of a head stay beside those that always do, of so many of its best; packs
        what has left the window."""
        (stage, done, scored), self.waiting = self.waiting, None
        chosen = {i: self._lag(i, stage) for i in range(self.shape[0]) if self._parts(i)}
        for i, (k, of) in budgets.items():
            slots = scored[i].slots(k, of, self.spec.refine)
            chosen[i], self.held[i] = slots[None].int().contiguous(), slots.shape[1]
            self.chosen[i] = self.held[i]
        self.reserve(max(self._due()))
        for i, slots in chosen.items():
            self._gather(i, slots, stage.ring)
        due = self._due()
        most = max(0 if i in chosen else b - a for i, (a, b) in enumerate(zip(done, due)))
        stage.pools, stage.table, stage.lens = self.slabs.pools, self.slabs.table, self._int(self.held)
        if most:
            # Of those that have dropped tokens nothing is left to pack.
            stage.packed, first = None, self._int([b if i in chosen else a for i, (a, b) in enumerate(zip(done, due))])
            ops.kv_flush(first, most, *stage.tensors(), stage.numbers(), **self.rounding)
        self.packed = due
        self._move(stage.ring, self.slabs.ring, self.held, skip=chosen)
        self.slabs.lens, self.slabs.packed = stage.lens, self._int(due)

    def _enter(self, k, v, q):
        """In 16 bits, turned where the spec says so."""
        if self.waiting:
            raise Error("budget", f"{self.spec.budget} asks for all layers of a model, the last of which has not been read")
        if self.spec.hadamard:
            of_keys, of_values = turn.keys(self.head_dim, self.device), turn.values(self.head_dim, self.device)
            k, v, q = k.float() @ of_keys, v.float() @ of_values, q.float() @ of_keys
        if k.dtype not in (torch.float16, torch.bfloat16):
            k, v, q = (x.clamp(-65504, 65504).to(torch.float16) for x in (k, v, q))
        return k.contiguous(), v.contiguous(), q.contiguous()

    def _leave(self, out, dtype):
        if self.spec.hadamard:
            out = out.float() @ turn.values(self.head_dim, self.device)
        return out.to(dtype)

    def _move(self, source, to, lens, skip=()):
        """Slabs of each sequence that are not packed between rings of different sizes."""
        for s, (first, n) in enumerate(zip(self.packed, lens)):
            if s in skip:
                continue
            for i in range(first, (n + TOKENS - 1) // TOKENS):
                to[s, :, i % to.shape[2]] = source[s, :, i % source.shape[2]]

    def _parts(self, s):
        """Partitions of sequence `s` that LagKV has not chosen among, and that a whole one follows."""
        evict, lag = self.spec.evict, self.spec.lag
        return max(0, (self.held[s] - max(self.chosen[s], evict.sink)) // lag - 1) if lag else 0

    def _alone(self, slabs, s, packed):
        """Sequence `s` of some slabs."""
        table, lens = slabs.table[s : s + 1].clone(), self._int([self.held[s]])
        return Slabs(slabs.ring[s : s + 1], table, lens, self.head_dim, slabs.pools, self._int([packed]), None,
                     *slabs.numbers()[1:])  # fmt: skip

    def _rows(self, counts):
        """Newest rows of a read whose attention tokens are chosen by."""
        if not self.spec.selects or not any(self.fresh):
            return 0
        rows = self.spec.evict.rows
        return max(counts) if rows is None else min(rows, max(counts))

    def _score(self, stage, counts, q, lse, scale, place):
        """What each sequence that has been read first and drops tokens by the spec's method is chosen by."""
        scored, end = {}, 0
        for i, n in enumerate(counts):
            end += n
            if not self.spec.selects or self.spec.lag or not self.fresh[i]:
                continue
            read = Read(self._alone(stage, i, 0), n, place, scale)
            if lse is not None:
                rows = min(n, lse.shape[1])
                # Clones begin at addresses that ops take.
                read.q, read.lse = q[None, end - rows : end].clone(), lse[i : i + 1, -rows:].clone()
            found, self.chosen[i] = score(self.spec, read), n
            if found is not None:
                scored[i] = found
        return scored

    def _lag(self, s, held):
        """LagKV: of those partitions of sequence `s` the best tokens stay. Their slots and all others from the first on that
        is not packed."""
        evict, heads, n, parts = self.spec.evict, self.shape[1], self.held[s], self._parts(s)
        lag, keep, begin, first = evict.lag, evict.of(evict.lag), max(self.chosen[s], evict.sink), self.packed[s]
        alone = self._alone(held, s, first)
        found = scores.lag_scores(begin, lag, parts, *alone.tensors(), alone.numbers())
        # Ties to the lower index, as everywhere: a stable sort.
        best = found.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values
        best = (best + begin + lag * torch.arange(parts, device=self.device)[:, None]).flatten(2)
        every = torch.arange(n, device=self.device).expand(1, heads, n)
        slots = [every[..., first * TOKENS : begin], best, every[..., begin + parts * lag :]]
        slots = torch.cat(slots, dim=-1).int().contiguous()
        self.held[s], self.chosen[s] = first * TOKENS + slots.shape[2], begin + parts * keep
        return slots

    def _gather(self, s, slots, source):
        """Tokens of sequence `s` in `slots` of the ring `source`, which is not the cache's own, to where they are to be."""
        first = self.packed[s]
        to = self._alone(self.slabs, s, self._due()[s])
        most = (self.held[s] + TOKENS - 1) // TOKENS - first
        if most:
            ops.kv_gather(source[s : s + 1], slots, most, *to.tensors(), to.numbers(), first=self._int([first]), **self.rounding)

    def crop(self, n):
        """Forgets the newest `n` tokens of every sequence."""
        if self.spec.lag and n:
            raise Error("crop", "LagKV has chosen among these tokens")
        exact = max(self.packed) if self.spec.format == F16 else self.spec.sink_slabs
        fixed = [max(c, p * TOKENS if p > exact else 0) for c, p in zip(self.chosen, self.packed)]
        spare = min(held - n for held, n in zip(self.held, fixed))
        if n > spare:
            raise Error("crop", f"{n} tokens, of which all but {spare} are quantised or have been chosen")
        s = self.slabs
        self.held = [held - n for held in self.held]
        for i, held in enumerate(self.held):
            while self.packed[i] * TOKENS > held:
                # A whole f16 slab goes back to the ring, of which the new last tokens will be written.
                p = self.packed[i] = self.packed[i] - 1
                pool = s.pools[F16].view(*self.shape, -1, self.f16_bytes)
                s.ring[i, :, p % s.ring.shape[2]] = pool[i, :, p]
        s.lens, s.packed = self._int(self.held), self._int(self.packed)

    def select(self, indices):
        """Keeps the sequences `indices`, in that order, each as often as it is named: they are copied."""
        indices, s = [int(i) for i in indices], self.slabs
        pick, old = torch.tensor(indices, device=self.device), self.shape[0]
        for name in ("held", "packed", "chosen", "fresh"):
            setattr(self, name, [getattr(self, name)[i] for i in indices])
        pools = {format: pool.view(old, -1, pool.shape[1])[pick].flatten(0, 1) for format, pool in s.pools.items()}
        ring, capacity, self.capacity = s.ring[pick], self.capacity, 0
        self.shape = (len(indices), self.shape[1])
        self.slabs = self._slabs(ring)
        self.slabs.pools, self.slabs.lens, self.slabs.packed = pools, self._int(self.held), self._int(self.packed)
        if capacity:
            self._index(capacity)

    def bytes(self):
        """Of slabs and rings that are in use."""
        total = self.slabs.ring.numel()
        for packed in self.packed:
            exact = min(packed, self.spec.sink_slabs)
            total += sum(exact * self.f16_bytes + (packed - exact) * self._bytes(store) for store in self.stores)
        return total
