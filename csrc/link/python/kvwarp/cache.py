"""A cache of one layer: the newest tokens f16 in a ring, older ones in slabs of a format, grown as needed."""
from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import torch

from . import abi, ops
from .errors import Error
from .ops import APPEND, F16, FILL, FORMATS, TOKENS, Slabs


@dataclass(frozen=True)
class Spec:
    """What a cache holds: `"q2,window=128,sinks=64,group=32,meta=u8,range=88,evict=lagkv:0.25:lag=128:sink=16"`.

    Formats are f16, q8, q4 and q2, quantised as KIVI does, keys as they are: without the rotations and the calibration of the
    program's presets, so that `q2` is what the program calls `q2-kivi`.
    """

    format: int
    window: int = 128
    sinks: int = 0
    group: int = 32
    meta: int = 0
    range: float = 0.0
    evict: tuple | None = None  # share kept of a partition, tokens a partition, first tokens kept

    @classmethod
    def parse(cls, text):
        name, *parts = text.split(",")
        name = name.removesuffix("-kivi")
        if name not in FORMATS or name == "fp8":
            raise Error("spec", f"no store {name!r}; supported: f16, q8, q4, q2")
        given = {}
        for part in parts:
            key, _, value = part.partition("=")
            if key in ("window", "sinks", "group") and re.fullmatch(r"\d+", value):
                given[key] = int(value)
            elif key == "range" and re.fullmatch(r"\d+", value) and 1 <= int(value) <= 100:
                given[key] = int(value) / 100
            elif key == "meta" and value in ("f16", "u8"):
                given[key] = int(value == "u8")
            elif key == "evict":
                given[key] = cls._evict(value)
            else:
                raise Error(key, f"{part!r} is not a part of a spec; supported: window=N, sinks=N, group=N, "
                                 "meta=f16|u8, range=PERCENT, evict=lagkv:SHARE[:lag=N][:sink=N]")  # fmt: skip
        spec = cls(FORMATS[name], **given)
        if spec.sinks % TOKENS:
            raise Error("sinks", f"{spec.sinks}; supported: multiples of {TOKENS}")
        if name == "f16" and "meta" in given:
            raise Error("meta", "f16 slabs have none")
        abi.slab_bytes(spec.format, 64, spec.group, spec.meta)
        return spec

    @staticmethod
    def _evict(text):
        method, *options = text.split(":")
        if method != "lagkv":
            raise Error("evict", f"{method!r}: only lagkv needs neither attention's weights nor the prompt a second time")
        if not options or not re.fullmatch(r"0?\.\d+|1|1\.0", options[0]):
            raise Error("evict", f"{text!r}; supported: lagkv:SHARE with a share up to 1")
        rest = dict(option.partition("=")[::2] for option in options[1:])
        if rest.keys() - {"lag", "sink"} or not all(value.isdigit() for value in rest.values()):
            raise Error("evict", f"{text!r}; supported options: lag=N, sink=N")
        lag = int(rest.get("lag", 128))
        if lag % 16 or not 16 <= lag <= 1024:
            raise Error("evict", f"lag={lag}; supported: multiples of 16 from 16 to 1024")
        return float(options[0]), lag, int(rest.get("sink", 16))


class Layer:
    """Tokens of S sequences, which may differ in number: `held` of each, fewer than were read where some were dropped."""

    def __init__(self, spec, seqs, heads, head_dim, device):
        if head_dim not in (64, 96, 128, 256):
            raise Error("head_dim", f"{head_dim}; supported: 64, 96, 128, 256")
        self.spec, self.shape, self.head_dim, self.device = spec, (seqs, heads), head_dim, device
        self.f16_bytes = abi.slab_bytes(F16, head_dim)
        self.slabs = self._slabs(self._ring(abi.ring_slabs(spec.window)))
        self.held = [0] * seqs
        self.capacity = 0

    def _ring(self, slabs):
        return torch.zeros((*self.shape, max(slabs, 1), self.f16_bytes), dtype=torch.uint8, device=self.device)

    def _int(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _slabs(self, ring):
        (seqs, heads), spec = self.shape, self.spec
        holes, lens = self._int([[[-1]] * heads] * seqs), self._int([0] * seqs)
        return Slabs(ring, holes, lens, self.head_dim, window=spec.window, group=spec.group, meta=spec.meta)

    def _packed(self, length):
        return max(0, length - self.spec.window) // TOKENS

    def reserve(self, slabs):
        """Room in the pools for so many slabs a head: the first `sinks` tokens in f16, the others in the format."""
        if slabs <= self.capacity:
            return
        spec, rows = self.spec, self.shape[0] * self.shape[1]
        capacity = max(slabs, 2 * self.capacity, 8 + spec.sinks // TOKENS)
        sinks = capacity if spec.format == F16 else spec.sinks // TOKENS
        table = torch.empty((rows, capacity), dtype=torch.int32, device=self.device)
        for format, start, end in ((F16, 0, sinks), (spec.format, sinks, capacity)):
            columns, size = end - start, abi.slab_bytes(format, self.head_dim, spec.group, spec.meta)
            if columns == 0:
                continue
            pool = torch.zeros((rows, columns, size), dtype=torch.uint8, device=self.device)
            if format in self.slabs.pools:
                old = self.slabs.pools[format].view(rows, -1, size)
                pool[:, : old.shape[1]] = old
            self.slabs.pools[format] = pool.view(-1, size)
            index = torch.arange(rows * columns, dtype=torch.int32, device=self.device)
            table[:, start:end] = index.view(rows, columns) | format << 28
        self.slabs.table, self.capacity = table.view(*self.shape, capacity), capacity

    def append(self, k, v, q, scale, sliding_window):
        """One token a sequence, k and v [S, H, D], q [S, 1, q_heads, D]: its attention over what is held then."""
        self._grow([1] * self.shape[0])
        self.reserve(max(self._packed(n) for n in self.held))
        s = self.slabs
        s.lens = self._int(self.held)
        ops.kv_pack(APPEND, k, v, None, 0, *s.tensors(), s.numbers(), self.spec.range)
        most = max(1, max((n + TOKENS - 1) // TOKENS for n in self.held))
        return ops.paged_attn(q, most, scale, sliding_window, *s.tensors(), s.numbers())

    def _grow(self, counts):
        self.held = [n + c for n, c in zip(self.held, counts)]

    def extend(self, k, v, q, counts, scale, sliding_window):
        """`counts` tokens of each sequence, k and v [T, H, D], q [T, q_heads, D]: their attention; what leaves the
        window is packed after it, and a first read loses what `evict` drops."""
        before, first_read = list(self.held), not any(self.held)
        done = [self._packed(n) for n in before]
        self._grow(counts)
        after = [self._packed(n) for n in self.held]
        self.reserve(max(after))
        slots = [(n + TOKENS - 1) // TOKENS - d for n, d in zip(self.held, done)]
        # All that is f16 in one ring: slabs that may leave the window, and those that stay.
        stage = self._slabs(self._ring(max(*slots, abi.ring_slabs(self.spec.window), 1) + 1))
        stage.pools, stage.table, stage.lens = self.slabs.pools, self.slabs.table, self._int(self.held)
        stage.packed, self.slabs.lens = self._int(done), stage.lens
        self._move(self.slabs.ring, stage.ring, done, before)
        starts = self._int([0, *itertools.accumulate(counts)])
        most = max(counts)
        ops.kv_pack(FILL, k, v, starts, most, *stage.tensors(), stage.numbers(), self.spec.range)
        out = ops.prefill_attn(q, starts, most, scale, sliding_window, *stage.tensors(), stage.numbers())
        if first_read and self.spec.evict and self._evict(stage):
            return out
        if any(a > d for a, d in zip(after, done)):
            stage.packed = None
            first = self._int(done)
            most = max(a - d for a, d in zip(after, done))
            ops.kv_flush(first, most, *stage.tensors(), stage.numbers(), self.spec.range)
        self._move(stage.ring, self.slabs.ring, after, self.held)
        return out

    @staticmethod
    def _move(source, to, packed, lens):
        """Slabs of each sequence from `packed` on between rings of different sizes."""
        for s, (first, n) in enumerate(zip(packed, lens)):
            for i in range(first, (n + TOKENS - 1) // TOKENS):
                to[s, :, i % to.shape[2]] = source[s, :, i % source.shape[2]]

    def _evict(self, stage):
        """Of each partition but the last the tokens with the best scores of LagKV; False where there are no two."""
        share, lag, sink = self.spec.evict
        if min(self.held) != max(self.held):
            raise Error("evict", "prompts of different lengths in one batch")
        n = self.held[0]
        partitions = (n - sink) // lag - 1
        if partitions < 1 or share >= 1:
            return False
        scores = ops.lag_scores(sink, lag, partitions, *stage.tensors(), stage.numbers())
        keep = max(1, int(share * lag))
        # Ties to the lower index, as everywhere: a stable sort.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values
        first = sink + lag * torch.arange(partitions, device=self.device)
        chosen = (best + first[:, None]).flatten(2)
        always = torch.arange(n, device=self.device).expand(*self.shape, n)
        slots = torch.cat([always[..., :sink], chosen, always[..., sink + partitions * lag :]], dim=-1).int().contiguous()
        kept = slots.shape[2]
        self.held = [kept] * self.shape[0]
        self.slabs.lens = self._int(self.held)
        most = (kept + TOKENS - 1) // TOKENS
        s = self.slabs
        ops.kv_gather(stage.ring, slots, most, *s.tensors(), s.numbers(), self.spec.range)
        return True

    def bytes(self):
        """Of slabs and rings that are in use."""
        size = abi.slab_bytes(self.spec.format, self.head_dim, self.spec.group, self.spec.meta)
        sinks = self.spec.sinks // TOKENS
        packed = sum(self.f16_bytes * min(self._packed(n), sinks) + size * max(0, self._packed(n) - sinks) for n in self.held)
        return self.shape[1] * packed + self.slabs.ring.numel()
