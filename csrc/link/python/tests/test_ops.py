"""Ops on torch tensors, against attention written in torch; every refusal by the argument's name."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvwarp import Error, abi, ops, turn
from kvwarp.cache import Layer
from kvwarp.spec import Spec

HEADS, GROUP, D = 2, 3, 64


def attention(q, k, v, scale, sliding_window=0):
    """q [n, q_heads, D] of the newest tokens, k and v [len, H, D]; f64."""
    q, k, v = q.double(), k.double().repeat_interleave(GROUP, 1), v.double().repeat_interleave(GROUP, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    at, column = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    hidden = (column > at) | ((column <= at - sliding_window) if sliding_window else False)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def random(*shape, dtype=torch.float16):
    return torch.randn(*shape).to(dtype)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def tokens(n, dtype=torch.float16):
    return random(n, HEADS, D, dtype=dtype), random(n, HEADS, D, dtype=dtype), random(n, HEADS * GROUP, D, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [0, 100])
def test_f16_is_attention(dtype, sliding_window):
    torch.manual_seed(0)
    layer = Layer(Spec("f16", ops.F16, window=64), 2, HEADS, D, torch.device("cpu"))
    held = [[torch.empty(0, HEADS, D, dtype=dtype)] * 2 for _ in range(2)]
    for counts in ([150, 70], [3, 90], None, None, [64, 1]):
        parts = [tokens(n, dtype) for n in counts or [1, 1]]
        held = [[torch.cat([h[i], p[i]]) for i in range(2)] for h, p in zip(held, parts)]
        k, v, q = (torch.cat([p[i] for p in parts]) for i in range(3))
        if counts:
            out = layer.extend(k, v, q, counts, 0.125, sliding_window)
        else:
            out = layer.append(k, v, q[:, None], 0.125, sliding_window)[:, 0]
        want = [attention(p[2], *h, 0.125, sliding_window) for h, p in zip(held, parts)]
        assert relative(out, torch.cat(want)) < (1e-3 if dtype == torch.float16 else 6e-3)


def test_bits_bound_the_error():
    errors = {}
    for spec in ("f16", "q8", "fp8", "q4,sinks=100", "q2", "q2-small", "q2-kivi", "q2,evict=lagkv:0.5:lag=64"):
        torch.manual_seed(1)
        layer = Layer(Spec.parse(spec), 1, HEADS, D, torch.device("cpu"))
        k, v, q = tokens(700)
        exact = layer.extend(k, v, q, [700], 0.125, 0)
        assert relative(exact, attention(q, k, v, 0.125)) < 1e-3, "a first read is exact"
        k1, v1, q1 = tokens(1)
        out = layer.append(k1, v1, q1[:, None], 0.125, 0)[0]
        errors[spec] = relative(out, attention(q1, torch.cat([k, k1]), torch.cat([v, v1]), 0.125))
        if "evict" in spec:
            # 16 first, halves of nine partitions of 64, the rest, and the new one.
            assert layer.held == [16 + 9 * 32 + (700 - 16 - 9 * 64) + 1]
    assert errors["f16"] < 1e-3 < errors["q8"] < 0.02 < errors["q4,sinks=100"] < 0.2 < errors["q2-kivi"] < 0.8, errors
    assert errors["q8"] < errors["fp8"] < 0.1 and errors["q4,sinks=100"] < errors["q2"] < errors["q2-small"] < 0.8, errors


def valid():
    layer = Layer(Spec.parse("q2-kivi"), 1, HEADS, D, torch.device("cpu"))
    k, v, q = tokens(300)
    layer.extend(k, v, q, [300], 0.125, 0)
    return layer.slabs, random(1, 1, HEADS * GROUP, D)


@pytest.mark.parametrize("argument, change", [
    ("q", lambda s, q: (s, q.float())),
    ("q", lambda s, q: (s, q[0])),
    ("q", lambda s, q: (s, q.expand(1, 2, -1, -1)[..., ::2])),
    ("q_heads", lambda s, q: (s, random(1, 1, 5, D))),
    ("q_len", lambda s, q: (s, random(1, 17, 6, D))),
    ("q", lambda s, q: (s, random(6 * D + 1)[1:].view(1, 1, 6, D))),
    ("ring", lambda s, q: (replace(s, ring=s.ring.int()), q)),
    ("ring", lambda s, q: (replace(s, ring=s.ring[..., ::2]), q)),
    ("lens", lambda s, q: (replace(s, lens=s.lens.long()), q)),
    ("lens", lambda s, q: (replace(s, lens=-s.lens), q)),
    ("table", lambda s, q: (replace(s, table=s.table[0]), q)),
    ("table_stride", lambda s, q: (replace(s, table=s.table[:, :, :1].contiguous()), q)),
    ("pools", lambda s, q: (replace(s, group=64), q)),
    ("q", lambda s, q: (s, q.to("meta"))),
])  # fmt: skip
def test_refusals_name_the_argument(argument, change):
    cache, q = change(*valid())
    call = ops.paged_attn._init_fn if q.device.type == "meta" else ops.paged_attn
    with pytest.raises(Error) as raised:
        call(q, 5, 0.125, 0, *cache.tensors(), cache.numbers())
    assert raised.value.argument == argument, raised.value


def replace(cache, **changes):
    from dataclasses import replace

    return replace(cache, **changes)


def test_slabs_outside_the_pools_are_refused():
    cache, q = valid()
    for name, table in (("table", cache.table + 9), ("table", cache.table.max(cache.table | 0xFFFFFFF)),
                        ("table", cache.table[:, :1].contiguous() + 4)):  # fmt: skip
        with pytest.raises(Error, match=f"^{name}: slab"):
            ops.paged_attn(q, 5, 0.125, 0, *replace(cache, table=table).tensors(), cache.numbers())
    ends = torch.tensor([0, 9], dtype=torch.int32)
    csr = replace(cache, table=cache.table[0, 0, :5].contiguous(), indptr=ends)
    with pytest.raises(Error, match="^indptr: ends at 9"):
        ops.paged_attn(q, 5, 0.125, 0, *csr.tensors(), csr.numbers())


@pytest.mark.parametrize("argument, changes", [
    ("k", {"k": random(3, HEADS, D).float()}),
    ("k", {"k": random(3, D, HEADS).transpose(1, 2)}),
    ("k", {"k": random(3, HEADS, 2 * D)}),
    ("v", {"v": random(2, HEADS, D)}),
    ("v", {"v": random(3, HEADS, D, dtype=torch.bfloat16)}),
    ("v", {"v": random(3 * HEADS * D + 1)[1:].view(3, HEADS, D)}),
    ("cu_tokens", {"cu_tokens": torch.tensor([0, 3])}),
    ("cu_tokens", {"cu_tokens": torch.tensor([0, 1, 3], dtype=torch.int32)}),
    ("cu_tokens", {"cu_tokens": torch.tensor([0, 4], dtype=torch.int32)}),
    ("max_tokens", {"max_tokens": -1}),
    ("feedback", {"feedback": random(HEADS, D, D).float()}),
    ("feedback", {"feedback": random(HEADS, D, 8)}),
])  # fmt: skip
def test_refusals_of_writing_name_the_argument(argument, changes):
    cache, _ = valid()
    args = {"k": random(3, HEADS, D), "v": random(3, HEADS, D), "cu_tokens": torch.tensor([0, 3], dtype=torch.int32),
            "max_tokens": 3, "feedback": None, **changes}  # fmt: skip
    with pytest.raises(Error) as raised:
        ops.kv_pack(ops.FILL, args["k"], args["v"], args["cu_tokens"], args["max_tokens"], *cache.tensors(), cache.numbers(),
                    feedback=args["feedback"])  # fmt: skip
    assert raised.value.argument == argument, raised.value


@pytest.mark.parametrize("argument, changes", [
    ("source", {"source": lambda ring: ring[..., :-128]}),
    ("source", {"source": lambda ring: ring.int()}),
    ("slots", {"slots": torch.zeros(1, 1, 64, dtype=torch.int32)}),
    ("slots", {"slots": torch.zeros(1, HEADS, 64, dtype=torch.int64)}),
    ("slots", {"slots": torch.full((1, HEADS, 300), 1 << 20, dtype=torch.int32)}),
    ("first", {"first": torch.zeros(2, dtype=torch.int32)}),
])  # fmt: skip
def test_refusals_of_gathering_name_the_argument(argument, changes):
    cache, _ = valid()
    slots = changes.get("slots", torch.arange(300, dtype=torch.int32).expand(1, HEADS, 300).contiguous())
    source = changes.get("source", lambda ring: ring)(cache.ring.clone())
    with pytest.raises(Error) as raised:
        ops.kv_gather(source, slots, 5, *cache.tensors(), cache.numbers(), first=changes.get("first"))
    assert raised.value.argument == argument, raised.value


@pytest.mark.parametrize("argument, spec", [
    ("preset", "q3"), ("preset", "latent"), ("window", "q2,window=x"), ("window", "q2,window=64,window=64"),
    ("window", "f16,window=64"), ("evict", "q2,evict=kvzip:0.5"), ("evict", "q2,evict=lagkv:2"),
    ("evict", "q2,evict=lagkv:0.5:lag=20"), ("evict", "q2,evict=lagkv:0.5:pool=3"), ("hadamard", "q2,hadamard=yes"),
    ("meta", "q8,meta=u8"), ("meta", "q2,group=128"), ("range", "q4,range=90"), ("keep", "q2,keep=101"),
    ("group", "fp8,group=32"), ("kivi_exact", "q2-kivi,kivi_exact"), ("budget", "q2,budget=uniform"),
    ("colour", "q2,colour=red"),
])  # fmt: skip
def test_specs_are_refused_by_part(argument, spec):
    with pytest.raises(Error) as raised:
        Spec.parse(spec)
    assert raised.value.argument == argument


def test_a_calibration_of_more_heads_is_refused():
    with pytest.raises(Error, match="^stores: "):
        Layer(Spec.parse("q2"), 1, HEADS, D, "cpu", stores=[ops.Q4] * 2 * HEADS)


def test_rotations_are_their_own_inverse():
    for d in (64, 96, 128, 256):
        for matrix in (turn.keys(d, "cpu"), turn.values(d, "cpu")):
            assert torch.allclose(matrix @ matrix, torch.eye(d), atol=1e-6)
            assert torch.equal(matrix, matrix.T)


def test_threads_work_side_by_side():
    def decode(seed):
        make = torch.Generator().manual_seed(seed)
        normal = lambda n: [torch.randn(n, heads, D, generator=make).half() for heads in (HEADS, HEADS, HEADS * GROUP)]
        layer = Layer(Spec.parse("q2"), 1, HEADS, D, "cpu")
        k, v, q = normal(200)
        layer.extend(k, v, q, [200], 0.125)
        for _ in range(80):
            k, v, q = normal(1)
            out = layer.append(k, v, q[:, None], 0.125)
        return out

    alone = [decode(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(decode, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_ops_have_fakes():
    cache, q = valid()
    args = (q, 5, 0.125, 0, *cache.tensors(), cache.numbers())
    torch.library.opcheck(torch.ops.kvwarp.paged_attn, args, test_utils=("test_schema", "test_faketensor"))
    k, v, _ = tokens(1)
    pack = (ops.APPEND, k, v, None, 0, *cache.tensors(), cache.numbers())
    torch.library.opcheck(torch.ops.kvwarp.kv_pack, pack, test_utils=("test_schema", "test_faketensor"))
    assert abi.devices() == torch.cuda.device_count()
