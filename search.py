"""Search for a better model: any key of train.py or of the model file, by Optuna, ranked by validation bits per byte.

    python search.py config/search_tiny.py                                   # the best dense model for 60 seconds
    python search.py config/search_cerebros.py --n_trials=30                 # again the same: it goes on
    python search.py config/search_cerebros.py --storage=postgresql://host/db   # the same on each of several machines
    python train.py config/cerebros_bible.py --init_from=runs/search_cerebros/best   # phase two

A config is a recipe of train.py that also says what to vary, `space`: texts like "n_layer=2..6" (a range),
"lr=0.003..0.1 log", "n_embd=64..256 step 32" and "act=silu|gelu" (choices). As many workers as you like, each the same
command; a killed one loses no finished trial, and the trial it was at is run again by the next that looks.

runs/NAME/ then holds trials.csv, search.png, pareto.png (with two objectives), wiring.png (of a cerebros), a run
folder for every trial, and `best`, a link to that of the best.
"""
import contextlib
import csv
import fcntl
import io
import os
import re
import shutil
import socket
import statistics
import time
import uuid
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

import optim
import train
from thimble import checkpoint, configurator, data, files, load, machine, runlog
from thimble.files import UserError

OBJECTIVES = ("val_bpb", "parameters", "ms_per_token")


@dataclass(frozen=True)
class Config(train.Config):
    # search
    space: tuple[str, ...] = ()     # what to vary: "key=low..high", with " log" or " step 32" behind; "key=a|b|c"
    n_trials: int = 30              # of the whole study, by all workers together
    objectives: tuple[str, ...] = ("val_bpb",)  # what to make small: val_bpb, parameters, ms_per_token (to decode one)
    sampler: Literal["tpe", "random"] = "tpe"  # how trials are chosen
    prune: bool = True              # with one objective: at evaluation 1, 3, 9, ... only the best third go on
    seconds: float = 0.0            # training time of each trial: max_steps becomes what fits; 0: as max_steps says
    n_evals: int = 9                # evaluations of a trial, with `seconds`
    storage: str = ""               # sqlite:///FILE or postgresql://...; empty: a journal file in out_dir

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_trials", "n_evals"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seconds < 0 or self.resume:
            raise ValueError(f"seconds={self.seconds} must not be negative, and a search goes on by itself, without "
                             "--resume")
        if wrong := [name for name in self.objectives if name not in OBJECTIVES]:
            raise ValueError(f"objectives={wrong[0]}: there are {', '.join(OBJECTIVES)}")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives must name at least one thing, each once")


OURS = {f.name for f in fields(Config)} - {f.name for f in fields(train.Config)}
# keys that may differ between the workers of a study
FREE = (train.CAN_CHANGE_ON_RESUME - {"eval_every", "patience", "init_from", "dtype"}
        | {"n_trials", "storage", "micro_batch_size"})


def optuna_module():
    try:
        import optuna
    except ImportError:
        raise UserError("search.py needs a package: pip install -r requirements-search.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


# ---- what to vary

def parse_space(cfg):
    """{key: function of an Optuna trial that gives the value}; UserError for what is no key, range or choice."""
    space = {}
    for text in cfg.space:
        try:
            key, suggest = dimension(cfg, text)
            if key in space:
                raise UserError(f"{key} is there twice")
        except UserError as e:
            raise UserError(f"space {text!r}: {e}") from None
        space[key] = suggest
    if not space:
        raise UserError("nothing to vary: set space, as config/search_tiny.py does")
    return space


def dimension(cfg, text):
    """(key, function of an Optuna trial). Whether shapes fit together is the trial's matter."""
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(.+?)\s*", text)
    if not match:
        raise UserError("expected key=low..high or key=a|b|c")
    key, values = match.groups()
    free = train.CAN_CHANGE_ON_RESUME - {"eval_every", "patience", "dtype"}
    keys = [k for k in configurator.flat(cfg) if k not in OURS | free]
    if key not in keys:
        raise UserError(f"{key} is not a key to vary{configurator.hint(key, keys)}")
    span = re.fullmatch(r"(\S+?)\.\.(\S+)(?: (log)| step (\S+))?", values)
    if not span:
        choices = [configurator.convert(cfg, key, value.strip()) for value in values.split("|")]
        return key, lambda trial: trial.suggest_categorical(key, choices)
    low, high, step = (configurator.convert(cfg, key, span[i]) if span[i] else None for i in (1, 2, 4))
    if not all(type(v) in (int, float) for v in (low, high)):
        raise UserError(f"{key} is not a number: give choices, {key}=a|b|c")
    if not low < high or step is not None and step <= 0 or span[3] and low <= 0:
        raise UserError("needs low < high, a step above 0, and with log a low above 0")
    kind = "suggest_int" if type(low) is int else "suggest_float"
    more = {"step": step} if step else {"log": bool(span[3])}
    return key, lambda trial: getattr(trial, kind)(key, low, high, **more)


def trial_config(cfg, given, params, out_dir):
    """The train.Config of one trial. given: the keys that were asked for."""
    base = {f.name: getattr(cfg, f.name) for f in fields(train.Config) if f.name != "model"}
    shape = {k: v for k, v in configurator.flat(cfg.model).items() if k in given}
    return configurator.load(train.Config, **base | shape | params | {"out_dir": str(out_dir)})


# ---- the study

class FileLock:
    """A lock for Optuna's journal that a killed worker lets go of at once; Optuna's own stays for 30 seconds.

    Who gets it first drops a last line that a full disk or a crash cut off: Optuna could never read on behind it.
    """

    def __init__(self, path, journal):
        self.path, self.journal, self.file = path, journal, None

    def acquire(self):
        file = open(self.path, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        self.file = file
        with open(self.journal, "r+b") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
            if f.read() not in (b"", b"\n"):
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
        return True

    def release(self):
        self.file.close()


class Study:
    """An Optuna study, its folder, and a lock under which this machine's workers claim trials and write reports.

    A worker is alive as long as it holds the lock of its own file: the system lets go of it however the process ends.
    """

    def __init__(self, cfg, folder):
        optuna = optuna_module()
        self.cfg, self.folder, self.State = cfg, folder, optuna.trial.TrialState
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        self.name = f"{socket.gethostname()}/{uuid.uuid4().hex[:12]}"
        self.held = open(self.worker_file(self.name), "w")
        fcntl.flock(self.held, fcntl.LOCK_EX)
        self.prune = cfg.prune and len(cfg.objectives) == 1
        pruner = optuna.pruners.SuccessiveHalvingPruner(1, 3) if self.prune else optuna.pruners.NopPruner()
        with self.locked():                                # tables are made once
            try:
                self.study = optuna.create_study(
                    storage=self.open_storage(optuna), study_name=folder.name, load_if_exists=True, pruner=pruner,
                    sampler=self.sampler(0), directions=["minimize"] * len(cfg.objectives))
                asked = {k: v for k, v in configurator.flat(cfg).items() if k not in FREE}
                stored = self.study.user_attrs.get("config")
                if stored is None:
                    self.study.set_user_attr("config", asked)
            except Exception as e:                         # a database has many ways to say no
                self.close()
                raise storage_error(cfg, folder, e) from None
        if changed := [k for k in asked if stored and asked[k] != stored.get(k)]:
            self.close()
            k = changed[0]
            raise UserError(f"{folder} is a study with {k}={stored.get(k)}, this command has {k}={asked[k]}: use the "
                            "same, or name another --out_dir")

    def open_storage(self, optuna):
        if self.cfg.storage:
            return optuna.storages.RDBStorage(re.sub("^postgresql://", "postgresql+psycopg://", self.cfg.storage))
        from optuna.storages.journal import JournalFileBackend
        journal = self.folder / "journal.log"
        lock = FileLock(self.folder / "workers" / "journal", journal)
        return optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock))

    def sampler(self, number):
        """A trial's own: what is drawn depends on the seed, the trial's number and the trials that have ended."""
        samplers, seed = optuna_module().samplers, (self.cfg.seed * 1_000_003 + number) % 2**32
        return samplers.RandomSampler(seed) if self.cfg.sampler == "random" else samplers.TPESampler(seed=seed)

    def worker_file(self, name):
        return self.folder / "workers" / name.rpartition("/")[2]

    @contextlib.contextmanager
    def locked(self):
        with open(self.folder / "workers" / "lock", "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def dead(self, trial):
        """Whether the worker of a running trial has ended. One on another machine is believed to be alive."""
        name = trial.user_attrs["worker"]
        if name == self.name or name.partition("/")[0] != socket.gethostname():
            return False
        try:
            with open(self.worker_file(name)) as f:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        except OSError as e:                               # no file: it ended well; or somebody holds the lock
            return isinstance(e, FileNotFoundError)

    def give_up(self, trial):
        """End a trial that nobody runs any more, and queue its values anew; the queue first, so that none is lost."""
        again = any(t.user_attrs.get("again") == trial.number for t in self.study.get_trials(deepcopy=False))
        if trial.params and not again:
            self.study.enqueue_trial(trial.params, user_attrs={"again": trial.number, "worker": self.name})
        self.study.tell(trial.number, state=self.State.FAIL)

    def claim(self):
        """The next trial to run, or None where the study has all of them."""
        with self.locked():
            for trial in self.study.get_trials(states=[self.State.RUNNING]):
                if self.dead(trial):
                    print(f"trial {trial.number}: its worker has ended, it is run again", flush=True)
                    self.give_up(trial)
            trials = self.study.get_trials(deepcopy=False)
            count = sum(t.state != self.State.FAIL or "error" in t.user_attrs for t in trials)
            if not any(t.state == self.State.WAITING for t in trials):
                if count >= self.cfg.n_trials:
                    return None
                # first queued, with its worker's name, so that there is no moment in which it runs without one
                self.study.enqueue_trial({}, user_attrs={"worker": self.name})
            trial = self.study.ask()
            trial.set_user_attr("worker", self.name)
            self.study.sampler = self.sampler(trial.number)
            return trial

    def close(self):
        self.worker_file(self.name).unlink(missing_ok=True)
        self.held.close()


def hidden(url):
    return re.sub(r"//[^/]*@", "//", url)                  # a password is nobody's business


def storage_error(cfg, folder, e):
    why = " ".join(str(e.__cause__ or e).split())[:200] or type(e).__name__
    return UserError(f"--storage={hidden(cfg.storage) or folder}: {why}")


# ---- one trial

def fit_steps(cfg, dataset, seconds):
    """How many optimizer steps of `cfg` take `seconds` here, by a few of them."""
    vocab_size = cfg.model.vocab_size or dataset.vocab_size
    model = import_module(cfg.arch).Model(replace(cfg.model, vocab_size=vocab_size))
    device = machine.pick_device(cfg.device)
    model.to(device).train()
    optimizer = optim.Optimizer(model, cfg.optimizer, cfg.lr, cfg.rest_optimizer, cfg.rest_lr, cfg.weight_decay,
                                cfg.betas, cfg.momentum)
    dtype, micro = getattr(torch, cfg.dtype), cfg.micro_batch_size or cfg.batch_size
    times, begun = [], time.perf_counter()
    while len(times) < 4 or len(times) < 20 and time.perf_counter() - begun < seconds / 20:
        start = time.perf_counter()
        x, y = data.batch(dataset.train, len(times), cfg.batch_size, cfg.model.block_size, cfg.seed)
        for part, targets in zip(torch.from_numpy(x).split(micro), torch.from_numpy(y).split(micro), strict=True):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(part.to(device), targets.to(device))[1]
            (loss * len(part) / len(x)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or 1.0)
        optimizer.step(1.0)
        for p in model.parameters():
            p.grad = None
        loss.item()                                        # waits for a GPU
        times.append(time.perf_counter() - start)
    return max(1, round(seconds / statistics.median(times[1:])))


@torch.no_grad()
def ms_per_token(model, n=32):
    """Median milliseconds of decoding a token in float32 on the CPU, one row, the context half full."""
    model.eval()
    half, times = max(1, model.config.block_size // 2), []
    idx = torch.arange(half)[None] % model.config.vocab_size
    _, cache = model.step(idx, model.init_cache(1, half + n))
    for _ in range(min(n, max(1, model.config.block_size - half))):
        start = time.perf_counter()
        _, cache = model.step(idx[:, :1], cache)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def run_trial(study, trial, space, dataset, command):
    """Train one; the numbers become attributes of the trial."""
    cfg, folder = study.cfg, study.folder / f"trial_{trial.number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    begun, count, stopped = time.perf_counter(), 0, False

    def report(record):
        nonlocal count, stopped
        count += 1
        if record["val_bpb"] is None:
            raise UserError(f"the loss is not finite at step {record['step']}")
        if study.prune:
            trial.report(record["val_bpb"], count)
            stopped = trial.should_prune() and record["step"] < one.max_steps
            return "others do better (successive halving)" if stopped else None

    with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
        params = {key: suggest(trial) for key, suggest in space.items()}
        one = trial_config(cfg, command.given, params, folder)
        if cfg.seconds:
            steps = fit_steps(one, dataset, cfg.seconds)
            one = replace(one, max_steps=steps, eval_every=max(1, -(-steps // cfg.n_evals)),
                          warmup_steps=min(one.warmup_steps, steps // 4))
        train.train(one, report, command._replace(given=command.given | params))
    saved = checkpoint.load_run(folder, which="best")
    model = checkpoint.load_model(saved)
    record, latest = saved.meta["state"]["record"], checkpoint.load_run(folder).meta["state"]
    numbers = {"val_bpb": record["val_bpb"], "parameters": sum(p.numel() for p in model.parameters()),
               "ms_per_token": ms_per_token(model), "best_step": record["step"], "steps": latest["step"],
               "train_seconds": latest["seconds"], "seconds": time.perf_counter() - begun,
               "wiring": getattr(model.config, "wiring", "")}
    for key, value in numbers.items():
        trial.set_user_attr(key, value)
    values = None if stopped else [numbers[name] for name in cfg.objectives]
    study.study.tell(trial, values, study.State.PRUNED if stopped else None)


# ---- reports

COLUMNS = ("val_bpb", "parameters", "ms_per_token", "best_step", "steps", "train_seconds", "seconds")


def write_reports(study, space):
    """trials.csv, the pictures and the link `best`, from all trials of the study."""
    folder, trials = study.folder, study.study.get_trials(deepcopy=False)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["trial", "state", *COLUMNS, *space, "again", "error", "worker", "wiring"])
    for t in trials:
        state = "DIED" if t.state == study.State.FAIL and "error" not in t.user_attrs else t.state.name
        writer.writerow([t.number, state, *(t.user_attrs.get(k, "") for k in COLUMNS),
                         *(t.params.get(k, "") for k in space),
                         *(t.user_attrs.get(k, "") for k in ("again", "error", "worker", "wiring"))])
    files.write_atomic(folder / "trials.csv", table.getvalue())
    done = [t for t in trials if t.state == study.State.COMPLETE]
    if not done:
        return None
    best = min(done, key=lambda t: t.user_attrs["val_bpb"])
    run = folder / f"trial_{best.number:04d}"
    if run.exists():
        temporary = folder / f".best-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.name)
        os.replace(temporary, folder / "best")
    else:                                                  # another machine has it
        (folder / "best").unlink(missing_ok=True)
    with contextlib.suppress(ImportError):
        plot_search(study, [t for t in trials if "val_bpb" in t.user_attrs])
        if len(study.cfg.objectives) > 1:
            plot_pareto(study, done)
        module = import_module(best.params.get("arch", study.cfg.arch))
        if hasattr(module, "draw") and run.exists():
            config = configurator.from_flat(module.Config, checkpoint.load_run(run, "best").meta["model_config"])
            module.draw(config, folder / "wiring.png")
    return best


def figure(title, xlabel, ylabel):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def plot_search(study, trials):
    """search.png: every trial's bits per byte, and the best so far."""
    picture, axes = figure(study.folder.name, "trial", "validation bits per byte")
    low, best = float("inf"), []
    for t in trials:
        pruned = t.state == study.State.PRUNED
        axes.plot(t.number, t.user_attrs["val_bpb"], "x" if pruned else "o", color="gray" if pruned else "tab:blue")
        if not pruned:
            low = min(low, t.user_attrs["val_bpb"])
            best.append((t.number, low))
    if best:
        axes.step(*zip(*best, strict=True), where="post", color="tab:red", label=f"best so far, {low:.3f}")
    axes.plot([], [], "x", color="gray", label="stopped early")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    picture.savefig(study.folder / "search.png", dpi=120)


def plot_pareto(study, done):
    """pareto.png: the first two objectives of every trial; those that no other beats in all are red."""
    first, second = study.cfg.objectives[:2]
    picture, axes = figure(study.folder.name, second, first)
    axes.plot([t.values[1] for t in done], [t.values[0] for t in done], "o", color="lightgray")
    front = sorted(study.study.best_trials, key=lambda t: t.values[1])
    style = "o-" if len(study.cfg.objectives) == 2 else "o"
    axes.plot([t.values[1] for t in front], [t.values[0] for t in front], style, color="tab:red", label="Pareto set",
              drawstyle="steps-post")
    for t in front:
        axes.annotate(str(t.number), (t.values[1], t.values[0]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.legend()
    picture.savefig(study.folder / "pareto.png", dpi=120)


def row(study, trial):
    """A line of the live table."""
    t = study.study.get_trials(deepcopy=False)[trial.number]
    said = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in t.params.items())
    if "error" in t.user_attrs:
        return f"{t.number:>5}  failed: {t.user_attrs['error']}   {said}"
    a, state = t.user_attrs, {"COMPLETE": "", "PRUNED": "stopped early"}.get(t.state.name, t.state.name.lower())
    return (f"{t.number:>5}  {a['val_bpb']:9.4f}  {a['parameters']:>12,}  {a['ms_per_token']:8.2f}  {a['steps']:>6,}  "
            f"{runlog.clock(a['seconds']):>6}  {state:<13}  {said}")


def search(cfg, folder, command):
    """Run trials until the study has n_trials -> the best trial so far, or None."""
    space = parse_space(cfg)
    if cfg.dtype == "auto":                                # all trials alike, whatever a noisy moment measures
        raise UserError("a search needs the same dtype for all trials: give --dtype=bfloat16 or --dtype=float32")
    optuna_module()
    dataset = train.open_dataset(cfg)
    if cfg.init_from:                                      # a wrong name must not use up the trials
        load.read(cfg.init_from, "best")
    study = Study(cfg, folder)
    print(f"{folder}: {' '.join(cfg.space)}\n{'trial':>5}  {'bits/byte':>9}  {'parameters':>12}  {'ms/token':>8}  "
          f"{'steps':>6}  {'time':>6}", flush=True)
    try:
        while True:
            with study.locked():
                best = write_reports(study, space)
            if not (trial := study.claim()):
                return best
            try:
                run_trial(study, trial, space, dataset, command)
            except BaseException as e:
                # its own fault: a shape that cannot be, a loss that is not finite, memory
                if isinstance(e, (ValueError, RuntimeError)) and not isinstance(e.__cause__, OSError):
                    trial.set_user_attr("error", " ".join(str(e).split())[:500] or type(e).__name__)
                    study.study.tell(trial, state=study.State.FAIL)
                else:                                      # Ctrl-C, SIGTERM, a full disk, a bug
                    with study.locked():
                        study.give_up(study.study.get_trials(deepcopy=False)[trial.number])
                    raise
            print(row(study, trial), flush=True)
    except Exception as e:
        if type(e).__module__.partition(".")[0] in ("optuna", "sqlalchemy"):  # the database has gone
            raise storage_error(cfg, folder, e) from None
        raise
    finally:
        study.close()


def main(cfg, command):
    recipes = command.files
    folder = Path(cfg.out_dir or Path("runs") / (Path(recipes[-1]).stem if recipes else "search"))
    best = search(cfg, folder, command._replace(line=hidden(command.line)))  # every run writes it down
    if best is None:
        raise UserError(f"no trial of {folder} has ended well: see {folder}/trials.csv")
    here = (folder / "best").exists()
    print(f"best: trial {best.number}, {best.user_attrs['val_bpb']:.4f} bits per byte. All of them: "
          f"{folder}/trials.csv, {folder}/search.png. "
          + (f"Now try:\npython sample.py --checkpoint={folder}/best" if here else
             f"Its run folder is on {best.user_attrs['worker'].partition('/')[0]}"))


if __name__ == "__main__":
    configurator.run(main, Config, with_command=True)
