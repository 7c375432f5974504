"""Kernels for compressed KV caches.

`kvwarp.abi` is the C ABI and needs nothing; `kvwarp.ops` and `kvwarp.scores` are its ops on torch tensors, CPU and CUDA;
`kvwarp.cache` is a cache of one layer made of them; `kvwarp.hf` plugs it into transformers. `KvwarpCache` is that of `kvwarp.hf`.
"""
from .abi import ABI_VERSION, devices
from .errors import Error, VersionError

__all__ = ["ABI_VERSION", "Error", "VersionError", "devices"]


def __getattr__(name):
    if name == "KvwarpCache":
        from .hf import KvwarpCache

        return KvwarpCache
    raise AttributeError(name)
