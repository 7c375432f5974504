"""PyTorch's scaled_dot_product_attention on contiguous f16 and bf16: flash and cuDNN backends, never math.

Install: python3 -m pip install torch (a CUDA build).
"""
from common import DECODE, PREFILL, Skip, copies

try:
    import torch
except ImportError:
    torch = None

NAME = "PyTorch SDPA"


def cases():
    """(kernel, shape, bits, set up): `set up(card)` gives a launch a copy of the inputs."""
    if torch is None:
        raise Skip("PyTorch is not installed")
    from torch.nn.attention import SDPBackend

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for shape in DECODE + PREFILL:
        for backend, which in backends.items():
            for element, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
                if element == "f16" or shape == DECODE[0]:
                    yield f"sdpa_{backend}_{element}", shape, 16, set_up(shape, which, dtype)


def set_up(shape, backend, dtype):
    def launches(card):
        from torch.nn.attention import sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention as attention

        def randn(heads, tokens):
            size = (shape.batch, heads, tokens, shape.head_dim)
            return torch.randn(size, dtype=dtype, device="cuda")

        q = randn(shape.q_heads, shape.queries)
        n = copies(shape.cache_bytes(16), card.l2, card.free())
        caches = [(randn(shape.kv_heads, shape.context), randn(shape.kv_heads, shape.context)) for _ in range(n)]

        def launch(k, v):
            with sdpa_kernel([backend]):
                return attention(q, k, v, is_causal=shape.queries > 1, enable_gqa=True)

        return [lambda k=k, v=v: launch(k, v) for k, v in caches]

    return launches
