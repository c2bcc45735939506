"""The command: what it measures, what it writes, and how it names mistakes."""
import importlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import evaluate
from evaluate import Config
from tasks import bpb, cloze, sandbox
from tasks.speaker import Speaker
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
    out = call(f"--compare={runs / 'bpe'},{runs / 'byte'}", "--suite=bpb", f"--text={runs / 'text.txt'}", cwd=tmp_path)
    assert out.returncode == 0 and "bpe/step_000005" in out.stdout and "byte/step_000005" in out.stdout, out.stderr
    out = call(f"--checkpoint={runs / 'bpe'}", "--suite=humaneval", "--humaneval=no.gz", cwd=tmp_path)
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
