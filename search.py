"""Search for a better model: any key of train.py or of the model file, by Optuna, ranked by validation bits per byte.

    python search.py config/search_tiny.py                                      # the best dense model in 60 seconds
    python search.py config/search_cerebros.py --n_trials=30                    # the same command again continues
    python search.py config/search_cerebros.py --storage=postgresql://host/db   # the same on each of several machines
    python train.py config/cerebros_bible.py --init_from=runs/search_cerebros/best   # then train the winner

A config is a recipe of train.py that also says what to vary, `space`: texts like "n_layer=2..6" (a range),
"lr=0.003..0.1 log", "n_embd=64..256 step 32" and "act=silu|gelu" (choices). Start as many workers as you like, all with
the same command. A killed worker loses no finished trial; the trial it was running is run again by another.

runs/NAME/ then holds trials.csv, search.png, pareto.png (with several objectives), wiring.png (of a cerebros), a run
folder for each trial, and `best`, a link to the best of them.
"""
import contextlib
import csv
import fcntl
import io
import math
import os
import re
import shlex
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
from thimble import checkpoint, configurator, files, load, machine, runlog, wiring
from thimble.files import UserError
from thimble.generate import Decoder


@dataclass(frozen=True)
class Config(train.Config):
    # search
    space: tuple[str, ...] = ()     # what to vary: "key=low..high", perhaps with " log" or " step 32"; or "key=a|b|c"
    n_trials: int = 30              # trials of the study, by all workers together
    objectives: tuple[Literal["val_bpb", "parameters", "ms_per_token"], ...] = ("val_bpb",)  # what to minimize
    sampler: Literal["tpe", "random"] = "tpe"  # how the values of a trial are chosen
    prune: bool = True              # with one objective: only the best third continue after evaluation 1, 3, 9, ...
    seconds: float = 0.0            # training time of a trial, which sets max_steps and eval_every; 0: as they are
    n_evals: int = 9                # evaluations of a trial, with `seconds`
    storage: str = ""               # sqlite:///FILE or postgresql://...; empty: a journal file in out_dir

    def __post_init__(self):
        super().__post_init__()
        configurator.check(self, positive=("n_trials", "n_evals"))
        if self.resume:
            raise ValueError("a search continues where it stopped, without --resume")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives must name at least one thing, each once")


OURS = {f.name for f in fields(Config)} - {f.name for f in fields(train.Config)}
# Keys of train.py that do not change the result of a trial. Some that may change when a run is resumed do: a trial is
# judged by its best evaluation, so it matters when it is evaluated, and all must start and compute alike.
NEUTRAL = train.CAN_CHANGE_ON_RESUME - {"eval_every", "patience", "init_from", "dtype"}
# micro-batches change a result only by rounding errors, and machines differ in memory
MAY_DIFFER_BETWEEN_WORKERS = NEUTRAL | {"n_trials", "storage", "micro_batch_size"}


def optuna_module():
    """Optuna, imported and quiet; UserError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("search.py needs Optuna: pip install -r requirements-search.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


# ---- what to vary
def parse_space(cfg):
    """{key: function from an Optuna trial to its value}. UserError for anything but a key with a range or choices."""
    space = {}
    for text in cfg.space:
        try:
            key, suggest = dimension(cfg, text)
            if key in space:
                raise UserError(f"{key} is given twice")
        except UserError as e:
            raise UserError(f"space {text!r}: {e}") from None
        space[key] = suggest
    if not space:
        raise UserError("nothing to vary: set space, as config/search_tiny.py does")
    return space


def dimension(cfg, text):
    """One text of `space` -> (key, function from an Optuna trial to its value).

    Values are checked one by one; a combination that makes no model is found by its trial, which fails.
    """
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(.+?)\s*", text)
    if not match:
        raise UserError("expected key=low..high or key=a|b|c")
    key, values = match.groups()
    fixed = OURS | NEUTRAL | {"init_from"}
    keys = [name for name in configurator.flat(cfg) if name not in fixed]
    if key not in keys:
        raise UserError(f"{key} is not a key to vary{configurator.hint(key, keys)}")
    span = re.fullmatch(r"(\S+?)\.\.(\S+)(?: (log)| step (\S+))?", values)
    if not span:
        choices = [configurator.convert(cfg, key, value.strip()) for value in values.split("|")]
        return key, lambda trial: trial.suggest_categorical(key, choices)
    low = configurator.convert(cfg, key, span[1])
    high = configurator.convert(cfg, key, span[2])
    log = span[3] is not None
    step = configurator.convert(cfg, key, span[4]) if span[4] else None
    if type(low) not in (int, float) or type(high) not in (int, float):  # a bool is an int to isinstance
        raise UserError(f"{key} is not a number: list choices instead, {key}=a|b|c")
    if low >= high or (step is not None and step <= 0) or (log and low <= 0):
        raise UserError("needs low < high, a step above 0, and with log a low above 0")
    if type(low) is int:
        return key, lambda trial: trial.suggest_int(key, low, high, step=step or 1, log=log)
    return key, lambda trial: trial.suggest_float(key, low, high, step=step, log=log)


# ---- the study
class FileLock:
    """A lock for Optuna's journal that is released as soon as its process ends; Optuna's own stays for 30 seconds.

    Acquiring it also removes an incomplete last line, left by a full disk or a crash: Optuna cannot read past one.
    """

    def __init__(self, path, journal):
        self.path = path
        self.journal = journal
        self.file = None

    def acquire(self):
        file = open(self.path, "w")  # kept in self.file only once it holds the lock
        fcntl.flock(file, fcntl.LOCK_EX)
        self.file = file
        with open(self.journal, "r+b") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(max(0, size - 1))
            if journal.read() not in (b"", b"\n"):
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self):
        self.file.close()


class Study:
    """An Optuna study, its folder, and a lock under which this machine's workers claim trials and write reports.

        WAITING ─claim─▶ RUNNING ─▶ COMPLETE, PRUNED, FAIL with an "error"       the end of it
                                └─▶ FAIL without one: its worker died            its values are queued ─▶ WAITING

    Each worker holds a lock on its own file for as long as it lives. The system releases it however the process ends:
    that is how the others see that a worker is dead.
    """

    def __init__(self, cfg, folder):
        """Open or create the study in `folder`. UserError if the storage fails or holds a study of another config."""
        optuna = optuna_module()
        self.cfg = cfg
        self.folder = folder
        self.State = optuna.trial.TrialState
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        # says which worker owns a trial, and on which machine; not a process number, which may be reused
        self.name = f"{socket.gethostname()}/{uuid.uuid4().hex[:12]}"
        self.held = open(self.worker_file(self.name), "w")
        fcntl.flock(self.held, fcntl.LOCK_EX)
        # Optuna cannot prune by several objectives
        self.prune = cfg.prune and len(cfg.objectives) == 1
        if self.prune:
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        else:
            pruner = optuna.pruners.NopPruner()
        asked = {}  # what all workers of a study must agree on
        for key, value in configurator.flat(cfg).items():
            if key not in MAY_DIFFER_BETWEEN_WORKERS:
                asked[key] = value
        try:
            with self.locked():  # two workers must not create the tables of one database at a time
                self.study = optuna.create_study(
                    storage=self.open_storage(optuna), study_name=folder.name, load_if_exists=True, pruner=pruner,
                    sampler=self.sampler(0), directions=["minimize"] * len(cfg.objectives))
                stored = self.study.user_attrs.get("config")
                if stored is None:
                    self.study.set_user_attr("config", asked)
        except Exception as e:  # each database has its own errors
            self.close()
            raise storage_error(cfg, folder, e) from None
        for key, value in asked.items():
            if stored is not None and value != stored.get(key):
                self.close()
                raise UserError(f"{folder} is a study with {key}={stored.get(key)}, this command has {key}={value}: "
                                "use the same, or name another --out_dir")

    def open_storage(self, optuna):
        if self.cfg.storage:
            # SQLAlchemy would take psycopg2, which psycopg has replaced
            return optuna.storages.RDBStorage(re.sub("^postgresql://", "postgresql+psycopg://", self.cfg.storage))
        from optuna.storages.journal import JournalFileBackend
        journal = self.folder / "journal.log"
        lock = FileLock(self.folder / "workers" / "journal", journal)
        return optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock))

    def sampler(self, number):
        """A sampler for one trial: what it draws depends on the seed, the trial's number and the finished trials."""
        samplers = optuna_module().samplers
        seed = (self.cfg.seed * 1_000_003 + number) % 2**32  # so far apart that two studies share no seed
        if self.cfg.sampler == "random":
            return samplers.RandomSampler(seed)
        return samplers.TPESampler(seed=seed)

    def trial_folder(self, number):
        return self.folder / f"trial_{number:04d}"

    def worker_file(self, name):
        return self.folder / "workers" / name.rpartition("/")[2]

    @contextlib.contextmanager
    def locked(self):
        """Hold the lock that the workers on this machine share."""
        with open(self.folder / "workers" / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def is_dead(self, trial):
        """Whether the worker of a running trial has ended. One on another machine is assumed to be alive."""
        name = trial.user_attrs["worker"]
        host = name.partition("/")[0]
        if name == self.name or host != socket.gethostname():
            return False
        try:
            with open(self.worker_file(name)) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        except FileNotFoundError:  # it closed the study
            return True
        except OSError:  # it holds the lock
            return False

    def give_up(self, trial):
        """Mark a trial as failed whose worker has ended, and queue its values for another trial."""
        # Queued first, so that it is not lost if this worker is killed in between. The next one then marks it.
        trials = self.study.get_trials(deepcopy=False)
        is_queued = any(t.user_attrs.get("again") == trial.number for t in trials)
        if trial.params and not is_queued:
            self.study.enqueue_trial(trial.params, user_attrs={"again": trial.number, "worker": self.name})
        self.study.tell(trial.number, state=self.State.FAIL)

    def claim(self):
        """The next trial to run, or None if the study has all of them."""
        with self.locked():
            for trial in self.study.get_trials(states=[self.State.RUNNING]):
                if self.is_dead(trial):
                    print(f"trial {trial.number}: its worker has ended, so it is run again", flush=True)
                    self.give_up(trial)
            trials = self.study.get_trials(deepcopy=False)
            # a trial that failed by itself counts, one that lost its worker does not
            count = sum(t.state != self.State.FAIL or "error" in t.user_attrs for t in trials)
            if not any(t.state == self.State.WAITING for t in trials):
                if count >= self.cfg.n_trials:
                    return None
                # queued with the worker's name first: Optuna's ask() alone starts a trial without one
                self.study.enqueue_trial({}, user_attrs={"worker": self.name})
            trial = self.study.ask()
            trial.set_user_attr("worker", self.name)  # another worker may have queued it
            self.study.sampler = self.sampler(trial.number)
            return trial

    def close(self):
        self.worker_file(self.name).unlink(missing_ok=True)
        self.held.close()


def redact(text):
    """`text` without the user and the password of a URL in it."""
    text = re.sub(r"//.*@", "//", text)  # up to the last @: a password may hold one, and slashes too
    return re.sub(r"password=[^&]*", "password=...", text)


def storage_error(cfg, folder, error):
    reason = redact(files.short(error.__cause__ or error, 10_000))[:200]  # cut last, or half a password may be left
    return UserError(f"--storage={redact(cfg.storage) or folder}: {reason}")


# ---- one trial
def fit_steps(cfg, dataset, seconds):
    """How many optimizer steps of `cfg` take `seconds` here, from the median of 4 to 20 of them."""
    vocab_size = cfg.model.vocab_size or dataset.vocab_size
    model = import_module(cfg.arch).Model(replace(cfg.model, vocab_size=vocab_size))
    device = machine.pick_device(cfg.device)
    model.to(device).train()
    optimizer = optim.Optimizer(model, cfg.optimizer, cfg.lr, cfg.rest_optimizer, cfg.rest_lr, cfg.weight_decay,
                                cfg.betas, cfg.momentum)
    dtype = getattr(torch, cfg.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size
    times = []
    begun = time.perf_counter()
    # at most 5 % of the trial, but never fewer than 4 steps
    while len(times) < 4 or (len(times) < 20 and time.perf_counter() - begun < seconds / 20):
        start = time.perf_counter()
        x, y = train.next_batch(cfg, dataset, len(times), device)
        train.training_step(model, model, optimizer, x, y, micro_batch_size, autocast, cfg.grad_clip, 1.0)
        times.append(time.perf_counter() - start)
    return max(1, round(seconds / statistics.median(times[1:])))  # the first step also allocates memory


@torch.no_grad()
def ms_per_token(model, n=32):
    """Median milliseconds of decoding a token in float32 on the CPU, one row, the context half full."""
    model.eval()
    half = max(1, model.config.block_size // 2)
    prompt = torch.arange(half)[None] % model.config.vocab_size  # (1, half); which tokens makes no difference
    decoder = Decoder(model, prompt, n)
    decoder()
    times = []
    n_steps = min(n, max(1, model.config.block_size - half))  # it stops before the window would slide
    for _ in range(n_steps):
        start = time.perf_counter()
        decoder(prompt[:, :1])
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def run_trial(study, trial, space, dataset, command):
    """Train a model with the values of one trial, and store its results as attributes of the trial."""
    begun = time.perf_counter()
    folder = study.trial_folder(trial.number)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier study whose journal was deleted
    folder.mkdir()
    params = {key: suggest(trial) for key, suggest in space.items()}
    # What was set, and not all of study.cfg: where the model file is varied, its other defaults are its own.
    settings = {key: value for key, value in command.given.items() if key not in OURS}
    settings |= params
    cfg = configurator.load(train.Config, **settings | {"out_dir": str(folder)})
    n_evaluations = 0
    pruned = False

    def report(record):
        nonlocal n_evaluations, pruned
        n_evaluations += 1
        if record["val_bpb"] is None:
            raise UserError(f"the loss is not finite at step {record['step']}")
        if not study.prune:
            return None
        trial.report(record["val_bpb"], n_evaluations)
        # at its last step a trial is complete, whatever the others have reached
        pruned = trial.should_prune() and record["step"] < cfg.max_steps
        if pruned:
            return "other trials are better at this point (successive halving)"
        return None

    # the terminal shows one line for each trial
    with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
        seconds = study.cfg.seconds
        if seconds:
            steps = fit_steps(cfg, dataset, seconds)
            eval_every = math.ceil(steps / study.cfg.n_evals)
            warmup_steps = min(cfg.warmup_steps, steps // 4)
            cfg = replace(cfg, max_steps=steps, eval_every=eval_every, warmup_steps=warmup_steps)
        train.train(cfg, report, command._replace(given=settings, files=[]))
    results = measure(folder) | {"seconds": time.perf_counter() - begun}
    for key, value in results.items():
        trial.set_user_attr(key, value)
    if pruned:
        study.study.tell(trial, state=study.State.PRUNED)
    else:
        study.study.tell(trial, [results[name] for name in study.cfg.objectives])


def measure(folder):
    """{column: value} of a finished run, by its best checkpoint; steps and train_seconds by its last."""
    best = checkpoint.load_run(folder, which="best")
    latest = checkpoint.load_run(folder)
    model = checkpoint.load_model(best)
    record = best.meta["state"]["record"]
    return {
        "val_bpb": record["val_bpb"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms_per_token": ms_per_token(model),
        "best_step": record["step"],
        "steps": latest.meta["state"]["step"],
        "train_seconds": latest.meta["state"]["seconds"],
        "wiring": getattr(model.config, "wiring", ""),
    }


def attempt(study, trial, space, dataset, command):
    """`run_trial`, and mark a trial that fails by itself as failed. Any other error queues it again and is raised."""
    try:
        run_trial(study, trial, space, dataset, command)
    except BaseException as e:
        # an impossible shape, a loss that is not finite, too little memory; but not a full disk
        if isinstance(e, (ValueError, RuntimeError)) and not isinstance(e.__cause__, OSError):
            trial.set_user_attr("error", files.short(e))
            study.study.tell(trial, state=study.State.FAIL)
        else:  # Ctrl-C, SIGTERM, a full disk, a bug
            with study.locked():
                study.give_up(study.study.get_trials(deepcopy=False)[trial.number])
            raise


# ---- reports
COLUMNS = ("val_bpb", "parameters", "ms_per_token", "best_step", "steps", "train_seconds", "seconds")
LAST_COLUMNS = ("again", "error", "worker", "wiring")


def write_reports(study, space):
    """Write trials.csv, the plots and the link `best` -> the best trial so far, or None."""
    trials = study.study.get_trials(deepcopy=False)
    write_table(study, trials, space)
    done = [t for t in trials if t.state == study.State.COMPLETE]
    if not done:
        return None
    # with several objectives too: bits per byte is what a model is for, the others are what it costs
    best = min(done, key=lambda t: t.user_attrs["val_bpb"])
    run = study.trial_folder(best.number)
    link = study.folder / "best"
    if run.exists():
        temporary = study.folder / f".best-{os.getpid()}"
        files.remove(temporary)
        temporary.symlink_to(run.name)
        os.replace(temporary, link)  # in one go: a reader may open `best` at any moment
    else:  # the run folder is on another machine
        link.unlink(missing_ok=True)
    with contextlib.suppress(ImportError):  # no matplotlib, no plots
        plot_search(study, [t for t in trials if "val_bpb" in t.user_attrs])
        if len(study.cfg.objectives) > 1:
            plot_pareto(study, done)
        module = import_module(best.params.get("arch", study.cfg.arch))
        if hasattr(module.Config, "wiring") and run.exists():
            config = configurator.from_flat(module.Config, checkpoint.load_run(run, "best").meta["model_config"])
            wiring.draw(config, study.folder / "wiring.png")
    return best


def write_table(study, trials, space):
    """trials.csv: a row for each trial, also for those that failed."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["trial", "state", *COLUMNS, *space, *LAST_COLUMNS])
    for t in trials:
        # a failed trial without an error lost its worker
        died = t.state == study.State.FAIL and "error" not in t.user_attrs
        row = [t.number, "DIED" if died else t.state.name]
        row += [t.user_attrs.get(name, "") for name in COLUMNS]
        row += [t.params.get(key, "") for key in space]
        row += [t.user_attrs.get(name, "") for name in LAST_COLUMNS]
        writer.writerow(row)
    files.write_atomic(study.folder / "trials.csv", table.getvalue())


@contextlib.contextmanager
def plot(path, xlabel, ylabel):
    """Axes to draw on, titled with the study's name and saved to `path` afterwards."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a display
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=path.parent.name, xlabel=xlabel, ylabel=ylabel)
    yield axes
    axes.legend()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_search(study, trials):
    """search.png: the bits per byte of every trial, and the best so far."""
    with plot(study.folder / "search.png", "trial", "validation bits per byte") as axes:
        numbers = []
        best = []  # after each of these
        for t in trials:
            bpb = t.user_attrs["val_bpb"]
            if t.state == study.State.PRUNED:
                axes.plot(t.number, bpb, "x", color="gray")
                continue
            axes.plot(t.number, bpb, "o", color="tab:blue")
            numbers.append(t.number)
            best.append(min([bpb, *best[-1:]]))
        if best:
            axes.step(numbers, best, where="post", color="tab:red", label=f"best so far, {best[-1]:.3f}")
        axes.plot([], [], "x", color="gray", label="stopped early")
        axes.xaxis.get_major_locator().set_params(integer=True)


def plot_pareto(study, done):
    """pareto.png: the first two objectives of every trial; red are those that no other beats in all objectives."""
    first, second = study.cfg.objectives[:2]
    front = sorted(study.study.best_trials, key=lambda t: t.values[1])
    style = "o-" if len(study.cfg.objectives) == 2 else "o"  # in three dimensions the set is no line
    with plot(study.folder / "pareto.png", second, first) as axes:
        axes.plot([t.values[1] for t in done], [t.values[0] for t in done], "o", color="lightgray")
        axes.plot([t.values[1] for t in front], [t.values[0] for t in front], style, color="tab:red",
                  label="Pareto set", drawstyle="steps-post")
        for t in front:
            axes.annotate(str(t.number), (t.values[1], t.values[0]), textcoords="offset points", xytext=(4, 4),
                          fontsize=8)


HEADER = f"{'trial':>5}  {'bits/byte':>9}  {'parameters':>12}  {'ms/token':>8}  {'steps':>6}  {'time':>6}"


def table_row(study, trial):
    """The line of a finished trial under HEADER: its numbers, how it ended, its values."""
    t = study.study.get_trials(deepcopy=False)[trial.number]
    values = []
    for key, value in t.params.items():
        values.append(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}")
    params = "  ".join(values)
    a = t.user_attrs
    if "error" in a:
        return f"{t.number:>5}  failed: {a['error']}   {params}"
    ends = {"COMPLETE": "", "PRUNED": "stopped early"}
    end = ends.get(t.state.name, t.state.name.lower())
    return (f"{t.number:>5}  {a['val_bpb']:9.4f}  {a['parameters']:>12,}  {a['ms_per_token']:8.2f}  {a['steps']:>6,}  "
            f"{runlog.clock(a['seconds']):>6}  {end:<13}  {params}")


# ---- the worker
def search(cfg, folder, command):
    """Run trials until the study in `folder` has n_trials -> the best so far, or None. Raises UserError.

    command: the configurator.Command that `cfg` came with.
    """
    # what is wrong with the command is found here, before it uses up trials
    space = parse_space(cfg)
    if cfg.dtype == "auto":  # measured anew in each trial, which might choose differently
        raise UserError("a search needs the same dtype for all trials: use --dtype=bfloat16 or --dtype=float32")
    optuna_module()
    dataset = train.open_dataset(cfg)
    if cfg.init_from:
        load.read(cfg.init_from, "best")
    study = Study(cfg, folder)
    print(f"{folder}: {' '.join(cfg.space)}\n{HEADER}", flush=True)
    try:
        while True:
            with study.locked():
                best = write_reports(study, space)
            trial = study.claim()
            if trial is None:
                return best
            attempt(study, trial, space, dataset, command)
            print(table_row(study, trial), flush=True)
    except Exception as e:
        if type(e).__module__.partition(".")[0] in ("optuna", "sqlalchemy"):  # the database is gone
            raise storage_error(cfg, folder, e) from None
        raise
    finally:
        study.close()


def main(cfg, command):
    recipes = [Path(file).stem for file in command.files]
    name = recipes[-1] if recipes else "search"
    folder = Path(cfg.out_dir or f"runs/{name}")
    line = shlex.join(redact(word) for word in shlex.split(command.line))  # every run writes it down
    best = search(cfg, folder, command._replace(line=line))
    if best is None:
        raise UserError(f"no trial of {folder} has succeeded: see {folder}/trials.csv")
    print(f"best: trial {best.number}, {best.user_attrs['val_bpb']:.4f} bits per byte. All of them: "
          f"{folder}/trials.csv, {folder}/search.png.")
    if (folder / "best").exists():
        print(f"Now try:\npython sample.py --checkpoint={folder}/best")
    else:
        print(f"Its run folder is on {best.user_attrs['worker'].partition('/')[0]}")


if __name__ == "__main__":
    configurator.run(main, Config, with_command=True)
