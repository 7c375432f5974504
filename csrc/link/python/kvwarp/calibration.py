"""What `kvwarp calibrate kv` has found of a model: how to round its keys, and which heads stay at 4 bits.

The file holds `moments` [layers, kv_heads, D, D], sums of the outer products of queries after RoPE, and `losses` [layers,
kv_heads], NaN where not measured. A key's error costs what it adds to scores, so rounding follows the moments
(src/slab/feedback.rs); they are moved to other positions by RoPE itself and averaged, as engine/src/calibration.rs does.
"""
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from . import turn
from .errors import Error
from .ops import Q4

VERSION = "1"
SHIFTS = 16  # positions to which moments are moved, evenly over the context
DAMPING = 0.05  # share of the mean of the diagonal that is added to it
FINGERPRINT_BYTES = 4096  # of each layer's query weights, as their file has them


class Calibration:
    """Of the model folder that was calibrated: channels have the order of transformers, which those of a GGUF have not."""

    def __init__(self, moments, losses, inv_freq, context):
        self.moments, self.losses, self.inv_freq, self.context = moments, losses, inv_freq.double().cpu(), context

    @classmethod
    def open(cls, path, model, folder=None):
        """Of the file `path` for `model`, which must be the one that was calibrated: its shape and the query weights in its
        files say so. `folder` has these where `from_pretrained` has not loaded them."""
        config = model.config.get_text_config()
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            version, of = metadata.get("kvwarp.calibration"), metadata.get("model")
            if version != VERSION:
                raise Error("calibration", f"{path}: its version is {version}; supported: {VERSION}")
            source, numbers = folder or model.name_or_path, (layers, config.hidden_size, config.num_attention_heads, heads, d)
            here = _fingerprint(source, getattr(model.config, "_commit_hash", None), numbers)
            if of != here:
                raise Error("calibration", f"{path}: it is of model {of}, {source} is {here}; make one with "
                            f"`kvwarp calibrate kv -m {source}`")  # fmt: skip
            found = {name: file.get_tensor(name) for name in ("moments", "losses")}
        for name, shape in (("moments", (layers, heads, d, d)), ("losses", (layers, heads))):
            if tuple(found[name].shape) != shape:
                raise Error("calibration", f"{path}: {name} are {tuple(found[name].shape)}; those of the model {shape}")
        return cls(**found, inv_freq=model.base_model.rotary_emb.inv_freq, context=config.max_position_embeddings)

    def plan(self, spec, layer):
        """What `kvwarp.cache.Layer` takes of it."""
        heads = self.losses.shape[1]
        measured = [i for i in range(self.losses.numel()) if not self.losses.flatten()[i].isnan()]
        losers = sorted(measured, key=lambda i: -self.losses.flatten()[i].item())
        kept = losers[: (self.losses.numel() * spec.keep + 50) // 100]
        stores = [Q4 if layer * heads + h in kept else spec.format for h in range(heads)]
        return {"stores": stores, "feedback": self.feedback(layer) if spec.hadamard else None}

    def feedback(self, layer):
        """Weights of rounding errors of a layer's turned keys, [H, D, D] f16."""
        seen = self.moments[layer].double()
        d = seen.shape[-1]
        total = torch.zeros_like(seen)
        for shift in range(SHIFTS):
            angles = (self.context * shift // SHIFTS * self.inv_freq).repeat(2)
            eye = torch.eye(d, dtype=torch.float64)
            # Channel i rotates with i + D / 2.
            rotation = torch.diag(angles.cos()) + angles.sin()[:, None] * torch.cat([-eye[d // 2 :], eye[: d // 2]])
            total += rotation @ seen @ rotation.T
        of_keys = turn.keys(d, torch.device("cpu")).double()
        return _eliminate(of_keys @ total @ of_keys)


def _fingerprint(source, revision, numbers):
    """What the program knows a model by: its numbers, and the beginning of each layer's query weights in the files of
    `source`, a folder or what `from_pretrained` has downloaded."""
    digest = hashlib.sha256(b"".join(n.to_bytes(8, "little") for n in numbers))
    index, whole = (_cached(source, revision, name) for name in ("model.safetensors.index.json", "model.safetensors"))
    shards = json.loads(Path(index).read_text())["weight_map"] if index else {}
    for layer in range(numbers[0]):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        path = _cached(source, revision, shards.get(name)) if index else whole
        if path is None:
            raise Error("folder", f"{source or 'none'}: no safetensors with {name}, by which the model is known; give the "
                        "folder that was calibrated")  # fmt: skip
        with safe_open(path, "pt") as file:
            weights = file.get_slice(name)
            # A number takes a byte or more.
            rows = weights[: 1 + FINGERPRINT_BYTES // weights.get_shape()[1]]
        digest.update(rows.contiguous().view(torch.uint8).flatten()[:FINGERPRINT_BYTES].numpy().tobytes())
    return digest.hexdigest()


def _cached(source, revision, name):
    """Path of a file of `source`; nothing is downloaded."""
    if not source or not name:
        return None
    return cached_file(source, name, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)  # fmt: skip


def _eliminate(h):
    """`M - 1` of `h = M^T diag(w) M`, M unit lower triangular, [H, D, D] f16: errors of earlier channels that a later one
    makes up for. Zeros where `h` is zero or not finite."""
    d = h.shape[-1]
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    usable = (mean > 0) & h.isfinite().all(-1).all(-1)[:, None, None]
    eye = torch.eye(d, dtype=h.dtype)
    left, rows = torch.where(usable, h / mean + DAMPING * eye, eye), torch.zeros_like(h)
    # Backwards over the channels: eliminating the last leaves the Schur complement of the others.
    for j in reversed(range(d)):
        rows[:, j, :j] = left[:, j, :j] / left[:, j, j, None]
        left[:, :j, :j] -= left[:, j, :j, None] * rows[:, j, None, :j]
    return rows.half()
