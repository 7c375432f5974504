"""Hugging Face transformers: `KvwarpCache`, and the attention function that reads it.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvwarp")
    model.generate(**inputs, past_key_values=KvwarpCache("q2"))

Importing this module registers `attn_implementation="kvwarp"`. Llama, Mistral and Qwen2, and what else computes attention
with rotary keys, causal, without soft caps. A batch may be padded on the left.
"""
from functools import partial

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from .cache import Layer, Spec
from .errors import Error


class KvwarpLayer(CacheLayerMixin):
    """One layer. `update` hands the new tokens on with the layer: attention puts them into the cache as it reads it."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, spec):
        super().__init__()
        self.spec, self.layer, self.length = spec, None, 0

    def lazy_initialization(self, key_states, value_states):
        batch, heads, _, head_dim = key_states.shape
        self.layer = Layer(self.spec, batch, heads, head_dim, key_states.device)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if self.layer is None:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        key_states = key_states.view(key_states.shape)  # an object of our own to hang the layer on
        key_states.kvwarp_layer = self
        return key_states, value_states

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def reset(self):
        self.layer, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx):
        raise Error("num_beams", "beam search reorders sequences, which slabs do not")

    def crop(self, tokens_to_remove):
        raise Error("assistant_model", "assisted generation takes tokens back, which packed slabs do not give")

    def batch_repeat_interleave(self, repeats):
        raise Error("num_return_sequences", "sequences of a KvwarpCache cannot be repeated")

    def batch_select_indices(self, indices):
        raise Error("indices", "sequences of a KvwarpCache cannot be taken out")

    def offload(self):
        raise Error("offloading", "a KvwarpCache stays where its model is")


class KvwarpCache(Cache):
    """The cache of a model, by a spec such as `"q2,window=128"`: see `kvwarp.cache.Spec`."""

    def __init__(self, spec="q2"):
        self.spec = spec if isinstance(spec, Spec) else Spec.parse(spec)
        super().__init__(layer_class_to_replicate=partial(KvwarpLayer, self.spec))

    def bytes(self):
        """Of all layers: slabs and rings in use."""
        return sum(layer.layer.bytes() for layer in self.layers if layer.layer is not None)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **kwargs):
    """query [S, q_heads, T, D], key and value [S, H, T, D], the new tokens alone: [S, T, q_heads, D]."""
    held = getattr(key, "kvwarp_layer", None)
    if held is None:
        raise Error("past_key_values", 'attn_implementation="kvwarp" reads a KvwarpCache alone')
    if dropout:
        raise Error("dropout", f"{dropout}; supported: 0")
    if softcap:
        raise Error("softcap", f"{softcap}; supported: none")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise Error("is_causal", "attention of both directions")
    layer, (seqs, heads, count, head_dim) = held.layer, key.shape
    scale = head_dim**-0.5 if scaling is None else scaling
    window = sliding_window or 0
    real = _real(attention_mask, seqs, count)
    # [S, T, heads, D] in 16 bits.
    q, k, v = (x.transpose(1, 2).to(_narrow(x.dtype)).contiguous() for x in (query, key, value))
    if count == 1 and (real is None or bool(real.all())):
        out = layer.append(k[:, 0], v[:, 0], q, scale, window)
        return out.to(query.dtype), None
    if real is None:
        counts, rows = [count] * seqs, slice(None)
    else:
        counts, rows = real.sum(dim=1).tolist(), real.flatten()
    if min(counts) == 0:
        raise Error("attention_mask", "a sequence without tokens")
    k, v, q = (x.flatten(0, 1)[rows].contiguous() for x in (k, v, q))
    some = layer.extend(k, v, q, counts, scale, window)
    out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    out.flatten(0, 1)[rows] = some.to(query.dtype)
    return out, None


def _narrow(dtype):
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _real(attention_mask, seqs, count):
    """Which of the new tokens are no padding, [S, T]; None where all are."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != seqs or attention_mask.shape[1] < count:
        raise Error("attention_mask", f"shape is {tuple(attention_mask.shape)}; supported: [batch, tokens], padding alone")
    real = attention_mask[:, -count:].bool()
    if bool((real[:, 1:] < real[:, :-1]).any()):
        raise Error("attention_mask", "padding after tokens; pad on the left")
    return None if bool(real.all()) else real


AttentionInterface.register("kvwarp", attention)
AttentionMaskInterface.register("kvwarp", flash_attention_mask)
