"""Runs that real signals end, and what becomes of them: whole processes, but forked, so that torch is imported once.

SIGKILL never loses the page cache, so durability against power loss rests on the order of calls in test_checkpoint.py.
"""
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fate import Fate

import train
from thimble import checkpoint, configurator, machine, runlog

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "micro_batch_size": 4,
        "dropout": 0.1, "max_steps": 30, "eval_every": 6, "save_every": 2, "keep_last": 2, "log_every": 1,
        "device": "cpu", "dtype": "float32"}
LEAST_CALLS = 12  # that change the disk, in the shortest save


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what takes longer than all the steps and is no part of the result: the machine's speed, and the curve for the eye
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(runlog, "plot", lambda *_: None)


def life(flags, before=lambda: None):
    """Fork a process that does what `python train.py FLAGS` does, after before() -> its number. Its output: out.txt."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        descriptor = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)  # the threads of a pool do not survive a fork
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
        before()
        sys.argv = ["train.py", *(f"--{key}={value}" for key, value in flags.items())]
        configurator.run(train.main, train.Config, with_command=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def ended(pid, seconds=60):
    """The exit code of a life, -9 for one that was killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a process is still there after {seconds} s: {Path('out.txt').read_text()[-500:]}")


def flags_of(toy, out, **changes):
    return TINY | {"dataset": toy, "out_dir": out, "resume": checkpoint.holds_run(out)} | changes


def finished(toy, out, **changes):
    """Let a run end, resumed if it has begun -> remains()."""
    assert ended(life(flags_of(toy, out, **changes))) == 0, Path("out.txt").read_text()
    return remains(out)


def remains(out):
    """What a run leaves, clocks aside: sha256 of weights, moments and random states; state, pointers, log."""
    clocks = ("seconds", "tokens_per_second", "mfu")
    folder = checkpoint.load_run(out, optimizer=True).path
    state = json.loads((folder / "meta.json").read_text())["state"]
    record = state.pop("record")
    log = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    log = [line for line in log if "event" not in line]  # how often it was started, and when
    for entry in (state, record, *log):
        for key in clocks:
            entry.pop(key, None)
    names = ("model.safetensors", "optimizer.safetensors")
    return {"sha256": [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names], "state": state,
            "record": record, "log": log, "pointers": [Path(out, name).read_text() for name in ("latest", "best")]}


def strike_in_save(number, nth, at):
    """For life(): the signal comes at the call `at` that changes the disk, in the save `nth` from here."""
    def before():
        save = checkpoint.save
        saves = []

        def struck(*args):
            saves.append(args)
            if len(saves) != nth:
                return save(*args)
            with pytest.MonkeyPatch.context() as patch:
                Fate(patch, at, number, lasting=False)
                return save(*args)
        checkpoint.save = struck
    return before


# ---- SIGKILL
@pytest.mark.score("A1")
def test_killed_at_any_time_it_ends_with_the_same_bits(toy, count, score):
    n_kills = count(7, 100)
    n_inside = count(3, 30)
    rng = random.Random(0)
    started = time.monotonic()
    whole = finished(toy, "whole")
    seconds = time.monotonic() - started
    held = 0
    pending = 0  # kills of the run that is going on
    runs = 0
    fates = [True] * n_inside + [False] * (n_kills - n_inside)
    rng.shuffle(fates)
    inside = sum(fates)
    times = []
    while fates or pending:
        out = f"run{runs}"
        if not fates:
            code = ended(life(flags_of(toy, out)))
        elif fates[-1]:
            dying = strike_in_save(signal.SIGKILL, rng.randrange(1, 5), rng.randrange(LEAST_CALLS))
            code = ended(life(flags_of(toy, out), dying))
        else:
            pid = life(flags_of(toy, out))
            times.append(round(rng.uniform(0, seconds), 3))
            time.sleep(times[-1])
            os.kill(pid, signal.SIGKILL)  # no error if it has ended: it is not waited for yet
            code = ended(pid)
        if code == -signal.SIGKILL:
            fates.pop()
            pending += 1
            continue
        assert code == 0, Path("out.txt").read_text()
        left = remains(out)
        if left == whole:
            held += pending
        else:
            print({key: (left[key], whole[key]) for key in whole if left[key] != whole[key]})
        runs += 1
        pending = 0
        shutil.rmtree(out)
    score(held, n_kills, f"{inside} of them inside a save, {runs} runs")
    print(f"killed after {times} s")  # what pytest shows if it fails
    assert held == n_kills


@pytest.mark.score("A2")
def test_a_run_that_dies_at_any_call_of_a_save_resumes(toy, count, score):
    short = {"max_steps": 12, "eval_every": 4}
    whole = finished(toy, "whole", **short)
    held = 0
    tried = 0
    for at in range(0, 100, count(9, 1)):
        out = f"run{at}"
        code = ended(life(flags_of(toy, out, **short), strike_in_save(signal.SIGKILL, 5, at)))  # of steps 0, 2, 4, 6, 8
        if code == 0:
            break  # this save has fewer calls
        assert code == -signal.SIGKILL, Path("out.txt").read_text()
        tried += 1
        step = checkpoint.load_run(out, optimizer=True).meta["step"]
        held += step in (6, 8) and finished(toy, out, **short) == whole
    score(held, tried, f"{tried} calls of a save that changes `best` and prunes")
    assert held == tried >= count(3, 20)


# ---- signals that ask for an end
def count_steps():
    """For life(): out.txt tells of each step as it begins."""
    step = train.training_step

    def told(*args):
        os.write(2, b"a step begins\n")
        return step(*args)
    train.training_step = told


def endless(toy, out):
    return flags_of(toy, out, max_steps=100_000, schedule="constant")


def signalled(toy, out, number, way, rng):
    """A run that gets the signal -> (its exit code, seconds from the signal to its end; None if inside a save)."""
    if way == "in a save":
        strike = strike_in_save(number, rng.randrange(1, 5), rng.randrange(LEAST_CALLS))
        return ended(life(endless(toy, out), lambda: (count_steps(), strike()))), None
    pid = life(endless(toy, out), count_steps)
    while not Path(out, "latest").exists():
        time.sleep(0.001)
    time.sleep(rng.uniform(0.01, 0.3))
    sent = time.monotonic()
    os.kill(pid, number)
    if way == "twice":
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, number)
    return ended(pid), time.monotonic() - sent


@pytest.mark.score("A6")
def test_a_signal_leaves_a_whole_checkpoint_of_the_step_it_says(toy, count, score):
    rng = random.Random(0)
    cases = [(number, way) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
             for way in ("once", "twice", "in a save")]
    cases = rng.sample(cases * 2 + [(signal.SIGTERM, "in a save")], count(4, 25))
    slowest = 0.0
    failed = []
    for i, (number, way) in enumerate(cases):
        out = f"run{i}"
        code, seconds = signalled(toy, out, number, way, rng)
        text = Path("out.txt").read_text()
        step = checkpoint.load(out, optimizer=True).meta["step"]
        late = text.partition("stopping after this step")[2].count("a step begins")
        good = code == 128 + number and f"saved at step {step}. Continue with: " in text and "--resume" in text
        good = good and late <= 1 and "Traceback" not in text
        again = ended(life(flags_of(toy, out, max_steps=step + 2, schedule="constant")))
        if not good or again != 0 or checkpoint.load(out).meta["step"] != step + 2:
            failed.append((number.name, way, code, late, text[-300:]))
        slowest = max(slowest, seconds or 0)
    score(len(cases) - len(failed), len(cases), f"over {slowest:.2f} s after the signal at most")
    assert not failed


# ---- places
@pytest.mark.score("A10")
def test_a_place_that_cannot_be_written_is_one_clear_line(toy, tmp_path, score):
    tmp_path.chmod(0o755)
    shutil.copytree(toy, "toy")
    for path in (Path("toy"), *Path("toy").iterdir()):
        path.chmod(0o755)
    os.mkdir("readonly")
    os.chmod("readonly", 0o555)
    Path("file").write_text("mine")
    os.symlink("nowhere", "link")
    finished("toy", "taken")
    for path in Path(".").rglob("*"):
        if os.geteuid() == 0 and not path.is_symlink():
            os.chown(path, NOBODY, NOBODY)
    before = tree()
    failed = []
    for out in ("readonly/run", "file", "link", "taken"):
        code = ended(life(flags_of("toy", out, resume=False), not_root))
        text = Path("out.txt").read_text().splitlines()
        if code != 1 or len(text) != 1 or not text[0].startswith("error: ") or out not in text[0] or tree() != before:
            failed.append((out, code, text, tree() - before))
    score(4 - len(failed), 4, "as a user who is not root")
    assert not failed


NOBODY = 65534


def not_root():
    """For life(): root may write anywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def tree():
    paths = [path for path in Path(".").rglob("*") if path.name != "out.txt"]
    return {(str(path), path.is_file() and path.read_bytes()) for path in paths}


# ---- the same again
# train.py FLAGS in a Python of its own, as the seed of the hashes is set when it starts; without what `elsewhere`
# leaves out
PROGRAM = """
import train
from thimble import configurator, machine, runlog
machine.matmul_rate = lambda *_: 1e11
runlog.plot = lambda *_: None
configurator.run(train.main, train.Config, with_command=True)
"""


@pytest.mark.score("A15")
def test_the_seed_of_pythons_hashes_changes_nothing(toy, count, score):
    n = count(2, 5)
    found = []
    for seed in range(n):
        flags = [f"--{key}={value}" for key, value in flags_of(toy, "run", max_steps=8, eval_every=4).items()]
        env = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", PROGRAM, *flags], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        found.append(remains("run"))
        shutil.rmtree("run")
    held = sum(each == found[0] for each in found)
    score(held, n)
    assert held == n
