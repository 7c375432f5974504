"""What transformers expects of a cache, on small models with random weights."""
import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from kvwarp import Error, KvwarpCache, turn
from test_hf import greedy

CONFIGS = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 50}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 with a window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "heads of 96": (LlamaConfig, {"head_dim": 96, "num_key_value_heads": 1}),
}


def small(name="llama", **options):
    torch.manual_seed(0)
    kind, own = CONFIGS[name]
    options = {"num_key_value_heads": 2, "initializer_range": 0.1, **own, **options}
    config = kind(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
                  max_position_embeddings=1024, **options)  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="kvwarp").eval()


def own(network, *arguments, **options):
    """What transformers' attention and cache say."""
    network.set_attn_implementation("sdpa")
    try:
        return greedy(network, arguments[0], None, arguments[1], **options)
    finally:
        network.set_attn_implementation("kvwarp")


def padded(*lengths):
    ids, mask = torch.randint(1, 300, (len(lengths), max(lengths))), torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    for row, n in zip(mask, lengths):
        row[: max(lengths) - n] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name):
    network = small(name, initializer_range=0.02)
    ids = torch.randint(0, 300, (2, 150))
    with torch.no_grad():
        cache = KvwarpCache("f16")
        got = [network(x, past_key_values=cache).logits for x in (ids, ids[:, :9], ids[:, :1], ids[:, 9:10])]
        network.set_attn_implementation("sdpa")
        past = network(ids, use_cache=True)
        want = [past.logits]
        want += [network(x, past_key_values=past.past_key_values).logits for x in (ids[:, :9], ids[:, :1], ids[:, 9:10])]
    for a, b in zip(got, want):
        assert ((a - b).norm() / b.norm()).item() < 2e-3
    assert cache.get_seq_length() == 161


@pytest.mark.parametrize("name, spec", [
    ("llama", "q4"), ("mistral", "f16"), ("qwen2", "q2,evict=lagkv:0.5:lag=16"), ("qwen2", "q4,evict=h2o:0.5"),
    ("llama", "q2,evict=snapkv:0.5:window=16,refine=kvcrush:0.2"), ("llama", "q4,evict=fastkv:0.4,budget=dynamickv"),
])  # fmt: skip
def test_a_padded_batch_is_its_sequences(name, spec):
    network, batch = small(name), padded(90, 130, 7)
    got = greedy(network, batch, KvwarpCache(spec), 40)
    for ids, mask, tokens in zip(*batch.values(), got):
        assert greedy(network, ids[mask.bool()][None], KvwarpCache(spec), 40) == [tokens]


def test_beams():
    network, batch = small(), padded(100, 70)
    assert greedy(network, batch, KvwarpCache("f16"), 30, num_beams=3) == own(network, batch, 30, num_beams=3)
    got = greedy(network, batch, KvwarpCache("q4"), 30, num_beams=3, num_return_sequences=2)
    assert len(got) == 4


@pytest.mark.parametrize("spec", ["f16", "q4", "q8,window=64"])
def test_drafts_are_taken_back(spec):
    network = small(initializer_range=0.02)
    ids = torch.randint(0, 300, (1, 30)).repeat(1, 6)
    want = own(network, ids, 70) if spec == "f16" else greedy(network, ids, KvwarpCache(spec), 70)
    cache = KvwarpCache(spec)
    assert greedy(network, ids, cache, 70, prompt_lookup_num_tokens=5) == want
    assert cache.get_seq_length() == sum(cache.layers[0].layer.held)


@pytest.mark.parametrize("spec, n", [("f16", 140), ("q4", 50), ("q4,window=0,sinks=512", 90), ("q2", 40)])
def test_crop_forgets(spec, n):
    # As many as leave nothing new quantised, of which nothing may then remain.
    network, ids = small(), torch.randint(0, 300, (2, 200))
    kept, cropped = KvwarpCache(spec), KvwarpCache(spec)
    with torch.no_grad():
        for cache in (kept, cropped):
            network(ids, past_key_values=cache)
        network(ids[:, :n], past_key_values=cropped)
        cropped.crop(-n)
        assert cropped.get_seq_length() == 200
        for at in range(0, 140, 2):
            a, b = (network(ids[:, at : at + 2], past_key_values=cache).logits for cache in (kept, cropped))
            assert torch.equal(a, b), at


def test_what_cannot_be_cropped_is_refused():
    network, ids = small(), torch.randint(0, 300, (1, 200))
    for spec, n in (("q4", 137), ("q2-small", 9), ("f16,evict=lagkv:0.5:lag=16", 1)):
        cache = KvwarpCache(spec)
        with torch.no_grad():
            network(ids, past_key_values=cache)
        with pytest.raises(Error, match="^crop: "):
            cache.crop(-n)
    with pytest.raises(Error, match="^tokens_to_remove: "):
        cache.crop(3)
    with pytest.raises(ValueError, match="[Cc]rop"):
        greedy(network, ids, KvwarpCache("q2-small"), 5, prompt_lookup_num_tokens=5)


def test_sequences_are_repeated_and_selected():
    network, batch = small(), padded(190, 100)
    one, many = KvwarpCache("q2,window=0"), KvwarpCache("q2,window=0")
    step = torch.tensor([[3], [5]])
    with torch.no_grad():
        for cache in (one, many):
            network(**batch, past_key_values=cache)
        many.batch_repeat_interleave(2)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        want = network(step, attention_mask=mask, past_key_values=one).logits
        got = network(step.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0), past_key_values=many).logits
        assert torch.equal(got, want.repeat_interleave(2, 0))
        many.batch_select_indices(torch.tensor([3, 0]))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        want = network(step, attention_mask=mask, past_key_values=one).logits
        got = network(step.flip(0), attention_mask=mask.flip(0), past_key_values=many).logits
        assert torch.equal(got.flip(0), want)


def test_a_prefix_is_read_once():
    network, ids = small(), torch.randint(0, 300, (1, 300))
    prefix = KvwarpCache("q4")
    with torch.no_grad():
        network(ids[:, :200], past_key_values=prefix)
    got = [greedy(network, ids[:, :n], copy.deepcopy(prefix), 10) for n in (230, 300)]
    whole = KvwarpCache("q4")
    assert prefix.get_seq_length() == 200
    with torch.no_grad():
        network(ids[:, :200], past_key_values=whole)
    assert greedy(network, ids, whole, 10) == got[1]
    whole.reset()
    assert whole.get_seq_length() == 0 and whole.bytes() == 0
    assert greedy(network, ids, whole, 10) == greedy(network, ids, KvwarpCache("q4"), 10)


def test_gradients_are_refused_when_they_are_asked_for():
    network, ids = small(), torch.randint(0, 300, (1, 100))
    turn.keys.cache_clear()
    with torch.inference_mode():
        want = network(ids, past_key_values=KvwarpCache("q4")).logits
    got = network(ids, past_key_values=KvwarpCache("q4")).logits
    assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="backward through kvwarp.prefill_attn"):
        got.sum().backward()


def test_a_prompt_in_chunks():
    network, ids = small(), torch.randint(0, 300, (1, 300))
    assert greedy(network, ids, KvwarpCache("f16"), 10, prefill_chunk_size=70) == own(network, ids, 10)


def refused(argument, network, ids, cache="q2", **options):
    with pytest.raises(Error) as raised:
        greedy(network, ids, cache and KvwarpCache(cache), 3, **options)
    assert raised.value.argument == argument, raised.value


def test_what_is_not_supported_is_refused_by_name():
    ids = torch.randint(1, 300, (2, 70))
    network = small()
    refused("past_key_values", network, ids, None)
    refused("head_dim", small(head_dim=48), ids)
    right = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    right["attention_mask"][0, -5:] = 0
    refused("attention_mask", network, right)
    whole = {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 70, 70)}
    with pytest.raises(Error, match="^attention_mask: "), torch.no_grad():
        network(**whole, past_key_values=KvwarpCache("q2"))
    network.train()
    dropping = small(attention_dropout=0.1).train()
    with pytest.raises(Error, match="^dropout: "), torch.no_grad():
        dropping(ids, past_key_values=KvwarpCache("q2"))
