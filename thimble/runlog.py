"""What a run writes and shows about itself: metrics.jsonl, the live line, loss.png, a tracker; and its number."""
import contextlib
import json
import math
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

from thimble import configurator, files
from thimble.files import UserError

HERE = Path(__file__).resolve().parent.parent


def finite(record):
    """JSON knows no NaN and no infinity: null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def git_commit():
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
        return out.stdout.strip()
    except OSError:
        return ""


def describe(cfg, model, dataset, environment, run_dir):
    parts = {role: sum(p.numel() for p in params) for role, params in model.param_groups().items()}
    n_bytes = dataset.meta["bytes"]["train"]
    print(f"{cfg.dataset}: {len(dataset.train):,} tokens ({n_bytes:,} bytes) to train on, {len(dataset.val):,} to "
          f"validate, vocabulary {dataset.vocab_size:,}")
    print(f"{cfg.arch}.py: {sum(parts.values()):,} parameters ("
          + ", ".join(f"{role} {n:,}" for role, n in parts.items()) + ")")
    tokens = cfg.batch_size * cfg.model.block_size
    print(f"{cfg.max_steps:,} steps of {cfg.batch_size} x {cfg.model.block_size} = {tokens:,} tokens, "
          f"{cfg.max_steps * tokens / len(dataset.train):.1f} times through the text; {environment['device']}, "
          f"{environment['dtype']}, {environment['threads']} threads{', compiled' * environment['compile']}")
    print(f"writing to {run_dir}", flush=True)


class Log:
    """metrics.jsonl, the live line in the terminal, loss.png, and a tracker if asked for."""

    def __init__(self, run_dir, cfg, state):
        self.path, self.max_steps = run_dir / "metrics.jsonl", cfg.max_steps
        if not cfg.resume:
            files.write_atomic(self.path, "")
        self.go_back(state)
        self.live = sys.stdout.isatty()
        self.width = 0                                     # of the live line
        self.said = self.begun = time.perf_counter()
        self.first_step = state["step"]
        self.plotted = -math.inf
        self.track, self.finish = tracker(cfg, run_dir, state["step"])

    def go_back(self, state):
        """Drop the records beyond `state`, which are about to come again; an event has happened and stays."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):          # a last line that was cut off
                record = json.loads(line)
                known = state["record"].get("step", 0) if "val_loss" in record else state["step"]
                if "event" in record or record.get("step", 0) <= known:
                    kept.append(line + "\n")
        files.write_atomic(self.path, "".join(kept))

    def record(self, record):
        with open(self.path, "a") as f:                    # closed, and so flushed, line by line
            f.write(json.dumps(record, allow_nan=False) + "\n")
        if "event" not in record:
            self.track(record)

    def say(self, text):
        print("\r" + " " * self.width + "\r" + text if self.width else text, flush=True)
        self.width = 0

    def progress(self, step, loss, speed, mfu):
        now = time.perf_counter()
        if now - self.said < (0.2 if self.live else 10):
            return
        self.said = now
        left = (now - self.begun) / (step - self.first_step) * (self.max_steps - step) if step > self.first_step else 0
        text = (f"step {step:,}/{self.max_steps:,}  loss {loss:.4f}  {speed:,.0f} tokens/s  MFU {mfu:.0%}  "
                f"{clock(left)} left")
        if self.live:
            print("\r" + text.ljust(self.width), end="", flush=True)
            self.width = len(text)
        else:
            print(text, flush=True)

    def evaluated(self, record, dataset, better):
        base = dataset.meta["baselines"]
        self.say(f"step {record['step']:,}: val loss {record['val_loss'] or math.nan:.4f} "
                 f"(+- {record['val_error'] or math.nan:.4f}), "
                 f"{record['val_bpb'] or math.nan:.3f} bits per byte, perplexity {record['val_ppl'] or math.nan:.2f}"
                 f"{' - best so far' if better else ''}   "
                 f"[trigrams {base['trigram']:.3f}, bigrams {base['bigram']:.3f}, {clock(record['seconds'])}]")
        now = time.perf_counter()
        if now - self.plotted > 60 and record["step"] < self.max_steps:
            self.plotted = now
            plot(self.path.parent, dataset)

    def close(self, dataset):
        self.say("") if self.width else None
        self.finish()
        plot(self.path.parent, dataset)


def tracker(cfg, run_dir, step):
    """Two functions for the tracker that the user named: one takes a record beyond `step`, one ends it all."""
    if cfg.tracker == "none":
        return lambda record: None, lambda: None
    try:
        if cfg.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(run_dir, purge_step=step + 1)  # hides what came from there on

            def track(record):
                for key, value in record.items():
                    if key != "step" and value is not None:
                        writer.add_scalar(key, value, record["step"])
                writer.flush()
            return track, writer.close
        module = import_module(cfg.tracker)                # trackio has the interface of wandb
    except ImportError:
        raise UserError(f"--tracker={cfg.tracker} needs a package: pip install {cfg.tracker}") from None
    name = {"name": run_dir.name} | ({"id": run_dir.name} if cfg.tracker == "wandb" else {})  # trackio goes by name
    run = module.init(project="thimble", **name, resume="allow", config=configurator.flat(cfg))
    return lambda record: run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"]), run.finish


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def plot(run_dir, dataset):
    """loss.png from metrics.jsonl: train, validation and the n-gram baselines, all in bits per byte."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss.png: pip install matplotlib", flush=True)
        return
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    per_nat = 1 / dataset.bytes_per_token("train") / math.log(2)  # bits per byte of one nat per token
    train = [(r["step"], r["loss"] * per_nat) for r in records if "event" not in r and r.get("loss") is not None]
    val = [(r["step"], r["val_bpb"]) for r in records if r.get("val_bpb") is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.5, linewidth=1, label="train")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="tab:red", markersize=4, label="validation")
        axes.annotate(f"{val[-1][1]:.3f}", val[-1], textcoords="offset points", xytext=(0, 6), ha="right")
    top = 1.1 * max([dataset.meta["baselines"]["bigram"], *(y for _, y in train + val)])
    axes.set_ylim(0, top)
    for name, value in dataset.meta["baselines"].items():
        if value >= top:
            continue
        axes.axhline(value, color="gray", linestyle="--", linewidth=0.8)
        axes.text(1, value, f"{name} {value:.2f}", transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                  fontsize=8, color="gray")
    axes.set(xlabel="step", ylabel="bits per byte", title=run_dir.name)
    if train or val:
        axes.legend(loc="lower left")
    with files.replacing(run_dir / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)


def newest(out_dir):
    """runs/NAME, runs/NAME-2, runs/NAME-3, ...: the newest of them that holds a run, or None."""
    found = [p for p in Path(out_dir).parent.glob(Path(out_dir).name + "*")
             if (p / "latest").exists() and re.fullmatch(r"(-\d+)?", p.name[len(Path(out_dir).name):])]
    return max(found, key=lambda p: int("0" + p.name[len(Path(out_dir).name):].lstrip("-")), default=None)
