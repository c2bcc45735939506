"""Train a language model: one loop for every model file.

    python train.py config/tiny_cpu.py --device=cpu  # the first run: a few minutes on a laptop
    python train.py config/shakespeare_char.py --max_steps=500  # flags go on top of files
    python train.py config/shakespeare_char.py --arch=mine  # your own copy of model.py
    python train.py --resume  # continue the newest run, bit for bit

The words of its log:
    loss            the mean of -ln p, where p is the probability that the model gave to the token that came next. Its
                    unit is the nat: 1 / ln 2 = 1.44 bits
    perplexity      e^loss: how many equally likely tokens would be as hard to guess among
    bits per byte   the bits that the model needs for the whole text, divided by the text's length in UTF-8 bytes. The
                    two above depend on the tokenizer; this one compares models of any vocabulary
    MFU             model FLOPs utilization: the share of the machine's speed at a large matrix product that goes into
                    the arithmetic of the model (Chowdhery et al. 2022, PaLM, appendix B)
"""
import contextlib
import hashlib
import json
import math
import random
import shlex
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import optim
from tasks import bpb
from thimble import checkpoint, configurator, data, files, hub, load, machine, runlog
from thimble.files import UserError
from thimble.lora import Lora

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    # run
    out_dir: str = ""               # run folder; empty: runs/ and the recipe's name, with -2, -3, ... if that is taken
    resume: bool = False            # continue the newest run of this recipe, or that in --out_dir
    init_from: str = ""             # run, checkpoint, Hugging Face folder or name, or GGUF file to start from
    lora_rank: int = 0              # with init_from: rank of LoRA adapters; 0 trains all weights
    seed: int = 1337                # of weights, dropout and the order of the data
    # data
    dataset: str = "shakespeare_char"  # a folder, or its name in data/
    prepare: str = ""               # script and flags that make the dataset if it is missing
    batch_size: int = 32            # sequences per optimizer step
    micro_batch_size: int = 0       # sequences per forward pass, which saves memory; 0: the whole batch
    # model
    arch: str = "model"             # model file, without .py; with init_from: that of its model
    model: object = configurator.sub("arch")
    # optimizer
    optimizer: Literal["muon", "adamw", "lion"] = "muon"  # muon is for matrices, rest_optimizer then for the rest
    lr: float = 0.02                # peak learning rate; with muon only of the matrices in the layers, not of LoRA
    rest_optimizer: Literal["adamw", "lion"] = "adamw"  # with muon: for everything else
    rest_lr: float = 0.01           # with muon: peak learning rate of everything else
    weight_decay: float = 0.0       # on matrices; never on embeddings, gains and biases
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    momentum: float = 0.95          # of Muon
    grad_clip: float = 1.0          # largest global gradient norm; 0: no clipping
    # schedule
    schedule: Literal[optim.SCHEDULES] = "cosine"  # shape of the rate after the warm-up
    max_steps: int = 1000           # optimizer steps; training stops exactly there
    warmup_steps: int = 0           # steps of linear warm-up
    min_lr: float = 0.1             # final rate, as a fraction of the peak
    decay_frac: float = 0.2         # wsd: the rate falls over this last fraction of all steps
    restart_steps: int = 1000       # restarts: length of the first cycle
    restart_mul: float = 1.0        # restarts: factor by which each cycle grows
    restart_decay: float = 1.0      # restarts: factor by which each peak shrinks
    # evaluation
    eval_every: int = 250           # steps between evaluations over the whole validation split, each with a checkpoint
    patience: int = 0               # evaluations without improvement before stopping; 0: never stop early
    prompts: tuple[str, ...] = ()   # texts to continue and print at each evaluation
    prompt_tokens: int = 100        # length of each of these samples
    log_every: int = 10             # steps between lines of metrics.jsonl
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # where else to send the metrics
    # checkpoints
    save_every: int = 0             # steps between further checkpoints; 0: only those of the evaluations
    keep_last: int = 3              # how many to keep besides the best; 0: all
    # machine
    device: str = "auto"            # cpu, cuda, mps, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto measures. Weights stay float32
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on a GPU only, on a CPU it seldom pays off

    def __post_init__(self):
        configurator.resolve(self)
        configurator.check(self, positive=("batch_size", "max_steps", "eval_every", "log_every", "restart_steps", "lr",
                                           "rest_lr"), fractions=("min_lr", "decay_frac", "restart_decay"))
        if self.lora_rank and not self.init_from:
            raise ValueError(f"lora_rank={self.lora_rank} needs a model to adapt: add --init_from=RUN")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} must be below 2**63")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of "
                             f"micro_batch_size={self.micro_batch_size}")
        if self.restart_mul < 1:
            raise ValueError(f"restart_mul={self.restart_mul} must be at least 1")
        if len(self.betas) != 2:
            raise ValueError(f"betas={self.betas} must be two numbers")
        if max(*self.betas, self.momentum) >= 1:
            raise ValueError(f"betas={self.betas} and momentum={self.momentum} must be below 1")
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not exceed max_steps={self.max_steps}")


# Keys that may change between a run and its resumption without changing a single bit of what is computed.
# (Device, dtype and compile are compared by what they resolve to, not by what was asked for.)
# (What the dataset holds is compared, too; its folder may have moved.)
CAN_CHANGE_ON_RESUME = {"out_dir", "resume", "init_from", "dataset", "prepare", "eval_every", "patience", "prompts",
                        "prompt_tokens", "log_every", "tracker", "save_every", "keep_last", "device", "dtype",
                        "compile"}


# ---- setting up
def open_dataset(cfg):
    """The Dataset that `cfg` names, prepared first if it is missing and the recipe says how. Raises UserError."""
    path = data.folder_of(cfg.dataset)
    if not path.exists() and cfg.prepare:
        print(f"no dataset {cfg.dataset} yet: python {cfg.prepare}", flush=True)
        script, *flags = shlex.split(cfg.prepare)
        done = subprocess.run([sys.executable, HERE / script, *flags])
        if done.returncode:
            raise UserError(f"could not prepare the dataset {cfg.dataset}: see above, or run python {cfg.prepare}")
    return data.load(path)


def check_run_dir(run_dir, resume):
    """UserError if a new run would overwrite another one, or if a resumed one could not be saved."""
    if not resume and checkpoint.holds_run(run_dir):
        raise UserError(f"{run_dir} already holds a run: continue it with --resume, or choose another --out_dir")
    if resume and not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}: check the name, or start it without --resume")
    for pointer in (run_dir / "latest", run_dir / "best"):
        if pointer.is_dir() and not pointer.is_symlink():  # a link is replaced at the next save
            raise UserError(f"{pointer} is a folder, but must be a file with the name of a checkpoint: move it away")


@contextlib.contextmanager
def own_run_dir(run_dir, resume, state):
    """Create and lock the run folder. If an error comes before the first step of a new run, delete that run again."""
    is_new = not run_dir.exists()
    if not resume:
        run_dir.mkdir(parents=True, exist_ok=True)
    with files.locked(run_dir / "lock"):
        check_run_dir(run_dir, resume)  # again: another process may just have ended here
        try:
            yield
        except (Exception, KeyboardInterrupt):  # not the SystemExit of a signal, before which the run was saved
            if not resume and state["step"] == 0:
                # of a folder that was there before, only what makes it a run
                for path in [run_dir] if is_new else [run_dir / "latest", run_dir / "step_000000"]:
                    files.remove(path)
            raise


def open_run(run_dir):
    """The Checkpoint to resume from. UserError if there is none, or if it lacks what a resume relies on."""
    saved = checkpoint.load_run(run_dir, optimizer=True)
    missing = {"arch", "model_config", "config", "environment", "dataset", "state"} - saved.meta.keys()
    if missing:
        raise UserError(f"{saved.path} lacks {', '.join(sorted(missing))} and cannot be resumed: start a new run from "
                        f"its weights with --init_from={saved.path}")
    dtype = saved.meta["environment"].get("dtype")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"{saved.path} has dtype {dtype!r:.100}, which is not float32 or bfloat16: copy it again")
    return saved


def build(cfg, dataset, device, resumed, given):
    """(model on `device`, its Lora or None, optimizer), with weights that are random or those of --init_from.

    given: {key: value} of what was asked for, on the command line or in files.
    """
    vocab_size = cfg.model.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise UserError(f"vocab_size={vocab_size} is less than the {dataset.vocab_size} ids of {dataset.path}")
    # Only torch's generator is drawn from here, and only its state is in a checkpoint: a fork that draws from the
    # others starts alike each time, but does not resume bit for bit.
    random.seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.manual_seed(cfg.seed)
    try:
        if cfg.init_from and not resumed:
            model = starting_model(cfg, dataset, given)
        else:
            model = import_module(cfg.arch).Model(replace(cfg.model, vocab_size=vocab_size))
        model.to(device).train()
        broken = checkpoint.non_finite(model.state_dict())
        if broken:
            raise UserError(f"{cfg.arch}.py: {broken} holds NaN or Inf before the first step: initialise it otherwise")
        lora = Lora(model, cfg.lora_rank) if cfg.lora_rank else None
        if lora and cfg.optimizer == "muon" and "lr" in given and "rest_lr" not in given:
            files.warn(f"lr={cfg.lr} is not used: with optimizer=muon, LoRA learns by {cfg.rest_optimizer} at "
                       f"rest_lr={cfg.rest_lr}; set that, or choose another optimizer")
        optimizer = optim.Optimizer(lora or model, cfg.optimizer, cfg.lr, cfg.rest_optimizer, cfg.rest_lr,
                                    cfg.weight_decay, cfg.betas, cfg.momentum)
    except ValueError as e:  # model files and optim.py import nothing of ours
        raise UserError(e) from None
    return model, lora, optimizer


def starting_model(cfg, dataset, given):
    """The model of --init_from: its architecture and weights. UserError unless its tokenizer is that of the dataset.

    given: as in build(). Of the model's keys only those that no weight depends on may differ from what the model has.
    """
    start = load.read(cfg.init_from, "best")
    if "arch" in given and start.meta.get("arch") != cfg.arch:
        raise UserError(f"--init_from={cfg.init_from} was trained with --arch={start.meta.get('arch')}, this run has "
                        f"--arch={cfg.arch}: leave that out")
    tokenizer = start.path  # a GGUF file holds its own
    if start.path.is_dir():
        tokenizer = start.path / "tokenizer.json"
    spoken = load.read_tokenizer(tokenizer)
    if spoken.record.template and not dataset.tokenizer().record.template:
        files.warn(f"{cfg.init_from} was taught to answer, but {dataset.path} has no chat template, so the new run has "
                   f"none: to keep it, prepare the text with --tokenizer={tokenizer}")
    if dataset.tokenizer().to_json() != spoken.to_json():
        raise UserError(f"--init_from={cfg.init_from} was trained with another tokenizer than {dataset.path}: "
                        f"prepare the text with --tokenizer={tokenizer}")

    model = checkpoint.load_model(start)
    was = configurator.flat(model.config)
    new = {}
    for key, value in configurator.flat(cfg.model).items():
        if key in given and value != was.get(key):
            new[key] = value
    if not new:
        return model
    shown = {key: f"{key}={value} (it has {was.get(key)})" for key, value in new.items()}
    fixed = [text for key, text in shown.items() if key not in ("dropout", "block_size") or key not in was]
    if fixed:
        raise UserError(f"--init_from={cfg.init_from} cannot change to {', '.join(fixed)}: leave that out")
    try:
        start.meta["model_config"] = was | new
        return checkpoint.load_model(start)
    except UserError as e:  # a model file may have weights for each position
        raise UserError(f"--init_from={cfg.init_from} cannot change to {', '.join(shown.values())}: {e}") from None


def new_state():
    """All that a checkpoint must hold besides tensors, as plain JSON."""
    return {
        "step": 0,  # optimizer steps that are done
        "tokens": 0,  # that were trained on
        "seconds": 0.0,  # of training, without evaluating and saving
        "best_loss": None,  # lowest validation loss, in nats per token
        "best_step": 0,
        "waited": 0,  # evaluations since then
        "lr_factor": 1.0,  # halved by each roll-back
        "rollbacks": 0,
        "bad_steps": 0,  # skipped in a row
        "back_at": None,  # step of the checkpoint that the last roll-back went to
        "data_shift": 0,  # batches that roll-backs passed over
        "record": {},  # of the last evaluation
    }


def choose_environment(cfg, device, resumed):
    """What the bits of a run depend on besides its config. A resumed run keeps what it had chosen for itself."""
    dtype = cfg.dtype
    if dtype == "auto":
        dtype = resumed.meta["environment"]["dtype"] if resumed else machine.fastest_dtype(device)
    compiling = cfg.compile
    if resumed and compiling in ("auto", resumed.meta["config"]["compile"]):
        compiling = resumed.meta["environment"]["compile"]  # False as well if the compiler had failed
    if compiling == "auto":
        compiling = device.type == "cuda"
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device), "dtype": dtype,
            "compile": compiling}


def check_resume(cfg, resumed, dataset, environment):
    """UserError if `cfg` does not continue what the run was; a warning if it does, but not bit for bit."""
    if resumed.meta["dataset"]["files"] != dataset.meta["files"]:
        raise UserError(f"{dataset.path} is not the dataset that {resumed.path} was trained on: prepare it as before, "
                        f"or start a new run with --init_from={resumed.path}")
    model_config = json.loads(json.dumps(asdict(cfg.model)))  # as it comes back from a file: lists for tuples
    if resumed.meta["arch"] != cfg.arch or resumed.meta["model_config"] != model_config:
        raise UserError(f"{resumed.path} is another model than this command asks for: resume without model flags, "
                        f"or start a new run with another --out_dir")
    step = resumed.meta["state"]["step"]
    if step > cfg.max_steps:
        raise UserError(f"{resumed.path} is at step {step}, past max_steps={cfg.max_steps}: give a larger one")
    changed = []
    was = resumed.meta["config"]
    for key, value in configurator.flat(cfg).items():
        if key not in CAN_CHANGE_ON_RESUME and value != was.get(key):
            changed.append(f"{key}={value} (was {was.get(key)})")
    was = resumed.meta["environment"]
    for key, value in environment.items():
        if value != was.get(key):
            changed.append(f"{key} {value} (was {was.get(key)})")
    sha256 = model_sha256(cfg.arch)
    if resumed.meta.get("model_sha256", sha256) != sha256:  # checkpoints from before this key was added lack it
        changed.append(f"an edited {cfg.arch}.py")
    if changed:
        files.warn(f"resuming with {', '.join(changed)}: the result will differ from that of an uninterrupted run")


def model_sha256(arch):
    return hashlib.sha256(Path(import_module(arch).__file__).read_bytes()).hexdigest()


def checkpoint_meta(cfg, dataset, environment, run_id, recipe):
    """What every checkpoint of the run says about itself, besides the state, as plain JSON."""
    meta = {
        "arch": cfg.arch,
        "model_config": asdict(cfg.model),
        "model_sha256": model_sha256(cfg.arch),  # of the model file
        "config": configurator.flat(cfg),
        "recipe": recipe,  # what its config files said, flags aside: so that a resume can tell what was edited
        "environment": environment,
        # absolute, since a run may be resumed from another folder
        "dataset": {"path": str(dataset.path.absolute()), "files": dataset.meta["files"]},
        "run_id": run_id,
    }
    if "template" in dataset.meta:  # of a dataset of conversations: how they are written
        meta["template"] = dataset.meta["template"]
    return meta


def tensors_to_resume(lora, optimizer):
    """{name: tensor} of what the next step depends on besides the weights; restore() is the inverse."""
    tensors = optimizer.state_dict() | checkpoint.random_state()
    if lora:
        tensors |= {f"lora.{name}": tensor for name, tensor in lora.state_dict().items()}
    return tensors


def restore(model, lora, optimizer, state, saved):
    """Put weights, optimizer, random states, `state` and the pointer `best` back to what `saved` holds.

    saved: a checkpoint of this run.
    """
    lora_tensors = {}
    optimizer_tensors = {}
    for name, tensor in saved.optimizer.items():
        if name.startswith("lora."):
            lora_tensors[name.removeprefix("lora.")] = tensor
        elif not name.startswith("random."):
            optimizer_tensors[name] = tensor
    try:
        model.load_state_dict(saved.model)
        if lora:
            lora.load_state_dict(lora_tensors)
        optimizer.load_state_dict(optimizer_tensors)
    except (ValueError, RuntimeError) as e:
        raise UserError(f"{saved.path} does not fit this model and optimizer: {e}") from None
    checkpoint.set_random_state(saved.optimizer, saved.path)
    state.clear()
    state.update(new_state() | saved.meta["state"])  # older checkpoints lack some keys
    # `best` may name a step after this one: the run will come by there again, and another model may take its place
    if state["best_loss"] is not None and not checkpoint.point_best(saved.path.parent, state["best_step"]):
        files.warn(f"the best checkpoint, step {state['best_step']}, is lost: the next evaluation counts as the best")
        state["best_loss"] = None
        state["best_step"] = 0
    if state["best_loss"] is None:
        files.remove(saved.path.parent / "best")


# ---- the parts of the loop
def evaluate(model, dataset, autocast):
    """The loss over the whole validation split, each token once, as a dict.

    val_loss is in nats per token, val_error its standard error, val_bpb the same loss in bits per byte, val_ppl the
    perplexity, val_tokens the number of tokens that count.
    """
    model.eval()
    nats, counts = bpb.window_nats(model, dataset.val, model.config.block_size, dataset.val_mask, autocast)
    model.train()
    loss, error = bpb.mean_loss(nats, counts)
    return {
        "val_loss": loss,
        "val_error": error,
        "val_bpb": loss / math.log(2) / dataset.bytes_per_token("val"),
        "val_ppl": math.exp(min(loss, 700)),  # e^710 is too large for a float
        "val_tokens": int(counts.sum()),
    }


def remember(state, result, better):
    """Put what evaluate() gave into the state; better: it is the best so far."""
    if better:
        state["best_loss"] = result["val_loss"]
        state["best_step"] = state["step"]
        state["waited"] = 0
    else:
        state["waited"] += 1
    counters = {key: state[key] for key in ("best_loss", "best_step", "tokens", "seconds")}
    state["record"] = {"step": state["step"], **runlog.finite(result), **counters}


def reason_to_stop(cfg, state, report):
    """Why to stop after this evaluation, before max_steps; None if there is no reason."""
    reason = report(state["record"]) if report else None
    if cfg.patience and state["waited"] >= cfg.patience:
        reason = f"no better validation loss in {cfg.patience} evaluations"
    return reason


def next_batch(cfg, dataset, step, device):
    """x, y (batch_size, block_size) number `step` of the data: a function of the seed and that number alone."""
    x, y = data.batch(dataset.train, step, cfg.batch_size, cfg.model.block_size, cfg.seed, dataset.train_mask,
                      dataset.row_length, dataset.vocab_size)
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


def rate(cfg, step):
    """Factor in [0, 1] on the peak learning rates, for the optimizer step number `step`."""
    return optim.lr_scale(step, cfg.schedule, cfg.max_steps, cfg.warmup_steps, cfg.min_lr, cfg.decay_frac,
                          cfg.restart_steps, cfg.restart_mul, cfg.restart_decay)


def training_step(forward, learner, optimizer, x, y, micro_batch_size, autocast, grad_clip, scale):
    """One optimizer step on x, y (B, T) -> (mean loss over the targets, gradient norm before clipping).

    forward is the model, compiled or not; learner is the module whose parameters learn: the model or its Lora. scale is
    the factor on the peak learning rates. If loss or gradient norm is not finite, the weights stay as they were.
    """
    loss = 0.0
    n_targets = (y >= 0).sum()  # targets of -1 are ignored
    for part, targets in zip(x.split(micro_batch_size), y.split(micro_batch_size), strict=True):
        share = (targets >= 0).sum() / n_targets  # of the targets: masked micro-batches differ
        if not share:
            continue
        with autocast:
            part_loss = forward(part, targets)[1] * share
        part_loss.backward()
        loss += part_loss.detach()

    idle = [name for name, p in learner.named_parameters() if p.grad is None]
    if idle:
        raise UserError(f"{type(learner).__module__}.py: no gradient reaches {', '.join(idle[:3])}: use it in "
                        "forward() or remove it")
    norm = torch.nn.utils.get_total_norm([p.grad for p in learner.parameters()])
    loss = loss.item()
    grad_norm = norm.item()
    if math.isfinite(loss) and math.isfinite(grad_norm):
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(learner.parameters(), grad_clip, norm)
        optimizer.step(scale)
    learner.zero_grad()
    return loss, grad_norm


def roll_back(run_dir, model, lora, optimizer, state, log, reason):
    """Back to the newest checkpoint with half the learning rate and further data; UserError after three times.

    The data between that checkpoint and this step is passed over: it may be the cause. PaLM's loss spikes were cured in
    this way (Chowdhery et al. 2022, section 5.1). Where the checkpoint of the last roll-back has led nowhere, the one
    before it is next.
    """
    bad_step = state["step"]
    lr_factor = state["lr_factor"] / 2
    rollbacks = state["rollbacks"] + 1
    next_data = bad_step + state["data_shift"]
    if rollbacks > 3:
        raise UserError(f"loss or gradient not finite at step {bad_step}, even at an eighth of the learning rate: "
                        "try a lower --lr and --rest_lr, or --dtype=float32")
    failed_at_once = state["back_at"] is not None and bad_step - state["back_at"] <= 3
    before = state["back_at"] if failed_at_once else math.inf
    restore(model, lora, optimizer, state, checkpoint.load_run(run_dir, optimizer=True, before=before))
    state["lr_factor"] = lr_factor
    state["rollbacks"] = rollbacks
    state["bad_steps"] = 0
    state["back_at"] = state["step"]
    state["data_shift"] = next_data - state["step"]
    log.go_back(state)
    log.say(f"{reason}: back to step {state['step']} with half the learning rate and further data")
    log.record({"step": state["step"], "event": "rolled back", "lr_factor": lr_factor,
                "data_shift": state["data_shift"]})


# ---- the loop
def train(cfg, report=None, command=None):
    """Train as `cfg` says -> the record of the last evaluation (step, val_loss, val_bpb, best_loss, ...).

    report is called with the record of every evaluation; what it returns, if anything, is the reason to stop there.
    command is the configurator.Command that came with cfg, if cfg is from a command line.
    """
    if command is None:
        command = configurator.Command(line="", files=[], typed={}, given=configurator.changed(cfg))
    run_dir = Path(cfg.out_dir or f"runs/{cfg.arch}")
    # what is quick to check comes first: preparing a dataset can take minutes
    device = machine.pick_device(cfg.device)
    check_run_dir(run_dir, cfg.resume)
    dataset = open_dataset(cfg)
    state = new_state()
    with own_run_dir(run_dir, cfg.resume, state):
        return loop(cfg, run_dir, dataset, device, state, report, command)


def loop(cfg, run_dir, dataset, device, state, report, command):
    """train() once the dataset is open and `run_dir` is ours. state: a new one."""
    tokenizer = dataset.tokenizer() if cfg.prompts else None
    prompts = {text: tokenizer.encode_prompt(text) for text in cfg.prompts}
    if device.type == "cpu":
        machine.keep_freed_memory()
    resumed = open_run(run_dir) if cfg.resume else None
    source = cfg.init_from
    if hub.is_name(source) and not resumed:
        folder, source = hub.fetch(source)  # the run says the revision
        cfg = replace(cfg, init_from=str(folder))
    model, lora, optimizer = build(cfg, dataset, device, resumed, command.given)
    learner = lora or model  # the module whose parameters learn
    # with what the dataset or --init_from decided
    cfg = replace(cfg, arch=type(model).__module__, model=model.config, init_from=source)
    environment = choose_environment(cfg, device, resumed)
    if resumed:
        check_resume(cfg, resumed, dataset, environment)
        restore(model, lora, optimizer, state, resumed)
        if not checkpoint.JUNK.fullmatch(resumed.path.name):  # the only copy may be in the trash
            checkpoint.remove_junk(run_dir)  # now, since a run that is finished saves nothing

    dtype = getattr(torch, environment["dtype"])
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size
    x, y = next_batch(cfg, dataset, 0, device)  # fails here if the text is too short
    forward = model
    if environment["compile"]:
        forward = machine.compiled(model, x[:micro_batch_size], y[:micro_batch_size], autocast)
        learner.zero_grad()  # of the compiler's trial
        environment["compile"] = forward is not model
    peak_lr = runlog.lora_rate(cfg)[2] if lora else cfg.lr
    flops_per_token = model.flops_per_token(cfg.model.block_size)
    peak_flops = machine.matmul_rate(device, dtype)

    run_id = uuid.uuid4().hex  # by which a tracker tells runs of the same name apart
    recipe = recipe_values(command.files, cfg.arch)
    if resumed:
        run_id = resumed.meta.get("run_id", run_dir.name)
        recipe = recipe or resumed.meta.get("recipe", {})
    meta = checkpoint_meta(cfg, dataset, environment, run_id, recipe)
    files.write_atomic(run_dir / "config.json", json.dumps(configurator.flat(cfg), indent=1) + "\n")
    log = runlog.Log(run_dir, cfg, state, run_id)
    log.record({"event": "resume" if resumed else "start", "step": state["step"], "command": command.line,
                "commit": runlog.git_commit(), **environment})
    runlog.describe(cfg, model, lora, dataset, environment, run_dir)

    saved_at = state["step"] if resumed else None
    since = dict(state)  # speeds are means from here on
    with machine.catch_signals() as caught:
        while True:
            step = state["step"]
            at_end = step == cfg.max_steps
            last = at_end or bool(caught)  # of the turns of this loop: no further step is taken

            # 1. evaluate and save
            at_evaluation = step > 0 and (at_end or step % cfg.eval_every == 0)
            at_save = last or step == 0 or (cfg.save_every > 0 and step % cfg.save_every == 0)
            # a run that was resumed or rolled back may have done this evaluation before
            evaluating = at_evaluation and step != state["record"].get("step")
            saving = evaluating or (at_save and step != saved_at)
            # after a skipped step a state is not worth going back to, but it may be what a run ends with
            healthy = state["bad_steps"] == 0 or at_end
            better = False
            if saving:
                broken = checkpoint.non_finite(model.state_dict() | tensors_to_resume(lora, optimizer))
                if broken:
                    roll_back(run_dir, model, lora, optimizer, state, log, f"step {step}: {broken} holds NaN or Inf")
                    saved_at = state["step"]
                    since = dict(state)
                    continue
            if evaluating:
                result = evaluate(model, dataset, autocast)
                healthy = healthy and math.isfinite(result["val_loss"])
                better = healthy and (state["best_loss"] is None or result["val_loss"] < state["best_loss"])
                remember(state, result, better)
                log.record(state["record"])  # before the save: killed in between, a resume drops it
            if saving and healthy:
                checkpoint.save(run_dir, step, model.state_dict(), tensors_to_resume(lora, optimizer),
                                meta | {"state": state}, dataset.path / "tokenizer.json", cfg.keep_last, better)
                saved_at = step
            if evaluating:
                log.evaluated(state["record"], dataset, better)
                runlog.show_samples(model, prompts, tokenizer, cfg)
                reason = reason_to_stop(cfg, state, report)
                if reason:
                    log.say(f"stopped: {reason}")
                    last = True
                since = dict(state)
            if last:
                break

            # 2. one optimizer step
            started = time.perf_counter()
            x, y = next_batch(cfg, dataset, step + state["data_shift"], device)
            if not (y >= 0).any():  # every token is masked: there is nothing to learn
                state["step"] += 1
                continue
            scale = state["lr_factor"] * rate(cfg, step + 1)
            loss, grad_norm = training_step(forward, learner, optimizer, x, y, micro_batch_size, autocast,
                                            cfg.grad_clip, scale)
            taken = math.isfinite(loss) and math.isfinite(grad_norm)
            if lora and taken:
                lora.merge()
            state["step"] += 1
            state["tokens"] += cfg.batch_size * cfg.model.block_size
            state["seconds"] += time.perf_counter() - started
            state["bad_steps"] = 0 if taken else state["bad_steps"] + 1
            if not taken:
                log.record({"step": step + 1, "event": "skipped", "loss": str(loss), "grad_norm": str(grad_norm)})
                log.say(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: step skipped")
            if state["bad_steps"] == 3:
                roll_back(run_dir, model, lora, optimizer, state, log, "three in a row")
                saved_at = state["step"]
                since = dict(state)
                continue

            # 3. say how it is going
            speed = (state["tokens"] - since["tokens"]) / (state["seconds"] - since["seconds"])  # tokens per second
            mfu = speed * flops_per_token / peak_flops
            log.progress(step + 1, loss, speed, mfu)
            if taken and (step == 0 or (step + 1) % cfg.log_every == 0):
                log.record(runlog.finite({
                    "step": step + 1, "loss": loss, "lr": scale * peak_lr, "mfu": mfu, "grad_norm": grad_norm,
                    "tokens": state["tokens"], "seconds": state["seconds"], "tokens_per_second": speed}))
    log.close(dataset)
    if caught:
        exit_by_signal(caught[0], run_dir, saved_at)
    return state["record"]


def exit_by_signal(number, run_dir, saved_at):
    out_dir = "" if run_dir.parent == Path("runs") else f" --out_dir={shlex.quote(str(run_dir))}"
    print(f"stopped by {signal.Signals(number).name} and saved at step {saved_at}. "
          f"Continue with: python train.py{out_dir} --resume", flush=True)
    raise SystemExit(128 + number)  # the exit code that shells give to a signal


# ---- the command
def main(cfg, command):
    recipe = Path(command.files[-1]).stem if command.files else ""
    if 0 < cfg.min_lr < 1e-3 and "min_lr" in command.given:
        files.warn(f"min_lr={cfg.min_lr} is a fraction of the peak rate, not a rate as in nanoGPT: the rate falls to "
                   f"{cfg.min_lr * cfg.lr:.2g}")
    if cfg.resume:
        cfg = config_to_resume(run_to_resume(cfg.out_dir, recipe), cfg, command)
    elif not cfg.out_dir:
        cfg = replace(cfg, out_dir=str(runlog.unused(Path("runs") / (recipe or cfg.arch))))
    if "dataset" in command.typed and "prepare" not in command.typed:
        cfg = replace(cfg, prepare="")  # the recipe's script makes another dataset

    record = train(cfg, command=command)
    best = math.nan if record["best_loss"] is None else record["best_loss"]
    ask = '--prompt "To be"'
    if "template" in files.read_json(data.folder_of(cfg.dataset) / "meta.json", {}):  # it was taught to answer
        ask = "--chat"
    print(f"best: {best:.4f} nats per token at step {record['best_step']:,}. The curve: {cfg.out_dir}/loss.png. "
          f"Now try:\npython sample.py --checkpoint={shlex.quote(cfg.out_dir)} {ask}")


def recipe_values(files, arch):
    """{key: value} of all keys as the config files alone set them; {} without files."""
    if not files:
        return {}
    return configurator.flat(configurator.load(Config, *files, arch=arch))


def config_to_resume(run_dir, asked, command):
    """The Config of the run, and on top of it what was edited in its recipe since and the flags of this command.

    A run may be from anywhere, so nothing in it is executed: `prepare`, a command, is that of `asked`, the Config of
    this command line alone, and `arch` must name a file beside this one.
    """
    saved = checkpoint.load_run(run_dir, quiet=True)  # loaded once more when the run is locked
    stored = saved.meta.get("config")
    if not isinstance(stored, dict):
        raise UserError(f"{saved.path} has no config and cannot be resumed: start a new run from its weights with "
                        f"--init_from={saved.path}")
    if "arch" not in command.given:
        checkpoint.model_file(saved.path, stored.get("arch"))
    recipe = saved.meta.get("recipe", {})
    new = {}
    for key, value in recipe_values(command.files, asked.arch).items():
        if key in recipe and recipe[key] != value:
            new[key] = value
        elif key not in recipe and key in command.given:  # the run began without this recipe
            new[key] = value
    new |= command.typed | {"out_dir": str(run_dir), "resume": True, "prepare": asked.prepare}
    cfg = configurator.load(Config, **(stored | new))
    path = saved.meta.get("dataset", {}).get("path", "")
    if not data.folder_of(cfg.dataset).exists() and Path(path).is_dir():
        cfg = replace(cfg, dataset=path)  # a relative name, and this is another folder
    return cfg


def run_to_resume(out_dir, recipe):
    """out_dir if there is one, else the newest run of the recipe, else the newest run of all."""
    if out_dir:
        return out_dir
    if not recipe:
        return checkpoint.newest_run()
    run_dir = runlog.newest(Path("runs") / recipe)
    if run_dir is None:
        raise UserError(f"no run runs/{recipe} to resume: start it without --resume")
    return run_dir


if __name__ == "__main__":
    configurator.run(main, Config, with_command=True)
