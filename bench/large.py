"""Shapes of real models with random weights: in, one LoRA step, out, in again; seconds, memory and differences.

    python bench/large.py --shape=qwen3-0.6b
    python bench/large.py --shape=llama-3.2-1b

The folder is written by transformers in bfloat16, as those models are. What comes in is compared with transformers'
logits in float32, what leaves with the model that was tuned. Each stage runs in a process of its own, whose peak of
memory is what is shown.
"""
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import optim
from formats import hf
from thimble import checkpoint, configurator, load
from thimble.lora import Lora
from thimble.tokenizer import byte_tokenizer

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES = {
    "qwen3-0.6b": ("qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True}),
    "llama-3.2-1b": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "tiny": ("qwen3", {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 256}),
}


@dataclass(frozen=True)
class Config:
    shape: Literal[tuple(SHAPES)] = "qwen3-0.6b"  # whose sizes
    tokens: int = 64                # length of the row that is compared and trained on
    rank: int = 8                   # of LoRA

    def __post_init__(self):
        configurator.check(self, positive=("tokens", "rank"))


def ids(cfg):
    vocab_size = SHAPES[cfg.shape][1]["vocab_size"]
    return torch.randint(vocab_size, (1, cfg.tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def write(cfg, folder):
    """A folder in bfloat16 by transformers, and its logits in float32."""
    import transformers
    kind, settings = SHAPES[cfg.shape]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings),
                                                          dtype=torch.bfloat16)
    model.save_pretrained(folder / "in")
    (folder / "in/tokenizer.json").write_text(byte_tokenizer().to_json())
    save_file({"logits": model.float()(ids(cfg)).logits}, folder / "theirs.safetensors")


@torch.no_grad()
def read(cfg, folder):
    """Ours beside theirs -> the largest difference of two logits."""
    model = checkpoint.load_model(load.read(folder / "in")).eval()
    theirs = load_file(folder / "theirs.safetensors")["logits"]
    return (model(ids(cfg))[0] - theirs).abs().max().item()


def tune(cfg, folder):
    """One LoRA step, then out in float32 -> the largest change of a logit, to show that it was one."""
    found = load.read(folder / "in")
    model = checkpoint.load_model(found)
    del found
    lora = Lora(model, cfg.rank)
    for pair in lora.pairs:
        pair.b.data.normal_(std=1e-3)  # B is zero at first: the step would move A not at all
    optimizer = optim.Optimizer(lora, "adamw", lr=1e-3)
    row = ids(cfg)
    before = model(row)[0].detach()
    model(row[:, :-1], row[:, 1:])[1].backward()
    optimizer.step(1.0)
    lora.merge()
    del lora, optimizer
    (folder / "out").mkdir()
    with torch.no_grad():
        model.eval()
        save_file({"logits": model(row)[0]}, folder / "tuned.safetensors")
        stock = SHAPES[cfg.shape][0]
        hf.write(folder / "out", model, stock, byte_tokenizer(), "f32")
        return (model(row)[0] - before).abs().max().item()


@torch.no_grad()
def back(cfg, folder):
    """What left, read here again -> the largest difference to the tuned model's logits."""
    model = checkpoint.load_model(load.read(folder / "out")).eval()
    tuned = load_file(folder / "tuned.safetensors")["logits"]
    return (model(ids(cfg))[0] - tuned).abs().max().item()


@torch.no_grad()
def again(cfg, folder):
    """What left, read by transformers -> the largest difference to the tuned model's logits."""
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    tuned = load_file(folder / "tuned.safetensors")["logits"]
    return (model(ids(cfg)).logits - tuned).abs().max().item()


def stage(name, cfg, folder, pipe):
    started = time.perf_counter()
    value = globals()[name](cfg, folder)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB
    pipe.send({"stage": name, "seconds": round(seconds, 1), "cpu_seconds": round(time.process_time(), 1),
               "peak_gb": round(peak, 1), "max_dlogit": value})


def main(cfg):
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("write", "read", "tune", "back", "again"):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=stage, args=(name, cfg, Path(folder), theirs))
            process.start()
            theirs.close()
            print(json.dumps({"shape": cfg.shape} | ours.recv()), flush=True)
            process.join()


if __name__ == "__main__":
    configurator.run(main, Config)
