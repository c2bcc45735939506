"""The command: what it measures, what it writes, and how it names mistakes."""
import importlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, command

import evaluate
from evaluate import Config
from prepare.text import prepare
from tasks import bpb, cloze, sandbox
from tasks.speaker import Floor, Speaker
from thimble import checkpoint, generate, runlog
from thimble.files import UserError
from thimble.tokenizer import byte_tokenizer


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
    found, untrained = bpb.run(speaker, cfg), speaker.untrained()
    assert found["loss"][0] == pytest.approx(loss, rel=0.02 if arch == "ternary" else 1e-4)     # 8-bit activations
    assert bpb.run(untrained, cfg)["loss"][0] == pytest.approx(math.log(257), rel=0.05)
    assert untrained.answer("Who?", 9) == speaker.untrained().answer("Who?", 9)
    assert set(cloze.run(speaker, cfg)) == {"rank 1", "top 5", "mean 1/rank"}


def call(*flags, cwd):
    return subprocess.run([sys.executable, ROOT / "evaluate.py", *flags], capture_output=True, text=True, cwd=cwd)


def test_command_line(runs, tmp_path):
    (runs / "bpe" / "step_of_mine").mkdir()                # whatever else lies there
    out = call(f"--checkpoint={runs / 'bpe'}", "--suite=cloze", "--all_steps", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    report = json.loads((runs / "bpe" / "evaluation_steps.json").read_text())["suites"]["cloze"]
    assert list(report) == ["bpe/step_000000", "empty", "echo", "random", "n-gram", "bpe/step_000005"]
    assert set(report["random"]["rank 1"]) == {"value", "error", "n"} and "mean 1/rank" in out.stdout
    assert (runs / "bpe" / "evaluation_steps.png").read_bytes().startswith(b"\x89PNG")
    out = command("evaluate.py", f"--compare={runs / 'bpe'},{runs / 'byte'}", "--suite=bpb",
                  f"--text={runs / 'text.txt'}", cwd=tmp_path)
    assert out.returncode == 0 and "bpe/step_000005" in out.stdout and "byte/step_000005" in out.stdout, out.stderr
    out = command("evaluate.py", f"--checkpoint={runs / 'bpe'}", "--suite=humaneval", "--humaneval=no.gz", cwd=tmp_path)
    assert out.returncode == 1 and "no.gz" in out.stderr.strip().splitlines()[-1] and "Traceback" not in out.stderr


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a run with no report in it."""
    shutil.copytree(runs / "bpe", tmp_path / "bpe", ignore=shutil.ignore_patterns("evaluation*"))
    return tmp_path / "bpe"


def evaluate_as(line, **options):
    evaluate.main(Config(floors=False, **options), command=SimpleNamespace(line=line))


def test_a_suite_leaves_the_results_of_the_others(run, runs, monkeypatch):
    drawn = []
    draw = evaluate.draw_bars
    monkeypatch.setattr(evaluate, "draw_bars", lambda path, suites: drawn.append(suites) or draw(path, suites))
    text = str(runs / "text.txt")
    evaluate_as("first", checkpoint=str(run), suite="cloze")
    evaluate_as("second", checkpoint=str(run), suite="bpb", text=text, seed=7)
    report = json.loads((run / "evaluation.json").read_text())
    assert list(report["suites"]) == ["cloze", "bpb"] == list(drawn[1]) and report["earlier"] == []
    assert {suite: how["command"] for suite, how in report["made"].items()} == {"cloze": "first", "bpb": "second"}
    for how in report["made"].values():
        assert abs(datetime.now().astimezone() - datetime.fromisoformat(how["date"])).total_seconds() < 600
        assert how["commit"] == runlog.git_commit()
    assert report["made"]["bpb"]["seed"] == 7
    first = (run / "evaluation.png").read_bytes()
    assert first.startswith(b"\x89PNG")

    # the same suite again: the new results take its place, the old ones are kept with how they were made
    evaluate_as("third", checkpoint=str(run / "step_000000"), suite="cloze")
    again = json.loads((run / "evaluation.json").read_text())
    assert list(again["suites"]["cloze"]) == ["bpe/step_000000"] and again["suites"]["bpb"] == report["suites"]["bpb"]
    kept = {"suite": "cloze", "columns": report["suites"]["cloze"], "made": report["made"]["cloze"]}
    assert again["earlier"] == [kept] and again["made"]["cloze"]["command"] == "third"


def test_comparing_leaves_the_report_of_a_run(run, runs):
    evaluate_as("own", checkpoint=str(run), suite="cloze")
    own = [(run / name).read_bytes() for name in ("evaluation.json", "evaluation.png")]
    evaluate_as("compare", compare=(str(run), str(runs / "byte")), suite="cloze")
    evaluate_as("steps", checkpoint=str(run), all_steps=True, suite="cloze")
    assert [(run / name).read_bytes() for name in ("evaluation.json", "evaluation.png")] == own
    for kind, names in (("compare", ["bpe/step_000005", "byte/step_000005"]),
                        ("steps", ["bpe/step_000000", "bpe/step_000005"])):
        report = json.loads((run / f"evaluation_{kind}.json").read_text())
        assert list(report["suites"]["cloze"]) == names and report["made"]["cloze"]["command"] == kind
        assert (run / f"evaluation_{kind}.png").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"suites": 5}', "[" * 100_000, "my notes",
                                     '{"suites": {}, "made": []}', '{"suites": {}, "earlier": {}}'])
def test_what_is_not_a_report_is_not_replaced(run, monkeypatch, content):
    (run / "evaluation.json").write_text(content)
    monkeypatch.setattr(cloze, "run", None)                # it is known before anything is measured
    with pytest.raises(UserError, match="evaluation.json is not a report"):
        evaluate_as("x", checkpoint=str(run), suite="cloze")
    assert (run / "evaluation.json").read_text() == content


def test_a_score_that_is_not_a_number_is_null(run, monkeypatch):
    monkeypatch.setattr(cloze, "run", lambda speaker, cfg: {"rank 1": (math.nan, math.inf, 3), "top 5": (0.5, 0.1, 3)})
    evaluate_as("x", checkpoint=str(run), suite="cloze")
    scores = json.loads((run / "evaluation.json").read_text())["suites"]["cloze"]["bpe/step_000005"]
    assert scores == {"rank 1": {"value": None, "error": None, "n": 3}, "top 5": {"value": 0.5, "error": 0.1, "n": 3}}
    assert (run / "evaluation.png").exists()


def test_mistakes_are_named(runs):
    for wrong, word in (({"suite": "gsm8k"}, "--gsm8k"), ({"suite": "bpb", "text": "no.txt"}, "no.txt"),
                        ({"suite": "bpb", "dataset": str(runs / "data" / "byte")}, "--text"),
                        ({"waive": ("luck",)}, "luck"), ({"suite": "lm_eval"}, "--tasks"), ({"n": 0}, "n=0")):
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            evaluate.main(Config(checkpoint=str(runs / "bpe"), **wrong), command=None)


def test_runs_of_one_name_stay_apart(runs, tmp_path):
    shutil.copytree(runs / "bpe", tmp_path / "bpe")
    results, _, _ = evaluate.measure(Config(compare=(str(runs / "bpe"), str(tmp_path / "bpe")), suite="cloze"))
    assert list(results["cloze"])[-1] == str(tmp_path / "bpe") and len(results["cloze"]) == 6


def test_a_missing_layer_is_told_before_anything_is_written(runs, monkeypatch):
    def active(waive):
        raise sandbox.SandboxError("this machine lacks luck")
    monkeypatch.setattr(sandbox, "active", active)
    monkeypatch.setattr(generate, "draw", None)
    with pytest.raises(UserError, match="luck.*--waive"):
        evaluate.main(Config(checkpoint=str(runs / "bpe"), suite="humaneval"), command=None)


@pytest.mark.parametrize("metric, score, text", [
    ("rank 1", (0.5, 0.25, 4), "50.0% +-25.0%"), ("all 35", (1.0, 0.0, 35), "100.0%"), ("top 5", (0.0, 0.0, 9), "0.0%"),
    ("bits per byte", (0.75, 0.012, 9), "0.75 +-0.012"), ("trigram bits per byte", (0.9, 0.0, 9), "0.9"),
    ("loss", (0.5, 0.1, 9), "0.5 +-0.1"), ("legacy code perplexity", (1.0, 0.0, 9), "1"),
    ("wikitext bits_per_byte", (0.8, 0.0, 9), "0.8"), ("seconds", (1.25, 0.0, 9), "1.25"),
    ("rank 1", (math.nan, 0.1, 9), "-"), ("rank 1", None, "-")])
def test_a_score_as_text(metric, score, text):
    """Shares in per cent, all else with four digits, an error of zero left out."""
    assert evaluate.cell(metric, score) == text


def test_a_table_by_hand():
    columns = {"a": {"loss": (2.5, 0.0, 9), "rank 1": (0.25, 0.125, 8)}, "longer": {"rank 1": (1.0, 0.0, 8)}}
    assert evaluate.table_lines("cloze", columns) == ["cloze               a  longer",
                                                      "loss              2.5       -",
                                                      "rank 1  25.0% +-12.5%  100.0%"]


# ---- every key counts
# (key, what it is changed to, further keys that it needs to be changed for it to count)
GSM8K = {"suite": "gsm8k", "gsm8k": "{root}/gsm8k.jsonl", "max_new_tokens": 8}
HUMANEVAL = {"suite": "humaneval", "humaneval": "{root}/humaneval.jsonl", "max_new_tokens": 8}
LM_EVAL = {"suite": "lm_eval", "tasks": ("pets",)}
CASES = [
    ("checkpoint", "{runs}/byte", {}), ("which", "latest", {}), ("suite", "bpb", {}), ("baseline", "{runs}/byte", {}),
    ("compare", ("{runs}/byte", "{root}/bpe"), {"checkpoint": ""}), ("all_steps", True, {}),
    ("dataset", "{root}/other", {"suite": "bpb"}), ("text", "{root}/text.txt", {"suite": "bpb"}),
    ("gsm8k", "{root}/one.jsonl", GSM8K), ("humaneval", "{root}/one.jsonl", HUMANEVAL),
    ("tasks", ("pets", "plants"), LM_EVAL), ("include", "mine", LM_EVAL),
    ("limit", 1, GSM8K), ("limit", 1, HUMANEVAL), ("limit", 1, LM_EVAL),
    ("n", 2, HUMANEVAL), ("temperature", 0.01, HUMANEVAL | {"n": 2}),
    ("max_new_tokens", 3, GSM8K), ("max_new_tokens", 3, HUMANEVAL), ("max_new_tokens", 3, HUMANEVAL | {"n": 2}),
    ("max_new_tokens", 3, LM_EVAL), ("template", "alpaca", GSM8K), ("system", "Be brief.", GSM8K), ("floors", True, {}),
    ("waive", ("network",), HUMANEVAL), ("seed", 7, HUMANEVAL | {"n": 2}), ("seed", 7, {"floors": True}),
    ("device", "cuda:99", {}),
]


def test_every_key_is_listed():
    assert {key for key, _, _ in CASES} == Config.__dataclass_fields__.keys()


@pytest.fixture(scope="module")
def places(runs, tmp_path_factory):
    """A run whose best and latest checkpoints differ, another dataset, a text and problems."""
    root = tmp_path_factory.mktemp("places")
    shutil.copytree(runs / "bpe", root / "bpe", ignore=shutil.ignore_patterns("evaluation*"))
    (root / "bpe" / "best").write_text("step_000000")
    (root / "text.txt").write_text("the big cat ran.")
    text = "the old hen sat on a wet mat. " * 20
    prepare(lambda: iter([text]), "other", "tests", str(runs / "data" / "bpe" / "tokenizer.json"), data_dir=root)
    record = {"question": "the cat?", "answer": "#### 2", "prompt": "the cat", "test": "", "entry_point": "f"}
    other = record | {"question": "a hat?", "prompt": "a hat"}
    for name, records in (("gsm8k", [record, other]), ("humaneval", [record, other]), ("one", [other])):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return root


@pytest.fixture
def measured(runs, places, monkeypatch):
    """A function of settings -> the reports, all that was written for them, and the error.

    The sandbox runs nothing here and says what it was asked; lm_eval is a harness that scores what it was given.
    """
    harness = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")}
    harness["lm_eval"].simple_evaluate = lambda adapter, tasks, task_manager, limit: {
        "results": {task: {"limit,none": limit or 0, "known,none": len(task_manager.all_tasks),
                           "length,none": adapter.max_new_tokens} for task in tasks}}
    harness["lm_eval.api.model"].TemplateLM = object
    harness["lm_eval.tasks"].TaskManager = lambda include_path: SimpleNamespace(
        all_tasks=["pets", "plants", *filter(None, [include_path])])
    for name, module in harness.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tasks.lm_eval", raising=False)

    said = []

    def grade(prompt, completion, *_, waive):
        said.append((prompt, completion, waive))
        return False, ""

    def write_texts(*args):
        said.append(generate.write_texts(*args))
        return said[-1]

    monkeypatch.setattr(sandbox, "active", lambda waive: (sorted(set(sandbox.LAYERS) - set(waive)), {}))
    monkeypatch.setattr(sandbox, "grade", grade)
    monkeypatch.setattr("tasks.speaker.write_texts", write_texts)
    monkeypatch.setattr(evaluate, "draw_bars", lambda *_: False)  # matplotlib takes half a second a picture
    monkeypatch.chdir(places)

    def result(**settings):
        given = {"checkpoint": "{root}/bpe", "suite": "cloze", "floors": False} | settings
        for name, value in given.items():
            if isinstance(value, str):
                given[name] = value.format(root=places, runs=runs)
            elif isinstance(value, tuple):
                given[name] = tuple(part.format(root=places, runs=runs) for part in value)
        reports = [*places.rglob("evaluation*.json"), *runs.rglob("evaluation*.json")]
        for path in reports:
            path.unlink()
        said.clear()
        error = ""
        try:
            evaluate.main(Config(**given), command=SimpleNamespace(line=""))
        except UserError as e:
            error = str(e)
        found = {}  # {path of a report: its scores and how each suite's sandbox was}
        for path in [*places.rglob("evaluation*.json"), *runs.rglob("evaluation*.json")]:
            report = json.loads(path.read_text())
            found[str(path)] = report["suites"], [how["sandbox"] for how in report["made"].values()]
        return found, sorted(map(str, said)), error

    yield result
    sys.modules.pop("tasks.lm_eval", None)


@pytest.mark.parametrize("key, value, needed", CASES)
def test_every_key_changes_the_report_or_what_is_asked(measured, key, value, needed):
    plain = measured(**needed)
    assert plain == measured(**needed) and bool(plain[2]) == (key == "compare")
    changed = measured(**needed | {key: value})
    assert changed[:2] != plain[:2] and bool(changed[2]) == (key == "device")


@pytest.mark.parametrize("suite, text", [
    ("code", "\n    return 1"), ("humaneval", "\n    return 1"), ("skills", "def f(a, b):\n    return a")])
def test_what_is_waived_is_waived_for_every_program(places, monkeypatch, suite, text):
    """Each of the sandbox's entries is told, and no layer but the one that was named."""
    told = []

    def entry(result):
        return lambda *args, waive=(): told.append(waive) or result

    for name, result in (("run", SimpleNamespace(ok=False)), ("call", (None, "x")), ("grade", (False, ""))):
        monkeypatch.setattr(sandbox, name, entry(result))
    monkeypatch.setattr(sandbox, "active", lambda waive: told.append(waive) or ([], {}))
    cfg = Config(suite=suite, humaneval=str(places / "humaneval.jsonl"), waive=("limits",))
    evaluate.check_sandbox(cfg.waive)
    importlib.import_module(f"tasks.{suite}").run(Floor("program", lambda prompt, n: text), cfg)
    assert evaluate.SANDBOXED == {"code", "humaneval", "skills"}
    assert set(told) == {("limits",)} and len(told) > 2


@pytest.mark.parametrize("metric, score, text", [
    ("accuracy", (1.0, 0.1, 9), "100.0% +-10.0%"), ("accuracy", (0.5, 0.0, 9), "50.0%"), ("accuracy", None, "-"),
    ("loss", (0.5, 0.01, 9), "0.5 +-0.01"), ("unigram bits per byte", (1.0, 0.0, 9), "1"),
    ("accuracy", (math.nan, 0.1, 9), "-"), ("points", (7.5, 0.25, 9), "7.5 +-0.25")])
def test_a_cell_of_the_table(metric, score, text):
    assert evaluate.cell(metric, score) == text


def test_the_run_in_question_comes_first_and_its_training_text_is_counted(runs):
    assert evaluate.paths_to_measure(Config(checkpoint="a", baseline="b")) == ["a", "b"]
    assert evaluate.paths_to_measure(Config(compare=("c", "a", "b"))) == ["c", "a", "b"]
    text = (runs / "text.txt").read_bytes()
    counted = evaluate.training_text(Speaker(runs / "byte", Config()), Config())
    assert text.startswith(counted) and 0.8 < len(counted) / len(text) < 0.95  # the tail is val


def test_the_report_names_the_layers_that_were_there(measured):
    found, _, _ = measured(**HUMANEVAL, waive=("network",))
    assert [sandboxes for _, sandboxes in found.values()] == [[sorted(set(sandbox.LAYERS) - {"network"})]]
    found, _, _ = measured(suite="cloze")  # nothing ran there
    assert [sandboxes for _, sandboxes in found.values()] == [[None]]
