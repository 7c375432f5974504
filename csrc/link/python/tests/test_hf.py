"""transformers with `attn_implementation="kvwarp"`: greedy tokens against its own cache and against the program's."""
import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config

import model
from kvwarp import Error, KvwarpCache

PROMPT = (
    "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement, never took up any book but "
    "the Baronetage; there he found occupation for an idle hour, and consolation in a distressed one. "
) * 6 + "The book that Sir Walter Elliot read was"


@pytest.fixture(scope="module")
def smollm2():
    if model.source() is None:
        pytest.skip("no model at KVW_TEST_MODEL or in the cache folder")
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(model.folder())
    return tokenizer, AutoModelForCausalLM.from_pretrained(model.folder(), attn_implementation="kvwarp")


def generate(tokenizer, network, cache, n=24, prompt=PROMPT):
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    out = network.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=n, min_new_tokens=n,
                           do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def of_program(cache, n=24):
    program = os.environ.get("KVWARP_PROGRAM")
    if not program:
        pytest.skip("KVWARP_PROGRAM names no program")
    out = subprocess.run(
        [program, "generate", "--no-chat", "-t", "2", "--temp", "0", "-n", str(n), "--activations", "f32", "--cache", cache,
         "--json", "-m", model.source(), "-p", PROMPT], check=True, capture_output=True)  # fmt: skip
    return json.loads(out.stdout)["tokens"]


def agree(a, b):
    """Tokens alike before the first that is not."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))


def test_f16_says_what_transformers_own_cache_says(smollm2):
    tokenizer, network = smollm2
    got = generate(tokenizer, network, KvwarpCache("f16"))
    network.set_attn_implementation("sdpa")
    want = generate(tokenizer, network, None)
    network.set_attn_implementation("kvwarp")
    assert got == want


@pytest.mark.parametrize("ours, of_theirs, least", [("f16", "f16", 24), ("q4", "q4,hadamard=off", 4), ("q2", "q2-kivi", 4)])
def test_the_program_says_the_same(smollm2, ours, of_theirs, least):
    # Weights are the same numbers, sums are not: near ties may fall otherwise, later ones more often at fewer bits.
    got, want = generate(*smollm2, KvwarpCache(ours)), of_program(of_theirs)
    assert agree(got, want) >= least, (smollm2[0].decode(got), smollm2[0].decode(want))


def test_fewer_bits_take_fewer_bytes(smollm2):
    sizes = {}
    for spec in ("f16,window=64", "q4,window=64", "q2,window=64", "q2,window=64,evict=lagkv:0.5"):
        cache = KvwarpCache(spec)
        assert len(generate(*smollm2, cache, n=4)) == 4
        sizes[spec] = cache.bytes()
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True), sizes
    assert cache.get_seq_length() > cache.layers[0].layer.held[0], "positions go on past what is held"


def test_a_padded_batch_is_its_sequences(smollm2):
    tokenizer, network = smollm2
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.decode([0]), "left"
    prompts = ["The capital of France is", PROMPT[:300]]
    batch = tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True)
    out = network.generate(**batch, past_key_values=KvwarpCache("f16"), max_new_tokens=8, min_new_tokens=8, do_sample=False,
                           pad_token_id=0, eos_token_id=None)  # fmt: skip
    for i, prompt in enumerate(prompts):
        alone = generate(tokenizer, network, KvwarpCache("f16"), n=8, prompt=prompt)
        assert out[i, batch.input_ids.shape[1] :].tolist() == alone


@pytest.mark.parametrize("config, options", [(LlamaConfig, {}), (MistralConfig, {"sliding_window": 50}), (Qwen2Config, {})])
def test_architectures(config, options):
    torch.manual_seed(0)
    small = config(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                   vocab_size=300, max_position_embeddings=512, **options)  # fmt: skip
    network = AutoModelForCausalLM.from_config(small, attn_implementation="kvwarp").eval()
    ids = torch.randint(0, 300, (1, 150))
    with torch.no_grad():
        cache = KvwarpCache("f16")
        got = [network(ids, past_key_values=cache).logits, network(ids[:, :1], past_key_values=cache).logits]
        network.set_attn_implementation("sdpa")
        own = network(ids, use_cache=True)
        want = [own.logits, network(ids[:, :1], past_key_values=own.past_key_values).logits]
    for a, b in zip(got, want):
        assert ((a - b).norm() / b.norm()).item() < 2e-3


def test_what_is_not_supported_is_refused_by_name(smollm2):
    tokenizer, network = smollm2
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for argument, options in (("num_beams", {"num_beams": 2}), ("past_key_values", {"past_key_values": None})):
        options = {"past_key_values": KvwarpCache("q2"), **options}
        with pytest.raises(Error) as raised:
            network.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, **options)
        assert raised.value.argument == argument
