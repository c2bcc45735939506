"""The hybrid: training beside transformers' Jamba, and what a longer context costs, beside a dense model.

    python bench/hybrid.py                                   # all of it
    python bench/hybrid.py --parts=decode --rounds=1

A training step is forward, backward, clipping at 1 and AdamW, as in bench/speed.py. The shape is that of the recipe;
the dense model (model.py) has the same, with an MLP so wide that it has as many parameters. transformers takes part in
the first comparison, without mamba-ssm: with bfloat16 autocast, as ours, and in float32.
"""
import json
import re
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import hybrid_ssm as hybrid
import model as dense
import optim
import train
from bench.speed import stepper, turn
from thimble import configurator, files, machine

CPU = torch.device("cpu")
MODELS = ("mamba2", "mamba1", "dense")


@dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = ("length", "jamba", "decode")  # what to measure
    recipe: str = str(ROOT / "config/nexus_bytes.py")  # whose shape to take
    batch_size: int = 16            # jamba: sequences a step
    tokens: int = 8192              # length: tokens a step
    lengths: tuple[int, ...] = (128, 512, 2048, 8192)  # length: contexts to train with
    contexts: tuple[int, ...] = (100, 8000)  # decode: tokens before the one that is timed
    rounds: int = 3                 # the contestants take turns, so that all see the same machine
    seconds: float = 4.0            # of each turn
    case: str = ""                  # for the script's own use: measure this model at the first of the lengths, as JSON

    def __post_init__(self):
        for name in ("batch_size", "tokens", "lengths", "contexts", "rounds", "seconds"):
            value = getattr(self, name)
            if not value or min(value if isinstance(value, tuple) else (value,)) <= 0:
                raise ValueError(f"{name}={value} must be above 0")


def parameters(kind, c):
    with torch.device("meta"):
        return sum(p.numel() for p in kind.Model(c).parameters())


def build(cfg, name, block_size):
    """A model of the recipe's shape. The dense one gets the MLP with which it comes closest to mamba2's size."""
    recipe = configurator.load(train.Config, cfg.recipe)
    if recipe.arch != "hybrid_ssm":
        raise files.UserError(f"--recipe={cfg.recipe} is of a {recipe.arch}: give one of hybrid_ssm")
    c = replace(recipe.model, block_size=block_size, vocab_size=recipe.model.vocab_size or 257)
    if name != "dense":
        return hybrid.Model(replace(c, ssm=name))
    shared = {f.name: getattr(c, f.name) for f in fields(dense.Config) if hasattr(c, f.name)}
    thin = dense.Config(**shared | {"n_hidden": 1})
    missing = parameters(hybrid, replace(c, ssm="mamba2")) - parameters(dense, thin)
    return dense.Model(replace(thin, n_hidden=1 + round(missing / (3 * c.n_embd * c.n_layer))))


def training(model, batch_size, dtype=torch.bfloat16):
    optimizer = optim.Optimizer(model, "adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    return stepper(model, model, lambda: optimizer.step(1.0), batch_size, model.config, CPU, dtype)


def jamba_training(c, batch_size, dtype):
    import transformers
    hf = transformers.JambaForCausalLM(transformers.JambaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden or -(-c.n_embd * 8 // 3 // 32) * 32,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head or c.n_head,
        attn_layer_period=c.attn_layer_period, attn_layer_offset=c.attn_layer_offset, mamba_d_state=c.d_state or 16,
        mamba_d_conv=c.d_conv, mamba_expand=c.expand, mamba_dt_rank=c.dt_rank or "auto", num_experts=1,
        num_experts_per_tok=1, expert_layer_period=1, expert_layer_offset=0, tie_word_embeddings=c.tie_embeddings,
        pad_token_id=None, use_cache=False, use_mamba_kernels=False)).train()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))

    def forward(idx, targets):
        logits = hf(idx).logits.float()
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return stepper(hf, forward, optimizer.step, batch_size, c, CPU, dtype)


def rounds_of(cfg, steps):
    """{name: step} -> {name: [seconds of a step in each round]}, in turns, after a warm-up."""
    for step in steps.values():
        turn(step, 0)
    times = {name: [] for name in steps}
    for _ in range(cfg.rounds):
        for name, step in steps.items():
            times[name].append(turn(step, cfg.seconds))
    return times


def beside_jamba(cfg):
    block_size = configurator.load(train.Config, cfg.recipe).model.block_size
    models = {name: build(cfg, name, block_size) for name in MODELS[:2]}
    steps = {f"{name}, bfloat16": training(m, cfg.batch_size) for name, m in models.items()}
    try:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"transformers' Jamba, {str(dtype).removeprefix('torch.')}"
            steps[name] = jamba_training(models["mamba1"].config, cfg.batch_size, dtype)
    except ImportError:
        print("\nno Jamba beside it: pip install transformers")
    print(f"\ntraining, {cfg.batch_size} x {block_size} tokens a step")
    times = rounds_of(cfg, steps)
    first = next(iter(times.values()))
    for name, seconds in times.items():
        ratio = statistics.median(b / a for a, b in zip(first, seconds, strict=True))
        print(f"  {name:<30} {statistics.median(seconds) * 1e3:10.1f} ms a step "
              f"{cfg.batch_size * block_size / statistics.median(seconds):10,.0f} tokens/s "
              f"{ratio:8.2f} x the time of the first", flush=True)


def peak():
    """Most memory that this process ever held, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():                                    # getrusage would begin at what the parent held
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def one_case(cfg):
    length = cfg.lengths[0]
    model = build(cfg, cfg.case, length)
    before, step = peak(), training(model, cfg.tokens // length)
    turn(step, 0)
    speed = cfg.tokens / turn(step, cfg.seconds)
    print(json.dumps({"tokens_per_second": speed, "mib": peak() - before}))


def by_length(cfg):
    """Each case in a process of its own."""
    sizes = {name: sum(p.numel() for p in build(cfg, name, 128).parameters()) for name in MODELS}
    print("\ntraining by context, " + ", ".join(f"{name} {n:,} parameters" for name, n in sizes.items())
          + f"; {cfg.tokens:,} tokens a step: tokens/s (x dense), peak MiB beyond the weights")
    print(f"  {'context':>8}" + "".join(f"{name:>28}" for name in MODELS), flush=True)
    for length in cfg.lengths:
        results = {name: [] for name in MODELS}
        for _ in range(cfg.rounds):
            for name in MODELS:
                command = [sys.executable, __file__, f"--case={name}", f"--lengths={length}", f"--tokens={cfg.tokens}",
                           f"--recipe={cfg.recipe}", f"--seconds={cfg.seconds}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise files.UserError(f"{name} at context {length} failed: "
                                                 f"{(done.stderr.strip().splitlines() or ['?'])[-1]}")
                results[name].append(json.loads(done.stdout))
        line = f"  {length:>8,}"
        for name in MODELS:
            speeds = [r["tokens_per_second"] for r in results[name]]
            ratio = statistics.median(a / b["tokens_per_second"] for a, b in zip(speeds, results["dense"], strict=True))
            mib = max(r["mib"] for r in results[name])
            line += f"{f'{statistics.median(speeds):,.0f} ({ratio:.2f})':>18}{mib:>6,.0f} MiB"
        print(line, flush=True)


@torch.no_grad()
def decoding(cfg):
    size = max(cfg.contexts) + 1
    print(f"\ndecoding one row in float32, tokens/s\n  {'context':>8}" + "".join(f"{name:>12}" for name in MODELS))
    models = {name: build(cfg, name, size).eval() for name in MODELS}
    for context in cfg.contexts:
        steps = {}
        for name, m in models.items():
            cache, idx = m.init_cache(1, size), torch.randint(m.config.vocab_size, (1, context))
            for part in idx.split(500, 1):
                _, cache = m.step(part, cache)
            # the same cache for every step: its position, and so the context, stays
            steps[name] = lambda m=m, token=idx[:, :1], cache=cache: m.step(token, cache)
        times = rounds_of(cfg, steps)
        print(f"  {context:>8,}" + "".join(f"{1 / statistics.median(times[name]):>12,.0f}" for name in MODELS),
              flush=True)


PARTS = {"length": by_length, "jamba": beside_jamba, "decode": decoding}


def main(cfg):
    if unknown := set(cfg.parts) - set(PARTS):
        raise files.UserError(f"--parts={','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if wrong := [n for n in cfg.lengths if cfg.tokens % n]:
        raise files.UserError(f"--lengths={wrong[0]}: must divide --tokens={cfg.tokens}")
    machine.keep_freed_memory()
    torch.manual_seed(0)
    if cfg.case:
        return one_case(cfg)
    print(f"{Path(cfg.recipe).stem}, CPU, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    for name, part in PARTS.items():
        if name in cfg.parts:
            part(cfg)


if __name__ == "__main__":
    configurator.run(main, Config)
