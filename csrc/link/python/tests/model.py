"""The test model for transformers: SmolLM2-135M-Instruct as the engine's tests have it, its weights dequantised."""
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PAGES = Path(__file__).parents[2]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source():
    """The GGUF file, or None."""
    cache = Path(os.environ.get("KVWARP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvwarp")
    given = Path(os.environ.get("KVW_TEST_MODEL") or cache / "models" / FILE)
    return given if given.is_file() else None


def folder():
    """Config and weights in float32 in a folder under target/, made once."""
    path = Path(os.environ["KVWARP_TARGET"]) / "smollm2"
    if not (path / "model.safetensors").is_file():
        gguf = dict(gguf_file=source().name)
        config = AutoConfig.from_pretrained(source().parent, **gguf)
        weights = AutoModelForCausalLM.from_pretrained(source().parent, dtype=torch.float32, **gguf).state_dict()
        model = LlamaForCausalLM(config)
        model.load_state_dict(weights)
        AutoTokenizer.from_pretrained(source().parent, **gguf).save_pretrained(path)
        model.save_pretrained(path)
    return path
