"""How many tokens each layer keeps of a first read, those that are always kept left out (engine/src/policy/budget.rs).

`layers` are what `kvwarp.choose.Scored` says of each; a head of every layer has `room` tokens to choose from, and `even` of
them where all layers keep as many."""
from __future__ import annotations

import torch

from . import scores

_PYRAMID = 20  # the last layer of a pyramid has one of so many even shares
_PERIOD, _MOST = 4, 10  # of DynamicKV: layers after which budgets are settled anew, even shares that a layer holds till then


def pyramid(even, room, layer, layers):
    """A straight line from twice the average, less the last layer's, down to a twentieth (PyramidKV)."""
    least, most = even // _PYRAMID, 2 * even - even // _PYRAMID
    if most > room:
        least, most = 2 * even - min(room, 2 * even), room
    return most - (most - min(least, most)) * layer // max(1, layers - 1)


def settle(budget, layers):
    """Tokens that a head of each layer keeps, and those it has held till then: others stand for none."""
    if budget == "prefixkv":
        return _prefix(layers), [layer.room for layer in layers]
    held = [min(layer.room, _MOST * layer.even) for layer in layers]
    # What later layers turn out to need is gone by then.
    for read in range(_PERIOD, len(layers), _PERIOD):
        held[:read] = _dynamic(layers[:read], len(layers), held[:read])
    return _dynamic(layers, len(layers), held), held


def _prefix(layers):
    """The same share of each layer's whole score as far as that goes: who keeps the least gets the next token (PrefixKV)."""
    curves = []
    for layer in layers:
        running = layer.scores.double().sum(0).sort(descending=True).values.cumsum(0).cpu()
        curves.append(running / running[-1] if running[-1] > 0 else torch.zeros_like(running))
    total = min(sum(layer.even for layer in layers), sum(len(curve) for curve in curves))
    taken = lambda level: [int(torch.searchsorted(curve, level, right=True)) for curve in curves]
    low, high = 0.0, 1.0
    for _ in range(64):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if sum(taken(middle)) <= total else (low, middle)
    budgets = taken(low) if sum(taken(low)) <= total else [0] * len(curves)
    share = lambda i: curves[i][budgets[i] - 1].item() if budgets[i] else 0.0
    for _ in range(total - sum(budgets)):
        budgets[min((i for i, curve in enumerate(curves) if budgets[i] < len(curve)), key=share)] += 1
    return budgets


def _dynamic(layers, of, room):
    """To each of the `layers` read, of `of`, by how many of the best scores of all are its own (DynamicKV)."""
    total, heads = of * layers[0].even, layers[0].scores.shape[0]
    every = torch.cat([layer.scores.flatten().cpu() for layer in layers])
    best = scores.top_k(every[None], min(total * heads, len(every)))[0].long()
    counts = torch.bincount(best // layers[0].scores.numel(), minlength=len(layers)).tolist()
    return _share(total, counts, room)


def _share(total, weights, room):
    """`total` in proportion to `weights`, none over its `room`: whole parts first, then the largest remainders; what has no
    room goes to the others."""
    parts, left = [0] * len(weights), min(total, sum(room))
    while left:
        among = [i for i in range(len(parts)) if parts[i] < room[i]]
        whole = sum(weights[i] for i in among)
        weight = (lambda i: weights[i]) if whole else (lambda i: 1)
        whole, given = whole or len(among), 0
        for i in among:
            more = min(left * weight(i) // whole, room[i] - parts[i])
            parts[i], given = parts[i] + more, given + more
        if not given:
            parts[max(among, key=lambda i: (left * weight(i) % whole, -i))] += 1
            given = 1
        left -= given
    return parts
