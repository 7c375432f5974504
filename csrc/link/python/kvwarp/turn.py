"""Orthonormal Hadamard rotations of a head's channels (src/hadamard.rs): outliers are spread over all of them.

Queries and keys turn together after RoPE, which leaves scores as they are; values turn in blocks of 32 channels and
outputs turn back by the same matrix.
"""
from functools import lru_cache

import torch

BLOCK = 32


@lru_cache(maxsize=None)
@torch.inference_mode(False)  # whoever asks first, all may use it
def keys(d, device):
    """[d, d] in f32, symmetric and its own inverse."""
    if d % 96 == 0:
        # Of 32 channels three times, mixed by a reflection.
        return torch.kron(torch.eye(3) - 2 / 3, _sylvester(BLOCK)).to(device)
    return _sylvester(d).to(device)


@lru_cache(maxsize=None)
@torch.inference_mode(False)  # whoever asks first, all may use it
def values(d, device):
    """[d, d] in f32, symmetric and its own inverse."""
    return torch.kron(torch.eye(d // BLOCK), _sylvester(BLOCK)).to(device)


def _sylvester(n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5
