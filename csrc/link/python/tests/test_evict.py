"""Which tokens stay of what is read first: against the methods written in f64, and against the program's predictions."""
import pytest
import torch

import model
import test_hf
from kvwarp import Error, KvwarpCache, scores
from kvwarp.cache import Layer
from kvwarp.spec import Spec
from test_cache import small
from test_hf import divergence, forward, greedy, program, smollm2  # noqa: F401
from test_ops import D, GROUP, HEADS, attention, random, relative, tokens, valid


def weights(k, q, rows):
    """What the newest `rows` queries give to each token, [q_heads, rows, n]; f64."""
    n, k = len(k), k.double().repeat_interleave(GROUP, 1)
    every = torch.einsum("qhd,khd->hqk", q[-rows:].double(), k) * D**-0.5
    hidden = torch.arange(n) > torch.arange(n - min(rows, n), n)[:, None]
    return every.masked_fill(hidden, -torch.inf).softmax(-1)


def pooled(sums, width, most):
    """Of [..., n], outside as zeros that are divided by too, or left out."""
    beside = torch.nn.functional.pad(sums, [width // 2] * 2, value=-torch.inf if most else 0).unfold(-1, width, 1)
    return beside.amax(-1) if most else beside.mean(-1)


def window(rows, width, most):
    def score(k, v, q):
        sums = weights(k, q, rows).sum(1)[:, : max(0, len(k) - rows)]
        return (pooled(sums, width, most) if sums.shape[1] else sums).unflatten(0, (HEADS, GROUP)).sum(1)

    return score


def columns(k, v, q):
    return weights(k, q, len(q)).sum(1).unflatten(0, (HEADS, GROUP)).sum(1)


def ranked(k, v, q, lag=16, sink=4):
    """LagKV's scores of each partition against the next, as ranks within it; the newer the better where there are not two."""
    parts = (len(k) - sink) // lag - 1
    if parts < 1:
        return torch.arange(len(k) - sink).expand(HEADS, -1)
    total = 0
    for x in (k, v):
        x = x[sink : sink + (parts + 1) * lag].double().transpose(0, 1).unflatten(1, (parts + 1, lag))
        low, high = x[:, 1:].amin(2, keepdim=True), x[:, 1:].amax(2, keepdim=True)
        total = total + ((x[:, :-1] - low) / (high - low)).std(-1).softmax(-1)
    return (total[..., None] > total[..., None, :]).sum(-1).flatten(1)


# Scores [HEADS, ...] of those tokens that are not always kept, and how many are at the beginning and the end.
METHODS = {
    "snapkv:0.5:window=16": (window(16, 5, False), 0, lambda n: 16),
    "fastkv:0.3": (window(8, 7, True), 0, lambda n: 8),
    "h2o:0.25": (columns, 0, lambda n: n // 4 // 2),
    "keynorm:0.5": (lambda k, v, q: -k.double().norm(dim=-1).T, 0, lambda n: 0),
    "lagkv-kvpress:0.4:lag=16": (ranked, 4, lambda n: 16 + (n - 4) % 16 if n >= 36 else 0),
    "streaming:0.25:sink=7": (lambda k, v, q: torch.arange(len(k) - 7).expand(HEADS, -1), 7, lambda n: 0),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_what_the_method_says(method):
    torch.manual_seed(2)
    score, oldest, newest = METHODS[method]
    layer, counts = Layer(Spec.parse(f"f16,evict={method}"), 3, HEADS, D, "cpu"), [300, 90, 9]
    parts, later = [tokens(n) for n in counts], [tokens(1) for _ in counts]
    joined = lambda some: [torch.cat([part[i] for part in some]) for i in range(3)]
    exact = layer.extend(*joined(parts), counts, D**-0.5)
    assert relative(exact, torch.cat([attention(q, k, v, D**-0.5) for k, v, q in parts])) < 1e-3, "a first read is exact"
    k, v, q = joined(later)
    got = layer.append(k, v, q[:, None], D**-0.5)[:, 0]
    for i, ((k, v, q), (k1, v1, q1), n) in enumerate(zip(parts, later, counts)):
        share = float(method.split(":")[1])
        end = n - newest(n)
        best = min(max(0, end - oldest), max(0, int(n * share) - oldest - newest(n)))
        order = score(k, v, q)[:, : max(0, end - oldest)].sort(dim=-1, descending=True, stable=True).indices
        stay = [sorted(set(range(min(oldest, n))) | {oldest + j for j in row[:best].tolist()} | set(range(max(0, end), n)))
                for row in order]  # fmt: skip
        assert layer.held[i] == len(stay[0]) + 1
        k, v = (torch.cat([torch.stack([x[row, h] for h, row in enumerate(stay)], 1), x1]) for x, x1 in ((k, k1), (v, v1)))
        assert relative(got[i][None], attention(q1, k, v, D**-0.5)) < 1e-3, i


SPECS = [
    "q2,evict=snapkv:0.5:max=on:pool=3:window=32", "q4,evict=fastkv:0.3,budget=pyramid",
    "f16,evict=h2o:0.25,refine=kvcrush:0.3:random", "f16,evict=fastkv:0.25,refine=kvcrush:0.5", "f16,evict=keynorm:0.5",
    "f16,evict=streaming:0.25", "f16,evict=random:0.5:seed=3", "f16,evict=lagkv-kvpress:0.5:lag=32",
    "q4,evict=snapkv:0.4,budget=prefixkv", "f16,evict=h2o:0.05,refine=kvcrush:0.5,budget=dynamickv",
]  # fmt: skip
PREFIX = 256


@pytest.fixture(scope="module")
def read_by(smollm2, tmp_path_factory):  # noqa: F811
    """A text, where it lies, and predictions after a prefix of it and the tokens that follow."""
    folder = tmp_path_factory.mktemp("evict")
    tokenizer, network = smollm2
    ids = test_hf.read(tokenizer, (model.PAGES / "README.md").read_text())[:, :304]
    (folder / "text").write_text(tokenizer.decode(ids[0]))

    def predictions(spec):
        cache = KvwarpCache(spec)
        rows = [forward(network, ids[:, :PREFIX], cache, logits_to_keep=1)]
        rows += [forward(network, piece, cache) for piece in ids[:, PREFIX:].split(16, 1)]
        return torch.cat(rows)[:-1], cache

    return ids[0, PREFIX:], folder / "text", predictions, predictions("f16")[0]


@pytest.mark.parametrize("spec", SPECS)
def test_predictions_are_those_of_the_program(read_by, spec):
    targets, text, predictions, exact = read_by
    got, cache = predictions(spec)
    want = program("perplexity", "-f", text, "--cache", spec, "-b", "16", "--prefix", str(PREFIX), "--kl")
    # Sums differ in their last bits: few tokens that are as good as others are chosen otherwise.
    assert max(layer.layer.held[0] for layer in cache.layers) == pytest.approx(want["kv_tokens"], abs=2)
    assert divergence(exact, got) == pytest.approx(want["kl"], rel=0.05)
    assert -got.gather(1, targets[:, None]).mean().item() == pytest.approx(want["log_perplexity"], abs=0.005)


def test_what_has_been_chosen_is_not_taken_back():
    network, ids = small(), torch.randint(0, 300, (1, 200))
    kept, cropped = (KvwarpCache("f16,evict=snapkv:0.4:window=8") for _ in range(2))
    with torch.no_grad():
        for cache in (kept, cropped):
            network(ids, past_key_values=cache)
        network(ids[:, :70], past_key_values=cropped)
        cropped.crop(-70)
        assert cropped.get_seq_length() == 200 and cropped.layers[0].layer.held == [80]
        a, b = (network(ids[:, :2], past_key_values=cache).logits for cache in (kept, cropped))
        assert torch.equal(a, b)
    with pytest.raises(Error, match="^crop: "):
        cropped.crop(-3)
    with pytest.raises(ValueError, match="[Cc]rop"):
        greedy(network, ids, KvwarpCache("f16,evict=snapkv:0.4"), 5, prompt_lookup_num_tokens=5)


def test_what_is_read_later_stays():
    network, ids = small(), torch.randint(0, 300, (1, 300))
    cache = KvwarpCache("q4,evict=h2o:0.25,window=64")
    held = []
    with torch.no_grad():
        for piece in ids.split([1, 199, 100], 1):
            network(piece, past_key_values=cache)
            held.append(cache.layers[1].layer.held[0])
        cache.reset()
        network(ids[:, :200], past_key_values=cache)
        network(ids[:, 200:], past_key_values=cache)
    # A quarter of one token is none.
    assert held == [0, 199, 299] and cache.layers[1].layer.held == [150]


def test_what_a_choice_does_not_go_with_is_refused():
    ids = torch.randint(0, 300, (1, 70))

    def refused(argument, network, cache):
        with pytest.raises(Error, match=f"^{argument}: "), torch.no_grad():
            network(ids, past_key_values=cache)

    refused("sliding_window", small("mistral"), KvwarpCache("f16,evict=streaming:0.5"))
    with torch.no_grad():
        small("mistral")(ids[:, :50], past_key_values=KvwarpCache("f16,evict=streaming:0.5"))
    # As where another process has half of the heads, or of the layers.
    half = small()
    half.config.num_key_value_heads = 4
    refused("refine", half, KvwarpCache("f16,evict=h2o:0.5,refine=kvcrush:0.5"))
    refused("budget", half, KvwarpCache("f16,evict=h2o:0.5,budget=prefixkv"))
    first, last, cache = small(), small(), KvwarpCache("f16,evict=h2o:0.5,budget=dynamickv")
    first.config.num_hidden_layers = last.config.num_hidden_layers = 4
    with torch.no_grad():
        first(ids, past_key_values=cache)
    refused("budget", first, cache)
    for layer in last.model.layers:
        layer.self_attn.layer_idx += 2
    refused("budget", last, KvwarpCache("f16,evict=h2o:0.5,budget=dynamickv"))


@pytest.mark.parametrize("argument, spec, why", [
    ("evict", "q2,evict=kvzip:0.5", "say the text again"), ("evict", "q2,evict=snapvk:0.5", "supported: lagkv, "),
    ("evict", "q2,evict=snapkv", "snapkv:SHARE"), ("evict", "q2,evict=snapkv:0.5:lag=32", "window, pool, max"),
    ("evict", "q2,evict=snapkv:0.5:pool=4", "odd"), ("evict", "q2,evict=fastkv:0.5:max=perhaps", "on or off"),
    ("evict", "q2,evict=random:0.5:seed=1:seed=2", "once each"), ("refine", "q2,refine=kvcrush:0.5", "without evict"),
    ("refine", "q2,evict=h2o:0.5,refine=crush:0.5", "kvcrush:SHARE"), ("budget", "q2,budget=pyramid", "without evict"),
    ("budget", "q2,evict=lagkv:0.5,budget=pyramid", "lagkv-kvpress"), ("budget", "q2,evict=h2o:0.5,budget=half", "pyramid"),
    ("budget", "q2,evict=h2o:0.5,budget=global", "as many tokens as each other"), ("tsp", "q2,tsp=0.5", "later layers"),
])  # fmt: skip
def test_parts_that_choose_are_refused_with_a_reason(argument, spec, why):
    with pytest.raises(Error, match=f"^{argument}: .*{why}"):
        Spec.parse(spec)


@pytest.mark.parametrize("argument, q, lse", [
    ("q", random(1, 8, HEADS * GROUP, 96), torch.zeros(1, 8, HEADS * GROUP)),
    ("q", random(1, 8, HEADS * GROUP + 1, D), torch.zeros(1, 8, HEADS * GROUP + 1)),
    ("lse", random(1, 8, HEADS * GROUP, D), torch.zeros(1, 9, HEADS * GROUP)),
    ("lse", random(1, 8, HEADS * GROUP, D), torch.zeros(1, 8, HEADS * GROUP).double()),
])  # fmt: skip
def test_refusals_of_scoring_name_the_argument(argument, q, lse):
    cache, _ = valid()
    with pytest.raises(Error) as raised:
        scores.attention_sums(q, lse, 100, 0.125, *cache.tensors(), cache.numbers())
    assert raised.value.argument == argument, raised.value
    with pytest.raises(Error, match="^k: 5 of 4"):
        scores.top_k(torch.zeros(2, 4), 5)


def test_scoring_ops_have_fakes():
    cache, _ = valid()
    held, q = (*cache.tensors(), cache.numbers()), random(1, 8, HEADS * GROUP, D)
    for op, args in (
        ("attention_sums", (q, torch.zeros(1, 8, HEADS * GROUP), 100, 0.125, *held)),
        ("key_norms", (300, *held)),
        ("lag_scores", (0, 64, 3, *held)),
        ("pool", (torch.zeros(2, 3, 50), 5, True)),
        ("top_k", (torch.zeros(2, 50), 7)),
    ):
        torch.library.opcheck(getattr(torch.ops.kvwarp, op), args, test_utils=("test_schema", "test_faketensor"))
