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

import chat
import checkpoint
import configurator
import data
from chat import TEMPLATES
from configurator import UserError


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


def filter_logits(logits, seen=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """logits: (V,) -> (V,) whose softmax is the distribution to draw from; -inf for tokens that are out.

    In this order: repetition penalty (once per distinct token of `seen`; Keskar et al. 2019, CTRL, sec. 4.1, with
    negative logits multiplied), temperature, top-k, top-p (the token that crosses p stays; Holtzman et al. 2020),
    min-p (Nguyen et al. 2024). temperature 0 leaves the likeliest token alone.
    """
    logits = logits.clone()
    if repetition_penalty != 1 and len(seen):
        ids = torch.as_tensor(seen, device=logits.device).unique()
        penalised = logits[ids]
        logits[ids] = torch.where(penalised > 0, penalised / repetition_penalty, penalised * repetition_penalty)
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).index_fill_(0, logits.argmax(), 0.0)
    logits = (logits - logits.max()) / max(temperature, 1e-30)  # the largest is 0, and so never infinite
    if 0 < top_k < len(logits):
        keep = logits.topk(top_k).indices                  # exactly k, also where logits are equal
        logits = torch.full_like(logits, -torch.inf).index_copy_(0, keep, logits[keep])
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)
        logits[order[probs.cumsum(-1) - probs >= top_p]] = -torch.inf
    if min_p > 0:
        probs = logits.softmax(-1)
        logits[probs < min_p * probs.max()] = -torch.inf
    return logits


class Decoder:
    """Rows of ids and the model's cache, a window that slides: when the context is full, its later half starts anew."""

    def __init__(self, model, idx, max_new_tokens):
        self.model, self.idx = model, idx                                                    # idx: (B, T)
        self.size = min(model.config.block_size, idx.size(1) + max_new_tokens)
        self.cache, self.filled = None, 0

    def __call__(self, new=None):
        """Take more ids, (B, T) -> logits (B, V) of the next token. The first call takes none."""
        if new is not None:
            self.idx = torch.cat((self.idx, new), 1)
        if self.cache is None or self.filled + new.size(1) > self.size:
            new = self.idx[:, -(self.size if self.cache is None else max(1, self.size // 2)):]
            self.cache, self.filled = self.model.init_cache(len(new), self.size), 0
        logits, self.cache = self.model.step(new, self.cache)
        self.filled += new.size(1)
        return logits

    def select(self, rows):
        """Go on with these rows, in this order; a row may be taken more than once."""
        def pick(part):
            if isinstance(part, torch.Tensor):
                return part.index_select(0, rows) if part.dim() else part
            return {k: pick(v) for k, v in part.items()} if isinstance(part, dict) else [pick(v) for v in part]
        self.idx, self.cache = self.idx[rows], pick(self.cache)


@torch.no_grad()
def generate(model, ids, max_new_tokens, generator=None, stop_ids=(), vocab_size=None, **sampling):
    """Yield up to max_new_tokens ids after `ids` (at least one; only the last block_size of them are seen).

    `sampling` goes to `filter_logits`; a CPU `generator` makes the draws repeatable. Ends before an id of stop_ids.
    vocab_size is the tokenizer's, where the model has more rows than that.
    """
    device, new = next(model.parameters()).device, None
    decoder = Decoder(model, torch.tensor([ids], device=device), max_new_tokens)
    for _ in range(max_new_tokens):
        logits = filter_logits(decoder(new)[0, :vocab_size], decoder.idx[0], **sampling)
        token = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).item()
        if token in stop_ids:
            return
        yield token
        new = torch.tensor([[token]], device=device)


@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beam, length_penalty=1.0, stop_ids=(), vocab_size=None):
    """The best of `beam` hypotheses by sum log p / length ** length_penalty -> (list of ids, that score).

    A hypothesis is finished by an id of stop_ids, which counts in its score and is not returned. The search ends when
    no open hypothesis can still win, or at max_new_tokens. beam=1 is greedy decoding.
    """
    device = next(model.parameters()).device
    decoder, new = Decoder(model, torch.tensor([ids], device=device), max_new_tokens), None
    scores, open_, finished = torch.zeros(1, 1, dtype=torch.double), [[]], []
    for length in range(1, max_new_tokens + 1):
        logp = decoder(new)[:, :vocab_size].log_softmax(-1).double().cpu() + scores        # (beams, V), summed
        best = logp.flatten().topk(min(2 * beam, logp.numel()))
        rows, tokens = best.indices // logp.size(1), best.indices % logp.size(1)
        kept = []
        for rank, (score, row, token) in enumerate(zip(best.values.tolist(), rows.tolist(), tokens.tolist(),
                                                       strict=True)):
            if token in stop_ids:
                if rank < beam:
                    finished.append((score / length ** length_penalty, open_[row]))
            elif len(kept) < beam:
                kept.append((score, row, token))
        if not kept:
            break
        open_ = [open_[row] + [token] for _, row, token in kept]
        scores = torch.tensor([[score] for score, _, _ in kept], dtype=torch.double)
        # log p only falls, so this is the most that an open hypothesis can still reach
        reach = max(scores.max().item() / n ** length_penalty for n in (length, max_new_tokens))
        if length == max_new_tokens:
            finished += [(score / length ** length_penalty, text)
                         for (score, _, _), text in zip(kept, open_, strict=True)]
        elif finished and max(score for score, _ in finished) >= reach:
            break
        decoder.select(torch.tensor([row for _, row, _ in kept], device=device))
        new = torch.tensor([[token] for _, _, token in kept], device=device)
    score, text = max(finished, key=lambda hypothesis: hypothesis[0])
    return text, score


class StopTexts:
    """Holds back what may be the beginning of a stop text, and ends before one."""

    def __init__(self, stops):
        self.stops, self.held, self.done = [s for s in stops if s], "", False

    def __call__(self, text, last=False):
        """More text -> as much as may be shown."""
        self.held += text
        found = [i for i in map(self.held.find, self.stops) if i >= 0]
        if found:
            self.held, self.done = self.held[:min(found)], True
        keep = 0
        if not (self.done or last):                        # the longest end that could still become a stop text
            keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown


def read_prompt(prompt):
    if not prompt.startswith("FILE:"):
        return prompt
    path = Path(prompt.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--prompt={prompt}: {path} is not UTF-8 text") from None


def deployed(model):
    """The model in the form in which it ships and runs fastest, for model files that know one; any other as it is."""
    if not hasattr(model, "deploy_state") or model.config.packed:
        return model
    twin = type(model)(replace(model.config, packed=True))
    twin.load_state_dict(model.deploy_state())
    return twin.eval()


def save_packed(folder, model, loaded):
    """A run folder with this one checkpoint: for sample.py and export.py, nothing to resume."""
    if not hasattr(model, "deploy_state"):
        raise UserError(f"--packed: {loaded.path} is a {loaded.meta['arch']}, only ternary models pack")
    if (Path(folder) / "latest").exists():
        raise UserError(f"--packed={folder} already holds a run: name another folder")
    meta = {k: v for k, v in loaded.meta.items() if k != "sha256"} | {"model_config": asdict(model.config)}
    path = checkpoint.save(folder, loaded.meta["step"], model.deploy_state(), None, meta,
                           loaded.path / "tokenizer.json", best=True)
    print(f"packed: {path}/model.safetensors, {(path / 'model.safetensors').stat().st_size:,} bytes", file=sys.stderr)


def load(path, which="best", device="cpu", packed=False):
    """(model ready to generate, tokenizer, the Checkpoint they are from); UserError if they do not fit together."""
    loaded = checkpoint.load(path or None, which=which)
    model = checkpoint.load_model(loaded)
    if packed or device == "cpu":
        model = deployed(model)
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={device} does not work here: {str(e).splitlines()[0]}; try cpu") from None
    tokenizer = data.load_tokenizer(loaded.path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{loaded.path}: the tokenizer has {tokenizer.vocab_size} ids, the model "
                        f"{model.config.vocab_size}: they do not belong together")
    return model, tokenizer, loaded


def stop_ids(loaded, tokenizer):
    """Ids that end a text: the tokenizer's end-of-text token, and what an imported model brings along."""
    return {tokenizer.eot, *loaded.meta.get("stop_ids", ())}


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


def converse(model, tokenizer, loaded, template, cfg, generator):
    """Answer --prompt, or what is typed line by line until /quit or the end of the input."""
    stops = stop_ids(loaded, tokenizer) | {chat.end_id(tokenizer, template)}
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
            ids = chat.fit(tokenizer, messages, template, room)
            written, _ = write(model, tokenizer, ids, cfg, generator, stops)
            messages.append({"role": "assistant", "content": tokenizer.decode(written)})
            print()
        if typed:
            return


def main(cfg):
    model, tokenizer, loaded = load(cfg.checkpoint, cfg.which, cfg.device, bool(cfg.packed))
    if cfg.packed:
        save_packed(cfg.packed, model, loaded)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    note = f"{loaded.path}, step {loaded.meta['step']}"
    if cfg.chat:
        print(note, file=sys.stderr)
        template = chat.template_of(loaded.meta, tokenizer) if cfg.template == "auto" else cfg.template
        return converse(model, tokenizer, loaded, template, cfg, generator)
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
        written, score = write(model, tokenizer, ids, cfg, generator, stop_ids(loaded, tokenizer))
        n += len(written)
    print()
    seconds = time.perf_counter() - begun
    summary = f"{n} tokens, {n / seconds:,.0f} tokens/s" if seconds else ""
    print(summary + (f", log p per length^{cfg.length_penalty:g} {score:.4f}" if cfg.beam else ""), file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main, Config)
