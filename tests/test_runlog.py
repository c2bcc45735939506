"""What a run says about itself, and which number it gets."""
import json
import math
import types
from pathlib import Path

import pytest
import torch

from thimble import runlog

START = {"step": 0, "record": {}}


def new_log(folder):
    return runlog.Log(folder, types.SimpleNamespace(max_steps=9, resume=False, tracker="none"), START)


def make_runs(folder, *names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "latest").write_text("step_000000")


def test_runs_of_a_name_are_numbered(tmp_path):
    name = tmp_path / "tiny"
    assert runlog.newest(name) is None and runlog.unused(name) == name
    make_runs(tmp_path, "tiny")
    assert runlog.newest(name) == name and runlog.unused(name) == tmp_path / "tiny-2"
    make_runs(tmp_path, "tiny-2", "tiny-10", "tiny-9", "tiny_cpu", "tiny-x", "tiny-3b", "my-tiny-12")
    (tmp_path / "tiny-11").mkdir()  # it never came to a checkpoint
    assert [number for number, _ in runlog.numbered(name)] == [1, 2, 9, 10]
    assert runlog.newest(name) == tmp_path / "tiny-10" and runlog.unused(name) == tmp_path / "tiny-11"


def test_a_name_is_taken_literally(tmp_path):
    make_runs(tmp_path, "a.c", "abc-5")
    assert runlog.unused(tmp_path / "a.c") == tmp_path / "a.c-2"
    assert runlog.unused(tmp_path / "a[bc]") == tmp_path / "a[bc]"
    assert runlog.unused("runs/nowhere") == Path("runs/nowhere")


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (65.9, "1:05"), (3599, "59:59"), (7265, "2:01:05")])
def test_clock(seconds, text):
    assert runlog.clock(seconds) == text


def test_json_gets_null_for_what_it_cannot_hold():
    record = {"step": 3, "loss": float("nan"), "mfu": float("inf"), "lr": 0.5, "event": "skipped"}
    assert runlog.finite(record) == {"step": 3, "loss": None, "mfu": None, "lr": 0.5, "event": "skipped"}


def test_going_back_drops_what_comes_again(tmp_path):
    log = new_log(tmp_path)
    for record in ({"step": 0, "event": "start"}, {"step": 4, "loss": 1.0}, {"step": 4, "val_loss": 1.0},
                   {"step": 8, "loss": 0.5}, {"step": 8, "val_loss": 0.5}, {"step": 9, "event": "skipped"}):
        log.record(record)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "lo')  # killed while it wrote
    log.go_back({"step": 8, "record": {"step": 4}})  # a checkpoint of step 8 from before its evaluation
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], sorted(r.keys() - {"step"})) for r in kept] == [
        (0, ["event"]), (4, ["loss"]), (4, ["val_loss"]), (8, ["loss"]), (9, ["event"])]


def test_without_a_terminal_lines_are_plain(tmp_path, capsys):
    log = new_log(tmp_path)
    log.shown = float("-inf")  # the last line was long ago
    log.progress(3, 1.25, 1000.0, 0.5)
    log.say("stopped")
    assert capsys.readouterr().out.splitlines()[0].startswith("step 3/9  loss 1.2500  1,000 tokens/s  MFU 50%")


def test_the_live_line_makes_room_for_others(tmp_path, capsys):
    log = new_log(tmp_path)
    log.live = True
    log.shown = float("-inf")
    log.progress(3, 1.25, 1000.0, 0.5)
    live = capsys.readouterr().out
    assert live.startswith("\rstep 3/9") and "\n" not in live
    log.say("stopped")
    assert capsys.readouterr().out == "\r" + " " * (len(live) - 1) + "\rstopped\n"


# ---- figures by hand
class Bytes:
    """A dataset of 300 tokens of 2 bytes each."""
    train = range(200)
    val = range(100)
    vocab_size = 1000
    meta = {"bytes": {"train": 400, "val": 200}, "baselines": {"uniform": 8.0, "bigram": 3.5, "trigram": 3.0}}

    def bytes_per_token(self, split):
        return {"train": 2, "val": 4}[split]


def test_time_left_by_hand(tmp_path, monkeypatch, capsys):
    """60 seconds for 3 of 9 steps leave 120; after a resume at step 6, 60 seconds for one step leave 120 for two."""
    now = 1000.0
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now)
    for first, step in ((0, 3), (6, 7)):
        log = new_log(tmp_path)
        log.first_step = first
        log.started = now - 60
        for live, ago, shown in ((False, 9.9, False), (False, 10.1, True), (True, 0.1, False), (True, 0.3, True)):
            log.live = live
            log.shown = now - ago
            log.progress(step, 1.25, 12345.6, 0.456)
            expected = f"step {step}/9  loss 1.2500  12,346 tokens/s  MFU 46%  2:00 left"
            assert capsys.readouterr().out.strip() == (expected if shown else "")
            assert log.shown == (now if shown else now - ago)


def test_an_evaluation_by_hand(tmp_path, monkeypatch, capsys):
    """The line, and loss.png at most once a minute, the last one left to close()."""
    drawn = []
    now = 1000.0
    monkeypatch.setattr(runlog, "plot", lambda run_dir, dataset: drawn.append(run_dir))
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now)
    log = new_log(tmp_path)
    record = {"step": 8, "val_loss": 1.5, "val_error": 0.25, "val_bpb": 2.0, "val_ppl": 4.48, "seconds": 65.0}
    for step, ago, better, n_drawn in ((8, 61, True, 1), (8, 59, False, 1), (9, 1e9, False, 1)):
        log.plotted = now - ago
        log.evaluated(record | {"step": step}, Bytes(), better)
        best = " - best so far" if better else ""
        assert capsys.readouterr().out == (
            f"step {step}: val loss 1.5000 (+- 0.2500), 2.000 bits per byte, perplexity 4.48{best}   "
            "[trigrams 3.000, bigrams 3.500, 1:05]\n")
        assert len(drawn) == n_drawn
    log.close(Bytes())
    assert drawn == [tmp_path] * 2


def test_the_curves_by_hand(tmp_path):
    """4 bits a token of 2 bytes are 2 bits per byte; an evaluation has its bits per byte already."""
    records = ({"step": 1, "event": "start", "loss": 9.0}, {"step": 1, "loss": 4 * math.log(2)},
               {"step": 2, "loss": None}, {"step": 2, "val_loss": 1.0, "val_bpb": 2.5},
               {"step": 3, "val_loss": None, "val_bpb": None})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train, val = runlog.curves(tmp_path, Bytes())
    assert train == [(1, pytest.approx(2.0))] and val == [(2, 2.5)]


def test_what_is_about_to_be_trained_by_hand(capsys):
    """30 steps of 4 x 5 tokens are 600 tokens: 3 epochs of 200. LoRA trains 3 of 12 parameters."""
    model = types.SimpleNamespace(param_groups=lambda: {"embed": [torch.zeros(2, 3)], "matrix": [torch.zeros(6)]})
    lora = types.SimpleNamespace(parameters=lambda: [torch.zeros(3)])
    cfg = types.SimpleNamespace(dataset="ds", arch="model", batch_size=4, max_steps=30, lora_rank=2, optimizer="muon",
                                rest_optimizer="lion", rest_lr=0.01, lr=0.02, model=types.SimpleNamespace(block_size=5))
    environment = {"compile": True, "device": "a CPU", "dtype": "float32", "threads": 2}
    runlog.describe(cfg, model, lora, Bytes(), environment, "runs/x")
    assert capsys.readouterr().out.splitlines() == [
        "ds: 200 tokens (400 bytes) to train on, 100 to validate, vocabulary 1,000",
        "model.py: 12 parameters (embed 6, matrix 6)",
        "LoRA of rank 2: trains 3 parameters, 25.0% of the model's, by lion at rest_lr=0.01",
        "30 steps of 4 x 5 = 20 tokens, 3.0 epochs; a CPU, float32, 2 threads, compiled", "writing to runs/x"]
    cfg.optimizer = "adamw"
    assert runlog.lora_rate(cfg) == ("adamw", "lr", 0.02)


@pytest.mark.parametrize("state,steps", [({"step": 0, "record": {}}, [0, "note"]),
                                         ({"step": 4, "record": {}}, [0, "note", 4]),
                                         ({"step": 4, "record": {"step": 4}}, [0, "note", "val 1", 4, "val 4"])])
def test_what_a_state_without_an_evaluation_keeps(tmp_path, state, steps):
    log = new_log(tmp_path)
    for record in ({"step": 0, "loss": 2.0}, {"note": "no step"}, {"step": 1, "val_loss": 1.5},
                   {"step": 4, "loss": 1.0}, {"step": 4, "val_loss": 1.0}, {"step": 5, "loss": 0.5}):
        log.record(record)
    log.go_back(state)
    kept = []
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        name = f"val {record['step']}" if "val_loss" in record else record.get("step", "note")
        kept.append(name)
    assert kept == steps
