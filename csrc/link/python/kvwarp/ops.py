"""The ops on torch tensors: CPU ones run at once, CUDA ones on torch's current stream. Nothing is copied.

A cache is `Slabs`: tensors laid out as csrc/slab.h says. Each op is a `torch.library` custom op (`torch.ops.kvwarp.*`)
with a fake implementation, so that graphs can be traced through it.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from . import abi
from .errors import Error

F16, Q8, Q4, Q2, FP8 = (abi.constants[f"KVW_SLAB_{f}"] for f in ("F16", "Q8", "Q4", "Q2", "FP8"))
FORMATS = {"f16": F16, "q8": Q8, "q4": Q4, "q2": Q2, "fp8": FP8}
TOKENS = abi.constants["KVW_SLAB_TOKENS"]
APPEND, FILL, FLUSH = (abi.constants[f"KVW_PACK_{op}"] for op in ("APPEND", "FILL", "FLUSH"))
_DTYPES = {torch.float16: abi.constants["KVW_F16"], torch.bfloat16: abi.constants["KVW_BF16"]}


@dataclass
class Slabs:
    """A cache: `ring` uint8 [S, H, ring_slabs, bytes], `table` int32 [S, H or 1, stride], or CSR entries [n] with
    `indptr` int32 [S + 1], `lens` int32 [S] or [S, H], `packed` likewise or None, `pools` by format, uint8 [slabs, bytes]."""

    ring: Tensor
    table: Tensor
    lens: Tensor
    head_dim: int
    pools: dict = field(default_factory=dict)
    packed: Optional[Tensor] = None
    indptr: Optional[Tensor] = None
    window: int = 0
    group: int = 32
    meta: int = 0

    def tensors(self):
        """`ring`, pools by format (empty where there is none), and what is only read."""
        empty = self.ring.new_empty(0)
        pools = [self.pools.get(format, empty) for format in range(len(FORMATS))]
        return self.ring, pools, self.table, self.lens, self.packed, self.indptr

    def numbers(self):
        return [self.head_dim, self.window, self.group, self.meta]


def expect(name, tensor, dtypes, rank=None, device=None, dense=True):
    """Refuses a tensor by name; its address otherwise."""
    if not isinstance(tensor, Tensor):
        raise Error(name, f"a {type(tensor).__name__}, not a tensor")
    dtypes = dtypes if isinstance(dtypes, (tuple, dict)) else (dtypes,)
    if tensor.dtype not in dtypes:
        raise Error(name, f"dtype is {tensor.dtype}; supported: {', '.join(str(d) for d in dtypes)}")
    if rank is not None and tensor.dim() not in (rank if isinstance(rank, tuple) else (rank,)):
        raise Error(name, f"rank is {tensor.dim()}, shape {tuple(tensor.shape)}; supported: {rank}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise Error(name, f"device is {tensor.device}; supported: cpu, cuda")
    if device is not None and tensor.device != device:
        raise Error(name, f"device is {tensor.device}, the cache's {device}")
    if dense and not tensor.is_contiguous():
        raise Error(name, f"stride is {tensor.stride()}; it must be contiguous")
    if tensor.data_ptr() % 16:
        raise Error(name, "alignment: its address is not a multiple of 16")
    return tensor.data_ptr()


def _cache(ring, pools, table, lens, packed, indptr, numbers):
    head_dim, window, group, meta = numbers
    device, int32 = ring.device, torch.int32
    expect("ring", ring, torch.uint8, 4)
    seqs, heads, slabs, size = ring.shape
    if size != abi.slab_bytes(F16, head_dim):
        raise Error("ring", f"slabs of {size} bytes; f16 slabs of head_dim {head_dim} have {abi.slab_bytes(F16, head_dim)}")
    expect("table", table, int32, 1 if indptr is not None else 3, device)
    cache = abi.structs["kvw_cache"](
        ring=ring.data_ptr(), table=table.data_ptr(), seqs=seqs, kv_heads=heads, head_dim=head_dim, group=group, meta=meta,
        window=window, ring_slabs=slabs, lens=expect("lens", lens, int32, (1, 2), device),
        lens_heads=1 if lens.dim() == 1 else heads, table_heads=1, table_stride=1,
    )  # fmt: skip
    if lens.shape[0] != seqs or (lens.dim() == 2 and lens.shape[1] != heads):
        raise Error("lens", f"shape is {tuple(lens.shape)}; the ring is of {seqs} sequences, {heads} heads")
    if packed is not None:
        cache.packed = _like("packed", packed, lens)
    if indptr is not None:
        cache.indptr = expect("indptr", indptr, int32, 1, device)
        if indptr.shape[0] != seqs + 1:
            raise Error("indptr", f"{indptr.shape[0]} elements for {seqs} sequences")
    else:
        cache.table_heads, cache.table_stride = table.shape[1], table.shape[2]
        if table.shape[0] != seqs:
            raise Error("table", f"rows of {table.shape[0]} sequences; the ring has {seqs}")
    for format, pool in enumerate(pools):
        if pool.numel() == 0:
            continue
        cache.pools[format] = expect("pools", pool, torch.uint8, 2, device)
        if pool.shape[1] != abi.slab_bytes(format, head_dim, group, meta):
            raise Error("pools", f"slabs of {pool.shape[1]} bytes in the pool of format {format}")
    if device.type == "cpu":
        _inside(pools, table, lens, indptr, heads)
    return cache


def _inside(pools, table, lens, indptr, heads):
    """Refuses a table that leads out of the pools: the library knows their addresses alone. On the CPU; on a device that
    would wait for it."""
    if indptr is not None:
        if int(indptr[-1]) > table.numel():
            raise Error("indptr", f"ends at {int(indptr[-1])} of a table of {table.numel()}")
        entries = table
    else:
        # What lies past a sequence's tokens is never read.
        slabs = (lens.view(lens.shape[0], -1, 1) + TOKENS - 1) // TOKENS
        entries = torch.where(torch.arange(table.shape[2]) < slabs, table, -1)
    each = 1 if table.dim() == 3 and table.shape[1] == heads else heads
    for format, pool in enumerate(pools):
        if pool.numel() == 0 or entries.numel() == 0:
            continue
        most = int(torch.where(entries >> 28 == format, entries & 0x0FFFFFFF, -1).max())
        if (most + 1) * each > pool.shape[0]:
            raise Error("table", f"slab {most} of format {format}; the pool holds {pool.shape[0] // each}")


def _like(name, x, lens):
    at = expect(name, x, torch.int32, lens.dim(), lens.device)
    if x.shape != lens.shape:
        raise Error(name, f"shape is {tuple(x.shape)}, that of lens {tuple(lens.shape)}")
    return at


def _feedback(feedback, cache, device):
    """Address of weights of K's rounding errors, or None."""
    if feedback is None:
        return None
    at = expect("feedback", feedback, torch.float16, 3, device)
    if tuple(feedback.shape) != (cache.kv_heads, cache.head_dim, cache.head_dim):
        raise Error("feedback", f"shape is {tuple(feedback.shape)}; the cache has {cache.kv_heads} heads of {cache.head_dim}")
    return at


def _call(op, args, device):
    if device.type == "cpu":
        return abi.call(op, args)
    with torch.cuda.device(device):
        return abi.call(op, args, torch.cuda.current_stream(device).cuda_stream)


def _rows(name, x, heads, head_dim, device):
    """Address and elements between tokens of [T, heads, D]."""
    at = expect(name, x, _DTYPES, 3, device, dense=False)
    if tuple(x.shape[1:]) != (heads, head_dim):
        raise Error(name, f"shape is {tuple(x.shape)}; expected [tokens, {heads}, {head_dim}]")
    if x.stride(2) != 1 or (heads > 1 and x.stride(1) != head_dim):
        raise Error(name, f"stride is {x.stride()}; heads of a token must lie together")
    return at, max(x.stride(0), heads * head_dim) if x.shape[0] > 1 else heads * head_dim


@torch.library.custom_op("kvwarp::kv_pack", mutates_args=("ring", "pools"))
def kv_pack(op: int, k: Tensor, v: Tensor, cu_tokens: Optional[Tensor], max_tokens: int, ring: Tensor, pools: list[Tensor],
            table: Tensor, lens: Tensor, packed: Optional[Tensor], indptr: Optional[Tensor], numbers: list[int],
            range: float = 0.0, feedback: Optional[Tensor] = None) -> None:  # fmt: skip
    """APPEND: a token a sequence. FILL: rows `cu_tokens` of k, v, [T, H, D], into the ring."""
    cache = _cache(ring, pools, table, lens, packed, indptr, numbers)
    args = abi.params("kv_pack", op=op, cache=cache, max_tokens=max_tokens, range=range, tokens=k.shape[0])
    args.k, args.k_stride = _rows("k", k, cache.kv_heads, cache.head_dim, ring.device)
    args.v, args.v_stride = _rows("v", v, cache.kv_heads, cache.head_dim, ring.device)
    if v.shape[0] != k.shape[0] or v.dtype != k.dtype:
        raise Error("v", f"{v.shape[0]} tokens of {v.dtype}; k has {k.shape[0]} of {k.dtype}")
    args.dtype = _DTYPES[k.dtype]
    if cu_tokens is not None:
        args.cu_tokens = expect("cu_tokens", cu_tokens, torch.int32, 1, ring.device)
        if cu_tokens.shape[0] != cache.seqs + 1:
            raise Error("cu_tokens", f"{cu_tokens.shape[0]} elements for {cache.seqs} sequences")
    args.feedback = _feedback(feedback, cache, ring.device)
    _call("kv_pack", args, ring.device)


@torch.library.custom_op("kvwarp::kv_flush", mutates_args=("ring", "pools"))
def kv_flush(first: Tensor, max_slabs: int, ring: Tensor, pools: list[Tensor], table: Tensor, lens: Tensor,
             packed: Optional[Tensor], indptr: Optional[Tensor], numbers: list[int], range: float = 0.0,
             feedback: Optional[Tensor] = None) -> None:  # fmt: skip
    """Packs slabs from `first` on that have left the window, from the ring into the table's."""
    cache = _cache(ring, pools, table, lens, packed, indptr, numbers)
    args = abi.params("kv_pack", op=FLUSH, cache=cache, max_tokens=max_slabs, range=range)
    args.first = _like("first", first, lens)
    args.feedback = _feedback(feedback, cache, ring.device)
    _call("kv_pack", args, ring.device)


@torch.library.custom_op("kvwarp::paged_attn", mutates_args=())
def paged_attn(q: Tensor, max_slabs: int, scale: float, sliding_window: int, ring: Tensor, pools: list[Tensor], table: Tensor,
               lens: Tensor, packed: Optional[Tensor], indptr: Optional[Tensor], numbers: list[int]) -> Tensor:  # fmt: skip
    """Attention of the newest tokens, q [S, q_len, q_heads, D], over the cache that holds them."""
    cache = _cache(ring, pools, table, lens, packed, indptr, numbers)
    at = expect("q", q, _DTYPES, 4, ring.device)
    if q.shape[0] != cache.seqs or q.shape[3] != cache.head_dim:
        raise Error("q", f"shape is {tuple(q.shape)}; expected [{cache.seqs}, q_len, q_heads, {cache.head_dim}]")
    out = torch.empty_like(q)
    args = abi.params("paged_attn", cache=cache, q=at, out=out.data_ptr(), q_heads=q.shape[2], q_len=q.shape[1], scale=scale,
                      max_slabs=max_slabs, sliding_window=sliding_window, dtype=_DTYPES[q.dtype])  # fmt: skip
    if q.device.type == "cuda":
        size = abi.library.kvw_paged_attn_workspace(abi.ctypes.byref(args))
        workspace = torch.zeros(max(size, 16), dtype=torch.uint8, device=q.device)
        args.workspace, args.workspace_bytes = workspace.data_ptr(), size
    _call("paged_attn", args, ring.device)
    return out


@torch.library.custom_op("kvwarp::prefill_attn", mutates_args=("lse",))
def prefill_attn(q: Tensor, cu_tokens: Tensor, max_tokens: int, scale: float, sliding_window: int, ring: Tensor,
                 pools: list[Tensor], table: Tensor, lens: Tensor, packed: Optional[Tensor], indptr: Optional[Tensor],
                 numbers: list[int], lse: Optional[Tensor] = None) -> Tensor:  # fmt: skip
    """Causal attention of rows `cu_tokens` of q, [T, q_heads, D], over a cache whose ring holds their tokens. `lse`, f32
    [S, rows, q_heads], gets the log-sum-exps of the newest rows; of fewer its last."""
    cache = _cache(ring, pools, table, lens, packed, indptr, numbers)
    at = expect("q", q, _DTYPES, 3, ring.device)
    starts = expect("cu_tokens", cu_tokens, torch.int32, 1, ring.device)
    if q.shape[2] != cache.head_dim or cu_tokens.shape[0] != cache.seqs + 1:
        raise Error("q", f"shape is {tuple(q.shape)}, with {cu_tokens.shape[0]} cu_tokens for {cache.seqs} sequences")
    out = torch.empty_like(q)
    args = abi.params("prefill_attn", cache=cache, q=at, out=out.data_ptr(), q_heads=q.shape[1], tokens=q.shape[0], scale=scale,
                      cu_tokens=starts, max_tokens=max_tokens, sliding_window=sliding_window, dtype=_DTYPES[q.dtype])  # fmt: skip
    if lse is not None:
        args.lse, args.lse_rows = expect("lse", lse, torch.float32, 3, ring.device), lse.shape[1]
        if lse.shape[0] != cache.seqs or lse.shape[2] != q.shape[1]:
            raise Error("lse", f"shape is {tuple(lse.shape)}; expected [{cache.seqs}, rows, {q.shape[1]}]")
    _call("prefill_attn", args, ring.device)
    return out


@torch.library.custom_op("kvwarp::kv_gather", mutates_args=("ring", "pools"))
def kv_gather(source: Tensor, slots: Tensor, max_slabs: int, ring: Tensor, pools: list[Tensor], table: Tensor, lens: Tensor,
              packed: Optional[Tensor], indptr: Optional[Tensor], numbers: list[int], range: float = 0.0,
              first: Optional[Tensor] = None, feedback: Optional[Tensor] = None) -> None:  # fmt: skip
    """Tokens in `slots`, int32 [S, H, n] ascending, of the f16 slabs of `source`, shaped as a ring, into the cache from slab
    `first` on."""
    cache = _cache(ring, pools, table, lens, packed, indptr, numbers)
    at = expect("source", source, torch.uint8, 4, ring.device)
    if source.shape[:2] != ring.shape[:2] or source.shape[3] != ring.shape[3]:
        raise Error("source", f"shape is {tuple(source.shape)}, the ring's {tuple(ring.shape)}")
    chosen = expect("slots", slots, torch.int32, 3, ring.device)
    args = abi.params("kv_gather", cache=cache, slots=chosen, slots_stride=slots.shape[2], from_slabs=source.shape[2],
                      max_slabs=max_slabs, range=range)  # fmt: skip
    setattr(args, "from", at)
    if tuple(slots.shape[:2]) != tuple(ring.shape[:2]):
        raise Error("slots", f"shape is {tuple(slots.shape)}; the ring is of {ring.shape[0]} sequences, {ring.shape[1]} heads")
    if first is not None:
        args.first = _like("first", first, lens)
    args.feedback = _feedback(feedback, cache, ring.device)
    _call("kv_gather", args, ring.device)


@paged_attn.register_fake
def _(q, *args):
    return torch.empty_like(q)


@prefill_attn.register_fake
def _(q, *args):
    return torch.empty_like(q)
