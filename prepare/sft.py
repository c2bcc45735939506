"""Conversations become a dataset for fine-tuning: Alpaca, GSM8K, and JSONL of messages or ShareGPT.

    $ python prepare/sft.py --input=alpaca.json --tokenizer=runs/tiny_cpu --name=alpaca
    $ python prepare/sft.py --input=alpaca.json,gsm8k.jsonl --weights=1,2 --tokenizer=runs/tiny_cpu --name=mix --show=3
    $ python train.py config/sft_tiny.py --dataset=mix --init_from=runs/tiny_cpu

A record is {"instruction", "input", "output"}, {"question", "answer"}, {"messages": [{"role", "content"}]} or
{"conversations": [{"from", "value"}]}. Only the answers, and the token that ends each, count in the loss.
Each conversation has a row of block_size tokens to itself, so that none attends to another under any model file. What
that costs is the places that stay empty at the end of the rows; data.batch cuts off those that a whole batch has.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prepare.text import Counter, baselines, read_jsonl, warn
from thimble import chat, configurator, data, load
from thimble.files import UserError
from thimble.tokenizer import byte_tokenizer

SHAREGPT = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Config:
    input: tuple[str, ...] = ()  # files, .json (a list of records) or .jsonl, divided by commas
    weights: tuple[float, ...] = ()  # how often each file's examples come in an epoch; 0.5: every second one; empty: 1
    name: str = ""  # the dataset becomes data/NAME
    tokenizer: str = ""  # of the model to tune: its run folder or a tokenizer.json; or byte
    template: Literal[chat.TEMPLATES] = "elite"  # how a conversation is written
    block_size: int = 512  # tokens of a row; longer conversations are left out
    val_fraction: float = 0.05  # share of the examples that is held out
    show: int = 0  # print so many examples, what is not in the loss dimmed
    data_dir: str = str(ROOT / "data")  # where datasets live
    seed: int = 1337  # which examples are held out, and their order

    def __post_init__(self):
        if not self.input or not self.name or not self.tokenizer:
            raise ValueError("give --input=FILE,... --name=NAME and --tokenizer=RUN_FOLDER (the model to tune)")
        if self.weights and (len(self.weights) != len(self.input) or not all(0 < w <= 1000 for w in self.weights)):
            raise ValueError(f"weights={self.weights} must be one number above 0, at most 1000, for each of "
                             f"{len(self.input)} files")
        if not 0 < self.val_fraction < 1 or self.block_size < 2:
            raise ValueError(f"val_fraction={self.val_fraction} must lie between 0 and 1, block_size={self.block_size} "
                             "be at least 2")


def read(path):
    """Conversations [[{"role", "content"}]] of one file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"--input: there is no file {path}")
    try:
        records = [(r, where) for r, where in read_jsonl(path)] if path.suffix == ".jsonl" else [
            (r, f"{path}, record {i}") for i, r in enumerate(json.loads(path.read_text(encoding="utf-8-sig")), 1)]
    except (ValueError, RecursionError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no JSON list of records: {str(error)[:100]}") from None
    return [conversation(record, where) for record, where in records]


def conversation(record, where):
    """One record of any of the known kinds as messages, the last of which is an answer."""
    try:
        if "messages" in record:
            messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
        elif "conversations" in record:
            messages = [{"role": SHAREGPT[m["from"]], "content": m["value"]} for m in record["conversations"]]
        else:
            question, answer = (("instruction", "output") if "instruction" in record else ("question", "answer"))
            messages = [{"role": "user", "content": record[question], "input": record.get("input") or ""},
                        {"role": "assistant", "content": record[answer]}]
        while messages[-1]["role"] != "assistant":         # a question that nobody answered
            messages.pop()
        bad = [m for m in messages if m["role"] not in chat.ROLES or not all(isinstance(t, str) for t in m.values())]
        if bad:
            raise ValueError(f"{str(bad[0])[:60]} is no message")
        json.dumps(messages, ensure_ascii=False).encode()  # UnicodeEncodeError on half of a surrogate pair
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{where} is no conversation ({type(error).__name__}: {error}): it needs instruction and "
                        "output, question and answer, messages with role and content, or conversations with from and "
                        "value") from None
    return messages


def held_out(messages, fraction, seed):
    """A function of the text alone, so that a copy goes where its original goes."""
    digest = hashlib.blake2b(json.dumps([seed, messages]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def load_tokenizer(name):
    if name == "byte":
        return byte_tokenizer()
    folder = Path(name).expanduser()
    if (folder / "latest").exists():                       # a run: its checkpoints hold the tokenizer
        from thimble import checkpoint

        folder = checkpoint.load_run(folder, "best").path
    return load.read_tokenizer(folder)


def show(tokenizer, ids, counts):
    """The text as the model sees it, dimmed where it is not in the loss."""
    text, last, stream = "", None, tokenizer.stream(skip_special=False)
    for i, count in zip(ids, counts, strict=True):
        if count != last:
            text, last = text + ("\033[0m" if count else "\033[2m"), count
        text += stream.step(i)
    print(text + stream.flush() + "\033[0m\n" + "-" * 40)


def main(cfg):
    tokenizer = load_tokenizer(cfg.tokenizer)
    rng = np.random.default_rng(cfg.seed)
    rows = {split: [] for split in data.SPLITS}            # (ids, counts, answers)
    n_long = n_empty = 0
    for file, weight in zip(cfg.input, cfg.weights or [1.0] * len(cfg.input), strict=True):
        found = {split: [] for split in data.SPLITS}
        for messages in read(file):
            ids, counts = chat.encode(tokenizer, messages, cfg.template)
            answers = "".join(m["content"] for m in messages if m["role"] == "assistant")
            n_long, n_empty = n_long + (len(ids) > cfg.block_size), n_empty + (not answers.strip())
            if len(ids) <= cfg.block_size and answers.strip():
                split = "val" if held_out(messages, cfg.val_fraction, cfg.seed) else "train"
                found[split].append((ids, counts, answers.encode()))
        print(f"{file}: {len(found['train']):,} examples to train on, {len(found['val']):,} held out")
        n = round(len(found["train"]) * weight)            # whole copies, and a random part for the rest
        whole, rest = divmod(n, max(1, len(found["train"])))
        part = rng.permutation(len(found["train"]))[:rest]
        rows["train"] += found["train"] * whole + [found["train"][i] for i in part]
        rows["val"] += found["val"]
    if n_long or n_empty:
        warn(f"left out: {n_long:,} conversations longer than --block_size={cfg.block_size} tokens, {n_empty:,} "
             "without an answer")
    if not rows["train"] or not rows["val"]:
        raise UserError(f"{len(rows['train'])} examples to train on, {len(rows['val'])} held out: more are needed, or "
                        "a larger --block_size or --val_fraction")
    counters = {split: Counter(sum(len(answer) for _, _, answer in rows[split])) for split in data.SPLITS}
    for split in data.SPLITS:
        for _, _, answer in rows[split]:
            counters[split].add(answer)
        counters[split].flush(final=True)
    base = baselines(counters["train"].ngrams, counters["val"].ngrams)

    options = {"tokenizer": cfg.tokenizer, "template": cfg.template, "weights": list(cfg.weights), "seed": cfg.seed,
               "val_fraction": cfg.val_fraction}
    folder = Path(cfg.data_dir).expanduser() / cfg.name
    with data.Writer(folder, tokenizer, ", ".join(Path(f).name for f in cfg.input), options, base) as out:
        for split in data.SPLITS:
            for k in rng.permutation(len(rows[split])):
                ids, counts, answer = rows[split][k]
                pad = cfg.block_size - len(ids)
                out.append(split, ids + [tokenizer.eot] * pad, len(answer), 1, counts + [0] * pad)
            out.append(split, [tokenizer.eot], 0, 0, [0])  # a window is a row and one token more
        out.meta |= {"row_length": cfg.block_size, "template": cfg.template}
    for split in data.SPLITS:
        lengths, answers = [len(r[0]) for r in rows[split]], sum(sum(r[1]) for r in rows[split])
        print(f"{split}: {len(lengths):,} rows of {cfg.block_size}, {np.mean(lengths) / cfg.block_size:.0%} of them "
              f"filled, {answers:,} tokens in the loss ({answers / sum(lengths):.0%} of the text)")
    for ids, counts, _ in rows["train"][:cfg.show]:
        show(tokenizer, ids, counts)
    print(f"{folder}: written. Next: python train.py config/sft_tiny.py --dataset={cfg.name} --init_from=RUN")


if __name__ == "__main__":
    configurator.run(main, Config)
