"""GSM8K: three scores, apart, and sums that are read, never executed."""
import json
from types import SimpleNamespace

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
