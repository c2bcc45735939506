"""HumanEval: pass@k by counting, and four real problems in the sandbox."""
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from evaluate import Config
from tasks import humaneval, problems, sandbox
from tasks.speaker import Speaker

HUMANEVAL = ROOT.parent / "shared" / "data" / "HumanEval.jsonl.gz"
LACKS = sandbox.active()[1] if sys.platform == "linux" else {"everything": "this is no Linux"}


@pytest.mark.score("E6")
def test_pass_at_k_by_counting(count, score):
    """The share of all draws of k of n completions in which one passes, for every c and k up to some n."""
    most = count(6, 12)
    cases = [(n, c, k) for n in range(1, most + 1) for c in range(n + 1) for k in range(1, n + 1)]
    held = 0
    for n, c, k in cases:
        draws = itertools.combinations([True] * c + [False] * (n - c), k)
        held += humaneval.pass_at_k(n, c, k) == pytest.approx(np.mean([any(draw) for draw in draws]), abs=1e-12)
    score(held, len(cases), f"pass@k of every n up to {most}")
    assert held == len(cases)


def test_pass_at_k_of_problems_by_hand(monkeypatch, tmp_path):
    """Two of four completions of one problem pass, none of the other: pass@1 is 1/4, pass@4 is 1/2."""
    file = tmp_path / "h.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "test": "", "entry_point": "f"}}\n' for i in range(2)))
    monkeypatch.setattr(sandbox, "grade", lambda prompt, text, *_, waive: (prompt + text in ("p0a", "p0c"), ""))
    speaker = Speaker.__new__(Speaker)
    monkeypatch.setattr(Speaker, "completions", lambda *_: ["a", "b", "c", "d"])
    found = humaneval.run(speaker, Config(humaneval=str(file), n=4))
    # Wilson's interval with z = 1 and n = 2: centers 1/3 and 1/2, half widths sqrt(5/32) / 1.5 and sqrt(3/16) / 1.5
    assert found["pass@1"] == (0.25, pytest.approx(1 / 12 + np.sqrt(5 / 32) / 1.5), 2)
    assert found["pass@4"] == (0.5, pytest.approx(np.sqrt(3 / 16) / 1.5), 2)


@pytest.mark.skipif(bool(LACKS) or not HUMANEVAL.exists(), reason=f"needs {HUMANEVAL} and a sandbox, lacks {LACKS}")
def test_humaneval(floors):
    cfg = Config(humaneval=str(HUMANEVAL), limit=4)
    known = {r["prompt"].rstrip(): "\n" + r["canonical_solution"]
             for r in problems.read(HUMANEVAL, "--humaneval", 4, ("canonical_solution",))}
    found = humaneval.run(SimpleNamespace(complete=lambda p, n, s: known[p]), cfg)
    assert found["pass@1"] == (1.0, pytest.approx(1 / 5), 4)      # the error is Wilson's
    for floor in floors:
        assert humaneval.run(floor, cfg)["pass@1"][0] == 0, floor.name
