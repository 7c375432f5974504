"""BitDecoding's own 2-bit kernel, groups of 128 (arXiv:2503.18773), on a cache packed by its own packer.

Install: git clone --recursive https://github.com/DD-DuDa/BitDecoding; then python3 setup.py install.
"""
from common import DECODE, Skip, copies

try:
    import torch
except ImportError:
    torch = None

NAME = "BitDecoding"
BITS, GROUP = 2, 128
EFFECTIVE_BITS = BITS + 32 / GROUP


def cases():
    if torch is None:
        raise Skip("PyTorch is not installed")
    try:
        import bit_decode  # noqa: F401
    except ImportError as e:
        raise Skip(f"{e}: see the top of bitdecoding.py") from e
    for shape in DECODE:
        yield "bitdecoding_q2g128", shape, EFFECTIVE_BITS, set_up(shape)


def set_up(shape):
    def launches(card):
        import bit_decode

        b, n, h, d, codes = shape.batch, shape.context, shape.kv_heads, shape.head_dim, 16 // BITS
        q = torch.randn(b, 1, shape.q_heads, d, dtype=torch.float16, device="cuda")
        ends = torch.arange(0, (b + 1) * n, n, dtype=torch.int32, device="cuda")

        def one():
            k, v = (torch.randn(b, n, h, d, dtype=torch.float16, device="cuda") for _ in range(2))
            empty = torch.zeros
            k_pack = empty(b, n // codes, h, d, dtype=torch.uint16, device="cuda")
            k_meta = empty(b, n // GROUP, h, d, dtype=torch.float32, device="cuda")
            v_pack = empty(b, n, h, d // codes, dtype=torch.uint16, device="cuda")
            v_meta = empty(b, d // GROUP, h, n, dtype=torch.float32, device="cuda")
            bit_decode.kvcache_pack_int(k, k_pack, k_meta, v, v_pack, v_meta, None, ends, n, "k-channel", GROUP, BITS)
            torch.cuda.synchronize()
            if not bool((k_pack.view(torch.int16) != 0).any()):
                raise Skip("its packer wrote nothing: a build without this group size")
            return lambda: bit_decode.fwd_kvcache_int(
                q, k_pack, k_meta, v_pack, v_meta, softmax_scale=d**-0.5, quant_mode="k-channel",
                group_size=GROUP, num_bits=BITS)

        return [one() for _ in range(copies(shape.cache_bytes(EFFECTIVE_BITS), card.l2, card.free()))]

    return launches
