"""What a run writes and shows about itself (metrics.jsonl, loss.png, the live line, a tracker), and its number."""
import json
import math
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from thimble import checkpoint, configurator, files
from thimble.files import UserError
from thimble.generate import generate

HERE = Path(__file__).resolve().parent.parent  # the root of the checkout


# ---- the number of a run
def numbered(out_dir):
    """[(number, folder)] of the runs NAME (number 1), NAME-2, NAME-3, ... that exist, in order. out_dir: runs/NAME."""
    out_dir = Path(out_dir)
    runs = []
    for folder in out_dir.parent.glob("*"):
        match = re.fullmatch(re.escape(out_dir.name) + r"(?:-(\d+))?", folder.name)
        if match and checkpoint.holds_run(folder):
            runs.append((int(match[1] or 1), folder))
    return sorted(runs)


def newest(out_dir):
    """The run with the highest number of that name, or None."""
    runs = numbered(out_dir)
    return runs[-1][1] if runs else None


def unused(out_dir):
    """out_dir itself if there is no run of that name yet, else with the next number behind it."""
    runs = numbered(out_dir)
    return Path(f"{out_dir}-{runs[-1][0] + 1}") if runs else Path(out_dir)


# ---- the beginning of a run
def git_commit():
    """The commit of this checkout, with -dirty if files differ from it; empty without git."""
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
        return out.stdout.strip()
    except OSError:
        return ""


def describe(cfg, model, lora, dataset, environment, run_dir):
    """Print what is about to be trained, on what, and for how long."""
    n_bytes = dataset.meta["bytes"]["train"]
    print(f"{cfg.dataset}: {len(dataset.train):,} tokens ({n_bytes:,} bytes) to train on, {len(dataset.val):,} to "
          f"validate, vocabulary {dataset.vocab_size:,}")

    sizes = {role: sum(p.numel() for p in params) for role, params in model.param_groups().items()}
    total = sum(sizes.values())
    roles = ", ".join(f"{role} {n:,}" for role, n in sizes.items())
    print(f"{cfg.arch}.py: {total:,} parameters ({roles})")
    if lora:
        n = sum(p.numel() for p in lora.parameters())
        rule, key, lr = lora_rate(cfg)
        print(f"LoRA of rank {cfg.lora_rank}: trains {n:,} parameters, {n / total:.1%} of the model's, by {rule} at "
              f"{key}={lr}")

    tokens = cfg.batch_size * cfg.model.block_size  # a step
    epochs = cfg.max_steps * tokens / len(dataset.train)
    compiled = ", compiled" if environment["compile"] else ""
    print(f"{cfg.max_steps:,} steps of {cfg.batch_size} x {cfg.model.block_size} = {tokens:,} tokens, {epochs:.1f} "
          f"epochs; {environment['device']}, {environment['dtype']}, {environment['threads']} threads{compiled}")
    print(f"writing to {run_dir}", flush=True)


def lora_rate(cfg):
    """(update rule, key of its peak rate, that rate) of LoRA's pairs, which Muon does not update (optim.ROLES)."""
    if cfg.optimizer == "muon":
        return cfg.rest_optimizer, "rest_lr", cfg.rest_lr
    return cfg.optimizer, "lr", cfg.lr


# ---- while it trains
def finite(record):
    """The record with None for NaN and infinity, which JSON does not have."""
    values = {}
    for key, value in record.items():
        lost = isinstance(value, float) and not math.isfinite(value)
        values[key] = None if lost else value
    return values


def clock(seconds):
    """1:05 or 2:01:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


class Log:
    """metrics.jsonl, the live line in the terminal, loss.png, and a tracker if one is asked for.

    A record is a dict with the key "step". One with the key "event" tells what happened, once; the others hold what
    can be drawn, and come again if the run goes back to an earlier step.
    """

    def __init__(self, run_dir, cfg, state, run_id=""):
        self.path = run_dir / "metrics.jsonl"
        self.max_steps = cfg.max_steps
        self.first_step = state["step"]
        self.started = time.perf_counter()
        self.shown = self.started  # time of the last progress line
        self.plotted = -math.inf  # time of the last loss.png
        self.live = sys.stdout.isatty()
        self.width = 0  # of the live line now on the screen; 0: there is none
        if not cfg.resume:
            files.write_atomic(self.path, "")
        self.go_back(state)
        self.track = lambda record: None
        self.finish = lambda: None
        try:
            self.track, self.finish = tracker(cfg, run_dir, state["step"], run_id)
        except UserError:
            raise
        except Exception as e:  # each tracker has its own, for a network that is gone
            self.end_tracking(e)

    def go_back(self, state):
        """Drop the records beyond `state`, which are about to come again; an event has happened, and stays."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the last line, where the process was killed
                continue
            known = state["step"]
            if "val_loss" in record:
                # the evaluation at this very step is not in the state if the kill came between it and the save
                known = state["record"].get("step", 0)
            if "event" in record or record.get("step", 0) <= known:
                kept.append(line + "\n")
        files.write_atomic(self.path, "".join(kept))

    def record(self, record):
        """Append a record to metrics.jsonl, and send it to the tracker."""
        with open(self.path, "a") as f:  # opened and closed for each line, and so flushed
            f.write(json.dumps(record, allow_nan=False) + "\n")
        if "event" in record:
            return
        try:
            self.track(record)
        except Exception as e:
            self.end_tracking(e)

    def end_tracking(self, error):
        """Say why and track no further: a tracker must not end a training."""
        self.say(f"the tracker failed ({files.short(error, 200)}): continuing without it; metrics.jsonl has everything")
        self.track = lambda record: None
        self.finish = lambda: None

    def say(self, text):
        """Print a line of its own, in place of the live one."""
        self.clear()
        print(text, flush=True)

    def clear(self):
        if self.width:
            print("\r" + " " * self.width + "\r", end="", flush=True)
        self.width = 0

    def progress(self, step, loss, speed, mfu):
        """The live line, or a line now and then if the output is no terminal. speed: tokens per second."""
        now = time.perf_counter()
        if now - self.shown < (0.2 if self.live else 10):
            return
        self.shown = now
        done = max(1, step - self.first_step)
        left = (now - self.started) / done * (self.max_steps - step)  # seconds, evaluations included
        text = (f"step {step:,}/{self.max_steps:,}  loss {loss:.4f}  {speed:,.0f} tokens/s  MFU {mfu:.0%}  "
                f"{clock(left)} left")
        if not self.live:
            print(text, flush=True)
            return
        print("\r" + text.ljust(self.width), end="", flush=True)
        self.width = len(text)

    def evaluated(self, record, dataset, better):
        """Print an evaluation beside the losses of n-gram models, and draw loss.png at most once a minute."""
        value = {key: math.nan if value is None else value for key, value in record.items()}
        base = dataset.meta["baselines"]  # bits per byte
        best = " - best so far" if better else ""
        self.say(f"step {record['step']:,}: val loss {value['val_loss']:.4f} (+- {value['val_error']:.4f}), "
                 f"{value['val_bpb']:.3f} bits per byte, perplexity {value['val_ppl']:.2f}{best}   "
                 f"[trigrams {base['trigram']:.3f}, bigrams {base['bigram']:.3f}, {clock(record['seconds'])}]")
        now = time.perf_counter()
        if now - self.plotted > 60 and record["step"] < self.max_steps:  # close() draws the last one
            self.plotted = now
            plot(self.path.parent, dataset)

    def close(self, dataset):
        self.clear()
        try:
            self.finish()
        except Exception as e:
            self.end_tracking(e)
        plot(self.path.parent, dataset)


def show_samples(model, prompts, tokenizer, cfg):
    """Print a continuation of each of the prompts {text: ids}."""
    model.eval()
    for prompt, ids in prompts.items():
        generator = torch.Generator().manual_seed(cfg.seed)  # its own: sampling must not change training
        new = list(generate(model, ids, cfg.prompt_tokens, generator, tokenizer.record.ends, tokenizer.vocab_size,
                            temperature=0.8, top_k=50))
        text = prompt + tokenizer.decode(new)
        print("    " + text.replace("\n", "\n    "), flush=True)
    model.train()


# ---- trackers
def tracker(cfg, run_dir, step, run_id):
    """(a function that takes a record, a function that ends it all) for the tracker of `cfg`, from `step` on.

    run_id: the same for a run and its resumptions, and different for any other run.
    """
    if cfg.tracker == "none":
        return lambda record: None, lambda: None
    try:
        if cfg.tracker == "tensorboard":
            return tensorboard(run_dir, step)
        module = import_module(cfg.tracker)
    except ImportError:
        raise UserError(f"--tracker={cfg.tracker} needs a package: pip install {cfg.tracker}") from None
    # a resumed run continues its curves: wandb finds the run by its id; trackio, otherwise alike, by its name
    names = {"name": run_dir.name}
    if cfg.tracker == "wandb":
        names["id"] = run_id
    run = module.init(project="thimble", **names, resume="allow", config=configurator.flat(cfg))

    def track(record):
        values = {key: value for key, value in record.items() if key != "step"}
        run.log(values, step=record["step"])
    return track, run.finish


def tensorboard(run_dir, step):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(run_dir, purge_step=step + 1)  # hides what an earlier process wrote beyond `step`

    def track(record):
        for key, value in record.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, record["step"])
        writer.flush()
    return track, writer.close


# ---- the curve
def plot(run_dir, dataset):
    """loss.png from metrics.jsonl: train, validation and the n-gram baselines, all in bits per byte."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss.png: pip install matplotlib", flush=True)
        return
    train, val = curves(run_dir, dataset)
    baselines = dataset.meta["baselines"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.5, linewidth=1, label="train")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="tab:red", markersize=4, label="validation")
        axes.annotate(f"{val[-1][1]:.3f}", val[-1], textcoords="offset points", xytext=(0, 6), ha="right")
    # from zero, so that a small gain looks small; weaker baselines than bigrams may be cut off
    top = 1.1 * max([baselines["bigram"], *(y for _, y in train + val)])
    axes.set_ylim(0, top)
    for name, value in baselines.items():
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


def curves(run_dir, dataset):
    """[(step, bits per byte)] of the training losses and of the evaluations in metrics.jsonl."""
    nats_to_bpb = 1 / math.log(2) / dataset.bytes_per_token("train")
    train = []
    val = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "event" in record:
            continue
        if record.get("loss") is not None:
            train.append((record["step"], record["loss"] * nats_to_bpb))
        if record.get("val_bpb") is not None:
            val.append((record["step"], record["val_bpb"]))
    return train, val
