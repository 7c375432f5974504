"""Two processes that torchrun starts, placed by transformers or accelerate, say what one says."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ranks

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A folder with a small model, padded prompts and a spec, and what one process says to them."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, head_dim=64,
                         num_key_value_heads=4, vocab_size=304, initializer_range=0.1)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    batch = {"input_ids": torch.randint(1, 300, (4, 230)), "attention_mask": torch.ones(4, 230, dtype=torch.int64)}
    batch["attention_mask"][1, :30] = 0
    batch["attention_mask"][3, :100] = 0
    torch.save(batch, folder / "batch.pt")
    (folder / "spec").write_text("q4,window=64")
    tokens, _ = ranks.generate(ranks.load(folder), batch, "q4,window=64")
    assert len(set(sum(tokens, []))) > 20
    return folder, tokens


@pytest.mark.parametrize("mode, held", [
    ("tp_size", [[[4, 2], [4, 2]]] * 2),  # half of the heads
    ("pp_size", [[[4, 4]], [None, [4, 4]]]),  # half of the layers
    ("fsdp_size", [[[4, 4], [4, 4]]] * 2),  # half of the weights at rest
    ("split", [[[2, 4], [2, 4]]] * 2),  # half of the prompts
])  # fmt: skip
def test_two_processes_say_what_one_says(prompts, mode, held):
    folder, want = prompts
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KVW_THREADS": "1"}
    command = [sys.executable, "-m", *TORCHRUN, Path(__file__).with_name("ranks.py"), folder, mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    got = [json.loads((folder / f"{mode}{rank}.json").read_text()) for rank in range(2)]
    if mode == "split":
        assert got[0]["tokens"] + got[1]["tokens"] == want
    else:
        assert got[0]["tokens"] == want and got[1]["tokens"] == want
    assert [rank["held"] for rank in got] == held


def test_layers_that_accelerate_keeps_on_disk(prompts, tmp_path):
    folder, want = prompts
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.norm": "cpu", "lm_head": "cpu"}  # fmt: skip
    network = ranks.load(folder, device_map=places, offload_folder=tmp_path)
    assert ranks.generate(network, torch.load(folder / "batch.pt"), "q4,window=64")[0] == want
