"""The loop: it learns, stops where it should, resumes to the bit, survives kills, NaN and users."""
import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import model
import optim
import search
import train
from optim import lr_scale
from thimble import checkpoint, configurator, data, files, machine, runlog
from thimble.tokenizer import Tokenizer

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "max_steps": 12, "eval_every": 6,
        "log_every": 1, "dropout": 0.1, "device": "cpu"}


PLOT = runlog.plot


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what takes longer than a tiny run and does not change its result: measuring the machine, and drawing the curve
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(runlog, "plot", lambda *_: None)


def config(toy, out="run", **changes):
    return configurator.load(train.Config, **(TINY | {"dataset": str(toy), "out_dir": out} | changes))


def typed(keys):
    """The Command of a command line with these keys."""
    return configurator.Command("train.py ...", [], keys, keys)


def lines(run):
    return [json.loads(line) for line in Path(f"{run}/metrics.jsonl").read_text().splitlines()]


def steps(run):
    return [r for r in lines(run) if "loss" in r and "event" not in r]


def digest(run):
    """sha256 of the newest weights and of all that the next step depends on."""
    folder = checkpoint.load_run(run).path
    state = json.loads((folder / "meta.json").read_text())["state"]
    seconds = ("seconds", "record")  # clocks differ
    files = [folder / "model.safetensors", folder / "optimizer.safetensors"]
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return folder.name, sums, {k: v for k, v in state.items() if k not in seconds}


# ---- it learns, and says so
def test_it_learns_and_leaves_a_run_folder(toy, monkeypatch, capsys):
    monkeypatch.setattr(runlog, "plot", PLOT)
    record = train.train(config(toy, max_steps=150, eval_every=75, lr=0.02, dropout=0.0, prompts=("cat sat",)))
    meta = data.load(toy).meta
    assert record["step"] == 150 and record["val_bpb"] < meta["baselines"]["bigram"]
    assert record["val_loss"] == record["best_loss"] and record["tokens"] == 150 * 8 * 32
    assert sorted(os.listdir("run")) == ["best", "config.json", "latest", "lock", "loss.png", "metrics.jsonl",
                                         "step_000000", "step_000075", "step_000150"]
    out = capsys.readouterr().out
    assert out.count("bits per byte") == 2 and "trigrams" in out and out.count("\n    cat sat") >= 2
    assert configurator.from_flat(train.Config, json.loads(Path("run/config.json").read_text())).lr == 0.02
    assert Path("run/loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_reported_score_is_that_of_the_reloaded_checkpoint(toy):
    record = train.train(config(toy))
    m = checkpoint.load_model(checkpoint.load("run", which="latest"))
    dtype = getattr(torch, checkpoint.load("run").meta["environment"]["dtype"])
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    assert train.evaluate(m, data.load(toy), autocast)["val_loss"] == record["val_loss"]


def test_evaluation_counts_every_token_once_for_any_batch_size(toy):
    dataset = data.load(toy)
    torch.manual_seed(0)
    m = model.Model(model.Config(n_layer=1, n_head=2, n_embd=32, vocab_size=257, block_size=32))
    got = train.evaluate(m, dataset, torch.autocast("cpu", enabled=False))
    nats, ids = [], torch.from_numpy(np.array(dataset.val)).long()
    for start in range(0, len(ids) - 1, 32):  # one window at a time
        window = ids[start:start + 33]
        nats += F.cross_entropy(m(window[None, :-1])[0][0], window[1:], reduction="none").tolist()
    assert len(nats) == len(ids) - 1 == got["val_tokens"]
    assert abs(np.mean(nats) - got["val_loss"]) < 1e-5
    assert abs(got["val_bpb"] - np.mean(nats) / math.log(2)) < 1e-4  # bytes are tokens here
    assert m.training


def test_it_runs_exactly_max_steps_at_the_closed_form_rate(toy):
    cfg = config(toy, schedule="wsd", warmup_steps=4, max_steps=13, eval_every=5)
    assert train.train(cfg)["step"] == 13
    assert [r["step"] for r in steps("run")] == list(range(1, 14))
    for r in steps("run"):
        assert r["lr"] == cfg.lr * lr_scale(r["step"], "wsd", 13, 4, cfg.min_lr, cfg.decay_frac)
    (Path(cfg.out_dir) / ".trash-step_000004").mkdir()  # a kill has left it
    assert train.train(replace(cfg, resume=True))["step"] == 13  # nothing left to do
    assert not list(Path(cfg.out_dir).glob(".trash-*"))
    assert [r["step"] for r in steps("run")] == list(range(1, 14))


def test_micro_batches_change_nothing(toy):
    for out, micro in (("whole", 0), ("parts", 2)):
        train.train(config(toy, out, micro_batch_size=micro, dtype="float32", dropout=0.0, max_steps=4, eval_every=4))
    for a, b in zip(steps("whole"), steps("parts"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3


def test_micro_batches_are_weighed_by_tokens(toy, monkeypatch):
    batch = data.batch

    def masked(*args, **kwargs):
        x, y = batch(*args, **kwargs)
        y[:3] = -1  # a whole micro-batch and a part of another count nothing
        y[4, 5:] = -1
        return x, y
    monkeypatch.setattr(data, "batch", masked)
    test_micro_batches_change_nothing(toy)


def test_a_model_with_more_ids_than_its_tokenizer_trains_and_samples(toy):
    assert train.train(config(toy, vocab_size=4000, max_steps=2, eval_every=1, prompts=("the",)))["step"] == 2


def test_a_batch_without_targets_is_passed_over(toy, monkeypatch):
    batch = data.batch

    def masked(tokens, step, *args):
        x, y = batch(tokens, step, *args)
        return x, np.full_like(y, -1) if step in (2, 3, 4, 5) else y
    monkeypatch.setattr(data, "batch", masked)
    train.train(config(toy, micro_batch_size=4))
    train.train(config(toy, "whole"))
    for out in ("run", "whole"):
        assert [r["step"] for r in steps(out)] == [1, 2, 7, 8, 9, 10, 11, 12]
        assert not [r for r in lines(out) if r.get("event") == "skipped"]


def test_a_signal_before_the_first_step_leaves_what_it_says_was_saved(toy, monkeypatch, capsys):
    monkeypatch.setattr(machine, "catch_signals", lambda: contextlib.nullcontext([signal.SIGTERM]))
    with pytest.raises(SystemExit):
        train.train(config(toy))
    assert "saved at step 0" in capsys.readouterr().out
    assert checkpoint.load("run").meta["step"] == 0


def test_a_parameter_that_does_nothing_is_named(toy, tmp_path, monkeypatch):
    (tmp_path / "idle.py").write_text("from model import *\nfrom model import Model as Plain\n\n"
                                      "class Model(Plain):\n    def __init__(self, config):\n"
                                      "        super().__init__(config)\n        self.extra = RMSNorm(4, 1e-5)\n"
                                      "    def param_groups(self):\n        groups = super().param_groups()\n"
                                      "        return groups | {'vector': groups['vector'] + [self.extra.weight]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(files.UserError, match="idle.py: no gradient reaches extra.weight"):
        train.train(config(toy, arch="idle"))
    assert not os.path.exists("run")                       # a start that fails leaves no run
    os.mkdir("run")
    Path("run/notes.txt").write_text("mine")
    with pytest.raises(files.UserError, match="no gradient reaches"):
        train.train(config(toy, arch="idle"))
    assert Path("run/notes.txt").exists() and not checkpoint.holds_run("run")


def test_early_stopping(toy, monkeypatch, capsys):
    evaluate, losses = train.evaluate, iter([2.0, 1.0, 1.1, 1.2, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *args: evaluate(*args) | {"val_loss": next(losses)})
    record = train.train(config(toy, max_steps=100, eval_every=5, patience=2))
    assert record["step"] == 20 and record["best_step"] == 10
    assert "no better validation loss in 2" in capsys.readouterr().out


def test_a_failing_compiler_is_not_fatal(toy, monkeypatch, capsys):
    def broken(model):
        raise RuntimeError("no compiler\nsecond line")
    plain = train.train(config(toy, "plain"))
    monkeypatch.setattr(torch, "compile", broken)
    assert train.train(config(toy, "compiled", compile=True))["val_loss"] == plain["val_loss"]
    out = capsys.readouterr().out
    assert "torch.compile does not work here (no compiler second line)" in out and "threads, compiled" not in out
    assert lines("compiled")[0]["compile"] is False  # what came of it
    assert checkpoint.load("compiled").meta["environment"]["compile"] is False
    train.train(config(toy, "compiled", compile=True, resume=True))
    assert "warning" not in capsys.readouterr().err  # as before: without


def test_a_working_compiler_is_recorded(toy, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model: lambda *args: model(*args))
    train.train(config(toy, compile=True))
    assert "threads, compiled" in capsys.readouterr().out and lines("run")[0]["compile"] is True


def test_same_seed_same_bits_and_another_seed_others(toy):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.train(config(toy, out, seed=seed))
    assert digest("a") == digest("b") != digest("c")


def test_sampling_and_logging_do_not_touch_the_training(toy):
    train.train(config(toy, "quiet", log_every=100))
    train.train(config(toy, "chatty", prompts=("the cat", "dog"), log_every=1))
    assert digest("quiet")[1] == digest("chatty")[1]


def test_a_tracker_gets_what_metrics_jsonl_gets(toy, monkeypatch):
    seen = []
    run = types.SimpleNamespace(log=lambda values, step: seen.append({"step": step} | values), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **kwargs: run))
    train.train(config(toy, tracker="trackio"))
    assert seen == [r for r in lines("run") if "event" not in r] and len(seen) == 14


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_goes_on_with_the_same_run_and_ends_it(toy, monkeypatch, tracker):
    seen = []
    run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: seen.append("finish"))

    def wandb(project, name, id, resume, config):  # what each of them takes: an id is wandb's alone
        seen.append((name, id, resume))
        return run

    def trackio(project, name, resume, config):
        seen.append((name, name, resume))
        return run
    monkeypatch.setitem(sys.modules, tracker, types.SimpleNamespace(init=locals()[tracker]))
    train.train(config(toy, "runs/mine", tracker=tracker))
    train.train(config(toy, "runs/mine", tracker=tracker, resume=True))
    train.train(config(toy, "elsewhere/mine", tracker=tracker))
    first, _, again, _, other, _ = seen
    assert first == again and first[0] == other[0] == "mine" and first[2] == "allow" and seen[1::2] == ["finish"] * 3
    assert (first[1] == other[1]) == (tracker == "trackio")  # another run of that name is another one to wandb


def test_tensorboard_hides_what_a_resume_repeats(toy, monkeypatch):
    purged, seen, closed = [], [], []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            purged.append(purge_step)

        def add_scalar(self, key, value, step):
            seen.append(step)

        def flush(self):
            pass

        def close(self):
            closed.append(True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    cfg = config(toy, tracker="tensorboard", schedule="constant")
    train.train(cfg)
    seen.clear()
    train.train(replace(cfg, max_steps=14, resume=True))
    assert purged[1] == min(seen) == 13 and closed == [True, True]


# ---- it resumes
@pytest.fixture
def one_thread():
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.score("A4")
def test_resume_is_exact_in_any_combination(toy, one_thread, count, score):
    combinations = list(itertools.product(("muon", "adamw"), ("float32", "bfloat16"), (0.0, 0.1), (0, 4), (1, 2)))
    assert len(combinations) == 32
    failed = []
    tried = random.Random(0).sample(combinations, count(3, 32))
    for optimizer, dtype, dropout, micro_batch_size, threads in tried:
        torch.set_num_threads(threads)
        cfg = config(toy, optimizer=optimizer, lr=0.01, dtype=dtype, dropout=dropout, max_steps=8, eval_every=4,
                     micro_batch_size=micro_batch_size)
        train.train(cfg)
        whole = digest("run"), [(r["step"], r["loss"]) for r in steps("run")]
        die_after("run", 4)
        train.train(replace(cfg, resume=True))
        if (digest("run"), [(r["step"], r["loss"]) for r in steps("run")]) != whole:
            failed.append((optimizer, dtype, dropout, micro_batch_size, threads))
        shutil.rmtree("run")
    score(len(tried) - len(failed), len(tried))
    assert not failed


def die_after(run, step):
    """Leave of a finished run what it had when it had just saved that step."""
    for folder in Path(run).glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    Path(run, "latest").write_text(f"step_{step:06d}")
    Path(run, "best").unlink(missing_ok=True)


@pytest.mark.score("A5")
def test_resume_at_any_step_reads_the_same_windows(toy, monkeypatch, count, score):
    seen = []
    batch = train.next_batch

    def noted(*args):
        x, y = batch(*args)
        seen.append(x.numpy().tobytes())
        return x, y
    monkeypatch.setattr(train, "next_batch", noted)
    cfg = config(toy, n_embd=8, batch_size=96, max_steps=20, eval_every=20, save_every=1, keep_last=0)
    train.train(cfg)
    assert 20 * 96 > 3 * (len(data.load(toy).train) // 32)  # three ends of an epoch lie between these steps
    whole = seen[1:]  # the first is for the compiler
    held = 0
    tried = random.Random(0).sample(range(20), count(2, 20))
    for step in sorted(tried, reverse=True):
        die_after("run", step)
        seen.clear()
        train.train(replace(cfg, resume=True))
        held += seen[1:] == whole[step:]
    score(held, len(tried))
    assert held == len(tried)


def closed_form(cfg, step):
    """The rate at a step, for all schedules, as fractions of the peak: written apart from optim.py."""
    def fall(p):
        return cfg.min_lr + (1 - cfg.min_lr) * math.cos(math.pi / 2 * p) ** 2
    if step < cfg.warmup_steps:
        return step / cfg.warmup_steps
    after = step - cfg.warmup_steps
    left = max(1, cfg.max_steps - cfg.warmup_steps)
    match cfg.schedule:
        case "constant":
            return 1
        case "linear":
            return 1 - (1 - cfg.min_lr) * after / left
        case "cosine":
            return fall(after / left)
        case "wsd":
            begin = max(cfg.warmup_steps, round(cfg.max_steps * (1 - cfg.decay_frac)))
            return fall(max(0, step - begin) / max(1, cfg.max_steps - begin))
    lengths = [cfg.restart_steps]
    while sum(lengths) <= after:
        lengths.append(max(1, round(lengths[-1] * cfg.restart_mul)))
    *done, now = lengths
    return cfg.restart_decay ** len(done) * fall((after - sum(done)) / now)


@pytest.mark.score("A13")
def test_any_schedule_is_followed_to_its_last_step_through_any_resumes(toy, count, score):
    rng = random.Random(0)
    n = count(3, 200)
    failed = []
    for _ in range(n):
        max_steps = rng.randrange(2, 16)
        cfg = config(toy, n_embd=8, block_size=8, batch_size=2, dtype="float32", save_every=1, keep_last=0,
                     max_steps=max_steps, eval_every=rng.randrange(1, 20), schedule=rng.choice(optim.SCHEDULES),
                     warmup_steps=rng.randrange(max_steps + 1), min_lr=rng.random(), decay_frac=rng.random(),
                     restart_steps=rng.randrange(1, 8), restart_mul=1 + rng.random(), restart_decay=rng.random())
        train.train(cfg)
        for _ in range(rng.randrange(1, 6)):
            die_after("run", rng.randrange(max_steps + 1))
            record = train.train(replace(cfg, resume=True))
        rates = [r["lr"] / cfg.lr for r in steps("run")]
        expected = [closed_form(cfg, step) for step in range(1, max_steps + 1)]
        last = max(int(folder.name[5:]) for folder in Path("run").glob("step_*"))
        same = len(rates) == max_steps and np.allclose(rates, expected, rtol=0, atol=1e-12)
        if not same or not last == record["step"] == max_steps or (Path("run/latest").read_text()[5:] != f"{last:06d}"):
            failed.append((cfg, rates, expected))
        shutil.rmtree("run")
    score(n - len(failed), n)
    assert not failed


@pytest.mark.parametrize("changes", [
    {"rest_optimizer": "lion", "rest_lr": 1e-3},
    {"dtype": "float32", "schedule": "restarts", "restart_steps": 5}, {"optimizer": "lion", "lr": 1e-3},
    {"arch": "hybrid_ssm", "n_layer": 2}, {"arch": "hybrid_ssm", "n_layer": 2, "ssm": "mamba1"},
], ids=str)
def test_resume_is_exact(toy, changes):
    cfg = config(toy, "whole", **({"dtype": "bfloat16"} | changes))  # auto may measure differently in each run
    train.train(cfg)
    cut = replace(cfg, out_dir="cut")
    train.train(cut)
    for folder in ("step_000012", "step_000006"):  # as if it had died after step 6, and then before
        shutil.rmtree(f"cut/{folder}")
        os.remove("cut/latest")
        os.remove("cut/best")
        train.train(replace(cut, resume=True))
        assert digest("cut") == digest("whole")
        assert [(r["step"], r["loss"]) for r in steps("cut")] == [(r["step"], r["loss"]) for r in steps("whole")]


@pytest.mark.parametrize("arch", ["model", "hybrid_ssm"])
def test_a_worse_result_after_a_resume_does_not_replace_the_best(toy, monkeypatch, arch):
    evaluate, losses = train.evaluate, iter([2.0, 3.0, 2.5, 1.5])
    monkeypatch.setattr(train, "evaluate", lambda *args: evaluate(*args) | {"val_loss": next(losses)})
    cfg = config(toy, arch=arch, max_steps=12, eval_every=6, schedule="constant")
    train.train(cfg)
    assert Path("run/best").read_text() == "step_000006"
    record = train.train(replace(cfg, max_steps=18, resume=True))
    assert Path("run/best").read_text() == "step_000006" and record["best_loss"] == 2.0 and record["best_step"] == 6
    record = train.train(replace(cfg, max_steps=24, resume=True))
    assert Path("run/best").read_text() == "step_000024" and record["best_loss"] == 1.5


def test_counters_go_on_after_a_resume(toy):
    train.train(config(toy, schedule="constant"))
    before = steps("run")[-1]
    record = train.train(config(toy, schedule="constant", max_steps=18, resume=True))
    assert record["tokens"] == 18 * 8 * 32 and record["seconds"] > before["seconds"]


def test_what_came_after_the_checkpoint_is_not_logged_twice(toy):
    train.train(config(toy))
    with open("run/metrics.jsonl", "a") as f:
        f.write('{"step": 14, "loss": 1.0}\n{"step": 15, "lo')  # died while it wrote
    train.train(config(toy, max_steps=14, schedule="constant", resume=True))
    assert [r["step"] for r in steps("run")] == list(range(1, 15))


def evaluations(run):
    return [r["step"] for r in lines(run) if "val_loss" in r]


@pytest.mark.parametrize("before", [True, False], ids=["killed before the save", "killed after it"])
def test_no_evaluation_is_lost_or_doubled_by_a_kill(toy, monkeypatch, before):
    save = checkpoint.save

    def killed(run_dir, step, *args):
        if step == 12 and not before:
            save(run_dir, step, *args)
        if step == 12:
            raise KeyboardInterrupt
        save(run_dir, step, *args)
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(toy, max_steps=18))
    assert evaluations("run") == [6, 12]
    monkeypatch.setattr(checkpoint, "save", save)
    train.train(config(toy, max_steps=18, resume=True))
    assert evaluations("run") == [6, 12, 18] and [r["step"] for r in steps("run")] == list(range(1, 19))


def test_no_evaluation_is_doubled_where_the_checkpoint_had_none(toy, monkeypatch):
    save = checkpoint.save
    train.train(config(toy, max_steps=8, save_every=4))
    for name in ("latest", "best", "step_000006", "step_000008"):  # step 4 was saved, not evaluated
        path = Path("run", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(toy, max_steps=8, eval_every=4, resume=True))
    monkeypatch.setattr(checkpoint, "save", save)
    train.train(config(toy, max_steps=8, eval_every=4, resume=True))
    assert evaluations("run") == [4, 8]


@pytest.mark.parametrize("changes, message", [
    ({"n_embd": 64}, "is another model"), ({"dataset": "other"}, "is not the dataset"),
])
def test_resume_refuses_another_model_or_dataset(toy, changes, message, tmp_path):
    train.train(config(toy))
    if "dataset" in changes:
        from prepare.text import prepare
        changes = {"dataset": str(prepare(lambda: iter(["one two three. " * 99]), "other", "tests", "byte",
                                          data_dir=tmp_path))}
    with pytest.raises(files.UserError, match=message):
        train.train(config(toy, resume=True, **changes))


@pytest.mark.score("A14")
def test_whatever_differs_on_a_resume_is_named(toy, tmp_path, monkeypatch, one_thread, capsys, score):
    from prepare.text import prepare
    torch.set_num_threads(1)
    for name, kind in (("other", "byte"), ("letters", "char")):
        prepare(lambda: iter(["one two three. " * 99]), name, "tests", kind, data_dir=tmp_path)
    keys = {"dtype": "float32", "max_steps": 2, "eval_every": 2}
    train.train(config(toy, **keys))
    before = digest("run")
    capsys.readouterr()
    cases = [({"n_embd": 64}, "another model"), ({"arch": "hybrid_ssm"}, "another model"),
             ({"vocab_size": 300}, "another model"), ({"dataset": "other"}, "other is not the dataset"),
             ({"dataset": "letters"}, "letters is not the dataset"), ({"lr": 0.01}, "lr=0.01 (was 0.02)"),
             ({"batch_size": 4}, "batch_size=4 (was 8)"), ({"dtype": "bfloat16"}, "dtype bfloat16 (was float32)"),
             ("threads", "threads 2 (was 1)"), ("torch", "torch 9.9 (was ")]
    failed = []
    for change, message in cases:
        with monkeypatch.context() as patch:
            if change == "threads":
                torch.set_num_threads(2)
            if change == "torch":
                patch.setattr(torch, "__version__", "9.9")
            changes = change if isinstance(change, dict) else {}
            try:
                train.train(config(toy, **(keys | {"resume": True} | changes)))
                said = capsys.readouterr().err
                good = said.startswith("warning: resuming with ")
            except files.UserError as e:
                said = str(e)
                good = digest("run") == before
        torch.set_num_threads(1)
        if not good or message not in said:
            failed.append((change, said))
    score(len(cases) - len(failed), len(cases))
    assert not failed


def test_resume_warns_when_it_cannot_be_the_same(toy, capsys):
    train.train(config(toy))
    train.train(config(toy, resume=True, device="auto", eval_every=7))
    assert "warning" not in capsys.readouterr().err
    train.train(config(toy, max_steps=14, lr=0.01, resume=True))
    err = capsys.readouterr().err
    assert "max_steps=14 (was 12)" in err and "lr=0.01 (was 0.02)" in err


def test_resume_never_passes_max_steps(toy):
    train.train(config(toy))
    with pytest.raises(files.UserError, match="is at step 12, past max_steps=3"):
        train.train(config(toy, max_steps=3, resume=True))


def test_a_flag_at_its_default_counts_on_resume(toy, monkeypatch):
    train.train(config(toy, patience=7))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out_dir=run", "--patience=0", "--max_steps=14"])
    configurator.run(train.main, train.Config, with_command=True)
    assert checkpoint.load("run").meta["config"]["patience"] == 0


def test_an_unhealthy_state_is_never_saved(toy, poison):
    poison.BAD = set(range(5, 1000))
    with pytest.raises(files.UserError, match="not finite"):
        train.train(config(toy, arch="poison", eval_every=1, keep_last=1))
    assert checkpoint.load("run", optimizer=True).meta["step"] == 4


def test_a_run_that_cannot_start_leaves_no_folder(toy):
    with pytest.raises(files.UserError, match="a window needs"):
        train.train(config(toy, block_size=99999))
    assert not os.path.exists("run")


def test_a_run_is_never_overwritten(toy):
    train.train(config(toy))
    with pytest.raises(files.UserError, match="already holds a run"):
        train.train(config(toy))


# ---- it survives
def test_a_signal_saves_and_says_how_to_go_on(toy):
    """As a whole command; all signals and moments are in test_kills.py."""
    flags = TINY | {"dataset": toy, "out_dir": "runs/x", "max_steps": 100_000, "eval_every": 50_000,
                    "schedule": "constant"}
    command = [sys.executable, str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in flags.items())]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and not (os.path.exists("runs/x/metrics.jsonl") and len(lines("runs/x")) > 3):
        time.sleep(0.02)
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    saved = checkpoint.load("runs/x", optimizer=True).meta["step"]
    assert saved > 0 and f"saved at step {saved}" in out and "python train.py --resume" in out
    again = subprocess.run([sys.executable, ROOT / "train.py", "--resume", f"--max_steps={saved + 2}"],
                           capture_output=True, text=True)
    assert again.returncode == 0 and checkpoint.load("runs/x", which="latest").meta["step"] == saved + 2


# a fork of model.py that turns some of its losses into NaN, to be copied beside the tests' runs
POISON = """
from model import *
from model import Model as Plain
CALLS = []
BAD = set()

class Model(Plain):
    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets)
        if self.training and targets is not None:
            CALLS.append(1)
            if len(CALLS) in BAD:
                loss = loss * float("nan")
        return logits, loss
"""


@pytest.fixture
def poison(tmp_path, monkeypatch):
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("poison", None)
    import poison
    yield poison
    sys.modules.pop("poison", None)


def test_a_bad_step_is_skipped_and_never_reaches_the_weights(toy, poison):
    poison.BAD = {3, 4}
    train.train(config(toy, arch="poison", eval_every=12))
    events = [r for r in lines("run") if r.get("event") == "skipped"]
    assert [r["step"] for r in events] == [3, 4]
    assert all(torch.isfinite(t).all() for t in checkpoint.load("run").model.values())
    assert lines("run")[-1]["step"] == 12


def test_three_bad_steps_go_back_to_the_last_good_state_with_half_the_rate(toy, poison, capsys):
    poison.BAD = {8, 9, 10}  # after the checkpoint of step 6
    cfg = config(toy, arch="poison", schedule="constant")
    train.train(cfg)
    assert "back to step 6 with half the learning rate" in capsys.readouterr().out
    assert [r["step"] for r in steps("run")] == list(range(1, 13))  # the second pass alone
    assert [r["step"] for r in lines("run") if "event" in r] == [0, 8, 9, 10, 6]
    rates = {r["step"]: r["lr"] for r in steps("run")}
    assert rates[6] == cfg.lr and rates[7] == rates[12] == cfg.lr / 2


def test_a_hopeless_run_stops_clearly_and_its_best_is_good(toy, poison):
    poison.BAD = set(range(8, 1000))
    with pytest.raises(files.UserError, match="not finite at step 9.*lower --lr"):
        train.train(config(toy, arch="poison"))
    assert all(torch.isfinite(t).all() for t in checkpoint.load("run", which="best").model.values())


def events(run, name):
    return [r for r in lines(run) if r.get("event") == name]


def finite(run):
    loaded = checkpoint.load(run, optimizer=True)
    return checkpoint.non_finite(loaded.model | loaded.optimizer) is None


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved(toy, monkeypatch, what):
    step, calls = train.training_step, []

    def breaking(forward, learner, optimizer, *args):
        result = step(forward, learner, optimizer, *args)
        calls.append(1)
        if len(calls) == 7:                                # once, as a cosmic ray would
            tensor = next(learner.parameters()) if what == "weight" else next(iter(optimizer.state_dict().values()))
            tensor.data.view(-1)[3] = float("nan")
        return result
    monkeypatch.setattr(train, "training_step", breaking)
    assert train.train(config(toy, save_every=1, keep_last=0))["step"] == 12
    assert [e["step"] for e in events("run", "rolled back")] == [6] and not events("run", "skipped")
    assert all(finite(folder) for folder in Path("run").glob("step_*"))
    assert len(list(Path("run").glob("step_*"))) == 13


def break_at_step_7(monkeypatch, where, value):
    """Once, in step 7, put the value into the loss, a gradient, a weight, a moment or the next evaluation.

    -> A list that gets True if the weights came out of that step as they went in.
    """
    step, evaluate = train.training_step, train.evaluate
    calls = []
    kept = []

    def breaking(forward, learner, optimizer, *args):
        calls.append(1)
        if len(calls) != 7:
            return step(forward, learner, optimizer, *args)
        weight = next(learner.parameters())
        before = [p.clone() for p in learner.parameters()]
        if where == "loss":
            result = step(lambda *xy: (None, forward(*xy)[1] * value), learner, optimizer, *args)
        elif where == "gradient":
            hook = weight.register_hook(lambda gradient: torch.full_like(gradient, value))
            result = step(forward, learner, optimizer, *args)
            hook.remove()
        else:
            result = step(forward, learner, optimizer, *args)
        kept.append(all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True)))
        if where == "weight":
            weight.data.view(-1)[3] = value
        if where == "moment":
            next(iter(optimizer.state_dict().values())).data.view(-1)[3] = value
        return result

    def poisoned(*args):
        result = evaluate(*args)
        if where == "evaluation" and len(calls) == 9:
            result["val_loss"] = value
        return result
    monkeypatch.setattr(train, "training_step", breaking)
    monkeypatch.setattr(train, "evaluate", poisoned)
    return kept


@pytest.mark.score("A7")
def test_nothing_that_is_not_finite_gets_anywhere(toy, count, score):
    cases = list(itertools.product(("loss", "gradient", "weight", "moment", "evaluation"),
                                   (float("nan"), float("inf"), -float("inf"))))
    tried = random.Random(1).sample(cases, count(4, len(cases)))
    failed = []
    for where, value in tried:
        with pytest.MonkeyPatch.context() as patch:
            kept = break_at_step_7(patch, where, value)
            record = train.train(config(toy, eval_every=3, save_every=1, keep_last=0))
        skipped = [e["step"] for e in events("run", "skipped")]
        back = [e["step"] for e in events("run", "rolled back")]
        good = record["step"] == 12 and math.isfinite(record["best_loss"])
        good = good and all(finite(folder) for folder in Path("run").glob("step_*"))
        good = good and all(checkpoint.load("run", which=which).meta["step"] for which in ("latest", "best"))
        if where in ("loss", "gradient"):
            good = good and skipped == [7] and kept == [True] and back == []
        elif where == "evaluation":  # step 9, whose state is not saved either
            good = good and record["best_step"] != 9 and not Path("run/step_000009").exists()
        else:
            good = good and back == [6] and skipped == []
        if not good:
            failed.append((where, value, skipped, back, kept, record))
        shutil.rmtree("run")
    score(len(tried) - len(failed), len(tried))
    assert not failed


def bad_data(monkeypatch, poison, bad):
    """Make every batch whose number is in `bad` poisonous -> the list of the numbers as they are asked for."""
    batch, seen = train.next_batch, []

    def recorded(cfg, dataset, number, device):
        seen.append(number)
        if number in bad:
            poison.BAD.add(len(poison.CALLS) + 1)
        return batch(cfg, dataset, number, device)
    monkeypatch.setattr(train, "next_batch", recorded)
    return seen


def test_bad_data_is_passed_over_and_the_rest_resumes_exactly(toy, monkeypatch, poison):
    seen = bad_data(monkeypatch, poison, {7, 8, 9})
    cfg = config(toy, arch="poison", save_every=3, keep_last=0)
    assert train.train(cfg)["step"] == 12
    assert seen == [0, *range(10), *range(10, 16)]         # the first is for the compiler
    assert [e["data_shift"] for e in events("run", "rolled back")] == [4]
    whole = digest("run")
    for name in ("step_000012", "latest"):
        shutil.rmtree(f"run/{name}") if name != "latest" else os.remove("run/latest")
    train.train(replace(cfg, resume=True))
    assert seen[-3:] == [13, 14, 15] and digest("run") == whole


@pytest.mark.score("A8")
def test_bad_data_anywhere_costs_less_than_a_percent(toy, poison, count, score):
    """Of a run that has the time to make up for it: the rate stays halved, and 150 steps with bad data at step 20 end
    with 4.9 % more loss."""
    n = count(150, 400)
    keys = {"arch": "poison", "max_steps": n, "eval_every": n // 10, "dropout": 0.0, "schedule": "linear"}
    clean = train.train(config(toy, "clean", **keys))["val_loss"]
    ends = []
    held = 0
    places = [n // 2, n // 7, n * 4 // 5][: count(1, 3)]
    for place in places:
        for out in ("once", "twice"):
            with pytest.MonkeyPatch.context() as patch:
                bad_data(patch, poison, {place, place + 1, place + 2})
                ends.append(train.train(config(toy, out, **keys))["val_loss"])
        back = [e["step"] for e in events("once", "rolled back")]
        good = digest("once") == digest("twice") and back == [place // (n // 10) * (n // 10)]
        held += good and abs(ends[-1] / clean - 1) < 0.01
        shutil.rmtree("once")
        shutil.rmtree("twice")
    score(held, len(places), f"{100 * max(end / clean - 1 for end in ends):+.2f} % loss in the worst of {n}-step runs")
    assert held == len(places), (clean, ends)


def test_states_from_before_a_key_was_added_resume(toy):
    train.train(config(toy))
    folder = checkpoint.load("run").path
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"], meta["model_sha256"], meta["run_id"], meta["state"]["data_shift"], meta["state"]["back_at"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert train.train(config(toy, max_steps=14, schedule="constant", resume=True))["step"] == 14


def test_a_checkpoint_that_leads_nowhere_is_passed_over(toy, poison):
    poison.BAD = set(range(8, 14))                         # steps 8 to 10, and again the first three after going back
    assert train.train(config(toy, arch="poison"))["step"] == 12
    assert [e["step"] for e in events("run", "rolled back")] == [6, 0]


def test_a_bad_last_step_leaves_the_state_before_it(toy, poison):
    poison.BAD = {12}
    train.train(config(toy, arch="poison"))
    assert checkpoint.load("run").meta["step"] == 12 and finite("run")
    poison.CALLS.clear()
    poison.BAD = {1000}
    train.train(config(toy, "eleven", arch="poison", schedule="cosine", max_steps=12, eval_every=11))
    eleven = checkpoint.load("eleven/step_000011").model
    assert all(torch.equal(tensor, eleven[name]) for name, tensor in checkpoint.load("run").model.items())


def test_a_model_that_starts_broken_is_named(toy, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("from model import *\nfrom model import Model as Plain\n\n"
                                        "class Model(Plain):\n    def __init__(self, config):\n"
                                        "        super().__init__(config)\n"
                                        "        next(self.parameters()).data[0, 0] = float('inf')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(files.UserError, match="broken.py: .*weight holds NaN or Inf before the first step"):
        train.train(config(toy, arch="broken"))


@pytest.mark.parametrize("pruned", [False, True])
def test_best_never_names_a_worse_model_of_the_same_step(toy, monkeypatch, capsys, pruned):
    evaluate, losses = train.evaluate, iter([4.0, 3.0, 3.5, 1.0, 3.2, 3.1])
    monkeypatch.setattr(train, "evaluate", lambda *args: evaluate(*args) | {"val_loss": next(losses)})
    cfg = config(toy, eval_every=3, keep_last=0, schedule="constant")
    train.train(cfg)
    assert Path("run/best").read_text() == "step_000012"
    shutil.rmtree("run/step_000012")
    if pruned:
        shutil.rmtree("run/step_000006")
    record = train.train(replace(cfg, resume=True))        # step 12 is worse this time
    best = 12 if pruned else 6
    assert Path("run/best").read_text() == f"step_{best:06d}" and record["best_step"] == best
    assert ("best checkpoint, step 6, is lost" in capsys.readouterr().err) == pruned


# ---- one process a folder

@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_is_refused_and_told_of_the_first(toy, resume):
    if resume:
        train.train(config(toy))
    else:
        os.mkdir("run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "lock"}
    with files.locked("run/lock"):
        with pytest.raises(files.UserError, match=f"run is in use by process {os.getpid()} on {socket.gethostname()}"):
            train.train(config(toy, resume=resume, max_steps=14))
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before
    assert train.train(config(toy, resume=resume, max_steps=14))["step"] == 14  # the old text in the file is no lock


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_folder_in_place_of_a_pointer_is_named(toy, pointer):
    train.train(config(toy))
    os.remove(f"run/{pointer}")
    os.mkdir(f"run/{pointer}")
    assert checkpoint.load("run", which=pointer).meta["step"] == 12
    with pytest.raises(files.UserError, match=f"run/{pointer} is a folder.*move it away"):
        train.train(config(toy, max_steps=14, resume=True))
    os.rmdir(f"run/{pointer}")
    os.symlink("step_000006", f"run/{pointer}")            # as other programs do it: replaced by the next save
    assert train.train(config(toy, max_steps=14, resume=True))["step"] == 14
    assert Path("run/latest").read_text() == "step_000014"


def test_any_checkpoint_guards_a_run(toy):
    train.train(config(toy))
    os.remove("run/latest")
    metrics = Path("run/metrics.jsonl").read_bytes()
    with pytest.raises(files.UserError, match="already holds a run"):
        train.train(config(toy))
    assert Path("run/metrics.jsonl").read_bytes() == metrics and len(list(Path("run").glob("step_*"))) == 3


# ---- recipes
RECIPES = sorted((ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_starts_at_ln_v(path):
    searches = re.search(r"^space = ", path.read_text(), re.M)
    cfg = configurator.load(search.Config if searches else train.Config, path)
    assert path.read_text().startswith("# ")  # machine, minutes, expected loss
    if searches:
        assert search.parse_space(cfg)  # every key is one, every value one of its kind
    if cfg.prepare:
        assert (ROOT / cfg.prepare.split()[0]).exists()
    vocab_size = cfg.model.vocab_size or {"char": 66, "byte": 257}.get(
        (re.search(r"--tokenizer=(\w+)", cfg.prepare) or [0, "bpe"])[1], 4096)
    torch.manual_seed(cfg.seed)
    m = train.import_module(cfg.arch).Model(replace(cfg.model, vocab_size=vocab_size)).eval()
    idx = torch.randint(vocab_size, (2, 65))
    with torch.no_grad():
        _, loss = m(idx[:, :-1], idx[:, 1:])
    assert abs(loss.item() - math.log(vocab_size)) < 0.02 * math.log(vocab_size)


def test_a_vocabulary_of_128260_tokens_is_uint32_and_trains(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers
    words = {f"w{i}": i for i in range(128_259)} | {"<|endoftext|>": 128_259}
    hf = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.add_special_tokens(["<|endoftext|>"])
    rng = np.random.default_rng(0)
    with data.Writer(tmp_path / "wide", Tokenizer(hf), "random words") as out:
        for split, n in (("train", 2000), ("val", 200)):
            out.append(split, rng.integers(128_260, size=n), n_bytes=7 * n, documents=1)
        out.meta["baselines"] = {"uniform": 8.0, "unigram": 8.0, "bigram": 8.0, "trigram": 8.0}
    dataset = data.load(tmp_path / "wide")
    assert dataset.train.dtype == np.uint32 and dataset.train.max() > 65_535
    record = train.train(config(tmp_path / "wide", max_steps=3, eval_every=3, batch_size=2))
    assert record["step"] == 3 and abs(steps("run")[0]["loss"] - math.log(128_260)) < 0.02 * math.log(128_260)


def test_a_missing_dataset_is_prepared(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question.\n" * 200)
    name = f"test-{os.getpid()}"
    made = ROOT / "data" / name
    try:
        cfg = config(name, prepare=f"prepare/text.py --input={tmp_path}/text.txt --name={name} --tokenizer=byte")
        assert train.train(cfg)["step"] == 12
    finally:
        shutil.rmtree(made, ignore_errors=True)
    with pytest.raises(files.UserError, match="could not prepare the dataset absent"):
        train.train(config("absent", "other", prepare="prepare/text.py --input=/nowhere --name=absent"))


def test_fine_tuning_starts_from_a_run(toy):
    first = train.train(config(toy, "base", max_steps=100, eval_every=100, dropout=0.0))
    few = {k: v for k, v in TINY.items() if k not in ("n_layer", "n_head", "n_embd", "block_size", "dropout")}
    few |= {"dataset": str(toy), "init_from": "base", "max_steps": 1, "eval_every": 1, "lr": 1e-6, "rest_lr": 1e-6}
    record = train.train(configurator.load(train.Config, **few, out_dir="tuned"))  # the model is that of the run
    assert abs(record["val_loss"] - first["val_loss"]) < 0.01
    assert checkpoint.load("tuned").meta["model_config"] == checkpoint.load("base").meta["model_config"]
    with pytest.raises(files.UserError, match="no run folder nowhere|nowhere"):
        train.train(config(toy, "x", init_from="nowhere"))


def test_fine_tuning_takes_or_refuses_model_flags(toy, tmp_path, monkeypatch):
    train.train(config(toy, "base"))
    for out, changes in (("a", {"dropout": 0.0}), ("b", {"dropout": 0.3, "block_size": 16})):
        train.train(config(toy, out, init_from="base", **changes), command=typed(changes))
        was = checkpoint.load("base").meta["model_config"]
        assert checkpoint.load(out).meta["model_config"] == was | changes
    for changes, message in (({"n_embd": 64}, r"n_embd=64 \(it has 32\)"), ({"n_layer": 4}, r"n_layer=4 \(it has 1\)")):
        with pytest.raises(files.UserError, match=message):  # 4 is the default, and was typed all the same
            train.train(config(toy, "c", init_from="base", **changes), command=typed(changes))
    (tmp_path / "placed.py").write_text("from model import *\nfrom model import Model as Plain\n\n"
                                        "class Model(Plain):\n    def __init__(self, config):\n"
                                        "        super().__init__(config)\n"
                                        "        self.register_buffer('wpe', torch.zeros(config.block_size))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checkpoint, "HERE", tmp_path)
    train.train(config(toy, "placed", arch="placed"))
    with pytest.raises(files.UserError, match=r"block_size=16 \(it has 32\).*wpe"):
        train.train(config(toy, "c", arch="placed", init_from="placed", block_size=16))
    with pytest.raises(files.UserError, match="trained with --arch=placed"):
        train.train(config(toy, "c", init_from="placed"), command=typed({"arch": "model"}))
    assert not os.path.exists("c")
    train.train(config(toy, "c", init_from="placed"))  # the architecture is that of the run
    assert checkpoint.load("c").meta["arch"] == "placed"


def test_fine_tuning_refuses_another_tokenizer(toy, tmp_path):
    from prepare.text import prepare
    train.train(config(toy, "base"))
    other = prepare(lambda: iter(["a b c d e f. " * 99]), "chars", "tests", "char", data_dir=tmp_path)
    with pytest.raises(files.UserError, match="another tokenizer"):
        train.train(config(other, "tuned", init_from="base"))


# ---- users
@pytest.mark.parametrize("args, reason", [
    (["--lr=abc"], "--lr=abc: expected float"),
    (["--n_layer=4.5"], "--n_layer=4.5: expected int"),
    (["--compile=maybe"], "--compile=maybe: expected"),
    (["--n_layr=2"], "did you mean 'n_layer'"),
    (["--max_iters=10"], "max_steps"),
    (["config/nowhere.py"], "config/nowhere.py"),
    (["--arch=modle"], "did you mean 'model'"),
    (["--n_embd=100", "--n_head=3"], "n_embd=100 must be a multiple of n_head=3"),
    (["--dataset=nowhere"], "nowhere"),
    (["--device=warp"], "--device=warp does not work here"),
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--micro_batch_size=3"], "micro_batch_size=3"),
    (["--warmup_steps=99999"], "warmup_steps=99999"),
    (["--block_size=99999"], "100,000"),
    (["--vocab_size=5"], "vocab_size=5"),
    (["--optimizer=adm"], "did you mean 'adam"),
    (["--resume"], "no run"),
    (["--resume", "{recipe}"], "no run runs/recipe to resume"),
    (["--init_from=nowhere"], "nowhere"),
    (["--tracker=trackio"], "pip install trackio"),
    (["--lr=-1"], "lr=-1.0 must not be negative"),
    (["--min_lr=1.5"], "min_lr=1.5 is a fraction"),
    (["--betas=0.9,1"], "betas=(0.9, 1.0) and momentum=0.95 must be below 1"),
    (["--lora_rank=2"], "lora_rank=2 needs a model to adapt"),
    (["--prompts=ünknown", "--dataset={chars}"], "ü"),
    (["--dataset={damaged}"], "train.bin"),
    (["--out_dir={file}"], "{file}"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_end_in_one_clear_line(toy, args, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "recipe.py").write_text("seed = 1\n")
    places = {"file": tmp_path / "file", "chars": tmp_path / "chars", "damaged": tmp_path / "damaged",
              "recipe": tmp_path / "recipe.py"}
    if "{damaged}" in args[0]:
        shutil.copytree(toy, places["damaged"])
        with open(places["damaged"] / "train.bin", "ab") as f:
            f.write(b"x")
    if "{chars}" in args[-1]:
        from prepare.text import prepare
        prepare(lambda: iter(["abc def. " * 200]), "chars", "tests", "char", data_dir=tmp_path)
    capsys.readouterr()
    given = [f"--{k}={v}" for k, v in (TINY | {"dataset": toy}).items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *given, *(arg.format(**places) for arg in args)])
    with pytest.raises(SystemExit) as end:
        configurator.run(train.main, train.Config, with_command=True)
    err = capsys.readouterr().err
    assert end.value.code == 1 and reason.format(**places) in err and len(err.strip().splitlines()) == 1


def test_runs_are_named_after_their_recipe_and_never_collide(toy, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("\n".join(f"{k} = {v!r}" for k, v in (TINY | {"dataset": str(toy)}).items()))

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        configurator.run(train.main, train.Config, with_command=True)
    call("mine.py")
    call("mine.py", "--seed=2")
    assert sorted(os.listdir("runs")) == ["mine", "mine-2"]
    call("mine.py", "--resume", "--max_steps=14")  # the newest of that name, with its own flags
    meta = checkpoint.load("runs/mine-2").meta
    assert meta["step"] == 14 and meta["config"]["seed"] == 2
    assert checkpoint.load("runs/mine").meta["step"] == 12


def test_a_typed_dataset_is_not_made_by_the_recipes_script(toy, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("dataset = 'recipe'\nprepare = 'nowhere.py'\n")
    for args, reason in ((["--dataset=typo"], "there is no dataset"),
                         (["--dataset=typo", "--prepare", "other.py"], "could not prepare the dataset typo"),
                         ([], "could not prepare the dataset recipe")):
        monkeypatch.setattr(sys, "argv", ["train.py", "mine.py", *args])
        with pytest.raises(SystemExit):
            configurator.run(train.main, train.Config, with_command=True)
        assert reason in capsys.readouterr().err


def test_a_flag_whose_value_ends_like_a_file_counts_on_resume(toy, monkeypatch):
    train.train(config(toy, "runs/a"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--prepare", "x.py", "--max_steps", "14"])
    configurator.run(train.main, train.Config, with_command=True)
    assert checkpoint.load("runs/a").meta["config"]["prepare"] == "x.py"
    assert checkpoint.load("runs/a").meta["step"] == 14


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    configurator.run(train.main, train.Config, with_command=True)


def test_an_edited_recipe_counts_on_resume(toy, monkeypatch, capsys):
    recipe = TINY | {"dataset": str(toy), "schedule": "constant"}
    Path("mine.py").write_text("\n".join(f"{k} = {v!r}" for k, v in recipe.items()))
    call(monkeypatch, "mine.py", "--seed=2", "--lr=0.01")
    with open("mine.py", "a") as f:
        f.write("\nmax_steps = 15\nbatch_size = 4\n")
    call(monkeypatch, "mine.py", "--resume")
    meta = checkpoint.load("runs/mine").meta
    assert meta["step"] == 15 and meta["config"]["batch_size"] == 4
    assert meta["config"]["seed"] == 2 and meta["config"]["lr"] == 0.01  # flags of the start hold where nothing changed
    err = capsys.readouterr().err
    assert "batch_size=4 (was 8)" in err and "max_steps=15 (was 12)" in err


def test_resuming_with_the_same_recipe_changes_nothing(toy, monkeypatch, capsys):
    recipe = TINY | {"dataset": str(toy), "lr": 0.02}
    Path("mine.py").write_text("\n".join(f"{k} = {v!r}" for k, v in recipe.items()))
    call(monkeypatch, "mine.py", "--lr=0.01")
    before = checkpoint.load("runs/mine").meta["config"]
    call(monkeypatch, "mine.py", "--resume")
    assert checkpoint.load("runs/mine").meta["config"] == before
    assert "warning" not in capsys.readouterr().err


def test_an_edited_model_file_is_named_on_resume(toy, poison, tmp_path, capsys):
    train.train(config(toy, arch="poison"))
    train.train(config(toy, arch="poison", resume=True))
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "poison.py").write_text(POISON + "# relu\n")
    train.train(config(toy, arch="poison", resume=True))
    assert "resuming with an edited poison.py" in capsys.readouterr().err


def test_a_resume_never_runs_the_script_that_the_run_names(toy, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("open('pwned', 'w')\n")
    shutil.copytree(toy, "mine")
    train.train(config("mine", prepare=str(tmp_path / "evil.py")))
    shutil.rmtree("mine")
    with pytest.raises(SystemExit):
        call(monkeypatch, "--resume", "--out_dir=run")
    assert not os.path.exists("pwned")
    with pytest.raises(SystemExit):                        # that of this command's own recipe or flag is
        call(monkeypatch, "--resume", "--out_dir=run", f"--prepare={tmp_path / 'evil.py'}")
    assert os.path.exists("pwned")


def test_a_relative_dataset_is_found_from_another_folder(toy, tmp_path, monkeypatch, capsys):
    shutil.copytree(toy, "mine")
    train.train(config("mine", schedule="constant"))
    os.mkdir("other")
    monkeypatch.chdir("other")
    call(monkeypatch, "--resume", f"--out_dir={tmp_path}/run", "--prompts=cat")
    assert "warning" not in capsys.readouterr().err


def test_damage_is_reported_once(toy, monkeypatch, capsys):
    train.train(config(toy))
    Path("run/step_000012/model.safetensors").write_bytes(b"")
    call(monkeypatch, "--resume", "--out_dir=run")
    assert capsys.readouterr().err.count("warning: ") == 1


def test_the_device_is_checked_before_a_dataset_is_prepared(tmp_path):
    (tmp_path / "slow.py").write_text("open('prepared', 'w')\n")
    with pytest.raises(files.UserError, match="--device=warp"):
        train.train(config("absent", device="warp", prepare=str(tmp_path / "slow.py")))
    assert not os.path.exists("prepared")


def test_nanogpts_absolute_min_lr_is_not_taken_without_a_word(toy, monkeypatch, capsys):
    flags = [f"--{k}={v}" for k, v in (TINY | {"dataset": toy, "max_steps": 1, "eval_every": 1}).items()]
    call(monkeypatch, *flags, "--min_lr=6e-5")
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "min_lr=6e-05 is a fraction of the peak rate" in err[0]
    call(monkeypatch, *flags, "--min_lr=0.1")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_ends_tracking_and_not_training(toy, monkeypatch, capsys, where):
    def fail(*args, **kwargs):
        raise ConnectionError("network is\nunreachable")
    run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    module = types.SimpleNamespace(init=lambda **kwargs: run)
    setattr(module if where == "init" else run, where, fail)
    monkeypatch.setitem(sys.modules, "trackio", module)
    assert train.train(config(toy, tracker="trackio"))["step"] == 12
    assert capsys.readouterr().out.count("the tracker failed (network is unreachable)") == 1


# ---- every key counts

# key: (what it is changed to, further keys that it needs to be changed for it to count)
KEYS = {
    "seed": (7, {}), "batch_size": (4, {}), "micro_batch_size": (4, {}),
    "optimizer": ("adamw", {}), "lr": (0.01, {}), "rest_optimizer": ("lion", {}), "rest_lr": (0.02, {}),
    "weight_decay": (0.5, {}), "betas": ((0.5, 0.95), {}), "momentum": (0.5, {}), "grad_clip": (0.01, {}),
    "schedule": ("linear", {}), "max_steps": (11, {}), "warmup_steps": (3, {}), "min_lr": (0.9, {}),
    "decay_frac": (0.7, {"schedule": "wsd"}), "restart_steps": (3, {"schedule": "restarts"}),
    "restart_mul": (2.0, {"schedule": "restarts", "restart_steps": 3}),
    "restart_decay": (0.5, {"schedule": "restarts", "restart_steps": 3}),
    "dtype": ("bfloat16", {}), "arch": ("hybrid_ssm", {}),
}
# what does not change the weights, and the test that shows what it does change
ELSEWHERE = {
    "out_dir": "test_runs_are_named_after_their_recipe_and_never_collide", "resume": "test_resume_is_exact",
    "init_from": "test_fine_tuning_starts_from_a_run", "lora_rank": "test_lora.py", "prepare": "test_a_missing_dataset",
    "dataset": "test_resume_refuses_another_model_or_dataset", "model": "test_model.py",
    "eval_every": "test_early_stopping", "patience": "test_early_stopping",
    "prompts": "test_it_learns_and_leaves_a_run_folder", "prompt_tokens": "test_keys_that_say_how_much",
    "log_every": "test_keys_that_say_how_much", "tracker": "test_a_tracker_gets_what_metrics_jsonl_gets",
    "save_every": "test_keys_that_say_how_much", "keep_last": "test_keys_that_say_how_much",
    "device": "test_mistakes_end_in_one_clear_line", "compile": "test_a_working_compiler_is_recorded",
}


@pytest.fixture(scope="module")
def weights_of(toy, tmp_path_factory):
    """A function of changed keys that trains with them, once for the same keys -> the sha256 of the weights."""
    done = {}

    def get(changes):
        key = repr(sorted(changes.items()))
        if key not in done:
            out = tmp_path_factory.mktemp("keys") / "run"
            same = {"dtype": "float32", "max_steps": 6, "weight_decay": 0.1, "grad_clip": 1.0, "n_layer": 1}
            train.train(config(toy, str(out), **(same | {"eval_every": 100, "log_every": 100} | changes)))
            done[key] = hashlib.sha256((checkpoint.load(out).path / "model.safetensors").read_bytes()).hexdigest()
        return done[key]
    return get


def test_every_key_is_listed():
    names = {f.name for f in fields(train.Config)}
    assert names == KEYS.keys() | ELSEWHERE.keys() and not KEYS.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_changes_the_result(weights_of, key):
    value, needed = KEYS[key]
    assert weights_of(needed) == weights_of(dict(needed))
    assert weights_of(needed | {key: value}) != weights_of(needed)


def test_the_seed_orders_the_data_too(toy):
    """Apart from the weights, which alone would make the result of another seed another one."""
    dataset = data.load(toy)
    first, again, other = (train.next_batch(config(toy, seed=seed), dataset, 0, "cpu")[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_keys_that_say_how_much(toy, capsys):
    train.train(config(toy, "a", save_every=1, keep_last=2, log_every=4, prompts=("cat",), prompt_tokens=3))
    short = len(capsys.readouterr().out)
    train.train(config(toy, "b", save_every=4, keep_last=0, log_every=3, prompts=("cat",), prompt_tokens=90))
    assert len(capsys.readouterr().out) > short + 50
    assert sorted(path.name for path in Path("a").glob("step_*")) == ["step_000011", "step_000012"]
    assert [int(path.name[5:]) for path in sorted(Path("b").glob("step_*"))] == [0, 4, 6, 8, 12]
    assert [r["step"] for r in steps("a")] == [1, 4, 8, 12] and [r["step"] for r in steps("b")] == [1, 3, 6, 9, 12]


def test_what_the_keys_say_reaches_the_optimizer_as_it_is(toy, monkeypatch):
    """Each value in its place: a swapped pair would still change the result."""
    made, clipped, scales = [], [], []
    make, clip, scale = train.optim.Optimizer, torch.nn.utils.clip_grads_with_norm_, train.optim.lr_scale
    monkeypatch.setattr(train.optim, "Optimizer", lambda *args: made.append(args) or make(*args))
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_",
                        lambda params, most, norm: clipped.append(most) or clip(params, most, norm))
    monkeypatch.setattr(train.optim, "lr_scale", lambda *args: scales.append(args) or scale(*args))
    train.train(config(toy, lr=0.011, rest_lr=0.012, weight_decay=0.13, betas=(0.8, 0.9), momentum=0.7, grad_clip=0.3,
                       rest_optimizer="lion", schedule="restarts", warmup_steps=2, min_lr=0.2, decay_frac=0.3,
                       restart_steps=5, restart_mul=2.0, restart_decay=0.6, max_steps=3))
    assert made[0][1:] == ("muon", 0.011, "lion", 0.012, 0.13, (0.8, 0.9), 0.7) and clipped == [0.3] * 3
    names = ("step", "schedule", "max_steps", "warmup_steps", "min_lr", "decay_frac", "restart_steps", "restart_mul",
             "restart_decay")
    assert list(inspect.signature(scale).parameters) == list(names)
    assert scales[-1] == (3, "restarts", 3, 2, 0.2, 0.3, 5, 2.0, 0.6)


def test_the_figures_of_a_run_by_hand(toy, monkeypatch):
    """Speed, MFU and counts of metrics.jsonl, where a look at the clock takes 2 seconds and the peak is 1 GFLOP/s."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(train.machine, "matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(train.time, "perf_counter", lambda: 2.0 * next(ticks))
    record = train.train(config(toy, "run", max_steps=4, eval_every=2, batch_size=3, log_every=1))
    dataset = data.load(toy)
    model = checkpoint.load_model(checkpoint.load("run", "latest"))
    block_size = model.config.block_size
    logged = [r for r in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines()) if "loss" in r]
    assert [r["step"] for r in logged] == [1, 2, 3, 4]
    for r in logged:
        assert r["tokens"] == r["step"] * 3 * block_size
        assert r["mfu"] == pytest.approx(r["tokens_per_second"] * model.flops_per_token(block_size) / 1e9)
        # each step is timed by itself, or with those since the last evaluation: the same speed
        assert r["tokens_per_second"] == pytest.approx(3 * block_size / (r["seconds"] / r["step"]))
    assert record["val_ppl"] == pytest.approx(math.exp(record["val_loss"]))
    assert record["val_bpb"] == pytest.approx(record["val_loss"] / math.log(2) / dataset.bytes_per_token("val"))
    assert record["val_tokens"] == len(dataset.val) - 1


# ---- patience
def test_patience_counts_the_evaluations_from_before_a_resume(toy, monkeypatch, capsys):
    evaluate, losses = train.evaluate, iter([1.0, 1.1, 1.2, 0.9, 1.0, 1.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: evaluate(*args) | {"val_loss": next(losses)})
    cfg = config(toy, max_steps=4, eval_every=2, patience=2, schedule="constant")
    assert train.train(cfg)["step"] == 4  # one without improvement
    again = train.train(replace(cfg, max_steps=20, resume=True))
    assert (again["step"], again["best_step"]) == (6, 2)  # and the second
    assert "stopped: no better validation loss in 2 evaluations" in capsys.readouterr().out
    # an improvement starts the count anew
    more = train.train(replace(cfg, max_steps=20, resume=True))
    assert (more["step"], more["best_step"]) == (12, 8)


def test_a_step_gets_the_windows_as_inputs_and_their_next_tokens_as_targets(toy, monkeypatch):
    """And no others: those of this number, from the dataset itself."""
    step, seen = train.training_step, []

    def watched(forward, learner, optimizer, x, y, *rest):
        seen.append((x, y))
        return step(forward, learner, optimizer, x, y, *rest)

    monkeypatch.setattr(train, "training_step", watched)
    cfg = config(toy, max_steps=2)
    train.train(cfg)
    tokens = data.load(toy).train
    assert len(seen) == 2
    for number, (x, y) in enumerate(seen):
        assert x.shape == y.shape == (cfg.batch_size, cfg.model.block_size)
        assert torch.equal(x[:, 1:], y[:, :-1])  # the target of a token is the one after it
        wanted = data.batch(tokens, number, cfg.batch_size, cfg.model.block_size, cfg.seed)
        assert x.tolist() == wanted[0].tolist() and y.tolist() == wanted[1].tolist()
