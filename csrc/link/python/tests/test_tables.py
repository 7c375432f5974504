"""Page tables of vLLM and FlashInfer: decoding over them against attention written in torch."""
import itertools

import pytest
import torch

from kvwarp import Error, abi, ops, tables
from kvwarp.cache import Layer
from kvwarp.spec import Spec
from test_ops import D, GROUP, HEADS, attention, random, relative, tokens


def pages(k, v, page_of, count):
    """Pools of f16 slabs in which the tokens of one sequence lie in pages `page_of`."""
    layer = Layer(Spec("f16", ops.F16, window=len(k)), 1, HEADS, D, torch.device("cpu"))
    layer.extend(k, v, random(len(k), HEADS * GROUP, D), [len(k)], 0.125, 0)
    pool = torch.full((count, HEADS, layer.f16_bytes), 0xFF, dtype=torch.uint8)
    for i, page in enumerate(page_of):
        pool[page] = layer.slabs.ring[0, :, i]
    return pool.view(count * HEADS, -1)


def test_vllm_and_flashinfer_tables():
    torch.manual_seed(2)
    k, v, _ = tokens(200)
    page_of, q = [5, 2, 7, 1], random(1, 1, HEADS * GROUP, D)
    pool = pages(k, v, page_of, 8)
    lens = torch.tensor([200], dtype=torch.int32)
    ring = torch.zeros((1, HEADS, 1, pool.shape[1]), dtype=torch.uint8)
    want = attention(q[0], k, v, 0.125)

    block_table = torch.tensor([[5, 2, 7, 1, 0, -1]], dtype=torch.int32)
    table = tables.from_vllm(block_table)
    cache = ops.Slabs(ring, table, lens, D, {ops.F16: pool}, tables.all_in_pages(lens))
    out = ops.paged_attn(q, 4, 0.125, 0, *cache.tensors(), cache.numbers())
    assert relative(out[0], want) < 1e-3

    # Pages of 128 tokens: 5 and 2 are halves of none, so the pool is laid out anew.
    pool = pages(k, v, [6, 7, 2, 3], 8)
    table = tables.from_vllm(torch.tensor([[3, 1]], dtype=torch.int32), page_size=128)
    cache = ops.Slabs(ring, table, lens, D, {ops.F16: pool}, tables.all_in_pages(lens))
    assert relative(ops.paged_attn(q, 4, 0.125, 0, *cache.tensors(), cache.numbers())[0], want) < 1e-3

    pool = pages(k, v, page_of, 8)
    indptr, last = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    table, starts, found = tables.from_flashinfer(indptr, torch.tensor(page_of, dtype=torch.int32), last)
    assert found.tolist() == [200]
    cache = ops.Slabs(ring, table, found, D, {ops.F16: pool}, tables.all_in_pages(found), starts)
    assert relative(ops.paged_attn(q, 4, 0.125, 0, *cache.tensors(), cache.numbers())[0], want) < 1e-3

    slots = torch.tensor([5 * 64, 2 * 64 + 9, 1 * 64 + 7, -1, 3 * 64])
    positions = tables.positions_of(slots, block_table, torch.zeros(5, dtype=torch.int64))
    assert positions.tolist() == [0, 73, 199, -1, -1]


@pytest.mark.parametrize("spec, most", [("f16", 1e-3), ("q8,window=0", 0.02)])
def test_a_ragged_batch_in_shuffled_pages(spec, most):
    # As vLLM and FlashInfer have it: pages in no order, and past a sequence's pages whatever was there before.
    torch.manual_seed(3)
    lens, spec = [256, 64, 448, 128], Spec.parse(spec)
    held, used = [tokens(n)[:2] for n in lens], [n // 64 for n in lens]
    page_of = torch.randperm(24)[: sum(used)].int().split(used)
    pool = torch.full((24, HEADS, abi.slab_bytes(spec.format, D)), 0xFF, dtype=torch.uint8)
    for (k, v), pages in zip(held, page_of):
        layer = Layer(spec, 1, HEADS, D, "cpu")
        layer.extend(k, v, random(len(k), HEADS * GROUP, D), [len(k)], 0.125)
        mine = layer.slabs.pools[spec.format].view(HEADS, -1, pool.shape[2])
        pool[pages.long()] = mine[:, : len(pages)].transpose(0, 1)
    q, name = random(4, 1, HEADS * GROUP, D), spec.preset
    want = torch.stack([attention(x, k, v, 0.125) for x, (k, v) in zip(q, held)])
    ring = torch.zeros((4, HEADS, 1, layer.f16_bytes), dtype=torch.uint8)
    seq_lens = torch.tensor(lens, dtype=torch.int32)

    block_table = torch.full((4, 9), 1 << 20, dtype=torch.int32)
    for row, pages in zip(block_table, page_of):
        row[: len(pages)] = pages
    vllm = ops.Slabs(ring, tables.from_vllm(block_table, format=name), seq_lens, D, {spec.format: pool.flatten(0, 1)},
                     tables.all_in_pages(seq_lens))  # fmt: skip
    got = ops.paged_attn(q, 7, 0.125, 0, *vllm.tensors(), vllm.numbers())
    assert relative(got, want) < most

    indptr = torch.tensor([0, *itertools.accumulate(used)], dtype=torch.int32)
    last = torch.full((4,), 64, dtype=torch.int32)
    table, starts, found = tables.from_flashinfer(indptr, torch.cat(page_of), last, format=name)
    assert found.tolist() == lens
    csr = ops.Slabs(ring, table, found, D, {spec.format: pool.flatten(0, 1)}, tables.all_in_pages(found), starts)
    assert torch.equal(ops.paged_attn(q, 7, 0.125, 0, *csr.tensors(), csr.numbers()), got)

    # A slot of each page and a padded one, of sequences in any order.
    seq_of = torch.tensor([2, 0, 3, 1, 2])
    slots = torch.tensor([page_of[2][6] * 64 + 5, page_of[0][1] * 64, page_of[3][1] * 64 + 63, page_of[1][0] * 64 + 9, -1])
    assert tables.positions_of(slots, block_table, seq_of).tolist() == [389, 64, 127, 9, -1]


@pytest.mark.parametrize("argument, call", [
    ("block_table", lambda: tables.from_vllm(torch.zeros(2, 3, dtype=torch.int64))),
    ("block_table", lambda: tables.from_vllm(torch.zeros(6, dtype=torch.int32))),
    ("page_size", lambda: tables.from_vllm(torch.zeros(2, 3, dtype=torch.int32), page_size=16)),
    ("format", lambda: tables.from_vllm(torch.zeros(2, 3, dtype=torch.int32), format="q3")),
    ("indptr", lambda: tables.from_flashinfer(*[torch.zeros(3)] * 3)),
    ("last_page_len", lambda: tables.from_flashinfer(*[torch.zeros(3, dtype=torch.int32)] * 3)),
    ("slot_mapping", lambda: tables.positions_of(*[torch.zeros(3, dtype=torch.int32)] * 3)),
    ("seq_of", lambda: tables.positions_of(torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2))),
])  # fmt: skip
def test_refusals_of_tables_name_the_argument(argument, call):
    with pytest.raises(Error) as raised:
        call()
    assert raised.value.argument == argument
