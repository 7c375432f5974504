"""KIVI's own 2-bit kernels (arXiv:2402.02750): q . K, softmax, p . V; K in groups along tokens, V along channels.

Install: git clone https://github.com/jy-yuan/KIVI; then in KIVI/quant: python3 -m pip install --no-build-isolation .
Its Python wrapper transposes the cache in every call; here the kernels get what they read.
"""
from common import DECODE, Skip, copies

try:
    import torch
except ImportError:
    torch = None

NAME = "KIVI"
BITS, GROUP = 2, 32
EFFECTIVE_BITS = BITS + 32 / GROUP


def cases():
    if torch is None:
        raise Skip("PyTorch is not installed")
    try:
        import kivi_gemv  # noqa: F401
    except ImportError as e:
        raise Skip(f"{e}: see the top of kivi.py") from e
    for shape in DECODE:
        yield "kivi_q2g32", shape, EFFECTIVE_BITS, set_up(shape)


def set_up(shape):
    def launches(card):
        import kivi_gemv

        rows, d, n = shape.batch * shape.kv_heads, shape.head_dim, shape.context
        q = torch.randn(shape.batch * shape.q_heads, 1, d, dtype=torch.float16, device="cuda")

        def packed(outer, inner):
            codes = torch.randint(-(2**31), 2**31 - 1, (rows, outer * BITS // 32, inner), dtype=torch.int32,
                                  device="cuda")
            meta = [torch.rand(rows, outer // GROUP, inner, dtype=torch.float16, device="cuda") for _ in range(2)]
            return codes, *meta

        def launch(k, v):
            heads = (BITS, GROUP, shape.q_heads, shape.kv_heads)
            scores = kivi_gemv.gemv_forward_cuda_outer_dim(q, *k, *heads)
            p = torch.softmax(scores.view(-1, 1, n) * d**-0.5, -1, dtype=torch.float32).to(torch.float16)
            return kivi_gemv.gemv_forward_cuda_outer_dim(p, *v, *heads)

        count = copies(shape.cache_bytes(EFFECTIVE_BITS), card.l2, card.free())
        caches = [(packed(n, d), packed(d, n)) for _ in range(count)]
        return [lambda k=k, v=v: launch(k, v) for k, v in caches]

    return launches
