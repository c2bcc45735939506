"""Tokens per second: training steps and decoding of a model file, beside nanoGPT's model of the same shape.

    python bench/speed.py                                    # ours alone
    python bench/speed.py --nanogpt=../nanoGPT               # beside a clone of karpathy/nanoGPT, taking turns
    python bench/speed.py --device=cuda --batch_size=64      # on a GPU

A training step is forward, backward, clipping at 1 and AdamW, the same for both. nanoGPT computes in float32 on a CPU
(its train.py has no other way); the row "nanoGPT, bfloat16" gives it the autocast that it lacks.
"""
import importlib
import importlib.util
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import optim
from thimble import configurator, files, machine
from thimble.generate import generate


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
    compile: bool = False           # torch.compile for everyone, timed after it is done
    device: str = "cpu"

    def __post_init__(self):
        configurator.resolve(self)


def our_step(cfg, batch_size, device, dtype):
    model = importlib.import_module(cfg.arch).Model(cfg.model).to(device)
    optimizer = optim.Optimizer(model, "adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    forward = torch.compile(model) if cfg.compile else model
    return stepper(model, forward, lambda: optimizer.step(1.0), batch_size, cfg.model, device, dtype), model


def nanogpt_step(cfg, batch_size, device, dtype):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(cfg.nanogpt) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    c = cfg.model
    model = nanogpt.GPT(nanogpt.GPTConfig(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, bias=False, dropout=0.0,
                                          block_size=c.block_size, vocab_size=c.vocab_size)).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    forward = torch.compile(model) if cfg.compile else model
    return stepper(model, forward, optimizer.step, batch_size, c, device, dtype)


def stepper(model, forward, update, batch_size, c, device, dtype):
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    idx = torch.randint(c.vocab_size, (batch_size, c.block_size + 1), device=device)

    def step():
        with autocast:
            loss = forward(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update()
        for p in model.parameters():
            p.grad = None
        return loss.item()                                 # waits for a GPU
    return step


def turn(step, seconds):
    """Median seconds of a step over a turn."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(cfg, batch_size):
    c, device = cfg.model, machine.pick_device(cfg.device)
    print(f"\n{c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, block {c.block_size}, batch {batch_size}, "
          f"vocabulary {c.vocab_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
          f"{', compiled' * cfg.compile}")
    step, model = our_step(cfg, batch_size, device, torch.bfloat16)
    steps = {f"{cfg.arch}.py, bfloat16": step,
             f"{cfg.arch}.py, float32": our_step(cfg, batch_size, device, torch.float32)[0]}
    if cfg.nanogpt:
        with torch.random.fork_rng():
            steps["nanoGPT, float32"] = nanogpt_step(cfg, batch_size, device, torch.float32)
            steps["nanoGPT, bfloat16"] = nanogpt_step(cfg, batch_size, device, torch.bfloat16)
    for step in steps.values():
        turn(step, 0)                                      # warm up, compile
    times = {name: [] for name in steps}
    for _ in range(cfg.rounds):
        for name, step in steps.items():
            times[name].append(turn(step, cfg.seconds))
    first, tokens = next(iter(times.values())), batch_size * c.block_size
    for name, seconds in times.items():
        ratio = statistics.median(b / a for a, b in zip(first, seconds, strict=True))
        print(f"  train   {name:<22} {statistics.median(seconds) * 1e3:8.1f} ms a step "
              f"{tokens / statistics.median(seconds):10,.0f} tokens/s   {ratio:5.2f} x the time of the first")
    model.eval()
    n, start = min(200, c.block_size), time.perf_counter()
    list(generate(model, [0], n, temperature=0))
    print(f"  decode  {cfg.arch}.py, float32, one row of {n} tokens: {n / (time.perf_counter() - start):,.0f} tokens/s")


def main(cfg):
    if cfg.nanogpt and not (Path(cfg.nanogpt) / "model.py").is_file():
        raise files.UserError(f"--nanogpt={cfg.nanogpt}: no model.py there: give the folder of a clone")
    if cfg.device == "cpu":
        machine.keep_freed_memory()
    torch.manual_seed(0)
    if cfg.batch_size:
        return compare(replace(cfg, model=replace(cfg.model, vocab_size=cfg.model.vocab_size or 65)), cfg.batch_size)
    for shape, batch_size in (({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}, 12),
                              ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 8)):
        compare(replace(cfg, model=replace(cfg.model, vocab_size=65, **shape)), batch_size)


if __name__ == "__main__":
    configurator.run(main, Config)
