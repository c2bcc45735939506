"""Text from a formula: rows of ids whose entropy is known, or Python functions from a grammar.

    $ python prepare/synthetic_code.py                           # data/synthetic_mix
    $ python prepare/synthetic_code.py --kind=functions          # data/synthetic_functions, 16,000 of them, BPE

mix: rows of 257 ids after an <|endoftext|>, a third of them one id repeated, a third counting up, a third random; an id
is a character, so that it can be read. A mask leaves only ids in the loss that others precede in their row. What can be
learned is to tell the three kinds apart; then the loss is the entropy of the random rows, ln(4095) / 3 = 2.773 nats per
token, plus ln 3 once a row, since the first id does not tell which kind follows: `entropy_floor` in meta.json.

functions: each a small valid program whose name, docstring and body agree. Each is a document.
"""
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare.make_tokenizer import check_bpe
from prepare.text import prepare, report
from thimble import configurator, data
from thimble.ngrams import NGrams, baselines
from thimble.tokenizer import char_tokenizer

CHARS = [chr(0x4E00 + i) for i in range(4095)]  # Chinese; 3 bytes each. With <|endoftext|> 4096 ids
ROW = 257  # ids, of which all but the first are in the loss


@dataclass(frozen=True)
class Config:
    kind: Literal["mix", "functions"] = "mix"  # what to make
    samples: int = 16_000           # rows to train on, or functions in all
    seed: int = 1337                # the same seed makes the same text
    vocab_size: int = 1000          # of the functions' bpe, at most
    name: str = ""                  # the dataset becomes data/NAME; default: synthetic_ and the kind
    data_dir: str = str(data.DATA_DIR)  # where datasets live

    def __post_init__(self):
        if self.samples < 20:
            raise ValueError(f"samples={self.samples} must be at least 20")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


# ---- mix
def rows(n, seed):
    """(n, ROW) ids in random order of rows: a third one id repeated, a third counting up, a third random ids."""
    rng = np.random.default_rng(seed)
    size = len(CHARS)
    first = rng.integers(size, size=(n, 1))
    step = (np.arange(n) % 3 == 1)[:, None]  # (n, 1): 1 where a row counts up
    out = (first + np.arange(ROW) * step) % size
    out[2::3] = rng.integers(size, size=out[2::3].shape)
    return rng.permutation(out)


def write_mix(cfg, folder):
    tok = char_tokenizer(CHARS)
    sizes = {"train": cfg.samples, "val": max(12, cfg.samples // 40)}
    counts = {split: NGrams() for split in data.SPLITS}
    is_counted = np.arange(ROW + 1) > 1  # not the <|endoftext|> in front, and not the first id
    with data.Writer(folder, tok, f"prepare/synthetic_code.py, seed {cfg.seed}", {"samples": cfg.samples}) as out:
        for i, split in enumerate(data.SPLITS):
            n = sizes[split]
            ids = rows(n, (cfg.seed, i))
            counts[split].add(np.frombuffer(tok.decode(ids.ravel()).encode(), np.uint8))
            ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=tok.eot)  # (n, ROW + 1)
            out.append(split, ids.ravel(), 3 * n * ROW, n, np.tile(is_counted, n))
        out.meta["baselines"] = baselines(counts["train"], counts["val"])
        out.meta["overlap_13gram"] = None  # there are no words
        floor = math.log(len(CHARS)) / 3 + math.log(3) / (ROW - 1)
        out.meta["entropy_floor"] = floor  # nats per token in the loss
    report(folder, f"python train.py config/tiny_cpu_synthetic.py --dataset={folder.name}")
    print(f"no model can be better than {floor:.4f} nats per token")


# ---- functions
# each maker draws its words and returns (name, [(argument, type)], docstring, type of the result, lines of the body)

THINGS = ("numbers", "prices", "scores", "weights", "ages", "heights", "votes", "points", "levels", "speeds", "counts")
TEXTS = ("text", "line", "sentence", "title", "message", "name", "phrase")
ITEMS = ("words", "names", "lines", "labels", "titles", "cities", "colors", "fruits")


def condition(rng, x):
    """(adjective, test) for a number called x."""
    k = rng.randrange(2, 100)
    return rng.choice([("even", f"{x} % 2 == 0"), ("odd", f"{x} % 2 == 1"), ("positive", f"{x} > 0"),
                       ("nonzero", f"{x} != 0"), (f"above_{k}", f"{x} > {k}"), (f"below_{k}", f"{x} < {k}"),
                       (f"up_to_{k}", f"{x} <= {k}"), (f"divisible_by_{k}", f"{x} % {k} == 0")])


def change(rng, x):
    """(what it does, expression) for a number called x."""
    k = rng.randrange(2, 50)
    return rng.choice([("squared", f"{x} * {x}"), ("doubled", f"2 * {x}"), ("halved", f"{x} // 2"),
                       ("negated", f"-{x}"), (f"plus_{k}", f"{x} + {k}"), (f"minus_{k}", f"{x} - {k}"),
                       (f"times_{k}", f"{x} * {k}"), (f"modulo_{k}", f"{x} % {k}"), ("cubed", f"{x} ** 3"),
                       ("absolute", f"abs({x})")])


def fold(rng):
    things = rng.choice(THINGS)
    x = things[:-1]
    which, test = condition(rng, x)
    how, value = change(rng, x)
    verb, start, line = rng.choice([
        ("sum", 0, f"total += {value}"),
        ("product", 1, f"total *= {value}"),
        ("largest", 0, f"total = max(total, {value})"),
        ("smallest", 10**6, f"total = min(total, {value})")])
    body = [f"total = {start}", f"for {x} in {things}:", f"    if {test}:", f"        {line}", "return total"]
    doc = f"The {verb} of all {which} {things}, {how}."
    return f"{verb}_{which}_{things}_{how}", [(things, "list[int]")], doc, "int", body


def pick(rng):
    things = rng.choice(THINGS)
    x = things[:-1]
    which, test = condition(rng, x)
    how, value = change(rng, x)
    body = [f"return [{value} for {x} in {things} if {test}]"]
    if rng.random() < 0.5:  # the same as a loop
        body = ["result = []", f"for {x} in {things}:", f"    if {test}:", f"        result.append({value})",
                "return result"]
    doc = f"Every {which} one of the {things}, {how}."
    return f"{which}_{things}_{how}", [(things, "list[int]")], doc, "list[int]", body


def search(rng):
    things = rng.choice(THINGS)
    x = things[:-1]
    which, test = condition(rng, x)
    body = [f"for i, {x} in enumerate({things}):", f"    if {test}:", "        return i", "return -1"]
    if rng.random() < 0.4:
        body = [f"return any({test} for {x} in {things})"]
        return f"any_{which}_{x}", [(things, "list[int]")], f"Whether any {x} is {which}.", "bool", body
    return f"find_{which}_{x}", [(things, "list[int]")], f"Where the first {which} {x} is, or -1.", "int", body


def recurse(rng):
    stop = rng.randrange(1, 5)
    start = rng.randrange(1, 9)
    step = rng.randrange(1, 4)
    verb, sign = rng.choice([("sum", "+"), ("product", "*")])
    name = f"{verb}_down_by_{step}_to_{stop}" + (f"_from_{start}" if start > 1 else "")
    body = [f"if n <= {stop}:", f"    return {start}", f"return n {sign} {name}(n - {step})"]
    return name, [("n", "int")], f"The {verb} of n, n - {step}, ... down to {stop}.", "int", body


def countdown(rng):
    limit = rng.randrange(1, 30)
    k = rng.randrange(2, 12)
    verb, line = rng.choice([(f"divisions_by_{k}", f"n //= {k}"), (f"steps_of_{k}", f"n -= {k}")])
    body = ["steps = 0", f"while n > {limit}:", f"    {line}", "    steps += 1", "return steps"]
    doc = f"How many {verb} it takes until n is at most {limit}."
    return f"{verb}_until_{limit}", [("n", "int")], doc, "int", body


def words_of(rng):
    source = rng.choice(TEXTS)
    k = rng.randrange(1, 9)
    method = rng.choice(["upper", "lower", "title", "strip", "capitalize", "swapcase"])
    sep, sep_name = rng.choice([(" ", "spaces"), ("-", "dashes"), ("_", "underscores"), (", ", "commas")])
    body = [f"words = [word.{method}() for word in {source}.split() if len(word) > {k}]",
            f'return "{sep}".join(words)']
    doc = f"The words of the {source} longer than {k}, each in {method}, joined by {sep_name}."
    return f"{method}_words_over_{k}_with_{sep_name}", [(source, "str")], doc, "str", body


def tally(rng):
    items = rng.choice(ITEMS)
    x = items[:-3] + "y" if items.endswith("ies") else items[:-1]  # the singular
    how, key = rng.choice([("length", f"len({x})"), ("first_letter", f"{x}[:1]"), ("last_letter", f"{x}[-1:]"),
                           ("ending", f"{x}[-{rng.randrange(2, 5)}:]"), ("lowercase", f"{x}.lower()")])
    args = [(items, "list[str]")]
    body = ["counts = {}", f"for {x} in {items}:", f"    key = {key}", "    counts[key] = counts.get(key, 0) + 1"]
    if rng.random() < 0.5:
        body.append("return max(counts, key=counts.get, default=None)")
        return f"most_common_{how}_of_{items}", args, f"The {how} that most {items} have.", "object", body
    body.append("return counts")
    return f"count_{items}_by_{how}", args, f"How many {items} there are of each {how}.", "dict", body


def formula(rng):
    a, b = rng.sample(["width", "height", "length", "depth", "speed", "time", "price", "tax", "rate", "mass"], 2)
    k = rng.randrange(2, 60)
    sign = rng.choice(["+", "-", "*"])
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    which, test = condition(rng, a)
    last_sign = rng.choice(["+", "-", "*", "//", "%"])
    body = [f"if {test}:", f"    return {b}", f"result = {a} {sign} {b}", f"return result {last_sign} {k}"]
    doc = f"{a.title()} {word} {b}, scaled by {k}; only the {b} where the {a} is {which}."
    return f"{a}_{word}_{b}_{k}", [(a, "int"), (b, "int")], doc, "int", body


MAKERS = (fold, pick, search, recurse, countdown, words_of, tally, formula)


def function(rng):
    """One function as source text; now and then with a second one that calls it."""
    name, args, doc, result, body = rng.choice(MAKERS)(rng)
    is_typed = rng.random() < 0.4
    is_documented = rng.random() < 0.6
    signature = ", ".join(f"{arg}: {kind}" if is_typed else arg for arg, kind in args)
    arrow = f" -> {result}" if is_typed else ""
    lines = [f"def {name}({signature}){arrow}:"]
    if is_documented:
        lines.append(f'    """{doc.replace("_", " ")}"""')
    lines += [f"    {line}" for line in body]
    if result == "int" and rng.random() < 0.2:
        what, value = change(rng, "value")
        names = ", ".join(arg for arg, _ in args)
        lines += ["", "", f"def {name}_{what}({names}):", f"    value = {name}({names})", f"    return {value}"]
    return "\n".join(lines) + "\n"


def functions(n, seed):
    """n different functions; the seed decides which."""
    rng = random.Random(seed)
    seen = {}  # a dict keeps their order, a set would not
    while len(seen) < n:
        seen[function(rng)] = None
    return list(seen)


def main(cfg):
    name = cfg.name or f"synthetic_{cfg.kind}"
    folder = data.new_folder(cfg.data_dir, name)
    if cfg.kind == "mix":
        write_mix(cfg, folder)
        return
    check_bpe(cfg.vocab_size, "gpt2")
    made = functions(cfg.samples, cfg.seed)
    source = f"prepare/synthetic_code.py, {cfg.samples} functions, seed {cfg.seed}"
    prepare(lambda: iter(made), name, source, "bpe", cfg.vocab_size, data_dir=cfg.data_dir,
            next_command=f"python train.py config/tiny_cpu.py --dataset={name}")


if __name__ == "__main__":
    configurator.run(main, Config)
