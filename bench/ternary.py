"""Ternary inference: the kernel by shape, path and threads, beside torch and llama.cpp; decoding beside plain torch.

    python bench/ternary.py                                  # all of it, three minutes
    python bench/ternary.py --checkpoint=runs/tiny_cpu       # and whether that model, packed, says the same

GOPS are 2 x multiply-adds / seconds; "read" is the share of the rate at which memchr reads as many bytes here.
llama.cpp takes part where `pip install gguf xllamacpp` is: it decodes a one-layer model of TQ2_0 matrices of the named
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
from thimble import checkpoint, configurator, data, files, load
from thimble.generate import generate
from thimble.load import deployed


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""            # of a ternary model, to decode with and to compare; empty: a random one
    rounds: int = 3                 # the contestants take turns
    seconds: float = 0.3            # of each turn
    threads: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.rounds < 1 or not self.seconds > 0 or not self.threads or min(self.threads) < 1:
            raise ValueError(f"rounds={self.rounds}, seconds={self.seconds} and threads={self.threads} must be above 0")


def race(contestants, rounds, seconds):
    """{name: function} -> {name: least seconds a call}."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, call in contestants.items():
            call()
            n, begun = 0, time.perf_counter()
            while (now := time.perf_counter()) - begun < seconds or not n:
                call()
                n += 1
            best[name] = min(best[name], (now - begun) / max(n, 1))
    return best


def reader(n_bytes, threads, times):
    """A function that reads n_bytes with so many threads, so many times, and does nothing else."""
    data, libc, part = np.zeros(n_bytes, np.uint8), ctypes.CDLL(None), n_bytes // threads
    libc.memchr.argtypes, libc.memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    pool = ThreadPoolExecutor(threads)

    def read(i):
        for _ in range(times):
            libc.memchr(data.ctypes.data + i * part, 1, part)
    return lambda: list(pool.map(read, range(threads)))


def matrix(n, k, group_size=0):
    codes = kernel.pack(torch.randint(-1, 2, (n, k), dtype=torch.int8))
    return codes, torch.rand((k // group_size, n) if group_size else ()), group_size


def on(isa, x, w):
    def call():
        lib.isa = isa
        kernel.linear(x, *w)
    return call


def kernels(cfg, threads):
    paths = {name: isa for name, isa in kernel.ISAS.items() if isa in (0, lib.best) or (name, lib.best) == ("avx2", 2)}
    print(f"\n{threads} thread{'s' * (threads > 1)}, one token, GOPS"
          f"\n{'N x K':>14}" + "".join(f"{name:>16}" for name in (*paths, "groups of 128", "twin", "torch f32", "bf16"))
          + f"{'GB/s (read)':>18}")
    for n, k in ((2048, 2048), (4096, 4096), (4096, 11008), (768, 2048)):
        x, w, groups, dense = torch.randn(1, k), matrix(n, k), matrix(n, k, 128), torch.randn(n, k)
        half, x_half = dense.bfloat16(), x.bfloat16()
        contestants = {name: on(isa, x, w) for name, isa in paths.items()}
        contestants |= {"groups of 128": on(lib.best, x, groups), "twin": lambda x=x, w=w: kernel.linear_torch(x, *w),
                        "torch f32": lambda x=x, d=dense: F.linear(x, d),
                        "bf16": lambda x=x_half, d=half: F.linear(x, d), "read": reader(n * k // 4, threads, 50)}
        best = race(contestants, cfg.rounds, cfg.seconds)
        rate = n * k / 4 / 1e9 / best[next(name for name, isa in paths.items() if isa == lib.best)]
        share = rate / (50 * n * k / 4 / 1e9 / best["read"])
        print(f"{f'{n} x {k}':>14}" + "".join(f"{2 * n * k / 1e9 / seconds:>16.1f}" for name, seconds in best.items()
                                              if name != "read") + f"{f'{rate:.0f} ({share:.0%})':>18}", flush=True)
    lib.isa = lib.best


def llama_model(path, n_embd, n_hidden):
    """A GGUF file: one llama layer of TQ2_0 matrices, a vocabulary of 300 bytes-and-a-few."""
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("context_length", 1024), ("embedding_length", n_embd), ("block_count", 1), ("head_count", 8),
                        ("feed_forward_length", n_hidden), ("vocab_size", 300), ("rope_dimension_count", n_embd // 8)):
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [chr(256 + i) + "x" * (i // 150) for i in range(300)]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 300)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_eos_token_id(299)
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (n_embd, n_embd), "attn_k": (n_embd, n_embd), "attn_v": (n_embd, n_embd),
              "attn_output": (n_embd, n_embd), "ffn_gate": (n_hidden, n_embd), "ffn_up": (n_hidden, n_embd),
              "ffn_down": (n_embd, n_hidden)}
    writer.add_tensor("token_embd.weight", rng.standard_normal((300, n_embd), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
    kind = gguf.GGMLQuantizationType.TQ2_0
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.integers(-1, 2, shape).astype(np.float32), kind)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=kind)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return list(shapes.values())


def beside_llama(cfg, threads):
    try:
        import gguf  # noqa: F401
        import xllamacpp
    except ImportError:
        print("\nno llama.cpp beside it: pip install gguf xllamacpp")
        return
    print(f"\n{threads} thread{'s' * (threads > 1)}, the seven matrices of a layer, GOPS: llama.cpp TQ2_0, ours, ratio")
    for n_embd, n_hidden in ((2048, 2048), (4096, 4096), (4096, 11008), (768, 2048)):
        with tempfile.TemporaryDirectory() as folder:
            shapes = llama_model(Path(folder) / "m.gguf", n_embd, n_hidden)
            params = xllamacpp.CommonParams()
            params.model.path, params.n_ctx, params.n_parallel, params.verbosity = f"{folder}/m.gguf", 512, 1, -1
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
            server, layer = xllamacpp.Server(params), [(torch.randn(1, k), matrix(n, k)) for n, k in shapes]
            work, ours, theirs = sum(2 * n * k for n, k in shapes) / 1e9, 0, 0
            for _ in range(cfg.rounds):
                done = server.handle_completions({"prompt": [1, 2, 3], "n_predict": 64, "ignore_eos": True, "top_k": 1})
                theirs = max(theirs, work * done["timings"]["predicted_per_second"])
                best = race({"": lambda layer=layer: [kernel.linear(x, *w) for x, w in layer]}, 1, cfg.seconds)
                ours = max(ours, work / best[""])
            del server
        print(f"{f'{n_embd} x {n_hidden}':>14}{theirs:>12.1f}{ours:>12.1f}{ours / theirs:>10.1f}", flush=True)


@torch.no_grad()
def decoding(cfg, threads):
    if cfg.checkpoint:
        model = checkpoint.load_model(load.read(cfg.checkpoint, which="best")).eval()
    else:
        model = ternary.Model(ternary.Config(n_layer=4, n_head=4, n_embd=256, n_hidden=512, vocab_size=4096)).eval()
    packed, token = deployed(model), torch.tensor([[7]])

    def decode(model, dtype=None):
        cache = model.init_cache(1, model.config.block_size)

        def call():
            nonlocal cache
            if cache["pos"] == min(128, model.config.block_size):
                cache = model.init_cache(1, model.config.block_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                _, cache = model.step(token, cache)
        return call

    best = race({"f32": decode(model), "bf16": decode(model, "bf16"), "packed": decode(packed)}, cfg.rounds, 1.0)
    speeds = {name: 1 / seconds for name, seconds in best.items()}
    print(f"\n{threads} thread{'s' * (threads > 1)}, decoding up to 128 tokens, tokens/s: plain torch float32 "
          f"{speeds['f32']:,.0f}, bfloat16 {speeds['bf16']:,.0f}, packed {speeds['packed']:,.0f}: "
          f"{speeds['packed'] / max(speeds['f32'], speeds['bf16']):.1f} x", flush=True)


@torch.no_grad()
def parity(cfg):
    """The packed model beside the one that was trained: logits over validation text, 50 greedy texts, bytes.

    The compiled step computes in float64, so the trained model does too where it is compared with that.
    """
    loaded = load.read(cfg.checkpoint, which="best")
    model, dataset = checkpoint.load_model(loaded).eval(), data.load(loaded.meta["dataset"]["path"])
    packed, exact, block_size = deployed(model), deepcopy(model).double(), model.config.block_size
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.deploy_state().values())
    print(f"{loaded.path}: {size:,} bytes packed ({size / 2**20:.2f} MiB)")
    starts = torch.linspace(0, len(dataset.val) - block_size - 1, 50).long().tolist()
    idx = torch.stack([torch.from_numpy(dataset.val[i:i + block_size].astype("int64")) for i in starts])
    apart = (packed(idx)[0] - model(idx)[0]).abs().max()
    print(f"50 windows of {block_size} tokens, max |difference of logits|: {apart:.1e}")
    whole, cache, apart = exact(idx)[0], packed.init_cache(50, block_size), 0.0
    for t in range(block_size):
        logits, cache = packed.step(idx[:, t:t + 1], cache)
        apart = max(apart, (logits - whole[:, t]).abs().max().item())
    print(f"token by token through the compiled step, beside the trained model in float64: {apart:.1e}")
    same, where = 0, []
    for row in idx[:, :16].tolist():
        texts = [list(generate(m, row, 64, temperature=0)) for m in (exact, packed)]
        same += texts[0] == texts[1]
        where += [i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b][:1]
    others = f", others part at {where}" if where else ""
    print(f"greedy: {same} of 50 texts of 64 tokens identical{others}", flush=True)


def main(cfg):
    global lib
    lib = kernel.library()
    if lib is None:
        raise files.UserError("no C++ compiler here, so nothing to measure: install g++ or clang++")
    lib.best = lib.isa
    if cfg.checkpoint:
        model = checkpoint.load_model(load.read(cfg.checkpoint, which="best"))
        if not isinstance(model, ternary.Model) or model.config.packed:
            raise files.UserError(f"--checkpoint={cfg.checkpoint} must be a ternary model as it was trained, "
                                         "not another kind and not packed")
        parity(cfg)
    for threads in cfg.threads:
        torch.set_num_threads(threads)
        decoding(cfg, threads)
        kernels(cfg, threads)
        beside_llama(cfg, threads)


if __name__ == "__main__":
    configurator.run(main, Config)
