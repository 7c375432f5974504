"""Ops that score the tokens of a cache and choose among them, on torch tensors as those of `kvwarp.ops`."""
from __future__ import annotations

import ctypes
import math
from typing import Optional

import torch
from torch import Tensor

from . import abi
from .errors import Error
from .ops import _DTYPES, _cache, _call, expect


@torch.library.custom_op("kvwarp::attention_sums", mutates_args=())
def attention_sums(q: Tensor, lse: Tensor, columns: int, scale: float, ring: Tensor, pools: list[Tensor], table: Tensor,
                   lens: Tensor, packed: Optional[Tensor], indptr: Optional[Tensor],
                   numbers: list[int]) -> Tensor:  # fmt: skip
    """What the newest tokens, q [S, rows, q_heads, D], give to each of the first `columns` slots, [S, H, G, columns]; `lse`
    [S, rows, q_heads] as `prefill_attn` leaves it."""
    cache = _cache(ring, pools, table, lens, packed, indptr, numbers)
    at = expect("q", q, _DTYPES, 4, ring.device)
    seqs, rows, q_heads, head_dim = q.shape
    if seqs != cache.seqs or head_dim != cache.head_dim or q_heads % cache.kv_heads:
        raise Error("q", f"shape is {tuple(q.shape)}; expected [{cache.seqs}, rows, q_heads, {cache.head_dim}]")
    sums = expect("lse", lse, torch.float32, 3, ring.device)
    if tuple(lse.shape) != (seqs, rows, q_heads):
        raise Error("lse", f"shape is {tuple(lse.shape)}; expected {(seqs, rows, q_heads)}")
    scores = torch.empty((seqs, cache.kv_heads, q_heads // cache.kv_heads, columns), device=ring.device)
    starts = rows * torch.arange(seqs + 1, dtype=torch.int32, device=ring.device)
    args = abi.params("token_score", op=abi.constants["KVW_SCORE_SUM"], cache=cache, q=at, lse=sums, scores=scores.data_ptr(),
                      cu_tokens=starts.data_ptr(), q_heads=q_heads, tokens=seqs * rows, max_tokens=rows, lse_rows=rows,
                      columns=columns, dtype=_DTYPES[q.dtype], scale=scale)  # fmt: skip
    _call("token_score", args, ring.device)
    return scores


@torch.library.custom_op("kvwarp::lag_scores", mutates_args=())
def lag_scores(first: int, lag: int, partitions: int, ring: Tensor, pools: list[Tensor], table: Tensor, lens: Tensor,
               packed: Optional[Tensor], indptr: Optional[Tensor], numbers: list[int]) -> Tensor:  # fmt: skip
    """LagKV's scores of `partitions` partitions of `lag` tokens from slot `first` on, [S, H, partitions, lag]."""
    cache = _cache(ring, pools, table, lens, packed, indptr, numbers)
    scores = torch.full((cache.seqs, cache.kv_heads, partitions, lag), math.nan, device=ring.device)
    start = torch.full_like(lens, first)
    args = abi.params("sim_evict", op=abi.constants["KVW_EVICT_LAG"], cache=cache, scores=scores.data_ptr(), lag=lag,
                      first=start.data_ptr(), partitions=partitions, v_weight=1.0)  # fmt: skip
    _call("sim_evict", args, ring.device)
    return scores


@torch.library.custom_op("kvwarp::key_norms", mutates_args=())
def key_norms(columns: int, ring: Tensor, pools: list[Tensor], table: Tensor, lens: Tensor, packed: Optional[Tensor],
              indptr: Optional[Tensor], numbers: list[int]) -> Tensor:  # fmt: skip
    """Lengths of the keys in the first `columns` slots, [S, H, columns]."""
    cache = _cache(ring, pools, table, lens, packed, indptr, numbers)
    norms = torch.full((cache.seqs, cache.kv_heads, columns), math.nan, device=ring.device)
    args = abi.params("sim_evict", op=abi.constants["KVW_EVICT_NORM"], cache=cache, scores=norms.data_ptr(), columns=columns)
    _call("sim_evict", args, ring.device)
    return norms


@torch.library.custom_op("kvwarp::pool", mutates_args=())
def pool(scores: Tensor, width: int, most: bool) -> Tensor:
    """Sums over the group of scores [rows, group, n], each the mean of `width` neighbours or the most of them: [rows, n]."""
    at = expect("scores", scores, torch.float32, 3)
    rows, group, n = scores.shape
    out = scores.new_empty((rows, n))
    kind = abi.constants["KVW_POOL_MAX" if most else "KVW_POOL_AVG"]
    args = abi.params("token_select", op=abi.constants["KVW_SELECT_POOL"], scores=at, out=out.data_ptr(), rows=rows, n=n,
                      group=group, width=width, pool=kind)  # fmt: skip
    _call("token_select", args, scores.device)
    return out


@torch.library.custom_op("kvwarp::top_k", mutates_args=())
def top_k(scores: Tensor, k: int) -> Tensor:
    """Ascending indices of the `k` best of each row of scores [rows, n], int32 [rows, k]; ties to the lower index."""
    at = expect("scores", scores, torch.float32, 2)
    rows, n = scores.shape
    if not 0 <= k <= n:
        raise Error("k", f"{k} of {n} scores")
    int32 = lambda *shape: torch.empty(shape, dtype=torch.int32, device=scores.device)
    best, counts, of = int32(rows, k), int32(rows), int32(rows).fill_(k)
    if k == 0:
        return best
    args = abi.params("token_select", op=abi.constants["KVW_SELECT_TOP_K"], scores=at, k=of.data_ptr(),
                      indices=best.data_ptr(), counts=counts.data_ptr(), rows=rows, n=n, segment=1, index_stride=k)  # fmt: skip
    if scores.device.type == "cuda":
        size = abi.library.kvw_token_select_workspace(ctypes.byref(args))
        workspace = torch.zeros(max(size, 16), dtype=torch.uint8, device=scores.device)
        args.workspace, args.workspace_bytes = workspace.data_ptr(), size
    _call("token_select", args, scores.device)
    return best


@attention_sums.register_fake
def _(q, lse, columns, scale, ring, *args):
    return ring.new_empty((q.shape[0], ring.shape[1], q.shape[2] // ring.shape[1], columns), dtype=torch.float32)


@lag_scores.register_fake
def _(first, lag, partitions, ring, *args):
    return ring.new_empty((ring.shape[0], ring.shape[1], partitions, lag), dtype=torch.float32)


@key_norms.register_fake
def _(columns, ring, *args):
    return ring.new_empty((ring.shape[0], ring.shape[1], columns), dtype=torch.float32)


@pool.register_fake
def _(scores, width, most):
    return scores.new_empty((scores.shape[0], scores.shape[2]))


@top_k.register_fake
def _(scores, k):
    return scores.new_empty((scores.shape[0], k), dtype=torch.int32)
