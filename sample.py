"""Talk to a trained model: by default the best checkpoint of the newest run.

    python sample.py --prompt "To be"
    python sample.py --prompt FILE:letter.txt --temperature=0      # a prompt from a file; 0 is greedy
    python sample.py --checkpoint=runs/tiny_cpu --beam=4 --max_new_tokens=50
    python sample.py --checkpoint=runs/sft_tiny --chat             # /temp 0.5, /max 100, /reset, /quit; or one --prompt
"""
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from thimble import chat, checkpoint, configurator
from thimble.chat import TEMPLATES
from thimble.files import UserError
from thimble.generate import StopTexts, beam_search, generate
from thimble.load import load


@dataclass(frozen=True)
class Config:
    # what
    checkpoint: str = ""            # run, checkpoint or Hugging Face folder, GGUF file; empty: the newest run
    which: Literal["best", "latest"] = "best"  # checkpoint of the run
    prompt: str = "\n"              # text to go on from; FILE:name takes it from a file; empty: the end-of-text token
    num_samples: int = 1            # texts to write
    max_new_tokens: int = 300       # length of each, at most
    stop: tuple[str, ...] = ()      # texts at which a sample ends; it always ends at the end-of-text token
    # conversation
    chat: bool = False              # answer, with a --prompt once, without one in the terminal
    template: Literal[("auto", *TEMPLATES)] = "auto"  # how a conversation is written; auto: as the model was taught
    system: str = ""                # what to tell the model ahead of a conversation
    # how
    temperature: float = 0.8        # 0: greedy
    top_k: int = 0                  # keep the k most likely tokens; 0: all
    top_p: float = 1.0              # keep the smallest set of tokens that holds this probability
    min_p: float = 0.0              # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: seen tokens become less likely
    beam: int = 0                   # width of a beam search, which replaces sampling
    length_penalty: float = 1.0     # beam search ranks by log p / length ** this
    seed: int = 1337                # the same seed writes the same text
    # machine
    device: str = "cpu"             # cpu, cuda, mps, ...
    packed: str = ""                # folder to save a ternary model to at 2 bits a weight, 7 times smaller

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("temperature", "top_k", "beam", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1] and min_p={self.min_p} in [0, 1]")
        if self.seed >= 2**63 or not 0 <= self.length_penalty <= 10:
            raise ValueError(f"seed={self.seed} must be below 2**63, length_penalty={self.length_penalty} in [0, 10]")
        if self.beam and self.num_samples > 1:
            raise ValueError(f"num_samples={self.num_samples}: a beam search (beam={self.beam}) writes only one text")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0")


def read_prompt(prompt):
    if not prompt.startswith("FILE:"):
        return prompt
    path = Path(prompt.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--prompt={prompt}: {path} is not UTF-8 text") from None


def save_packed(folder, loaded):
    """A run folder with this one checkpoint: for sample.py and export.py, nothing to resume."""
    model = loaded.model
    if not hasattr(model, "deploy_state"):
        raise UserError(f"--packed: {loaded.path} is a {loaded.meta['arch']}, only ternary models pack")
    if (Path(folder) / "latest").exists():
        raise UserError(f"--packed={folder} already holds a run: name another folder")
    meta = {k: v for k, v in loaded.meta.items() if k != "sha256"} | {"model_config": asdict(model.config)}
    path = checkpoint.save(folder, loaded.meta["step"], model.deploy_state(), None, meta,
                           loaded.path / "tokenizer.json", best=True)
    print(f"packed: {path}/model.safetensors, {(path / 'model.safetensors').stat().st_size:,} bytes", file=sys.stderr)


def write(model, tokenizer, ids, cfg, generator, ends):
    """Print one text that goes on from `ids` as it comes -> (its ids, the score of a beam search)."""
    held, stream, written, score = StopTexts(cfg.stop), tokenizer.stream(), [], None
    if cfg.beam:
        new, score = beam_search(model, ids, cfg.max_new_tokens, cfg.beam, cfg.length_penalty, ends,
                                 tokenizer.vocab_size)
    else:
        new = generate(model, ids, cfg.max_new_tokens, generator, ends, tokenizer.vocab_size,
                       temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p,
                       repetition_penalty=cfg.repetition_penalty)
    for token in new:
        written.append(token)
        print(held(stream.step(token)), end="", flush=True)
        if held.done:
            break
    if not held.done:
        print(held(stream.flush(), last=True), end="", flush=True)
    return written, score


def converse(loaded, cfg, generator):
    """Answer --prompt, or what is typed line by line until /quit or the end of the input."""
    model, tokenizer = loaded.model, loaded.tokenizer
    begin = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages, typed = list(begin), read_prompt(cfg.prompt).strip()
    while True:
        try:
            line = typed or input("> ").strip()
        except EOFError:
            return print()
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(begin)
        elif command in ("/temp", "/max"):
            try:
                cfg = replace(cfg, **{"temperature": float(value)} if command == "/temp"
                              else {"max_new_tokens": int(value)})
            except ValueError as e:
                print(f"{line}: {e}", file=sys.stderr)
        elif line.startswith("/"):
            print(f"{command} is none of /temp NUMBER, /max TOKENS, /reset, /quit", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            room = max(model.config.block_size - cfg.max_new_tokens, model.config.block_size // 2)
            ids = chat.fit(tokenizer, messages, loaded.template, room)
            written, _ = write(model, tokenizer, ids, cfg, generator, loaded.answer_ids)
            messages.append({"role": "assistant", "content": tokenizer.decode(written)})
            print()
        if typed:
            return


def main(cfg):
    loaded = load(cfg.checkpoint, cfg.which, cfg.device, cfg.template, deploy=True if cfg.packed else None)
    model, tokenizer = loaded.model, loaded.tokenizer
    if cfg.packed:
        save_packed(cfg.packed, loaded)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    note = f"{loaded.path}, step {loaded.meta['step']}"
    if cfg.chat:
        print(note, file=sys.stderr)
        return converse(loaded, cfg, generator)
    prompt = read_prompt(cfg.prompt)
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    if len(ids) > model.config.block_size:
        print(f"note: the prompt has {len(ids)} tokens, the model sees the last {model.config.block_size}",
              file=sys.stderr)
    print(note, file=sys.stderr)
    n, begun = 0, time.perf_counter()
    for i in range(cfg.num_samples):
        if i:
            print("\n" + "-" * 40)
        print(prompt, end="", flush=True)
        written, score = write(model, tokenizer, ids, cfg, generator, loaded.stop_ids)
        n += len(written)
    print()
    seconds = time.perf_counter() - begun
    summary = f"{n} tokens, {n / seconds:,.0f} tokens/s" if seconds else ""
    print(summary + (f", log p per length^{cfg.length_penalty:g} {score:.4f}" if cfg.beam else ""), file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main, Config)
