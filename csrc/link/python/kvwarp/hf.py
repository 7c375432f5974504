"""Hugging Face transformers: `KvwarpCache`, and the attention function that reads it.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvwarp")
    model.generate(**inputs, past_key_values=KvwarpCache("q2"))

Importing this module registers `attn_implementation="kvwarp"`. Llama, Mistral and Qwen2, and what else computes attention
with rotary keys, causal, without soft caps. A batch may be padded on the left.
"""
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from .budget import settle
from .cache import Layer
from .errors import Error
from .ops import F16
from .spec import Spec


class KvwarpLayer(CacheLayerMixin):
    """One layer. `update` hands the new tokens on with the layer: attention puts them into the cache as it reads it."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, spec, plan=None, beside=()):
        super().__init__()
        self.spec, self.plan, self.beside, self.layer, self.length = spec, plan or {}, beside, None, 0
        # Of q2-small any token may be the last of a quantised slab; drafts are read with a prompt, and chosen among with it.
        self.is_croppable = not spec.selects and (spec.format == F16 or spec.window >= 64)

    def lazy_initialization(self, key_states, value_states):
        batch, heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise Error("value_states", f"heads of {value_states.shape[-1]} channels, those of keys have {head_dim}")
        self.layer = Layer(self.spec, batch, heads, head_dim, key_states.device, **self.plan)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if self.layer is None:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        key_states = key_states.view(key_states.shape)  # an object of our own to hang the layer on
        key_states.kvwarp_layer = self
        return key_states, value_states

    def settle(self, layers):
        """The last of `layers` has read: what each of them keeps of each sequence follows from the scores of all."""
        all = [beside.layer for beside in self.beside]
        if len(all) != layers or any(layer is None or layer.waiting is None for layer in all):
            raise Error("budget", f"{self.spec.budget} asks for all {layers} layers of a model in one process")
        scored = [layer.waiting[2] for layer in all]
        budgets = {i: zip(*settle(self.spec.budget, [of[i] for of in scored])) for i in scored[0]}
        for layer, of in zip(all, zip(*budgets.values())):
            layer.settle(dict(zip(budgets, of)))

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def reset(self):
        self.layer, self.length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove):
        if tokens_to_remove > 0:
            raise Error("tokens_to_remove", f"{tokens_to_remove}; supported: minus the number of tokens to forget")
        if self.layer is not None:
            self.layer.crop(-tokens_to_remove)
            self.length += tokens_to_remove

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        if self.layer is not None:
            self.layer.select(i for i in range(self.layer.shape[0]) for _ in range(repeats))

    def batch_select_indices(self, indices):
        if self.layer is not None:
            self.layer.select(indices)

    def offload(self):
        raise Error("offloading", "a KvwarpCache stays where its model is")


class KvwarpCache(Cache):
    """The cache of a model, by a spec such as `"q2,window=128"` (`kvwarp.spec`) and, where there is one, a
    `kvwarp.calibration.Calibration`."""

    def __init__(self, spec="q2", calibration=None):
        self.spec = spec if isinstance(spec, Spec) else Spec.parse(spec)
        self.calibration = calibration
        super().__init__(layer_class_to_replicate=self._next_layer)

    def _next_layer(self):
        plan = self.calibration.plan(self.spec, len(self.layers)) if self.calibration else None
        return KvwarpLayer(self.spec, plan, self.layers)

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
    if window and layer.spec.selects and held.length > window:
        raise Error("sliding_window", f"{window}, counted by position: no more tokens than that where evict drops some")
    whole = getattr(module.config, "num_key_value_heads", heads)
    if layer.spec.refine and (heads != whole or heads > 32):
        raise Error("refine", f"compares all kv heads of a layer, up to 32; here are {heads} of {whole}")
    if layer.spec.waits and heads != whole:
        raise Error("budget", f"{layer.spec.budget} asks for all kv heads of a layer; here are {heads} of {whole}")
    real = _real(attention_mask, seqs, count)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [S, T, heads, D]
    if count == 1 and not any(layer.fresh) and (real is None or bool(real.all())):
        return layer.append(k[:, 0], v[:, 0], q, scale, window), None
    if real is None:
        counts, rows = [count] * seqs, slice(None)
    else:
        counts, rows = real.sum(dim=1).tolist(), real.flatten()
    if min(counts) == 0:
        raise Error("attention_mask", "a sequence without tokens")
    k, v, q = (x.flatten(0, 1)[rows] for x in (k, v, q))
    place = module.layer_idx, module.config.num_hidden_layers
    some = layer.extend(k, v, q, counts, scale, window, place)
    if layer.waiting and place[0] == place[1] - 1:
        held.settle(place[1])
    out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    out.flatten(0, 1)[rows] = some
    return out, None


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
