"""HumanEval: pass@k by counting, and four real problems in the sandbox."""
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from evaluate import Config
from tasks import humaneval, problems, sandbox

HUMANEVAL = ROOT.parent / "shared" / "data" / "HumanEval.jsonl.gz"
LACKS = sandbox.active()[1] if sys.platform == "linux" else {"everything": "this is no Linux"}


def test_pass_at_k_by_counting():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4), (5, 3, 3)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert humaneval.pass_at_k(n, c, k) == pytest.approx(np.mean([any(d) for d in draws]))


@pytest.mark.skipif(bool(LACKS) or not HUMANEVAL.exists(), reason=f"needs {HUMANEVAL} and a sandbox, lacks {LACKS}")
def test_humaneval(floors):
    cfg = Config(humaneval=str(HUMANEVAL), limit=4)
    known = {r["prompt"].rstrip(): "\n" + r["canonical_solution"]
             for r in problems.read(HUMANEVAL, "--humaneval", 4, ("canonical_solution",))}
    found = humaneval.run(SimpleNamespace(complete=lambda p, n, s: known[p]), cfg)
    assert found["pass@1"] == (1.0, 0.0, 4)
    for floor in floors:
        assert humaneval.run(floor, cfg)["pass@1"][0] == 0, floor.name
