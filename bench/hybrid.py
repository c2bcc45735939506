"""The hybrid beside transformers' Jamba and beside a dense model: training, longer contexts, decoding.

    python bench/hybrid.py                                   # all of it
    python bench/hybrid.py --parts=decode --rounds=1

A training step is that of train.py (forward, backward, clipping at 1, update) with AdamW. The shape is that of the
recipe; the dense model (model.py) has the same, with an MLP that makes up for the difference in parameters.
transformers takes part in the first comparison, without mamba-ssm: with bfloat16 autocast, as ours, and in float32.
"""
import json
import re
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import hybrid_ssm as hybrid
import model as dense
import optim
import train
from bench.speed import BETAS, LEARNING_RATE, WEIGHT_DECAY, stepper, take_turns, turn
from formats.names import n_hidden
from thimble import configurator, machine
from thimble.files import UserError

MODELS = ("mamba2", "mamba1", "dense")


@dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = ("length", "jamba", "decode")  # what to measure
    recipe: str = str(ROOT / "config/nexus_bytes.py")  # recipe whose shape to take
    batch_size: int = 16            # jamba: sequences in a step
    tokens: int = 8192              # length: tokens in a step
    lengths: tuple[int, ...] = (128, 512, 2048, 8192)  # length: contexts to train with
    contexts: tuple[int, ...] = (100, 8000)  # decode: tokens before the one that is timed
    rounds: int = 3                 # the contestants take turns, so that all see the same machine
    seconds: float = 4.0            # of each turn
    case: str = ""                  # internal: measure this model alone, at the first of the lengths; prints JSON

    def __post_init__(self):
        configurator.check(self, positive=("batch_size", "tokens", "lengths", "contexts", "rounds", "seconds"))
        for name in ("lengths", "contexts"):
            if not getattr(self, name):
                raise ValueError(f"{name}=() must name at least one")
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"parts={part} must be one of {', '.join(PARTS)}")
        for length in self.lengths:
            if self.tokens % length:
                raise ValueError(f"lengths={length} must divide tokens={self.tokens}")


def size(model):
    return sum(p.numel() for p in model.parameters())


def build(cfg, name, block_size):
    """A model of the recipe's shape. The dense one gets the MLP with which it comes closest to mamba2's size."""
    recipe = configurator.load(train.Config, cfg.recipe)
    if recipe.arch != "hybrid_ssm":
        raise UserError(f"--recipe={cfg.recipe} is for {recipe.arch}: name one for hybrid_ssm")
    c = replace(recipe.model, block_size=block_size, vocab_size=recipe.model.vocab_size or 257)
    if name != "dense":
        return hybrid.Model(replace(c, ssm=name))
    shared = {}
    for field in fields(dense.Config):
        if hasattr(c, field.name):
            shared[field.name] = getattr(c, field.name)
    thin = replace(dense.Config(**shared), n_hidden=1)
    with torch.device("meta"):  # sizes only
        missing = size(hybrid.Model(replace(c, ssm="mamba2"))) - size(dense.Model(thin))
    per_neuron = 3 * c.n_embd * c.n_layer  # its weights in gate, up and down
    return dense.Model(replace(thin, n_hidden=1 + round(missing / per_neuron)))


# ---- training
def training(model, batch_size, dtype=torch.bfloat16):
    """A function that makes one training step of a model of ours."""
    optimizer = optim.Optimizer(model, "adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    return stepper(model, model, optimizer, batch_size, model.config, torch.device("cpu"), dtype)


def jamba_training(ours, batch_size, dtype):
    """The same for transformers' Jamba, in the shape of `ours`. ImportError without transformers."""
    import transformers
    c = ours.config
    config = transformers.JambaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=n_hidden(ours),
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head or c.n_head,
        attn_layer_period=c.attn_layer_period, attn_layer_offset=c.attn_layer_offset, mamba_d_state=c.d_state or 16,
        mamba_d_conv=c.d_conv, mamba_expand=c.expand, mamba_dt_rank=c.dt_rank or "auto", num_experts=1,
        num_experts_per_tok=1, expert_layer_period=1, expert_layer_offset=0, tie_word_embeddings=c.tie_embeddings,
        pad_token_id=None, use_cache=False, use_mamba_kernels=False)
    model = transformers.JambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)

    def forward(idx, targets):
        logits = model(idx).logits.float()
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    # torch's optimizers keep their rate to themselves; ours takes a factor on it
    optimizer = SimpleNamespace(step=lambda scale, update=optimizer.step: update())
    return stepper(model, forward, optimizer, batch_size, c, torch.device("cpu"), dtype)


def beside_jamba(cfg):
    """Training steps of both kinds of Mamba and of transformers' Jamba."""
    block_size = configurator.load(train.Config, cfg.recipe).model.block_size
    steps = {}
    for name in ("mamba2", "mamba1"):
        model = build(cfg, name, block_size)
        steps[f"{name}, bfloat16"] = training(model, cfg.batch_size)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"transformers' Jamba, {str(dtype).removeprefix('torch.')}"
            steps[name] = jamba_training(model, cfg.batch_size, dtype)
    except ImportError:
        print("\nwithout Jamba: pip install transformers")
    print(f"\ntraining, {cfg.batch_size} x {block_size} tokens a step")
    times = take_turns(steps, cfg.rounds, cfg.seconds)
    first = times["mamba2, bfloat16"]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(b / a for a, b in zip(first, seconds, strict=True))
        speed = cfg.batch_size * block_size / median
        print(f"  {name:<30} {median * 1e3:10.1f} ms a step {speed:10,.0f} tokens/s {ratio:8.2f} x the time of the "
              "first", flush=True)


# ---- training by length of context
def peak():
    """The most memory that this process has held, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would start at what the parent process held
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def one_case(cfg):
    """Print tokens per second and memory beyond the weights, as JSON."""
    length = cfg.lengths[0]
    model = build(cfg, cfg.case, length)
    before = peak()
    step = training(model, cfg.tokens // length)
    turn(step, 0)
    speed = cfg.tokens / turn(step, cfg.seconds)
    print(json.dumps({"tokens_per_second": speed, "mib": peak() - before}))


def measured(cfg, name, length):
    """What `one_case` prints in a process of its own: memory that one case has held must not count for the next."""
    command = [sys.executable, __file__, f"--case={name}", f"--lengths={length}", f"--tokens={cfg.tokens}",
               f"--recipe={cfg.recipe}", f"--seconds={cfg.seconds}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        *_, last = ["no output", *done.stderr.strip().splitlines()]
        raise UserError(f"{name} at context {length} failed: {last}")
    return json.loads(done.stdout)


def by_length(cfg):
    """Training steps of the same number of tokens in fewer, longer sequences."""
    sizes = ", ".join(f"{name} {size(build(cfg, name, 128)):,} parameters" for name in MODELS)
    print(f"\ntraining by context, {sizes}; {cfg.tokens:,} tokens a step: tokens/s (x dense), peak MiB beyond the "
          "weights")
    print(f"  {'context':>8}" + "".join(f"{name:>28}" for name in MODELS), flush=True)
    for length in cfg.lengths:
        results = {name: [] for name in MODELS}
        for _ in range(cfg.rounds):
            for name in MODELS:
                results[name].append(measured(cfg, name, length))
        line = f"  {length:>8,}"
        for name in MODELS:
            speeds = [result["tokens_per_second"] for result in results[name]]
            of_dense = [result["tokens_per_second"] for result in results["dense"]]
            ratio = statistics.median(a / b for a, b in zip(speeds, of_dense, strict=True))
            mib = max(result["mib"] for result in results[name])
            line += f"{f'{statistics.median(speeds):,.0f} ({ratio:.2f})':>18}{mib:>6,.0f} MiB"
        print(line, flush=True)


# ---- decoding
@torch.no_grad()
def decoding(cfg):
    """One token after contexts of several lengths."""
    max_len = max(cfg.contexts) + 1
    print(f"\ndecoding one row in float32, tokens/s\n  {'context':>8}" + "".join(f"{name:>12}" for name in MODELS))
    models = {name: build(cfg, name, max_len).eval() for name in MODELS}
    for context in cfg.contexts:
        steps = {name: decoder(model, context, max_len) for name, model in models.items()}
        times = take_turns(steps, cfg.rounds, cfg.seconds)
        speeds = [1 / statistics.median(times[name]) for name in MODELS]
        print(f"  {context:>8,}" + "".join(f"{speed:>12,.0f}" for speed in speeds), flush=True)


def decoder(model, context, max_len):
    """A function that decodes the token after a random context, always the same one."""
    cache = model.init_cache(1, max_len)
    idx = torch.randint(model.config.vocab_size, (1, context))
    for part in idx.split(500, 1):
        _, cache = model.step(part, cache)
    # what step returns is dropped: so the position, and with it the context, stays
    return lambda: model.step(idx[:, :1], cache)


PARTS = {"length": by_length, "jamba": beside_jamba, "decode": decoding}


def main(cfg):
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
