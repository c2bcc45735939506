"""Code: does a model write Python? Two sets of small puzzles, both ours but for the rules of the first.

"legacy ...": the suite of the Mini LLM project as it was scored, faults included, for comparison with its published
figures. It looks at prompt and completion together, so that an empty completion passes two of three functions. The
words that it accepts are not published in full; the lists here have the same length.

The others are fair: they look at the completion alone, and at whether the program works. "fair score" is the mean of
four of them; "compile rate" stands beside it.
"""
import ast
import math
import re
import warnings

import numpy as np

from tasks import sandbox
from tasks.problems import share
from tasks.speaker import Speaker

# ---- the legacy suite: (prompt, texts of which one must occur in the completion)
# The one token that follows must hold the closing bracket, though after "(" that is not even likely.
SYMBOLS = [("(", (")",)), ("[", ("]",)), ("{", ("}",)), ("def func(", (")",)), ("my_list[", ("]",))]
# The space at a prompt's end is a fault: most tokenizers have it at the beginning of the next token.
KEYWORDS = [("def ", ("main", "test", "get", "__init__", "func")), ("import ", ("os", "sys", "re", "json", "numpy")),
            ("class ", ("A", "B", "C", "My", "Test")), ("if ", ("not", "self", "x", "len", "__name__")),
            ("for ", ("i", "x", "item", "line", "key"))]
# Any token passes that is not a closing bracket; one of spaces only fails.
HEADERS = ["def f(x):\n    ", "for i in range(3):\n    ", "if x > 0:\n    "]
# Two of these already hold an accepted text in the prompt, which is looked at too.
FUNCTIONS = [("def add(a, b):\n    return ", ("a", "b", "+")),
             ("def factorial(n):\n    if n == 0:\n        return ", ("1",)),
             ("def is_even(n):\n    return ", ("%", "2", "==", "n"))]
# More than 5 characters, none of them 5 times in a row: nearly anything passes.
DOCSTRINGS = ['def quick_sort(items):\n    """', 'def add(a, b):\n    """', 'class Stack:\n    """']
# Texts whose mean perplexity per token earns points; it depends on the tokenizer.
SNIPPETS = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i)\n",
            "import os\nfor name in os.listdir('.'):\n    print(name)\n",
            "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n"]

# ---- the fair suite
# lines to close so that they parse
LINES = ["print(len(x", "y = f(a[0", "return_value = max(values[1:", "d = {'a': (1", "names = [n.strip(",
         "if (a and (b", "total = sum(x for x in range(10", "print('%d' % (a + b"]
# (prompt, pattern at the beginning of what must follow)
NEXT = [("for i", r" in\b"), ("from os import path\nfrom sys", r" import\b"), ("x = 1 if y == 2", r" else\b"),
        ("try:\n    f()\n", r"(except|finally)\b"), ("if x:\n    y = 1\nel", r"(se:|if )"), ("def f(a, b)", r":"),
        ("with open('a')", r" as\b"), ("squares = [n * n", r" for\b"), ("while Tr", r"ue:"),
        ("print(x) if x is", r" not\b")]
# These end before the line break: most tokenizers merge a line break with the spaces after it.
BLOCKS = ["def f(x):", "for i in range(3):", "if x > 0:", "while n:", "class A:", "with open(p) as f:",
          "try:\n    f()\nexcept OSError:", "def g():\n    for i in x:"]
# (prompt, name of the function, [(arguments, result)])
BODIES = [("def add(a, b):", "add", [((2, 3), 5), ((-1, 1), 0)]),
          ("def is_even(n):", "is_even", [((4,), True), ((7,), False)]),
          ("def largest(values):", "largest", [(([3, 9, 2],), 9), (([-5, -7],), -5)]),
          ("def reverse(text):", "reverse", [(("abc",), "cba"), (("xy",), "yx")]),
          ("def square(x):", "square", [((3,), 9), ((-2,), 4)]),
          ("def last(items):", "last", [(([1, 2],), 2), (("xyz",), "z")]),
          ("def count_vowels(text):", "count_vowels", [(("banana",), 3), (("sky",), 0)]),
          ("def factorial(n):\n    # the product of 1 to n", "factorial", [((5,), 120), ((1,), 1)])]
# beginnings of programs that only have to parse; the "compile rate" is not part of the fair score
OPEN = ["import os\n\n\ndef", "class Stack:\n    def", "def read_lines(path):", "def main():",
        "# print the numbers from 1 to 10"]

# tokens of a completion, at most
TOKENS = {"symbol": 1, "function": 20, "docstring": 30,  # legacy
          "line": 16, "next": 8, "block": 24, "body": 60, "open": 80}  # fair
BODY_STOPS = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#")  # where a body is over


def run(speaker, cfg):
    return legacy(speaker) | fair(speaker, cfg.waive)


def legacy(speaker):
    """The old suite's scores, computed as it did: means of means, and points for perplexity."""
    token = {}  # prompt -> the one token after it
    for prompt in [prompt for prompt, _ in SYMBOLS + KEYWORDS] + HEADERS:
        token[prompt] = speaker.complete(prompt, TOKENS["symbol"])
    brackets = [contains_any(token[prompt], accepted) for prompt, accepted in SYMBOLS]
    keywords = [contains_any(token[prompt], accepted) for prompt, accepted in KEYWORDS]
    indents = []
    for prompt in HEADERS:
        text = token[prompt].strip()
        indents.append(bool(text) and text[0] not in ")]}")

    functions = []
    for prompt, accepted in FUNCTIONS:
        line = first_line(speaker.complete(prompt, TOKENS["function"]))
        functions.append(contains_any(prompt + line, accepted))
    docstrings = []
    for prompt in DOCSTRINGS:
        text = speaker.complete(prompt, TOKENS["docstring"])
        repeats_a_letter = re.search(r"([a-zA-Z])\1{4}", text) is not None
        docstrings.append(len(text) > 5 and not repeats_a_letter)

    # three kinds of puzzle count the same, however many there are of each; hence no standard error
    syntax = np.mean([np.mean(brackets), np.mean(keywords), np.mean(indents)])
    generation = np.mean([np.mean(functions), np.mean(docstrings)])
    n_syntax = len(token)
    n_generation = len(functions) + len(docstrings)
    found = {
        "legacy syntax": (syntax, 0.0, n_syntax),
        "legacy functions": share(functions),
        "legacy docstrings": share(docstrings),
        "legacy generation": (generation, 0.0, n_generation),
    }
    points = 0.0  # by the thresholds of the old suite
    if isinstance(speaker, Speaker):  # the other floors have no perplexity
        perplexity = snippet_perplexity(speaker)
        if perplexity < 50:
            points = 1.0
        elif perplexity < 100:
            points = 0.5
        found["legacy code perplexity"] = (perplexity, 0.0, len(SNIPPETS))
    overall = np.mean([syntax, generation, points])
    found["legacy overall"] = (overall, 0.0, n_syntax + n_generation)
    return found


def snippet_perplexity(speaker):
    """The mean over the snippets of exp(nats per token)."""
    perplexities = []
    for text in SNIPPETS:
        sums, counts = speaker.text_nats(text)
        loss = float(sums.sum() / counts.sum())
        perplexities.append(math.exp(min(loss, 700)))  # above 709 a float64 overflows
    return np.mean(perplexities)


def fair(speaker, waive):
    """The share of each kind of puzzle that is solved; every score is that of the completion alone."""
    lines = []
    for prompt in LINES:
        rest = speaker.complete(prompt, TOKENS["line"], ("\n",))
        lines.append(parses(prompt + rest))
    words = []
    for prompt, pattern in NEXT:
        word = speaker.complete(prompt, TOKENS["next"])
        words.append(re.match(pattern, word) is not None)
    blocks = [indents_a_block(prompt, speaker.complete(prompt, TOKENS["block"])) for prompt in BLOCKS]
    bodies = []
    for prompt, name, cases in BODIES:
        program = prompt + speaker.complete(prompt, TOKENS["body"], BODY_STOPS)
        bodies.append(works(program, name, cases, waive))
    compiles = []
    for prompt in OPEN:
        text = speaker.complete(prompt, TOKENS["open"]).rpartition("\n")[0]  # the last line may be cut off
        compiles.append(len(text.split()) > 2 and parses(prompt + text))
    return {
        "close the line": share(lines),
        "next word": share(words),
        "indented block": share(blocks),
        "function that works": share(bodies),
        "fair score": share(lines + words + blocks + bodies),
        "compile rate": share(compiles),
    }


# ---- rules
def contains_any(text, accepted):
    return any(word in text for word in accepted)


def first_line(text):
    return text.partition("\n")[0]


def parses(code):
    try:
        with warnings.catch_warnings(action="ignore"):  # about dubious escapes such as "\d"
            ast.parse(code)
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def indents_a_block(prompt, text):
    """Whether the first line after the prompt is indented and parses as the body of the block."""
    line = first_line(text.lstrip("\n"))
    program = f"{prompt}\n{line}"
    if line.rstrip().endswith(":"):  # the line opens a block itself, which must not be empty
        indent = line[:-len(line.lstrip())]
        program += f"\n{indent}    pass"
    return text.startswith("\n") and line.startswith(" ") and parses(program)


def works(program, name, cases, waive):
    """Whether the function `name` of the program returns the right result in every case."""
    if not parses(program):
        return False
    for arguments, result in cases:
        if sandbox.call(program, name, *arguments, waive=waive) != (result, ""):
            return False
    return True
