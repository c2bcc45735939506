"""GSM8K: three scores, apart, and sums that are read, never executed."""
import json
from types import SimpleNamespace

import pytest
from conftest import ROOT

from evaluate import Config
from tasks import gsm8k


def test_gsm8k_tells_form_from_truth(tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": "<<1+1=2>>2\n#### 1,002"}) for i in range(4)))
    answers = {"q0": "<<1,0>> so\n#### 1002", "q1": "2*3=<<2*3=6>>6, <<10/4=2.5>>2.5\n#### 7", "q2": "I think 1,002.",
               "q3": "<<2+2=5>>5\n#### 1002"}
    found = gsm8k.run(SimpleNamespace(answer=lambda q, n: answers[q]), Config(gsm8k=str(file)))
    assert (found["accuracy"][0], found["format"][0], found["sums agree"][0]) == (0.75, 0.5, 0.25)
    for bad in ("().__class__", "9**9**9", "1/0", "f(1)", "(" * 500, "1 if 1 else 2"):
        assert not gsm8k.agrees(bad, "1")


@pytest.mark.parametrize("sum_, agrees", [
    ("3/4=3/4", True), ("+7=7", True), ("+3+3=6", True), ("3*-2=-6", True), ("3\u22125=\u22122", True),
    (".5*2=1", True), ("10/3=3.33", True), ("3/4=0.5", False), ("+7=8", False), ("3\u22125=2", False), ("2*3=", False),
    ("2**3=8", False)])
def test_sums(sum_, agrees, tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "#### .5"}))
    found = gsm8k.run(SimpleNamespace(answer=lambda q, n: f"<<{sum_}>>\n#### 0.5"), Config(gsm8k=str(file)))
    assert (found["sums agree"][0], found["accuracy"][0]) == (agrees, 1)


def test_results_are_read_with_their_sign_and_point(tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "#### .5"}) + "\n"
                    + json.dumps({"question": "r", "answer": "#### -3"}))
    for answers, accuracy in (({"q": "#### 0.5", "r": "#### \u22123"}, 1), ({"q": "#### 5", "r": "#### 3"}, 0)):
        found = gsm8k.run(SimpleNamespace(answer=lambda q, n: answers[q]), Config(gsm8k=str(file)))      # noqa: B023
        assert found["accuracy"][0] == accuracy


GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason=f"needs {GSM8K}")
def test_the_solutions_of_gsm8k_itself():
    """All 1,319 results are right, and all sums but in 18 solutions, which mark none: they are algebra in words."""
    records = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    known = {record["question"]: record["answer"] for record in records}
    found = gsm8k.run(SimpleNamespace(answer=lambda q, n: known[q]), Config(gsm8k=str(GSM8K)))
    unmarked = sum("<<" not in answer for answer in known.values())
    assert {name: round(score[0] * score[2]) for name, score in found.items()} == {
        "accuracy": 1319, "format": 1319 - unmarked, "sums agree": 1319 - unmarked} and unmarked == 18
