"""The code suite: floors score next to nothing, a good completion everything."""
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from evaluate import Config
from tasks import code, sandbox
from tasks.speaker import Speaker

LACKS = sandbox.active()[1] if sys.platform == "linux" else {"everything": "this is no Linux"}
WAIVE = tuple(LACKS) if sys.platform == "linux" else ()


def test_floors_of_the_code_suite(floors):
    scores = {floor.name: code.run(floor, Config(waive=WAIVE)) for floor in floors}
    assert scores["empty"]["legacy functions"][0] == pytest.approx(2 / 3)       # the published fault, reproduced
    assert all(found["fair score"][0] < 0.2 for found in scores.values())
    assert scores["empty"]["fair score"][0] == scores["empty"]["compile rate"][0] == 0


def test_a_good_completion_passes_the_fair_suite():
    rest = {"print(len(x": "))", "y = f(a[0": "])", "return_value = max(values[1:": "])", "d = {'a': (1": ", 2)}",
            "names = [n.strip(": ") for n in x]", "if (a and (b": ")): pass", "total = sum(x for x in range(10": "))",
            "print('%d' % (a + b": "))", "for i": " in x:", "from os import path\nfrom sys": " import x",
            "x = 1 if y == 2": " else 3", "try:\n    f()\n": "except E:", "if x:\n    y = 1\nel": "se:",
            "def f(a, b)": ":", "with open('a')": " as f", "squares = [n * n": " for n in x]", "while Tr": "ue:",
            "print(x) if x is": " not None", "def f(x):": "\n    if x:\n",
            "def add(a, b):": "\n    return a + b\n\ndef x",
            "def is_even(n):": "\n    return n % 2 == 0", "def largest(values):": "\n    return max(values)",
            "def reverse(text):": "\n    return text[::-1]", "def square(x):": "\n    return x * x",
            "def last(items):": "\n    return items[-1]",
            "def count_vowels(text):": "\n    return sum(c in 'aeiou' for c in text)",
            "def factorial(n):\n    # the product of 1 to n": "\n    return n * factorial(n - 1) if n else 1",
            "class A:": "\n\n    x = 1", "try:\n    f()\nexcept OSError:": "\n    pass",
            "def g():\n    for i in x:": "\n        print(i)"}
    perfect = SimpleNamespace(complete=lambda p, n, stops=(), seed=None: cut(rest.get(p, "\n    pass\n"), stops))
    found = code.run(perfect, Config(waive=WAIVE))
    assert found["fair score"][0] == 1.0


def cut(text, stops):
    return text[:min([len(text), *(text.find(s) for s in stops if s in text)])]


def test_perplexity_of_the_snippets_by_hand():
    """exp(nats per token) of each, then the mean; too large a loss is capped."""
    class Speaker:
        def text_nats(self, text):
            nats = 2000.0 if text == code.SNIPPETS[0] else 6.0
            return np.array([nats, 0.0]), np.array([1.0, 2.0] if nats == 6.0 else [1.0, 1.0])

    n = len(code.SNIPPETS)
    assert code.snippet_perplexity(Speaker()) == pytest.approx((math.exp(700) + (n - 1) * math.exp(2)) / n)
    once = Speaker()
    once.text_nats = lambda text: (np.array([6.0, 0.0]), np.array([1.0, 2.0]))
    assert code.snippet_perplexity(once) == pytest.approx(math.exp(2))


@pytest.mark.parametrize("perplexity,points", [(49.9, 1.0), (50.0, 0.5), (99.9, 0.5), (100.0, 0.0)])
def test_legacy_scores_by_hand(monkeypatch, perplexity, points):
    """What says "x" everywhere: the shares are means of means, and perplexity has points below 50 and below 100."""
    speaker = object.__new__(Speaker)
    speaker.complete = lambda prompt, n_tokens: "x"
    monkeypatch.setattr(code, "snippet_perplexity", lambda _: perplexity)
    found = code.legacy(speaker)
    right = [np.mean(["x" in accepted or any(a in "x" for a in accepted) for _, accepted in puzzles])
             for puzzles in (code.SYMBOLS, code.KEYWORDS)]
    syntax = (sum(right) + 1) / 3  # "x" closes no bracket, as an indented line should
    functions = np.mean([any(a in prompt + "x" for a in accepted) for prompt, accepted in code.FUNCTIONS])
    assert found["legacy syntax"][0] == pytest.approx(syntax)
    assert found["legacy functions"][0] == pytest.approx(functions) and found["legacy docstrings"][0] == 0.0
    assert found["legacy generation"][0] == pytest.approx(functions / 2)
    assert found["legacy overall"][0] == pytest.approx((syntax + functions / 2 + points) / 3)
    assert found["legacy code perplexity"] == (perplexity, 0.0, len(code.SNIPPETS))
