"""FlashInfer's batched paged decode on tensor cores, pages of 16 tokens at random places: bf16, and fp8 e4m3.

Install: python3 -m pip install flashinfer-python
"""
from common import DECODE, Skip, copies

try:
    import torch
except ImportError:
    torch = None

NAME = "FlashInfer"
PAGE, WORKSPACE = 16, 256 << 20


def cases():
    if torch is None:
        raise Skip("PyTorch is not installed")
    try:
        import flashinfer  # noqa: F401
    except ImportError as e:
        raise Skip(f"{e}: python3 -m pip install flashinfer-python") from e
    for shape in DECODE:
        yield "flashinfer_bf16", shape, 16, set_up(shape, torch.bfloat16)
        yield "flashinfer_fp8", shape, 8, set_up(shape, torch.float8_e4m3fn)


def set_up(shape, dtype):
    def launches(card):
        import flashinfer

        pages = shape.context // PAGE
        bits = 8 * dtype.itemsize
        n = copies(shape.cache_bytes(bits), card.l2, card.free())
        indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * pages
        last = torch.full((shape.batch,), PAGE, dtype=torch.int32, device="cuda")
        q = torch.randn(shape.batch, shape.q_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")

        def one():
            size = (shape.batch * pages, 2, PAGE, shape.kv_heads, shape.head_dim)
            cache = torch.empty(size, dtype=dtype, device="cuda")
            for part in cache.split(4096):
                part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device="cuda"))
            order = torch.randperm(shape.batch * pages, dtype=torch.int32, device="cuda")
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(indptr, order, last, shape.q_heads, shape.kv_heads, shape.head_dim, PAGE,
                         q_data_type=torch.bfloat16, kv_data_type=dtype)
            return lambda: wrapper.run(q, cache)

        return [one() for _ in range(n)]

    return launches
