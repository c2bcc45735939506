"""Ternary weights at 2 bits, activations at 8: the C++ kernel (ternary.cpp) and its twin in plain torch, bit for bit.

    codes = pack(t)                                # t (N, K) of -1, 0, 1 -> uint8
    y = linear(x, codes, scales)                   # x (..., K) -> (..., N)

The kernel is compiled on first use with the machine's C++ compiler and kept in ~/.cache/thimble. Without a compiler,
and on any device but a CPU, the twin does the work (a CUDA kernel would be called beside the C++ one, in `linear`).
"""
import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
# no contraction to fused multiply-adds: every path, and the twin, must round alike; the last three change no result
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w"]
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2, "neon": 3}


def pack(t):
    """t (N, K) of -1, 0, 1 -> codes uint8 (N, ceil(K / 256) * 64), four a byte; ternary.cpp has the layout."""
    if not ((t >= -1) & (t <= 1) & (t == t.round())).all():
        raise ValueError("only -1, 0 and 1 can be packed")
    n, k = t.shape
    codes = torch.nn.functional.pad((t + 1).to(torch.uint8), (0, -k % 256), value=1)           # 1: t = 0
    codes = codes.view(n, -1, 4, 64)                                                         # planes of a block
    return (codes[:, :, 0] | codes[:, :, 1] << 2 | codes[:, :, 2] << 4 | codes[:, :, 3] << 6).flatten(1)


def unpack(codes, k):
    """codes (N, blocks * 64) -> t (N, k) int8."""
    planes = torch.stack([codes.view(len(codes), -1, 64) >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    return planes.flatten(1)[:, :k].to(torch.int8) - 1


def linear_torch(x, codes, scales, group_size=0):
    """The twin: x (..., K) -> (..., N) with float32 rounding exactly as ternary.cpp does it.

    q = round(x * s), s = 127 / max|x| a token; y = (q t^T) * (scales / s), or by groups of inputs
    ((q t^T)_0 * scales_0 + (q t^T)_1 * scales_1 + ...) / s. Sums of integers below 2^24 are exact in float32.
    """
    k = x.size(-1)
    t = unpack(codes, k).to(x.dtype)
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    q = (x * scale).round()
    if not group_size:
        return (q @ t.mT) * (scales / scale)
    total = 0
    for g, (q_g, t_g) in enumerate(zip(q.split(group_size, -1), t.split(group_size, -1), strict=True)):
        total = total + (q_g @ t_g.mT) * scales[g]
    return total / scale


def linear(x, codes, scales, group_size=0):
    """x (..., K), codes from `pack`, scales () or (K / group_size, N) -> (..., N), in x's dtype."""
    k, n = x.size(-1), len(codes)
    shape = (k // group_size, n) if group_size else ()
    if codes.shape[1] != -(-k // 256) * 64 or scales.shape != shape or group_size and k % group_size:
        raise ValueError(f"x (..., {k}) does not fit codes {tuple(codes.shape)} and scales {tuple(scales.shape)}")
    lib = library() if x.dtype == torch.float32 and x.device.type == "cpu" and group_size % 128 == 0 else None
    if lib is None:
        return linear_torch(x, codes, scales, group_size)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    lib.thimble_linear(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), y.data_ptr(), x.numel() // k, n, k,
                       group_size, lib.isa, torch.get_num_threads())
    return y


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in (
        "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "vocab_size", "group_size", "n_streams", "relu2",
        "max_len")]


class Stepper:
    """Model.step of a packed ternary model in one call a row: where its weights lie, and what it must keep of them.

    All but the head is computed in float64 (ternary.cpp says why), and so is the cache.
    """

    def __init__(self, model, rope_table):
        c, self.lib, self.rope_table, self.kept = model.config, library(), rope_table, []
        layers = []                                        # in the order of struct Layer
        for b in model.blocks:
            for norm, part, matrices, residual in (
                    (b.attn_norm, b.attn, ("q_proj", "k_proj", "v_proj", "o_proj"), b.attn_residual),
                    (b.mlp_norm, b.mlp, ("gate_proj", "up_proj", "down_proj"), b.mlp_residual)):
                layers.append(self.wide(norm, "weight"))
                for name in matrices:
                    self.kept += [getattr(part, name).codes, getattr(part, name).scales]
                    layers += [t.data_ptr() for t in self.kept[-2:]]
                layers.append(self.wide(part.sub_norm, "weight"))
                layers += [self.wide(residual, name) for name in ("bias", "gain", "proj", "scale")]
            layers += [None, None]                         # the cache's keys and values: at each call
        self.size, self.layers = len(layers) // c.n_layer, (ctypes.c_void_p * len(layers))(*layers)
        self.shape = Shape(c.n_layer, c.n_head, c.n_kv_head or c.n_head, c.n_embd, len(b.mlp.up_proj.codes),
                           c.vocab_size, c.group_size, c.n_streams, c.act == "relu2", 0)
        self.eps, self.head_dim, self.theta = c.norm_eps, c.n_embd // c.n_head, c.rope_theta
        self.embed, self.norm = model.embed.weight.detach().half(), self.wide(model.norm, "weight")

    def wide(self, module, name):
        """Address of a float64 copy of one of the module's tensors; None if it has no such."""
        if getattr(module, name, None) is None:
            return None
        self.kept.append(getattr(module, name).detach().double().contiguous())
        return self.kept[-1].data_ptr()

    def __call__(self, idx, cache):
        """idx (B, T), cache of Model.init_cache, to be filled in -> logits (B, V) float32 of the last."""
        (B, T), max_len = idx.shape, cache["layers"][0]["k"].size(2)
        places = cache["pos"].expand(B).tolist()           # one for all rows, or one each
        pos = max(places)
        if pos + T > max_len or not 0 <= int(idx.min()) <= int(idx.max()) < self.shape.vocab_size:
            raise IndexError(f"{T} ids up to {int(idx.max())} at position {pos} do not fit a cache of {max_len} and a "
                             f"vocabulary of {self.shape.vocab_size}")
        if self.shape.max_len != max_len:
            self.shape.max_len = max_len
            self.turn = [t.double() for t in self.rope_table(torch.arange(max_len), self.head_dim, self.theta)]
        logits, idx = torch.empty(B, self.shape.vocab_size), idx.long().contiguous()
        for row, pos in enumerate(places):
            cos, sin = (t.data_ptr() + 8 * pos * self.head_dim for t in self.turn)
            for i, layer in enumerate(cache["layers"]):
                for j, name in enumerate("kv", -2):
                    self.layers[(i + 1) * self.size + j] = layer[name][row].data_ptr()
            self.lib.thimble_step(ctypes.byref(self.shape), self.layers, self.embed.data_ptr(), self.norm, cos, sin,
                                  self.eps, idx[row].data_ptr(), T, pos, logits[row].data_ptr(), self.lib.isa,
                                  torch.get_num_threads())
        return logits


def stepper(model, rope_table):
    """A Stepper, or None where the kernel does not fit the model: another device, dtype or size of groups."""
    weight, group_size = model.embed.weight, model.config.group_size
    fits = weight.dtype == torch.float32 and weight.device.type == "cpu" and group_size % 128 == 0
    return Stepper(model, rope_table) if fits and library() else None


@functools.cache
def library():
    """The compiled kernel, or None, with one line of notice, where it cannot be had."""
    try:
        lib = ctypes.CDLL(str(build()))
    except (OSError, subprocess.CalledProcessError) as e:
        why = e.stderr.decode(errors="replace").strip().splitlines()[:1] if hasattr(e, "stderr") else [str(e)]
        print(f"note: no C++ kernel ({' '.join(why)}): ternary models run in plain torch, slower", file=sys.stderr)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.thimble_linear.argtypes = [pointer] * 4 + [number] * 4 + [ctypes.c_int] * 2
    lib.thimble_linear.restype = None
    lib.thimble_step.argtypes = [pointer] * 6 + [ctypes.c_double, pointer, number, number, pointer] + [ctypes.c_int] * 2
    lib.thimble_step.restype = None
    lib.isa = lib.thimble_best_isa()
    return lib


def build():
    """Path of the library, compiled unless it has been before. OSError or CalledProcessError if that fails."""
    errors = []
    for compiler in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        try:
            version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        name = hashlib.sha256(SOURCE.read_bytes() + version + " ".join(FLAGS).encode()).hexdigest()[:16]
        user = os.getuid() if hasattr(os, "getuid") else 0
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "thimble"
        temporary = Path(tempfile.gettempdir()) / f"thimble-{user}"
        for folder in (cache, temporary) if cache.is_absolute() else (temporary,):  # not all users have a home
            path = folder / f"ternary-{name}.so"
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                if folder == temporary and folder.lstat().st_uid != user:
                    raise PermissionError(f"{folder} belongs to another user")  # who could put anything there
                return path if usable(path) else compile_to(path, compiler)
            except (OSError, subprocess.CalledProcessError) as e:
                errors.append(e)
    raise errors[-1] if errors else FileNotFoundError("no C++ compiler: install g++ or clang++, or set CXX")


def usable(path):
    """Whether path is a library of ours, whole: a sum of its bytes lies beside it."""
    try:
        return path.with_suffix(".sha256").read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


def compile_to(path, compiler):
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        for openmp in (["-fopenmp"], []):                  # without it: one thread
            done = subprocess.run([compiler, *FLAGS, *openmp, str(SOURCE), "-o", str(new)], capture_output=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        new.with_suffix(".sha256").write_text(hashlib.sha256(new.read_bytes()).hexdigest())
        os.replace(new.with_suffix(".sha256"), path.with_suffix(".sha256"))
        os.replace(new, path)
    return path
