"""search.py: what it reports is true, its trials repeat, and no trial is lost or run twice, whatever is killed."""
import csv
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import torch

import train
from thimble import checkpoint, configurator, data, files, machine, runlog
from thimble.files import UserError

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install -r requirements-search.txt")
import search

LOOP = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 8, "max_steps": 9, "eval_every": 1,
        "device": "cpu", "dtype": "float32"}
SPACE = ("lr=0.0001..0.1 log", "n_layer=1..2", "mlp=swiglu|gelu", "n_embd=16..32 step 16", "tie_embeddings=true|false")


PLOT_SEARCH = search.plot_search


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what takes longer than a tiny run and does not change its result: measuring the machine, and drawing the curves
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(runlog, "plot", lambda *_: None)
    monkeypatch.setattr(search, "plot_search", lambda *_: None)


def config(toy, **changes):
    return configurator.load(search.Config, **(LOOP | {"dataset": str(toy), "space": SPACE, "n_trials": 6} | changes))


def typed(cfg, line="search.py"):
    """The command that `cfg` would come from."""
    return configurator.Command(line, [], {}, configurator.changed(cfg))


def run(cfg, folder="study"):
    return search.search(cfg, Path(folder), typed(cfg))


def table(folder):
    with open(f"{folder}/trials.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_what_it_reports_is_what_the_checkpoints_score(toy, monkeypatch):
    monkeypatch.setattr(search, "plot_search", PLOT_SEARCH)
    best = run(config(toy))
    rows = table("study")
    assert [int(row["trial"]) for row in rows] == list(range(6))
    assert {row["state"] for row in rows} == {"COMPLETE", "PRUNED"}
    autocast = torch.autocast("cpu", enabled=False)
    for row in rows:
        folder = f"study/trial_{int(row['trial']):04d}"
        model = checkpoint.load_model(checkpoint.load(folder, which="best"))
        again = train.evaluate(model, data.load(toy), autocast)
        assert again["val_bpb"] == float(row["val_bpb"])
        assert sum(p.numel() for p in model.parameters()) == int(row["parameters"])
        assert model.config.n_layer == int(row["n_layer"]) and model.config.mlp == row["mlp"]
        assert str(model.config.tie_embeddings) == row["tie_embeddings"]
        assert json.loads(Path(folder, "config.json").read_text())["lr"] == float(row["lr"])
        assert (row["state"] == "PRUNED") == (int(row["steps"]) < 9)
    done = [row for row in rows if row["state"] == "COMPLETE"]
    assert best.number == int(min(done, key=lambda row: float(row["val_bpb"]))["trial"])
    assert os.readlink("study/best") == f"trial_{best.number:04d}" and Path("study/search.png").exists()
    record = train.train(configurator.load(train.Config, **{k: v for k, v in LOOP.items() if k not in (
        "n_layer", "n_embd", "n_head", "block_size")}, dataset=str(toy), init_from="study/best", out_dir="two"))
    assert record["step"] == 9


def test_the_same_command_finds_the_same_and_is_then_done(toy, capsys):
    for folder in ("one", "two"):
        run(config(toy, n_trials=3), folder)
    same = [[{k: v for k, v in row.items() if k not in ("worker", "seconds", "train_seconds", "ms_per_token")}
             for row in table(folder)] for folder in ("one", "two")]
    assert same[0] == same[1]
    run(config(toy, n_trials=3), "one")
    run(config(toy, n_trials=4), "one")                    # and one more
    assert len(table("one")) == 4
    with pytest.raises(UserError, match="n_head"):
        run(config(toy, n_head=4), "one")


def test_several_objectives_give_a_pareto_set(toy):
    run(config(toy, n_trials=4, max_steps=2, objectives=("val_bpb", "parameters")))
    rows = table("study")
    assert {row["state"] for row in rows} == {"COMPLETE"} and Path("study/pareto.png").exists()
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend("study/journal.log")))
    points = {int(r["trial"]): (float(r["val_bpb"]), float(r["parameters"])) for r in rows}
    front = {n for n, p in points.items() if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())}
    assert {t.number for t in study.best_trials} == front


def test_a_wiring_is_searched_and_drawn(toy):
    shape = {"arch": "cerebros", "n_embd": 8, "window": 6, "max_units": 2, "min_neurons": 8, "max_neurons": 8,
             "block_size": 16}
    loop = {k: LOOP[k] for k in ("batch_size", "eval_every", "device", "dtype")}
    cfg = configurator.load(search.Config, **loop, **shape, dataset=str(toy), max_steps=2, n_trials=2,
                            space=("wiring_seed=0..99",))
    run(cfg)
    wirings = [row["wiring"] for row in table("study")]
    assert len(set(wirings)) == 2 and all(json.loads(w)[-1][0]["neurons"] == 8 for w in wirings)
    assert Path("study/wiring.png").exists()


def test_an_impossible_shape_fails_its_trial_and_not_the_search(toy):
    run(config(toy, n_trials=4, max_steps=1, space=("n_head=2|3",), sampler="random"))
    rows = table("study")
    assert len(rows) == 4
    for row in rows:
        assert (row["state"] == "FAIL") == (row["n_head"] == "3") == ("n_head=3" in row["error"])


def test_a_budget_of_seconds_sets_the_steps(toy):
    run(config(toy, n_trials=1, seconds=1.0, n_evals=2, max_steps=10**6))
    row = table("study")[0]
    assert 1 < int(row["steps"]) < 10_000
    assert json.loads(Path("study/trial_0000/config.json").read_text())["max_steps"] == int(row["steps"])


@pytest.mark.parametrize("space, word", [
    ("lrr=1..2", "did you mean 'lr'"), ("prompts=a|b", "not a key to vary - there is"), ("lr=1|2,lr=1|2", "twice"),
    ("lr", "expected key="), ("lr=2..1", "low < high"), ("lr=0..1 log", "a low"),
    ("n_layer=1.5..2", "expected int"), ("mlp=relu", "not one of"), ("mlp=a..b", "not one of"),
    ("n_trials=1..2", "not a key to vary"), ("out_dir=a|b", "not a key to vary"), ("n_layer=1..4 step 0", "a step")])
def test_mistakes_in_the_space_are_named(toy, space, word):
    with pytest.raises(UserError, match=word) as e:
        search.parse_space(config(toy, space=tuple(space.split(","))))
    assert "\n" not in str(e.value)


def test_an_objective_that_does_not_exist_is_named(toy):
    for objectives, word in ((("val_loss",), "not one of val_bpb, parameters, ms_per_token"), ((), "at least one"),
                             (("val_bpb", "val_bpb"), "each once")):
        with pytest.raises(UserError, match=word):
            config(toy, objectives=objectives)


def test_without_optuna_one_line_says_what_to_install(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install -r requirements-search.txt"):
        run(config(toy))


def test_a_database_that_is_not_there_is_one_line_without_the_password(toy):
    with pytest.raises(UserError) as e:
        run(config(toy, storage="mysterysql://me:secret@host/db"))
    assert "secret" not in str(e.value) and "\n" not in str(e.value)


def test_a_journal_whose_last_line_was_cut_off_is_repaired(toy):
    """As a full disk leaves it: Optuna cannot read past half a line."""
    cfg = config(toy, n_trials=2, max_steps=2, prune=False)
    run(cfg)
    journal = Path("study/journal.log")
    journal.write_bytes(journal.read_bytes()[:-20])        # into the line that ends trial 1
    for n_trials in (2, 3):
        run(config(toy, n_trials=n_trials, max_steps=2, prune=False))
    rows = table("study")
    assert [row["state"] for row in rows] == ["COMPLETE", "DIED", "COMPLETE", "COMPLETE"]
    assert rows[1]["lr"] == rows[2]["lr"] and rows[1]["val_bpb"] == rows[2]["val_bpb"]


def test_a_full_disk_ends_the_worker_and_not_the_trials(toy, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "_free", lambda _: 0)
        with pytest.raises(UserError, match="disk full"):
            run(config(toy, n_trials=2, max_steps=1))
    run(config(toy, n_trials=2, max_steps=1))
    assert [row["state"] for row in table("study")] == ["DIED", "COMPLETE", "COMPLETE"]


def test_the_password_is_in_no_file(toy):
    cfg = config(toy, n_trials=1, max_steps=1, out_dir="study")
    url = "postgresql://me:my secret@host/db"
    command = typed(cfg, f"search.py '--storage={url}' --seed=1")
    command.given["storage"] = url
    search.main(cfg, command)
    files = [path.read_bytes() for path in Path("study").rglob("*") if path.is_file()]
    assert any(b"//host/db" in file for file in files) and not any(b"secret" in file for file in files)


@pytest.mark.parametrize("url, shown", [
    ("sqlite:////tmp/study.db", "sqlite:////tmp/study.db"),
    ("postgresql://me:secret@host/db", "postgresql://host/db"),
    ("postgresql://me:se/cret@secret@host/db", "postgresql://host/db"),
    ("postgresql://host/db?user=me&password=secret&x=1", "postgresql://host/db?user=me&password=...&x=1"),
])
def test_a_password_is_redacted_wherever_it_stands(url, shown):
    assert search.redact(url) == shown
    assert search.redact(f"--storage={url}") == f"--storage={shown}"


def test_a_database_that_goes_away_is_one_line(toy, tmp_path, monkeypatch):
    cfg = config(toy, n_trials=2, max_steps=1, storage=f"sqlite:///{tmp_path}/study.db")
    with monkeypatch.context() as m:
        m.setattr(search, "run_trial", lambda *_: Path("study.db").write_bytes(b""))
        with pytest.raises(UserError, match="study.db: .*no such table") as e:
            run(cfg)
    assert "\n" not in str(e.value)


def test_a_wrong_start_uses_up_no_trials(toy):
    with pytest.raises(UserError, match="no checkpoint or run folder none"):
        run(config(toy, init_from="none"))
    assert not Path("study").exists()
    with pytest.raises(UserError, match="without --resume"):
        config(toy, resume=True)


def test_the_best_of_another_machine_is_not_mistaken_for_ours(toy):
    run(config(toy, n_trials=2, max_steps=1))
    shutil.rmtree(Path("study", os.readlink("study/best")))
    run(config(toy, n_trials=2, max_steps=1))
    assert not os.path.lexists("study/best")


# ---- several workers, on a cheap trial

def cheap_trial(study, trial, space, dataset, command):
    """Like search.run_trial, but beginnings and ends are written to files, and the loss is a parabola."""
    params = {key: suggest(trial) for key, suggest in space.items()}
    with open("begun", "a") as f:
        f.write(f"{trial.number}\n")
    time.sleep(random.Random(trial.number).random() / 10)
    for key, value in {"val_bpb": (params["lr"] - 0.03) ** 2, "parameters": 1, "ms_per_token": 1.0, "steps": 1,
                       "seconds": 0.1}.items():
        trial.set_user_attr(key, value)
    study.study.tell(trial, [trial.study.get_trials()[trial.number].user_attrs["val_bpb"]])
    with open("ended", "a") as f:
        f.write(f"{trial.number}\n")


def worker(cfg):
    search.run_trial = cheap_trial
    with open(os.devnull, "w") as sys.stdout:
        run(cfg)
    os._exit(0)


def start(cfg):
    process = multiprocessing.get_context("fork").Process(target=worker, args=(cfg,))
    process.start()
    return process


def numbers(name):
    return [int(n) for n in Path(name).read_text().split()]


def check_whole(n_trials, died=0):
    """Each trial once, all finished; of those that died, each has exactly one that took over its values."""
    rows = table("study")
    done = [int(row["trial"]) for row in rows if row["state"] == "COMPLETE"]
    assert len(done) == n_trials and sorted(set(numbers("begun"))) == sorted(numbers("begun"))
    assert set(numbers("ended")) <= set(done)              # a finished trial is never lost
    assert {row["state"] for row in rows} <= {"COMPLETE", "DIED"}
    dead = {row["trial"]: row["lr"] for row in rows if row["state"] == "DIED"}
    assert len(dead) <= died
    again = {row["again"]: row["lr"] for row in rows if row["again"]}
    assert again == {n: lr for n, lr in dead.items() if lr}


def four_workers(cfg):
    processes = [start(cfg) for _ in range(4)]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    check_whole(cfg.n_trials)
    assert len({row["worker"] for row in table("study")}) > 1


def test_four_workers_on_one_journal(toy):
    four_workers(config(toy, n_trials=24, prune=False))


def test_four_workers_on_one_sqlite_file(toy, tmp_path):
    four_workers(config(toy, n_trials=12, prune=False, storage=f"sqlite:///{tmp_path}/study.db"))


@pytest.fixture
def postgres():
    """The address of a PostgreSQL server of our own."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install -r requirements-search.txt")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(p).parent for p in [shutil.which("initdb")] if p]
    if not found:
        pytest.skip("needs PostgreSQL: apt install postgresql")
    user = "nobody" if os.geteuid() == 0 else None         # it refuses to run as root
    folder = tempfile.mkdtemp()
    if user:
        shutil.chown(folder, user)
    command = [found[-1] / "initdb", "-A", "trust", "-U", "me", "-N", "-D", f"{folder}/db"]
    done = subprocess.run(command, capture_output=True, text=True, user=user, cwd=folder)
    if done.returncode:
        pytest.skip(f"PostgreSQL does not start: {done.stderr[-200:]}")
    server = subprocess.Popen([found[-1] / "postgres", "-D", f"{folder}/db", "-k", folder, "-c", "listen_addresses="],
                              user=user, cwd=folder, stderr=subprocess.DEVNULL)
    import psycopg
    for _ in range(600):
        try:
            psycopg.connect(host=folder, user="me", dbname="postgres").close()
            break
        except psycopg.OperationalError:
            time.sleep(0.1)
    yield f"postgresql://me@/postgres?host={folder}"
    server.send_signal(signal.SIGINT)
    server.wait(60)
    shutil.rmtree(folder)


def test_four_workers_on_one_postgresql(toy, postgres):
    four_workers(config(toy, n_trials=24, prune=False, storage=postgres))


@pytest.mark.score("A17")
def test_killed_workers_lose_nothing(toy, count, score):
    kills = count(3, 10)
    cfg, rng = config(toy, n_trials=12 + 4 * kills, prune=False), random.Random(0)
    for i in range(kills):
        process, had = start(cfg), len(numbers("ended")) if i else 0
        while not (Path("ended").exists() and len(numbers("ended")) > had) and process.is_alive():
            time.sleep(0.005)
        time.sleep(0.15 * rng.random())
        process.kill()                                     # SIGKILL
        process.join()
        Path("ended").touch()
    process = start(cfg)
    process.join(300)
    assert process.exitcode == 0
    check_whole(cfg.n_trials, died=kills)
    score(kills, kills, f"{cfg.n_trials} trials finished")


class Clock:
    """time.perf_counter: each measured thing takes as many seconds as its turn says, the last turn for ever."""

    def __init__(self, *turns):
        self.turns = list(turns)
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_a_turn(self, *args):
        self.now += self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]


def test_milliseconds_per_token_by_hand(monkeypatch):
    """The median of the tokens behind half a context, the prompt not counted."""
    def decoder(model, prompt, n):
        prompts.append(prompt.shape)
        return clock.pass_a_turn

    monkeypatch.setattr(search, "Decoder", decoder)
    monkeypatch.setattr(search.time, "perf_counter", lambda: clock())
    for block_size, turns, milliseconds in ((32, [50, 0.25, 0.5, 4.0], 4000.0), (6, [50, 0.25, 0.5, 4.0], 500.0),
                                            (1, [50, 0.25, 4.0], 250.0)):
        prompts = []
        clock = Clock(*turns)
        config = types.SimpleNamespace(block_size=block_size, vocab_size=5)
        assert search.ms_per_token(types.SimpleNamespace(config=config, eval=lambda: None)) == milliseconds
        assert prompts == [(1, max(1, block_size // 2))]


def test_a_budget_by_hand(toy, monkeypatch):
    """A first step of 9 seconds does not count; the median of the others is 2, so 100 seconds are 50 steps."""
    clock = Clock(9.0, 1.0, 2.0, 3.0, 2.0)
    monkeypatch.setattr(search.time, "perf_counter", clock)
    monkeypatch.setattr(search.train, "training_step", clock.pass_a_turn)
    cfg = configurator.load(train.Config, dataset=str(toy), n_layer=1, n_embd=16, n_head=2, block_size=8, batch_size=2,
                            device="cpu", dtype="float32")
    dataset = data.load(toy)
    assert search.fit_steps(cfg, dataset, 100.0) == 50
    clock.turns = [9.0, 1.0, 2.0, 3.0, 2.0]
    assert search.fit_steps(cfg, dataset, 0.5) == 1


@pytest.mark.score("A17")
def test_a_worker_killed_while_it_trains_has_its_trial_run_again(toy, count, score):
    kills = count(1, 5)
    cfg = config(toy, n_trials=kills + 2, prune=False, eval_every=3)
    rng = random.Random(0)
    for _ in range(kills):
        known = set(Path(".").glob("study/trial_*"))
        process = multiprocessing.get_context("fork").Process(target=trainer, args=(cfg,))
        process.start()
        while not any((folder / "latest").exists() for folder in set(Path(".").glob("study/trial_*")) - known):
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(0.05 * rng.random())
        process.kill()
        process.join()
    best = run(cfg)
    rows = table("study")
    done = {row["trial"]: float(row["val_bpb"]) for row in rows if row["state"] == "COMPLETE"}
    died = {row["trial"]: row["lr"] for row in rows if row["state"] == "DIED"}
    again = {row["again"]: row["lr"] for row in rows if row["again"]}
    assert len(done) == cfg.n_trials and again == died and best.number == int(min(done, key=done.get))
    for number, bpb in done.items():  # a finished trial is one whose checkpoint says the same
        record = checkpoint.load(f"study/trial_{int(number):04d}", which="best").meta["state"]["record"]
        assert record["val_bpb"] == bpb
    score(kills, kills, f"{len(died)} trials were broken off by it")


def trainer(cfg):
    torch.set_num_threads(1)
    with open(os.devnull, "w") as sys.stdout:
        run(cfg)
    os._exit(0)


# ---- every key counts
# key: (what it is changed to, further keys that it needs to be changed for it to count)
KEYS = {
    "space": (("lr=0.0001..0.1 log", "n_layer=1..2"), {}), "n_trials": (3, {}),
    "objectives": (("parameters",), {}), "sampler": ("random", {"n_trials": 14}),  # the first ten of both are alike
    "prune": (False, {"n_trials": 5}), "seconds": (0.6, {}), "n_evals": (2, {"seconds": 0.6}),
    "storage": ("sqlite:///{root}/study.db", {}),
}
# what a trial takes over from the command, each with a value that is not its default. A search has a folder of its own
# for each trial, and no --resume.
TAKEN = {
    "lora_rank": 2, "seed": 7, "prepare": "x.py", "batch_size": 6, "micro_batch_size": 3, "arch": "hybrid_ssm",
    "optimizer": "adamw", "lr": 0.011, "rest_optimizer": "lion", "rest_lr": 0.012, "weight_decay": 0.13,
    "betas": [0.8, 0.9], "momentum": 0.7, "grad_clip": 0.3, "schedule": "wsd", "max_steps": 8, "warmup_steps": 2,
    "min_lr": 0.2, "decay_frac": 0.3, "restart_steps": 5, "restart_mul": 2.0, "restart_decay": 0.6, "eval_every": 3,
    "patience": 4, "prompts": ["a"], "prompt_tokens": 9, "log_every": 6, "tracker": "tensorboard", "save_every": 2,
    "keep_last": 1, "device": "meta", "dtype": "bfloat16", "compile": True,
}


def test_every_key_is_listed():
    assert KEYS.keys() == search.OURS
    loop = {f.name for f in fields(train.Config)}
    assert TAKEN.keys() | {"dataset", "init_from"} == loop - {"model", "out_dir", "resume"}


def test_a_trial_takes_over_every_key_of_the_loop(toy, runs, monkeypatch):
    taken = []

    def record(cfg, report, command):
        taken.append((cfg, command))
        raise ValueError("enough")
    monkeypatch.setattr(train, "train", record)
    given = TAKEN | {"dataset": str(toy), "init_from": str(runs / "byte")}
    cfg = configurator.load(search.Config, **given, space=("n_layer=1..2",), n_trials=1, n_embd=96)
    search.search(cfg, Path("study"), typed(cfg)._replace(files=["recipe.py"]))
    cfg, command = taken[0]
    got = configurator.flat(cfg)
    assert {key: got[key] for key in given} == given and (got["n_embd"], got["resume"]) == (96, False)
    defaults = configurator.flat(configurator.load(train.Config, arch="hybrid_ssm"))
    assert not [key for key in given if given[key] == defaults[key] and key != "arch"]
    assert got["out_dir"] == "study/trial_0000" and table("study")[0]["error"] == "enough"
    # what was asked for are the values of the trial, too; the recipe of a search is none of train.py's
    assert command.files == [] and not command.given.keys() & search.OURS
    assert command.given["n_layer"] == cfg.model.n_layer and command.given["n_embd"] == 96


@pytest.mark.parametrize("key", KEYS)
def test_every_key_changes_the_study(toy, tmp_path, monkeypatch, key):
    """The trials and what was told to Optuna of each, their configs, and which files there are; no times."""
    trained = []  # (Config, the last evaluation) of each trial
    studies = []

    def quick_train(cfg, report, command):
        for step in range(cfg.eval_every, cfg.max_steps + 1, cfg.eval_every):
            record = {"step": step, "val_bpb": abs(cfg.lr - 0.03) + cfg.model.n_layer + 1 / step}
            if report(record):
                break
        trained.append((cfg, record))

    def measure(folder):
        cfg, record = trained[-1]
        return record | {"parameters": cfg.model.n_embd, "ms_per_token": 1.0, "steps": record["step"]}

    def result(**settings):
        given = {"n_trials": 2, "max_steps": 2, "space": ("lr=0.0001..0.1 log",)} | settings
        if "storage" in given:
            given["storage"] = given["storage"].format(root=tmp_path)
        trained.clear()
        run(config(toy, **given))
        rows = [{name: row[name] for name in row.keys() - {"worker", "seconds"}} for row in table("study")]
        told = [trial.values for trial in studies[-1].get_trials()]
        names = sorted(path.name for path in [*Path().iterdir(), *Path("study").iterdir()])
        for path in tmp_path.iterdir():
            files.remove(path)
        return rows, told, [cfg for cfg, _ in trained], names

    create = optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **options: studies.append(create(**options)) or studies[-1])
    monkeypatch.setattr(train, "train", quick_train)
    monkeypatch.setattr(search, "measure", measure)
    monkeypatch.setattr(search, "fit_steps", lambda cfg, dataset, seconds: round(10 * seconds))  # has a test of its own
    value, needed = KEYS[key]
    plain = result(**needed)
    assert plain == result(**needed)
    assert result(**needed | {key: value}) != plain


def test_the_steps_that_are_timed_are_those_of_the_trial(toy, monkeypatch):
    """Each value in its place: of a swapped pair only the time would tell."""
    made = []
    stepped = []
    make = search.optim.Optimizer
    step = train.training_step
    monkeypatch.setattr(search.optim, "Optimizer", lambda *args: made.append(args) or make(*args))
    monkeypatch.setattr(train, "training_step", lambda *args: stepped.append(args) or step(*args))
    cfg = config(toy, lr=0.011, rest_lr=0.012, weight_decay=0.13, betas=(0.8, 0.9), momentum=0.7, grad_clip=0.3,
                 rest_optimizer="lion", micro_batch_size=4, dtype="bfloat16")
    assert search.fit_steps(cfg, data.load(toy), 0.0) == 1
    assert made[0][1:] == ("muon", 0.011, "lion", 0.012, 0.13, (0.8, 0.9), 0.7) and len(stepped) == 4
    forward, learner, _, x, y, micro_batch_size, autocast, grad_clip, scale = stepped[2]
    first, targets = train.next_batch(cfg, data.load(toy), 2, "cpu")
    assert torch.equal(x, first) and torch.equal(y, targets)
    assert forward is learner is made[0][0] and (micro_batch_size, grad_clip, scale) == (4, 0.3, 1.0)
    assert autocast.fast_dtype == torch.bfloat16 and autocast._enabled


def test_a_budget_sets_the_steps_and_what_depends_on_them(toy, monkeypatch):
    taken = []

    def record(cfg, report, command):
        taken.append((cfg.max_steps, cfg.eval_every, cfg.warmup_steps))
        raise ValueError("enough")
    monkeypatch.setattr(train, "train", record)
    monkeypatch.setattr(search, "fit_steps", lambda cfg, dataset, seconds: round(10 * seconds))
    for folder, seconds, n_evals in (("a", 2.0, 9), ("b", 4.0, 2), ("c", 0.1, 9)):
        given = {"n_trials": 1, "max_steps": 100, "warmup_steps": 8, "space": ("lr=0.001..0.01",)}
        run(config(toy, **given, seconds=seconds, n_evals=n_evals), folder)
    # a warm-up takes a quarter of the steps at most
    assert taken == [(20, 3, 5), (40, 20, 8), (1, 1, 0)]


def test_a_study_is_named_after_its_last_recipe(toy, monkeypatch):
    folders = []
    monkeypatch.setattr(search, "search", lambda cfg, folder, command: folders.append(str(folder)))
    for names, changes in ((["config/a.py", "config/b.py"], {}), ([], {}), (["config/a.py"], {"out_dir": "mine"})):
        cfg = config(toy, **changes)
        with pytest.raises(UserError, match="no trial"):
            search.main(cfg, typed(cfg)._replace(files=names))
    assert folders == ["runs/b", "runs/search", "mine"]


# ---- which trial is the best
def scripted(monkeypatch, *bits):
    """Let the evaluations of all trials find these bits per byte, one after the other."""
    evaluate = train.evaluate
    coming = iter(bits)

    def found(*args):
        bpb = next(coming)
        return evaluate(*args) | {"val_bpb": bpb, "val_loss": bpb * math.log(2)}
    monkeypatch.setattr(train, "evaluate", found)


def test_a_trial_counts_by_its_best_checkpoint_and_not_by_its_latest(toy, monkeypatch, capsys):
    scripted(monkeypatch, 3.0, 1.0, 9.0, 2.0, 2.0, 2.0)
    cfg = config(toy, n_trials=2, max_steps=3, prune=False, out_dir="study", space=("lr=0.001..0.01",))
    search.main(cfg, typed(cfg))
    rows = table("study")
    assert [(row["val_bpb"], row["best_step"], row["steps"]) for row in rows] == [("1.0", "2", "3"), ("2.0", "1", "3")]
    assert os.readlink("study/best") == "trial_0000"
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend("study/journal.log")))
    assert [trial.value for trial in study.trials] == [1.0, 2.0]
    assert "best: trial 0, 1.0000 bits per byte" in capsys.readouterr().out


def test_a_trial_that_was_stopped_early_is_never_the_best(toy, monkeypatch, capsys):
    """One evaluation may be a stroke of luck: it says nothing about where the trial would have ended."""
    monkeypatch.setattr(search, "plot_search", PLOT_SEARCH)
    scripted(monkeypatch, 3.0, 2.5, 0.5, 2.0, 1.0)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number == 1)
    drawn = []  # the line of the best so far
    axes = pytest.importorskip("matplotlib.axes").Axes
    monkeypatch.setattr(axes, "step", lambda self, numbers, best, **_: drawn.append((numbers, best)))
    cfg = config(toy, n_trials=3, max_steps=2, out_dir="study", space=("lr=0.001..0.01",))
    search.main(cfg, typed(cfg))
    assert [(row["state"], row["val_bpb"]) for row in table("study")] == [
        ("COMPLETE", "2.5"), ("PRUNED", "0.5"), ("COMPLETE", "1.0")]
    assert os.readlink("study/best") == "trial_0002" and drawn[-1] == ([0, 2], [2.5, 1.0])
    out = capsys.readouterr().out
    assert "best: trial 2, 1.0000 bits per byte" in out and out.count("stopped early") == 1


def test_where_all_were_stopped_early_there_is_no_best(toy, monkeypatch):
    monkeypatch.setattr(search, "plot_search", PLOT_SEARCH)
    scripted(monkeypatch, 1.0)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    cfg = config(toy, n_trials=1, max_steps=2, out_dir="study", space=("lr=0.001..0.01",))
    with pytest.raises(UserError, match="no trial of study has succeeded"):
        search.main(cfg, typed(cfg))
    assert not os.path.lexists("study/best")


def test_a_trial_at_its_last_step_is_complete_whatever_the_others_reached(toy, monkeypatch):
    scripted(monkeypatch, 1.0)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    assert run(config(toy, n_trials=1, max_steps=1, space=("lr=0.001..0.01",))).number == 0
    assert table("study")[0]["state"] == "COMPLETE"


@dataclass(frozen=True)
class Toy:
    size: int | Literal["auto"] = "auto"


def test_both_ends_of_a_range_are_numbers():
    for text in ("size=auto..8", "size=8..auto", "size=auto..auto"):
        with pytest.raises(UserError, match="size is not a number: list choices instead, size=a|b|c"):
            search.dimension(Toy(), text)
    key, suggest = search.dimension(Toy(), " size = 2..8 step 3 ")
    asked = []
    trial = types.SimpleNamespace(suggest_int=lambda *args, **options: asked.append((args, options)))
    suggest(trial)
    assert key == "size" and asked == [(("size", 2, 8), {"step": 3, "log": False})]
