"""transformers with `attn_implementation="kvwarp"`: greedy tokens against its own cache and against the program's."""
import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
from kvwarp import KvwarpCache

PROMPT = (
    "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement, never took up any book but "
    "the Baronetage; there he found occupation for an idle hour, and consolation in a distressed one. "
) * 6 + "The book that Sir Walter Elliot read was"


@pytest.fixture(scope="module")
def smollm2():
    if model.source() is None:
        assert not os.environ.get("KVW_REQUIRE_MODEL"), "no model at KVW_TEST_MODEL or in the cache folder"
        pytest.skip("no model at KVW_TEST_MODEL or in the cache folder")
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(model.folder())
    return tokenizer, AutoModelForCausalLM.from_pretrained(model.folder(), attn_implementation="kvwarp")


def read(tokenizer, prompt=PROMPT):
    return tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids


def greedy(network, batch, cache, n, **options):
    """The `n` tokens that follow the ids of `batch`, with a mask or alone."""
    batch = batch if not torch.is_tensor(batch) else {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    out = network.generate(**batch, past_key_values=cache, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                           eos_token_id=None, pad_token_id=0, **options)  # fmt: skip
    return out[:, batch["input_ids"].shape[1] :].tolist()


def forward(network, ids, cache, **options):
    with torch.no_grad():
        return network(ids, past_key_values=cache, **options).logits[0].log_softmax(-1)


def program(*arguments):
    """What a command of the program prints as JSON, of the same weights and tokens."""
    found = os.environ.get("KVWARP_PROGRAM")
    if not found:
        assert not os.environ.get("KVW_REQUIRE_MODEL"), "KVWARP_PROGRAM names no program"
        pytest.skip("KVWARP_PROGRAM names no program")
    command = [found, *arguments, "-t", "2", "--activations", "f32", "--json", "-m", model.folder()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_f16_says_what_transformers_own_cache_says(smollm2):
    tokenizer, network = smollm2
    ids = read(tokenizer)
    got = greedy(network, ids, KvwarpCache("f16"), 24)
    network.set_attn_implementation("sdpa")
    want = greedy(network, ids, None, 24)
    network.set_attn_implementation("kvwarp")
    assert got == want


@pytest.mark.parametrize("spec, tie", [("f16", 1e-3), ("q4", 0.02), ("q2", 0.3), ("q2,evict=lagkv:0.5:lag=32", 0.3)])
def test_the_program_says_the_same(smollm2, spec, tie):
    # Sums and f16 roundings of queries differ, which moves codes where they are at the edge: tokens may fall otherwise at ties.
    tokenizer, network = smollm2
    said = program("generate", "--no-chat", "--temp", "0", "-n", "24", "--cache", spec, "-p", PROMPT)["tokens"]
    ids, cache = torch.cat([read(tokenizer), torch.tensor([said])], 1), KvwarpCache(spec)
    # The program reads all but the last token of a prompt, and that one with what is then in the cache.
    start = ids.shape[1] - len(said) - 1
    forward(network, ids[:, :start], cache, logits_to_keep=1)
    gaps = []
    for at, token in enumerate(said, start):
        predicted = forward(network, ids[:, at : at + 1], cache)[0]
        gaps.append((predicted.max() - predicted[token]).item())
    assert max(gaps) < tie, gaps
    assert sum(gap == 0 for gap in gaps) >= 22, gaps


@pytest.mark.parametrize("spec, within", [("q4", 0.1), ("q2", 0.1)])
def test_predictions_are_as_far_from_f16_as_those_of_the_program(smollm2, tmp_path, spec, within):
    tokenizer, network = smollm2
    text = (model.PAGES / "README.md").read_text()
    ids = read(tokenizer, text)[:, :384]
    (tmp_path / "text").write_text(tokenizer.decode(ids[0]))
    assert read(tokenizer, tokenizer.decode(ids[0])).tolist() == ids.tolist()

    def predictions(spec):
        cache = KvwarpCache(spec)
        return torch.cat([forward(network, piece, cache) for piece in ids.split(64, 1)])[:-1]

    exact, got = predictions("f16"), predictions(spec)
    divergence = (exact.exp() * (exact - got)).sum(-1).mean().item()
    surprise = -got.gather(1, ids[0, 1:, None]).mean().item()
    want = program("perplexity", "-f", tmp_path / "text", "--cache", spec, "-b", "64", "--kl")
    assert surprise == pytest.approx(want["log_perplexity"], abs=0.02)
    assert divergence == pytest.approx(want["kl"], rel=within)


def test_fewer_bits_take_fewer_bytes(smollm2):
    tokenizer, network = smollm2
    sizes = {}
    for spec in ("f16", "q8", "q4", "q2", "q2,evict=lagkv:0.25:lag=32"):
        cache = KvwarpCache(spec)
        assert len(greedy(network, read(tokenizer), cache, 4)[0]) == 4
        sizes[spec] = cache.bytes()
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True), sizes
    assert cache.get_seq_length() > cache.layers[0].layer.held[0], "positions go on past what is held"
