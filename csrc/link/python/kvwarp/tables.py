"""Page tables of vLLM and FlashInfer as those projects lay them out, turned into a cache's: elementwise, on their device.

A page is one slab of 64 tokens of all kv heads, or a whole number of them: page e is slabs e * H .. e * H + H - 1 of a pool
(csrc/slab.h, `table_heads` 1). Pages of fewer tokens are refused: a slab is what kernels read at once.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .errors import Error
from .ops import FORMATS, TOKENS, expect


def _slabs_a_page(page_size):
    if page_size < TOKENS or page_size % TOKENS:
        raise Error("page_size", f"{page_size}; supported: multiples of {TOKENS}")
    return page_size // TOKENS


def _tag(format):
    if format not in FORMATS:
        raise Error("format", f"{format!r}; supported: {', '.join(FORMATS)}")
    return FORMATS[format] << 28


def from_vllm(block_table: Tensor, page_size: int = TOKENS, format: str = "f16") -> Tensor:
    """vLLM's `block_table`, int32 [S, max_blocks], as `Slabs.table` [S, 1, slabs]. Ids below 0 become holes; what lies past
    a sequence's blocks is never read."""
    expect("block_table", block_table, torch.int32, 2, dense=False)
    each, tag = _slabs_a_page(page_size), _tag(format)
    within = torch.arange(each, dtype=torch.int32, device=block_table.device)
    entries = (block_table[..., None] * each + within) | tag
    entries = torch.where(block_table[..., None] < 0, -1, entries)
    return entries.flatten(1)[:, None].contiguous()


def positions_of(slot_mapping: Tensor, block_table: Tensor, seq_of: Tensor, page_size: int = TOKENS) -> Tensor:
    """Positions of the tokens that vLLM writes to `slot_mapping`, int64 [T], slot = block * page_size + offset, each in the
    sequence `seq_of` names, [T]; -1 where a slot is padding (below 0) or in none of the sequence's blocks."""
    expect("slot_mapping", slot_mapping, torch.int64, 1)
    _slabs_a_page(page_size)
    if seq_of.shape != slot_mapping.shape:
        raise Error("seq_of", f"shape is {tuple(seq_of.shape)}, that of slot_mapping {tuple(slot_mapping.shape)}")
    block, offset = slot_mapping.div(page_size, rounding_mode="floor"), slot_mapping % page_size
    found = block_table[seq_of.long()] == block[:, None]
    position = found.int().argmax(dim=1) * page_size + offset
    return torch.where((slot_mapping >= 0) & found.any(dim=1), position, -1)


def from_flashinfer(indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int = TOKENS, format: str = "f16"):
    """FlashInfer's paged_kv_indptr [S + 1], paged_kv_indices [pages] and paged_kv_last_page_len [S], int32, as the cache's
    `table`, `indptr` and `lens`."""
    for name, x in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
        expect(name, x, torch.int32, 1, indptr.device)
    if indptr.shape[0] != last_page_len.shape[0] + 1:
        raise Error("last_page_len", f"{last_page_len.shape[0]} elements, indptr {indptr.shape[0]}")
    each, tag = _slabs_a_page(page_size), _tag(format)
    within = torch.arange(each, dtype=torch.int32, device=indices.device)
    table = ((indices[:, None] * each + within) | tag).flatten()
    pages = indptr[1:] - indptr[:-1]
    lens = torch.where(pages > 0, (pages - 1) * page_size + last_page_len, 0).int()
    return table, indptr * each, lens


def all_in_pages(lens: Tensor) -> Tensor:
    """`Slabs.packed` of a cache without a ring: every slab, the last one too, is found through the table (f16 pages)."""
    return ((lens + TOKENS - 1) // TOKENS).int()
