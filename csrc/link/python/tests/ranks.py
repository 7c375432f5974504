"""One rank of two that a launcher has started: generates for the prompts of FOLDER, and writes its tokens beside them.

    python ranks.py FOLDER tp_size|pp_size|fsdp_size|split
"""
import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from kvwarp import KvwarpCache


def generate(network, batch, spec):
    """New tokens of each prompt, and the cache."""
    cache = KvwarpCache(spec)
    out = network.generate(**batch, cache=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0,
                           eos_token_id=None)  # fmt: skip
    return out[:, batch["input_ids"].shape[1] :].tolist(), cache


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="kvwarp", **options).eval()


def main(folder, mode):
    torch.set_num_threads(1)
    batch = torch.load(folder / "batch.pt")
    rank = int(os.environ["RANK"])
    if mode == "split":
        from accelerate import PartialState

        state = PartialState(cpu=True)
        with state.split_between_processes(list(range(len(batch["input_ids"])))) as mine:
            batch = {name: x[mine] for name, x in batch.items()}
        network = load(folder)
    else:
        network = load(folder, distributed_config=DistributedConfig(**{mode: 2}))
    tokens, cache = generate(network, batch, (folder / "spec").read_text())
    held = [layer.layer.shape if layer.layer else None for layer in cache.layers]
    (folder / f"{mode}{rank}.json").write_text(json.dumps({"tokens": tokens, "held": held}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
