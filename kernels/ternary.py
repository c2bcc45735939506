"""Ternary weights at 2 bits, activations at 8: the C++ kernel (ternary.cpp) and its twin in plain torch, bit for bit.

    codes = pack(t)                                # t (N, K) of -1, 0, 1 -> uint8
    y = linear(x, codes, scales)                   # x (..., K) -> (..., N)
    step = stepper(model, rope_table)              # all of a packed model's step in C++; None where it does not fit

The kernel is compiled on first use with the machine's C++ compiler and kept in ~/.cache/thimble. Without a compiler,
and on any device but a CPU, the twin takes over (a CUDA kernel would be called beside the C++ one, in `linear`).
"""
import copy
import ctypes
import functools
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
# No contraction to fused multiply-adds: every path, and the twin, must round alike. The last three change no result.
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w"]
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2, "neon": 3}
TOLERANCE = 1e-5  # of a Stepper's logits, relative to the largest; the float32 sums of its head are off by about 1e-7


# ---- one matrix
def row_bytes(k):
    """Bytes of a row of k weights: four a byte, in blocks of 256."""
    return math.ceil(k / 256) * 64


def pack(t):
    """t (N, K) of -1, 0, 1 -> codes uint8 (N, ceil(K / 256) * 64), four a byte; ternary.cpp describes the layout."""
    if not ((t >= -1) & (t <= 1) & (t == t.round())).all():
        raise ValueError("only -1, 0 and 1 can be packed")
    n, k = t.shape
    codes = (t + 1).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -k % 256), value=1)  # 1 stands for t = 0
    planes = codes.view(n, -1, 4, 64)  # of each block of 256
    packed = planes[:, :, 0] | planes[:, :, 1] << 2 | planes[:, :, 2] << 4 | planes[:, :, 3] << 6
    return packed.flatten(1)


def unpack(codes, k):
    """codes (N, blocks * 64) -> t (N, k) int8."""
    blocks = codes.view(len(codes), -1, 64)
    planes = [blocks >> shift & 3 for shift in (0, 2, 4, 6)]
    codes = torch.stack(planes, 2).flatten(1)  # (N, blocks * 256)
    return codes[:, :k].to(torch.int8) - 1


def linear_torch(x, codes, scales, group_size=0):
    """The twin: x (..., K) -> (..., N) with float32 rounding exactly as ternary.cpp does it.

    q = round(x * s), s = 127 / max|x| of each token; y = (q t^T) * (scales / s), or by groups of inputs
    ((q t^T)_0 * scales_0 + (q t^T)_1 * scales_1 + ...) / s. Sums of integers below 2^24 are exact in float32.
    """
    t = unpack(codes, x.size(-1)).to(x.dtype)  # (N, K)
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)  # (..., 1)
    q = (x * scale).round()
    if not group_size:
        return (q @ t.mT) * (scales / scale)
    groups = zip(q.split(group_size, -1), t.split(group_size, -1), scales, strict=True)
    total = 0
    for q_g, t_g, scale_g in groups:
        total = total + (q_g @ t_g.mT) * scale_g
    return total / scale


def scales_shape(n, k, group_size):
    """Shape of the scales of a matrix (N, K)."""
    if not group_size:
        return ()
    return k // group_size, n


def linear(x, codes, scales, group_size=0):
    """x (..., K), codes from `pack`, scales () or (K / group_size, N) -> (..., N), in x's dtype."""
    k = x.size(-1)
    n = len(codes)
    shape = scales_shape(n, k, group_size)
    if codes.shape[1] != row_bytes(k) or scales.shape != shape or (group_size and k % group_size):
        raise ValueError(f"x (..., {k}) does not fit codes {tuple(codes.shape)} and scales {tuple(scales.shape)}")
    lib = None
    # the C++ sums in blocks of 128 inputs, so it knows no smaller groups
    if x.dtype == torch.float32 and x.device.type == "cpu" and group_size % 128 == 0:
        lib = library()
    if lib is None:
        return linear_torch(x, codes, scales, group_size)
    x = x.contiguous()  # (M, K), whatever its shape
    y = x.new_empty(*x.shape[:-1], n)
    lib.thimble_linear(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), y.data_ptr(), x.numel() // k, n, k,
                       group_size, lib.isa, torch.get_num_threads())
    return y


# ---- a whole step
class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in (
        "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "vocab_size", "group_size", "n_streams", "relu2",
        "max_len")]


class Stepper:
    """Model.step of a packed ternary model, in one C++ call for each row of a batch.

    All but the head is computed in float64 (ternary.cpp says why), and so is the cache. C++ reads the weights where
    they lie, trusting their shapes; so a model whose tensors have other shapes is refused here, with a ValueError.
    """

    def __init__(self, model, rope_table):
        c = model.config
        if c.n_streams not in (1, 2, 4):
            raise ValueError(f"n_streams={c.n_streams}")
        n_hidden = len(model.blocks[0].mlp.up_proj.codes)
        self.shape = Shape(c.n_layer, c.n_head, c.n_kv_head or c.n_head, c.n_embd, n_hidden, c.vocab_size,
                           c.group_size, c.n_streams, c.act == "relu2", 0)
        self.lib = library()
        self.head_dim = c.n_embd // c.n_head
        self.eps = c.norm_eps
        self.theta = c.rope_theta
        self.rope_table = rope_table
        self.rope = None  # cos and sin of max_len positions, made at the first call
        self.kept = []  # tensors whose addresses C++ holds
        addresses = []
        for block in model.blocks:
            addresses += self.layer(block)
        self.fields = len(addresses) // len(model.blocks)  # of a struct Layer
        self.layers = (ctypes.c_void_p * len(addresses))(*addresses)
        self.norm = self.wide(model.norm.weight, c.n_embd)
        self.embed = checked(model.embed.weight, c.vocab_size, c.n_embd).detach().half()

    def layer(self, block):
        """Addresses of a block's weights, in the order of struct Layer in ternary.cpp."""
        C = self.shape.n_embd
        M = self.shape.n_hidden
        kv = self.shape.n_kv_head * self.head_dim
        attn = block.attn
        mlp = block.mlp
        addresses = [self.wide(block.attn_norm.weight, C)]
        addresses += self.matrix(attn.q_proj, C, C)
        addresses += self.matrix(attn.k_proj, kv, C)
        addresses += self.matrix(attn.v_proj, kv, C)
        addresses += self.matrix(attn.o_proj, C, C)
        addresses += [self.wide(getattr(attn.sub_norm, "weight", None), C)]
        addresses += self.streams(block.attn_residual)
        addresses += [self.wide(block.mlp_norm.weight, C)]
        addresses += self.matrix(mlp.gate_proj, M, C)
        addresses += self.matrix(mlp.up_proj, M, C)
        addresses += self.matrix(mlp.down_proj, C, M)
        addresses += [self.wide(getattr(mlp.sub_norm, "weight", None), M)]
        addresses += self.streams(block.mlp_residual)
        return [*addresses, None, None]  # keys and values of the cache: at each call

    def matrix(self, linear, n_out, n_in):
        """Addresses of a matrix's codes and scales."""
        group_size = self.shape.group_size
        if group_size and n_in % group_size:
            raise ValueError(f"{n_in} inputs in groups of {group_size}")
        codes = checked(linear.codes, n_out, row_bytes(n_in))
        scales = checked(linear.scales, *scales_shape(n_out, n_in, group_size))
        if codes.dtype != torch.uint8 or scales.dtype != torch.float32:
            raise ValueError(f"codes {codes.dtype}, scales {scales.dtype}")
        codes = codes.contiguous()
        scales = scales.contiguous()
        self.kept += [codes, scales]
        return [codes.data_ptr(), scales.data_ptr()]

    def streams(self, residual):
        """Addresses of what mixes the streams around a layer: bias, gain, proj and scale."""
        n = self.shape.n_streams
        width = n * self.shape.n_embd
        if n == 1:
            return [None] * 4
        n_logits = 2 * n + math.factorial(n)
        if residual.proj is None:  # static: the first permutation's logit is 0 and not stored
            return [self.wide(residual.bias, n_logits - 1), None, None, None]
        return [self.wide(residual.bias, n_logits), self.wide(residual.gain, width),
                self.wide(residual.proj, n_logits, width), self.wide(residual.scale, 3)]

    def wide(self, tensor, *shape):
        """Address of a float64 copy of the tensor; None for None."""
        if tensor is None:
            return None
        copied = checked(tensor, *shape).detach().double().contiguous()
        self.kept.append(copied)
        return copied.data_ptr()

    def __call__(self, idx, cache):
        """idx (B, T), cache of Model.init_cache in float64, to be filled in -> logits (B, V) float32 of the last."""
        B, T = idx.shape
        keys = cache["layers"][0]["k"]
        if keys.dtype != torch.float64 or not keys.is_contiguous():
            raise ValueError(f"the compiled step needs a cache of contiguous float64, not {keys.dtype}")
        max_len = keys.size(2)
        starts = cache["pos"].expand(B).tolist()  # one for all rows, or one each
        lowest = int(idx.min())
        highest = int(idx.max())
        if max(starts) + T > max_len or lowest < 0 or highest >= self.shape.vocab_size:
            raise IndexError(f"{T} ids up to {highest} at position {max(starts)} do not fit a cache of "
                             f"{max_len} and a vocabulary of {self.shape.vocab_size}")
        if self.shape.max_len != max_len:
            # another cache than the last one's; a server and a sampler keep to one
            tables = self.rope_table(torch.arange(max_len), self.head_dim, self.theta)
            self.rope = [checked(table, max_len, self.head_dim).double().contiguous() for table in tables]
            self.shape.max_len = max_len
        idx = idx.long().contiguous()
        logits = torch.empty(B, self.shape.vocab_size)
        for row, start in enumerate(starts):
            # the last two fields of each layer; the rest stays as it is
            for i, layer in enumerate(cache["layers"], 1):
                self.layers[i * self.fields - 2] = layer["k"][row].data_ptr()
                self.layers[i * self.fields - 1] = layer["v"][row].data_ptr()
            cos, sin = (table[start].data_ptr() for table in self.rope)
            self.lib.thimble_step(ctypes.byref(self.shape), self.layers, self.embed.data_ptr(), self.norm, cos, sin,
                                  self.eps, idx[row].data_ptr(), T, start, logits[row].data_ptr(), self.lib.isa,
                                  torch.get_num_threads())
        return logits


def checked(tensor, *shape):
    """The tensor; ValueError unless it has this shape."""
    if tensor.shape != shape:
        raise ValueError(f"a tensor of {tuple(tensor.shape)} where {shape} is expected")
    return tensor


STEPPERS = weakref.WeakKeyDictionary()  # {model: (the state of its tensors, the Stepper for them or None)}


def stepper(model, rope_table, renew=True):
    """The Stepper of a packed model, or None where the model's own Python has to do the work.

    renew: whether the weights may have changed since the last call. Looking takes as long as a token.
    """
    known = STEPPERS.get(model)
    if known and not renew:
        return known[1]
    versions = [(tensor.data_ptr(), tensor._version) for tensor in model.state_dict().values()]
    if not known or known[0] != versions:
        known = versions, new_stepper(model, rope_table)
        STEPPERS[model] = known
    return known[1]


def new_stepper(model, rope_table):
    """A Stepper that computes what the model does; None otherwise.

    The C++ is a second copy of an architecture that forks of ternary.py change. So it never stands in for a model
    before it has been compared with that model's own step; where they differ, the model is right.
    """
    dtypes = {tensor.dtype for tensor in model.parameters()}
    devices = {tensor.device.type for tensor in model.parameters()}
    if dtypes != {torch.float32} or devices != {"cpu"} or model.config.group_size % 128 or not library():
        return None
    try:
        found = Stepper(model, rope_table)
        off = difference(found, model)
        if off <= TOLERANCE:
            return found
        why = f"their logits differ by {off:.0e} of the largest"
    except Exception as e:  # whatever a fork lacks or calls by another name
        why = " ".join(f"{type(e).__name__}: {e}".split())  # on one line
    file = f"{type(model).__module__}.py"
    note(f"{file} is not what kernels/ternary.cpp computes ({why}): its own Python decodes, slower")
    return None


@torch.no_grad()
def difference(step, model):
    """How far a Stepper is from the model's own step in float64: of logits, relative to the largest.

    In float32 a rounding may tip (ternary.cpp), in float64 only another architecture makes a visible difference.
    A prefill and a single token, at the end of a context of random keys and values: what depends on the distance, or
    looks back for some tokens only, shows there as well.
    """
    exact = copy.deepcopy(model).double()  # which is plain Python: a Stepper is for float32 only
    generator = torch.Generator().manual_seed(0)  # the global one belongs to the sampler
    idx = torch.randint(model.config.vocab_size, (1, 6), generator=generator)
    max_len = max(idx.size(1), min(model.config.block_size, 1024))
    cache = exact.init_cache(1, max_len)
    shape = (1, step.shape.n_kv_head, max_len, step.head_dim)
    for layer in cache["layers"]:
        for keys_or_values in (layer["k"], layer["v"]):
            checked(keys_or_values, *shape).uniform_(-1, 1, generator=generator)
    cache["pos"] = cache["pos"] + max_len - idx.size(1)
    worst = 0.0
    largest = 0.0
    with torch.autocast("cpu", enabled=False):
        for part in idx.split((5, 1), 1):
            # First the copy: C++ then puts its own keys and values in the place of the copy's, at the same position.
            expected, after = exact.step(part, cache)
            logits = step(part, cache)
            cache = after
            worst = max(worst, (logits - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    return worst / max(largest, 1e-30)


@functools.cache
def note(text):
    """One line, once."""
    print(f"note: {text}", file=sys.stderr)


# ---- the compiler
@functools.cache
def library():
    """The compiled kernel; None, with one line of notice, where it cannot be had."""
    try:
        lib = ctypes.CDLL(str(build()))
    except (OSError, subprocess.CalledProcessError) as e:
        why = str(e)
        if isinstance(e, subprocess.CalledProcessError):
            why = " ".join(e.stderr.decode(errors="replace").strip().splitlines()[:1])
        note(f"no C++ kernel ({why}): ternary models run in plain torch, slower")
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
    error = FileNotFoundError("no C++ compiler: install g++ or clang++, or set CXX")
    for compiler in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if not compiler:
            continue
        try:
            version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        # another source, compiler or flag is another file
        made_of = SOURCE.read_bytes() + version + " ".join(FLAGS).encode()
        name = hashlib.sha256(made_of).hexdigest()[:16]
        for folder in folders():
            path = folder / f"ternary-{name}.so"
            try:
                make_private(folder)
                if not usable(path):
                    compile_to(path, compiler)
                return path
            except (OSError, subprocess.CalledProcessError) as e:
                error = e
    raise error


def folders():
    """Where a library may be kept: the user's cache; the temporary folder for a user without a home or a full disk."""
    temporary = Path(tempfile.gettempdir()) / f"thimble-{user_id()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "thimble"
    if not cache.is_absolute():  # a user without a home
        return [temporary]
    return [cache, temporary]


def user_id():
    return os.getuid() if hasattr(os, "getuid") else 0  # Windows has none


def make_private(folder):
    """Create the folder. PermissionError if it is another user's, who could put any code there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.parent == Path(tempfile.gettempdir()) and folder.lstat().st_uid != user_id():
        raise PermissionError(f"{folder} belongs to another user")


def usable(path):
    """Whether path is a complete library of ours: its SHA-256 lies beside it."""
    try:
        expected = path.with_suffix(".sha256").read_text()
        return expected == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


def compile_to(path, compiler):
    """Compile under a temporary name, then rename: other processes may be doing the same."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        for openmp in (["-fopenmp"], []):  # without it: one thread
            done = subprocess.run([compiler, *FLAGS, *openmp, str(SOURCE), "-o", str(new)], capture_output=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        checksum = new.with_suffix(".sha256")
        checksum.write_text(hashlib.sha256(new.read_bytes()).hexdigest())
        os.replace(checksum, path.with_suffix(".sha256"))
        os.replace(new, path)
