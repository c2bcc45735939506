"""Greedy texts of a GGUF file: ours beside llama.cpp's, which may round what it multiplies to 8 bits.

    python bench/foreign.py --file=SmolLM2-135M-Instruct.Q4_1.gguf
    python export.py --format=gguf --checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf --out=smol.gguf --check=false
    python bench/foreign.py --file=smol.gguf                       # the same weights in float32: nothing is rounded

Where two texts part it says how far our two tokens were apart, in log p.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export
from thimble import checkpoint, configurator, files, load

PROMPTS = ("The capital of France is", "Once upon a time", "Water boils at", "def fibonacci(n):",
           "The largest planet is", "In 1969, humans", "My favourite food is", "To be, or not to be,",
           "The opposite of hot is", "2 + 2 =", "A haiku about autumn:\n", "The sun rises in the",
           "Dear Sir or Madam,", "The three primary colours are", "Photosynthesis is", "The recipe needs 2 eggs,",
           "She opened the door and", "Le chat est", "import numpy as np\n", "The meaning of life is")


@dataclass(frozen=True)
class Config:
    file: str = ""                  # GGUF file of architecture llama
    tokens: int = 32                # greedy tokens after each prompt


@torch.no_grad()
def main(cfg):
    loaded = load.read(cfg.file)
    model, tokenizer = checkpoint.load_model(loaded).eval(), load.read_tokenizer(cfg.file)
    there, same = export.LlamaCpp(cfg.file, model), 0
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        if there.encode(prompt) != ids:
            raise files.UserError(f"{prompt!r} is {ids} to us, {there.encode(prompt)} to llama.cpp")
        ours = export.greedy(model, torch.tensor([ids]), cfg.tokens)[0].tolist()
        theirs = there.greedy(torch.tensor([ids]), cfg.tokens)[0]
        n = min(len(theirs), cfg.tokens)                   # llama.cpp stops at the end of text
        at = next((i for i in range(n) if ours[i] != theirs[i]), n)
        same += at == n
        note = "equal" if at == n else ""
        if at < n:
            logits = model(torch.tensor([[*ids, *ours[:at]]]))[0][0, -1]
            lead = logits[ours[at]] - logits[theirs[at]]
            one, other = (tokenizer.decode([ids[at]]) for ids in (ours, theirs))
            note = f"part at token {at}: {one!r} is {lead:.3f} before {other!r}"
        print(f"{prompt!r:34} {tokenizer.decode(ours)[:40]!r:44} {note}", flush=True)
    there.close()
    print(f"{same} of {len(PROMPTS)} equal over {cfg.tokens} tokens")


if __name__ == "__main__":
    configurator.run(main, Config)
