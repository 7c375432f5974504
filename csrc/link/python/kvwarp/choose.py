"""Which tokens of what a layer has read first each head keeps (engine/src/policy): scores, how many, and which of them."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from . import budget, scores
from .ops import Slabs

_LOW = (1 << 64) - 1
_STEP, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass
class Read:
    """A sequence alone in `slabs`, all `n` tokens of it in the ring, in layer `place[0]` of `place[1]`: the newest queries
    [1, rows, q_heads, D] and their log-sum-exps [1, rows, q_heads], where the method asks for them."""

    slabs: Slabs
    n: int
    place: tuple
    scale: float
    q: torch.Tensor | None = None
    lse: torch.Tensor | None = None


@dataclass
class Scored:
    """What a layer has read of a sequence: `scores` [H, room] of all tokens but the `oldest` and the newest, which stay; of the
    others `even` where every layer keeps as many."""

    n: int
    oldest: int
    room: int
    even: int
    scores: torch.Tensor

    def slots(self, k, held, refine):
        """Ascending slots [H, kept] of the tokens that stay, `k` of a head's best `held`."""
        best = _refined(self.scores, k, held, refine) if refine else scores.top_k(self.scores, k).long()
        every = torch.arange(self.n, device=best.device)
        same = lambda some: some.expand(best.shape[0], -1)
        return torch.cat([same(every[: self.oldest]), self.oldest + best, same(every[self.oldest + self.room :])], dim=-1)


def score(spec, read):
    """`Scored` of a read, and how many of its tokens a head keeps, which is `None` where other layers have a say. `None` where
    all stay."""
    evict, n = spec.evict, read.n
    oldest, newest = evict.protects(n)
    room = max(0, n - oldest - newest)
    even = max(0, evict.of(n) - (n - room))
    k = budget.pyramid(even, room, *read.place) if spec.budget == "pyramid" else even
    if room == 0 or not spec.waits and k >= room:
        return None
    return Scored(n, oldest, room, even, _scores(evict, read, oldest, room)), None if spec.waits else k


def _scores(evict, read, first, room):
    """Of `room` tokens from slot `first` on, [H, room]; higher is kept."""
    held, heads = (*read.slabs.tensors(), read.slabs.numbers()), read.slabs.ring.shape[1]
    if read.q is not None:
        sums = scores.attention_sums(read.q, read.lse, room, read.scale, *held)
        return scores.pool(sums[0], evict.pool, bool(evict.max))
    if evict.method == "keynorm":
        return -scores.key_norms(room, *held)[0]
    if evict.method == "lagkv-kvpress" and read.n - first - room:
        lags = scores.lag_scores(first, evict.lag, room // evict.lag, *held)[0]
        # Ranks within each partition; those after it are only compared with.
        ranks = lags.argsort(dim=-1, stable=True).argsort(dim=-1)
        return (ranks / evict.lag).flatten(1)
    if evict.method == "random":
        seed = evict.seed << 32 | read.place[0]
        drawn = _draw(seed, torch.arange(first, first + room))
        return _logical(drawn, 40).float().to(read.slabs.ring.device).expand(heads, room).contiguous()
    # The newer the better, which is also what is left of LagKV where the text is too short for two partitions.
    newer = torch.arange(room, dtype=torch.float32, device=read.slabs.ring.device)
    return newer.expand(heads, room).contiguous()


def _refined(of, k, held, refine):
    """KVCrush: the best of `k` less a share, and as many of the best `held` as that share, evenly spaced in the order of how
    many heads hold them otherwise than the anchor (src/sim_evict/crush.rs)."""
    (heads, room), spread = of.shape, k * refine.share // 10_000
    marked = lambda best: torch.zeros(heads, room, dtype=torch.bool, device=of.device).scatter_(1, best, True)
    best = scores.top_k(of, k - spread).long()
    holds, gone = marked(best), ~marked(scores.top_k(of, held).long())
    number = torch.arange(heads, device=of.device)
    anchor = {
        "mean": holds.sum(dim=1) * 2 > room,
        "random": (int(_logical(_draw(0, torch.zeros(1, dtype=torch.int64)), 32)) >> number) % 2 == 1,
        "alternate": number % 2 == 1,
        "zeros": number < 0,
        "ones": number >= 0,
    }[refine.anchor]
    distance = (holds != anchor[:, None]).sum(dim=0)
    # Those that are no candidates of a head come last.
    order = torch.where(holds | gone, heads + 1, distance).sort(dim=-1, stable=True).indices
    candidates = held - (k - spread)
    places = torch.arange(spread, device=of.device) * (candidates - 1) // max(1, spread - 1)
    return torch.cat([best, order[:, places]], dim=-1).sort(dim=-1).values


def _draw(seed, steps):
    """The program's random numbers (src/sample), 64 bits each in an int64."""
    z = _signed(seed & _LOW) + (steps + 1) * _signed(_STEP)
    z = (z ^ _logical(z, 30)) * _signed(_MIX[0])
    z = (z ^ _logical(z, 27)) * _signed(_MIX[1])
    return z ^ _logical(z, 31)


def _signed(x):
    return x - (1 << 64) if x >> 63 else x


def _logical(x, n):
    """Shifted right, zeros coming in."""
    return (x >> n) & ((1 << (64 - n)) - 1)
