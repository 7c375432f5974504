"""transformers with `attn_implementation="kvwarp"`: greedy tokens against its own cache and against the program's."""
import hashlib
import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import model
from kvwarp import Error, KvwarpCache
from kvwarp.cache import Layer
from kvwarp.calibration import Calibration

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


@pytest.mark.parametrize("spec, tie", [
    ("f16", 1e-3), ("q4", 0.02), ("q2", 0.3), ("q2,evict=lagkv:0.5:lag=32", 0.3), ("q4,evict=snapkv:0.3:window=16", 0.02),
])  # fmt: skip
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


def text_of(tokenizer, folder):
    """384 tokens, as ids and as a file."""
    ids = read(tokenizer, (model.PAGES / "README.md").read_text())[:, :384]
    text = tokenizer.decode(ids[0])
    (folder / "text").write_text(text)
    assert read(tokenizer, text).tolist() == ids.tolist()
    return ids


def pieces(network, ids, cache):
    """Log-probabilities after each token but the last, 64 read at a time."""
    return torch.cat([forward(network, piece, cache) for piece in ids.split(64, 1)])[:-1]


def divergence(exact, got):
    return (exact.exp() * (exact - got)).sum(-1).mean().item()


@pytest.mark.parametrize("spec", ["q4", "q2"])
def test_predictions_are_as_far_from_f16_as_those_of_the_program(smollm2, tmp_path, spec):
    tokenizer, network = smollm2
    ids = text_of(tokenizer, tmp_path)
    exact, got = (pieces(network, ids, KvwarpCache(s)) for s in ("f16", spec))
    want = program("perplexity", "-f", tmp_path / "text", "--cache", spec, "-b", "64", "--kl")
    assert -got.gather(1, ids[0, 1:, None]).mean().item() == pytest.approx(want["log_perplexity"], abs=0.02)
    assert divergence(exact, got) == pytest.approx(want["kl"], rel=0.1)


def test_fewer_bits_take_fewer_bytes(smollm2):
    tokenizer, network = smollm2
    sizes = {}
    for spec in ("f16", "q8", "q4", "q2", "q2,evict=lagkv:0.25:lag=32"):
        cache = KvwarpCache(spec)
        assert len(greedy(network, read(tokenizer), cache, 4)[0]) == 4
        sizes[spec] = cache.bytes()
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True), sizes
    assert cache.get_seq_length() > cache.layers[0].layer.held[0], "positions go on past what is held"


def known_by(network):
    """What the program knows a model by whose weights are as its files have them."""
    config = network.config
    numbers = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
               config.head_dim)  # fmt: skip
    fingerprint = hashlib.sha256(b"".join(n.to_bytes(8, "little") for n in numbers))
    for layer in network.model.layers:
        fingerprint.update(layer.self_attn.q_proj.weight.detach().view(torch.uint8).numpy().tobytes()[:4096])
    return fingerprint.hexdigest()


def calibrated(network, ids, path):
    """A calibration as the program writes it, of the queries of `ids`; every third head loses most."""
    seen, extend = [], Layer.extend

    def record(self, k, v, q, *rest):
        heads = q.double().unflatten(1, (k.shape[1], -1)).transpose(0, 1).flatten(1, 2)
        seen.append(heads.transpose(1, 2) @ heads)
        return extend(self, k, v, q, *rest)

    Layer.extend = record
    try:
        forward(network, ids, KvwarpCache("f16"))
    finally:
        Layer.extend = extend
    moments = torch.stack(seen).float()
    losses = torch.arange(moments.shape[0] * moments.shape[1]).float().view(moments.shape[:2]) % 3
    metadata = {"kvwarp.calibration": "1", "model": known_by(network), "text": "", "tokens": str(ids.shape[1])}
    save_file({"moments": moments, "losses": losses}, path, metadata)


def test_a_calibration_rounds_as_the_program_does(smollm2, tmp_path):
    tokenizer, network = smollm2
    ids = text_of(tokenizer, tmp_path)
    calibrated(network, ids, tmp_path / "kv")
    spec, exact = "q2-small,keep=30", pieces(network, ids, KvwarpCache("f16"))
    without = divergence(exact, pieces(network, ids, KvwarpCache(spec)))
    got = divergence(exact, pieces(network, ids, KvwarpCache(spec, Calibration.open(tmp_path / "kv", network))))
    asked = ("perplexity", "-f", tmp_path / "text", "--cache", spec, "-b", "64", "--kl", "--calibration", tmp_path / "kv")
    assert got == pytest.approx(program(*asked)["kl"], rel=0.1)
    assert got < 0.7 * without


def test_a_calibration_of_another_model_is_refused(tmp_path):
    def saved(seed, name, **options):
        torch.manual_seed(seed)
        config = LlamaConfig(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=20)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / name, **options)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)

    one, other = saved(0, "one"), saved(1, "other", max_shard_size="60KB")
    assert (tmp_path / "other/model.safetensors.index.json").exists()

    def written(heads=2, version="1", of=one):
        metadata = {"kvwarp.calibration": version, "model": known_by(of)}
        save_file({"moments": torch.zeros(2, heads, 64, 64), "losses": torch.zeros(2, heads)}, tmp_path / "kv", metadata)
        return tmp_path / "kv"

    for network in (one, other):
        assert len(Calibration.open(written(of=network), network).losses) == 2
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert len(Calibration.open(written(), wide).losses) == 2, "files say what model it is, not what was made of them"
    unsaved = AutoModelForCausalLM.from_config(one.config)
    unsaved.config._name_or_path = unsaved.name_or_path = ""
    assert len(Calibration.open(written(), unsaved, folder=tmp_path / "one").losses) == 2
    for argument, options, network, why in (
        ("calibration", {"version": "2"}, one, "version"),
        ("calibration", {"heads": 1}, one, "moments are"),
        ("calibration", {}, other, "of model .*kvwarp calibrate kv -m .*other"),
        ("folder", {}, unsaved, "none: no safetensors"),
    ):
        with pytest.raises(Error, match=f"^{argument}: .*{why}"):
            Calibration.open(written(**options), network)
