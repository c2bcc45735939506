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
    checkpoint: str = ""            # run, checkpoint, Hugging Face folder or name, or GGUF file; empty: the newest run
    which: Literal["best", "latest"] = "best"  # checkpoint of the run
    prompt: str = "\n"              # text to continue; FILE:name reads it from a file; empty: the end-of-text token
    num_samples: int = 1            # texts to write
    max_new_tokens: int = 300       # length of each, at most
    stop: tuple[str, ...] = ()      # texts that end a sample, separated by commas; the end-of-text token always does
    # conversation
    chat: bool = False              # answer instead of continuing: --prompt once, or else what you type
    template: Literal[("auto", *TEMPLATES)] = "auto"  # how a conversation is written; auto: as in training
    system: str = ""                # system message, ahead of the conversation
    # how
    temperature: float = 0.8        # 0: the most likely token (greedy); higher: more varied
    top_k: int = 0                  # keep the k most likely tokens; 0: all
    top_p: float = 1.0              # keep the smallest set of tokens that holds this much of the probability
    min_p: float = 0.0              # keep tokens at least this fraction as likely as the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens that are in the text already become less likely
    beam: int = 0                   # width of a beam search, which replaces sampling; 0: sample
    length_penalty: float = 1.0     # beam search ranks by log p / length ** this
    seed: int = 1337                # the same seed writes the same text
    # machine
    device: str = "cpu"             # cpu, cuda, mps, ...
    packed: str = ""                # folder to save a ternary model to at 2 bits a weight, 7 times smaller

    def __post_init__(self):
        configurator.check(self, positive=("num_samples", "max_new_tokens", "top_p", "repetition_penalty"),
                           fractions=("top_p", "min_p"))
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} must be below 2**63")
        if self.length_penalty > 10:
            raise ValueError(f"length_penalty={self.length_penalty} must be at most 10")
        if self.beam and self.num_samples > 1:
            raise ValueError(f"num_samples={self.num_samples}: a beam search (beam={self.beam}) writes only one text")


def read_prompt(prompt):
    """The text of --prompt, or of the file that it names."""
    if not prompt.startswith("FILE:"):
        return prompt
    path = Path(prompt.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--prompt={prompt}: {path} is not UTF-8 text; convert it, or name another file") from None


def note(text):
    """To stderr, so that stdout holds the model's text and nothing else."""
    print(text, file=sys.stderr)


def save_packed(folder, loaded):
    """A run folder with this one checkpoint, for sample.py and export.py: there is nothing to resume in it."""
    model = loaded.model
    if not hasattr(model, "deploy_state"):
        raise UserError(f"--packed: {loaded.path} is a {loaded.meta['arch']} model; only ternary models can be packed")
    if not model.config.packed:  # as the warning of thimble/load.py has said
        raise UserError(f"--packed: {loaded.meta['arch']}.py computes something else in its packed form: "
                        "change both forms, or sample without --packed")
    if (Path(folder) / "latest").exists():
        raise UserError(f"--packed={folder} already holds a run: name another folder")
    meta = loaded.meta | {"model_config": asdict(model.config)}
    path = checkpoint.save(folder, loaded.meta["step"], model.deploy_state(), None, meta,
                           loaded.path / "tokenizer.json", best=True)
    file = path / "model.safetensors"
    note(f"packed: {file}, {file.stat().st_size:,} bytes")


def write(loaded, ids, cfg, generator, end_ids):
    """Print one text that continues `ids`, token by token -> (its ids, the score of a beam search or None)."""
    model = loaded.model
    tokenizer = loaded.tokenizer
    score = None
    if cfg.beam:
        new, score = beam_search(model, ids, cfg.max_new_tokens, cfg.beam, cfg.length_penalty, end_ids,
                                 tokenizer.vocab_size)
    else:
        new = generate(model, ids, cfg.max_new_tokens, generator, end_ids, tokenizer.vocab_size,
                       temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p,
                       repetition_penalty=cfg.repetition_penalty)
    stream = tokenizer.stream()  # holds back the bytes of a character that is not complete yet
    visible = StopTexts(cfg.stop)
    written = []
    for token in new:
        written.append(token)
        print(visible(stream.step(token)), end="", flush=True)
        if visible.done:
            break
    if not visible.done:
        print(visible(stream.flush(), last=True), end="", flush=True)
    return written, score


# ---- conversation
def answer(loaded, messages, cfg, generator):
    """Print the answer to the last of `messages` and append it to them."""
    block_size = loaded.model.config.block_size
    # room for the answer, but for a long one no more than half of the context
    room = max(block_size - cfg.max_new_tokens, block_size // 2)
    ids = chat.fit(loaded.tokenizer, messages, loaded.template, room)
    written, _ = write(loaded, ids, cfg, generator, loaded.answer_ids)
    print()
    messages.append({"role": "assistant", "content": loaded.tokenizer.decode(written)})


def changed(cfg, command, value):
    """`cfg` after /temp NUMBER or /max TOKENS. ValueError if the value is wrong."""
    if command == "/temp":
        return replace(cfg, temperature=float(value))
    return replace(cfg, max_new_tokens=int(value))


def converse(loaded, cfg, generator):
    """Answer --prompt, or each line that is typed until /quit or the end of the input."""
    begin = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages = list(begin)
    prompt = read_prompt(cfg.prompt).strip()
    if prompt:
        messages.append({"role": "user", "content": prompt})
        return answer(loaded, messages, cfg, generator)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return print()
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(begin)
        elif command in ("/temp", "/max"):
            try:
                cfg = changed(cfg, command, value)
            except ValueError as error:
                note(f"{line}: {error}")
        elif line.startswith("/"):
            note(f"{command} is not a command: use /temp NUMBER, /max TOKENS, /reset or /quit")
        elif line:
            messages.append({"role": "user", "content": line})
            answer(loaded, messages, cfg, generator)


# ---- samples
def write_samples(loaded, cfg, generator):
    """Print the prompt and its continuation, --num_samples times."""
    prompt = read_prompt(cfg.prompt)
    ids = loaded.tokenizer.encode_prompt(prompt)
    block_size = loaded.model.config.block_size
    if len(ids) > block_size:
        note(f"note: the prompt has {len(ids)} tokens, the model sees the last {block_size}")
    note(about(loaded))
    n_tokens = 0
    start = time.perf_counter()
    for i in range(cfg.num_samples):
        if i:
            print("\n" + "-" * 40)
        print(prompt, end="", flush=True)
        written, score = write(loaded, ids, cfg, generator, loaded.stop_ids)
        n_tokens += len(written)
    print()
    seconds = time.perf_counter() - start
    summary = f"{n_tokens} tokens, {n_tokens / seconds:,.0f} tokens/s"
    if cfg.beam:
        summary += f", log p / length^{cfg.length_penalty:g} {score:.4f}"
    note(summary)


def about(loaded):
    return f"{loaded.path}, step {loaded.meta['step']}"


def main(cfg):
    # --packed also samples from the packed form, whatever the device
    loaded = load(cfg.checkpoint, cfg.which, cfg.device, cfg.template, deploy=True if cfg.packed else None)
    if cfg.packed:
        save_packed(cfg.packed, loaded)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    if cfg.chat:
        note(about(loaded))
        converse(loaded, cfg, generator)
    else:
        write_samples(loaded, cfg, generator)


if __name__ == "__main__":
    configurator.run(main, Config)
