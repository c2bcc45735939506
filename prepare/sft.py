"""Conversations become a dataset for fine-tuning: Alpaca, GSM8K, and JSONL of messages or ShareGPT.

    $ python prepare/sft.py --input=alpaca.json --tokenizer=runs/tiny_cpu --name=alpaca
    $ python prepare/sft.py --input=alpaca.json,gsm8k.jsonl --weights=1,2 --tokenizer=runs/tiny_cpu --name=mix --show=3
    $ python train.py config/sft_tiny.py --dataset=mix --init_from=runs/tiny_cpu

A record is {"instruction", "input", "output"}, {"question", "answer"}, {"messages": [{"role", "content"}]} or
{"conversations": [{"from", "value"}]}. Only the answers, and the token that ends each, count in the loss.
Each conversation has a row of block_size tokens to itself, so that none attends to another, whatever the model file.
The price is padding at the end of the rows; data.batch cuts off as much of it as all rows of a batch have.
"""
import hashlib
import json
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare.documents import find_fault, read_json, read_jsonl
from thimble import chat, configurator, data
from thimble.files import UserError, warn
from thimble.ngrams import NGrams, baselines
from thimble.tokenizer import byte_tokenizer

SHAREGPT = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# ids and counts of a conversation as chat.encode returns them, and the text of its answers as bytes
Example = namedtuple("Example", "ids counts answers")


@dataclass(frozen=True)
class Config:
    input: tuple[str, ...] = ()     # files, .json (a list of records) or .jsonl, separated by commas
    weights: tuple[float, ...] = ()  # copies of each file's examples in an epoch, 0.5: half of them; empty: 1 each
    name: str = ""                  # the dataset becomes data/NAME
    tokenizer: str = ""             # of the model to tune: its run folder or a tokenizer.json; or byte
    template: Literal[("auto", *chat.TEMPLATES)] = "auto"  # how a conversation is written; auto: as the model knows it
    block_size: int = 512           # tokens in a row; longer conversations are left out
    val_fraction: float = 0.05      # share of the examples that is held out
    show: int = 0                   # number of examples to print; what is not in the loss is dimmed
    data_dir: str = str(data.DATA_DIR)  # where datasets live
    seed: int = 1337                # which examples are held out, and their order

    def __post_init__(self):
        if not self.input or not self.name or not self.tokenizer:
            raise ValueError("--input=FILE,..., --name=NAME and --tokenizer=RUN_FOLDER (the model to tune) are needed")
        if self.weights and len(self.weights) != len(self.input):
            raise ValueError(f"weights={self.weights} must be one number for each --input file ({len(self.input)})")
        for weight in self.weights:
            if not 0 < weight <= 1000:
                raise ValueError(f"weights={self.weights} must be above 0 and at most 1000")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} must be at least 2")


# ---- records to conversations
def read(path):
    """The conversations [[{"role", "content"}]] in one file; UserError with the line of a bad one."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"--input: there is no file {path}")
    fault = find_fault(path)
    if fault:
        raise UserError(f"{path} {fault}")
    records = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    return [conversation(record, where) for record, where in records]


def conversation(record, where):
    """One record of any of the known kinds as messages, the last of which is an answer."""
    try:
        messages = messages_of(record)
        while messages[-1]["role"] != "assistant":  # a question without an answer teaches nothing
            messages.pop()
        for message in messages:
            if message["role"] not in chat.ROLES or not all(isinstance(text, str) for text in message.values()):
                raise ValueError(f"{str(message)[:60]} is not a message")
        json.dumps(messages, ensure_ascii=False).encode()  # UnicodeEncodeError on half of a surrogate pair
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{where} is not a conversation ({type(error).__name__}: {error}): it needs instruction and "
                        "output, question and answer, messages with role and content, or conversations with from and "
                        "value") from None
    return messages


def messages_of(record):
    """The messages of a record, unchecked: KeyError and the like where it is of another form."""
    if "messages" in record:
        return [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
    if "conversations" in record:
        return [{"role": SHAREGPT[m["from"]], "content": m["value"]} for m in record["conversations"]]
    if "instruction" in record:
        question, answer = record["instruction"], record["output"]
    else:
        question, answer = record["question"], record["answer"]
    return [{"role": "user", "content": question, "input": record.get("input") or ""},
            {"role": "assistant", "content": answer}]


# ---- conversations to rows
def load_tokenizer(name):
    """The Tokenizer of --tokenizer."""
    if name == "byte":
        return byte_tokenizer()
    from thimble import checkpoint, load  # they import torch, which takes seconds

    path = Path(name).expanduser()
    if (path / "latest").exists():  # a run: its checkpoints hold the tokenizer
        path = checkpoint.load_run(path, "best").path
    return load.read_tokenizer(path)


def examples(cfg, tokenizer, rng):
    """{"train": [Example], "val": [Example]} of all files; train has those of each file as often as its weight says."""
    found = {split: [] for split in data.SPLITS}
    n_long = n_empty = 0
    for file, weight in zip(cfg.input, cfg.weights or [1.0] * len(cfg.input), strict=True):
        train = []
        n_val = 0
        for messages in read(file):
            ids, counts = chat.encode(tokenizer, messages, cfg.template)
            answers = "".join(m["content"] for m in messages if m["role"] == "assistant")
            is_long = len(ids) > cfg.block_size
            is_empty = not answers.strip()
            n_long += is_long
            n_empty += is_empty
            if is_long or is_empty:
                continue
            example = Example(ids, counts, answers.encode())
            if is_held_out(messages, cfg.val_fraction, cfg.seed):
                found["val"].append(example)
                n_val += 1
            else:
                train.append(example)
        print(f"{file}: {len(train):,} examples to train on, {n_val:,} held out")
        found["train"] += weighted(train, weight, rng)
    if n_long or n_empty:
        warn(f"left out: {n_long:,} conversations longer than --block_size={cfg.block_size} tokens, {n_empty:,} "
             "without an answer")
    if not found["train"] or not found["val"]:
        raise UserError(f"{len(found['train'])} examples to train on, {len(found['val'])} held out: more are needed, "
                        "or a larger --block_size or --val_fraction")
    return found


def is_held_out(messages, fraction, seed):
    """A function of the text alone, so that a copy goes where its original goes."""
    digest = hashlib.blake2b(json.dumps([seed, messages]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def weighted(items, weight, rng):
    """Whole copies of the list, and a random part of it for the rest: 2.5 is two copies and half of a third."""
    n = round(len(items) * weight)
    n_copies, n_rest = divmod(n, max(1, len(items)))
    part = rng.permutation(len(items))[:n_rest]
    return items * n_copies + [items[i] for i in part]


def write(folder, cfg, tokenizer, rows, rng):
    """Write the rows in random order as the dataset `folder`."""
    counts = {split: NGrams() for split in data.SPLITS}
    for split in data.SPLITS:
        # the answers alone, like the loss
        counts[split].add(np.frombuffer(b"".join(row.answers for row in rows[split]), np.uint8))
    floors = baselines(counts["train"], counts["val"])
    options = {"tokenizer": cfg.tokenizer, "template": cfg.template, "weights": list(cfg.weights), "seed": cfg.seed,
               "val_fraction": cfg.val_fraction}
    source = ", ".join(Path(file).name for file in cfg.input)
    with data.Writer(folder, tokenizer, source, options, floors) as out:
        for split in data.SPLITS:
            for i in rng.permutation(len(rows[split])):
                row = rows[split][i]
                n_pad = cfg.block_size - len(row.ids)  # padding is never in the loss, so any id will do
                out.append(split, row.ids + [tokenizer.eot] * n_pad, len(row.answers), 1, row.counts + [0] * n_pad)
            out.append(split, [tokenizer.eot], 0, 0, [0])  # a window is a row and one token more
        out.meta |= {"row_length": cfg.block_size, "template": cfg.template}


def show(tokenizer, example):
    """Print the text as the model sees it, dimmed where it is not in the loss."""
    stream = tokenizer.stream(skip_special=False)
    text = ""
    last = None
    for i, count in zip(example.ids, example.counts, strict=True):
        if count != last:
            text += "\033[0m" if count else "\033[2m"  # the terminal's codes for normal and faint
            last = count
        text += stream.step(i)
    print(text + stream.flush() + "\033[0m\n" + "-" * 40)


def main(cfg):
    folder = data.new_folder(cfg.data_dir, cfg.name)
    tokenizer = load_tokenizer(cfg.tokenizer)
    if cfg.template == "auto":
        known = chat.template_of(tokenizer) if tokenizer.record.template else "elite"
        cfg = replace(cfg, template=known)
    tokenizer.record = chat.record_for(tokenizer, cfg.template)  # for the dataset, the checkpoints and all exports
    rng = np.random.default_rng(cfg.seed)
    rows = examples(cfg, tokenizer, rng)
    write(folder, cfg, tokenizer, rows, rng)
    for split in data.SPLITS:
        lengths = [len(row.ids) for row in rows[split]]
        n_counted = sum(sum(row.counts) for row in rows[split])
        print(f"{split}: {len(lengths):,} rows of {cfg.block_size}, {np.mean(lengths) / cfg.block_size:.0%} of them "
              f"filled, {n_counted:,} tokens in the loss ({n_counted / sum(lengths):.0%} of the text)")
    for example in rows["train"][:cfg.show]:
        show(tokenizer, example)
    print(f"{folder}: written")
    print(f"next: python train.py config/sft_tiny.py --dataset={data.name_of(folder)} --init_from=RUN")


if __name__ == "__main__":
    configurator.run(main, Config)
