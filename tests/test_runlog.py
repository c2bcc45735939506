"""What a run says about itself, and which number it gets."""
import json
import types
from pathlib import Path

import pytest

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
