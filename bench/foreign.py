"""Greedy texts of a GGUF file: ours beside llama.cpp's, which may round what it multiplies to 8 bits.

    python bench/foreign.py --file=SmolLM2-135M-Instruct.Q4_1.gguf
    python export.py --format=gguf --checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf --out=smol.gguf --check=false
    python bench/foreign.py --file=smol.gguf                       # the same weights in float32: nothing is rounded

Where two texts part, it says how far apart the two tokens were for us, in log p.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from formats.check import LlamaCpp
from thimble import checkpoint, configurator, files, load
from thimble.generate import greedy

PROMPTS = ("The capital of France is", "Once upon a time", "Water boils at", "def fibonacci(n):",
           "The largest planet is", "In 1969, humans", "My favourite food is", "To be, or not to be,",
           "The opposite of hot is", "2 + 2 =", "A haiku about autumn:\n", "The sun rises in the",
           "Dear Sir or Madam,", "The three primary colours are", "Photosynthesis is", "The recipe needs 2 eggs,",
           "She opened the door and", "Le chat est", "import numpy as np\n", "The meaning of life is")


@dataclass(frozen=True)
class Config:
    file: str = ""                  # GGUF file
    tokens: int = 32                # greedy tokens after each prompt

    def __post_init__(self):
        configurator.check(self, positive=("tokens",))


def compare(model, tokenizer, ids, ours, theirs):
    """-> (whether the texts are equal, where and by how much they part)."""
    n = min(len(theirs), len(ours))  # llama.cpp stops at the end of text
    different = [i for i in range(n) if ours[i] != theirs[i]]
    if not different:
        return True, "equal"
    at = different[0]
    logits = model(torch.tensor([[*ids, *ours[:at]]]))[0][0, -1]
    lead = logits[ours[at]] - logits[theirs[at]]
    one, other = tokenizer.decode([ours[at]]), tokenizer.decode([theirs[at]])
    return False, f"part at token {at}: {one!r} is {lead:.3f} ahead of {other!r}"


@torch.no_grad()
def main(cfg):
    if not Path(cfg.file).is_file():
        raise files.UserError(f"--file={cfg.file} is not a GGUF file: name one")
    loaded = load.read(cfg.file)
    model = checkpoint.load_model(loaded).eval()
    tokenizer = load.read_tokenizer(cfg.file)
    there = LlamaCpp(cfg.file)
    same = 0
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        if there.encode(prompt) != ids:
            raise files.UserError(f"{prompt!r} is {ids} here, {there.encode(prompt)} in llama.cpp")
        idx = torch.tensor([ids])
        ours = greedy(model, idx, cfg.tokens)[0].tolist()
        equal, note = compare(model, tokenizer, ids, ours, there.greedy(idx, cfg.tokens)[0])
        same += equal
        print(f"{prompt!r:34} {tokenizer.decode(ours)[:40]!r:44} {note}", flush=True)
    there.close()
    print(f"{same} of {len(PROMPTS)} equal over {cfg.tokens} tokens")


if __name__ == "__main__":
    configurator.run(main, Config)
