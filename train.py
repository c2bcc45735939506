"""Train a language model: one loop for every model file.

    python train.py config/tiny_cpu.py --device=cpu             # the first run: a few minutes on a laptop
    python train.py config/shakespeare_char.py --max_steps=500  # flags go on top of files
    python train.py config/shakespeare_char.py --arch=mine      # your own copy of model.py
    python train.py --resume                                    # go on with the newest run, bit for bit
"""
import contextlib
import ctypes
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import configurator
import data
import optim
from configurator import UserError
from lora import Lora
from sample import generate

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    # run
    out_dir: str = ""               # run folder; empty: runs/ and the recipe's name, with -2, -3, ... if that is taken
    resume: bool = False            # go on with the newest run of this recipe, or with --out_dir
    init_from: str = ""             # run, checkpoint or Hugging Face folder, or GGUF file, whose weights to start from
    lora_rank: int = 0              # with init_from: train so many ranks beside each matrix and nothing else; 0: all
    seed: int = 1337                # of weights, dropout and the order of the data
    # data
    dataset: str = "shakespeare_char"  # a folder, or its name in data/
    prepare: str = ""               # script and flags that make the dataset where it is missing
    batch_size: int = 32            # sequences per optimizer step
    micro_batch_size: int = 0       # sequences at a time, which saves memory; 0: all of them
    # model
    arch: str = "model"             # model file, without .py
    model: object = configurator.sub("arch")
    # optimizer
    optimizer: Literal["muon", "adamw", "lion"] = "muon"  # muon takes matrices only
    lr: float = 0.02                # peak rate; with muon that of the matrices inside the layers
    rest_optimizer: Literal["adamw", "lion"] = "adamw"  # with muon: for everything else
    rest_lr: float = 0.01           # with muon: peak rate of everything else
    weight_decay: float = 0.0       # on matrices; never on embeddings, gains and biases
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    momentum: float = 0.95          # of Muon
    grad_clip: float = 1.0          # largest global gradient norm; 0: no clipping
    # schedule
    schedule: Literal[optim.SCHEDULES] = "cosine"  # shape of the rate after the warm-up
    max_steps: int = 1000           # optimizer steps; training stops exactly there
    warmup_steps: int = 0           # steps of linear warm-up
    min_lr: float = 0.1             # final rate, as a fraction of the peak
    decay_frac: float = 0.2         # wsd: the last part of all steps, in which the rate falls
    restart_steps: int = 1000       # restarts: length of the first cycle
    restart_mul: float = 1.0        # restarts: each cycle is so many times as long as the one before
    restart_decay: float = 1.0      # restarts: and starts so many times as high
    # evaluation
    eval_every: int = 250           # steps between evaluations over the whole validation split, each with a checkpoint
    patience: int = 0               # stop after so many evaluations without a better one; 0: never
    prompts: tuple[str, ...] = ()   # continued and shown at each evaluation
    prompt_tokens: int = 100        # length of each of these samples
    log_every: int = 10             # steps between lines of metrics.jsonl
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # where else to send the metrics
    # checkpoints
    save_every: int = 0             # steps between further checkpoints; 0: only those of the evaluations
    keep_last: int = 3              # how many to keep beside the best; 0: all
    # machine
    device: str = "auto"            # cpu, cuda, mps, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto measures. Weights stay float32
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on a GPU only, a CPU run seldom earns the wait back

    def __post_init__(self):
        configurator.resolve(self)
        for name in ("batch_size", "max_steps", "eval_every", "log_every", "restart_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("micro_batch_size", "warmup_steps", "patience", "save_every", "keep_last", "grad_clip",
                     "weight_decay", "prompt_tokens", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.lora_rank < 0 or self.lora_rank and not self.init_from:
            raise ValueError(f"lora_rank={self.lora_rank} must be 0, or above it beside init_from=RUN")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} must be below 2**63")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of "
                             f"micro_batch_size={self.micro_batch_size}")
        if not (self.lr > 0 and self.rest_lr > 0):
            raise ValueError(f"lr={self.lr} and rest_lr={self.rest_lr} must be above 0")
        if not (0 <= self.min_lr <= 1 and 0 <= self.decay_frac <= 1 and 0 <= self.restart_decay <= 1):
            raise ValueError(f"min_lr={self.min_lr}, decay_frac={self.decay_frac} and "
                             f"restart_decay={self.restart_decay} are fractions: they must be in [0, 1]")
        if self.restart_mul < 1:
            raise ValueError(f"restart_mul={self.restart_mul} must be at least 1")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in (*self.betas, self.momentum)):
            raise ValueError(f"betas={self.betas} must be two numbers and, like momentum={self.momentum}, in [0, 1)")
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not exceed max_steps={self.max_steps}")


# Keys that may change between a run and its resumption without changing a single bit of what is computed.
# (Device, dtype and compile are compared by what they came to, not by how they were asked for.)
FREE = {"out_dir", "resume", "init_from", "prepare", "eval_every", "patience", "prompts", "prompt_tokens", "log_every",
        "tracker", "save_every", "keep_last", "device", "dtype", "compile"}


def open_dataset(cfg):
    path = Path(cfg.dataset) if Path(cfg.dataset).is_dir() else HERE / "data" / cfg.dataset
    if not path.exists() and cfg.prepare:
        print(f"no dataset {cfg.dataset} yet: python {cfg.prepare}", flush=True)
        script, *flags = shlex.split(cfg.prepare)
        if subprocess.run([sys.executable, HERE / script, *flags]).returncode:
            raise UserError(f"could not prepare the dataset {cfg.dataset}: see above, or run python {cfg.prepare}")
    return data.load(path)


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device={name} does not work here: {str(e).splitlines()[0]}; try --device=cpu") from None
    return torch.device(name)


def keep_freed_memory():
    """Tell glibc's malloc to keep what is freed for the next step.

    It returns large blocks to the system, which has to zero every page of them again: a quarter of a training step
    with a vocabulary of 4096 (docs/log.md). Elsewhere than with glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                     # M_MMAP_MAX: no blocks of their own for large arrays
        mallopt(-1, -1)                                    # M_TRIM_THRESHOLD: never shrink the heap


def matmul_rate(device, dtype):
    """FLOP/s of a large square matmul, the best of three: what this machine can do, and the 100 % of our MFU."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                               # .item() waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


@torch.no_grad()
def evaluate(model, dataset, device, autocast):
    """The whole validation split, each token once -> loss in nats per token, its standard error, bits per byte, ..."""
    block_size, nats, counts = model.config.block_size, [], []
    batch_size = max(1, min(8192, 2**24 // dataset.vocab_size) // block_size)  # keeps the logits below 64 MB
    model.eval()
    for x, y in data.eval_windows(dataset.val, block_size, batch_size, dataset.val_mask):
        x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        with autocast:
            logits, _ = model(x)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
        nats.append(losses.view_as(y).double().sum(1))     # (B,), one sum a window
        counts.append((y >= 0).sum(1))
    model.train()
    nats, counts = torch.cat(nats), torch.cat(counts)
    n, loss = int(counts.sum()), float(nats.sum() / counts.sum())
    error = float((nats - loss * counts).square().sum().sqrt()) / n  # windows vary independently, tokens do not
    return {"val_loss": loss, "val_error": error, "val_bpb": loss / math.log(2) / dataset.bytes_per_token("val"),
            "val_ppl": math.exp(min(loss, 700)), "val_tokens": n}


def starting_weights(cfg, dataset):
    """The model of --init_from: its architecture and weights, once its tokenizer proves to be the dataset's.

    Of the model's keys, those that no weight depends on may be set anew.
    """
    start = checkpoint.load(cfg.init_from, which="best")
    if start.meta.get("arch") != cfg.arch:
        raise UserError(f"--init_from={cfg.init_from} was trained with --arch={start.meta.get('arch')}, this run has "
                        f"--arch={cfg.arch}: use the same")
    theirs = start.path / "tokenizer.json" if start.path.is_dir() else start.path
    if dataset.tokenizer().to_json() != data.load_tokenizer(theirs).to_json():
        raise UserError(f"--init_from={cfg.init_from} was trained with another tokenizer than {dataset.path}: "
                        f"prepare the text with --tokenizer={theirs}")
    model = checkpoint.load_model(start)
    was = configurator.flat(model.config)
    new = {k: v for k, v in configurator.given(cfg.model).items() if v != was[k]}
    if other := [f"{k}={v} (it has {was[k]})" for k, v in new.items() if k not in ("dropout", "block_size")]:
        raise UserError(f"--init_from={cfg.init_from} cannot change to {', '.join(other)}: leave that out")
    if new:
        try:
            start.meta["model_config"] = was | new
            model = checkpoint.load_model(start)
        except UserError as e:                             # a model file may have weights for each position
            raise UserError(f"--init_from={cfg.init_from} cannot change to "
                            f"{', '.join(f'{k}={v} (it has {was[k]})' for k, v in new.items())}: {e}") from None
    return model


def check_resume(cfg, resumed, dataset, environment):
    """environment, with what the run had decided (dtype, compile); refuses or warns where it were not the same run."""
    was, now = resumed.meta["config"], configurator.flat(cfg)
    if resumed.meta["dataset"]["files"] != dataset.meta["files"]:
        raise UserError(f"{dataset.path} is not the dataset that {resumed.path} was trained on: prepare it as before, "
                        f"or start a new run with --init_from={resumed.path}")
    if resumed.meta["arch"] != cfg.arch or resumed.meta["model_config"] != json.loads(json.dumps(asdict(cfg.model))):
        raise UserError(f"{resumed.path} is another model than this command asks for: resume without model flags, "
                        f"or start a new run with another --out_dir")
    changed = [f"{k}={now[k]} (was {was.get(k)})" for k in now if k not in FREE and now[k] != was.get(k)]
    old = resumed.meta["environment"]
    environment = {**environment, "dtype": old["dtype"] if cfg.dtype == "auto" else cfg.dtype,
                   "compile": old["compile"] if cfg.compile in ("auto", was["compile"]) else cfg.compile}
    changed += [f"{k} {environment[k]} (was {old[k]})" for k in environment if environment[k] != old[k]]
    if changed:
        checkpoint.warn(f"resuming with {', '.join(changed)}: not bit for bit what an unbroken run would give")
    return environment


def restore(model, lora, optimizer, state, saved):
    """Put weights, optimizer, random states and counters back to what the checkpoint holds."""
    try:
        model.load_state_dict(saved.model)
        if lora:
            lora.load_state_dict({k[5:]: t for k, t in saved.optimizer.items() if k.startswith("lora.")})
        optimizer.load_state_dict({k: t for k, t in saved.optimizer.items() if not k.startswith(("random.", "lora."))})
    except (ValueError, RuntimeError) as e:
        raise UserError(f"{saved.path} does not fit this model and optimizer: {e}") from None
    checkpoint.set_random_state(saved.optimizer)
    state.clear()
    state.update(saved.meta["state"])


def roll_back(run_dir, model, lora, optimizer, state):
    """The last good state with half the learning rate; after three times a clear stop."""
    lr_factor, rollbacks, step = state["lr_factor"] / 2, state["rollbacks"] + 1, state["step"]
    if rollbacks > 3:
        raise UserError(f"loss or gradient not finite at step {step}, also at an eighth of the learning rate: "
                        "try a lower --lr and --rest_lr, or --dtype=float32")
    restore(model, lora, optimizer, state, checkpoint.load_run(run_dir, optimizer=True))
    state |= {"lr_factor": lr_factor, "rollbacks": rollbacks, "bad_steps": 0}


def compiled(model, dataset, cfg, device, autocast):
    """torch.compile, tried out on one batch; where it fails, one line and the plain model."""
    print("compiling the model", flush=True)
    random_state = checkpoint.random_state()
    try:
        fast = torch.compile(model)
        micro = cfg.micro_batch_size or cfg.batch_size
        x, y = data.batch(dataset.train, 0, micro, cfg.model.block_size, cfg.seed)
        with autocast:
            loss = fast(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))[1]
        loss.backward()
    except Exception as e:                                 # whatever the compiler trips over, training must go on
        print(f"torch.compile does not work here ({str(e).strip().splitlines()[0]}): going on without", flush=True)
        fast = model
    for p in model.parameters():
        p.grad = None
    checkpoint.set_random_state(random_state)
    return fast


@contextlib.contextmanager
def catch_signals():
    """A list that gets the number of a SIGINT or SIGTERM, so that the step and any save in progress end first."""
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(number, _):
        caught.append(number)
        os.write(2, b"\nstopping after this step: saving, please wait\n")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def write_atomic(path, text):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


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


def show_samples(model, prompts, tokenizer, cfg):
    model.eval()
    for prompt, ids in prompts.items():
        generator = torch.Generator().manual_seed(cfg.seed)  # its own: training must not feel that we looked
        new = list(generate(model, ids, cfg.prompt_tokens, generator, {tokenizer.eot}, tokenizer.vocab_size,
                            temperature=0.8, top_k=50))
        print(f"    {prompt}{tokenizer.decode(new)}".replace("\n", "\n    "), flush=True)
    model.train()


class Log:
    """metrics.jsonl, the live line in the terminal, loss.png, and a tracker if asked for."""

    def __init__(self, run_dir, cfg, state):
        self.path, self.max_steps = run_dir / "metrics.jsonl", cfg.max_steps
        if not cfg.resume:
            write_atomic(self.path, "")
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
        write_atomic(self.path, "".join(kept))

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
    temporary = run_dir / ".loss.tmp.png"
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, run_dir / "loss.png")


def train(cfg, report=None):
    """Train as `cfg` says -> the record of the last evaluation (step, val_loss, val_bpb, best_loss, ...).

    report gets the record of every evaluation; what it returns, if anything, is the reason to stop there.
    """
    run_dir = Path(cfg.out_dir or f"runs/{cfg.arch}")
    dataset = open_dataset(cfg)
    device = pick_device(cfg.device)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = dataset.tokenizer() if cfg.prompts else None
    prompts = {prompt: tokenizer.encode(prompt) or [tokenizer.eot] for prompt in cfg.prompts}
    resumed = checkpoint.load_run(run_dir, optimizer=True) if cfg.resume else None
    if not cfg.resume and (run_dir / "latest").exists():
        raise UserError(f"{run_dir} already holds a run: go on with --resume, or name another --out_dir")

    # model
    vocab_size = cfg.model.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise UserError(f"vocab_size={vocab_size} is less than the {dataset.vocab_size} of {dataset.path}")
    random.seed(cfg.seed)                                  # nothing here draws from it, or from numpy's: forks may
    np.random.seed(cfg.seed % 2**32)
    torch.manual_seed(cfg.seed)
    try:
        fresh = resumed or not cfg.init_from
        model = (import_module(cfg.arch).Model(replace(cfg.model, vocab_size=vocab_size)) if fresh
                 else starting_weights(cfg, dataset))
        model.to(device).train()
        lora = Lora(model, cfg.lora_rank) if cfg.lora_rank else None
        learner = lora or model                            # whose parameters learn
        optimizer = optim.Optimizer(learner, cfg.optimizer, cfg.lr, cfg.rest_optimizer, cfg.rest_lr, cfg.weight_decay,
                                    cfg.betas, cfg.momentum)
    except ValueError as e:                                # model files and optim.py import nothing of ours
        raise UserError(e) from None
    cfg = replace(cfg, model=model.config)

    # state: all that a checkpoint must hold beside tensors
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "best_loss": None, "best_step": 0, "waited": 0, "lr_factor": 1.0,
             "bad_steps": 0, "rollbacks": 0, "record": {}}
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device)}
    if resumed:
        environment = check_resume(cfg, resumed, dataset, environment)
        restore(model, lora, optimizer, state, resumed)
        if state["step"] > cfg.max_steps:
            raise UserError(f"{run_dir} is at step {state['step']}, past max_steps={cfg.max_steps}: give a larger one")
    else:
        if cfg.dtype == "auto":
            rates = {t: matmul_rate(device, getattr(torch, t)) for t in ("float32", "bfloat16")}
            dtype = max(rates, key=rates.get)
        environment["dtype"] = dtype if cfg.dtype == "auto" else cfg.dtype
        environment["compile"] = device.type == "cuda" if cfg.compile == "auto" else cfg.compile
    dtype = getattr(torch, environment["dtype"])
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    peak_flops = matmul_rate(device, dtype)

    data.batch_indices(len(dataset.train), 0, 1, cfg.model.block_size, cfg.seed)  # too short a text: before a folder is
    forward = compiled(model, dataset, cfg, device, autocast) if environment["compile"] else model
    for p in learner.parameters():                         # LoRA has them from the trial of the compiler
        p.grad = None
    environment["compile"] = forward is not model          # what came of it, not what was asked for
    meta = {"arch": cfg.arch, "model_config": asdict(cfg.model), "config": configurator.flat(cfg),
            "environment": environment, "dataset": {"path": str(dataset.path), "files": dataset.meta["files"]}}
    if "template" in dataset.meta:                         # a model that was taught to answer
        meta["template"] = dataset.meta["template"]
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "config.json", json.dumps(configurator.flat(cfg), indent=1) + "\n")
    log = Log(run_dir, cfg, state)
    log.record({"event": "resume" if resumed else "start", "step": state["step"], "command": shlex.join(sys.argv),
                "commit": git_commit(), **environment})
    describe(cfg, model, dataset, environment, run_dir)
    if lora:
        n, total = (sum(p.numel() for p in part.parameters()) for part in (lora, model))
        print(f"LoRA of rank {cfg.lora_rank}: {n:,} parameters are trained, {n / total:.1%} of the model's", flush=True)

    def save(best=False):
        tensors = optimizer.state_dict() | checkpoint.random_state()
        if lora:
            tensors |= {f"lora.{k}": t for k, t in lora.state_dict().items()}
        checkpoint.save(run_dir, state["step"], model.state_dict(), tensors, meta | {"state": state},
                        dataset.path / "tokenizer.json", cfg.keep_last, best)

    # loop
    tokens_per_step = cfg.batch_size * cfg.model.block_size
    micro = cfg.micro_batch_size or cfg.batch_size
    saved_at, since, since_step = state["step"] if resumed else -1, time.perf_counter(), state["step"]
    train_mask = dataset.train_mask
    with catch_signals() as caught:
        while True:
            step = state["step"]
            last = step == cfg.max_steps or caught
            due = step > 0 and (step % cfg.eval_every == 0 or step == cfg.max_steps)

            # 1. evaluate, and save what was evaluated
            if due and step != state["record"].get("step"):
                state["seconds"] += time.perf_counter() - since
                result = evaluate(model, dataset, device, autocast)
                healthy = math.isfinite(result["val_loss"]) and not state["bad_steps"]  # else nothing to go back to
                better = healthy and (state["best_loss"] is None or result["val_loss"] < state["best_loss"])
                if better:
                    state |= {"best_loss": result["val_loss"], "best_step": step, "waited": 0}
                else:
                    state["waited"] += 1
                state["record"] = {"step": step, **finite(result), "best_loss": state["best_loss"],
                                   "best_step": state["best_step"], "tokens": state["tokens"],
                                   "seconds": state["seconds"]}
                log.record(state["record"])                # before the save: a resume drops it or finds it
                if healthy:
                    save(better)
                    saved_at = step
                log.evaluated(state["record"], dataset, better)
                show_samples(model, prompts, tokenizer, cfg)
                since, since_step = time.perf_counter(), step
                if cfg.patience and state["waited"] >= cfg.patience:
                    log.say(f"stopped: no better validation loss in {cfg.patience} evaluations")
                    last = True
                if report and (reason := report(state["record"])):
                    log.say(f"stopped: {reason}")
                    last = True
            elif ((last or step == 0 or cfg.save_every and step % cfg.save_every == 0) and step != saved_at
                  and not state["bad_steps"]):
                state["seconds"] += time.perf_counter() - since
                since, since_step = time.perf_counter(), step
                save()
                saved_at = step
            if last:
                break

            # 2. one optimizer step
            scale = state["lr_factor"] * optim.lr_scale(step + 1, cfg.schedule, cfg.max_steps, cfg.warmup_steps,
                                                        cfg.min_lr, cfg.decay_frac, cfg.restart_steps,
                                                        cfg.restart_mul, cfg.restart_decay)
            x, y = data.batch(dataset.train, step, cfg.batch_size, cfg.model.block_size, cfg.seed, train_mask,
                              dataset.row_length)
            x, y = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)        # (batch_size, block_size)
            loss, n_targets = 0.0, (y >= 0).sum()
            if not n_targets:                              # every token is masked: nothing to learn here
                state["step"] += 1
                continue
            for part, targets in zip(x.split(micro), y.split(micro), strict=True):
                share = (targets >= 0).sum() / n_targets   # masked micro-batches differ in size
                if not share:
                    continue
                with autocast:
                    part_loss = forward(part, targets)[1] * share
                part_loss.backward()
                loss += part_loss.detach()
            if idle := [name for name, p in learner.named_parameters() if p.grad is None]:
                raise UserError(f"{cfg.arch}.py: no gradient reaches {', '.join(idle[:3])}: use it or remove it")
            norm = torch.nn.utils.get_total_norm([p.grad for p in learner.parameters()])
            loss, grad_norm = loss.item(), norm.item()
            state |= {"step": step + 1, "tokens": state["tokens"] + tokens_per_step}
            if math.isfinite(loss) and math.isfinite(grad_norm):
                if cfg.grad_clip:
                    torch.nn.utils.clip_grads_with_norm_(learner.parameters(), cfg.grad_clip, norm)
                optimizer.step(scale)
                if lora:
                    lora.merge()
                state["bad_steps"] = 0
            else:                                          # never let it reach the weights
                state["bad_steps"] += 1
                log.record({"step": step + 1, "event": "skipped", "loss": str(loss), "grad_norm": str(grad_norm)})
                log.say(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: step skipped")
                if state["bad_steps"] == 3:
                    roll_back(run_dir, model, lora, optimizer, state)
                    log.go_back(state)
                    log.say(f"three in a row: back to step {state['step']} with half the rate")
                    log.record({"step": state["step"], "event": "rolled back", "lr_factor": state["lr_factor"]})
                    since, since_step = time.perf_counter(), state["step"]
            for p in learner.parameters():
                p.grad = None

            # 3. say how it goes
            if state["step"] > since_step:
                now = time.perf_counter()
                speed = (state["step"] - since_step) * tokens_per_step / (now - since)
                mfu = speed * model.flops_per_token(cfg.model.block_size) / peak_flops
                seconds = state["seconds"] + now - since
                log.progress(state["step"], loss, speed, mfu)
                if (state["step"] % cfg.log_every == 0 or step == 0) and not state["bad_steps"]:
                    log.record(finite({"step": state["step"], "loss": loss, "lr": scale * cfg.lr, "mfu": mfu,
                                       "grad_norm": grad_norm, "tokens": state["tokens"], "seconds": seconds,
                                       "tokens_per_second": speed}))
    log.close(dataset)
    if caught:
        again = "" if run_dir.parent == Path("runs") else f" --out_dir={shlex.quote(str(run_dir))}"
        print(f"stopped by {signal.Signals(caught[0]).name} and saved at step {saved_at}. "
              f"Go on with: python train.py{again} --resume", flush=True)
        raise SystemExit(128 + caught[0])
    return state["record"]


def newest(out_dir):
    """runs/NAME, runs/NAME-2, runs/NAME-3, ...: the newest of them that holds a run, or None."""
    found = [p for p in Path(out_dir).parent.glob(Path(out_dir).name + "*")
             if (p / "latest").exists() and re.fullmatch(r"(-\d+)?", p.name[len(Path(out_dir).name):])]
    return max(found, key=lambda p: int("0" + p.name[len(Path(out_dir).name):].lstrip("-")), default=None)


def main(cfg):
    files, flags = configurator.split(Config, sys.argv[1:])
    recipes, typed = [Path(file).stem for file in files], {flag[2:].partition("=")[0] for flag in flags}
    if not cfg.out_dir and not (cfg.resume and not recipes):
        name = Path("runs") / (recipes[-1] if recipes else cfg.arch)
        taken = newest(name)
        if cfg.resume and not taken:
            raise UserError(f"no run {name} to resume: start it without --resume")
        number = int("0" + taken.name[len(name.name):].lstrip("-")) if taken else 0
        cfg = replace(cfg, out_dir=str(taken if cfg.resume else f"{name}-{max(number, 1) + 1}" if taken else name))
    if cfg.resume:                                         # the run's own config, and the flags of this command
        run_dir = cfg.out_dir or str(checkpoint.newest_run())
        stored = checkpoint.load_run(run_dir).meta["config"]
        asked = configurator.flat(configurator.from_argv(Config, [f"--arch={stored['arch']}", *flags]))
        given = {key: value for key, value in asked.items() if key in typed}
        cfg = configurator.load(Config, **(stored | given | {"out_dir": run_dir, "resume": True}))
    if "dataset" in typed and "prepare" not in typed:      # what the recipe prepares is another dataset
        cfg = replace(cfg, prepare="")
    record = train(cfg)
    print(f"best: {record['best_loss'] or math.nan:.4f} nats per token at step {record['best_step']:,}. The curve: "
          f"{cfg.out_dir}/loss.png. Now try:\n"
          f"python sample.py --checkpoint={shlex.quote(cfg.out_dir)} --prompt \"To be\"")


if __name__ == "__main__":
    configurator.run(main, Config)
