"""Text from a formula: rows of ids whose entropy is known, or Python functions from a grammar.

    $ python prepare/synthetic_code.py                           # data/synthetic_mix
    $ python prepare/synthetic_code.py --kind=functions          # data/synthetic_functions, 16,000 of them, BPE

mix: rows of 257 ids after an <|endoftext|>, a third of them one id repeated, a third counting up, a third random; an id
is a character, so that it can be read. Only what has a past in its row counts in the loss (a mask says so). To learn is
to tell the three apart; then the loss is the entropy of the random rows, ln(4095) / 3 = 2.773 nats per token, plus ln 3
once a row, as the second id of a row does not follow from the first: `entropy_floor` in meta.json.

functions: each a small valid program whose name, docstring and body fit. Documents for prepare/text.py.
"""

import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prepare import text
from thimble import configurator, data
from thimble.tokenizer import char_tokenizer

CHARS = [chr(0x4E00 + i) for i in range(4095)]  # with <|endoftext|> 4096 ids
ROW = 257  # ids, of which all but the first count


@dataclass(frozen=True)
class Config:
    kind: Literal["mix", "functions"] = "mix"  # what to make
    samples: int = 16_000  # rows to train on, or functions in all
    seed: int = 1337  # the same seed makes the same text
    vocab_size: int = 1000  # of the functions' BPE
    name: str = ""  # the dataset becomes data/NAME; by default synthetic_ and the kind
    data_dir: str = str(ROOT / "data")  # where datasets live

    def __post_init__(self):
        if self.samples < 20:
            raise ValueError(f"samples={self.samples} must be at least 20")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


# ----------------------------------------------------------------------------------------------------------------------
# mix


def rows(n, seed):
    """n rows of ids (n, ROW), by turns one id repeated, ids counting up, random ids."""
    rng, size = np.random.default_rng(seed), len(CHARS)
    first = rng.integers(size, size=(n, 1))
    out = (first + np.arange(ROW) * (np.arange(n) % 3 == 1)[:, None]) % size
    out[2::3] = rng.integers(size, size=out[2::3].shape)
    return rng.permutation(out)


def write_mix(cfg, folder):
    tok = char_tokenizer(CHARS)
    counts = {}
    with data.Writer(folder, tok, f"prepare/synthetic_code.py, seed {cfg.seed}", {"samples": cfg.samples}) as out:
        for part, (split, n) in enumerate({"train": cfg.samples, "val": max(12, cfg.samples // 40)}.items()):
            ids = np.pad(rows(n, (cfg.seed, part)), ((0, 0), (1, 0)), constant_values=tok.eot)
            mask = np.arange(ROW + 1) > 1
            out.append(split, ids.ravel(), 3 * n * ROW, n, np.tile(mask, n))
            counts[split] = text.NGrams()
            counts[split].add(np.frombuffer(tok.decode(ids[:, 1:].ravel()).encode(), np.uint8))
        out.meta["baselines"] = text.baselines(counts["train"], counts["val"])
        out.meta["overlap_13gram"] = None                  # there are no words
        out.meta["entropy_floor"] = math.log(len(CHARS)) / 3 + math.log(3) / (ROW - 1)  # nats per token that counts
    text.report(folder, f"python train.py config/tiny_cpu_synthetic.py --dataset={folder.name}")
    print(f"no model can be better than {out.meta['entropy_floor']:.4f} nats per token")


# ----------------------------------------------------------------------------------------------------------------------
# functions: each maker draws its words and returns (name, arguments with types, docstring, result type, lines)

THINGS = ("numbers", "prices", "scores", "weights", "ages", "heights", "votes", "points", "levels", "speeds", "counts")
TEXTS = ("text", "line", "sentence", "title", "message", "name", "phrase")
ITEMS = ("words", "names", "lines", "labels", "titles", "cities", "colors", "fruits")


def condition(rng, x):
    """(adjective, test) for a number called x."""
    k = rng.randrange(2, 100)
    return rng.choice(
        [("even", f"{x} % 2 == 0"), ("odd", f"{x} % 2 == 1"), ("positive", f"{x} > 0"), ("nonzero", f"{x} != 0"),
         (f"above_{k}", f"{x} > {k}"), (f"below_{k}", f"{x} < {k}"), (f"up_to_{k}", f"{x} <= {k}"),
         (f"divisible_by_{k}", f"{x} % {k} == 0")]
    )  # fmt: skip


def change(rng, x):
    """(what it does, expression) for a number called x."""
    k = rng.randrange(2, 50)
    return rng.choice(
        [("squared", f"{x} * {x}"), ("doubled", f"2 * {x}"), ("halved", f"{x} // 2"), ("negated", f"-{x}"),
         (f"plus_{k}", f"{x} + {k}"), (f"minus_{k}", f"{x} - {k}"), (f"times_{k}", f"{x} * {k}"),
         (f"modulo_{k}", f"{x} % {k}"), ("cubed", f"{x} ** 3"), ("absolute", f"abs({x})")]
    )  # fmt: skip


def fold(rng):
    things = rng.choice(THINGS)
    x = things[:-1]
    which, test = condition(rng, x)
    how, value = change(rng, x)
    verb, start, line = rng.choice([("sum", 0, f"total += {value}"), ("product", 1, f"total *= {value}"),
                                    ("largest", 0, f"total = max(total, {value})"),
                                    ("smallest", 10**6, f"total = min(total, {value})")])  # fmt: skip
    body = [f"total = {start}", f"for {x} in {things}:", f"    if {test}:", f"        {line}", "return total"]
    doc = f"The {verb} of all {which} {things}, {how}."
    return f"{verb}_{which}_{things}_{how}", [(things, "list[int]")], doc, "int", body


def pick(rng):
    things = rng.choice(THINGS)
    x = things[:-1]
    which, test = condition(rng, x)
    how, value = change(rng, x)
    body = [f"return [{value} for {x} in {things} if {test}]"]
    if rng.random() < 0.5:
        body = ["result = []", f"for {x} in {things}:", f"    if {test}:", f"        result.append({value})"]
        body += ["return result"]
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
    stop, start, step = rng.randrange(1, 5), rng.randrange(1, 9), rng.randrange(1, 4)
    verb, sign = rng.choice([("sum", "+"), ("product", "*")])
    name = f"{verb}_down_by_{step}_to_{stop}" + (f"_from_{start}" if start > 1 else "")
    body = [f"if n <= {stop}:", f"    return {start}", f"return n {sign} {name}(n - {step})"]
    return name, [("n", "int")], f"The {verb} of n, n - {step}, ... down to {stop}.", "int", body


def countdown(rng):
    limit, k = rng.randrange(1, 30), rng.randrange(2, 12)
    verb, line = rng.choice([(f"divisions_by_{k}", f"n //= {k}"), (f"steps_of_{k}", f"n -= {k}")])
    body = ["steps = 0", f"while n > {limit}:", f"    {line}", "    steps += 1", "return steps"]
    doc = f"How many {verb} it takes until n is at most {limit}."
    return f"{verb}_until_{limit}", [("n", "int")], doc, "int", body


def words_of(rng):
    source, k = rng.choice(TEXTS), rng.randrange(1, 9)
    method = rng.choice(["upper", "lower", "title", "strip", "capitalize", "swapcase"])
    sep, sep_name = rng.choice([(" ", "spaces"), ("-", "dashes"), ("_", "underscores"), (", ", "commas")])
    body = [f"words = [word.{method}() for word in {source}.split() if len(word) > {k}]"]
    body += [f'return "{sep}".join(words)']
    doc = f"The words of the {source} longer than {k}, each in {method}, joined by {sep_name}."
    return f"{method}_words_over_{k}_with_{sep_name}", [(source, "str")], doc, "str", body


def tally(rng):
    items = rng.choice(ITEMS)
    x = items[:-1] if not items.endswith("ies") else items[:-3] + "y"
    how, key = rng.choice([("length", f"len({x})"), ("first_letter", f"{x}[:1]"), ("last_letter", f"{x}[-1:]"),
                           ("ending", f"{x}[-{rng.randrange(2, 5)}:]"), ("lowercase", f"{x}.lower()")])  # fmt: skip
    body = ["counts = {}", f"for {x} in {items}:", f"    key = {key}", "    counts[key] = counts.get(key, 0) + 1"]
    if rng.random() < 0.5:
        return (f"most_common_{how}_of_{items}", [(items, "list[str]")], f"The {how} that most {items} have.", "object",
                [*body, "return max(counts, key=counts.get, default=None)"])  # fmt: skip
    return f"count_{items}_by_{how}", [(items, "list[str]")], f"How many {items} there are of each {how}.", "dict", [
        *body, "return counts"]  # fmt: skip


def formula(rng):
    a, b = rng.sample(["width", "height", "length", "depth", "speed", "time", "price", "tax", "rate", "mass"], 2)
    k, sign = rng.randrange(2, 60), rng.choice(["+", "-", "*"])
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    which, test = condition(rng, a)
    body = [f"if {test}:", f"    return {b}", f"result = {a} {sign} {b}"]
    body += [f"return result {rng.choice(['+', '-', '*', '//', '%'])} {k}"]
    doc = f"{a.title()} {word} {b}, scaled by {k}; only the {b} where the {a} is {which}."
    return f"{a}_{word}_{b}_{k}", [(a, "int"), (b, "int")], doc, "int", body


MAKERS = (fold, pick, search, recurse, countdown, words_of, tally, formula)


def function(rng):
    """One function as source text; now and then with a second one that calls it."""
    name, args, doc, result, body = rng.choice(MAKERS)(rng)
    typed, documented = rng.random() < 0.4, rng.random() < 0.6
    signature = ", ".join(f"{arg}: {kind}" if typed else arg for arg, kind in args)
    lines = [f"def {name}({signature})" + (f" -> {result}:" if typed else ":")]
    lines += [f'    """{doc.replace("_", " ")}"""'] * documented + [f"    {line}" for line in body]
    if result == "int" and rng.random() < 0.2:
        what, value = change(rng, "value")
        names = ", ".join(arg for arg, _ in args)
        lines += ["", "", f"def {name}_{what}({names}):", f"    value = {name}({names})", f"    return {value}"]
    return "\n".join(lines) + "\n"


def functions(n, seed):
    """n different functions; the seed says which."""
    rng, seen = random.Random(seed), {}
    while len(seen) < n:
        seen[function(rng)] = None
    return list(seen)


def main(cfg):
    name = cfg.name or f"synthetic_{cfg.kind}"
    if cfg.kind == "mix":
        write_mix(cfg, Path(cfg.data_dir).expanduser() / name)
        return
    made = functions(cfg.samples, cfg.seed)
    source = f"prepare/synthetic_code.py, {cfg.samples} functions, seed {cfg.seed}"
    text.prepare(lambda: iter(made), name, source, "bpe", cfg.vocab_size, data_dir=cfg.data_dir,
                 next_command=f"python train.py config/tiny_cpu.py --dataset={name}")  # fmt: skip


if __name__ == "__main__":
    configurator.run(main, Config)
