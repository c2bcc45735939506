"""Tokens per second: training steps and decoding of a model file, beside nanoGPT's model of the same shape.

    python bench/speed.py                                    # ours alone
    python bench/speed.py --nanogpt=../nanoGPT               # beside a clone of karpathy/nanoGPT, taking turns
    python bench/speed.py --device=cuda --batch_size=64      # on a GPU

A training step is that of train.py (forward, backward, clipping at 1, update) with AdamW, the same for both. nanoGPT
computes in float32 on a CPU, as its train.py has no other way; the row "nanoGPT, bfloat16" adds the autocast it lacks.
"""
import importlib
import importlib.util
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import optim
import train
from thimble import configurator, files, machine
from thimble.generate import generate

# the published shapes, each with its batch size: those of nanoGPT's README for a CPU and for a GPU
SHAPES = (
    ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}, 12),
    ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 8),
)
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Config:
    # shape
    arch: str = "model"
    model: object = configurator.sub("arch")
    batch_size: int = 0             # 0: both of the published shapes, 12 x 64 (4 x 128) and 8 x 256 (6 x 384)
    # peer
    nanogpt: str = ""               # folder of a clone of nanoGPT
    # measurement
    rounds: int = 5                 # the contestants take turns, so that both see the same machine
    seconds: float = 4.0            # of each turn
    compile: bool = False           # torch.compile for all, timed once it is done
    device: str = "cpu"

    def __post_init__(self):
        configurator.resolve(self)
        configurator.check(self, positive=("rounds",))


def our_model(cfg, device):
    """(our model, its optimizer)"""
    model = importlib.import_module(cfg.arch).Model(cfg.model).to(device)
    return model, optim.Optimizer(model, "adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)


def nanogpt_model(cfg, device):
    """(nanoGPT's model of the same shape, its own optimizer)"""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(cfg.nanogpt) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    c = cfg.model
    config = nanogpt.GPTConfig(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, bias=False, dropout=0.0,
                               block_size=c.block_size, vocab_size=c.vocab_size)
    model = nanogpt.GPT(config).to(device)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, device.type)
    # torch's optimizers keep their rate to themselves; ours takes a factor on it
    return model, SimpleNamespace(step=lambda scale: optimizer.step())


def stepper(model, forward, optimizer, batch_size, config, device, dtype):
    """A function that makes one training step, always on the same random tokens."""
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    idx = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=device)  # (B, T + 1)
    x = idx[:, :-1].contiguous()
    y = idx[:, 1:].contiguous()
    # it ends with .item(), which waits for a GPU
    return lambda: train.training_step(forward, model, optimizer, x, y, batch_size, autocast, grad_clip=1.0, scale=1.0)


def turn(step, seconds):
    """Median seconds of a step over a turn of at least three."""
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def take_turns(steps, rounds, seconds):
    """{name: step} -> {name: [median seconds of a step in each round]}, after a warm-up."""
    for step in steps.values():
        turn(step, 0)  # compiles, too
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(turn(step, seconds))
    return times


def compare(cfg, batch_size):
    """Print the table of one shape."""
    c = cfg.model
    device = machine.pick_device(cfg.device)
    how = ", compiled" if cfg.compile else ""
    print(f"\n{c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, block {c.block_size}, batch {batch_size}, "
          f"vocabulary {c.vocab_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}{how}")
    makers = {f"{cfg.arch}.py": our_model}
    if cfg.nanogpt:
        makers["nanoGPT"] = nanogpt_model
    steps = {}
    for name, make in makers.items():
        for dtype in (torch.bfloat16, torch.float32):
            model, optimizer = make(cfg, device)
            forward = torch.compile(model) if cfg.compile else model
            row = f"{name}, {str(dtype).removeprefix('torch.')}"
            steps[row] = stepper(model, forward, optimizer, batch_size, c, device, dtype)
    times = take_turns(steps, cfg.rounds, cfg.seconds)
    first = next(iter(times.values()))
    tokens = batch_size * c.block_size  # a step
    for name, seconds in times.items():
        # round by round: whatever slows the machine down for a while slows down both
        ratio = statistics.median(b / a for a, b in zip(first, seconds, strict=True))
        median = statistics.median(seconds)
        print(f"  train   {name:<22} {median * 1e3:8.1f} ms a step {tokens / median:10,.0f} tokens/s   {ratio:5.2f} x "
              "the time of the first")

    model = our_model(cfg, device)[0].eval()
    n = min(200, c.block_size)
    start = time.perf_counter()
    list(generate(model, [0], n, temperature=0))
    speed = n / (time.perf_counter() - start)
    print(f"  decode  {cfg.arch}.py, float32, one row of {n} tokens: {speed:,.0f} tokens/s")


def main(cfg):
    if cfg.nanogpt and not (Path(cfg.nanogpt) / "model.py").is_file():
        raise files.UserError(f"--nanogpt={cfg.nanogpt} has no model.py: give the folder of a clone of nanoGPT")
    if cfg.device == "cpu":
        machine.keep_freed_memory()
    torch.manual_seed(0)
    if cfg.batch_size:
        model = replace(cfg.model, vocab_size=cfg.model.vocab_size or 65)  # 65: the characters of tinyshakespeare
        compare(replace(cfg, model=model), cfg.batch_size)
        return
    for shape, batch_size in SHAPES:
        compare(replace(cfg, model=replace(cfg.model, vocab_size=65, **shape)), batch_size)


if __name__ == "__main__":
    configurator.run(main, Config)
