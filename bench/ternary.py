"""Ternary inference: the kernel by shape, path and threads, beside torch and llama.cpp; decoding beside plain torch.

    python bench/ternary.py                                  # all of it, three minutes
    python bench/ternary.py --checkpoint=runs/tiny_cpu       # and whether that model, packed, gives the same results

GOPS are 2 x multiply-adds / seconds / 10^9; "read" is the share of the rate at which memchr reads as many bytes here.
llama.cpp takes part after `pip install gguf xllamacpp`: it decodes a one-layer model of TQ2_0 matrices of the given
widths, ours runs the same seven matrices one after the other.
"""
import ctypes
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ternary
from kernels import ternary as kernel
from thimble import checkpoint, configurator, data, load
from thimble.files import UserError
from thimble.generate import generate

SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008), (768, 2048))  # of a matrix (N, K), or (n_embd, n_hidden)


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""            # of a ternary model, to decode with and to compare; empty: a random one
    rounds: int = 3                 # the contestants take turns
    seconds: float = 0.3            # of each turn
    threads: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        configurator.check(self, positive=("rounds", "seconds", "threads"))
        if not self.threads:
            raise ValueError("threads=() must name at least one number")


def race(contestants, rounds, seconds):
    """{name: function} -> {name: least seconds per call}."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, call in contestants.items():
            best[name] = min(best[name], seconds_per_call(call, seconds))
    return best


def seconds_per_call(call, seconds):
    """Mean over a turn, after one call to warm up."""
    call()
    n = 0
    start = time.perf_counter()
    while True:
        call()
        n += 1
        passed = time.perf_counter() - start
        if passed >= seconds:
            return passed / n


def counted(threads):
    return "1 thread" if threads == 1 else f"{threads} threads"


# ---- the kernel
def paths_here():
    """{name: isa} of the kernel's paths that this CPU runs."""
    best = kernel.library().isa
    paths = {}
    for name, isa in kernel.ISAS.items():
        if isa in (0, best) or (name == "avx2" and best == kernel.ISAS["avx512"]):
            paths[name] = isa
    return paths


def reader(n_bytes, threads, times):
    """A function that reads n_bytes with several threads, several times, and does nothing else."""
    memory = np.zeros(n_bytes, np.uint8)
    part = n_bytes // threads
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memchr.restype = ctypes.c_void_p
    pool = ThreadPoolExecutor(threads)

    def read(i):
        for _ in range(times):
            libc.memchr(memory.ctypes.data + i * part, 1, part)  # finds no 1: reads to the end
    return lambda: list(pool.map(read, range(threads)))


def matrix(n, k, group_size=0):
    """Random (codes, scales, group_size) for kernel.linear."""
    codes = kernel.pack(torch.randint(-1, 2, (n, k), dtype=torch.int8))
    scales = torch.rand((k // group_size, n) if group_size else ())
    return codes, scales, group_size


def on_path(isa, x, w):
    """A function that multiplies x by w on one of the kernel's paths."""
    def call():
        kernel.library().isa = isa
        kernel.linear(x, *w)
    return call


def kernels(cfg, threads):
    """A table of GOPS for one token: a row per shape, a column per path and competitor."""
    paths = paths_here()
    best_isa = kernel.library().isa
    best_name = next(name for name, isa in paths.items() if isa == best_isa)
    columns = (*paths, "groups of 128", "twin", "torch f32", "bf16")
    print(f"\n{counted(threads)}, one token, GOPS")
    print(f"{'N x K':>14}" + "".join(f"{name:>16}" for name in columns) + f"{'GB/s (read)':>18}")
    n_reads = 50  # in one call, as one is over too soon to be timed
    for n, k in SHAPES:
        x = torch.randn(1, k)
        w = matrix(n, k)
        dense = torch.randn(n, k)
        x_half, half = x.bfloat16(), dense.bfloat16()
        contestants = {name: on_path(isa, x, w) for name, isa in paths.items()}
        contestants["groups of 128"] = on_path(best_isa, x, matrix(n, k, 128))
        contestants["twin"] = lambda x=x, w=w: kernel.linear_torch(x, *w)
        contestants["torch f32"] = lambda x=x, dense=dense: F.linear(x, dense)
        contestants["bf16"] = lambda x=x_half, dense=half: F.linear(x, dense)
        contestants["read"] = reader(n * k // 4, threads, n_reads)
        best = race(contestants, cfg.rounds, cfg.seconds)
        gigabytes = n * k / 4 / 1e9  # four weights a byte
        rate = gigabytes / best[best_name]
        share = rate / (n_reads * gigabytes / best["read"])
        gops = "".join(f"{2 * n * k / 1e9 / best[name]:>16.1f}" for name in columns)
        print(f"{f'{n} x {k}':>14}{gops}{f'{rate:.0f} ({share:.0%})':>18}", flush=True)
    kernel.library().isa = best_isa


# ---- llama.cpp
def llama_model(path, n_embd, n_hidden):
    """Write a GGUF file of one llama layer with TQ2_0 matrices and 300 tokens -> the shapes of its matrices."""
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(1)
    writer.add_head_count(8)
    writer.add_feed_forward_length(n_hidden)
    writer.add_vocab_size(300)
    writer.add_rope_dimension_count(n_embd // 8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [chr(256 + i) + "x" * (i // 150) for i in range(300)]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 300)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_eos_token_id(299)

    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.standard_normal((300, n_embd), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
    shapes = {"attn_q": (n_embd, n_embd), "attn_k": (n_embd, n_embd), "attn_v": (n_embd, n_embd),
              "attn_output": (n_embd, n_embd), "ffn_gate": (n_hidden, n_embd), "ffn_up": (n_hidden, n_embd),
              "ffn_down": (n_embd, n_hidden)}
    kind = gguf.GGMLQuantizationType.TQ2_0
    for name, shape in shapes.items():
        weights = rng.integers(-1, 2, shape).astype(np.float32)
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return list(shapes.values())


def llama_server(path, threads):
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 512
    params.n_parallel = 1
    params.verbosity = -1
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def beside_llama(cfg, threads):
    """The matrices of a layer, ours and llama.cpp's."""
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError:
        print("\nwithout llama.cpp: pip install gguf xllamacpp")
        return
    print(f"\n{counted(threads)}, the seven matrices of a layer, GOPS: llama.cpp TQ2_0, ours, ratio")
    prompt = {"prompt": [1, 2, 3], "n_predict": 64, "ignore_eos": True, "top_k": 1}
    for n_embd, n_hidden in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            shapes = llama_model(path, n_embd, n_hidden)
            server = llama_server(path, threads)
            layer = [(torch.randn(1, k), matrix(n, k)) for n, k in shapes]
            work = sum(2 * n * k for n, k in shapes) / 1e9
            ours = theirs = 0
            for _ in range(cfg.rounds):
                done = server.handle_completions(prompt)
                theirs = max(theirs, work * done["timings"]["predicted_per_second"])
                seconds = seconds_per_call(lambda layer=layer: [kernel.linear(x, *w) for x, w in layer], cfg.seconds)
                ours = max(ours, work / seconds)
            del server  # before the file it has mapped goes
        print(f"{f'{n_embd} x {n_hidden}':>14}{theirs:>12.1f}{ours:>12.1f}{ours / theirs:>10.1f}", flush=True)


# ---- whole models
def decoder(model, autocast=False):
    """A function that decodes one token, from the start again after 128."""
    token = torch.tensor([[7]])
    max_len = model.config.block_size
    cache = model.init_cache(1, max_len)

    def call():
        nonlocal cache
        if cache["pos"] == min(128, max_len):
            cache = model.init_cache(1, max_len)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, cache = model.step(token, cache)
    return call


@torch.no_grad()
def decoding(cfg, threads):
    """Tokens per second as it was trained and packed."""
    if cfg.checkpoint:
        model = checkpoint.load_model(load.read(cfg.checkpoint, which="best")).eval()
    else:
        model = ternary.Model(ternary.Config(n_layer=4, n_head=4, n_embd=256, n_hidden=512, vocab_size=4096)).eval()
    packed = load.deployed(model)
    contestants = {"f32": decoder(model), "bf16": decoder(model, autocast=True), "packed": decoder(packed)}
    best = race(contestants, cfg.rounds, 1.0)
    speeds = {name: 1 / seconds for name, seconds in best.items()}
    ratio = speeds["packed"] / max(speeds["f32"], speeds["bf16"])
    print(f"\n{counted(threads)}, decoding up to 128 tokens, tokens/s: plain torch float32 {speeds['f32']:,.0f}, "
          f"bfloat16 {speeds['bf16']:,.0f}, packed {speeds['packed']:,.0f}: {ratio:.1f} x", flush=True)


@torch.no_grad()
def parity(saved, model):
    """The packed model beside the one that was trained: logits over validation text, 50 greedy texts, bytes.

    The compiled step computes in float64, so the trained model does too where it is compared with that.
    """
    packed = load.deployed(model)
    exact = deepcopy(model).double()
    dataset = data.load(saved.meta["dataset"]["path"])
    block_size = model.config.block_size
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.deploy_state().values())
    print(f"{saved.path}: {size:,} bytes packed ({size / 2**20:.2f} MiB)")

    starts = torch.linspace(0, len(dataset.val) - block_size - 1, 50).long().tolist()
    windows = [torch.from_numpy(dataset.val[start:start + block_size].astype("int64")) for start in starts]
    idx = torch.stack(windows)                             # (50, block_size)
    difference = (packed(idx)[0] - model(idx)[0]).abs().max()
    print(f"50 windows of {block_size} tokens, max |difference of logits|: {difference:.1e}")

    whole, _ = exact(idx)
    cache = packed.init_cache(50, block_size)
    difference = 0.0
    for t in range(block_size):
        logits, cache = packed.step(idx[:, t:t + 1], cache)
        difference = max(difference, (logits - whole[:, t]).abs().max().item())
    print(f"token by token through the compiled step, beside the trained model in float64: {difference:.1e}")

    same = 0
    parted = []  # where the other texts part
    for row in idx[:, :16].tolist():
        one, other = (list(generate(m, row, 64, temperature=0)) for m in (exact, packed))
        if one == other:
            same += 1
        else:
            parted.append(next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b))
    others = f", the others part at {parted}" if parted else ""
    print(f"greedy: {same} of 50 texts of 64 tokens identical{others}", flush=True)


def main(cfg):
    if kernel.library() is None:
        raise UserError("no C++ compiler here, so nothing to measure: install g++ or clang++")
    if cfg.checkpoint:
        saved = load.read(cfg.checkpoint, which="best")
        model = checkpoint.load_model(saved).eval()
        if not isinstance(model, ternary.Model) or model.config.packed:
            raise UserError(f"--checkpoint={cfg.checkpoint} must be a ternary model as it was trained, not another "
                            "kind and not packed")
        parity(saved, model)
    for threads in cfg.threads:
        torch.set_num_threads(threads)
        decoding(cfg, threads)
        kernels(cfg, threads)
        beside_llama(cfg, threads)


if __name__ == "__main__":
    configurator.run(main, Config)
