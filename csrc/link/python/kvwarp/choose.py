"""Which tokens of what a layer has read first each head keeps (engine/src/policy): scores, how many, and which of them."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from . import scores
from .ops import Slabs

_LOW = (1 << 64) - 1
_STEP, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_PYRAMID = 20  # the last layer of a pyramid has one of so many even shares


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


def kept(spec, read):
    """Ascending slots [H, kept] that stay; `None`: all."""
    evict, n = spec.evict, read.n
    oldest, newest = evict.protects(n)
    room = max(0, n - oldest - newest)
    even = max(0, evict.of(n) - (n - room))
    k = _pyramid(even, room, *read.place) if spec.budget == "pyramid" else even
    if k >= room:
        return None
    of = _scores(evict, read, oldest, room)
    best = scores.top_k(of, k).long() if spec.refine is None else _refined(of, k, spec.refine)
    heads, every = best.shape[0], torch.arange(n, device=best.device)
    same = lambda some: some.expand(heads, -1)
    return torch.cat([same(every[:oldest]), oldest + best, same(every[oldest + room :])], dim=-1)


def _pyramid(even, room, layer, layers):
    """A straight line from twice the average, less the last layer's, down to a twentieth (PyramidKV)."""
    least, most = even // _PYRAMID, 2 * even - even // _PYRAMID
    if most > room:
        least, most = 2 * even - min(room, 2 * even), room
    return most - (most - min(least, most)) * layer // max(1, layers - 1)


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


def _refined(of, k, refine):
    """KVCrush: the best of `k` less a share, and as many tokens as that share, evenly spaced in the order of how many heads
    hold them otherwise than the anchor (src/sim_evict/crush.rs)."""
    (heads, room), spread = of.shape, k * refine.share // 10_000
    best = scores.top_k(of, k - spread).long()
    holds = torch.zeros(heads, room, dtype=torch.bool, device=of.device).scatter_(1, best, True)
    number = torch.arange(heads, device=of.device)
    anchor = {
        "mean": holds.sum(dim=1) * 2 > room,
        "random": (int(_logical(_draw(0, torch.zeros(1, dtype=torch.int64)), 32)) >> number) % 2 == 1,
        "alternate": number % 2 == 1,
        "zeros": number < 0,
        "ones": number >= 0,
    }[refine.anchor]
    distance = (holds != anchor[:, None]).sum(dim=0)
    # Those that a head holds come last: they are no candidates of its own.
    order = torch.where(holds, heads + 1, distance).sort(dim=-1, stable=True).indices
    candidates = room - (k - spread)
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
