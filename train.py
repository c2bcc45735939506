"""Train a language model: one loop for every model file.

    python train.py config/tiny_cpu.py --device=cpu             # the first run: a few minutes on a laptop
    python train.py config/shakespeare_char.py --max_steps=500  # flags go on top of files
    python train.py config/shakespeare_char.py --arch=mine      # your own copy of model.py
    python train.py --resume                                    # go on with the newest run, bit for bit
"""
import json
import math
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import optim
from tasks import bpb
from thimble import checkpoint, configurator, data, files, load
from thimble.files import UserError
from thimble.generate import generate
from thimble.lora import Lora
from thimble.machine import catch_signals, compiled, keep_freed_memory, matmul_rate, pick_device
from thimble.runlog import Log, describe, finite, git_commit, newest

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
    path = data.folder_of(cfg.dataset)
    if not path.exists() and cfg.prepare:
        print(f"no dataset {cfg.dataset} yet: python {cfg.prepare}", flush=True)
        script, *flags = shlex.split(cfg.prepare)
        if subprocess.run([sys.executable, HERE / script, *flags]).returncode:
            raise UserError(f"could not prepare the dataset {cfg.dataset}: see above, or run python {cfg.prepare}")
    return data.load(path)


def evaluate(model, dataset, autocast):
    """The whole validation split, each token once -> loss in nats per token, its standard error, bits per byte, ..."""
    model.eval()
    nats, counts = bpb.window_nats(model, dataset.val, model.config.block_size, dataset.val_mask, autocast)
    model.train()
    loss, error = bpb.mean_loss(nats, counts)
    return {"val_loss": loss, "val_error": error, "val_bpb": loss / math.log(2) / dataset.bytes_per_token("val"),
            "val_ppl": math.exp(min(loss, 700)), "val_tokens": int(counts.sum())}


def starting_weights(cfg, dataset, given):
    """The model of --init_from: its architecture and weights, once its tokenizer proves to be the dataset's.

    given: the keys that were asked for. Of the model's, those that no weight depends on may be set anew.
    """
    start = load.read(cfg.init_from, "best")
    if start.meta.get("arch") != cfg.arch:
        raise UserError(f"--init_from={cfg.init_from} was trained with --arch={start.meta.get('arch')}, this run has "
                        f"--arch={cfg.arch}: use the same")
    theirs = start.path / "tokenizer.json" if start.path.is_dir() else start.path
    if dataset.tokenizer().to_json() != load.read_tokenizer(theirs).to_json():
        raise UserError(f"--init_from={cfg.init_from} was trained with another tokenizer than {dataset.path}: "
                        f"prepare the text with --tokenizer={theirs}")
    model = checkpoint.load_model(start)
    was = configurator.flat(model.config)
    new = {k: v for k, v in configurator.flat(cfg.model).items() if k in given and v != was[k]}
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
        files.warn(f"resuming with {', '.join(changed)}: not bit for bit what an unbroken run would give")
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


def show_samples(model, prompts, tokenizer, cfg):
    model.eval()
    for prompt, ids in prompts.items():
        generator = torch.Generator().manual_seed(cfg.seed)  # its own: training must not feel that we looked
        new = list(generate(model, ids, cfg.prompt_tokens, generator, {tokenizer.eot}, tokenizer.vocab_size,
                            temperature=0.8, top_k=50))
        print(f"    {prompt}{tokenizer.decode(new)}".replace("\n", "\n    "), flush=True)
    model.train()


def training_step(forward, learner, optimizer, x, y, micro_batch_size, autocast, grad_clip, scale):
    """One optimizer step on x, y (B, T) -> (mean loss over the targets, gradient norm before clipping).

    Where one of the two is not finite the weights stay as they were. `scale` is the factor on the peak rates.
    """
    loss = 0.0
    n_targets = (y >= 0).sum()
    for part, targets in zip(x.split(micro_batch_size), y.split(micro_batch_size), strict=True):
        share = (targets >= 0).sum() / n_targets           # masked micro-batches differ in size
        if not share:
            continue
        with autocast:
            part_loss = forward(part, targets)[1] * share
        part_loss.backward()
        loss += part_loss.detach()
    idle = [name for name, p in learner.named_parameters() if p.grad is None]
    if idle:
        raise UserError(f"no gradient reaches {', '.join(idle[:3])}: use it in the model file or remove it")
    norm = torch.nn.utils.get_total_norm([p.grad for p in learner.parameters()])
    loss, grad_norm = loss.item(), norm.item()
    if math.isfinite(loss) and math.isfinite(grad_norm):   # else never let it reach the weights
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(learner.parameters(), grad_clip, norm)
        optimizer.step(scale)
    for p in learner.parameters():
        p.grad = None
    return loss, grad_norm


def train(cfg, report=None, command=None):
    """Train as `cfg` says -> the record of the last evaluation (step, val_loss, val_bpb, best_loss, ...).

    report gets the record of every evaluation; what it returns, if anything, is the reason to stop there. command is
    the configurator.Command that cfg came with, if it came with one.
    """
    command = command or configurator.Command("", [], {}, configurator.changed(cfg))
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
                 else starting_weights(cfg, dataset, command.given))
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
    files.write_atomic(run_dir / "config.json", json.dumps(configurator.flat(cfg), indent=1) + "\n")
    log = Log(run_dir, cfg, state)
    log.record({"event": "resume" if resumed else "start", "step": state["step"], "command": command.line,
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
                result = evaluate(model, dataset, autocast)
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
            if not (y >= 0).any():                         # every token is masked: nothing to learn here
                state["step"] += 1
                continue
            loss, grad_norm = training_step(forward, learner, optimizer, x, y, micro, autocast, cfg.grad_clip, scale)
            state |= {"step": step + 1, "tokens": state["tokens"] + tokens_per_step}
            if math.isfinite(loss) and math.isfinite(grad_norm):
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


def main(cfg, command):
    recipes, typed = [Path(file).stem for file in command.files], command.typed
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
        cfg = configurator.load(Config, **(stored | typed | {"out_dir": run_dir, "resume": True}))
    if "dataset" in typed and "prepare" not in typed:      # what the recipe prepares is another dataset
        cfg = replace(cfg, prepare="")
    record = train(cfg, command=command)
    print(f"best: {record['best_loss'] or math.nan:.4f} nats per token at step {record['best_step']:,}. The curve: "
          f"{cfg.out_dir}/loss.png. Now try:\n"
          f"python sample.py --checkpoint={shlex.quote(cfg.out_dir)} --prompt \"To be\"")


if __name__ == "__main__":
    configurator.run(main, Config, with_command=True)
