"""Scores against what they must be: right answers get all, the floors next to nothing, numbers equal a reference."""
import gzip
import importlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
import model
import sample
from evaluate import Config, Floor, Speaker
from prepare.text import prepare
from tasks import sandbox, skills
from thimble import chat, checkpoint, data
from thimble.files import UserError
from thimble.generate import generate
from thimble.tokenizer import byte_tokenizer, load_tokenizer

HUMANEVAL = ROOT.parent / "shared" / "data" / "HumanEval.jsonl.gz"
LACKS = sandbox.active()[1] if sys.platform == "linux" else {"everything": "this is no Linux"}
WAIVE = tuple(LACKS) if sys.platform == "linux" else ()

RIGHT = {
    "geography": "It is Paris.", "literature": "William Shakespeare wrote it.", "history": "It ended in 1945.",
    "science": "The symbol is Au.", "astronomy": "There are eight planets.", "addition": "7 + 8 = 15.",
    "multiplication": "15 * 4 = 60\n\nThat is 15 times 4.",
    "word problem": "3 + 5 - 2 = 6 apples", "speed": "60 / 1.5 = 40 mph", "algebra": "x = 7",
    "count": "Vast, deep, blue.", "format": "HELLO", "sequence": "1, 2, 3, 4, 5", "yes or no": "Yes.",
    "fill in": "The cat sat on the mat.", "comparison": "An elephant is bigger than a mouse.",
    "logic": "Yes, it does.", "common sense": "Yes, because it keeps you dry.", "pattern": "8 + 2 = 10",
    "time": "It is Thursday.", "print": "```python\nprint('Hello, World!')\n```",
    "concept": "A variable stores a value under a name.", "function": "def plus(a, b):\n    return a + b",
    "antonym": "Cold", "plural": "The plural is mice.", "translation": "¡Hola!",
    "correction": "I went to the store yesterday.", "gravity": "Gravity is the force that pulls masses together.",
    "photosynthesis": "Plants turn sunlight into energy.", "sky": "Air scatters blue light more.",
    "haiku": "Cold silicon dreams\nthe patterns learn to whisper\na new kind of mind", "name": "Sparky",
    "grammar": "An adjective, not a noun.", "sentiment": "Positive", "knowledge": "It is a fruit.",
}
WRONG = {"addition": "15 or 16", "count": "Big.", "format": "Hello HELLO hello", "sequence": "1 2 3 4 5 6",
         "yes or no": "Yes it is", "comparison": "The mouse, not the elephant", "logic": "No, yes.",
         "common sense": "Yes.", "print": "print('Hello'", "function": "def f(a, b):\n    return a * b",
         "gravity": "It is a force. It pulls mass.", "haiku": "one line", "name": "I would call it Sparky the robot",
         "grammar": "A noun, hardly an adjective", "sentiment": "negative", "science": "Gold is awesome"}


@pytest.mark.skipif(bool(LACKS), reason=f"this machine lacks the layers {LACKS}")
def test_every_skill_knows_right_from_wrong():
    assert len(skills.SKILLS) == len(RIGHT) == 35 and all(len(s[4]) == 3 for s in skills.SKILLS)
    for _, category, rule, _, _ in skills.SKILLS:
        assert rule(RIGHT[category]), category
        if category in WRONG:
            assert not rule(WRONG[category]), category


def test_floors_of_the_skills_are_low(floors):
    for floor in floors:
        value, error, n = evaluate.skill(floor, Config(waive=WAIVE))["all 35"]
        assert value <= 0.05 and n == 35, floor.name


def test_floors_of_the_code_suite(floors):
    scores = {floor.name: evaluate.code(floor, Config(waive=WAIVE)) for floor in floors}
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
    found = evaluate.code(perfect, Config(waive=WAIVE))
    assert found["fair score"][0] == 1.0


def cut(text, stops):
    return text[:min([len(text), *(text.find(s) for s in stops if s in text)])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two untrained models over one text, one of bytes and one of a BPE; folder of both."""
    root = tmp_path_factory.mktemp("runs")
    text = "\n".join(f"the {a} {b} sat on a {c}." for a, b, c in itertools.product(
        "big red old wet".split(), "cat dog hen fox".split(), "mat hat bed".split()))
    (root / "text.txt").write_text(text)
    for name, kind in (("byte", "byte"), ("bpe", "bpe")):
        folder = prepare(lambda: iter([text]), name, "tests", kind, vocab_size=300, data_dir=root / "data")
        tokenizer = load_tokenizer(folder)
        torch.manual_seed(0)
        m = model.Model(model.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size, block_size=32))
        with torch.no_grad():
            for p in m.parameters():
                p += 0.1 * torch.randn_like(p)
        meta = {"arch": "model", "model_config": asdict(m.config), "dataset": {"path": str(folder)}}
        for step in (0, 5):
            checkpoint.save(root / name, step, m.state_dict(), None, meta, folder / "tokenizer.json", best=step == 5)
    return root


@pytest.mark.parametrize("arch", ["model", "ternary", "hybrid_ssm"])
def test_every_model_file(arch, tmp_path):
    """The whole way for each: bits per byte of a text against a plain forward, ranks, answers, its untrained twin."""
    module, text = importlib.import_module(arch), "to be or not to be " * 5
    torch.manual_seed(0)
    m = module.Model(module.Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257, block_size=128))
    with torch.no_grad():
        for p in m.parameters():
            p += 0.1 * torch.randn_like(p)
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_json())
    checkpoint.save(tmp_path / "run", 0, m.state_dict(), None, {"arch": arch, "model_config": asdict(m.config)},
                    tmp_path / "tokenizer.json", best=True)
    (tmp_path / "text").write_text(text)
    speaker, cfg = Speaker(tmp_path / "run", Config()), Config(text=str(tmp_path / "text"))
    ids = torch.tensor([[256, *text.encode()]])
    loss = m.eval()(ids[:, :-1], ids[:, 1:])[1].item()
    found, untrained = evaluate.bpb(speaker, cfg), speaker.untrained()
    assert found["loss"][0] == pytest.approx(loss, rel=0.02 if arch == "ternary" else 1e-4)     # 8-bit activations
    assert evaluate.bpb(untrained, cfg)["loss"][0] == pytest.approx(math.log(257), rel=0.05)
    assert untrained.answer("Who?", 9) == speaker.untrained().answer("Who?", 9)
    assert set(evaluate.cloze(speaker, cfg)) == {"rank 1", "top 5", "mean 1/rank"}


@pytest.fixture(scope="module")
def floors(runs):
    return evaluate.floors(Speaker(runs / "bpe", Config()), Config())


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_bits_per_byte(runs, name):
    """Of a text: the sum over tokens, one by one within its window, over the bytes of the file."""
    speaker, text = Speaker(runs / name, Config()), (runs / "text.txt").read_text()
    ids = [speaker.tokenizer.eot, *speaker.tokenizer.encode(text)]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = torch.tensor([ids[start:start + 33]])
            logp = speaker.model(window[:, :-1])[0].log_softmax(-1).double()
            nats -= logp[0].gather(1, window[0, 1:, None]).sum().item()
    found = evaluate.bpb(speaker, Config(text=str(runs / "text.txt")))
    assert found["bits per byte"][0] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert found["bits per byte"][2] == len(ids) - 1 and found["bits per byte"][1] > 0
    split = evaluate.bpb(speaker, Config())
    dataset = data.load(runs / "data" / name)
    assert split["bits per byte"][2] == len(dataset.val) - 1
    assert split["trigram bits per byte"][0] == dataset.meta["baselines"]["trigram"]


def test_windows_of_stride_one_are_found_out(runs, tmp_path, capsys):
    """The leak of Mini LLM: overlapping windows, then a random split, so that train has seen all of val."""
    words = " ".join(f"word{i * i % 997}" for i in range(700)).split()
    windows = [" ".join(words[i:i + 40]) for i in range(len(words) - 40)]
    folder = prepare(lambda: iter(windows), "leak", "tests", "byte", data_dir=tmp_path)
    assert json.loads((folder / "meta.json").read_text())["overlap_13gram"] > 0.9
    assert "looks better" in (err := capsys.readouterr().err) or "look better" in err
    found = evaluate.bpb(Speaker(runs / "byte", Config()), Config(dataset=str(folder)))
    assert found["val 13-grams seen in train"][0] > 0.9 and "flattered" in capsys.readouterr().err
    clean = prepare(lambda: iter([" ".join(words)]), "clean", "tests", "byte", data_dir=tmp_path)
    assert json.loads((clean / "meta.json").read_text())["overlap_13gram"] < 0.01


def test_rank_by_hand(runs):
    speaker = Speaker(runs / "bpe", Config())
    for prompt, target in (("the big cat sat", " on"), ("the", " red"), ("", "the")):
        n, whole = len(speaker.tokenizer.encode(prompt)), speaker.tokenizer.encode(prompt + target)
        logits = speaker.model(torch.tensor([whole[:n] or [speaker.tokenizer.eot]]))[0][0, -1]
        order = logits.argsort(descending=True).tolist()
        assert speaker.rank(prompt, target) == 1 + order.index(whole[n])


def test_questions_are_asked_as_they_were_taught(runs, monkeypatch):
    asked = []
    monkeypatch.setattr(Speaker, "_write", lambda self, ids, *a: asked.append(ids) or [""])
    for template in chat.TEMPLATES:
        speaker = Speaker(runs / "bpe", Config(template=template, system="Be kind."))
        assert speaker.answer("Who?", 9) == ""
        talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "me"}]
        ids, counts = chat.encode(speaker.tokenizer, talk, template)
        assert ids[:counts.index(1)] == asked.pop()


def test_stop_texts(runs, monkeypatch):
    speaker = Speaker(runs / "byte", Config())
    said = itertools.cycle([*"    pass\n\ndef x(): ä".encode(), speaker.tokenizer.eot])
    monkeypatch.setattr(sample, "filter_logits", lambda logits, **how: torch.full_like(
        logits, -torch.inf).index_fill_(0, torch.tensor(next(said)), 0.0))
    assert speaker.complete("p", 99) == "    pass\n\ndef x(): ä"
    assert speaker.complete("p", 99, ("\ndef ", "\nclass ")) == "    pass\n"


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_completions_side_by_side_are_those_drawn_alone(runs, name):
    speaker = Speaker(runs / name, Config(temperature=1.5))
    together = speaker.completions("the big cat", 40, ("o",), range(6))
    assert together == [speaker.completions("the big cat", 40, ("o",), (i,))[0] for i in range(6)]
    assert len(set(together)) > 3 and len({len(text) for text in together}) > 1
    assert speaker.completions("the big cat", 40) == [speaker.complete("the big cat", 40)]
    ids, text = speaker.tokenizer.encode("the big cat"), ""
    stream = speaker.tokenizer.stream()
    for token in generate(speaker.model, ids, 40, torch.Generator().manual_seed(3), speaker.stop_ids,
                                 speaker.tokenizer.vocab_size, temperature=1.5):
        text += stream.step(token)
    assert cut(text + stream.flush(), ("o",)) == together[3]


def test_pass_at_k_by_counting():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4), (5, 3, 3)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert evaluate.pass_at_k(n, c, k) == pytest.approx(np.mean([any(d) for d in draws]))


def test_gsm8k_tells_form_from_truth(tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": "<<1+1=2>>2\n#### 1,002"}) for i in range(4)))
    answers = {"q0": "<<1,0>> so\n#### 1002", "q1": "2*3=<<2*3=6>>6, <<10/4=2.5>>2.5\n#### 7", "q2": "I think 1,002.",
               "q3": "<<2+2=5>>5\n#### 1002"}
    found = evaluate.gsm8k(SimpleNamespace(answer=lambda q, n: answers[q]), Config(gsm8k=str(file)))
    assert (found["accuracy"][0], found["format"][0], found["sums agree"][0]) == (0.75, 0.5, 0.25)
    for bad in ("().__class__", "9**9**9", "1/0", "f(1)", "(" * 500, "1 if 1 else 2"):
        assert not evaluate._agrees(bad, "1")


@pytest.mark.skipif(bool(LACKS) or not HUMANEVAL.exists(), reason=f"needs {HUMANEVAL} and a sandbox, lacks {LACKS}")
def test_humaneval(floors):
    cfg = Config(humaneval=str(HUMANEVAL), limit=4)
    known = {r["prompt"].rstrip(): "\n" + r["canonical_solution"]
             for r in evaluate.problems(HUMANEVAL, 4, ("canonical_solution",))}
    found = evaluate.humaneval(SimpleNamespace(complete=lambda p, n, s: known[p]), cfg)
    assert found["pass@1"] == (1.0, 0.0, 4)
    for floor in floors:
        assert evaluate.humaneval(floor, cfg)["pass@1"][0] == 0, floor.name


def call(*flags, cwd):
    return subprocess.run([sys.executable, ROOT / "evaluate.py", *flags], capture_output=True, text=True, cwd=cwd)


def test_command_line(runs, tmp_path):
    (runs / "bpe" / "step_of_mine").mkdir()                # whatever else lies there
    out = call(f"--checkpoint={runs / 'bpe'}", "--suite=cloze", "--all_steps", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    report = json.loads((runs / "bpe" / "evaluation.json").read_text())["suites"]["cloze"]
    assert list(report) == ["bpe/step_000000", "empty", "echo", "random", "n-gram", "bpe/step_000005"]
    assert set(report["random"]["rank 1"]) == {"value", "error", "n"} and "mean 1/rank" in out.stdout
    assert (runs / "bpe" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    out = call(f"--compare={runs / 'bpe'},{runs / 'byte'}", "--suite=bpb", f"--text={runs / 'text.txt'}", cwd=tmp_path)
    assert out.returncode == 0 and "bpe/step_000005" in out.stdout and "byte/step_000005" in out.stdout, out.stderr
    out = call(f"--checkpoint={runs / 'bpe'}", "--suite=humaneval", "--humaneval=no.gz", cwd=tmp_path)
    assert out.returncode == 1 and "no.gz" in out.stderr.strip().splitlines()[-1] and "Traceback" not in out.stderr


def test_mistakes_are_named(runs):
    for wrong, word in (({"suite": "gsm8k"}, "--gsm8k"), ({"suite": "bpb", "text": "no.txt"}, "no.txt"),
                        ({"suite": "bpb", "dataset": str(runs / "data" / "byte")}, "--text"),
                        ({"waive": ("luck",)}, "luck"), ({"n": 0}, "n=0")):
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            evaluate.main(Config(checkpoint=str(runs / "bpe"), **wrong))


@pytest.mark.parametrize("content", [b"404: Not Found", b"", b'{"question": "1+1?"}', b"[1]", b"\xff", b"[" * 9999])
@pytest.mark.parametrize("suite", ["gsm8k", "humaneval"])
def test_damaged_problems_are_named(suite, content, floors, tmp_path):
    for file, body in (("x.jsonl", content), ("x.jsonl.gz", gzip.compress(content)), ("y.jsonl.gz", b"x" + content),
                       ("z.jsonl.gz", gzip.compress(content)[:-9])):
        (tmp_path / file).write_bytes(body)
        with pytest.raises(UserError, match=file):
            evaluate.RUN[suite](floors[0], Config(**{suite: str(tmp_path / file)}))


def test_runs_of_one_name_stay_apart(runs, tmp_path):
    shutil.copytree(runs / "bpe", tmp_path / "bpe")
    results, _, _ = evaluate.measure(Config(compare=(str(runs / "bpe"), str(tmp_path / "bpe")), suite="cloze"))
    assert list(results["cloze"])[-1] == str(tmp_path / "bpe") and len(results["cloze"]) == 6


def test_a_missing_layer_is_told_before_anything_is_written(runs, monkeypatch):
    def active(waive):
        raise sandbox.SandboxError("this machine does not give the sandbox its luck")
    monkeypatch.setattr(sandbox, "active", active)
    monkeypatch.setattr(sample, "generate", None)
    with pytest.raises(UserError, match="luck.*--waive"):
        evaluate.main(Config(checkpoint=str(runs / "bpe"), suite="humaneval"))


def test_floors_say_what_they_are_called(floors):
    by_name = {floor.name: floor for floor in floors}
    assert by_name["empty"].answer("q?", 9) == "" and by_name["echo"].answer("q?", 9) == "q?"
    assert by_name["n-gram"].complete("the ", 3).startswith("old") or len(by_name["n-gram"].complete("the ", 3)) == 12
    assert isinstance(by_name["n-gram"], Floor)
